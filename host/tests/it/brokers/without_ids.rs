//! A log that tells no ids of topics, as Kafka did not before 2.8: what holds there is said, and holds.

use kafka_protocol::messages::api_versions_response::ApiVersion;
use kafka_protocol::messages::{ApiKey, ApiVersionsRequest, ApiVersionsResponse};
use serde_json::Value;

use super::DELIVERIES;
use super::cluster::Broker;
use super::proxy::Proxy;
use crate::bench::Bench;
use crate::offsets::{emits, execute, make_anew_on, numbers, stop};
use crate::progress_row::database;

/// The newest versions that a broker of Kafka 2.7 takes. Ids of topics are in Metadata from 10 on, and in Fetch from 13 on.
const NEWEST: [(ApiKey, i16); 20] = [
    (ApiKey::Produce, 8),
    (ApiKey::Fetch, 12),
    (ApiKey::ListOffsets, 5),
    (ApiKey::Metadata, 9),
    (ApiKey::OffsetCommit, 8),
    (ApiKey::OffsetFetch, 7),
    (ApiKey::FindCoordinator, 3),
    (ApiKey::JoinGroup, 7),
    (ApiKey::Heartbeat, 4),
    (ApiKey::LeaveGroup, 4),
    (ApiKey::SyncGroup, 5),
    (ApiKey::DescribeGroups, 5),
    (ApiKey::ListGroups, 4),
    (ApiKey::ApiVersions, 3),
    (ApiKey::CreateTopics, 6),
    (ApiKey::DeleteTopics, 5),
    (ApiKey::InitProducerId, 4),
    (ApiKey::OffsetForLeaderEpoch, 3),
    (ApiKey::DescribeConfigs, 3),
    (ApiKey::DeleteRecords, 2),
];
const WARNED: &str = "the log does not tell the topic's id";

/// A broker of today that says that it is one of Kafka 2.7, and is asked nothing newer.
fn start() -> (Proxy, Broker) {
    let answer = |request: &super::proxy::Request<'_>| {
        let is_asked = request.is(ApiKey::ApiVersions);
        is_asked.then(|| request.answer(|_: ApiVersionsRequest| offered()))
    };
    tokio::task::block_in_place(|| Proxy::start(answer))
}

fn offered() -> ApiVersionsResponse {
    let versions = NEWEST.iter().map(|(key, newest)| {
        ApiVersion::default()
            .with_api_key(*key as i16)
            .with_min_version(key.valid_versions().min)
            .with_max_version(*newest)
    });
    ApiVersionsResponse::default().with_api_keys(versions.collect())
}

fn bench(brokers: &str, delivery: &str, database: &str) -> Bench {
    let settings = format!("delivery = \"{delivery}\"");
    Bench::on(brokers, "test-probe", 1, &settings, database, "")
}

/// How often the host has warned of its input.
fn warnings(bench: &Bench) -> usize {
    let log = bench.host.log();
    let warned = |line: &&str| line.contains(WARNED) && line.contains(&bench.input);
    log.lines().filter(warned).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_tells_no_ids_of_topics_is_warned_of_and_works() {
    let (proxy, _broker) = start();
    for delivery in DELIVERIES {
        let mut bench = bench(&proxy.address(), delivery, "sqlite:db.sqlite");
        let reject = serde_json::json!({ "do": "reject" });
        let mut messages = emits(&bench, 0..5);
        messages.push(reject);
        let (_, dead) = bench.deliver(&messages).await;
        assert_eq!(dead.len(), 1, "{delivery}");
        assert_eq!(warnings(&bench), 1, "{delivery}");
        // It goes on where it was, after a stop and after a kill.
        stop(&mut bench);
        bench.send(&emits(&bench, 5..8)).await;
        bench.restart();
        bench.log.wait_committed(&bench.group, &bench.input);
        bench.restart();
        bench.deliver(&emits(&bench, 8..10)).await;
        assert_eq!(numbers(&bench), Vec::from_iter(0..10), "{delivery}");
        bench.host.ready();
        assert_eq!(warnings(&bench), 1, "{delivery}");
    }
}

/// Less than was read of the old one.
fn few(bench: &Bench) -> Vec<Value> {
    emits(bench, 100..103)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_ids_a_topic_made_anew_is_noticed_while_it_is_shorter_than_what_was_read() {
    const SAID: [&str; 3] = [
        "offset 5 is to be read next, but the partition ends at 3",
        "deleted and made anew",
        "stagehost_progress",
    ];
    let (proxy, _broker) = start();
    let (brokers, url) = (proxy.address(), database().await);
    let mut bench = bench(&brokers, "transactional", &url);
    bench.deliver(&emits(&bench, 0..5)).await;
    stop(&mut bench);
    make_anew_on(&brokers, &bench.input).await;
    bench.send(&few(&bench)).await;
    for _ in 0..2 {
        bench.restart();
        bench.not_ready(&SAID);
        // By the partition's end, then, and not by what it is.
        assert_eq!(warnings(&bench), 1);
    }
    assert_eq!(numbers(&bench), Vec::from_iter(0..5));
    // The mend that it says.
    stop(&mut bench);
    execute(&url, "DELETE FROM stagehost_progress").await;
    bench.restart();
    bench.log.wait_committed(&bench.group, &bench.input);
    bench.host.ready();
    assert_eq!(numbers(&bench), Vec::from_iter((0..5).chain(100..103)));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_ids_a_shorter_topic_made_anew_while_its_host_runs_is_noticed() {
    let (proxy, _broker) = start();
    let brokers = proxy.address();
    let bench = bench(&brokers, "transactional", "sqlite:db.sqlite");
    bench.deliver(&emits(&bench, 0..5)).await;
    make_anew_on(&brokers, &bench.input).await;
    bench.send(&few(&bench)).await;
    let words = [
        "but the partition ends at",
        "deleted and made anew",
        "stagehost_progress",
    ];
    bench.not_ready(&words);
    assert_eq!(warnings(&bench), 1);
    assert_eq!(numbers(&bench), Vec::from_iter(0..5));
}

/// No row says otherwise, and the group's offset went with the topic that it was of.
#[tokio::test(flavor = "multi_thread")]
async fn without_ids_a_topic_made_anew_is_read_from_its_first_record_at_least_once() {
    let (proxy, _broker) = start();
    let brokers = proxy.address();
    let mut bench = bench(&brokers, "at-least-once", "sqlite:db.sqlite");
    bench.deliver(&emits(&bench, 0..5)).await;
    stop(&mut bench);
    make_anew_on(&brokers, &bench.input).await;
    bench.send(&few(&bench)).await;
    bench.restart();
    bench.log.wait_committed(&bench.group, &bench.input);
    assert_eq!(warnings(&bench), 1);
    assert_eq!(numbers(&bench), Vec::from_iter((0..5).chain(100..103)));
}
