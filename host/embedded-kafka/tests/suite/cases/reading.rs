//! Where reading begins and ends.

use rdkafka::Offset;
use rdkafka::TopicPartitionList;
use rdkafka::consumer::Consumer;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseRecord, Producer};

use crate::cluster::{Cluster, PATIENCE, read, text};

pub(crate) fn offsets_are_found_by_time(cluster: &Cluster) {
    let topic = cluster.topic(1);
    // All in one batch, then each in a batch of its own.
    for (linger, values) in [("500", 0..10), ("0", 10..20)] {
        let producer = cluster.producer(&[("linger.ms", linger), ("compression.type", "none")]);
        for i in values {
            let record = BaseRecord::<(), str>::to(&topic)
                .payload("value")
                .timestamp(1_000_000 + i * 100);
            producer.send(record).expect("room in the queue");
            if linger == "0" {
                producer.flush(PATIENCE).expect("an acknowledgement");
            }
        }
        producer.flush(PATIENCE).expect("acknowledgements");
    }
    let consumer = cluster.reader(&topic, 0, Offset::Beginning, &[]);
    for (time, expected) in [
        (0, Offset::Offset(0)),
        (1_000_000, Offset::Offset(0)),
        (1_000_001, Offset::Offset(1)),
        (1_000_300, Offset::Offset(3)),
        (1_000_850, Offset::Offset(9)),
        (1_000_900, Offset::Offset(9)),
        (1_000_901, Offset::Offset(10)),
        (1_001_500, Offset::Offset(15)),
        (1_001_900, Offset::Offset(19)),
        (1_001_901, Offset::End),
    ] {
        let mut wanted = TopicPartitionList::new();
        wanted
            .add_partition_offset(&topic, 0, Offset::Offset(time))
            .expect("an offset");
        let found = consumer
            .offsets_for_times(wanted, PATIENCE)
            .expect("offsets");
        assert_eq!(found.elements()[0].offset(), expected, "at {time}");
    }
}

pub(crate) fn an_offset_out_of_range_is_said_and_can_be_reset(cluster: &Cluster) {
    let topic = cluster.topic(1);
    cluster.produce(&topic, 0, &["a", "b"]);
    let strict = cluster.reader(&topic, 0, Offset::Offset(1000), &[]);
    let error = poll_error(&strict);
    assert_eq!(
        error,
        KafkaError::MessageConsumption(RDKafkaErrorCode::AutoOffsetReset)
    );
    let lenient = cluster.reader(
        &topic,
        0,
        Offset::Offset(1000),
        &[("auto.offset.reset", "earliest")],
    );
    let values: Vec<String> = read(&lenient, 2)
        .into_iter()
        .map(|seen| text(seen.value))
        .collect();
    assert_eq!(values, ["a", "b"]);
    // At the end is not out of range.
    let at_end = cluster.reader(&topic, 0, Offset::Offset(2), &[]);
    assert!(at_end.poll(std::time::Duration::from_millis(500)).is_none());
    cluster.produce(&topic, 0, &["c"]);
    assert_eq!(text(read(&at_end, 1).remove(0).value), "c");
}

pub(crate) fn a_waiting_fetch_is_woken(cluster: &Cluster) {
    let topic = cluster.topic(1);
    // Longer than the patience of the tests: it comes by being woken, or not in time.
    let patient = [
        ("fetch.wait.max.ms", "280000"),
        ("socket.timeout.ms", "300000"),
    ];
    let consumer = cluster.reader(&topic, 0, Offset::Beginning, &patient);
    for value in ["one", "two", "three"] {
        assert!(
            consumer
                .poll(std::time::Duration::from_millis(300))
                .is_none()
        );
        cluster.produce(&topic, 0, &[value]);
        assert_eq!(text(read(&consumer, 1).remove(0).value), value);
    }
}

pub(crate) fn the_ends_of_a_partition_are_told(cluster: &Cluster) {
    let topic = cluster.topic(2);
    cluster.produce(&topic, 1, &["a", "b", "c"]);
    let consumer = cluster.reader(&topic, 1, Offset::Beginning, &[]);
    assert_eq!(consumer.fetch_watermarks(&topic, 0, PATIENCE), Ok((0, 0)));
    assert_eq!(consumer.fetch_watermarks(&topic, 1, PATIENCE), Ok((0, 3)));
    let unknown = consumer
        .fetch_watermarks(&topic, 2, PATIENCE)
        .expect_err("there is no such partition");
    assert_eq!(
        unknown.rdkafka_error_code(),
        Some(RDKafkaErrorCode::UnknownPartition)
    );
}

fn poll_error(consumer: &rdkafka::consumer::BaseConsumer) -> KafkaError {
    let mut error = None;
    let deadline = std::time::Instant::now() + PATIENCE;
    while error.is_none() {
        assert!(std::time::Instant::now() < deadline, "no error came");
        error = consumer
            .poll(std::time::Duration::from_millis(100))
            .and_then(Result::err);
    }
    error.expect("an error")
}
