//! A database that refuses sessions while all places of the pool are asked for: what it says is said, and not only that no place
//! became free.

use std::time::Duration;

use serde_json::{Value, json};

use super::postgres::Place;
use super::servers;
use super::{Lane, Patient, inserts};

const LANES: [Lane; 3] = [Lane::Ordered, Lane::Concurrent, Lane::Transactional];

/// Messages that keep their places for a while, and insert a row each.
fn slow(numbers: std::ops::Range<u32>) -> Vec<Value> {
    let statement = "INSERT INTO t SELECT $1::bigint FROM pg_sleep(1.5)";
    let slow = |n| json!({ "do": "sql", "store": "db", "statement": statement, "params": [n], "execute": true });
    numbers.map(slow).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_refuses_connections_is_named_with_its_address() {
    for lane in LANES {
        let place = Place::new().await;
        let mut url = url::Url::parse(&place.url).expect("a URL");
        let way = servers::Way::to(url.port().expect("a port"));
        url.set_port(Some(way.port)).expect("a port");
        let patient = Patient::on_database(url.as_str(), lane);
        patient.send(&inserts(0..10)).await;
        patient.settle();
        // More than there are places for.
        patient.send(&slow(10..18)).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        way.shut();
        patient.send(&inserts(18..30)).await;
        let at = format!("PostgreSQL at 127.0.0.1:{}{}", way.port, url.path());
        patient.says(&format!("{at}: Connection refused"));
        // Longer than anybody waits for a place.
        tokio::time::sleep(Duration::from_secs(8)).await;
        patient.says(&format!("{at}: Connection refused"));
        assert_eq!(patient.dead(), Vec::<String>::new(), "{lane:?}");
        way.reopen();
        patient.goes_on();
        let mut numbers = place.numbers().await;
        if lane != Lane::Transactional {
            // What was under way, the server may have done to its end.
            numbers.dedup();
        }
        assert_eq!(numbers, Vec::from_iter(0..30), "{lane:?}");
    }
}

/// Others have all but one of the connections that the role may have.
#[tokio::test(flavor = "multi_thread")]
async fn too_few_connections_for_all_places_cost_no_message_and_are_named() {
    let place = Place::new().await;
    let patient = Patient::on_database(&place.url, Lane::Concurrent);
    patient.send(&inserts(0..10)).await;
    patient.settle();
    place.run("ALTER ROLE {role} CONNECTION LIMIT 1").await;
    place.end_sessions().await;
    patient.send(&slow(10..26)).await;
    patient.says("too many connections for role");
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(patient.dead(), Vec::<String>::new());
    place.run("ALTER ROLE {role} CONNECTION LIMIT -1").await;
    patient.goes_on();
    assert_eq!(place.numbers().await, Vec::from_iter(0..26));
}
