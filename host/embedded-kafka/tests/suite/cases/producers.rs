//! Idempotent producers, and batches that no client should send.

use rdkafka::producer::{BaseRecord, Producer};

use crate::cluster::{Cluster, PATIENCE};
use crate::raw::{Batch, Connection, seal};

const NONE: i16 = 0;
const CORRUPT_MESSAGE: i16 = 2;
const UNKNOWN_TOPIC_OR_PARTITION: i16 = 3;
const OUT_OF_ORDER_SEQUENCE_NUMBER: i16 = 45;
const INVALID_PRODUCER_EPOCH: i16 = 47;
const INVALID_RECORD: i16 = 87;

pub(crate) fn an_idempotent_producer_writes_once(cluster: &Cluster) {
    let topic = cluster.topic(2);
    let producer = cluster.producer(&[("enable.idempotence", "true"), ("linger.ms", "1")]);
    for i in 0..5_000 {
        let value = i.to_string();
        let record = BaseRecord::<(), str>::to(&topic)
            .partition(i % 2)
            .payload(&value);
        producer.send(record).expect("room in the queue");
    }
    producer.flush(PATIENCE).expect("acknowledgements");
    for partition in 0..2 {
        let expected: Vec<String> = (0..2_500)
            .map(|i| (i * 2 + partition).to_string())
            .collect();
        assert_eq!(cluster.values(&topic, partition, 2_500), expected);
    }
}

pub(crate) fn a_repeat_is_answered_with_its_old_offset(cluster: &Cluster) {
    let topic = cluster.topic(1);
    let mut connection = Connection::open(cluster.address());
    let producer = connection.producer_id();
    assert_ne!(connection.producer_id(), producer);
    let batch = |sequence, count, epoch| {
        Batch {
            producer,
            epoch,
            sequence,
            count,
        }
        .bytes()
    };
    for (sequence, count, epoch, expected) in [
        (0, 2, 0, (NONE, 0)),
        (2, 3, 0, (NONE, 2)),
        (0, 2, 0, (NONE, 0)),
        (2, 3, 0, (NONE, 2)),
        (5, 1, 0, (NONE, 5)),
        (7, 1, 0, (OUT_OF_ORDER_SEQUENCE_NUMBER, -1)),
        (6, 1, 0, (NONE, 6)),
        (0, 1, 1, (NONE, 7)),
        (7, 1, 0, (INVALID_PRODUCER_EPOCH, -1)),
        (5, 1, 1, (OUT_OF_ORDER_SEQUENCE_NUMBER, -1)),
    ] {
        let answer = connection.produce(&topic, &batch(sequence, count, epoch));
        assert_eq!(
            answer, expected,
            "sequence {sequence}, {count} records, epoch {epoch}"
        );
    }
    assert_eq!(cluster.read(&topic, 0, 8).len(), 8);
}

pub(crate) fn bad_batches_are_refused(cluster: &Cluster) {
    let topic = cluster.topic(1);
    let good = Batch {
        producer: -1,
        epoch: -1,
        sequence: -1,
        count: 2,
    }
    .bytes();
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut batch = good.clone();
        change(&mut batch);
        batch
    };
    let flipped = with(&|batch| *batch.last_mut().expect("bytes") ^= 1);
    let miscounted = with(&|batch| {
        batch[60] = 7;
        seal(batch);
    });
    let control = with(&|batch| {
        batch[22] |= 1 << 5;
        seal(batch);
    });
    let twice = [good.clone(), good.clone()].concat();
    let mut connection = Connection::open(cluster.address());
    for (what, batch, expected) in [
        ("a flipped bit", flipped, CORRUPT_MESSAGE),
        ("a wrong count", miscounted, INVALID_RECORD),
        ("a control batch", control, INVALID_RECORD),
        ("two batches", twice, INVALID_RECORD),
        ("a good one", good.clone(), NONE),
    ] {
        assert_eq!(connection.produce(&topic, &batch).0, expected, "{what}");
    }
    assert_eq!(cluster.values(&topic, 0, 2), ["v", "v"]);
}

pub(crate) fn a_batch_for_an_unknown_topic_is_refused(cluster: &Cluster) {
    let batch = Batch {
        producer: -1,
        epoch: -1,
        sequence: -1,
        count: 1,
    }
    .bytes();
    let mut connection = Connection::open(cluster.address());
    assert_eq!(
        connection.produce("no-such-topic", &batch).0,
        UNKNOWN_TOPIC_OR_PARTITION
    );
}
