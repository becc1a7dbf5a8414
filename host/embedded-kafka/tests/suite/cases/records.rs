//! Records in and out.

use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, FutureRecord, Producer};

use crate::cluster::{Cluster, PATIENCE, Seen, unique};

/// Key, value, headers and timestamp.
type Given<'a> = (
    Option<&'a [u8]>,
    Option<&'a [u8]>,
    &'a [(&'a str, Option<&'a [u8]>)],
    i64,
);

pub(crate) fn bytes_stay_as_they_are(cluster: &Cluster) {
    let headers: &[(&str, Option<&[u8]>)] = &[
        ("trace", Some(b"1")),
        ("none", None),
        ("trace", Some(b"\xff\0")),
        ("empty", Some(b"")),
    ];
    let all_bytes: Vec<u8> = (0..=255).collect();
    let records: &[Given<'_>] = &[
        (None, None, &[], 1),
        (Some(b""), Some(b""), &[], 1_700_000_000_000),
        (Some(b"key"), None, headers, 1_700_000_000_001),
        (None, Some(b"value"), &[("a", None)], 1_600_000_000_000),
        (
            Some(&all_bytes),
            Some(&all_bytes),
            headers,
            1_700_000_000_002,
        ),
    ];
    let topic = cluster.topic(1);
    let producer = cluster.producer(&[]);
    for (key, value, headers, timestamp) in records {
        let mut record = BaseRecord::<[u8], [u8]>::to(&topic)
            .partition(0)
            .timestamp(*timestamp);
        record.key = *key;
        record.payload = *value;
        if !headers.is_empty() {
            let insert = |into: OwnedHeaders, (key, value): &(&str, Option<&[u8]>)| {
                into.insert(Header { key, value: *value })
            };
            record = record.headers(headers.iter().fold(OwnedHeaders::new(), insert));
        }
        producer.send(record).expect("room in the queue");
    }
    producer.flush(PATIENCE).expect("acknowledgements");
    let expected: Vec<Seen> = records
        .iter()
        .zip(0..)
        .map(|((key, value, headers, timestamp), offset)| Seen {
            partition: 0,
            offset,
            timestamp: Some(*timestamp),
            key: key.map(<[u8]>::to_vec),
            value: value.map(<[u8]>::to_vec),
            headers: headers
                .iter()
                .map(|(key, value)| ((*key).to_owned(), value.map(<[u8]>::to_vec)))
                .collect(),
        })
        .collect();
    assert_eq!(cluster.read(&topic, 0, records.len()), expected);
}

pub(crate) fn every_codec_is_kept(cluster: &Cluster) {
    let values: Vec<String> = (0..200)
        .map(|i| format!("{i} {}", "value ".repeat(50)))
        .collect();
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
        let topic = cluster.topic(1);
        let producer = cluster.producer(&[("compression.type", codec), ("linger.ms", "50")]);
        for value in &values {
            producer
                .send(BaseRecord::<(), str>::to(&topic).payload(value))
                .expect("room in the queue");
        }
        producer.flush(PATIENCE).expect("acknowledgements");
        assert_eq!(cluster.values(&topic, 0, values.len()), values, "{codec}");
    }
}

pub(crate) fn a_record_of_a_megabyte_fits_and_a_larger_one_is_refused(cluster: &Cluster) {
    let topic = cluster.topic(1);
    let producer = cluster.future_producer(&[("message.max.bytes", "5000000")]);
    let send = |len: usize| {
        let value = vec![b'x'; len];
        let sent = producer.send(
            FutureRecord::<(), [u8]>::to(&topic).payload(&value),
            PATIENCE,
        );
        cluster
            .block_on(sent)
            .map(|delivery| delivery.offset)
            .map_err(|(error, _)| error)
    };
    assert_eq!(send(1_000_000), Ok(0));
    let too_large = KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge);
    assert_eq!(send(2_000_000), Err(too_large));
    assert_eq!(send(1_000_000), Ok(1));
    // Larger than the client wants of a partition, and of all: it comes nevertheless.
    let limits = [
        ("fetch.message.max.bytes", "1000"),
        ("fetch.max.bytes", "1000"),
        ("message.max.bytes", "1000"),
    ];
    let consumer = cluster.reader(&topic, 0, rdkafka::Offset::Beginning, &limits);
    let lengths: Vec<usize> = crate::cluster::read(&consumer, 2)
        .into_iter()
        .map(|seen| seen.value.map_or(0, |value| value.len()))
        .collect();
    assert_eq!(lengths, [1_000_000, 1_000_000]);
}

pub(crate) fn many_records_keep_their_order(cluster: &Cluster) {
    const EACH: usize = 20_000;
    let topic = cluster.topic(3);
    let producer = cluster.producer(&[
        ("linger.ms", "5"),
        ("queue.buffering.max.messages", "1000000"),
    ]);
    for i in 0..EACH {
        for partition in 0..3 {
            let value = i.to_string();
            let record = BaseRecord::<(), str>::to(&topic)
                .partition(partition)
                .payload(&value);
            producer.send(record).expect("room in the queue");
        }
    }
    producer.flush(PATIENCE).expect("acknowledgements");
    for partition in 0..3 {
        let seen = cluster.read(&topic, partition, EACH);
        for (i, record) in seen.into_iter().enumerate() {
            assert_eq!(
                (record.offset, record.value),
                (i as i64, Some(i.to_string().into_bytes()))
            );
        }
    }
}

pub(crate) fn records_without_acknowledgement_arrive(cluster: &Cluster) {
    let topic = cluster.topic(1);
    let producer = cluster.producer(&[("acks", "0")]);
    for value in ["a", "b", "c"] {
        producer
            .send(BaseRecord::<(), str>::to(&topic).payload(value))
            .expect("room in the queue");
    }
    producer.flush(PATIENCE).expect("sent");
    assert_eq!(cluster.values(&topic, 0, 3), ["a", "b", "c"]);
}

pub(crate) fn a_topic_is_created_when_it_is_produced_to(cluster: &Cluster) {
    let topic = unique("made");
    cluster.produce(&topic, 0, &["first"]);
    assert_eq!(cluster.values(&topic, 0, 1), ["first"]);
}
