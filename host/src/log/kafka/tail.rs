//! A reader of all partitions of a topic that joins no group and commits nothing: for people who look into the log.

use std::collections::BTreeSet;
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{Consumer, ConsumerContext, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::util::Timeout;
use tracing::debug;

use super::super::LogError;
use super::bootstrap::{Bootstrap, STATISTICS};
use super::message::{RawHeader, raw_headers};
use super::{ClientSettings, Kind, log_error, log_line};

/// How long one question to the log may take.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);

/// Where in each partition to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At the oldest record that is kept.
    Beginning,
    /// Behind the newest record there is now.
    End,
    /// At this offset, or the nearest that there is.
    Offset(i64),
}

/// A record as it stands in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TailRecord {
    /// Its partition.
    pub partition: i32,
    /// Its offset in the partition.
    pub offset: i64,
    /// Milliseconds since the Unix epoch, where the record carries a timestamp.
    pub timestamp: Option<i64>,
    /// The key.
    pub key: Option<Vec<u8>>,
    /// The value; `None` is a tombstone.
    pub value: Option<Vec<u8>>,
    /// Names, which may be any bytes, and values of the headers, in their order.
    pub headers: Vec<RawHeader>,
}

/// What a tail meets.
#[derive(Debug)]
pub enum Event {
    /// A record. Those of one partition come in order, those of several in any.
    Record(TailRecord),
    /// Every partition has been read to its end. More may follow.
    End,
}

/// Reads on and on.
pub struct Tail {
    consumer: StreamConsumer<Context>,
    /// Partitions whose end was not met yet.
    unread: BTreeSet<i32>,
}

impl Tail {
    /// Looks the topic's partitions up and begins to read them all.
    pub async fn open(
        settings: &ClientSettings,
        topic: &str,
        start: Start,
    ) -> Result<Self, LogError> {
        let config = settings.client_config(
            Kind::Consumer,
            &[],
            &[
                // librdkafka wants a name, though a consumer that is told its partitions joins no group.
                ("group.id", "stagehost-tail"),
                ("enable.auto.commit", "false"),
                ("enable.partition.eof", "true"),
                ("allow.auto.create.topics", "false"),
                ("auto.offset.reset", "earliest"),
                STATISTICS,
            ],
        );
        let context = Context {
            bootstrap: Bootstrap::new(settings),
        };
        let consumer: StreamConsumer<Context> =
            StreamConsumer::from_config_and_context(&config, context)
                .map_err(|error| LogError::Refused(format!("cannot make a consumer: {error}")))?;
        consumer.context().bootstrap.is_of(consumer.client());
        let name = topic.to_owned();
        // librdkafka blocks on questions.
        let opened = tokio::task::spawn_blocking(move || {
            let partitions = assign(&consumer, &name, start)?;
            Ok((consumer, partitions))
        });
        let (consumer, unread) = opened
            .await
            .map_err(|error| LogError::Unavailable(error.to_string()))??;
        Ok(Self { consumer, unread })
    }

    /// The next record, or that the end is met for the first time. Waits through outages.
    ///
    /// Cancel-safe: an event is either returned or still to come.
    pub async fn next(&mut self) -> Result<Event, LogError> {
        loop {
            match self.consumer.recv().await {
                Ok(message) => return Ok(Event::Record(TailRecord::of(&message))),
                Err(KafkaError::PartitionEOF(partition)) => {
                    if self.unread.remove(&partition) && self.unread.is_empty() {
                        return Ok(Event::End);
                    }
                }
                Err(error) => match log_error(&error) {
                    LogError::Unavailable(why) => debug!("waiting for the log: {why}"),
                    refused => return Err(refused),
                },
            }
        }
    }
}

impl TailRecord {
    fn of(message: &BorrowedMessage<'_>) -> Self {
        Self {
            partition: message.partition(),
            offset: message.offset(),
            timestamp: message.timestamp().to_millis(),
            key: message.key().map(<[u8]>::to_vec),
            value: message.payload().map(<[u8]>::to_vec),
            headers: raw_headers(message),
        }
    }
}

/// Blocks.
fn assign(
    consumer: &StreamConsumer<Context>,
    topic: &str,
    start: Start,
) -> Result<BTreeSet<i32>, LogError> {
    let partitions = partitions(consumer, topic)?;
    let mut places = TopicPartitionList::new();
    for &partition in &partitions {
        let (low, high) = consumer
            .fetch_watermarks(topic, partition, Timeout::After(ASK_TIMEOUT))
            .map_err(|error| log_error(&error))?;
        let offset = match start {
            Start::Beginning => low,
            Start::End => high,
            Start::Offset(offset) => offset.clamp(low, high),
        };
        places
            .add_partition_offset(topic, partition, Offset::Offset(offset))
            .map_err(|error| log_error(&error))?;
    }
    consumer
        .assign(&places)
        .map_err(|error| log_error(&error))?;
    Ok(partitions)
}

fn partitions(consumer: &StreamConsumer<Context>, topic: &str) -> Result<BTreeSet<i32>, LogError> {
    let metadata = consumer
        .fetch_metadata(Some(topic), Timeout::After(ASK_TIMEOUT))
        .map_err(|error| log_error(&error))?;
    let partitions: BTreeSet<i32> = metadata
        .topics()
        .iter()
        .filter(|found| found.name() == topic)
        .flat_map(|found| found.partitions().iter().map(|partition| partition.id()))
        .collect();
    if partitions.is_empty() {
        return Err(LogError::Refused(format!("there is no topic `{topic}`")));
    }
    Ok(partitions)
}

struct Context {
    bootstrap: Bootstrap,
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_line(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            tracing::warn!("the log is away; waiting for it ({reason})");
        } else {
            debug!(target: "librdkafka", "{error}: {reason}");
        }
    }

    fn stats_raw(&self, statistics: &[u8]) {
        self.bootstrap.hear(statistics);
    }
}

impl ConsumerContext for Context {}
