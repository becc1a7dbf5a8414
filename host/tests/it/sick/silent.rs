//! Stores that answer nobody for about as long as a call has, again and again: each time they are there before it can be seen
//! that they were away.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Lane, Patient, servers};
use crate::bench::Proxy;
use crate::support::server;

const GRANT: &str = r#"
limits = { deadline = "1s" }
sql = ["db"]
redis = { cache = { prefix = "p:" } }"#;
/// Longer than a call's deadline with the first moment of it.
const STALLED: Duration = Duration::from_millis(1050);
/// Long enough for an answer to whether the store is there, and over before the call is at its store again.
const OPEN: Duration = Duration::from_millis(150);
/// More than the policy has attempts.
const TIMES: u32 = 4;

fn on_database(lane: Lane) -> (Patient, Proxy) {
    let mut url = url::Url::parse(&server("DATABASE_URL")).expect("a URL");
    let proxy = Proxy::start(url.port().expect("a port"));
    url.set_port(Some(proxy.port)).expect("a port");
    let stores = format!("[redis.cache]\nurl = \"memory:\"\n[sql.db]\nurl = \"{url}\"");
    (Patient::start("db", lane, GRANT, &stores), proxy)
}

async fn costs_nothing(patient: Patient, proxy: &Proxy, lane: Lane, call: Value) {
    patient.send(std::slice::from_ref(&call)).await;
    patient.goes_on();
    let later = json!({ "do": "steps", "steps": [{ "do": "sleep", "ms": 300 }, call] });
    proxy.stall(true);
    patient.send(&[later]).await;
    for _ in 0..TIMES {
        proxy.stall(true);
        tokio::time::sleep(STALLED).await;
        proxy.stall(false);
        tokio::time::sleep(OPEN).await;
    }
    patient.settle();
    assert_eq!(patient.dead(), Vec::<String>::new(), "{lane:?}");
    patient.goes_on();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_answers_nobody_for_a_moment_costs_no_message() {
    for lane in [Lane::Ordered, Lane::Concurrent, Lane::Transactional] {
        let (patient, proxy) = on_database(lane);
        let select = json!({ "do": "sql", "store": "db", "statement": "SELECT 1" });
        costs_nothing(patient, &proxy, lane, select).await;
    }
}

/// It is looked for locks meanwhile, and nobody answers whether there are any.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_answers_nobody_for_long_is_called_away_and_not_locked() {
    for lane in [Lane::Ordered, Lane::Transactional] {
        let (patient, proxy) = on_database(lane);
        let sleep = json!({ "do": "sql", "store": "db", "statement": "SELECT pg_sleep(0.4)" });
        // Enough of them that it is not over before it is cut off.
        patient.send(&vec![sleep; 5]).await;
        proxy.stall(true);
        patient.says("did not answer within");
        proxy.stall(false);
        patient.goes_on();
        let log = patient.host.log();
        assert!(log.contains("SQL store `db` is away"), "{lane:?}: {log}");
        assert!(!log.contains("for a lock"), "{lane:?}: {log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_answers_nobody_for_a_moment_costs_no_message() {
    let redis = servers::redis(&[]);
    for lane in [Lane::Ordered, Lane::Concurrent] {
        let proxy = Proxy::start(redis.port);
        let redis = format!("[redis.cache]\nurl = \"redis://127.0.0.1:{}\"", proxy.port);
        let stores = format!("{redis}\n[sql.db]\nurl = \"sqlite:db.sqlite\"");
        let patient = Patient::start("cache", lane, GRANT, &stores);
        let set = json!({ "do": "redis", "store": "cache", "call": "set", "key": "p:a",
                          "value": "x" });
        costs_nothing(patient, &proxy, lane, set).await;
    }
}
