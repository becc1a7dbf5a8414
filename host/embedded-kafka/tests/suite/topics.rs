//! Topics and their folders: changed wholly or not at all, and nobody's files but their own.

use std::path::Path;
use std::time::Instant;

use embedded_kafka::Config;
use rdkafka::Offset;
use rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, Consumer};

use crate::cluster::{Cluster, PATIENCE, eventually, unique};
use crate::durability::partition_folder;
use crate::raw::{Connection, request, string};

const DELETE_TOPICS: i16 = 20;
const DELETE_TOPICS_VERSION: i16 = 1;

/// Half of a request that was begun would be half of a deletion, too.
#[test]
fn a_deletion_goes_on_without_its_client() {
    const TOPICS: usize = 300;
    let folder = tempfile::tempdir().unwrap();
    let journal = folder.path().join("journal");
    let cluster = Cluster::embedded_with(Config::new(folder.path()), folder);
    let names: Vec<String> = (0..TOPICS).map(|i| format!("t{i}")).collect();
    let topics: Vec<NewTopic> = names
        .iter()
        .map(|name| NewTopic::new(name, 1, TopicReplication::Fixed(1)))
        .collect();
    let admin = cluster.admin();
    let created = cluster
        .block_on(admin.create_topics(&topics, &AdminOptions::new()))
        .unwrap();
    assert_eq!(created.len(), TOPICS);
    let mut body = (TOPICS as i32).to_be_bytes().to_vec();
    names.iter().for_each(|name| body.extend(string(name)));
    body.extend(30_000i32.to_be_bytes());
    let mut connection = Connection::open(cluster.address());
    connection
        .send(&request(DELETE_TOPICS, DELETE_TOPICS_VERSION, 1, &body))
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !std::fs::read_to_string(&journal)
        .unwrap()
        .contains("topic-deleted")
    {
        assert!(Instant::now() < deadline, "the deletion has not begun");
        std::thread::yield_now();
    }
    drop(connection);
    let consumer: BaseConsumer = cluster.config().create().unwrap();
    eventually("all are deleted", || {
        let metadata = consumer.fetch_metadata(None, PATIENCE).unwrap();
        metadata.topics().is_empty()
    });
}

#[test]
fn a_topic_has_a_folder_that_no_other_has_had() {
    let cluster = Cluster::embedded();
    let name = unique("again");
    let mut seen = Vec::new();
    let folder = loop {
        cluster.produce(&name, 0, &["a"]);
        assert_eq!(cluster.values(&name, 0, 1), ["a"]);
        if seen.len() == 1 {
            break cluster.stop();
        }
        seen.push(name.clone());
        let deleted = cluster
            .block_on(
                cluster
                    .admin()
                    .delete_topics(&[&name], &AdminOptions::new()),
            )
            .unwrap();
        assert_eq!(deleted, [Ok(name.clone())]);
    };
    // Names that a file system may hold to be the same are no matter.
    assert!(!folder.path().join("topics").join(&name).exists());
    assert!(partition_folder(folder.path(), &name).exists());
    assert_eq!(entries(&folder.path().join("topics")).len(), 1);
    assert!(entries(&folder.path().join("deleted")).is_empty());
}

#[test]
fn a_folder_that_is_no_topics_is_left_alone() {
    let cluster = Cluster::embedded();
    let topic = cluster.topic(1);
    cluster.produce(&topic, 0, &["a"]);
    let folder = cluster.stop();
    // What the broker advises where a partition cannot be read.
    let aside = folder.path().join("topics").join("aside");
    std::fs::rename(partition_folder(folder.path(), &topic), &aside).unwrap();
    let left = folder.path().join("deleted").join("left");
    std::fs::create_dir(&left).unwrap();
    let cluster = Cluster::embedded_with(Config::new(folder.path()), folder);
    let _folder = cluster.stop();
    assert_eq!(entries(&aside).len(), 1, "the records are there");
    assert!(!left.exists(), "the rest of a deletion is not");
}

/// Records that were deleted, and then went with the machine: those that come in their place are others.
#[test]
fn a_deletion_of_lost_records_is_not_applied_to_new_ones() {
    let cluster = Cluster::embedded();
    let topic = cluster.topic(1);
    cluster.produce(&topic, 0, &["a", "b", "c"]);
    let mut offsets = rdkafka::TopicPartitionList::new();
    offsets
        .add_partition_offset(&topic, 0, Offset::Offset(3))
        .unwrap();
    cluster
        .block_on(
            cluster
                .admin()
                .delete_records(&offsets, &AdminOptions::new()),
        )
        .unwrap();
    let folder = cluster.stop();
    std::fs::remove_dir_all(partition_folder(folder.path(), &topic)).unwrap();
    let cluster = Cluster::embedded_with(Config::new(folder.path()), folder);
    cluster.produce(&topic, 0, &["d", "e"]);
    let folder = cluster.stop();
    let cluster = Cluster::embedded_with(Config::new(folder.path()), folder);
    assert_eq!(cluster.values(&topic, 0, 2), ["d", "e"]);
}

fn entries(folder: &Path) -> Vec<std::path::PathBuf> {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect()
}
