//! Where a lane reads from: what was removed, reset, emptied or made anew is told apart, and said. On Apache Kafka.

use std::collections::BTreeSet;
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::producer::{BaseRecord, Producer};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::bench::Bench;
use crate::support::{Seen, server, transactional_producer, unique, until};

const PATIENCE: Duration = Duration::from_secs(30);
const DELIVERIES: [&str; 2] = ["transactional", "at-least-once"];

/// A database of its own, for what is done to the table in it is done to all lanes.
async fn database() -> String {
    let (url, name) = (server("DATABASE_URL"), unique("db").replace('-', "_"));
    execute(&url, &format!("CREATE DATABASE {name}")).await;
    let (server, _) = url.rsplit_once('/').expect("a database's name");
    format!("{server}/{name}")
}

pub(crate) async fn execute(url: &str, statement: &str) {
    let connected = PgConnection::connect(url).await;
    let mut connection = connected.expect("PostgreSQL");
    let statement = sqlx::AssertSqlSafe(statement.to_owned());
    let done = sqlx::raw_sql(statement).execute(&mut connection).await;
    done.expect("the statement is run");
}

fn admin(brokers: &str) -> AdminClient<DefaultClientContext> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    config.create().expect("an admin client")
}

/// Awaits within a test's plain closure.
fn blocking<T>(work: impl Future<Output = T>) -> T {
    tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(work))
}

fn at(topic: &str, offset: i64) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    let added = list.add_partition_offset(topic, 0, Offset::Offset(offset));
    added.expect("an offset");
    list
}

/// As retention does.
async fn remove_below(topic: &str, offset: i64) {
    // Held until it has answered: without its thread nobody does.
    let admin = admin(&server("KAFKA_BROKERS"));
    let removed = admin.delete_records(&at(topic, offset), &AdminOptions::new());
    removed.await.expect("removed");
}

fn member(group: &str) -> BaseConsumer {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", server("KAFKA_BROKERS"));
    config.set("group.id", group);
    config.create().expect("a consumer")
}

fn commit(group: &str, topic: &str, offset: i64, words: &str) {
    let consumer = member(group);
    let list = at(topic, offset);
    let mut element = list.find_partition(topic, 0).expect("it was added");
    element.set_metadata(words);
    until("the group to be free", || {
        consumer.commit(&list, CommitMode::Sync).ok()
    });
}

/// As `kafka-consumer-groups --reset-offsets` does: the offset, and nothing beside it.
fn reset(group: &str, topic: &str, offset: i64) {
    commit(group, topic, offset, "");
}

/// What stands beside a group's offset.
fn committed_words(group: &str, topic: &str) -> String {
    let consumer = member(group);
    let committed = until("what is committed", || {
        consumer.committed_offsets(at(topic, 0), PATIENCE).ok()
    });
    let element = committed
        .find_partition(topic, 0)
        .expect("it was asked for");
    element.metadata().to_owned()
}

pub(crate) async fn make_anew(topic: &str) {
    make_anew_on(&server("KAFKA_BROKERS"), topic).await;
}

pub(crate) async fn make_anew_on(brokers: &str, topic: &str) {
    let (admin, options) = (admin(brokers), AdminOptions::new());
    let deleted = admin.delete_topics(&[topic], &options).await;
    deleted.expect("deleted");
    until("the topic to be made anew", || {
        let new = NewTopic::new(topic, 1, TopicReplication::Fixed(1));
        let made = blocking(admin.create_topics([&new], &options));
        made.ok()?.into_iter().next()?.ok()
    });
}

/// Another program's transactions: each of these many records, which are committed or aborted.
fn transactions(topic: &str, all: &[(&[Value], bool)]) {
    let producer = transactional_producer();
    for (values, is_committed) in all {
        producer.begin_transaction().expect("begun");
        for value in *values {
            let value = value.to_string();
            let sent = producer.send(BaseRecord::<str, str>::to(topic).key("k").payload(&value));
            sent.expect("there is room");
        }
        producer.flush(PATIENCE).expect("all are in the log");
        let ended = match is_committed {
            true => producer.commit_transaction(PATIENCE),
            false => producer.abort_transaction(PATIENCE),
        };
        ended.expect("it is ended");
    }
}

fn emit(bench: &Bench, n: i64) -> Value {
    json!({ "do": "emit", "topic": bench.output, "value": n })
}

