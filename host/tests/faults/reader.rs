//! Reads what the hosts left behind, with plain clients of the suite's own.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Headers, Message as _, OwnedHeaders};
use rdkafka::{Offset, TopicPartitionList};
use sqlx::{Connection, PgConnection};
use tokio::runtime::Handle;

use crate::judge::{Progress, Record, Row};
use crate::pipeline::{CACHE_PREFIX, STAGES, Stage};

const ASK: Duration = Duration::from_secs(5);
const READ_PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(100);
/// The group of the suite's own consumers, which commits nothing.
const JUDGE: &str = "faults.judge";
const ID: &str = "stagehost-id";
const CAUSE: &str = "stagehost-cause";
const WORDS: &str = "__dlq.errors.message";
/// What another program adds to the headers that it copies.
pub(crate) const COPIED: &str = "faults-copied";
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
            let list = partitions(consumer, stage.input, Offset::Beginning)?;
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

/// Reads dead letters as they come.
pub(crate) struct Letters(BaseConsumer);

impl Letters {
    pub(crate) fn new(brokers: &str) -> Self {
        let consumer = consumer(brokers, JUDGE);
        let mut list = TopicPartitionList::new();
        for stage in STAGES {
            let added = list.add_partition_offset(stage.letters, 0, Offset::Beginning);
            added.expect("an offset");
        }
        consumer.assign(&list).expect("assigned");
        Self(consumer)
    }

    /// Those that came since, as far as they are at hand, each with its stage.
    pub(crate) fn new_ones(&self) -> Vec<(&'static Stage, Record)> {
        let mut letters = Vec::new();
        while let Some(polled) = self.0.poll(POLL) {
            let Ok(message) = polled else {
                continue;
            };
            let of = STAGES.iter().find(|stage| stage.letters == message.topic());
            letters.extend(of.map(|stage| (*stage, record(&message))));
        }
        letters
    }
}

/// All records of a topic up to its end, by partition and offset.
pub(crate) fn topic(brokers: &str, topic: &str) -> Vec<Record> {
    let mut records = Vec::new();
    read(brokers, topic, Offset::Beginning, |message| {
        records.push(record(message));
    });
    records.sort_by_key(|record| (record.partition, record.offset));
    records
}

/// A record as another program copies it.
pub(crate) struct Raw {
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: Option<Vec<u8>>,
    pub(crate) headers: OwnedHeaders,
}

/// The last records of each partition of a topic, as they are.
pub(crate) fn tail(brokers: &str, topic: &str, of_each: i64) -> Vec<Raw> {
    let mut records = Vec::new();
    read(brokers, topic, Offset::OffsetTail(of_each), |message| {
        records.push(Raw {
            key: message.key().map(<[u8]>::to_vec),
            value: message.payload().map(<[u8]>::to_vec),
            headers: message.headers().map(|h| h.detach()).unwrap_or_default(),
        });
    });
    records
}

/// The first and end offset of each partition.
pub(crate) fn bounds(brokers: &str, topic: &str) -> BTreeMap<i32, (i64, i64)> {
    let consumer = consumer(brokers, JUDGE);
    let list = partitions(&consumer, topic, Offset::Beginning);
    let list = list.unwrap_or_else(|e| panic!("{topic}: {e}"));
    let of = |number| {
        let bounds = consumer.fetch_watermarks(topic, number, ASK);
        (number, bounds.unwrap_or_else(|e| panic!("{topic}: {e}")))
    };
    let elements = list.elements().into_iter();
    elements.map(|element| of(element.partition())).collect()
}

/// Gives all records from there to the end that is reached.
fn read(brokers: &str, topic: &str, from: Offset, mut each: impl FnMut(&BorrowedMessage<'_>)) {
    let consumer = consumer(brokers, JUDGE);
    let list = partitions(&consumer, topic, from).unwrap_or_else(|e| panic!("{topic}: {e}"));
    consumer.assign(&list).expect("assigned");
    let mut at_end = HashSet::new();
    let deadline = Instant::now() + READ_PATIENCE;
    while at_end.len() < list.count() {
        assert!(Instant::now() < deadline, "{topic} was not read to its end");
        match consumer.poll(POLL) {
            // What comes behind an end is another time's.
            Some(Ok(message)) if at_end.contains(&message.partition()) => {}
            Some(Ok(message)) => each(&message),
            Some(Err(KafkaError::PartitionEOF(partition))) => drop(at_end.insert(partition)),
            Some(Err(_)) | None => {}
        }
    }
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

fn partitions(
    consumer: &BaseConsumer,
    topic: &str,
    from: Offset,
) -> KafkaResult<TopicPartitionList> {
    let metadata = consumer.fetch_metadata(Some(topic), ASK)?;
    let mut list = TopicPartitionList::new();
    for partition in metadata.topics().iter().flat_map(|t| t.partitions()) {
        list.add_partition_offset(topic, partition.id(), from)?;
    }
    Ok(list)
}

fn record(message: &BorrowedMessage<'_>) -> Record {
    let (mut id, mut cause, mut words, mut is_copied) = (None, None, None, false);
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
            WORDS => words = text(),
            COPIED => is_copied = true,
            _ => {}
        }
    }
    Record {
        partition: message.partition(),
        offset: message.offset(),
        timestamp: message.timestamp().to_millis().expect("a timestamp"),
        message: serde_json::from_slice(message.payload().unwrap_or_default())
            .expect("a message of the load"),
        id: id.filter(|id| was_sent_to(id, message.topic(), message.partition())),
        cause,
        words,
        is_copied,
    }
}

/// Whether an id counts where it stands: `@cluster/topic/partition/…` names the place that its record was sent to, and other
/// programs copy headers.
fn was_sent_to(id: &str, topic: &str, partition: i32) -> bool {
    let mut parts = id.split('/');
    let cluster = parts.next().is_some_and(|part| part.starts_with('@'));
    let place = (parts.next(), parts.next().and_then(|p| p.parse().ok()));
    cluster && place == (Some(topic), Some(partition))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_counts_where_it_was_sent() {
        let id = "@x4gGFUeTRc/faults.middle/3/faults.first/faults.input/5/1700000000000/41/0";
        assert!(was_sent_to(id, "faults.middle", 3));
        assert!(!was_sent_to(id, "faults.middle", 5));
        assert!(!was_sent_to(id, "faults.input", 3));
        assert!(!was_sent_to("", "faults.middle", 3));
    }
}
