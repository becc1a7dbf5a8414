//! What lanes wait for is said: on `/readyz`, in the log and in the metrics, with the cause that a person can mend.

use std::time::Duration;

use serde_json::json;

use crate::bench::{Bench, Proxy};
use crate::support::{acl, server, unique};

fn waiting(bench: &Bench, what: &str) -> bool {
    let line = format!("stagehost_lanes_waiting{{stage=\"probe\",for=\"{what}\"}}");
    bench.metric(&line).as_deref() == Some("1")
}

fn said_in_log(bench: &Bench, words: &str) {
    (bench.host).wait_for(words, || bench.host.log().contains(words).then_some(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_somebody_else_has_locked_is_named() {
    let url = crate::progress_row::database().await;
    let bench = Bench::with("test-probe", 1, "", &url, "");
    let emit = json!({ "do": "emit", "topic": bench.output, "value": 1 });
    bench.deliver(std::slice::from_ref(&emit)).await;
    let lock = crate::progress_row::lock_rows(&url).await;
    bench.send(std::slice::from_ref(&emit)).await;
    bench.not_ready(&["SQL store `db`", "stage probe"]);
    drop(lock);
    bench.log.wait_committed(&bench.group, &bench.input);
    bench.host.ready();
    assert_eq!(bench.log.read(&bench.output).len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_does_not_answer_a_call_is_named() {
    let redis: redis::ConnectionInfo = {
        use redis::IntoConnectionInfo;
        server("REDIS_URL").into_connection_info().expect("a URL")
    };
    let redis::ConnectionAddr::Tcp(_, port) = redis.addr().clone() else {
        panic!("Redis is on TCP");
    };
    let proxy = Proxy::start(port);
    let settings = "delivery = \"at-least-once\"\nlimits = { deadline = \"2m\" }";
    let mut bench = Bench::start("test-probe", 1, settings);
    bench.pipeline = bench.pipeline.replace(
        "url = \"memory:\"",
        &format!("url = \"redis://127.0.0.1:{}\"", proxy.port),
    );
    bench.restart();
    bench.host.ready();
    proxy.stall(true);
    let set = json!({ "do": "redis", "store": "cache", "call": "set", "key": format!("p:{}", unique("k")), "value": "v" });
    bench.send(&[set]).await;
    bench.not_ready(&["store cache", "no answer"]);
    assert!(waiting(&bench, "store"));
    proxy.stall(false);
    bench.log.wait_committed(&bench.group, &bench.input);
    bench.host.ready();
    let dead = bench.log.read(&format!("{}.dlq", bench.input));
    assert_eq!(dead, [], "no message pays for it");
}

/// A stage on Kafka's listener that asks who it is, between two topics of its own.
struct Guarded {
    bench: Bench,
}

impl Guarded {
    fn start(delivery: &str) -> Self {
        let mut bench = Bench::start("test-probe", 1, &format!("delivery = \"{delivery}\""));
        let (plain, guarded) = (server("KAFKA_BROKERS"), server("KAFKA_SASL_BROKERS"));
        let (authority, password) = (server("KAFKA_CA_FILE"), server("KAFKA_SASL_PASSWORD"));
        let properties = format!(
            r#"brokers = "{guarded}"
            properties."security.protocol" = "sasl_ssl"
            properties."sasl.mechanism" = "PLAIN"
            properties."sasl.username" = "stagehost"
            properties."sasl.password" = "{password}"
            properties."ssl.ca.location" = "{authority}""#
        );
        bench.pipeline = (bench.pipeline).replace(&format!("brokers = \"{plain}\""), &properties);
        bench.restart();
        bench.host.ready();
        Self { bench }
    }
}

/// A permission is taken away, which is said and costs nothing, and given back, and the stage goes on.
async fn check_revoked(delivery: &str, kind: &str, operation: &str, words: &str) {
    let guarded = Guarded::start(delivery);
    let bench = &guarded.bench;
    let emit = json!({ "do": "emit", "topic": bench.output, "value": 1 });
    bench.deliver(std::slice::from_ref(&emit)).await;
    let name = match (kind, operation) {
        ("--group", _) => bench.group.clone(),
        (_, "Write") => bench.output.clone(),
        _ => bench.input.clone(),
    };
    let deny = [
        kind,
        &name,
        "--operation",
        operation,
        "--deny-principal",
        "User:stagehost",
    ];
    acl(&[&["--add"][..], &deny].concat());
    bench.send(std::slice::from_ref(&emit)).await;
    let said = bench.not_ready(&["Kafka user lacks", words]);
    said_in_log(bench, words);
    assert!(operation != "Write" || waiting(bench, "log"));
    assert!(said.contains(&name) || operation != "Write", "{said}");
    acl(&[&["--remove", "--force"][..], &deny].concat());
    bench.log.wait_committed(&bench.group, &bench.input);
    bench.host.ready();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let outputs = bench.log.read(&bench.output).len();
    // What its group lets go of before it is committed is delivered at least once.
    let is_once = outputs == 2 || (delivery == "at-least-once" && outputs > 2);
    assert!(is_once, "{delivery}: {outputs} outputs of 2 messages");
    let dead = bench.log.read(&format!("{}.dlq", bench.input));
    assert_eq!(dead, [], "{delivery}: no message pays for it");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_output_that_may_not_be_written_any_more_holds_its_lane() {
    check_revoked("transactional", "--topic", "Write", "WRITE on outputs").await;
    check_revoked("at-least-once", "--topic", "Write", "WRITE on outputs").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_may_not_be_read_any_more_is_said() {
    check_revoked("transactional", "--topic", "Read", "READ on inputs").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_may_not_be_joined_any_more_is_said() {
    check_revoked(
        "at-least-once",
        "--group",
        "Read",
        "READ on the consumer group",
    )
    .await;
}
