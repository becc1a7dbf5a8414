//! A SQLite file that is sick.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use host::capability::sql::{Database, Value};
use host::pipeline::SqlUrl;
use serde_json::json;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Row};

use super::{Lane, Patient, Stores, inserts};
use crate::support::Host;

/// The file as the host opens it. SQLite bounds its memory as the first one in a process has it do, and that is to be the host.
async fn of_host(file: PathBuf) -> Database {
    let opened = Database::connect(&SqlUrl::Sqlite(file), None, 2, None).await;
    opened.expect("the file")
}

/// Another process holds the file's lock, as a backup or an administrator's shell does.
#[tokio::test(flavor = "multi_thread")]
async fn a_sqlite_file_that_another_process_keeps_locked_is_waited_for_and_named() {
    for lane in [Lane::Ordered, Lane::Transactional] {
        let patient = Patient::on_database("sqlite:db.sqlite", lane);
        let file = patient.host.folder().path().join("db.sqlite");
        of_host(file.clone()).await;
        let options = SqliteConnectOptions::new().filename(file);
        let mut other = options.connect().await.expect("the file");
        let run = async |other: &mut _, statement: &'static str| {
            let done = sqlx::raw_sql(statement).execute(other).await;
            done.unwrap_or_else(|error| panic!("{statement}: {error}"));
        };
        run(&mut other, "CREATE TABLE t (n BIGINT)").await;
        patient.send(&inserts(0..10)).await;
        patient.settle();
        run(&mut other, "BEGIN IMMEDIATE").await;
        patient.send(&inserts(10..20)).await;
        patient.says("locked");
        tokio::time::sleep(Duration::from_secs(8)).await;
        assert_eq!(patient.dead(), Vec::<String>::new(), "{lane:?}");
        run(&mut other, "ROLLBACK").await;
        patient.goes_on();
        let count = sqlx::query("SELECT count(*), count(DISTINCT n) FROM t").fetch_one(&mut other);
        let count = count.await.expect("a count");
        let counts: (i64, i64) = (count.get(0), count.get(1));
        assert_eq!(counts, (20, 20), "{lane:?}");
    }
}

/// Of the host's own, so that nobody else is in want of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_under_sqlite_is_waited_for_and_named() {
    for lane in [Lane::Ordered, Lane::Transactional] {
        let stores = "[sql.db]\nurl = \"sqlite:data/db.sqlite\"\n[redis.cache]\nurl = \"memory:\"";
        let grant = "sql = { db = { access = \"data-definition\" } }\nredis = { cache = { prefix = \"p:\" } }";
        let patient = Patient::with("db", lane, &Stores::new(grant, stores), |pipeline| {
            Host::spawn_on_small_disk(pipeline, 64)
        });
        patient.host.ready();
        let data = patient.host.data();
        let table = json!({ "do": "sql", "store": "db", "statement": "CREATE TABLE t (n BIGINT)", "execute": true });
        patient.send(&[table]).await;
        patient.send(&inserts(0..10)).await;
        patient.settle();
        let filler = data.join("filler");
        let mut file = std::fs::File::create(&filler).expect("a file on the small disk");
        while file.write_all(&[0; 4096]).is_ok() {}
        patient.send(&inserts(10..40)).await;
        patient.says("disk is full");
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(patient.dead(), Vec::<String>::new(), "{lane:?}");
        drop(file);
        std::fs::remove_file(&filler).expect("the filler is removed");
        patient.goes_on();
        // SQLite does not open it where the host has it.
        let copy = tempfile::tempdir().expect("a folder");
        for file in ["db.sqlite", "db.sqlite-wal"] {
            std::fs::copy(data.join(file), copy.path().join(file)).expect("a copy");
        }
        let copied = of_host(copy.path().join("db.sqlite")).await;
        let count = copied.query("SELECT count(*), count(DISTINCT n) FROM t", &[]);
        let counts = count.await.expect("a count").rows;
        assert_eq!(counts, [[Value::Int64(40), Value::Int64(40)]], "{lane:?}");
    }
}

/// As whoever runs the file has it.
async fn run(file: &Path, statements: &str) {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .busy_timeout(Duration::from_secs(5));
    let mut other = options.connect().await.expect("the file");
    let run = sqlx::raw_sql(AssertSqlSafe(statements)).execute(&mut other);
    run.await
        .unwrap_or_else(|error| panic!("{statements}: {error}"));
    other.close().await.expect("an end");
}

async fn counts(file: &Path) -> (i64, i64) {
    let options = SqliteConnectOptions::new().filename(file);
    let mut other = options.connect().await.expect("the file");
    let count = sqlx::query("SELECT count(*), count(DISTINCT n) FROM t").fetch_one(&mut other);
    let count = count.await.expect("a count");
    (count.get(0), count.get(1))
}

/// Whoever changes the tables under a running host, and puts them back.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_sqlite_that_is_changed_and_put_back_costs_no_message() {
    const RENAMED: [&str; 3] = [
        "no such table: t",
        "ALTER TABLE t RENAME TO u",
        "ALTER TABLE u RENAME TO t",
    ];
    const WIDER: [&str; 3] = [
        "table t has 2 columns but 1 values were supplied",
        "ALTER TABLE t ADD COLUMN more BIGINT",
        "ALTER TABLE t DROP COLUMN more",
    ];
    for (lane, [words, sicken, heal]) in [
        (Lane::Ordered, RENAMED),
        (Lane::Batches, RENAMED),
        (Lane::Transactional, RENAMED),
        (Lane::Ordered, WIDER),
    ] {
        let patient = Patient::on_database("sqlite:db.sqlite", lane);
        let file = patient.host.folder().path().join("db.sqlite");
        of_host(file.clone()).await;
        run(&file, "CREATE TABLE t (n BIGINT)").await;
        patient.send(&inserts(0..10)).await;
        patient.settle();
        run(&file, sicken).await;
        patient.send(&inserts(10..40)).await;
        patient.says(words);
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(patient.dead(), Vec::<String>::new(), "{lane:?}: {sicken}");
        run(&file, heal).await;
        patient.goes_on();
        assert_eq!(counts(&file).await, (40, 40), "{lane:?}: {sicken}");
    }
}

/// What a stage asks for that was never there, or that is wrong in itself, is its message's own.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_sqlite_never_had_is_the_messages_own() {
    let patient = Patient::on_database("sqlite:db.sqlite", Lane::Ordered);
    patient.send(&inserts(0..1)).await;
    patient.settle();
    let dead = patient.dead();
    assert!(
        dead.len() == 1 && dead[0].contains("no such table: t"),
        "{dead:?}"
    );
    patient.host.ready();
}

/// A copy that lacks a table, where no migration makes it.
#[tokio::test(flavor = "multi_thread")]
async fn a_sqlite_file_without_the_tables_of_the_one_before_is_waited_for_and_named() {
    let patient = Patient::on_database("sqlite:db.sqlite", Lane::Ordered);
    let file = patient.host.folder().path().join("db.sqlite");
    of_host(file.clone()).await;
    let copy = file.with_extension("copy");
    of_host(copy.clone()).await.close().await;
    run(&file, "CREATE TABLE t (n BIGINT)").await;
    patient.send(&inserts(0..10)).await;
    patient.settle();
    std::fs::rename(&copy, &file).expect("the copy is in its place");
    patient.send(&inserts(10..20)).await;
    patient.says("no such table: t");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(patient.dead(), Vec::<String>::new());
    run(&file, "CREATE TABLE t (n BIGINT)").await;
    patient.goes_on();
    assert_eq!(counts(&file).await, (10, 10));
}
