//! Records that are too old or too many go; nothing else does.

use std::time::Duration;

use embedded_kafka::Config;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{BaseRecord, Producer};

use crate::cluster::{Cluster, PATIENCE, eventually};

/// A broker that looks after retention all the time.
fn cluster() -> Cluster {
    let folder = tempfile::tempdir().unwrap();
    let config = eager(folder.path());
    Cluster::embedded_with(config, folder)
}

fn eager(folder: &std::path::Path) -> Config {
    let mut config = Config::new(folder);
    config.retention_check = Duration::from_millis(20);
    config
}

fn watermarks(cluster: &Cluster, topic: &str) -> (i64, i64) {
    let consumer: BaseConsumer = cluster.config().create().unwrap();
    consumer.fetch_watermarks(topic, 0, PATIENCE).unwrap()
}

/// One batch for each timestamp.
fn produce_at(cluster: &Cluster, topic: &str, timestamps: &[i64]) {
    let producer = cluster.producer(&[("linger.ms", "0")]);
    let value = "x".repeat(500);
    for timestamp in timestamps {
        producer
            .send(
                BaseRecord::<(), str>::to(topic)
                    .payload(&value)
                    .timestamp(*timestamp),
            )
            .unwrap();
        producer.flush(PATIENCE).unwrap();
    }
}

#[test]
fn old_records_go_and_the_offsets_go_on() {
    let cluster = cluster();
    let keep = [("retention.ms", "3600000"), ("segment.bytes", "1000")];
    let topic = cluster.topic_with(1, &keep);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_millis() as i64;
    produce_at(&cluster, &topic, &[1000, 2000, 3000, now, now]);
    eventually("the old ones are gone", || {
        watermarks(&cluster, &topic) == (3, 5)
    });
    assert_eq!(cluster.read(&topic, 0, 2)[0].offset, 3);
    // All of them old: even the file that is written to goes, and the next offset stays.
    let all_old = cluster.topic_with(1, &keep);
    produce_at(&cluster, &all_old, &[1000, 2000]);
    eventually("all are gone", || watermarks(&cluster, &all_old) == (2, 2));
    let folder = cluster.stop();
    let cluster = Cluster::embedded_with(eager(folder.path()), folder);
    assert_eq!(watermarks(&cluster, &topic), (3, 5));
    assert_eq!(watermarks(&cluster, &all_old), (2, 2));
    produce_at(&cluster, &all_old, &[now]);
    assert_eq!(cluster.read(&all_old, 0, 1)[0].offset, 2);
}

#[test]
fn what_is_too_much_goes_and_what_is_to_be_kept_stays() {
    let cluster = cluster();
    let topic = cluster.topic_with(1, &[("retention.bytes", "3000"), ("segment.bytes", "1000")]);
    produce_at(&cluster, &topic, &[i64::MAX / 4; 20]);
    eventually("some are gone", || watermarks(&cluster, &topic).0 > 0);
    let (start, end) = watermarks(&cluster, &topic);
    assert_eq!(end, 20);
    // A batch has about 570 bytes, so each segment has one and at least five are to be kept.
    let mut settled = start;
    eventually("it has settled", || {
        let before = std::mem::replace(&mut settled, watermarks(&cluster, &topic).0);
        std::thread::sleep(Duration::from_millis(200));
        before == settled
    });
    assert!((12..=15).contains(&settled), "{settled}");
    assert_eq!(cluster.read(&topic, 0, 1)[0].offset, settled);
}

#[test]
fn deleted_records_stay_deleted_after_a_restart() {
    let cluster = cluster();
    let topic = cluster.topic_with(1, &[("segment.bytes", "1000")]);
    produce_at(&cluster, &topic, &[i64::MAX / 4; 6]);
    let mut offsets = rdkafka::TopicPartitionList::new();
    offsets
        .add_partition_offset(&topic, 0, rdkafka::Offset::Offset(4))
        .unwrap();
    cluster
        .block_on(
            cluster
                .admin()
                .delete_records(&offsets, &Default::default()),
        )
        .unwrap();
    assert_eq!(watermarks(&cluster, &topic), (4, 6));
    let folder = cluster.stop();
    let segments = std::fs::read_dir(crate::durability::partition_folder(folder.path(), &topic))
        .unwrap()
        .count();
    assert_eq!(segments, 2, "the files of deleted records are gone");
    let cluster = Cluster::embedded_with(eager(folder.path()), folder);
    assert_eq!(watermarks(&cluster, &topic), (4, 6));
}
