//! A broker to test against, and clients for it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use embedded_kafka::{Broker, Config};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};
use rdkafka::producer::{BaseProducer, BaseRecord, FutureProducer, Producer};
use rdkafka::{Offset, TopicPartitionList};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use uuid::Uuid;

/// A test that has not got what it waits for by then never will.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(100);

/// A running broker, embedded in this process or Apache Kafka.
pub(crate) struct Cluster {
    pub(crate) brokers: String,
    runtime: Runtime,
    embedded: Option<(Broker, TempDir)>,
}

/// A record as it was read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Seen {
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) timestamp: Option<i64>,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: Option<Vec<u8>>,
    pub(crate) headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Cluster {
    pub(crate) fn embedded() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut config = Config::new(folder.path());
        config.default_partitions = 1;
        config.compaction_check = Duration::from_millis(100);
        Self::embedded_with(config, folder)
    }

    pub(crate) fn embedded_with(config: Config, folder: TempDir) -> Self {
        let runtime = runtime();
        let broker = runtime
            .block_on(Broker::start(config))
            .expect("the broker starts");
        Self {
            brokers: broker.address().to_string(),
            runtime,
            embedded: Some((broker, folder)),
        }
    }

    pub(crate) fn apache() -> Self {
        let brokers = std::env::var("KAFKA_BROKERS")
            .expect("KAFKA_BROKERS is not set: run `make test`, which starts Apache Kafka");
        Self {
            brokers,
            runtime: runtime(),
            embedded: None,
        }
    }

    /// Stops the embedded broker and gives back its folder.
    pub(crate) fn stop(self) -> TempDir {
        let (broker, folder) = self.embedded.expect("an embedded broker");
        self.runtime.block_on(broker.shutdown());
        folder
    }

    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.brokers
            .split(',')
            .next()
            .and_then(|broker| broker.parse().ok())
            .expect("an address")
    }

    pub(crate) fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.brokers);
        config
    }

    /// A configuration with more keys.
    pub(crate) fn config_with(&self, entries: &[(&str, &str)]) -> ClientConfig {
        let mut config = self.config();
        for (key, value) in entries {
            config.set(*key, *value);
        }
        config
    }

    pub(crate) fn admin(&self) -> AdminClient<DefaultClientContext> {
        self.config().create().expect("an admin client")
    }

    /// A new topic with a name of its own.
    pub(crate) fn topic(&self, partitions: i32) -> String {
        self.topic_with(partitions, &[])
    }

    pub(crate) fn topic_with(&self, partitions: i32, config: &[(&str, &str)]) -> String {
        let name = unique("t");
        let mut topic = NewTopic::new(&name, partitions, TopicReplication::Fixed(1));
        for (key, value) in config {
            topic = topic.set(key, value);
        }
        let created = self.block_on(self.admin().create_topics(&[topic], &AdminOptions::new()));
        assert_eq!(created.expect("an answer"), [Ok(name.clone())]);
        // Apache Kafka answers before all of it knows the topic.
        let consumer: BaseConsumer = self.config().create().expect("a consumer");
        eventually("the topic is there", || {
            let metadata = consumer
                .fetch_metadata(Some(&name), PATIENCE)
                .expect("metadata");
            let topic = &metadata.topics()[0];
            topic.error().is_none()
                && topic.partitions().len() == partitions as usize
                && topic
                    .partitions()
                    .iter()
                    .all(|partition| partition.error().is_none())
        });
        name
    }

    pub(crate) fn producer(&self, entries: &[(&str, &str)]) -> BaseProducer {
        self.config_with(entries).create().expect("a producer")
    }

    pub(crate) fn future_producer(&self, entries: &[(&str, &str)]) -> FutureProducer {
        self.config_with(entries).create().expect("a producer")
    }

    /// Produces values to a partition, in order, and waits until they are acknowledged.
    pub(crate) fn produce(&self, topic: &str, partition: i32, values: &[&str]) {
        let producer = self.producer(&[("linger.ms", "0")]);
        for value in values {
            let record = BaseRecord::<(), str>::to(topic)
                .partition(partition)
                .payload(value);
            producer.send(record).expect("room in the queue");
        }
        producer.flush(PATIENCE).expect("acknowledgements");
    }

    /// A consumer of one partition without a group.
    pub(crate) fn reader(
        &self,
        topic: &str,
        partition: i32,
        offset: Offset,
        entries: &[(&str, &str)],
    ) -> BaseConsumer {
        let mut config = self.config_with(&[
            ("group.id", "reader"),
            ("enable.auto.commit", "false"),
            ("auto.offset.reset", "error"),
            ("fetch.error.backoff.ms", "100"),
        ]);
        for (key, value) in entries {
            config.set(*key, *value);
        }
        let consumer: BaseConsumer = config.create().expect("a consumer");
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(topic, partition, offset)
            .expect("an offset");
        consumer.assign(&list).expect("an assignment");
        consumer
    }

    /// The first `count` records of a partition.
    pub(crate) fn read(&self, topic: &str, partition: i32, count: usize) -> Vec<Seen> {
        read(
            &self.reader(topic, partition, Offset::Beginning, &[]),
            count,
        )
    }

    /// The first `count` values of a partition, as text.
    pub(crate) fn values(&self, topic: &str, partition: i32, count: usize) -> Vec<String> {
        self.read(topic, partition, count)
            .into_iter()
            .map(|seen| text(seen.value))
            .collect()
    }

    /// A member of a group that reads from the beginning and commits when told to.
    pub(crate) fn member(
        &self,
        group: &str,
        topic: &str,
        entries: &[(&str, &str)],
    ) -> BaseConsumer {
        let mut config = self.config_with(&[
            ("group.id", group),
            ("enable.auto.commit", "false"),
            ("auto.offset.reset", "earliest"),
            ("partition.assignment.strategy", "cooperative-sticky"),
            ("session.timeout.ms", "6000"),
            ("heartbeat.interval.ms", "200"),
            ("topic.metadata.refresh.interval.ms", "1000"),
        ]);
        for (key, value) in entries {
            config.set(*key, *value);
        }
        let consumer: BaseConsumer = config.create().expect("a consumer");
        consumer.subscribe(&[topic]).expect("a subscription");
        consumer
    }
}

