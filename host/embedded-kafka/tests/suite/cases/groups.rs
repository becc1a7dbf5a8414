//! Consumer groups.

use std::process::{Command, Stdio};
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::{Offset, TopicPartitionList};

use rdkafka::admin::AdminOptions;

use crate::cluster::{
    Cluster, PATIENCE, assigned, by_partition, eventually, poll_until, read, text, unique,
};

pub(crate) fn members_share_partitions_and_take_over(cluster: &Cluster) {
    let (topic, group) = (cluster.topic(4), unique("g"));
    let first = cluster.member(&group, &topic, &[]);
    poll_until(&[&first], "the first has all", || {
        assigned(&first).len() == 4
    });
    let second = cluster.member(&group, &topic, &[]);
    let share = || assigned(&first).len() == 2 && assigned(&second).len() == 2;
    poll_until(&[&first, &second], "both have two", share);
    let mut all = [assigned(&first), assigned(&second)].concat();
    all.sort_unstable();
    assert_eq!(all, [0, 1, 2, 3]);
    for partition in 0..4 {
        cluster.produce(&topic, partition, &["a", "b"]);
    }
    let mut seen = Vec::new();
    while seen.len() < 8 {
        let mut once = false;
        let came = poll_until(&[&first, &second], "records", || {
            std::mem::replace(&mut once, true)
        });
        seen.extend(came);
    }
    for values in by_partition(&seen).values() {
        assert_eq!(values, &["a", "b"]);
    }
    second
        .commit_consumer_state(CommitMode::Sync)
        .expect("a commit");
    first
        .commit_consumer_state(CommitMode::Sync)
        .expect("a commit");
    drop(second);
    poll_until(&[&first], "the first has all again", || {
        assigned(&first).len() == 4
    });
    cluster.produce(&topic, 3, &["c"]);
    assert_eq!(text(read(&first, 1).remove(0).value), "c");
}

pub(crate) fn a_member_that_dies_is_replaced(cluster: &Cluster) {
    let (topic, group) = (cluster.topic(4), unique("g"));
    let first = cluster.member(&group, &topic, &[]);
    let strategy = ["-X", "partition.assignment.strategy=cooperative-sticky"];
    let mut other = Command::new("kcat")
        .args([
            "-b",
            &cluster.brokers,
            "-G",
            &group,
            "-X",
            "session.timeout.ms=6000",
        ])
        .args(strategy)
        .arg(&topic)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("kcat is installed: run `make test`, which sees to it");
    poll_until(&[&first], "they share", || assigned(&first).len() == 2);
    other.kill().expect("a process");
    other.wait().expect("an end");
    poll_until(&[&first], "the first has all", || {
        assigned(&first).len() == 4
    });
}

pub(crate) fn static_members_keep_their_partitions(cluster: &Cluster) {
    let (topic, group) = (cluster.topic(4), unique("g"));
    let member = |instance: &str| {
        cluster.member(
            &group,
            &topic,
            &[
                ("group.instance.id", instance),
                ("session.timeout.ms", "60000"),
            ],
        )
    };
    let (first, second) = (member("one"), member("two"));
    let share = || assigned(&first).len() == 2 && assigned(&second).len() == 2;
    poll_until(&[&first, &second], "both have two", share);
    let (of_first, of_second) = (assigned(&first), assigned(&second));
    drop(second);
    // It comes back, and gets what it had, while the first keeps what it has.
    let again = member("two");
    poll_until(&[&first, &again], "the second is back", || {
        assigned(&again).len() == 2
    });
    assert_eq!((assigned(&first), assigned(&again)), (of_first, of_second));
}

pub(crate) fn an_instance_id_belongs_to_the_last_who_took_it(cluster: &Cluster) {
    let (topic, group) = (cluster.topic(1), unique("g"));
    let instance = [("group.instance.id", "one")];
    let first = cluster.member(&group, &topic, &instance);
    poll_until(&[&first], "the first has it", || {
        assigned(&first).len() == 1
    });
    let second = cluster.member(&group, &topic, &instance);
    poll_until(&[&second], "the second has it", || {
        assigned(&second).len() == 1
    });
    let fenced = || match first.poll(Duration::from_millis(100)) {
        Some(Err(KafkaError::MessageConsumptionFatal(code))) => {
            code == RDKafkaErrorCode::FencedInstanceId
        }
        _ => false,
    };
    eventually("the first is fenced", fenced);
}

