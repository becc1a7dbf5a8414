//! Reads what the hosts left behind, with plain clients of the suite's own.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Headers, Message as _};
use rdkafka::{Offset, TopicPartitionList};
use sqlx::{Connection, PgConnection};
use tokio::runtime::Handle;

use crate::judge::{Progress, Record, Row};
use crate::pipeline::{CACHE_PREFIX, STAGES, Stage};

const ASK: Duration = Duration::from_secs(5);
const READ_PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(100);
const ID: &str = "stagehost-id";
const CAUSE: &str = "stagehost-cause";
/// Keys that Redis is asked for at once.
const KEYS_AT_ONCE: usize = 1_000;

/// How far the stages have got, for Kafka's clients of a moment.
pub(crate) struct Lag {
    consumers: Vec<(&'static Stage, BaseConsumer)>,
}

impl Lag {
    pub(crate) fn new(brokers: &str) -> Self {
        let consumers = STAGES.map(|stage| (stage, consumer(brokers, stage.group)));
        Self {
            consumers: consumers.into(),
        }
    }

    /// Every stage on every partition.
    pub(crate) fn progress(&self) -> KafkaResult<Vec<Progress>> {
        let mut all = Vec::new();
        for (stage, consumer) in &self.consumers {
            let list = partitions(consumer, stage.input)?;
            for element in consumer.committed_offsets(list, ASK)?.elements() {
                let partition = element.partition();
                let (low, end) = consumer.fetch_watermarks(stage.input, partition, ASK)?;
                let committed = match element.offset() {
                    Offset::Offset(offset) => offset,
                    _ => low,
                };
                all.push(Progress {
                    group: stage.group,
                    partition,
                    committed,
                    end,
                });
            }
        }
        Ok(all)
    }
}

/// All records of a topic up to its end, by partition and offset.
pub(crate) fn topic(brokers: &str, topic: &str) -> Vec<Record> {
    let consumer = consumer(brokers, "faults.judge");
    let list = partitions(&consumer, topic).unwrap_or_else(|e| panic!("{topic}: {e}"));
    consumer.assign(&list).expect("assigned");
    let (mut records, mut at_end) = (Vec::new(), 0);
    let deadline = Instant::now() + READ_PATIENCE;
    while at_end < list.count() {
        assert!(Instant::now() < deadline, "{topic} was not read to its end");
        match consumer.poll(POLL) {
            Some(Ok(message)) => records.push(record(&message)),
            Some(Err(KafkaError::PartitionEOF(_))) => at_end += 1,
            Some(Err(_)) | None => {}
        }
    }
    records.sort_by_key(|record| (record.partition, record.offset));
    records
}

fn consumer(brokers: &str, group: &str) -> BaseConsumer {
    ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("reconnect.backoff.max.ms", "1000")
        .create()
        .expect("a consumer")
}

fn partitions(consumer: &BaseConsumer, topic: &str) -> KafkaResult<TopicPartitionList> {
    let metadata = consumer.fetch_metadata(Some(topic), ASK)?;
    let mut list = TopicPartitionList::new();
    for partition in metadata.topics().iter().flat_map(|t| t.partitions()) {
        list.add_partition_offset(topic, partition.id(), Offset::Beginning)?;
    }
    Ok(list)
}

fn record(message: &BorrowedMessage<'_>) -> Record {
    let (mut id, mut cause) = (None, None);
    for header in message.headers().iter().flat_map(|headers| headers.iter()) {
        let text = || {
            header
                .value
                .map(|v| String::from_utf8_lossy(v).into_owned())
        };
        match header.key {
            ID => id = text(),
            // What stands before it is the id of the record that became a dead letter.
            CAUSE => (id, cause) = (None, text()),
            _ => {}
        }
    }
    Record {
        partition: message.partition(),
        offset: message.offset(),
        timestamp: message.timestamp().to_millis().expect("a timestamp"),
        message: serde_json::from_slice(message.payload().unwrap_or_default())
            .expect("a message of the load"),
        id,
        cause,
    }
}

/// The rows that a stage has written, in the order in which it did.
pub(crate) fn rows(runtime: &Handle, url: &str, lane: &str) -> Vec<Row> {
    let select = "SELECT key, seq FROM effects WHERE lane = $1 ORDER BY id";
    let rows: Vec<(String, i64)> = runtime
        .block_on(async {
            let mut connection = PgConnection::connect(url).await?;
            sqlx::query_as(select)
                .bind(lane)
                .fetch_all(&mut connection)
                .await
        })
        .expect("the rows are read");
    rows.into_iter()
        .map(|(key, seq)| Row { key, seq })
        .collect()
}

/// What Redis holds, by the message's key.
pub(crate) fn cache(url: &str) -> HashMap<String, i64> {
    let read = || -> redis::RedisResult<HashMap<String, i64>> {
        let mut connection = redis::Client::open(url)?.get_connection()?;
        let pattern = format!("{CACHE_PREFIX}*");
        let keys: Vec<String> = redis::cmd("KEYS").arg(pattern).query(&mut connection)?;
        let mut cache = HashMap::new();
        for keys in keys.chunks(KEYS_AT_ONCE) {
            let values: Vec<i64> = redis::cmd("MGET").arg(keys).query(&mut connection)?;
            let keys = keys
                .iter()
                .map(|key| key.trim_start_matches(CACHE_PREFIX).to_owned());
            cache.extend(keys.zip(values));
        }
        Ok(cache)
    };
    read().expect("Redis is read")
}
