//! Stages that share one SQLite file, and what a hostile one does to the others: nothing. Statement by statement it is
//! seen in `stores::sql`.

use std::time::{Duration, Instant};

use host::capability::sql::{Database, Value as SqlValue};
use host::pipeline::SqlUrl;
use serde_json::{Value, json};

use crate::bench::{Bench, Neighbour};
use crate::support::{get, until};

const DELIVERIES: [&str; 2] = ["transactional", "at-least-once"];

/// The file of a stage that is running, with a table `t`.
async fn file_of(bench: &Bench) -> Database {
    let url = SqlUrl::Sqlite(bench.host.folder().path().join("db.sqlite"));
    let database = Database::connect(&url, None, 2, None).await;
    let database = database.expect("the file");
    let made = database.execute("CREATE TABLE t (n BIGINT)", &[]).await;
    made.expect("a table");
    database
}

async fn count(database: &Database) -> i64 {
    let rows = database.query("SELECT count(*) FROM t", &[]).await;
    match rows.expect("a count").rows[0][0] {
        SqlValue::Int64(count) => count,
        ref other => panic!("{other:?}"),
    }
}

fn sql(statement: &str) -> Value {
    json!({ "do": "sql", "store": "db", "statement": statement, "params": [], "execute": true })
}

/// A statement whose error is reported, and no fault of the message.
fn reported(bench: &Bench, statement: &str) -> Value {
    let mut command = sql(statement);
    command["report"] = json!(bench.output);
    command
}

async fn send(bench: &Bench, key: &str, messages: &[Value]) {
    let values: Vec<_> = messages.iter().map(Value::to_string).collect();
    let records: Vec<_> = values
        .iter()
        .map(|value| (Some(key), value.as_str()))
        .collect();
    bench.log.produce(&bench.input, &records).await;
}

/// However the spinner comes to be called: first in its batch, or behind one whose effects were undone.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_spins_without_statements_holds_up_nobody_on_its_sqlite_file() {
    const DEADLINE: Duration = Duration::from_secs(25);
    let settings = format!(
        "delivery = \"transactional\"\nlimits = {{ deadline = \"{}s\" }}",
        DEADLINE.as_secs()
    );
    let undone =
        json!({ "do": "steps", "steps": [sql("INSERT INTO t VALUES (0)"), { "do": "reject" }] });
    let spin = json!({ "do": "spin" });
    for before in [vec![], vec![undone]] {
        let bench = Bench::start("test-probe", 4, &settings);
        let database = file_of(&bench).await;
        send(&bench, "spinner", &[before, vec![spin.clone()]].concat()).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let start = Instant::now();
        // Those behind it on its partition wait, the others don't.
        for n in 1..=40 {
            send(
                &bench,
                &format!("key {n}"),
                &[sql(&format!("INSERT INTO t VALUES ({n})"))],
            )
            .await;
        }
        let mut seen = 0;
        while seen < 20 && start.elapsed() < DEADLINE - Duration::from_secs(5) {
            tokio::time::sleep(Duration::from_millis(100)).await;
            seen = count(&database).await;
        }
        assert!(seen >= 20, "{seen} after {:?}", start.elapsed());
        database.close().await;
    }
}

/// One that has written and then spins keeps the file until its deadline, and no message of another is lost or given up on.
#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_guest_that_has_written_and_spins_loses_no_message() {
    let settings = "delivery = \"transactional\"\nlimits = { deadline = \"4s\" }";
    let bench = Bench::start("test-probe", 4, settings);
    let database = file_of(&bench).await;
    let hostile =
        json!({ "do": "steps", "steps": [sql("INSERT INTO t VALUES (-1)"), { "do": "spin" }] });
    send(
        &bench,
        "spinner",
        &[hostile.clone(), hostile.clone(), hostile],
    )
    .await;
    for n in 0..40 {
        let insert = sql(&format!("INSERT INTO t VALUES ({n})"));
        let read_first = json!({ "do": "steps", "steps": [sql("SELECT count(*) FROM t"), insert] });
        send(&bench, &format!("key {n}"), &[read_first]).await;
    }
    bench.log.wait_committed(&bench.group, &bench.input);
    assert_eq!(count(&database).await, 40);
    let dead = bench.log.read(&format!("{}.dlq", bench.input));
    assert_eq!(dead.len(), 3, "the spinner's alone");
    database.close().await;
}

/// Rows without an end, of which the first is the last that is asked for.
const ENDLESS: &str =
    "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n";
