//! Whether the host's user may read what a stage reads. librdkafka says once that it may not, and never that it may again.

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::{Offset, TopicPartitionList};
use tracing::debug;

use super::super::LogError;
use super::{ClientSettings, Kind, QuietContext, log_error};

/// How long one question may take.
const ASK: Duration = Duration::from_secs(5);
/// How long one poll of the client takes.
const POLL: Duration = Duration::from_millis(100);

/// Reads the end of each topic, and the group's offset there, as a member would; an error names which. Blocks for some seconds
/// at most.
pub(crate) fn may_read(
    settings: &ClientSettings,
    group: &str,
    topics: &[String],
) -> Result<(), LogError> {
    let consumer = reader(settings, group).map_err(|error| log_error(&error))?;
    for topic in topics {
        let asked = committed(&consumer, topic).and_then(|()| read_end(&consumer, topic));
        asked.map_err(|error| match log_error(&error) {
            LogError::Unavailable(why) => {
                LogError::Unavailable(format!("group {group}, topic {topic}: {why}"))
            }
            other => other,
        })?;
    }
    Ok(())
}

/// A client that reads as a member of the group would, and joins none: it is told its partitions. It asks for the group's
/// coordinator all the same.
fn reader(settings: &ClientSettings, group: &str) -> KafkaResult<BaseConsumer<QuietContext>> {
    let fixed = [
        ("group.id", group),
        ("enable.auto.commit", "false"),
        ("enable.partition.eof", "true"),
    ];
    let config = settings.client_config(Kind::Consumer, &[], &fixed);
    BaseConsumer::from_config_and_context(&config, QuietContext)
}

/// Those of these topics that are not there. A list of all topics lacks also those that the host's user may not describe; asked
/// for by its name, one is told from the other. Blocks for some seconds at most.
pub(crate) fn not_there(
    settings: &ClientSettings,
    topics: &BTreeSet<String>,
) -> Result<BTreeSet<String>, LogError> {
    use RDKafkaErrorCode as Code;
    // Who asks for a name as producers do may have a topic made.
    let fixed = [("allow.auto.create.topics", "false")];
    let config = settings.client_config(Kind::Consumer, &[], &fixed);
    let consumer = BaseConsumer::from_config_and_context(&config, QuietContext);
    let consumer = consumer.map_err(|error| log_error(&error))?;
    let mut not_there = BTreeSet::new();
    for topic in topics {
        let metadata = consumer.fetch_metadata(Some(topic), ASK);
        let metadata = metadata.map_err(|error| log_error(&error))?;
        let error = metadata.topics().iter().find_map(|topic| topic.error());
        let code = error.map(Code::from);
        if matches!(
            code,
            Some(Code::UnknownTopicOrPartition | Code::InvalidTopic)
        ) {
            not_there.insert(topic.clone());
        }
    }
    Ok(not_there)
}

fn committed(consumer: &BaseConsumer<QuietContext>, topic: &str) -> KafkaResult<()> {
    let mut list = TopicPartitionList::new();
    list.add_partition(topic, 0);
    let committed = consumer.committed_offsets(list, ASK)?;
    committed.elements().iter().try_for_each(|e| e.error())
}

/// A fetch that is allowed comes to a partition's end, or brings a record: of any, for the leader of one may be away.
fn read_end(consumer: &BaseConsumer<QuietContext>, topic: &str) -> KafkaResult<()> {
    let metadata = consumer.fetch_metadata(Some(topic), ASK)?;
    let error = metadata.topics().iter().find_map(|topic| topic.error());
    if let Some(error) = error {
        return Err(KafkaError::MetadataFetch(error.into()));
    }
    let partitions = metadata
        .topics()
        .iter()
        .flat_map(|topic| topic.partitions());
    let mut end = TopicPartitionList::new();
    for partition in partitions {
        end.add_partition_offset(topic, partition.id(), Offset::End)?;
    }
    until_end(consumer, &end)
}

fn until_end(consumer: &BaseConsumer<QuietContext>, end: &TopicPartitionList) -> KafkaResult<()> {
    consumer.assign(end)?;
    let began = Instant::now();
    loop {
        match consumer.poll(POLL) {
            Some(Ok(_) | Err(KafkaError::PartitionEOF(_))) => return Ok(()),
            // One of several brokers may be away.
            Some(Err(error)) if !is_of_a_connection(&error) => return Err(error),
            _ if began.elapsed() > ASK => {
                let timed_out = RDKafkaErrorCode::OperationTimedOut;
                return Err(KafkaError::MessageConsumption(timed_out));
            }
            _ => {}
        }
    }
}

fn is_of_a_connection(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(
        error.rdkafka_error_code(),
        Some(Code::BrokerTransportFailure | Code::AllBrokersDown | Code::Resolve)
    )
}

/// Another client, which is asked whether it can read a partition.
pub(super) struct Another {
    pub(super) place: (String, i32),
    answer: mpsc::Receiver<bool>,
}

impl Another {
    /// Waits for nobody; `None` where there can be no thread.
    pub(super) fn ask(
        settings: &ClientSettings,
        group: &str,
        place: (String, i32),
    ) -> Option<Self> {
        let (tell, answer) = mpsc::channel();
        let (settings, group) = (settings.clone(), group.to_owned());
        let (topic, number) = place.clone();
        let ask = move || {
            let read = is_readable(&settings, &group, &topic, number);
            if let Err(error) = &read {
                debug!("nor can another client read {topic} {number}: {error}");
            }
            // Nobody waits for it any more where the stage has ended.
            let _ = tell.send(read.is_ok());
        };
        let thread = thread::Builder::new().name("another".into()).spawn(ask);
        thread.ok().map(|_| Self { place, answer })
    }

    /// Whether it can, once it is known.
    pub(super) fn can_read(&self) -> Option<bool> {
        match self.answer.try_recv() {
            Ok(can) => Some(can),
            Err(mpsc::TryRecvError::Empty) => None,
            Err(mpsc::TryRecvError::Disconnected) => Some(false),
        }
    }
}

fn is_readable(
    settings: &ClientSettings,
    group: &str,
    topic: &str,
    number: i32,
) -> KafkaResult<()> {
    let consumer = reader(settings, group)?;
    let mut end = TopicPartitionList::new();
    end.add_partition_offset(topic, number, Offset::End)?;
    until_end(&consumer, &end)
}
