//! `cleanup.policy=compact`: of each key the newest record stays.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rdkafka::Offset;
use rdkafka::admin::AdminOptions;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::producer::{BaseRecord, FutureRecord, Producer};

use crate::cluster::{Cluster, PATIENCE, Seen, eventually, read};

const SEGMENT_MS: u64 = 200;
/// A topic whose segments are closed soon, and compacted as soon as there is anything new.
const COMPACTED: &[(&str, &str)] = &[
    ("cleanup.policy", "compact"),
    ("segment.ms", "200"),
    ("min.cleanable.dirty.ratio", "0.001"),
];
const CODECS: [&str; 5] = ["none", "gzip", "snappy", "lz4", "zstd"];

pub(crate) fn the_newest_record_of_each_key_stays_where_it_is(cluster: &Cluster) {
    let topics: Vec<String> = CODECS
        .iter()
        .map(|_| cluster.topic_with(1, COMPACTED))
        .collect();
    let mut times = Vec::new();
    for (topic, codec) in topics.iter().zip(CODECS) {
        let (a, b) = (Some("a"), Some("b"));
        let first = produce(
            cluster,
            topic,
            codec,
            &[(a, Some("1")), (b, Some("1")), (a, Some("2"))],
        );
        let second = produce(
            cluster,
            topic,
            codec,
            &[(b, Some("2")), (Some("c"), Some("1"))],
        );
        close_segment();
        let third = produce(cluster, topic, codec, &[(a, Some("open"))]);
        times.push([first, second, second, third].map(Some));
    }
    let expected = [
        (2, "a", Some("2")),
        (3, "b", Some("2")),
        (4, "c", Some("1")),
        (5, "a", Some("open")),
    ];
    for ((topic, codec), times) in topics.iter().zip(CODECS).zip(times) {
        eventually(&format!("{topic} ({codec}) is compacted"), || {
            all(cluster, topic)
                .first()
                .is_some_and(|seen| seen.offset == 2)
        });
        let seen = all(cluster, topic);
        assert_eq!(short(&seen), expected, "{codec}");
        let seen_times = seen.iter().map(|seen| seen.timestamp);
        assert!(seen_times.eq(times), "{codec}");
        assert_eq!(watermarks(cluster, topic), (0, 6), "{codec}");
        // Who asks for what is gone gets what comes after it.
        let reader = cluster.reader(topic, 0, Offset::Offset(1), &[]);
        assert_eq!(read(&reader, 1)[0].offset, 2, "{codec}");
    }
}

pub(crate) fn a_tombstone_removes_its_key_and_goes_when_it_was_seen(cluster: &Cluster) {
    let settings = [COMPACTED, &[("delete.retention.ms", "100")]].concat();
    let topic = cluster.topic_with(1, &settings);
    produce(
        cluster,
        &topic,
        "lz4",
        &[(Some("a"), Some("1")), (Some("b"), Some("1"))],
    );
    produce(cluster, &topic, "lz4", &[(Some("a"), None)]);
    close_segment();
    produce(cluster, &topic, "none", &[(Some("c"), Some("1"))]);
    let goes = |what: &str, offset: i64| {
        eventually(what, || {
            let seen = all(cluster, &topic);
            seen.iter().all(|seen| seen.offset != offset)
        });
    };
    goes("the value is gone", 0);
    // Apache Kafka looks at a tombstone again only when there is something new.
    close_segment();
    produce(cluster, &topic, "none", &[(Some("c"), Some("2"))]);
    close_segment();
    produce(cluster, &topic, "none", &[(Some("c"), Some("3"))]);
    goes("the tombstone is gone", 2);
    let seen = all(cluster, &topic);
    assert_eq!(short(&seen)[0], (1, "b", Some("1")));
}

pub(crate) fn a_record_without_a_key_is_refused(cluster: &Cluster) {
    let topic = cluster.topic_with(1, COMPACTED);
    for codec in CODECS {
        let producer = cluster.future_producer(&[
            ("compression.type", codec),
            // Else librdkafka takes the refusal for a gap.
            ("enable.idempotence", "false"),
        ]);
        let record = FutureRecord::<str, str>::to(&topic).payload("value value value value");
        let refused = cluster.block_on(producer.send(record, PATIENCE));
        let (error, _) = refused.expect_err("a refusal");
        assert_eq!(
            error.rdkafka_error_code(),
            Some(RDKafkaErrorCode::InvalidRecord),
            "{codec}"
        );
    }
    assert_eq!(watermarks(cluster, &topic), (0, 0));
}

pub(crate) fn records_of_a_topic_that_is_only_compacted_cannot_be_deleted(cluster: &Cluster) {
    for (policy, expected) in [
        ("compact", Err(Some(RDKafkaErrorCode::PolicyViolation))),
        ("compact,delete", Ok(())),
    ] {
        let topic = cluster.topic_with(1, &[("cleanup.policy", policy)]);
        produce(cluster, &topic, "none", &[(Some("a"), Some("1"))]);
        let mut offsets = rdkafka::TopicPartitionList::new();
        offsets
            .add_partition_offset(&topic, 0, Offset::Offset(1))
            .expect("an offset");
        let options = AdminOptions::new();
        let deleted = cluster
            .block_on(cluster.admin().delete_records(&offsets, &options))
            .expect("an answer");
        let deleted = deleted.elements()[0].error();
        assert_eq!(
            deleted.map_err(|error| error.rdkafka_error_code()),
            expected,
            "{policy}"
        );
    }
}

/// One batch, of one time.
fn produce(
    cluster: &Cluster,
    topic: &str,
    codec: &str,
    records: &[(Option<&str>, Option<&str>)],
) -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = since.expect("a time").as_millis() as i64;
    let producer = cluster.producer(&[("compression.type", codec), ("linger.ms", "100")]);
    for (key, value) in records {
        let mut record = BaseRecord::<str, str>::to(topic)
            .partition(0)
            .timestamp(now);
        (record.key, record.payload) = (*key, *value);
        producer.send(record).expect("room in the queue");
    }
    producer.flush(PATIENCE).expect("acknowledgements");
    now
}

/// The next record begins another segment.
fn close_segment() {
    std::thread::sleep(Duration::from_millis(SEGMENT_MS * 2));
}

fn watermarks(cluster: &Cluster, topic: &str) -> (i64, i64) {
    let consumer: BaseConsumer = cluster.config().create().expect("a consumer");
    consumer
        .fetch_watermarks(topic, 0, PATIENCE)
        .expect("watermarks")
}

/// All records of a topic, whose last one is there.
fn all(cluster: &Cluster, topic: &str) -> Vec<Seen> {
    let (_, end) = watermarks(cluster, topic);
    let reader = cluster.reader(topic, 0, Offset::Beginning, &[]);
    let mut seen = Vec::new();
    while seen.last().is_none_or(|last: &Seen| last.offset + 1 < end) {
        seen.extend(read(&reader, 1));
    }
    seen
}

fn short(seen: &[Seen]) -> Vec<(i64, &str, Option<&str>)> {
    seen.iter()
        .map(|seen| {
            let key = seen.key.as_deref().unwrap_or_default();
            let value = seen.value.as_deref();
            (
                seen.offset,
                std::str::from_utf8(key).expect("UTF-8"),
                value.map(|value| std::str::from_utf8(value).expect("UTF-8")),
            )
        })
        .collect()
}
