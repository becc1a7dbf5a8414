//! Exactly-once effects: the stage's database, its outputs and its progress together, on Apache Kafka with PostgreSQL
//! and SQLite. What faults of servers and hosts do to it is the suite `faults`.

use std::time::Duration;

use host::capability::sql::{Database, Value as SqlValue};
use host::pipeline::SqlUrl;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, Connection};

use crate::bench::{Bench, Neighbour};
use crate::support::{Log, Seen, get, server, unique, until};

/// A stage on a database with a table of its own that takes anything any number of times.
struct Table {
    bench: Bench,
    database: Database,
    url: SqlUrl,
    name: String,
}

const SQLITE: &str = "sqlite:db.sqlite";

impl Table {
    async fn start(kind: &str, guest: &str, settings: &str) -> Self {
        let postgres = server("DATABASE_URL");
        let url = if kind == SQLITE { SQLITE } else { &postgres };
        let bench = Bench::with(guest, 1, settings, url, "");
        let url = match kind {
            SQLITE => SqlUrl::Sqlite(bench.host.folder().path().join("db.sqlite")),
            _ => SqlUrl::Postgres(postgres),
        };
        let database = Database::connect(&url, None, 2, None)
            .await
            .expect("the database");
        let name = unique("t").replace('-', "_");
        let table = Self {
            bench,
            database,
            url,
            name,
        };
        table
            .run(&format!("CREATE TABLE {} (n BIGINT)", table.name))
            .await;
        table
            .run(&format!(
                "CREATE TABLE {}_unique (n BIGINT UNIQUE)",
                table.name
            ))
            .await;
        table
    }

    async fn run(&self, statement: &str) {
        let done = self.database.execute(statement, &[]).await;
        done.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }

    /// A command that inserts a number.
    fn insert(&self, n: i64) -> Value {
        let statement = format!("INSERT INTO {} VALUES ($1)", self.name);
        json!({ "do": "sql", "store": "db", "statement": statement, "params": [n], "execute": true })
    }

    fn emit(&self, n: i64) -> Value {
        json!({ "do": "emit", "topic": self.bench.output, "value": n })
    }

    /// Inserts a number, emits it, and then this.
    fn message(&self, n: i64, then: Value) -> Value {
        json!({ "do": "steps", "steps": [self.insert(n), self.emit(n), then] })
    }

    async fn numbers(&self, statement: &str) -> Vec<i64> {
        let rows = self.database.query(statement, &[]).await;
        let rows = rows
            .unwrap_or_else(|error| panic!("{statement}: {error:?}"))
            .rows;
        rows.into_iter()
            .map(|row| match row.first() {
                Some(SqlValue::Int64(n)) => *n,
                other => panic!("{statement}: {other:?}"),
            })
            .collect()
    }

    async fn rows(&self) -> Vec<i64> {
        self.numbers(&format!("SELECT n FROM {} ORDER BY n", self.name))
            .await
    }

    async fn progress(&self, column: &str) -> i64 {
        let group = &self.bench.group;
        let row = format!(
            "SELECT CAST({column} AS BIGINT) FROM stagehost_progress WHERE consumer_group = '{group}'"
        );
        // Stages, and who goes the same way, do not see it.
        let found = match &self.url {
            SqlUrl::Postgres(url) => {
                let mut connection = sqlx::PgConnection::connect(url).await.expect("a server");
                let found = sqlx::query_scalar(sqlx::AssertSqlSafe(row));
                found.fetch_one(&mut connection).await
            }
            SqlUrl::Sqlite(file) => {
                let options = sqlx::sqlite::SqliteConnectOptions::new().filename(file);
                let mut connection = options.connect().await.expect("the file");
                let found = sqlx::query_scalar(sqlx::AssertSqlSafe(row));
                found.fetch_one(&mut connection).await
            }
        };
        found.expect("one row")
    }