const CALLS: &str = "stagehost_invocation_seconds_count{stage=\"probe\"}";

/// Of two stages on one file, one does something without an end that has written nothing: the other's messages are done while
/// it is in that call.
#[tokio::test(flavor = "multi_thread")]
async fn a_stage_goes_on_while_another_spins_or_reads_for_ever_on_its_sqlite_file() {
    const MESSAGES: i64 = 50;
    let read = sql("SELECT count(*) FROM t");
    let spin = json!({ "do": "spin" });
    let hostile = [
        spin.clone(),
        json!({ "do": "steps", "steps": [read, spin] }),
        sql(&format!("SELECT ({ENDLESS})")),
    ];
    for delivery in DELIVERIES {
        for hostile in &hostile {
            let neighbour = Neighbour::new();
            let theirs = neighbour.tables(&format!("delivery = \"{delivery}\""));
            // Longer than anybody here waits; a statement has 30 s.
            let settings =
                format!("delivery = \"{delivery}\"\nlimits = {{ deadline = \"1h\" }}\n{theirs}");
            let bench = Bench::start("test-probe", 1, &settings);
            let database = file_of(&bench).await;
            bench.send(&[sql("INSERT INTO t VALUES (0)")]).await;
            until("the first call", || {
                (bench.metric(CALLS).as_deref() == Some("1")).then_some(())
            });
            bench.send(std::slice::from_ref(hostile)).await;
            until("the lane to have no more than the hostile message", || {
                (bench.log.lag(&bench.group, &bench.input) == 1).then_some(())
            });
            let read_first = |n: i64| {
                let insert = sql(&format!("INSERT INTO t VALUES ({n})"));
                json!({ "do": "steps", "steps": [sql("SELECT count(*) FROM t"), insert] })
            };
            let messages: Vec<_> = (1..=MESSAGES).map(read_first).collect();
            neighbour.send(&bench, &messages).await;
            until("the neighbour's messages to be done", || {
                let done = "stagehost_messages_total{stage=\"neighbour\",outcome=\"done\"}";
                (bench.metric(done) == Some(MESSAGES.to_string())).then_some(())
            });
            let calls = bench.metric(CALLS);
            assert_eq!(
                calls.as_deref(),
                Some("1"),
                "{hostile}: it is still in its call"
            );
            neighbour.is_well(&bench);
            assert_eq!(count(&database).await, MESSAGES + 1);
        }
    }
}

