//! A SQLite file that is sick.

use std::time::Duration;

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Row};

use super::{Lane, Patient, inserts};

/// Another process holds the file's lock, as a backup or an administrator's shell does.
#[tokio::test(flavor = "multi_thread")]
async fn a_sqlite_file_that_another_process_keeps_locked_is_waited_for_and_named() {
    for lane in [Lane::Ordered, Lane::Transactional] {
        let patient = Patient::on_database("sqlite:db.sqlite", lane);
        let file = patient.host.folder().path().join("db.sqlite");
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
