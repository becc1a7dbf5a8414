//! A database that goes back to an older copy, or is emptied, under a host that runs: the first commit that meets it says so,
//! and so does a lane that has nothing to commit. What was lost is processed again from the log. On Apache Kafka.

use std::collections::BTreeSet;
use std::path::Path;

use host::capability::sql::Database;
use host::pipeline::SqlUrl;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row, SqliteConnection};

use crate::bench::Bench;
use crate::support::{Seen, server, unique, until};

/// The database of a bench, as its administrator has it.
enum Admin {
    Postgres(String),
    Sqlite(String),
}

impl Admin {
    async fn postgres() -> Self {
        let (url, name) = (server("DATABASE_URL"), unique("db").replace('-', "_"));
        Self::Postgres(url.clone())
            .run(&format!("CREATE DATABASE {name}"))
            .await;
        let (server, _) = url.rsplit_once('/').expect("a database's name");
        Self::Postgres(format!("{server}/{name}"))
    }

    /// A file that is not there yet.
    async fn sqlite(file: &Path) -> Self {
        // Whoever uses SQLite first in a process is to be the host's own, which bounds its memory.
        let first = SqlUrl::Sqlite(file.with_extension("first"));
        let first = Database::connect(&first, None, 1, None).await;
        first.expect("a new file").close().await;
        Self::Sqlite(format!("sqlite:{}", file.display()))
    }

    /// Runs statements, all or none of them where there are several.
    async fn run(&self, statements: &str) {
        let run = sqlx::raw_sql(AssertSqlSafe(statements.to_owned()));
        let done = match self {
            Self::Postgres(url) => {
                let mut connection = PgConnection::connect(url).await.expect("PostgreSQL");
                run.execute(&mut connection).await.map(drop)
            }
            Self::Sqlite(file) => {
                let mut connection = SqliteConnection::connect(file).await.expect("SQLite");
                run.execute(&mut connection).await.map(drop)
            }
        };
        done.unwrap_or_else(|error| panic!("{statements}: {error}"));
    }

    /// The numbers in the table `t`, in order.
    async fn numbers(&self) -> Vec<i64> {
        const ALL: &str = "SELECT n FROM t ORDER BY n";
        match self {
            Self::Postgres(url) => {
                let mut connection = PgConnection::connect(url).await.expect("PostgreSQL");
                let rows = sqlx::query(ALL).fetch_all(&mut connection).await;
                let rows = rows.expect("rows");
                rows.iter().map(|row| row.get(0)).collect()
            }
            Self::Sqlite(file) => {
                let mut connection = SqliteConnection::connect(file).await.expect("SQLite");
                let rows = sqlx::query(ALL).fetch_all(&mut connection).await;
                let rows = rows.expect("rows");
                rows.iter().map(|row| row.get(0)).collect()
            }
        }
    }

    /// Waits until no row has outputs that a start would produce again.
    async fn settle(&self) {
        until("the rows to have no outputs", || {
            let left = tokio::task::block_in_place(|| {
                tokio::runtime::Handle::current().block_on(self.pending())
            });
            (left == 0).then_some(())
        });
    }

    async fn pending(&self) -> i64 {
        const LEFT: &str = "SELECT count(*) FROM stagehost_progress WHERE length(pending) > 0";
        let Self::Postgres(url) = self else {
            panic!("PostgreSQL");
        };
        let mut connection = PgConnection::connect(url).await.expect("PostgreSQL");
        let left = sqlx::query_scalar(LEFT).fetch_one(&mut connection).await;
        left.expect("a count")
    }

    /// Keeps what is there, under this name.
    async fn keep(&self, name: &str) {
        let keep = format!(
            "BEGIN; CREATE TABLE {name}_t AS SELECT * FROM t; \
             CREATE TABLE {name}_p AS SELECT * FROM stagehost_progress; COMMIT"
        );
        self.run(&keep).await;
    }

    /// Has all be as it was kept.
    async fn go_back(&self, name: &str) {
        let begin = match self {
            Self::Postgres(_) => "BEGIN",
            Self::Sqlite(_) => "BEGIN IMMEDIATE",
        };
        let back = format!(
            "{begin}; DELETE FROM t; INSERT INTO t SELECT * FROM {name}_t; DELETE FROM stagehost_progress; \
             INSERT INTO stagehost_progress SELECT * FROM {name}_p; COMMIT"
        );
        self.run(&back).await;
    }
}

/// A bench on a database with a table `t`.
async fn bench(admin: &Admin, settings: &str) -> Bench {
    let url = match admin {
        Admin::Postgres(url) => url,
        Admin::Sqlite(file) => file,
    };
    let bench = Bench::with("test-probe", 1, settings, url, "");
    bench.host.ready();
    admin.run("CREATE TABLE t (n bigint NOT NULL)").await;
    bench
}

