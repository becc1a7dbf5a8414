//! What the embedded broker does not have, and how clients are told.

use std::time::{Duration, Instant};

use rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::producer::{BaseProducer, Producer};
use rdkafka::{Offset, TopicPartitionList};

use crate::cluster::{Cluster, eventually};
use crate::raw::{Answer, Connection, compact, string};

const OFFSET_COMMIT: i16 = 8;
const FIND_COORDINATOR: i16 = 10;
const INIT_PRODUCER_ID: i16 = 22;
const DESCRIBE_CONFIGS: i16 = 32;
const UNSUPPORTED_VERSION: i16 = 35;

#[test]
fn a_transaction_is_refused_as_what_is_not_there_and_not_as_forbidden() {
    let cluster = Cluster::embedded();
    let config = cluster.config_with(&[("transactional.id", "t")]);
    let producer: BaseProducer = config.create().unwrap();
    let error = producer
        .init_transactions(Duration::from_secs(3))
        .unwrap_err();
    assert_eq!(
        error.rdkafka_error_code(),
        Some(RDKafkaErrorCode::UnsupportedVersion),
        "{error}"
    );
    let mut connection = Connection::open(cluster.address());
    let asked = [&string("t")[..], &1000i32.to_be_bytes()].concat();
    let mut answer = Answer(connection.call(INIT_PRODUCER_ID, 0, &asked));
    assert_eq!((answer.i32(), answer.i16()), (0, UNSUPPORTED_VERSION));
    // Clients that show what the coordinator's answer says show this.
    let asked = [&compact("t")[..], &[1, 0]].concat();
    let mut answer = Answer(connection.call_flexible(FIND_COORDINATOR, 3, &asked));
    assert_eq!((answer.i32(), answer.i16()), (0, UNSUPPORTED_VERSION));
    let why = answer.compact();
    assert!(why.contains("no transactions; use Apache Kafka"), "{why}");
    // Who needs none has an idempotent producer.
    cluster.produce(&cluster.topic(1), 0, &["a"]);
}

#[test]
fn a_client_that_wants_the_new_group_protocol_gets_an_error_at_once() {
    let cluster = Cluster::embedded();
    let config = cluster.config_with(&[("group.id", "g"), ("group.protocol", "consumer")]);
    let consumer: BaseConsumer = config.create().unwrap();
    consumer.subscribe(&[&cluster.topic(1)]).unwrap();
    let begun = Instant::now();
    let mut error = None;
    eventually("an error", || {
        let polled = consumer.poll(Duration::from_millis(100));
        error = polled.and_then(Result::err).or(error.take());
        consumer.client().fatal_error().is_some()
    });
    assert!(begun.elapsed() < Duration::from_secs(20));
    let (code, why) = consumer.client().fatal_error().unwrap();
    assert_eq!(code, RDKafkaErrorCode::UnsupportedVersion, "{why}");
}

#[test]
fn java_is_told_what_there_is_not() {
    crate::cases::clients::java_is_told_what_there_is_not(&Cluster::embedded());
}

/// Apache Kafka 4 has no such version any more; older clients ask in it.
#[test]
fn configuration_is_described_in_the_oldest_version() {
    let cluster = Cluster::embedded();
    let topic = cluster.topic_with(1, &[("retention.ms", "77")]);
    let mut connection = Connection::open(cluster.address());
    let one = 1i32.to_be_bytes();
    let keys = [
        &2i32.to_be_bytes()[..],
        &string("retention.ms"),
        &string("cleanup.policy"),
    ]
    .concat();
    let asked = [&one[..], &[2], &string(&topic), &keys].concat();
    let mut answer = Answer(connection.call(DESCRIBE_CONFIGS, 0, &asked));
    assert_eq!((answer.i32(), answer.i32(), answer.i16()), (0, 1, 0));
    assert_eq!((answer.string(), answer.take()), (String::new(), [2]));
    assert_eq!((answer.string(), answer.i32()), (topic, 2));
    for (key, value, is_default) in [("cleanup.policy", "delete", 1), ("retention.ms", "77", 0)] {
        assert_eq!((&*answer.string(), &*answer.string()), (key, value));
        assert_eq!(answer.take(), [0, is_default, 0]);
    }
    assert!(answer.0.is_empty());
}

/// A request of some MiB that would have had some GiB kept: the group's name beside each of its offsets.
#[test]
fn an_offset_that_is_committed_often_in_one_request_is_kept_once() {
    const TIMES: usize = 400_000;
    let cluster = Cluster::embedded();
    let topic = cluster.topic(1);
    let group = "g".repeat(30_000);
    let offset =
        |offset: i64| [&[0; 4][..], &offset.to_be_bytes(), &(-1i16).to_be_bytes()].concat();
    let one = 1i32.to_be_bytes();
    let head = [
        &string(&group)[..],
        &(-1i32).to_be_bytes(),
        &string(""),
        &(-1i64).to_be_bytes(),
        &one,
        &string(&topic),
    ]
    .concat();
    let offsets = [offset(1).repeat(TIMES - 1), offset(7)].concat();
    let asked = [
        &head[..],
        &i32::try_from(TIMES).unwrap().to_be_bytes(),
        &offsets,
    ]
    .concat();
    let mut connection = Connection::open(cluster.address());
    let mut answer = Answer(connection.call(OFFSET_COMMIT, 2, &asked));
    assert_eq!((answer.i32(), answer.string()), (1, topic.clone()));
    assert_eq!((answer.i32(), answer.i32(), answer.i16()), (400_000, 0, 0));
    let member: BaseConsumer = cluster
        .config_with(&[("group.id", &group)])
        .create()
        .unwrap();
    let mut list = TopicPartitionList::new();
    list.add_partition(&topic, 0);
    let committed = member
        .committed_offsets(list, Duration::from_secs(10))
        .unwrap();
    assert_eq!(committed.elements()[0].offset(), Offset::Offset(7));
}

#[test]
fn a_configuration_that_is_too_long_is_refused() {
    let cluster = Cluster::embedded();
    let value = "0".repeat(20_000) + "1";
    let new = NewTopic::new("t", 1, TopicReplication::Fixed(1)).set("retention.ms", &value);
    let admin = cluster.admin();
    let options = AdminOptions::new();
    let created = cluster.block_on(admin.create_topics([&new], &options));
    let refused = created.unwrap().pop().unwrap().unwrap_err();
    assert_eq!(refused.1, RDKafkaErrorCode::InvalidConfig);
}