/// One that writes for ever keeps the file until its deadline, and one that reads does not: either has that deadline as its
/// cause, wherever it is asked for, and the other stage of the file loses nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_statement_without_end_on_sqlite_is_counted_and_named() {
    const MESSAGES: i64 = 20;
    const GIVEN_UP: &str = "stagehost_dead_letters_total{stage=\"probe\",cause=\"deadline\"}";
    for delivery in DELIVERIES {
        for hostile in [
            format!("SELECT ({ENDLESS})"),
            format!("INSERT INTO t SELECT ({ENDLESS})"),
        ] {
            let neighbour = Neighbour::new();
            let theirs = neighbour.tables(&format!("delivery = \"{delivery}\""));
            let settings =
                format!("delivery = \"{delivery}\"\nlimits = {{ deadline = \"2s\" }}\n{theirs}");
            let bench = Bench::start("test-probe", 1, &settings);
            let database = file_of(&bench).await;
            bench.send(&[sql(&hostile)]).await;
            for n in 1..=MESSAGES {
                let insert = sql(&format!("INSERT INTO t VALUES ({n})"));
                neighbour.send(&bench, &[insert]).await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            bench.log.wait_committed(&bench.group, &bench.input);
            neighbour.is_well(&bench);
            assert_eq!(count(&database).await, MESSAGES, "{delivery} {hostile}");
            let dead = bench.log.read(&format!("{}.dlq", bench.input));
            assert_eq!(dead.len(), 1, "{delivery} {hostile}");
            assert_eq!(dead[0].header("stagehost-cause"), Some("deadline"));
            let deliveries = dead[0].header("__dlq.errors.delivery.count");
            assert_eq!(deliveries, Some("3"), "{delivery} {hostile}");
            let words = dead[0].header("__dlq.errors.message").unwrap_or_default();
            assert!(
                words.contains("deadline of 2s"),
                "{delivery} {hostile}: {words}"
            );
            assert_eq!(bench.metric(GIVEN_UP).as_deref(), Some("1"), "{hostile}");
            let log = bench.host.log();
            let said = log.lines().find(|line| line.contains("given up on"));
            let said = said.unwrap_or_else(|| panic!("nothing is said of it: {log}"));
            assert!(said.contains("cause=\"deadline\""), "{said}");
            assert_eq!(get(&bench.host.address("admin"), "/readyz").0, 200);
            let (_, dead) = bench.deliver(&[sql("INSERT INTO t VALUES (0)")]).await;
            assert_eq!(dead.len(), 1, "{delivery} {hostile}: the lane goes on");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_with_greedy_statements_costs_the_host_little_memory() {
    for delivery in DELIVERIES {
        let settings = format!("delivery = \"{delivery}\"\nlimits = {{ deadline = \"2s\" }}");
        let bench = Bench::start("test-probe", 1, &settings);
        let database = file_of(&bench).await;
        let before = bench.host.peak_mib();
        let many = |expression: &str| format!("SELECT {}", vec![expression; 900].join(", "));
        let endless = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)";
        let greedy = [
            many("zeroblob(16000000)"),
            many("hex(zeroblob(8000000))"),
            many("randomblob(16000000)"),
            format!(
                "{endless} SELECT max(i) FROM (SELECT i, randomblob(1000) AS r FROM n ORDER BY r)"
            ),
            format!("{endless} SELECT group_concat(i) FROM n"),
            format!("{endless} SELECT zeroblob(1000000) FROM n"),
            format!("{endless} SELECT i FROM n"),
            "SELECT instr(hex(zeroblob(8000000)), hex(zeroblob(4000000)) || '1')".to_owned(),
        ];
        let messages: Vec<_> = greedy
            .iter()
            .map(|statement| reported(&bench, statement))
            .collect();
        bench.send(&messages).await;
        bench.send(&[sql("INSERT INTO t VALUES (1)")]).await;
        bench.log.wait_committed(&bench.group, &bench.input);
        assert_eq!(count(&database).await, 1, "{delivery}");
        let more = bench.host.peak_mib().saturating_sub(before);
        assert!(more < 500, "{delivery}: {more} MiB");
        database.close().await;
    }
}

/// The grant is the pipeline's, and what the host writes beside the stage needs none.
#[tokio::test(flavor = "multi_thread")]
async fn a_stage_does_what_its_grant_allows_on_sqlite() {
    for (access, refused) in [
        (
            "read-only",
            vec![
                "INSERT INTO t VALUES (1)",
                "WITH a AS (SELECT 1) DELETE FROM t",
                "DROP TABLE t",
            ],
        ),
        ("data", vec!["DROP TABLE t", "CREATE TABLE u (n BIGINT)"]),
        ("data-definition", vec![]),
    ] {
        let mut bench = Bench::start("test-probe", 1, "delivery = \"transactional\"");
        let database = file_of(&bench).await;
        let granted = format!("sql = {{ db = {{ access = \"{access}\" }} }}");
        bench.pipeline = bench.pipeline.replace("sql = [\"db\"]", &granted);
        bench.restart();
        bench.host.ready();
        let always = [
            "SELECT * FROM stagehost_progress",
            "UPDATE stagehost_progress SET epoch = epoch + 1",
            "PRAGMA journal_mode = OFF",
        ];
        let statements = [refused, always.to_vec()].concat();
        let messages: Vec<_> = statements
            .iter()
            .map(|statement| reported(&bench, statement))
            .collect();
        let (outputs, dead) = bench.deliver(&messages).await;
        assert_eq!(dead, [], "{access}");
        assert_eq!(outputs.len(), statements.len(), "{access}");
        for (statement, output) in statements.iter().zip(&outputs) {
            let said = output.value.as_deref().unwrap_or_default();
            assert!(said.contains("0A000"), "{statement}: {said}");
        }
        let allowed = match access {
            "read-only" => "SELECT n FROM t",
            "data" => "INSERT INTO t VALUES (1)",
            _ => "CREATE TABLE u (n BIGINT)",
        };
        let (_, dead) = bench.deliver(&[sql(allowed)]).await;
        assert_eq!(dead, [], "{access}");
        // Nobody has laid hands on its row.
        until("the stage to be ready", || {
            (bench
                .metric("stagehost_lanes_stopped{stage=\"probe\"}")
                .as_deref()
                == Some("0"))
            .then_some(())
        });
        database.close().await;
    }
}