/// On PostgreSQL and on SQLite, each with a folder that is to be kept as long.
async fn both() -> Vec<(Admin, Option<tempfile::TempDir>)> {
    let folder = tempfile::tempdir().expect("a folder");
    let sqlite = Admin::sqlite(&folder.path().join("db.sqlite")).await;
    vec![(Admin::postgres().await, None), (sqlite, Some(folder))]
}

/// Writes a number and emits it.
fn work(bench: &Bench, n: i64) -> Value {
    let insert = json!({
        "do": "sql", "store": "db", "statement": "INSERT INTO t VALUES ($1)", "params": [n], "execute": true,
    });
    let emit = json!({ "do": "emit", "topic": bench.output, "value": n });
    json!({ "do": "steps", "steps": [insert, emit] })
}

/// The same, taking some time.
fn slow_work(bench: &Bench, n: i64) -> Value {
    let sleep = json!({ "do": "sleep", "ms": 300 });
    json!({ "do": "steps", "steps": [sleep, work(bench, n)] })
}

async fn send(bench: &Bench, numbers: std::ops::Range<i64>) {
    let messages: Vec<_> = numbers.map(|n| work(bench, n)).collect();
    bench.send(&messages).await;
}

async fn deliver(bench: &Bench, numbers: std::ops::Range<i64>) {
    send(bench, numbers).await;
    bench.log.wait_committed(&bench.group, &bench.input);
}

/// The numbers that came out, each output once.
fn outputs(bench: &Bench) -> Vec<i64> {
    let mut known = BTreeSet::new();
    let mut number = |seen: Seen| {
        let id = seen.header("stagehost-id").expect("an id").to_owned();
        seen.value.filter(|_| known.insert(id))?.parse().ok()
    };
    let all = bench.log.read(&bench.output).into_iter();
    all.filter_map(&mut number).collect()
}

fn says(bench: &Bench, words: &[&str]) {
    bench
        .host
        .wait_for(&format!("the log to say {words:?}"), || {
            let said = bench.host.log();
            words.iter().all(|word| said.contains(word)).then_some(())
        });
}

fn lost_rows(bench: &Bench) -> Option<String> {
    bench.metric("stagehost_rows_lost_total{stage=\"probe\"}")
}

/// Waits until the table has exactly these numbers.
async fn until_numbers(admin: &Admin, expected: std::ops::Range<i64>) {
    let expected: Vec<_> = expected.collect();
    until(&format!("{expected:?} in the table"), || {
        let now = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(admin.numbers())
        });
        (now == expected).then_some(())
    });
}

/// A snapshot that is restored, or an asynchronous standby that lacks the last commits: the epoch is the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_goes_back_under_a_running_host_has_all_again() {
    for (admin, _folder) in both().await {
        let bench = bench(&admin, "").await;
        deliver(&bench, 0..10).await;
        admin.keep("before").await;
        let slow: Vec<_> = (10..20).map(|n| slow_work(&bench, n)).collect();
        bench.send(&slow).await;
        bench.log.wait_committed(&bench.group, &bench.input);
        admin.go_back("before").await;
        send(&bench, 20..30).await;
        bench.not_ready(&["went back to another copy", "offset 10 up to 20"]);
        let waiting = "stagehost_lanes_waiting{stage=\"probe\",for=\"row\"}";
        assert_eq!(bench.metric(waiting).as_deref(), Some("1"));
        until_numbers(&admin, 0..30).await;
        bench.host.ready();
        let again: Vec<_> = (0..20).chain(10..30).collect();
        until("what is processed again to come out", || {
            (outputs(&bench) == again).then_some(())
        });
        says(
            &bench,
            &["is an older copy", "has again what it lost", "commits of"],
        );
        assert_eq!(lost_rows(&bench).as_deref(), Some("1"));
        assert_eq!(admin.numbers().await, (0..30).collect::<Vec<_>>());
    }
}

/// No commit would tell.
#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_is_idle_notices_that_its_database_went_back() {
    for (admin, _folder) in both().await {
        let bench = bench(&admin, "").await;
        deliver(&bench, 0..10).await;
        admin.keep("before").await;
        deliver(&bench, 10..20).await;
        admin.go_back("before").await;
        until_numbers(&admin, 0..20).await;
        says(&bench, &["is an older copy"]);
        assert_eq!(lost_rows(&bench).as_deref(), Some("1"));
    }
}

