//! Requests that librdkafka does not make, and other clients do.

use rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{CommitMode, Consumer};
use rdkafka::producer::{BaseRecord, Producer};
use rdkafka::{Offset, TopicPartitionList};

use crate::cluster::{Cluster, PATIENCE, assigned, eventually, poll_until, unique};
use crate::raw::{Answer, Connection, compact, string};

const CREATE_TOPICS: i16 = 19;
const DELETE_TOPICS: i16 = 20;
const LIST_OFFSETS: i16 = 2;
const METADATA: i16 = 3;
const LIST_GROUPS: i16 = 16;
const DESCRIBE_LOG_DIRS: i16 = 35;
const OFFSET_DELETE: i16 = 47;

const GROUP_ID_NOT_FOUND: i16 = 69;
const GROUP_SUBSCRIBED_TO_TOPIC: i16 = 86;
const UNKNOWN_TOPIC_OR_PARTITION: i16 = 3;
const UNKNOWN_TOPIC_ID: i16 = 100;

type Id = [u8; 16];
const NO_ID: Id = [0; 16];

pub(crate) fn a_topic_has_an_id_that_is_its_own(cluster: &Cluster) {
    let topic = cluster.topic(1);
    let other = cluster.topic(1);
    let mut connection = Connection::open(cluster.address());
    let id = by_name(&mut connection, &topic);
    assert_ne!(id, NO_ID);
    assert_ne!(id, by_name(&mut connection, &other));
    assert_eq!(id, by_name(&mut connection, &topic), "it stays");
    assert_eq!(metadata(&mut connection, None, id), (0, topic.clone(), id));
    // One of the same name is another topic.
    let options = AdminOptions::new();
    let admin = cluster.admin();
    assert_eq!(delete(&mut connection, [1; 16]), UNKNOWN_TOPIC_ID);
    assert_eq!(delete(&mut connection, id), 0);
    eventually("the id is unknown", || {
        metadata(&mut connection, None, id).0 == UNKNOWN_TOPIC_ID
    });
    let again = NewTopic::new(&topic, 1, TopicReplication::Fixed(1));
    eventually("it is there again", || {
        let created = cluster.block_on(admin.create_topics([&again], &options));
        created.expect("an answer")[0].is_ok()
    });
    eventually("it has another id", || {
        let (error, _, now) = metadata(&mut connection, Some(&topic), NO_ID);
        error == 0 && now != id && now != NO_ID
    });
}

pub(crate) fn a_new_topic_is_told_with_its_id_and_settings(cluster: &Cluster) {
    let topic = unique("t");
    let mut connection = Connection::open(cluster.address());
    // One topic of 3 partitions, one replica, no assignment, one setting; 30 s, not only to be checked.
    let setting = [&compact("retention.ms")[..], &compact("77"), &[0]].concat();
    let parts: [&[u8]; 9] = [
        &[2],
        &compact(&topic),
        &3i32.to_be_bytes(),
        &1i16.to_be_bytes(),
        &[1, 2],
        &setting,
        &[0],
        &30_000i32.to_be_bytes(),
        &[0, 0],
    ];
    let mut answer = Answer(connection.call_flexible(CREATE_TOPICS, 7, &parts.concat()));
    assert_eq!((answer.i32(), answer.take()), (0, [2]));
    assert_eq!(answer.compact(), topic);
    let id: Id = answer.take();
    assert_ne!(id, NO_ID);
    assert_eq!((answer.i16(), answer.compact()), (0, String::new()));
    assert_eq!(
        (answer.i32(), answer.i16()),
        (3, 1),
        "partitions and replicas"
    );
    let [count] = answer.take();
    let settings: Vec<_> = (1..count)
        .map(|_| {
            let setting = (answer.compact(), answer.compact());
            // Read-only, source, sensitive, tags.
            answer.take::<4>();
            setting
        })
        .collect();
    assert!(
        settings.contains(&("retention.ms".to_owned(), "77".to_owned())),
        "{settings:?}"
    );
    eventually("it is there", || {
        metadata(&mut connection, Some(&topic), NO_ID) == (0, topic.clone(), id)
    });
}

