//! What the embedded broker does not have, and how clients are told.

use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::producer::{BaseProducer, Producer};

use crate::cluster::{Cluster, eventually};
use crate::raw::{Answer, Connection, compact, string};

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