/// It goes back and forth, and each time newer outputs are above all before.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_goes_back_and_forth_under_a_running_host_loses_nothing() {
    let admin = Admin::postgres().await;
    let bench = bench(&admin, "").await;
    deliver(&bench, 0..10).await;
    admin.keep("older").await;
    deliver(&bench, 10..20).await;
    admin.settle().await;
    admin.keep("newer").await;
    admin.go_back("older").await;
    deliver(&bench, 20..30).await;
    until_numbers(&admin, 0..30).await;
    admin.go_back("newer").await;
    deliver(&bench, 30..40).await;
    until_numbers(&admin, 0..40).await;
    let all: Vec<_> = (0..20).chain(10..30).chain(20..40).collect();
    until("all to come out", || (outputs(&bench) == all).then_some(()));
    assert_eq!(lost_rows(&bench).as_deref(), Some("2"));
}

/// As at a failover: sessions end, and another database answers by the name.
#[tokio::test(flavor = "multi_thread")]
async fn another_database_in_the_place_of_the_one_that_was_is_noticed() {
    let admin = Admin::postgres().await;
    let Admin::Postgres(url) = &admin else {
        panic!("PostgreSQL");
    };
    let (_, name) = url.rsplit_once('/').expect("a database's name");
    let server = Admin::Postgres(server("DATABASE_URL"));
    let close = async || {
        let closed = format!("ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false");
        server.run(&closed).await;
        let ended = format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        );
        server.run(&ended).await;
        until("its sessions to end", || {
            tokio::task::block_in_place(|| {
                tokio::runtime::Handle::current().block_on(async {
                    let mut connection =
                        PgConnection::connect(&crate::support::server("DATABASE_URL"))
                            .await
                            .expect("PostgreSQL");
                    let left = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1";
                    let left: i64 = sqlx::query_scalar(left)
                        .bind(name)
                        .fetch_one(&mut connection)
                        .await
                        .expect("a count");
                    (left == 0).then_some(())
                })
            })
        });
    };
    let bench = bench(&admin, "").await;
    deliver(&bench, 0..10).await;
    close().await;
    let standby = format!("CREATE DATABASE {name}_standby TEMPLATE {name}");
    server.run(&standby).await;
    let open = format!("ALTER DATABASE {name} WITH ALLOW_CONNECTIONS true");
    server.run(&open).await;
    deliver(&bench, 10..20).await;
    close().await;
    let promoted = format!("ALTER DATABASE {name} RENAME TO {name}_old");
    server.run(&promoted).await;
    let promoted = format!("ALTER DATABASE {name}_standby RENAME TO {name}");
    server.run(&promoted).await;
    deliver(&bench, 20..30).await;
    until_numbers(&admin, 0..30).await;
    let again: Vec<_> = (0..20).chain(10..30).collect();
    until("all to come out", || {
        (outputs(&bench) == again).then_some(())
    });
    says(&bench, &["is an older copy", "has again what it lost"]);
}

/// Whether somebody removes the rows, or the table is truncated: nobody knows where to go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_emptied_under_a_running_host_stops_its_lanes() {
    for (admin, _folder) in both().await {
        for has_more in [true, false] {
            let fresh = match &admin {
                Admin::Postgres(_) => Admin::postgres().await,
                Admin::Sqlite(file) => Admin::Sqlite(format!("{file}-{has_more}")),
            };
            let bench = bench(&fresh, "").await;
            deliver(&bench, 0..6).await;
            fresh.run("DELETE FROM stagehost_progress").await;
            if has_more {
                send(&bench, 6..9).await;
            }
            let words = ["emptied", "committed offset 6", "--reset-offsets"];
            bench.not_ready(&words);
            assert_eq!(fresh.numbers().await, (0..6).collect::<Vec<_>>());
            assert_eq!(lost_rows(&bench).as_deref(), Some("1"));
            let stopped = bench.metric("stagehost_lanes_stopped{stage=\"probe\"}");
            assert_eq!(stopped.as_deref(), Some("1"));
        }
    }
}

/// As `mv` does with a copy: who has the file before open would write on into it, and nobody would read it.
#[tokio::test(flavor = "multi_thread")]
async fn a_sqlite_file_that_is_replaced_under_a_running_host_is_noticed() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("db.sqlite");
    let admin = Admin::sqlite(&file).await;
    let bench = bench(&admin, "").await;
    deliver(&bench, 0..10).await;
    let copy = folder.path().join("copy");
    admin
        .run(&format!("VACUUM INTO '{}'", copy.display()))
        .await;
    deliver(&bench, 10..20).await;
    assert_eq!(admin.numbers().await, (0..20).collect::<Vec<_>>());
    std::fs::rename(&copy, &file).expect("the copy is in its place");
    send(&bench, 20..30).await;
    says(&bench, &["is another file than it was", "is an older copy"]);
    bench.log.wait_committed(&bench.group, &bench.input);
    until_numbers(&admin, 0..30).await;
    let again: Vec<_> = (0..20).chain(10..30).collect();
    until("all to come out", || {
        (outputs(&bench) == again).then_some(())
    });
    // Taken away, it is waited for.
    let away = folder.path().join("away");
    std::fs::rename(&file, &away).expect("it is away");
    send(&bench, 30..31).await;
    bench.not_ready(&["is gone", "bring it back"]);
    std::fs::rename(&away, &file).expect("it is back");
    until_numbers(&admin, 0..31).await;
    bench.host.ready();
}

