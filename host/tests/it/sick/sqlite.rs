//! A SQLite file that is sick.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use host::capability::sql::{Database, Value};
use host::pipeline::SqlUrl;
use serde_json::json;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Row};

use super::{Lane, Patient, inserts};
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
        let patient = Patient::with("db", lane, grant, stores, |pipeline| {
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