pub(crate) fn emits(bench: &Bench, numbers: std::ops::Range<i64>) -> Vec<Value> {
    numbers.map(|n| emit(bench, n)).collect()
}

/// The numbers that came out, each output once: after a kill it may be produced again, by the same id.
pub(crate) fn numbers(bench: &Bench) -> Vec<i64> {
    let mut known = BTreeSet::new();
    let mut number = |seen: Seen| {
        let id = seen.header("stagehost-id");
        let is_new = id.is_none_or(|id| known.insert(id.to_owned()));
        seen.value.as_deref().filter(|_| is_new)?.parse().ok()
    };
    let all = bench.log.read(&bench.output).into_iter();
    all.filter_map(&mut number).collect()
}

pub(crate) fn stop(bench: &mut Bench) {
    bench.host.signal(libc::SIGTERM);
    bench.host.wait_for_end();
}

/// Waits until what a host of this bench is to be is ready, and its log has these words.
fn says(bench: &Bench, words: &[&str]) {
    bench.host.ready();
    bench
        .host
        .wait_for(&format!("the log to say {words:?}"), || {
            let said = bench.host.log();
            words.iter().all(|word| said.contains(word)).then_some(())
        });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_of_transactions_that_was_processed_and_emptied_is_no_gap() {
    for delivery in DELIVERIES {
        let settings = format!("delivery = \"{delivery}\"");
        let url = database().await;
        let mut bench = Bench::with("test-probe", 1, &settings, &url, "");
        let (good, bad) = (emits(&bench, 0..5), emits(&bench, 100..110));
        transactions(&bench.input, &[(&good, true), (&bad, false)]);
        // The markers and what was aborted are not behind for ever.
        bench.log.wait_committed(&bench.group, &bench.input);
        let lag = format!(
            "kafka_consumergroup_lag{{consumergroup=\"{}\",topic=\"{}\",partition=\"0\"}}",
            bench.group, bench.input
        );
        until("the metric to say so", || {
            (bench.metric(&lag).as_deref() == Some("0")).then_some(())
        });
        // The end: five records and a marker, ten and theirs.
        remove_below(&bench.input, 17).await;
        for is_killed in [false, true] {
            if is_killed {
                bench.restart();
            } else {
                stop(&mut bench);
                bench.restart();
            }
            bench.host.ready();
            let from = if is_killed { 6 } else { 5 };
            let more = emits(&bench, from..from + 1);
            transactions(&bench.input, &[(&more, true)]);
            bench.log.wait_committed(&bench.group, &bench.input);
            assert_eq!(
                numbers(&bench),
                (0..=from).collect::<Vec<_>>(),
                "{delivery}"
            );
            let gaps = bench.metric("stagehost_gap_records_total{stage=\"probe\"}");
            assert_eq!(gaps.as_deref(), Some("0"), "{delivery}");
        }
    }
}

/// The host ends right after it has passed the markers, before an idle lane writes that into its row.
#[tokio::test(flavor = "multi_thread")]
async fn a_marker_that_was_passed_is_passed_after_a_kill() {
    let url = database().await;
    let mut bench = Bench::with("test-probe", 1, "", &url, "");
    transactions(&bench.input, &[(&emits(&bench, 0..5), true)]);
    bench.log.wait_committed(&bench.group, &bench.input);
    bench.host.signal(libc::SIGKILL);
    bench.host.wait_for_end();
    remove_below(&bench.input, 6).await;
    bench.restart();
    bench.host.ready();
    transactions(&bench.input, &[(&emits(&bench, 5..6), true)]);
    bench.log.wait_committed(&bench.group, &bench.input);
    assert_eq!(numbers(&bench), (0..6).collect::<Vec<_>>());
}

/// An operator's reset takes away what the group's commit told of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_marker_that_was_passed_is_passed_after_a_stop_and_a_reset() {
    let url = database().await;
    let mut bench = Bench::with("test-probe", 1, "", &url, "");
    transactions(&bench.input, &[(&emits(&bench, 0..5), true)]);
    bench.log.wait_committed(&bench.group, &bench.input);
    // Before the lane has been idle for long.
    stop(&mut bench);
    reset(&bench.group, &bench.input, 6);
    remove_below(&bench.input, 6).await;
    bench.restart();
    bench.host.ready();
    transactions(&bench.input, &[(&emits(&bench, 5..6), true)]);
    bench.log.wait_committed(&bench.group, &bench.input);
    assert_eq!(numbers(&bench), (0..6).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn records_of_transactions_that_nobody_saw_before_they_were_removed_are_a_gap() {
    for delivery in DELIVERIES {
        let settings = format!("delivery = \"{delivery}\"");
        let url = database().await;
        let mut bench = Bench::with("test-probe", 1, &settings, &url, "");
        transactions(&bench.input, &[(&emits(&bench, 0..5), true)]);
        bench.log.wait_committed(&bench.group, &bench.input);
        stop(&mut bench);
        let more = emits(&bench, 5..8);
        transactions(&bench.input, &[(&more, true)]);
        remove_below(&bench.input, 10).await;
        bench.restart();
        bench.not_ready(&["were removed before they were processed", "on-gap"]);
    }
}

/// A bench that has read five messages and was stopped. The log writes ids of topics with slashes, one in four or so.
async fn read_with_a_slash_in_its_topics_id(url: &str) -> Bench {
    const TRIES: usize = 50;
    for _ in 0..TRIES {
        execute(url, "DROP TABLE IF EXISTS stagehost_progress").await;
        let mut bench = Bench::with("test-probe", 1, "", url, "");
        bench.deliver(&emits(&bench, 0..5)).await;
        stop(&mut bench);
        let words = committed_words(&bench.group, &bench.input);
        let id = words
            .split(' ')
            .find_map(|word| word.strip_prefix("topic="));
        if id.expect("the topic's id").contains('/') {
            return bench;
        }
    }
    panic!("no id with a slash in {TRIES} tries");
}

/// Longer than the one before, so that its offsets alone do not tell; and Kafka forgets the group's with the topic.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_made_anew_that_is_longer_than_what_was_read_is_noticed() {
    let url = database().await;
    let mut bench = read_with_a_slash_in_its_topics_id(&url).await;
    make_anew(&bench.input).await;
    bench.send(&emits(&bench, 100..120)).await;
    for _ in 0..2 {
        bench.restart();
        bench.not_ready(&["deleted and made anew", "stagehost_progress"]);
    }
    assert_eq!(numbers(&bench), (0..5).collect::<Vec<_>>());
    // The mend that it says.
    stop(&mut bench);
    execute(&url, "DELETE FROM stagehost_progress").await;
    bench.restart();
    bench.log.wait_committed(&bench.group, &bench.input);
    let all: Vec<_> = (0..5).chain(100..120).collect();
    assert_eq!(numbers(&bench), all);
}

/// Before its group could see that it was gone: within seconds.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_made_anew_while_its_host_runs_is_noticed() {
    let bench = Bench::start("test-probe", 1, "");
    bench.deliver(&emits(&bench, 0..5)).await;
    make_anew(&bench.input).await;
    bench.send(&emits(&bench, 100..120)).await;
    bench.not_ready(&["deleted and made anew", "stagehost_progress"]);
}