/// Reads `count` records.
pub(crate) fn read(consumer: &BaseConsumer, count: usize) -> Vec<Seen> {
    let mut seen = Vec::with_capacity(count);
    let deadline = Instant::now() + PATIENCE;
    while seen.len() < count {
        assert!(
            Instant::now() < deadline,
            "only {} of {count} records came",
            seen.len()
        );
        if let Some(message) = consumer.poll(POLL) {
            seen.push(Seen::from(&message.expect("a record")));
        }
    }
    seen
}

impl Seen {
    fn from(message: &impl Message) -> Self {
        let headers = message.headers().map_or_else(Vec::new, |headers| {
            headers
                .iter()
                .map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec)))
                .collect()
        });
        Self {
            partition: message.partition(),
            offset: message.offset(),
            timestamp: message.timestamp().to_millis(),
            key: message.key().map(<[u8]>::to_vec),
            value: message.payload().map(<[u8]>::to_vec),
            headers,
        }
    }
}

/// Waits until something is so.
pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "still not so: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Polls consumers until something is so of them; gives the records that came.
pub(crate) fn poll_until(
    consumers: &[&BaseConsumer],
    what: &str,
    mut is_so: impl FnMut() -> bool,
) -> Vec<Seen> {
    let mut seen = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "still not so: {what}");
        for consumer in consumers {
            if let Some(message) = consumer.poll(Duration::from_millis(20)) {
                seen.push(Seen::from(&message.expect("a record")));
            }
        }
    }
    seen
}

/// The partitions that a consumer has.
pub(crate) fn assigned(consumer: &BaseConsumer) -> Vec<i32> {
    let list = consumer.assignment().expect("an assignment");
    let mut partitions: Vec<i32> = list
        .elements()
        .iter()
        .map(|element| element.partition())
        .collect();
    partitions.sort_unstable();
    partitions
}

/// Values by partition, in the order in which they came.
pub(crate) fn by_partition(seen: &[Seen]) -> BTreeMap<i32, Vec<String>> {
    let mut values: BTreeMap<i32, Vec<String>> = BTreeMap::new();
    for record in seen {
        values
            .entry(record.partition)
            .or_default()
            .push(text(record.value.clone()));
    }
    values
}

pub(crate) fn text(bytes: Option<Vec<u8>>) -> String {
    String::from_utf8(bytes.expect("a value")).expect("UTF-8")
}

pub(crate) fn unique(prefix: &str) -> String {
    format!("{prefix}-{}", Uuid::new_v4())
}

pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}