/// A copy of before the last migration has it run, as at a start.
#[tokio::test(flavor = "multi_thread")]
async fn a_sqlite_file_of_before_the_last_migration_gets_it_under_a_running_host() {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, migrations) = (folder.path().join("db.sqlite"), folder.path().join("m"));
    let admin = Admin::sqlite(&file).await;
    std::fs::create_dir(&migrations).expect("a folder");
    let migration = |name: &str, text: &str| {
        std::fs::write(migrations.join(name), text).expect("a migration");
    };
    migration("1_t.sql", "CREATE TABLE t (n bigint NOT NULL)");
    let url = format!(
        "sqlite:{}\"\nmigrations = \"{}",
        file.display(),
        migrations.display()
    );
    let mut bench = Bench::with("test-probe", 1, "", &url, "");
    bench.host.ready();
    deliver(&bench, 0..10).await;
    let copy = folder.path().join("copy");
    admin
        .run(&format!("VACUUM INTO '{}'", copy.display()))
        .await;
    bench.host.signal(libc::SIGTERM);
    bench.host.wait_for_end();
    migration("2_more.sql", "ALTER TABLE t ADD COLUMN more bigint");
    bench.restart();
    bench.host.ready();
    let more = async |numbers: std::ops::Range<i64>| {
        let insert = |n| {
            json!({
                "do": "sql", "store": "db", "statement": "INSERT INTO t (n, more) VALUES ($1, $1)",
                "params": [n], "execute": true,
            })
        };
        bench.send(&Vec::from_iter(numbers.map(insert))).await;
    };
    more(10..20).await;
    bench.log.wait_committed(&bench.group, &bench.input);
    std::fs::rename(&copy, &file).expect("the copy is in its place");
    more(20..30).await;
    // Who opens the copy before the host has noticed finds the other file's log of writes beside it.
    says(&bench, &["is another file than it was", "is an older copy"]);
    until_numbers(&admin, 0..30).await;
    bench.host.ready();
    let dead = bench.log.read(&format!("{}.dlq", bench.input));
    assert_eq!(dead.len(), 0);
    // One that can't be brought to what the host has waits, and says why.
    let newer = folder.path().join("newer");
    admin
        .run(&format!("VACUUM INTO '{}'", newer.display()))
        .await;
    let of_newer = Admin::Sqlite(format!("sqlite:{}", newer.display()));
    of_newer
        .run("UPDATE _sqlx_migrations SET version = 3 WHERE version = 2")
        .await;
    std::fs::rename(&newer, &file).expect("the copy is in its place");
    more(30..31).await;
    bench.not_ready(&["another file than it was", "migration 3 was run"]);
    admin
        .run("UPDATE _sqlx_migrations SET version = 2 WHERE version = 3")
        .await;
    until_numbers(&admin, 0..31).await;
    bench.host.ready();
}

/// It is waited for, as any store is that does not do what it did.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_progress_that_is_dropped_is_waited_for_and_named() {
    for (admin, _folder) in both().await {
        let mut bench = bench(&admin, "").await;
        deliver(&bench, 0..6).await;
        admin.keep("before").await;
        admin.run("DROP TABLE stagehost_progress").await;
        send(&bench, 6..9).await;
        bench.not_ready(&["stagehost_progress"]);
        assert_eq!(admin.numbers().await, (0..6).collect::<Vec<_>>());
        // A start makes it anew, and it is empty.
        bench.host.signal(libc::SIGTERM);
        bench.host.wait_for_end();
        bench.restart();
        bench.not_ready(&["emptied", "committed offset 6"]);
        bench.host.signal(libc::SIGTERM);
        bench.host.wait_for_end();
        admin.go_back("before").await;
        bench.restart();
        bench.host.ready();
        bench.log.wait_committed(&bench.group, &bench.input);
        until_numbers(&admin, 0..9).await;
    }
}

/// The row is changed as an operator does who wants records again, who needn't stop the host for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_set_back_under_a_running_host_counts() {
    let admin = Admin::postgres().await;
    let bench = bench(&admin, "").await;
    deliver(&bench, 0..6).await;
    admin
        .run(
            "UPDATE stagehost_progress SET next_offset = 4, attempts = 0, generation = generation + 1; \
             DELETE FROM t WHERE n >= 4",
        )
        .await;
    deliver(&bench, 6..9).await;
    until_numbers(&admin, 0..9).await;
    let all: Vec<_> = (0..6).chain(4..9).collect();
    until("all to come out", || (outputs(&bench) == all).then_some(()));
    says(&bench, &["is another one than it has left"]);
}