/// Deletes a topic by its id; the error.
fn delete(connection: &mut Connection, id: Id) -> i16 {
    let body = [&[2, 0][..], &id, &[0], &30_000i32.to_be_bytes(), &[0]].concat();
    let mut answer = Answer(connection.call_flexible(DELETE_TOPICS, 6, &body));
    assert_eq!((answer.i32(), answer.take()), (0, [2]));
    answer.compact();
    assert_eq!(answer.take(), id);
    answer.i16()
}

fn by_name(connection: &mut Connection, topic: &str) -> Id {
    let (error, name, id) = metadata(connection, Some(topic), NO_ID);
    assert_eq!((error, &*name), (0, topic));
    id
}

/// Error, name and id of one topic, asked for by its name or its id.
fn metadata(connection: &mut Connection, name: Option<&str>, id: Id) -> (i16, String, Id) {
    let name = name.map_or(vec![0], compact);
    // One topic, its tags; no creation, no operations, tags.
    let body = [&[2], &id[..], &name, &[0, 0, 0, 0]].concat();
    let mut answer = Answer(connection.call_flexible(METADATA, 12, &body));
    answer.i32();
    let [brokers] = answer.take();
    for _ in 1..brokers {
        answer.i32();
        answer.compact();
        answer.i32();
        answer.compact();
        answer.take::<1>();
    }
    answer.compact();
    answer.i32();
    assert_eq!(answer.take(), [2], "one topic");
    (answer.i16(), answer.compact(), answer.take())
}

pub(crate) fn committed_offsets_are_deleted_unless_they_are_in_use(cluster: &Cluster) {
    let (read, unread, group) = (cluster.topic(1), cluster.topic(2), unique("g"));
    let consumer = cluster.member(&group, &read, &[]);
    poll_until(&[&consumer], "it is a member", || {
        assigned(&consumer).len() == 1
    });
    let mut offsets = TopicPartitionList::new();
    for topic in [&read, &unread] {
        offsets
            .add_partition_offset(topic, 0, Offset::Offset(0))
            .expect("an offset");
    }
    consumer
        .commit(&offsets, CommitMode::Sync)
        .expect("a commit");
    let mut connection = Connection::open(cluster.address());
    let mut delete = |group: &str, topic: &str, partition: i32| {
        let one = 1i32.to_be_bytes();
        let parts = [
            &string(group)[..],
            &one,
            &string(topic),
            &one,
            &partition.to_be_bytes(),
        ];
        let mut answer = Answer(connection.call(OFFSET_DELETE, 0, &parts.concat()));
        let error = answer.i16();
        if error != 0 {
            return error;
        }
        answer.i32();
        assert_eq!((answer.i32(), answer.string()), (1, topic.to_owned()));
        assert_eq!((answer.i32(), answer.i32()), (1, partition));
        answer.i16()
    };
    assert_eq!(delete(&group, &read, 0), GROUP_SUBSCRIBED_TO_TOPIC);
    assert_eq!(delete(&group, &unread, 0), 0);
    assert_eq!(delete(&group, &unread, 1), 0, "none was committed");
    assert_eq!(delete(&group, &unread, 2), UNKNOWN_TOPIC_OR_PARTITION);
    assert_eq!(delete(&unique("g"), &unread, 0), GROUP_ID_NOT_FOUND);
    let committed = |topic: &str| {
        let mut wanted = TopicPartitionList::new();
        wanted.add_partition(topic, 0);
        let committed = consumer
            .committed_offsets(wanted, PATIENCE)
            .expect("offsets");
        committed.elements()[0].offset()
    };
    assert_eq!(committed(&read), Offset::Offset(0));
    assert_eq!(committed(&unread), Offset::Invalid);
}

pub(crate) fn the_record_with_the_largest_timestamp_is_found(cluster: &Cluster) {
    for codec in ["none", "lz4"] {
        let topic = cluster.topic(1);
        let mut connection = Connection::open(cluster.address());
        assert_eq!(newest(&mut connection, &topic), (-1, -1));
        let producer = cluster.producer(&[("compression.type", codec), ("linger.ms", "100")]);
        for batch in [&[10, 50, 20, 50][..], &[40, 30]] {
            for timestamp in batch {
                let record = BaseRecord::<(), str>::to(&topic)
                    .payload("value")
                    .timestamp(1_600_000_000_000 + timestamp);
                producer.send(record).expect("room in the queue");
            }
            producer.flush(PATIENCE).expect("acknowledgements");
        }
        assert_eq!(
            newest(&mut connection, &topic),
            (1, 1_600_000_000_050),
            "{codec}"
        );
    }
}

