//! Configuration that is changed, and what comes of it.

use rdkafka::admin::{AdminOptions, AlterConfig, ConfigSource, ResourceSpecifier};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::producer::FutureRecord;

use crate::cluster::{Cluster, PATIENCE, eventually};
use crate::raw::{Answer, Connection, string};

const INCREMENTAL_ALTER_CONFIGS: i16 = 44;
const TOPIC: u8 = 2;
const SET: u8 = 0;
const DELETE: u8 = 1;
const APPEND: u8 = 2;
const SUBTRACT: u8 = 3;
const INVALID_CONFIG: i16 = 40;
const UNKNOWN_TOPIC: i16 = 3;

pub(crate) fn an_altered_configuration_takes_effect(cluster: &Cluster) {
    let topic = cluster.topic_with(1, &[("retention.ms", "123456")]);
    assert_eq!(send(cluster, &topic, 10_000), Ok(()));
    assert_eq!(
        alter(cluster, &topic, &[("max.message.bytes", "1000")]),
        Ok(())
    );
    // What is not named is as if it had never been said.
    eventually("it is told", || {
        value(cluster, &topic, "max.message.bytes")
            == ("1000".to_owned(), ConfigSource::DynamicTopic)
    });
    let (_, source) = value(cluster, &topic, "retention.ms");
    assert_ne!(source, ConfigSource::DynamicTopic);
    eventually("it takes effect", || {
        send(cluster, &topic, 10_000) == Err(Some(RDKafkaErrorCode::MessageSizeTooLarge))
    });
    assert_eq!(alter(cluster, &topic, &[]), Ok(()));
    eventually("it is as it was", || {
        send(cluster, &topic, 10_000) == Ok(())
    });
}

pub(crate) fn a_single_key_is_altered(cluster: &Cluster) {
    let topic = cluster.topic_with(1, &[("retention.ms", "123456")]);
    let mut connection = Connection::open(cluster.address());
    let mut change = |key: &str, operation, to: Option<&str>| {
        incrementally(&mut connection, &topic, key, operation, to).0
    };
    let policy = "cleanup.policy";
    for (key, operation, to, expected) in [
        ("retention.bytes", SET, Some("77"), "77"),
        (policy, APPEND, Some("compact"), "delete,compact"),
        (policy, SUBTRACT, Some("delete"), "compact"),
        (policy, DELETE, None, "delete"),
        (policy, SET, Some("compact"), "compact"),
    ] {
        assert_eq!(change(key, operation, to), 0, "{key}");
        eventually(&format!("{key} is {expected}"), || {
            let (mut is, mut expected): (Vec<_>, Vec<_>) = (
                value(cluster, &topic, key)
                    .0
                    .split(',')
                    .map(str::to_owned)
                    .collect(),
                expected.split(',').collect(),
            );
            is.sort();
            expected.sort_unstable();
            is == expected
        });
    }
    assert_eq!(
        value(cluster, &topic, "retention.ms").0,
        "123456",
        "it was let be"
    );
    // It takes effect: a compacted topic takes no record without a key.
    eventually("keys are wanted", || {
        send(cluster, &topic, 10) == Err(Some(RDKafkaErrorCode::InvalidRecord))
    });
}

pub(crate) fn bad_alterations_are_refused(cluster: &Cluster) {
    let topic = cluster.topic(1);
    let mut connection = Connection::open(cluster.address());
    for (name, key, operation, to, expected) in [
        (&*topic, "retention.ms", SET, Some("soon"), INVALID_CONFIG),
        (&*topic, "no.such.key", SET, Some("1"), INVALID_CONFIG),
        (&*topic, "retention.ms", APPEND, Some("1"), INVALID_CONFIG),
        (
            &*topic,
            "cleanup.policy",
            SET,
            Some("shred"),
            INVALID_CONFIG,
        ),
        (
            "no-such-topic",
            "retention.ms",
            SET,
            Some("1"),
            UNKNOWN_TOPIC,
        ),
    ] {
        let (error, why) = incrementally(&mut connection, name, key, operation, to);
        assert_eq!(error, expected, "{key}: {why}");
        assert!(!why.is_empty(), "{key}");
    }
    // Of this request the client library does not hand on the error, but nothing has changed.
    let _ = alter(cluster, &topic, &[("retention.ms", "soon")]);
    let (_, source) = value(cluster, &topic, "retention.ms");
    assert_ne!(source, ConfigSource::DynamicTopic);
}

fn alter(cluster: &Cluster, topic: &str, config: &[(&str, &str)]) -> Result<(), RDKafkaErrorCode> {
    let alter = config.iter().fold(
        AlterConfig::new(ResourceSpecifier::Topic(topic)),
        |alter, (key, value)| alter.set(key, value),
    );
    let answer = cluster.block_on(
        cluster
            .admin()
            .alter_configs([&alter], &AdminOptions::new()),
    );
    let mut answer = answer.expect("an answer");
    answer.remove(0).map(|_| ()).map_err(|(_, code)| code)
}

/// Error code and reason.
fn incrementally(
    connection: &mut Connection,
    topic: &str,
    key: &str,
    operation: u8,
    to: Option<&str>,
) -> (i16, String) {
    let one = 1i32.to_be_bytes();
    let to = to.map_or(vec![0xff, 0xff], string);
    let body = [
        &one[..],
        &[TOPIC],
        &string(topic),
        &one,
        &string(key),
        &[operation],
        &to,
        &[0],
    ]
    .concat();
    let mut answer = Answer(connection.call(INCREMENTAL_ALTER_CONFIGS, 0, &body));
    assert_eq!((answer.i32(), answer.i32()), (0, 1), "throttle and results");
    (answer.i16(), answer.string())
}

fn value(cluster: &Cluster, topic: &str, key: &str) -> (String, ConfigSource) {
    let wanted = [ResourceSpecifier::Topic(topic)];
    let options = AdminOptions::new();
    let answer = cluster.block_on(cluster.admin().describe_configs(&wanted, &options));
    let described = answer
        .expect("an answer")
        .remove(0)
        .expect("a configuration");
    let mut entries = described.entries.into_iter();
    let entry = entries.find(|entry| entry.name == key).expect("the key");
    (entry.value.unwrap_or_default(), entry.source)
}

fn send(cluster: &Cluster, topic: &str, len: usize) -> Result<(), Option<RDKafkaErrorCode>> {
    let producer = cluster.future_producer(&[("enable.idempotence", "false")]);
    let value = vec![b'x'; len];
    let sent = producer.send(
        FutureRecord::<(), [u8]>::to(topic).payload(&value),
        PATIENCE,
    );
    let sent = cluster.block_on(sent);
    sent.map(|_| ())
        .map_err(|(error, _)| error.rdkafka_error_code())
}