    fn dead(&self) -> Vec<Seen> {
        self.bench.log.read(&format!("{}.dlq", self.bench.input))
    }
}

/// Awaits within a test's plain closure.
fn blocking<T>(work: impl Future<Output = T>) -> T {
    tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(work))
}

fn values(outputs: &[Seen]) -> Vec<i64> {
    let number = |seen: &Seen| seen.value.as_deref()?.parse().ok();
    outputs.iter().filter_map(number).collect()
}

const KINDS: [&str; 2] = [SQLITE, "postgres"];

#[tokio::test(flavor = "multi_thread")]
async fn effects_outputs_and_progress_are_committed_together() {
    for kind in KINDS {
        let table = Table::start(kind, "test-probe", "").await;
        let messages: Vec<_> = (0..300)
            .map(|n| table.message(n, json!({ "do": "ok" })))
            .collect();
        let (outputs, dead) = table.bench.deliver(&messages).await;
        assert_eq!(dead, []);
        assert_eq!(table.rows().await, (0..300).collect::<Vec<_>>());
        assert_eq!(values(&outputs), (0..300).collect::<Vec<_>>());
        let generation = table.progress("generation").await;
        let (group, input) = (&table.bench.group, &table.bench.input);
        for (n, output) in outputs.iter().enumerate() {
            let id = format!("/{group}/{input}/0/{generation}/{n}/0");
            let found = output.header("stagehost-id").unwrap_or_default();
            assert!(found.ends_with(&id), "{found}, and not {id}");
        }
        assert_eq!(table.progress("next_offset").await, 300);
        assert_eq!(table.progress("epoch").await, 1);
        // What the log has is not produced again after a crash of a host that was idle.
        until("the outputs to be taken out of the row", || {
            (blocking(table.progress("length(pending)")) == 0).then_some(())
        });
    }
}

/// Each wrote and emitted before it faulted: nothing of it is left but its dead letter, and the others stay in order.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_faults_leaves_nothing_behind() {
    for guest in ["test-probe", "test-batch"] {
        for kind in KINDS {
            let settings = "limits = { deadline = \"1s\" }";
            let table = Table::start(kind, guest, settings).await;
            let messages: Vec<_> = (0..40)
                .map(|n| match n {
                    7 => table.message(n, json!({ "do": "trap" })),
                    8 => table.message(n, json!({ "do": "spin" })),
                    21 if guest == "test-probe" => table.message(n, json!({ "do": "reject" })),
                    22 => json!({ "do": "reject" }),
                    30 => table.message(n, json!({ "do": "retry" })),
                    33 => table.message(n, json!({ "do": "retry-until", "n": 3 })),
                    n => table.message(n, json!({ "do": "ok" })),
                })
                .collect();
            let (outputs, dead) = table.bench.deliver(&messages).await;
            let mut gone = vec![7, 8, 22, 30];
            if guest == "test-probe" {
                gone.push(21);
            }
            let good: Vec<_> = (0..40).filter(|n| !gone.contains(n)).collect();
            assert_eq!(table.rows().await, good, "{guest} on {kind}");
            assert_eq!(values(&outputs), good, "{guest} on {kind}");
            let mut offsets: Vec<i64> = dead
                .iter()
                .filter_map(|d| d.header("__dlq.errors.offset")?.parse().ok())
                .collect();
            offsets.sort_unstable();
            gone.sort_unstable();
            assert_eq!(offsets, gone, "{guest} on {kind}");
            let retried = dead
                .iter()
                .find(|d| d.header("__dlq.errors.offset") == Some("30"));
            let retried = retried.expect("a dead letter");
            assert_eq!(retried.header("__dlq.errors.delivery.count"), Some("3"));
        }
    }
}

