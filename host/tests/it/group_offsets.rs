//! What a group has committed, and the log does not say: a partition is then not read, least of all from its first record.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{BaseProducer, Producer};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::{Value, json};

use crate::bench::Bench;
use crate::support::{acl, server, transactional_producer, until};
use crate::waits::{Guarded, said_in_log};

const DELIVERIES: [&str; 2] = ["transactional", "at-least-once"];
const ASK: Duration = Duration::from_secs(10);
/// How long a partition is seen not to be read.
const UNREAD: Duration = Duration::from_secs(3);

fn emits(bench: &Bench, numbers: std::ops::Range<i64>) -> Vec<Value> {
    let emit = |n| json!({ "do": "emit", "topic": bench.output, "value": n });
    numbers.map(emit).collect()
}

/// What has come out, in the order in which it did.
fn numbers(bench: &Bench) -> Vec<i64> {
    let seen = bench.log.read(&bench.output);
    let number = |seen: &crate::support::Seen| seen.json().as_i64().expect("a number");
    seen.iter().map(number).collect()
}

fn has_no_dead_letters(bench: &Bench, delivery: &str) {
    let dead = bench.log.read(&format!("{}.dlq", bench.input));
    assert_eq!(dead, [], "{delivery}");
}

fn client(group: &str) -> BaseConsumer {
    ClientConfig::new()
        .set("bootstrap.servers", server("KAFKA_BROKERS"))
        .set("group.id", group)
        .set("enable.auto.commit", "false")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .create()
        .expect("a consumer")
}

/// A transaction that has sent offsets of the group and is open: Kafka says of those partitions that nothing is certain yet.
fn begin_offsets(bench: &Bench) -> BaseProducer {
    let other = transactional_producer();
    other.begin_transaction().expect("begun");
    let mut offsets = TopicPartitionList::new();
    let added = offsets.add_partition_offset(&bench.input, 0, Offset::Offset(1));
    added.expect("an offset");
    let group = client(&bench.group).group_metadata().expect("a group");
    let sent = other.send_offsets_to_transaction(&offsets, &group, ASK);
    sent.expect("offsets");
    other
}

#[tokio::test(flavor = "multi_thread")]
async fn offsets_of_a_transaction_that_is_open_are_waited_for_and_named() {
    for delivery in DELIVERIES {
        let settings = format!("delivery = \"{delivery}\"");
        let mut bench = Bench::start("test-probe", 1, &settings);
        bench.deliver(&emits(&bench, 0..5)).await;
        bench.host.signal(libc::SIGTERM);
        bench.host.wait_for_end();
        let other = begin_offsets(&bench);
        bench.restart();
        bench.send(&emits(&bench, 5..8)).await;
        let words = [
            "the group's coordinator does not say what is committed",
            "a transaction of another program that commits offsets",
        ];
        bench.not_ready(&words);
        said_in_log(&bench, words[1]);
        let waits = "stagehost_lanes_waiting{stage=\"probe\",for=\"log\"}";
        bench.host.wait_for("the metric", || {
            (bench.metric(waits).as_deref() == Some("1")).then_some(())
        });
        tokio::time::sleep(UNREAD).await;
        assert_eq!(numbers(&bench), Vec::from_iter(0..5), "{delivery}");
        other.abort_transaction(ASK).expect("aborted");
        bench.log.wait_committed(&bench.group, &bench.input);
        bench.host.ready();
        assert_eq!(numbers(&bench), Vec::from_iter(0..8), "{delivery}");
        has_no_dead_letters(&bench, delivery);
    }
}

/// Another member of the group, whose user may do all. It lets partitions go when it is polled, and commits nothing.
pub(crate) struct Member {
    consumer: Arc<BaseConsumer>,
    stop: Arc<AtomicBool>,
}

impl Member {
    /// As the one that gives the group its partitions, for it is the first.
    pub(crate) fn join(group: &str, topic: &str, partitions: usize) -> Self {
        let consumer = client(group);
        consumer.subscribe(&[topic]).expect("a topic");
        until("the other member's partitions", || {
            consumer.poll(Duration::from_millis(100));
            let assigned = consumer.assignment().expect("an assignment");
            (assigned.count() == partitions).then_some(())
        });
        Self {
            consumer: Arc::new(consumer),
            stop: Arc::default(),
        }
    }

    /// Polls from now on, until it is dropped.
    pub(crate) fn go_on(&self) {
        let (consumer, stop) = (self.consumer.clone(), self.stop.clone());
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                consumer.poll(Duration::from_millis(100));
            }
        });
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The host is given a partition of a topic that it may not describe any more.
#[tokio::test(flavor = "multi_thread")]
async fn offsets_that_may_not_be_read_any_more_are_waited_for_and_named() {
    for delivery in DELIVERIES {
        // By itself it would soon find that it may not see the topic, and give the partition up.
        let seldom = "properties.\"topic.metadata.refresh.interval.ms\" = \"600000\"";
        let mut guarded = Guarded::with(delivery, 2, seldom);
        let bench = &mut guarded.bench;
        let values = |numbers| -> Vec<_> {
            let emits = emits(bench, numbers);
            emits.iter().map(Value::to_string).collect()
        };
        let rounds = [values(0..3), values(3..6), values(6..8), values(8..10)];
        bench.log.produce_to(&bench.input, 0, &rounds[0]).await;
        bench.log.produce_to(&bench.input, 1, &rounds[1]).await;
        bench.log.wait_committed(&bench.group, &bench.input);
        bench.host.signal(libc::SIGTERM);
        bench.host.wait_for_end();
        let other = Member::join(&bench.group, &bench.input, 2);
        bench.restart();
        bench.host.ready();
        let input = bench.input.clone();
        let topic = ["--topic", input.as_str(), "--operation", "Describe"];
        let deny = [&topic[..], &["--deny-principal", "User:stagehost"]].concat();
        acl(&[&["--add"][..], &deny].concat());
        other.go_on();
        let words = "the group's committed offset can't be read: the host's Kafka user lacks a permission on the topic";
        bench.not_ready(&[words, &bench.input]);
        said_in_log(bench, words);
        tokio::time::sleep(UNREAD).await;
        assert_eq!(sorted(bench), Vec::from_iter(0..6), "{delivery}");
        acl(&[&["--remove", "--force"][..], &deny].concat());
        drop(other);
        bench.log.produce_to(&bench.input, 0, &rounds[2]).await;
        bench.log.produce_to(&bench.input, 1, &rounds[3]).await;
        bench.log.wait_committed(&bench.group, &bench.input);
        bench.host.ready();
        assert_eq!(sorted(bench), Vec::from_iter(0..10), "{delivery}");
        has_no_dead_letters(bench, delivery);
    }
}

fn sorted(bench: &Bench) -> Vec<i64> {
    let mut numbers = numbers(bench);
    numbers.sort_unstable();
    numbers
}