pub(crate) fn committed_offsets_are_where_a_group_goes_on(cluster: &Cluster) {
    let (topic, group) = (cluster.topic(2), unique("g"));
    cluster.produce(&topic, 0, &["a", "b", "c", "d"]);
    let first = cluster.member(&group, &topic, &[]);
    read(&first, 4);
    let mut offsets = TopicPartitionList::new();
    offsets
        .add_partition_offset(&topic, 0, Offset::Offset(2))
        .expect("an offset");
    first.commit(&offsets, CommitMode::Sync).expect("a commit");
    drop(first);
    let second = cluster.member(&group, &topic, &[]);
    let values: Vec<String> = read(&second, 2)
        .into_iter()
        .map(|seen| text(seen.value))
        .collect();
    assert_eq!(values, ["c", "d"]);
    let mut wanted = TopicPartitionList::new();
    wanted.add_partition(&topic, 0);
    wanted.add_partition(&topic, 1);
    let committed = second.committed_offsets(wanted, PATIENCE).expect("offsets");
    let offsets: Vec<Offset> = committed
        .elements()
        .iter()
        .map(|element| element.offset())
        .collect();
    assert_eq!(offsets, [Offset::Offset(2), Offset::Invalid]);
}

pub(crate) fn groups_are_listed(cluster: &Cluster) {
    let (topic, group) = (cluster.topic(1), unique("g"));
    let member = cluster.member(&group, &topic, &[("client.id", "me")]);
    poll_until(&[&member], "it has a partition", || {
        assigned(&member).len() == 1
    });
    let found = describe(&member, &group);
    assert_eq!(
        found,
        (
            "Stable".to_owned(),
            "consumer".to_owned(),
            "cooperative-sticky".to_owned(),
            1
        )
    );
    cluster.produce(&topic, 0, &["a"]);
    read(&member, 1);
    member
        .commit_consumer_state(CommitMode::Sync)
        .expect("a commit");
    drop(member);
    let other: BaseConsumer = cluster.config().create().expect("a consumer");
    eventually("it is empty", || describe(&other, &group).0 == "Empty");
    let all = other.fetch_group_list(None, PATIENCE).expect("groups");
    assert!(all.groups().iter().any(|listed| listed.name() == group));
}

pub(crate) fn a_group_is_deleted_when_it_is_empty(cluster: &Cluster) {
    let (topic, group) = (cluster.topic(1), unique("g"));
    cluster.produce(&topic, 0, &["a"]);
    let member = cluster.member(&group, &topic, &[]);
    read(&member, 1);
    member
        .commit_consumer_state(CommitMode::Sync)
        .expect("a commit");
    let admin = cluster.admin();
    let delete = || {
        let deleted = cluster
            .block_on(admin.delete_groups(&[&group], &AdminOptions::new()))
            .expect("an answer");
        deleted
            .into_iter()
            .next()
            .expect("a result")
            .map_err(|(_, code)| code)
    };
    assert_eq!(delete(), Err(RDKafkaErrorCode::NonEmptyGroup));
    drop(member);
    assert_eq!(delete(), Ok(group.clone()));
    let other = cluster.member(&group, &topic, &[]);
    assert_eq!(text(read(&other, 1).remove(0).value), "a");
    let unknown = cluster
        .block_on(admin.delete_groups(&["nobody"], &AdminOptions::new()))
        .expect("an answer");
    assert_eq!(
        unknown,
        [Err((
            "nobody".to_owned(),
            RDKafkaErrorCode::GroupIdNotFound
        ))]
    );
}

/// State, protocol type, protocol and number of members.
fn describe(consumer: &BaseConsumer, group: &str) -> (String, String, String, usize) {
    let list = consumer
        .fetch_group_list(Some(group), PATIENCE)
        .expect("groups");
    let found = &list.groups()[0];
    (
        found.state().to_owned(),
        found.protocol_type().to_owned(),
        found.protocol().to_owned(),
        found.members().len(),
    )
}