/// As with autocommit, though PostgreSQL dooms a transaction at its first error.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_statement_may_be_caught() {
    for kind in KINDS {
        let table = Table::start(kind, "test-probe", "").await;
        let unique = |n: i64, violated: bool| {
            let statement = format!("INSERT INTO {}_unique VALUES ($1)", table.name);
            let mut command = json!({ "do": "sql", "store": "db", "statement": statement, "params": [n], "execute": true });
            if violated {
                command["report"] = json!(table.bench.output);
            }
            json!({ "do": "steps", "steps": [table.insert(n), command, table.insert(n + 100)] })
        };
        let messages = [
            unique(1, false),
            unique(2, false),
            unique(1, true),
            unique(3, false),
        ];
        let (outputs, dead) = table.bench.deliver(&messages).await;
        assert_eq!(dead, [], "{kind}");
        assert_eq!(
            table.rows().await,
            [1, 1, 2, 3, 101, 101, 102, 103],
            "{kind}"
        );
        assert_eq!(outputs.len(), 1);
        let said = outputs[0].value.as_deref().unwrap_or_default();
        assert!(said.contains("23505"), "{said}");
    }
}

/// The count is in the row, so a crash does not begin it again.
#[tokio::test(flavor = "multi_thread")]
async fn attempts_are_counted_over_a_kill() {
    let retry = "limits = { deadline = \"1s\" }";
    let mut table = Table::start(SQLITE, "test-probe", retry).await;
    // Each restart lets some deliveries pass; without the count there would be no end to them.
    table.bench.pipeline = table.bench.pipeline.replace(
        "retry = { max-attempts = 3, initial = \"10ms\", max = \"50ms\" }",
        "retry = { max-attempts = 4, initial = \"2s\", max = \"2s\" }",
    );
    table.bench.restart();
    table.bench.host.ready();
    let message = table.message(1, json!({ "do": "retry" }));
    table.bench.send(&[message]).await;
    for attempt in 1..=3 {
        until("an attempt that is counted", || {
            let row = blocking(table.progress("attempts"));
            (row >= attempt).then_some(())
        });
        table.bench.restart();
    }
    table
        .bench
        .log
        .wait_committed(&table.bench.group, &table.bench.input);
    let dead = table.dead();
    assert_eq!(dead.len(), 1);
    assert_eq!(dead[0].header("__dlq.errors.delivery.count"), Some("4"));
    assert_eq!(table.rows().await, Vec::<i64>::new());
}

/// Whatever the group's committed offset says, nothing is done twice and nothing is left out.
#[tokio::test(flavor = "multi_thread")]
async fn the_row_wins_over_the_log() {
    let mut table = Table::start("postgres", "test-probe", "").await;
    let message = |table: &Table, n| table.message(n, json!({ "do": "ok" }));
    let first: Vec<_> = (0..10).map(|n| message(&table, n)).collect();
    table.bench.deliver(&first).await;
    let mut expected = 10;
    for committed in [0, 15] {
        table.bench.host.signal(libc::SIGTERM);
        let group = table.bench.group.clone();
        table.bench.host.wait_for_end();
        let more: Vec<_> = (expected..expected + 10)
            .map(|n| message(&table, n))
            .collect();
        table.bench.send(&more).await;
        expected += 10;
        commit_offset(&group, &table.bench.input, committed);
        table.bench.restart();
        table.bench.log.wait_committed(&group, &table.bench.input);
        assert_eq!(
            table.rows().await,
            (0..expected).collect::<Vec<_>>(),
            "{committed}"
        );
    }
    assert_eq!(
        values(&table.bench.log.read(&table.bench.output)),
        (0..expected).collect::<Vec<_>>()
    );
}

fn commit_offset(group: &str, topic: &str, offset: i64) {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", server("KAFKA_BROKERS"))
        .set("group.id", group)
        .create()
        .expect("a consumer");
    let mut list = TopicPartitionList::new();
    let added = list.add_partition_offset(topic, 0, Offset::Offset(offset));
    added.expect("an offset");
    until("the group to be free", || {
        consumer.commit(&list, CommitMode::Sync).ok()
    });
}

