//! What becomes of a message: outputs, retries, dead letters and limits, on Apache Kafka.

use host::capability::sql::Database;
use host::pipeline::SqlUrl;
use serde_json::{Value, json};

use crate::bench::{Bench, Proxy};
use crate::support::{Host, Log, component, get, server, unique};

/// One message between two good ones: what the stage emits, and the dead letter's cause, count and words.
async fn check(message: Value, dead_letter: Option<(&str, &str, &str)>) {
    let bench = Bench::start(
        "test-probe",
        1,
        "limits = { memory = \"32MiB\", deadline = \"1s\" }",
    );
    let emit = |n: u32| json!({ "do": "emit", "topic": bench.output, "value": n });
    let (outputs, dead) = bench.deliver(&[emit(1), message.clone(), emit(2)]).await;
    let values: Vec<_> = outputs.iter().map(|o| o.value.as_deref()).collect();
    assert_eq!(
        values,
        [Some("1"), Some("2")],
        "the partition goes on, in order"
    );
    let Some((cause, count, words)) = dead_letter else {
        assert_eq!(dead, [], "no dead letters");
        return;
    };
    assert_eq!(dead.len(), 1, "one dead letter");
    let letter = &dead[0];
    assert_eq!(letter.key.as_deref(), Some("k"));
    assert_eq!(
        letter.value,
        Some(message.to_string()),
        "the original bytes"
    );
    let expected = [
        ("__dlq.errors.topic", bench.input.as_str()),
        ("__dlq.errors.partition", "0"),
        ("__dlq.errors.offset", "1"),
        ("__dlq.errors.group", bench.group.as_str()),
        ("__dlq.errors.delivery.count", count),
        ("stagehost-stage", "probe"),
        ("stagehost-cause", cause),
    ];
    for (name, value) in expected {
        assert_eq!(letter.header(name), Some(value), "header {name}");
    }
    let said = letter.header("__dlq.errors.message").unwrap_or_default();
    assert!(said.contains(words), "{said:?} says {words:?}");
    let hash = letter.header("stagehost-component").unwrap_or_default();
    assert_eq!(hash.len(), 64, "a SHA-256 in hex");
    let counted = bench.metric(&format!(
        "stagehost_dead_letters_total{{stage=\"probe\",cause=\"{cause}\"}}"
    ));
    assert_eq!(counted.as_deref(), Some("1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_message_is_done() {
    check(json!({ "do": "ok" }), None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_succeeds_in_the_end() {
    check(json!({ "do": "retry-until", "n": 3 }), None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_are_exhausted() {
    check(
        json!({ "do": "retry" }),
        Some(("retries-exhausted", "3", "as told")),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_message_is_not_tried_again() {
    check(json!({ "do": "reject" }), Some(("reject", "1", "as told"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_json_is_rejected_with_its_place() {
    check(json!("no command"), Some(("reject", "1", "line 1"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trap_costs_one_message() {
    // The panic's own words.
    check(json!({ "do": "trap" }), Some(("trap", "1", "as told"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stack_overflow_costs_one_message() {
    check(
        json!({ "do": "overflow" }),
        Some(("stack", "1", "stack is full")),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leaving_the_process_costs_one_message() {
    for code in [0, 1, 7] {
        let words = format!("exit code {}", code.min(1));
        check(
            json!({ "do": "exit", "code": code }),
            Some(("exit", "1", &words)),
        )
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn handles_that_are_never_closed_meet_a_limit() {
    check(
        json!({ "do": "leak-handles", "store": "cache" }),
        Some(("limit", "1", "limit of the stage's sandbox")),
    )
    .await;
}

/// An instance that is made later than the first one may fail before it is called.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_cannot_begin_is_put_down_to_what_it_did() {
    for (start, cause) in [
        ("spin", "deadline"),
        ("trap", "trap"),
        ("overflow", "stack"),
        ("exit", "exit"),
        ("eat-memory", "memory"),
    ] {
        let settings = format!(
            "instances = \"fresh\"\nconfig = {{ start = \"{start}\" }}\n\
             limits = {{ memory = \"32MiB\", deadline = \"1s\" }}"
        );
        let bench = Bench::start("test-starts", 1, &settings);
        let (_, dead) = bench.deliver(&[json!(null)]).await;
        assert_eq!(dead.len(), 1, "{start}");
        assert_eq!(dead[0].header("stagehost-cause"), Some(cause), "{start}");
        let count = dead[0].header("__dlq.errors.delivery.count");
        assert_eq!(count, Some("1"), "{start}");
    }
}

/// The database is there, and answers others: the statement takes too long, and it is the message that pays.
#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_takes_too_long_is_counted_and_named() {
    let plain = server("DATABASE_URL");
    // The server gives up on it before its call is out of time.
    let hasty = format!("{plain}?options=-c%20statement_timeout%3D200ms");
    for delivery in ["at-least-once", "transactional"] {
        for database in [&plain, &hasty] {
            let settings = format!("limits = {{ deadline = \"1s\" }}\ndelivery = \"{delivery}\"");
            let bench = Bench::with("test-probe", 1, &settings, database, "");
            let slow = json!({ "do": "sql", "store": "db", "statement": "SELECT pg_sleep(60)" });
            let (_, dead) = bench.deliver(&[slow]).await;
            assert_eq!(dead.len(), 1, "{delivery}");
            let cause = dead[0].header("stagehost-cause");
            assert_eq!(cause, Some("deadline"), "{delivery}");
            let count = dead[0].header("__dlq.errors.delivery.count");
            assert_eq!(count, Some("3"), "{delivery}: as the policy has it");
            let admin = bench.host.address("admin");
            assert_eq!(get(&admin, "/readyz").0, 200, "{delivery}");
        }
    }
}

/// Other idle instances may be as old as the one that failed.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_trapped_on_a_used_instance_is_made_again_once_on_a_new_one() {
    for delivery in ["at-least-once", "transactional"] {
        let settings = format!("delivery = \"{delivery}\"");
        let bench = Bench::start("test-probe", 6, &settings);
        let sleep = json!({ "do": "sleep", "ms": 300 }).to_string();
        let keys: Vec<_> = (0..40).map(|key| key.to_string()).collect();
        let records: Vec<_> = (keys.iter())
            .map(|key| (Some(key.as_str()), sleep.as_str()))
            .collect();
        // Several at one time, so that there are as many used instances.
        bench.log.produce(&bench.input, &records).await;
        bench.log.wait_committed(&bench.group, &bench.input);
        let calls = || bench.metric("stagehost_invocation_seconds_count{stage=\"probe\"}");
        let repeated = || bench.metric("stagehost_calls_repeated_total{stage=\"probe\"}");
        let number = |text: Option<String>| text.and_then(|text| text.parse::<u64>().ok());
        assert_eq!(number(repeated()), Some(0));
        let before = number(calls()).expect("a number");
        let statement = json!({ "do": "sql", "store": "db", "statement": "SELECT 1" });
        let steps = json!([statement, { "do": "trap-if-used" }]);
        let used = json!({ "do": "steps", "steps": steps });
        let (_, dead) = bench.deliver(&[used]).await;
        assert_eq!(dead, [], "{delivery}: a new instance can do it");
        assert_eq!(number(repeated()), Some(1), "{delivery}");
        // At least once it is a part of the same delivery.
        let made = number(calls()).expect("a number") - before;
        let expected = if delivery == "transactional" { 2 } else { 1 };
        assert_eq!(made, expected, "{delivery}");
    }
}

/// What is of no use to anybody at full length.
#[tokio::test(flavor = "multi_thread")]
async fn a_fault_may_have_few_words_only() {
    let bench = Bench::start("test-probe", 1, "");
    let (_, dead) = bench
        .deliver(&[json!({ "do": "retry-at-length", "bytes": 3_000_000 })])
        .await;
    assert_eq!(dead.len(), 1);
    let words = dead[0].header("__dlq.errors.message").unwrap_or_default();
    assert!(words.len() < 10_000, "{} bytes", words.len());
    assert!(bench.host.log().len() < 50_000);
}

/// Where Python says what was wrong: behind as many lines as there were calls.
#[tokio::test(flavor = "multi_thread")]
async fn the_words_of_a_trap_have_the_end_of_stderr_too() {
    let frames = (1..=40).map(|line| format!("  File \"app.py\", line {line}, in handle"));
    let lines: Vec<String> = std::iter::once("Traceback (most recent call last):".to_owned())
        .chain(frames)
        .chain(["ValueError: no such title".to_owned()])
        .collect();
    let bench = Bench::start("test-probe", 1, "");
    let command = json!({ "do": "trap-after", "lines": lines });
    let (_, dead) = bench.deliver(&[command]).await;
    assert_eq!(dead[0].header("stagehost-cause"), Some("trap"));
    let words = dead[0].header("__dlq.errors.message").unwrap_or_default();
    assert!(
        words.contains("Traceback (most recent call last): File"),
        "{words}"
    );
    assert!(words.contains(" … "), "{words}");
    assert!(
        words.ends_with("line 40, in handle ValueError: no such title"),
        "{words}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_loop_meets_the_deadline() {
    check(
        json!({ "do": "spin" }),
        Some(("deadline", "1", "deadline of 1s")),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sleeping_in_the_host_meets_the_deadline() {
    check(
        json!({ "do": "sleep", "ms": 60_000 }),
        Some(("deadline", "1", "deadline of 1s")),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn eating_memory_meets_the_limit() {
    check(
        json!({ "do": "eat-memory" }),
        Some(("memory", "1", "memory limit")),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_below_the_limit_is_fine() {
    check(json!({ "do": "eat-memory", "mib": 16 }), None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn emitting_without_a_grant_is_denied() {
    check(
        json!({ "do": "emit", "topic": "not.granted" }),
        Some(("denied", "1", "not.granted")),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_outside_the_prefix_is_denied() {
    check(
        json!({ "do": "redis", "store": "cache", "call": "get", "key": "other:1" }),
        Some(("denied", "1", "p:")),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_over_the_limit_is_too_large() {
    let bench = Bench::start("test-probe", 1, "");
    let huge = json!({ "do": "emit-huge", "topic": bench.output, "bytes": 3_000_000 });
    let (outputs, dead) = bench.deliver(&[huge]).await;
    assert_eq!(outputs, []);
    assert_eq!(dead.len(), 1);
    assert_eq!(dead[0].header("stagehost-cause"), Some("reject"));
}

/// The guest asserts each of these from inside; a panic would be a dead letter.
#[tokio::test(flavor = "multi_thread")]
async fn the_sandbox_holds_and_its_capabilities_work() {
    let bench = Bench::start("test-probe", 1, "config = { greeting = \"Hello\" }");
    // Its grant is for rows.
    let file = bench.host.folder().path().join("db.sqlite");
    let database = Database::connect(&SqlUrl::Sqlite(file), None, 1, None).await;
    let database = database.expect("the file");
    let table = "CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT)";
    database.execute(table, &[]).await.expect("a table");
    let sql = |statement: &str, params: Value, execute: bool| json!({ "do": "sql", "store": "db", "statement": statement, "params": params, "execute": execute });
    let messages = [
        json!({ "do": "env" }),
        json!({ "do": "fs" }),
        json!({ "do": "net" }),
        json!({ "do": "clock" }),
        json!({ "do": "random" }),
        json!({ "do": "config", "key": "greeting", "expect": { "ok": "Hello" } }),
        json!({ "do": "config", "key": "other", "expect": { "ok": null } }),
        json!({ "do": "log", "message": "a message of the guest" }),
        json!({ "do": "print", "message": "a line of the guest" }),
        sql("INSERT INTO t VALUES ($1, $2)", json!([7, "seven"]), true),
        json!({ "do": "sql", "store": "db", "statement": "SELECT name FROM t WHERE id = $1", "params": [7],
                "expect": { "ok": { "columns": ["name"], "rows": [[{ "text": "seven" }]] } } }),
        json!({ "do": "redis", "store": "cache", "call": "set", "key": "p:1", "value": "one" }),
        json!({ "do": "redis", "store": "cache", "call": "get", "key": "p:1", "expect": { "ok": "one" } }),
        json!({ "do": "emit-tombstone", "topic": bench.output }),
        json!({ "do": "describe", "report": bench.output }),
    ];
    let (outputs, dead) = bench.deliver(&messages).await;
    let words: Vec<_> = dead
        .iter()
        .map(|d| (&d.value, d.header("__dlq.errors.message")))
        .collect();
    assert!(words.is_empty(), "dead letters: {words:#?}");
    assert_eq!(outputs.len(), 2);
    assert_eq!(outputs[0].value, None, "a tombstone stays one");
    let described = outputs[1].json();
    assert_eq!(described["attempt"], 1);
    assert_eq!(described["offset"], messages.len() - 1);
    let log = bench.host.log();
    for line in ["a message of the guest", "a line of the guest"] {
        let said = log
            .lines()
            .find(|l| l.contains(line))
            .unwrap_or_else(|| panic!("{line:?} is in the log"));
        assert!(
            said.contains("probe") && said.contains(&bench.input),
            "with its place: {said}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_is_kept_unless_the_pipeline_wants_fresh_ones() {
    for (settings, last) in [("", 3), ("instances = \"fresh\"", 1)] {
        let bench = Bench::start("test-probe", 1, settings);
        let count = json!({ "do": "count", "report": bench.output });
        let (outputs, _) = bench.deliver(&[count.clone(), count.clone(), count]).await;
        assert_eq!(outputs[2].json()["answer"]["ok"], last, "{settings:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bad_ones_of_a_batch_are_found_and_the_rest_is_done_in_order() {
    let bench = Bench::start("test-batch", 1, "");
    let messages: Vec<_> = (0..60)
        .map(|n| match n {
            7 => json!({ "do": "trap" }),
            21 => json!({ "do": "reject" }),
            33 => json!({ "do": "retry-until", "n": 2 }),
            40 => json!({ "do": "short" }),
            n => json!({ "do": "emit", "topic": bench.output, "value": n }),
        })
        .collect();
    let (outputs, dead) = bench.deliver(&messages).await;
    let offsets: Vec<_> = dead
        .iter()
        .filter_map(|d| d.header("__dlq.errors.offset"))
        .collect();
    assert_eq!(offsets, ["7", "21", "40"]);
    let values: Vec<_> = outputs
        .iter()
        .filter_map(|o| o.value.as_deref()?.parse::<i64>().ok())
        .collect();
    let expected: Vec<_> = (0..60).filter(|n| ![7, 21, 33, 40].contains(n)).collect();
    assert_eq!(values, expected);
}

/// An output that the log refuses costs its message, and none of those that were sent with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_output_costs_its_message_alone() {
    let small = "config = { \"max.message.bytes\" = \"2000\" }";
    let bench = Bench::with("test-probe", 1, "", "sqlite:db.sqlite", small);
    let messages: Vec<_> = (0..40)
        .map(|n| match n {
            20 => json!({ "do": "emit-huge", "topic": bench.output, "bytes": 5000 }),
            n => json!({ "do": "emit", "topic": bench.output, "value": "x".repeat(200 + n) }),
        })
        .collect();
    let (outputs, dead) = bench.deliver(&messages).await;
    assert_eq!(outputs.len(), 39);
    assert_eq!(dead.len(), 1);
    assert_eq!(dead[0].header("__dlq.errors.offset"), Some("20"));
    assert_eq!(dead[0].header("stagehost-cause"), Some("reject"));
    let words = dead[0].header("__dlq.errors.message").unwrap_or_default();
    assert!(words.contains("the log refused a record for"), "{words}");
}

/// In a batch call nobody can tell whose output it was: all of the call are put aside, and none is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_output_of_a_batch_call_loses_nothing() {
    let small = "config = { \"max.message.bytes\" = \"2000\" }";
    let settings = "delivery = \"at-least-once\"";
    let bench = Bench::with("test-batch", 1, settings, "sqlite:db.sqlite", small);
    let messages: Vec<_> = (0..9)
        .map(|n| match n {
            4 => json!({ "do": "emit-huge", "topic": bench.output, "bytes": 5000 }),
            n => json!({ "do": "emit", "topic": bench.output, "value": n }),
        })
        .collect();
    let (outputs, dead) = bench.deliver(&messages).await;
    assert_eq!(outputs.len(), 8, "the others were taken");
    let offsets: Vec<_> = dead
        .iter()
        .filter_map(|d| d.header("__dlq.errors.offset"))
        .collect();
    assert!(offsets.contains(&"4"), "{offsets:?}");
}

/// A record grows when it becomes a dead letter.
#[tokio::test(flavor = "multi_thread")]
async fn the_largest_record_has_room_as_a_dead_letter() {
    let bench = Bench::start("test-probe", 1, "");
    let value = "x".repeat(1_048_000);
    bench.log.produce(&bench.input, &[(None, &value)]).await;
    bench.log.wait_committed(&bench.group, &bench.input);
    let dead = bench.log.read(&format!("{}.dlq", bench.input));
    assert_eq!(dead.len(), 1);
    assert_eq!(dead[0].value.as_ref().map(String::len), Some(value.len()));
}

/// A store that hangs is waited for, and costs no message; then it goes on where it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_does_not_answer_is_waited_for() {
    let database = url::Url::parse(&server("DATABASE_URL")).expect("a URL");
    let port = database.port().expect("a port");
    for delivery in ["at-least-once", "transactional"] {
        let proxy = Proxy::start(port);
        let mut through = database.clone();
        through.set_port(Some(proxy.port)).expect("a port");
        let settings = format!("limits = {{ deadline = \"1s\" }}\ndelivery = \"{delivery}\"");
        let bench = Bench::with("test-probe", 1, &settings, through.as_str(), "");
        let select = json!({ "do": "sql", "store": "db", "statement": "SELECT 1" });
        let (_, dead) = bench.deliver(std::slice::from_ref(&select)).await;
        assert_eq!(dead, [], "it answers at first");
        proxy.stall(true);
        bench.send(&[select]).await;
        let admin = bench.host.address("admin");
        bench.host.wait_for("the breaker", || {
            let (status, why) = get(&admin, "/readyz");
            (status == 503 && why.contains("store db: ")).then_some(())
        });
        let open = "stagehost_circuit_open{store=\"db\"}";
        assert_eq!(bench.metric(open).as_deref(), Some("1"));
        proxy.stall(false);
        bench.log.wait_committed(&bench.group, &bench.input);
        let dead = bench.log.read(&format!("{}.dlq", bench.input));
        assert_eq!(dead, [], "{delivery}: no message paid for it");
        bench.host.ready();
        assert_eq!(bench.metric(open).as_deref(), Some("0"));
    }
}

/// More than a partition's buffer holds, so that it is paused and resumed on the way.
#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_is_worked_off_in_order_and_once() {
    let (input, output, group) = (unique("in"), unique("out"), unique("group"));
    let (brokers, component) = (server("KAFKA_BROKERS"), component("test-echo"));
    let pipeline = format!(
        r#"
        name = "backlog"
        kafka.brokers = "{brokers}"
        topics."{input}".partitions = 4
        topics."{output}".partitions = 4
        admin.listen = "127.0.0.1:0"
        [stages.echo]
        component = "{component}"
        input = ["{input}"]
        group = "{group}"
        output = ["{output}"]
        config = {{ to = "{output}" }}
        "#
    );
    // Once, to have the topics; the backlog grows while nobody reads.
    assert!(Host::start(&pipeline).stop().0.success());
    let log = Log::new(&brokers);
    let keys: Vec<_> = (0..100).map(|k| format!("key-{k}")).collect();
    let values: Vec<_> = (0..120_000).map(|n| n.to_string()).collect();
    let records: Vec<_> = values
        .iter()
        .enumerate()
        .map(|(n, value)| (Some(keys[n % keys.len()].as_str()), value.as_str()))
        .collect();
    log.produce(&input, &records).await;
    let host = Host::start(&pipeline);
    log.wait_committed(&group, &input);
    let mut last = std::collections::HashMap::new();
    let seen = log.read(&output);
    assert_eq!(seen.len(), values.len());
    for record in seen {
        let n: i64 = record
            .value
            .as_deref()
            .unwrap_or_default()
            .parse()
            .expect("a number");
        let before = last.insert(record.key.clone(), n);
        assert!(
            before < Some(n),
            "key {:?}: {n} after {before:?}",
            record.key
        );
    }
    let (status, log) = host.stop();
    assert!(status.success(), "{log}");
}