/// No row says otherwise, and the group's offset went with the topic that it was of.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_made_anew_is_read_from_its_first_record_at_least_once() {
    let mut bench = Bench::start("test-probe", 1, "delivery = \"at-least-once\"");
    bench.deliver(&emits(&bench, 0..5)).await;
    stop(&mut bench);
    make_anew(&bench.input).await;
    bench.send(&emits(&bench, 100..120)).await;
    bench.restart();
    bench.log.wait_committed(&bench.group, &bench.input);
    let all: Vec<_> = (0..5).chain(100..120).collect();
    assert_eq!(numbers(&bench), all);
    // Somebody else's commit says of which topic it is: another one's offset does not count.
    stop(&mut bench);
    let group = (bench.group.clone(), bench.input.clone());
    let words = committed_words(&group.0, &group.1);
    make_anew(&bench.input).await;
    bench.send(&emits(&bench, 200..240)).await;
    commit(&group.0, &group.1, 20, &words);
    bench.restart();
    bench.not_ready(&["deleted and made anew", "offset 20 is to be read next"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_database_stops_its_lanes_until_somebody_says_where_to_go_on() {
    let url = database().await;
    let mut bench = Bench::with("test-probe", 1, "", &url, "");
    bench.deliver(&emits(&bench, 0..6)).await;
    stop(&mut bench);
    execute(&url, "DELETE FROM stagehost_progress").await;
    bench.send(&emits(&bench, 6..9)).await;
    for _ in 0..2 {
        bench.restart();
        let words = ["emptied", "committed offset 6", "--reset-offsets"];
        bench.not_ready(&words);
        assert_eq!(numbers(&bench), (0..6).collect::<Vec<_>>());
    }
    stop(&mut bench);
    reset(&bench.group, &bench.input, 6);
    bench.restart();
    says(&bench, &["begins at the group's committed offset 6"]);
    bench.log.wait_committed(&bench.group, &bench.input);
    assert_eq!(numbers(&bench), (0..9).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_database_may_be_passed_and_that_is_said() {
    let url = database().await;
    let mut bench = Bench::with("test-probe", 1, "on-gap = \"continue\"", &url, "");
    bench.deliver(&emits(&bench, 0..6)).await;
    stop(&mut bench);
    execute(&url, "DELETE FROM stagehost_progress").await;
    bench.send(&emits(&bench, 6..9)).await;
    bench.restart();
    says(
        &bench,
        &[
            "emptied",
            "going on at the group's offset, as `on-gap` says",
        ],
    );
    bench.log.wait_committed(&bench.group, &bench.input);
    assert_eq!(numbers(&bench), (0..9).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn offsets_that_an_operator_resets_are_answered_with_what_counts_and_the_mend() {
    let url = database().await;
    let mut bench = Bench::with("test-probe", 1, "", &url, "");
    bench.deliver(&emits(&bench, 0..6)).await;
    for offset in [0, 4] {
        stop(&mut bench);
        reset(&bench.group, &bench.input, offset);
        bench.restart();
        let set = format!("the group's committed offset {offset}");
        let words = [
            &*set,
            "stagehost_progress does, and says 6",
            "UPDATE stagehost_progress SET next_offset",
        ];
        says(&bench, &words);
        bench.log.wait_committed(&bench.group, &bench.input);
        assert_eq!(numbers(&bench), (0..6).collect::<Vec<_>>());
    }
    // A restart without it says nothing of the kind.
    stop(&mut bench);
    bench.restart();
    says(&bench, &["from offset 6"]);
    let said = bench.host.log();
    assert!(!said.contains("was set by somebody else"), "{said}");

    // The mend does what it says: the records come again, and are not taken for repetitions.
    stop(&mut bench);
    let again =
        "UPDATE stagehost_progress SET next_offset = 4, attempts = 0, generation = generation + 1";
    execute(&url, again).await;
    bench.restart();
    bench.log.wait_committed(&bench.group, &bench.input);
    until("what comes again", || {
        (numbers(&bench).len() == 8).then_some(())
    });
    assert_eq!(numbers(&bench)[6..], [4, 5]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_names_the_offset_at_which_reading_begins() {
    for delivery in DELIVERIES {
        let settings = format!("delivery = \"{delivery}\"");
        let mut bench = Bench::start("test-probe", 2, &settings);
        let first = format!("{} 0 from offset 0, 1 from offset 0", bench.input);
        bench.host.wait_for("the first offsets", || {
            let said = bench.host.log();
            let line = said.lines().find(|line| line.contains("assigned: "))?;
            // Both at once, or one after the other.
            (line.contains(&first) || said.matches("from offset 0").count() == 2).then_some(())
        });
        bench.deliver(&emits(&bench, 0..5)).await;
        stop(&mut bench);
        bench.restart();
        says(&bench, &["reading what was assigned: ", "from offset 5"]);
    }
}

/// What was done meanwhile is not done again, though the row says nothing of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_was_at_least_once_for_a_while_goes_on_behind_what_was_done() {
    let url = database().await;
    let mut bench = Bench::with("test-probe", 1, "", &url, "");
    bench.deliver(&emits(&bench, 0..5)).await;
    stop(&mut bench);
    let pipeline = bench.pipeline.clone();
    let stage = "[stages.probe]\n";
    assert!(pipeline.contains(stage));
    bench.pipeline = pipeline.replace(stage, &format!("{stage}delivery = \"at-least-once\"\n"));
    bench.restart();
    bench.deliver(&emits(&bench, 5..10)).await;
    stop(&mut bench);
    bench.pipeline = pipeline;
    bench.restart();
    bench.deliver(&emits(&bench, 10..12)).await;
    assert_eq!(numbers(&bench), (0..12).collect::<Vec<_>>());
    says(&bench, &["at least once", "stayed at 5", "going on there"]);
}
