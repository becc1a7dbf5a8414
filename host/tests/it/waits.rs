//! What lanes wait for is said: on `/readyz`, in the log and in the metrics, with the cause that a person can mend.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::json;

use crate::bench::{Bench, Proxy};
use crate::support::{
    Host, Seen, acl, get, http, kafka_configs, server, transactional_producer, unique,
};

fn waiting(bench: &Bench, what: &str) -> bool {
    let line = format!("stagehost_lanes_waiting{{stage=\"probe\",for=\"{what}\"}}");
    bench.metric(&line).as_deref() == Some("1")
}

pub(crate) fn said_in_log(bench: &Bench, words: &str) {
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
pub(crate) struct Guarded {
    pub(crate) bench: Bench,
}

impl Guarded {
    fn start(delivery: &str) -> Self {
        Self::with(delivery, 1, "")
    }

    /// With so many partitions, and these properties of librdkafka's.
    pub(crate) fn with(delivery: &str, partitions: u32, more: &str) -> Self {
        let settings = format!("delivery = \"{delivery}\"");
        let mut bench = Bench::start("test-probe", partitions, &settings);
        let (plain, guarded) = (server("KAFKA_BROKERS"), server("KAFKA_SASL_BROKERS"));
        let (authority, password) = (server("KAFKA_CA_FILE"), server("KAFKA_SASL_PASSWORD"));
        let properties = format!(
            r#"brokers = "{guarded}"
            properties."security.protocol" = "sasl_ssl"
            properties."sasl.mechanism" = "PLAIN"
            properties."sasl.username" = "stagehost"
            properties."sasl.password" = "{password}"
            properties."ssl.ca.location" = "{authority}"
            {more}"#
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
    let seen = bench.log.read(&bench.output);
    // Who may not read loses its partition in the middle of a call: what a transactional lane then sends again has the same id.
    let id = |seen: &Seen| seen.header("stagehost-id").map(str::to_owned);
    let outputs = match (delivery, operation) {
        ("transactional", "Read") => seen.iter().map(id).collect::<BTreeSet<_>>().len(),
        _ => seen.len(),
    };
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
    check_revoked("at-least-once", "--topic", "Read", "READ on inputs").await;
}

/// Posts a number by a route, until the answer has this status.
fn post_until(host: &Host, numbers: &mut impl Iterator<Item = u32>, wanted: u16) -> Vec<u32> {
    let form = "content-type: application/x-www-form-urlencoded";
    let head = format!("POST /post HTTP/1.1\r\n{form}");
    let mut taken = Vec::new();
    host.wait_for(&format!("a post to be answered {wanted}"), || {
        let n = numbers.next().expect("a number");
        let (status, _, said) = http(&host.address("HTTP"), &head, &format!("n={n}"));
        match status {
            202 => taken.push(n),
            _ => assert_eq!((status, said.contains("the log")), (503, true), "{said}"),
        }
        (status == wanted).then_some(())
    });
    taken
}

/// No stage writes to it, so no lane waits for it. Where one right is denied, Kafka gives those only that it is told of.
async fn check_revoked_from_a_route(may_see: bool) {
    let mut guarded = Guarded::start("at-least-once");
    let bench = &mut guarded.bench;
    let posts = unique("posts");
    bench.pipeline += &format!(
        r#"
        [topics."{posts}"]
        [http]
        listen = "127.0.0.1:0"
        [[http.routes]]
        path = "/post"
        method = "POST"
        produce = {{ topic = "{posts}", fields = ["n"] }}
        "#
    );
    bench.host.signal(libc::SIGTERM);
    bench.host.wait_for_end();
    bench.restart();
    bench.host.ready();
    let mut numbers = 0..;
    let mut taken = post_until(&bench.host, &mut numbers, 202);
    let right = |operation, whose| ["--topic", &posts, "--operation", operation, whose];
    let mut rights = vec![right("Write", "--deny-principal")];
    if may_see {
        rights.insert(0, right("Describe", "--allow-principal"));
    }
    let change = |how: &[&str]| {
        for right in &rights {
            acl(&[how, right, &["User:stagehost"]].concat());
        }
    };
    change(&["--add"]);
    taken.extend(post_until(&bench.host, &mut numbers, 503));
    let metric = "stagehost_http_requests_total{route=\"/post\",method=\"POST\",status=\"503\"}";
    let refused = bench.metric(metric).and_then(|count| count.parse().ok());
    assert!(refused.is_some_and(|count: u32| count >= 1), "{refused:?}");
    let lacks = if may_see { "WRITE" } else { "DESCRIBE" };
    bench.not_ready(&["Kafka user lacks", lacks, &posts]);
    bench.host.wait_for("the log to say so", || {
        let log = bench.host.log();
        let says = |line: &str| {
            line.contains("Kafka user lacks") && line.contains(lacks) && line.contains(&posts)
        };
        log.lines().any(says).then_some(())
    });
    // Stages go on.
    let emit = json!({ "do": "emit", "topic": bench.output, "value": 1 });
    assert_eq!(bench.deliver(&[emit]).await.0.len(), 1);
    change(&["--remove", "--force"]);
    taken.extend(post_until(&bench.host, &mut numbers, 202));
    bench.host.ready();
    let there = bench.log.read(&posts).into_iter();
    let there = there.map(|seen| seen.json()["n"].as_str().expect("a number").to_owned());
    let taken: Vec<_> = taken.iter().map(u32::to_string).collect();
    assert_eq!(there.collect::<Vec<_>>(), taken, "what was answered 202");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_of_a_route_that_may_not_be_seen_any_more_is_said_and_posts_come_back() {
    check_revoked_from_a_route(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_of_a_route_that_may_not_be_written_any_more_is_said_and_posts_come_back() {
    check_revoked_from_a_route(true).await;
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

/// The broker answers at once, and takes the next request when the time is over that it has told.
#[tokio::test(flavor = "multi_thread")]
async fn a_quota_that_is_used_up_is_named() {
    let client = unique("client");
    let property = format!("properties.\"client.id\" = \"{client}\"");
    let guarded = Guarded::with("at-least-once", 1, &property);
    let bench = &guarded.bench;
    let quota = |change: [&str; 2]| {
        let entity = [
            "--alter",
            "--entity-type",
            "clients",
            "--entity-name",
            &client,
        ];
        kafka_configs(&[&entity[..], &change].concat());
    };
    quota(["--add-config", "consumer_byte_rate=2000"]);
    let large = json!({ "do": "emit", "topic": bench.output, "value": "x".repeat(60_000) });
    for _ in 0..3 {
        bench.send(std::slice::from_ref(&large)).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    bench.not_ready(&["its leader, broker", "quota", "consumer_byte_rate"]);
    said_in_log(bench, "consumer_byte_rate");
    quota(["--delete-config", "consumer_byte_rate"]);
    bench.log.wait_committed(&bench.group, &bench.input);
    bench.host.ready();
    assert_eq!(bench.log.read(&bench.output).len(), 3);
}

/// What is behind it is kept back from who reads what is committed: for good, if its program is gone and its time is long.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_another_program_that_stays_open_is_named() {
    use rdkafka::producer::{BaseRecord, Producer};

    let bench = Bench::start("test-probe", 1, "");
    let emit = json!({ "do": "emit", "topic": bench.output, "value": 1 });
    bench.deliver(std::slice::from_ref(&emit)).await;
    let time = Duration::from_secs(10);
    let other = transactional_producer();
    other.begin_transaction().expect("begun");
    let value = emit.to_string();
    let record = BaseRecord::<str, str>::to(&bench.input)
        .key("k")
        .payload(&value);
    other
        .send(record)
        .map_err(|(error, _)| error)
        .expect("room");
    other.flush(time).expect("sent");
    bench.send(std::slice::from_ref(&emit)).await;
    bench.not_ready(&["a transaction of another program is open at offset 1"]);
    said_in_log(&bench, "a transaction of another program is open");
    assert_eq!(bench.log.read(&bench.output).len(), 1);
    other.commit_transaction(time).expect("committed");
    bench.log.wait_committed(&bench.group, &bench.input);
    bench.host.ready();
    assert_eq!(bench.log.read(&bench.output).len(), 3);
}

/// A right that is missing at the start is said, and waited for.
async fn check_missing_at_the_start(kind: &str, operation: &str, words: &str) {
    let mut guarded = Guarded::start("transactional");
    let bench = &mut guarded.bench;
    let emit = json!({ "do": "emit", "topic": bench.output, "value": 1 });
    bench.deliver(std::slice::from_ref(&emit)).await;
    let name = match kind {
        "--group" => bench.group.clone(),
        _ => bench.input.clone(),
    };
    let right = |whose: &str, operation: &str| {
        let right = [
            kind,
            &name,
            "--operation",
            operation,
            whose,
            "User:stagehost",
        ];
        right.map(str::to_owned)
    };
    let change = |how: &[&str], right: &[String]| {
        let right: Vec<_> = right.iter().map(String::as_str).collect();
        acl(&[how, &right].concat());
    };
    // Where one right is denied, Kafka gives those only that it is told of.
    let seen = (operation == "Read").then(|| right("--allow-principal", "Describe"));
    let denied = right("--deny-principal", operation);
    for right in seen.iter().chain([&denied]) {
        change(&["--add"], right);
    }
    bench.host.signal(libc::SIGTERM);
    bench.host.wait_for_end();
    bench.restart();
    said_in_log(bench, words);
    let admin = bench.host.admin_of_a_start();
    bench.host.wait_for("readiness to name it", || {
        let (status, said) = get(&admin, "/readyz");
        (status == 503 && said.contains(words) && said.contains(&name)).then_some(())
    });
    for right in seen.iter().chain([&denied]) {
        change(&["--remove", "--force"], right);
    }
    bench.host.ready();
    let (outputs, dead) = bench.deliver(std::slice::from_ref(&emit)).await;
    assert_eq!((outputs.len(), dead.len()), (2, 0));
}

/// A topic that may not be seen is not there, for all that the host can tell: at the start it waits, and names both.
#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_may_not_be_seen_at_the_start_is_said_and_waited_for() {
    check_missing_at_the_start("--topic", "Describe", "lacks DESCRIBE").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_may_not_be_read_at_the_start_is_said_and_waited_for() {
    check_missing_at_the_start("--topic", "Read", "READ on inputs").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_may_not_be_joined_at_the_start_is_said_and_waited_for() {
    check_missing_at_the_start("--group", "Read", "READ on the consumer group").await;
}

/// A letter is one more output.
#[tokio::test(flavor = "multi_thread")]
async fn letters_that_may_not_be_written_any_more_hold_their_lane() {
    for delivery in ["transactional", "at-least-once"] {
        let guarded = Guarded::start(delivery);
        let bench = &guarded.bench;
        let reject = json!({ "do": "reject", "value": "no" });
        bench.deliver(std::slice::from_ref(&reject)).await;
        let letters = format!("{}.dlq", bench.input);
        let right = ["--topic", letters.as_str(), "--operation", "Write"];
        let deny = [&right[..], &["--deny-principal", "User:stagehost"]].concat();
        acl(&[&["--add"][..], &deny].concat());
        bench.send(std::slice::from_ref(&reject)).await;
        let said = bench.not_ready(&["Kafka user lacks", "WRITE on outputs"]);
        assert!(said.contains(&letters), "{delivery}: {said}");
        assert!(waiting(bench, "log"), "{delivery}");
        acl(&[&["--remove", "--force"][..], &deny].concat());
        bench.log.wait_committed(&bench.group, &bench.input);
        bench.host.ready();
        assert_eq!(bench.log.read(&letters).len(), 2, "{delivery}");
    }
}

/// By its name, Kafka tells who may not see a topic from who asks for none.
#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_is_not_declared_and_may_not_be_seen_at_the_start_is_waited_for() {
    let mut guarded = Guarded::start("transactional");
    let bench = &mut guarded.bench;
    let emit = json!({ "do": "emit", "topic": bench.output, "value": 1 });
    bench.deliver(std::slice::from_ref(&emit)).await;
    let declared = format!("[topics.\"{}\"]", bench.input);
    // What is there may be what was meant.
    let other = format!("[topics.\"{}x\"]", bench.input);
    assert!(bench.pipeline.contains(&declared));
    bench.pipeline = bench.pipeline.replace(&declared, &other);
    let input = bench.input.clone();
    let deny = [
        "--topic",
        &input,
        "--operation",
        "Describe",
        "--deny-principal",
        "User:stagehost",
    ];
    acl(&[&["--add"][..], &deny].concat());
    bench.host.signal(libc::SIGTERM);
    bench.host.wait_for_end();
    bench.restart();
    let lacks = format!("lacks DESCRIBE on topic `{}` of stage `probe`", bench.input);
    said_in_log(bench, &lacks);
    let admin = bench.host.admin_of_a_start();
    bench.host.wait_for("readiness to name it", || {
        let (status, said) = get(&admin, "/readyz");
        let near = format!("did you mean `{}x`?", bench.input);
        (status == 503 && said.contains(&lacks) && said.contains(&near)).then_some(())
    });
    let made = format!("{}x", bench.input);
    assert!(!bench.log.topics().contains(&made), "nothing is made yet");
    acl(&[&["--remove", "--force"][..], &deny].concat());
    bench.host.ready();
    bench.deliver(std::slice::from_ref(&emit)).await;
    assert_eq!(bench.log.read(&bench.output).len(), 2);
}

/// One that may be seen, were it there, is a slip.
#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_is_not_there_ends_the_start_though_another_may_not_be_seen() {
    let mut guarded = Guarded::start("at-least-once");
    let bench = &mut guarded.bench;
    let output = bench.output.clone();
    let hidden = ["--topic", &output, "--operation", "Describe"];
    let deny = [&hidden[..], &["--deny-principal", "User:stagehost"]].concat();
    acl(&[&["--add"][..], &deny].concat());
    let undeclared = format!("[topics.\"{}\"]", bench.output);
    let pipeline = (bench.pipeline).replace(&undeclared, "[topics.another]");
    let slip = format!("{}s", bench.input);
    let inputs = format!("input = [\"{}\"", bench.input);
    let more = format!("input = [\"{}\", \"{slip}\"", bench.input);
    assert!(pipeline.contains(&inputs) && pipeline.contains("[topics.another]"));
    bench.pipeline = pipeline.replace(&inputs, &more);
    bench.restart();
    bench.host.wait_for_end();
    let log = bench.host.log();
    let says = format!("topic `{slip}` of stage `probe` does not exist: did you mean");
    assert!(log.contains(&says), "{log}");
    assert!(!log.contains("does not exist, or"), "{log}");
    assert!(!bench.log.topics().contains(&"another".to_owned()));
    acl(&[&["--remove", "--force"][..], &deny].concat());
}