fn admin() -> AdminClient<DefaultClientContext> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", server("KAFKA_BROKERS"));
    config.create().expect("an admin client")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_made_anew_stops_its_lane_and_says_why() {
    let mut table = Table::start("postgres", "test-probe", "").await;
    let messages: Vec<_> = (0..5)
        .map(|n| table.message(n, json!({ "do": "ok" })))
        .collect();
    table.bench.deliver(&messages).await;
    table.bench.host.signal(libc::SIGTERM);
    table.bench.host.wait_for_end();
    let (admin, options) = (admin(), AdminOptions::new());
    let topic = table.bench.input.clone();
    admin
        .delete_topics(&[&topic], &options)
        .await
        .expect("deleted");
    until("the topic to be made anew", || {
        let new = NewTopic::new(&topic, 1, TopicReplication::Fixed(1));
        let made = blocking(admin.create_topics([&new], &options));
        made.ok()?.into_iter().next()?.ok()
    });
    table.bench.send(&messages[..1]).await;
    table.bench.restart();
    let address = table.bench.host.address("admin");
    table.bench.host.wait_for("the lane to stop", || {
        let (status, why) = get(&address, "/readyz");
        (status == 503
            && why.contains("deleted and made anew")
            && why.contains("stagehost_progress"))
        .then_some(())
    });
    let stopped = table
        .bench
        .metric("stagehost_lanes_stopped{stage=\"probe\"}");
    assert_eq!(stopped.as_deref(), Some("1"));
    assert_eq!(table.rows().await, [0, 1, 2, 3, 4], "nothing was done");
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_were_removed_are_not_passed_over_in_silence() {
    for delivery in ["transactional", "at-least-once"] {
        let settings = format!("delivery = \"{delivery}\"");
        let mut table = Table::start("postgres", "test-probe", &settings).await;
        let message = |table: &Table, n| table.message(n, json!({ "do": "ok" }));
        let first: Vec<_> = (0..5).map(|n| message(&table, n)).collect();
        table.bench.deliver(&first).await;
        table.bench.host.signal(libc::SIGTERM);
        table.bench.host.wait_for_end();
        let more: Vec<_> = (5..10).map(|n| message(&table, n)).collect();
        table.bench.send(&more).await;
        let mut before = TopicPartitionList::new();
        let added = before.add_partition_offset(&table.bench.input, 0, Offset::Offset(8));
        added.expect("an offset");
        let removed = admin().delete_records(&before, &AdminOptions::new()).await;
        removed.expect("removed");
        table.bench.restart();
        let address = table.bench.host.address("admin");
        table.bench.host.wait_for("the lane to stop", || {
            let (status, why) = get(&address, "/readyz");
            (status == 503
                && why.contains("from offset 5 up to 8 were removed")
                && why.contains("on-gap"))
            .then_some(())
        });
        assert_eq!(table.rows().await, [0, 1, 2, 3, 4], "{delivery}");
        table.bench.pipeline = table
            .bench
            .pipeline
            .replace(&settings, &format!("{settings}\non-gap = \"continue\""));
        table.bench.restart();
        table
            .bench
            .log
            .wait_committed(&table.bench.group, &table.bench.input);
        assert_eq!(table.rows().await, [0, 1, 2, 3, 4, 8, 9], "{delivery}");
        let counted = table
            .bench
            .metric("stagehost_gap_records_total{stage=\"probe\"}");
        assert_eq!(counted.as_deref(), Some("3"), "{delivery}");
    }
}

/// As after a crash of the lane upstream, which produces once more what it had committed.
async fn send_outputs(log: &Log, table: &Table, numbers: &[i64]) {
    let input = &table.bench.input;
    for n in numbers {
        let value = table.message(*n, json!({ "do": "ok" })).to_string();
        let id = format!("upstream/in/0/0/{n}/0");
        log.produce_with_header(input, "k", &value, ("stagehost-id", &id))
            .await;
    }
    log.wait_committed(&table.bench.group, input);
}

const DROPPED: &str = "stagehost_messages_total{stage=\"probe\",outcome=\"duplicate\"}";

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_again_is_dropped() {
    let mut table = Table::start("postgres", "test-probe", "").await;
    let log = Log::new(&server("KAFKA_BROKERS"));
    send_outputs(&log, &table, &[0, 1, 2, 1, 2]).await;
    table.bench.restart();
    send_outputs(&log, &table, &[0, 2, 3]).await;
    assert_eq!(table.rows().await, [0, 1, 2, 3]);
    let dropped = table.bench.metric(DROPPED);
    assert_eq!(dropped.as_deref(), Some("2"), "of this host");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_again_to_the_same_lane_is_dropped_at_least_once() {
    for order in ["partition", "key"] {
        let settings = format!("delivery = \"at-least-once\"\norder = \"{order}\"");
        let table = Table::start("postgres", "test-probe", &settings).await;
        let log = Log::new(&server("KAFKA_BROKERS"));
        send_outputs(&log, &table, &[0, 1, 2, 1, 2]).await;
        send_outputs(&log, &table, &[2]).await;
        send_outputs(&log, &table, &[0, 3]).await;
        assert_eq!(table.rows().await, [0, 1, 2, 3], "{order}");
        let dropped = table.bench.metric(DROPPED);
        assert_eq!(dropped.as_deref(), Some("4"), "{order}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exhausted_message_may_stop_its_partition() {
    for delivery in ["transactional", "at-least-once"] {
        let settings = format!("delivery = \"{delivery}\"\non-exhausted = \"stop\"");
        let table = Table::start("postgres", "test-probe", &settings).await;
        let messages = [
            table.message(0, json!({ "do": "ok" })),
            json!({ "do": "retry" }),
            table.message(2, json!({ "do": "ok" })),
        ];
        table.bench.send(&messages).await;
        let address = table.bench.host.address("admin");
        table.bench.host.wait_for("the lane to stop", || {
            let (status, why) = get(&address, "/readyz");
            (status == 503 && why.contains("offset 1 has failed 3 times")).then_some(())
        });
        assert_eq!(table.rows().await, [0], "{delivery}");
        until("what is done to be committed", || {
            (table.bench.log.lag(&table.bench.group, &table.bench.input) == 2).then_some(())
        });
        assert_eq!(table.dead(), []);
    }
}

/// Longer than the group's session, and than a rebalance.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_stage_stays_in_its_group() {
    let settings = "limits = { deadline = \"60s\" }";
    let table = Table::start("postgres", "test-probe", settings).await;
    let slow = table.message(0, json!({ "do": "sleep", "ms": 12_000 }));
    table
        .bench
        .deliver(&[slow, table.message(1, json!({ "do": "ok" }))])
        .await;
    assert_eq!(table.rows().await, [0, 1]);
    let said = table.bench.host.log();
    assert!(
        !said.contains("lost") && !said.contains("released"),
        "{said}"
    );
    assert_eq!(table.progress("epoch").await, 1, "it was claimed once");
}

/// A stop in order leaves nothing to be produced again.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_under_load_repeats_nothing() {
    for kind in KINDS {
        let mut table = Table::start(kind, "test-probe", "").await;
        let messages: Vec<_> = (0..5_000)
            .map(|n| table.message(n, json!({ "do": "ok" })))
            .collect();
        table.bench.send(&messages).await;
        table.bench.log.read_at_least(&table.bench.output, 1);
        table.bench.host.signal(libc::SIGTERM);
        assert!(table.bench.host.wait_for_end().success());
        table.bench.restart();
        table
            .bench
            .log
            .wait_committed(&table.bench.group, &table.bench.input);
        tokio::time::sleep(Duration::from_millis(200)).await;
        let all: Vec<_> = (0..5_000).collect();
        assert_eq!(table.rows().await, all, "{kind}");
        assert_eq!(
            values(&table.bench.log.read(&table.bench.output)),
            all,
            "{kind}"
        );
    }
}

/// What a guest may ask of PostgreSQL, and must not have: more than the host has memory or time for.
#[tokio::test(flavor = "multi_thread")]
async fn a_hungry_statement_hurts_its_message_alone() {
    const MEGABYTES: u64 = 200;
    for delivery in ["transactional", "at-least-once"] {
        let settings = format!("delivery = \"{delivery}\"\nlimits = {{ deadline = \"2s\" }}");
        let table = Table::start("postgres", "test-probe", &settings).await;
        let ask = |statement: &str, execute: bool| {
            let command = json!({ "do": "sql", "store": "db", "statement": statement, "params": [], "execute": execute });
            json!({ "do": "steps", "steps": [table.insert(99), command] })
        };
        table
            .bench
            .deliver(&[table.message(0, json!({ "do": "ok" }))])
            .await;
        let before = table.bench.host.peak_mib();
        let messages = [
            ask("SELECT repeat('x', 1000000000)", false),
            ask(
                "SELECT repeat('x', 10000000), generate_series(1, 1000000000)",
                false,
            ),
            ask("SELECT generate_series(1, 10000000000)", true),
            table.message(1, json!({ "do": "ok" })),
        ];
        table.bench.send(&messages).await;
        table
            .bench
            .log
            .wait_committed(&table.bench.group, &table.bench.input);
        let dead = table.dead();
        assert_eq!(dead.len(), 3, "{delivery}: {dead:?}");
        for letter in &dead {
            let cause = letter.header("stagehost-cause").unwrap_or_default();
            // Whichever bound is met first; an answer that is too large may cost the transaction.
            let is_its_own = ["deadline", "reject", "retries-exhausted"].contains(&cause);
            assert!(is_its_own, "{delivery}: {cause}");
            let words = letter.header("__dlq.errors.message").unwrap_or_default();
            let is_said = ["deadline of 2s", "larger than the limit of"];
            assert!(is_said.iter().any(|said| words.contains(said)), "{words}");
        }
        if delivery == "transactional" {
            assert_eq!(table.rows().await, [0, 1]);
        }
        let grown = table.bench.host.peak_mib().saturating_sub(before);
        assert!(grown < MEGABYTES, "{delivery}: {grown} MB");
    }
}

/// When the statement that says this name began that runs on the server, if one does.
async fn running_since(table: &Table) -> Option<String> {
    let running = format!(
        "SELECT CAST(query_start AS text) FROM pg_stat_activity \
         WHERE state = 'active' AND pid <> pg_backend_pid() AND query LIKE '%AS {}_long%'",
        table.name
    );
    let rows = table.database.query(&running, &[]).await;
    match rows.expect("what runs").rows.first()?.first()? {
        SqlValue::Text(since) => Some(since.clone()),
        other => panic!("{other:?}"),
    }
}

/// One computes on the server for ever, and one sends rows for as long as the host bears them: the messages of another stage of
/// the host pass while one and the same statement runs, and not when it has met its end.
#[tokio::test(flavor = "multi_thread")]
async fn neighbours_go_on_while_a_statement_runs_until_its_deadline() {
    // What the series ends with, and how many messages pass beside it at least.
    const STATEMENTS: [(&str, usize); 2] = [(" OFFSET 999999999999", 10), ("", 1)];
    const GIVEN_UP: &str = "stagehost_messages_total{stage=\"probe\",outcome=\"dead-letter\"}";
    for delivery in ["transactional", "at-least-once"] {
        for (end, least) in STATEMENTS {
            let neighbour = Neighbour::new();
            let theirs = neighbour.tables("");
            let settings =
                format!("delivery = \"{delivery}\"\nlimits = {{ deadline = \"4s\" }}\n{theirs}");
            let table = Table::start("postgres", "test-probe", &settings).await;
            let long = format!(
                "SELECT generate_series(1, 1000000000000) AS {}_long{end}",
                table.name
            );
            let long = json!({ "do": "sql", "store": "db", "statement": long, "execute": true });
            table.bench.send(&[long, table.insert(-1)]).await;
            let (mut sent, mut beside) = (0, 0);
            while table
                .bench
                .metric(GIVEN_UP)
                .is_none_or(|count| count == "0")
            {
                let before = running_since(&table).await;
                neighbour.send(&table.bench, &[table.insert(sent)]).await;
                until("the neighbour's message to be done", || {
                    blocking(table.rows()).contains(&sent).then_some(())
                });
                sent += 1;
                beside += usize::from(before.is_some() && running_since(&table).await == before);
            }
            assert!(beside >= least, "{delivery}{end}: {beside} of {sent}");
            neighbour.is_well(&table.bench);
            let (group, input) = (&table.bench.group, &table.bench.input);
            table.bench.log.wait_committed(group, input);
            assert_eq!(table.rows().await, (-1..sent).collect::<Vec<_>>());
            let dead = table.dead();
            assert_eq!(dead.len(), 1, "{delivery}{end}: {dead:?}");
            if !end.is_empty() {
                assert_eq!(dead[0].header("stagehost-cause"), Some("deadline"));
                assert_eq!(dead[0].header("__dlq.errors.delivery.count"), Some("3"));
                let words = dead[0].header("__dlq.errors.message").unwrap_or_default();
                assert!(words.contains("deadline of 4s"), "{words}");
            }
            until("the server to be told that nobody waits", || {
                blocking(running_since(&table)).is_none().then_some(())
            });
        }
    }
}

/// Each is a message of its own: what it is refused, it is told, and nothing of another lane is touched.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_reaches_nothing_of_the_hosts_or_of_its_neighbours() {
    const ATTACKS: &[&str] = &[
        "UPDATE stagehost_progress SET next_offset = next_offset + 100",
        "UPDATE \"stagehost_progress\" SET pending = '\\x00'",
        "DELETE FROM stagehost_progress",
        "SELECT table_to_xml('stagehost_progress', true, true, '')",
        "CREATE FUNCTION f() RETURNS text LANGUAGE sql AS $$SELECT set_config('search_path', 'x', false)$$",
        "CREATE TABLE mine (n int)",
        "ALTER ROLE CURRENT_USER PASSWORD 'mine'",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity",
        "SELECT set_config('search_path', 'x', false)",
        "COMMIT",
    ];
    let victim = Table::start("postgres", "test-probe", "").await;
    let table = Table::start("postgres", "test-probe", "").await;
    let attack = |(n, statement): (i64, &&str)| {
        let command = json!({ "do": "sql", "store": "db", "statement": statement, "params": [], "execute": true,
                              "report": table.bench.output });
        json!({ "do": "steps", "steps": [table.insert(n), command] })
    };
    let messages: Vec<_> = (0..).zip(ATTACKS).map(attack).collect();
    let sent = 0..3;
    let to_victim = |n: i64| victim.message(n, json!({ "do": "ok" }));
    victim
        .bench
        .deliver(&sent.clone().map(to_victim).collect::<Vec<_>>())
        .await;
    let (outputs, dead) = table.bench.deliver(&messages).await;
    assert_eq!(dead, []);
    assert_eq!(outputs.len(), ATTACKS.len());
    for (output, statement) in outputs.iter().zip(ATTACKS) {
        let said = output.value.as_deref().unwrap_or_default();
        assert!(said.contains("0A000"), "{statement}: {said}");
    }
    victim
        .bench
        .deliver(&(3..6).map(to_victim).collect::<Vec<_>>())
        .await;
    assert_eq!(victim.rows().await, (0..6).collect::<Vec<_>>());
    assert_eq!(victim.progress("epoch").await, 1, "nobody took it over");
}