/// Offset and timestamp.
fn newest(connection: &mut Connection, topic: &str) -> (i64, i64) {
    // Of no replica, uncommitted; one topic, one partition, no leader epoch; and tags.
    let parts: [&[u8]; 9] = [
        &(-1i32).to_be_bytes(),
        &[0, 2],
        &compact(topic),
        &[2],
        &0i32.to_be_bytes(),
        &(-1i32).to_be_bytes(),
        &(-3i64).to_be_bytes(),
        &[0, 0],
        &[0],
    ];
    let mut answer = Answer(connection.call_flexible(LIST_OFFSETS, 7, &parts.concat()));
    assert_eq!((answer.i32(), answer.take()), (0, [2]));
    assert_eq!((answer.compact(), answer.take()), (topic.to_owned(), [2]));
    assert_eq!((answer.i32(), answer.i16()), (0, 0), "partition and error");
    let timestamp = answer.i64();
    (answer.i64(), timestamp)
}

pub(crate) fn folders_and_their_sizes_are_told(cluster: &Cluster) {
    let topic = cluster.topic(2);
    cluster.produce(&topic, 1, &["value"]);
    let mut connection = Connection::open(cluster.address());
    let one = 1i32.to_be_bytes();
    let both = [2i32.to_be_bytes(), 0i32.to_be_bytes(), one].concat();
    let body = [&one[..], &string(&topic), &both].concat();
    let mut answer = Answer(connection.call(DESCRIBE_LOG_DIRS, 1, &body));
    assert_eq!((answer.i32(), answer.i32()), (0, 1), "throttle and folders");
    assert_eq!(answer.i16(), 0);
    assert!(answer.string().starts_with('/'), "a folder");
    assert_eq!((answer.i32(), answer.string()), (1, topic));
    let mut sizes = [0; 2];
    assert_eq!(answer.i32(), 2);
    for _ in 0..2 {
        let index = answer.i32();
        sizes[index as usize] = answer.i64();
        assert_eq!((answer.i64(), answer.take()), (0, [0]), "no copy elsewhere");
    }
    assert_eq!(sizes[0], 0);
    assert!((60..200).contains(&sizes[1]), "{sizes:?}");
}

pub(crate) fn groups_are_listed_with_their_states(cluster: &Cluster) {
    let (topic, empty, stable) = (cluster.topic(1), unique("empty"), unique("stable"));
    let mut offsets = TopicPartitionList::new();
    offsets
        .add_partition_offset(&topic, 0, Offset::Offset(0))
        .expect("an offset");
    let consumer = cluster.member(&empty, &topic, &[]);
    consumer.unsubscribe();
    consumer
        .commit(&offsets, CommitMode::Sync)
        .expect("a commit");
    drop(consumer);
    let member = cluster.member(&stable, &topic, &[]);
    poll_until(&[&member], "it is a member", || {
        assigned(&member).len() == 1
    });
    let mut connection = Connection::open(cluster.address());
    for (state, there, not_there) in [("Stable", &stable, &empty), ("Empty", &empty, &stable)] {
        eventually(&format!("{there} is {state}"), || {
            let listed = listed(&mut connection, state);
            let is_there = |group: &str| listed.iter().any(|(id, _)| id == group);
            assert!(listed.iter().all(|(_, is)| is == state), "{listed:?}");
            is_there(there) && !is_there(not_there)
        });
    }
}

/// Groups that are in a state: ids, and states.
fn listed(connection: &mut Connection, state: &str) -> Vec<(String, String)> {
    let body = [&[2], &compact(state)[..], &[0]].concat();
    let mut answer = Answer(connection.call_flexible(LIST_GROUPS, 4, &body));
    assert_eq!((answer.i32(), answer.i16()), (0, 0), "throttle and error");
    // As a varint: Apache Kafka may have groups of other tests.
    let mut count = 0;
    for shift in 0.. {
        let [byte] = answer.take();
        count |= usize::from(byte & 0x7f) << (7 * shift);
        if byte < 0x80 {
            break;
        }
    }
    (1..count)
        .map(|_| {
            let id = answer.compact();
            answer.compact();
            let state = answer.compact();
            answer.take::<1>();
            (id, state)
        })
        .collect()
}
