//! Databases that are opened, migrated, away, and back.

use std::path::Path;

use host::capability::sql::{Database, Error};
use host::capability::{Action, StoreError};
use host::delivery::progress::{Mode, Transaction as _};
use host::pipeline::SqlUrl;
use tempfile::TempDir;

use super::super::free_port;
use super::Value::Int64;
use super::transactions::{MODES, Owner, insert};
use super::{CONNECTIONS, Kind, Place, admin, on, query};
use crate::support::server;

/// Whatever happens to its connections, the database is used again as soon as it is there.
#[tokio::test]
async fn terminated_connections_are_replaced() {
    let place = Place::new(Kind::Postgres).await;
    let database = place.open(None).await.expect("a new database");
    for _ in 0..3 {
        let all = (0..CONNECTIONS).map(|_| database.query("SELECT pg_sleep(0.01)", &[]));
        futures::future::join_all(all).await;
        admin(&format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{}'",
            place.name
        ))
        .await;
        let mut answer = database.query("SELECT 1", &[]).await;
        for _ in 0..CONNECTIONS {
            match &answer {
                Ok(_) => break,
                Err(Error::Unavailable(_)) => answer = database.query("SELECT 1", &[]).await,
                Err(other) => panic!("{other:?}"),
            }
        }
        assert!(answer.is_ok(), "{answer:?}");
    }
    database.close().await;
    let closed = database.probe(&Action::Answer).await;
    assert!(
        matches!(closed, Err(StoreError::Unavailable(_))),
        "{closed:?}"
    );
    place.remove().await;
}

/// What was closed while nobody used it costs no message anything: the transaction begins elsewhere.
#[tokio::test]
async fn transactions_begin_on_connections_that_are_alive() {
    let place = Place::new(Kind::Postgres).await;
    let database = place.open(None).await.expect("a new database");
    let mut owner = Owner::new(&database).await;
    let mut id = 0;
    for mode in MODES {
        let all = (0..CONNECTIONS).map(|_| database.query("SELECT pg_sleep(0.01)", &[]));
        futures::future::join_all(all).await;
        admin(&format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{}'",
            place.name
        ))
        .await;
        id += 1;
        let transaction = owner.begin(mode).await;
        if mode == Mode::Careful {
            let set = transaction.savepoint().await;
            assert!(set.is_ok(), "{set:?}");
        }
        assert_eq!(insert(&transaction, id).await, Ok(1), "{mode:?}");
        let committed = owner.commit(transaction).await;
        assert!(committed.is_ok(), "{committed:?}");
    }
    assert_eq!(owner.numbers().await, [1, 2]);
    database.close().await;
    place.remove().await;
}

/// A call that is given up leaves nothing behind that the next one could meet.
#[tokio::test]
async fn abandoned_calls_do_no_harm() {
    on(Kind::Postgres, async |_, database| {
        for _ in 0..2 * CONNECTIONS {
            let slow = database.query("SELECT pg_sleep(60)", &[]);
            let given_up = tokio::time::timeout(std::time::Duration::from_millis(20), slow).await;
            assert!(given_up.is_err());
        }
        assert_eq!(query(&database, "SELECT 7", &[]).await, [[Int64(7)]]);
    })
    .await;
}

#[tokio::test]
async fn migrations_run_once() {
    for kind in [Kind::Sqlite, Kind::Postgres] {
        let place = Place::new(kind).await;
        let folder = folder(&[
            (
                "0001_posts.sql",
                "CREATE TABLE posts (id INTEGER);\nINSERT INTO posts VALUES (1);",
            ),
            ("0002_more.sql", "INSERT INTO posts VALUES (2);"),
            ("README.md", "not a migration"),
        ]);
        // Several hosts that start at once.
        let hosts = (0..4).map(|_| place.open(Some(folder.path())));
        for host in futures::future::join_all(hosts).await {
            let host = host.unwrap_or_else(|error| panic!("{kind:?}: {error}"));
            let rows = query(&host, "SELECT id FROM posts ORDER BY id", &[]).await;
            assert_eq!(rows, [[Int64(1)], [Int64(2)]], "{kind:?}");
            host.close().await;
        }
        place.remove().await;
    }
}

#[tokio::test]
async fn bad_migrations_are_refused_with_their_file() {
    const FIRST: (&str, &str) = ("0001_first.sql", "CREATE TABLE t (id INTEGER);");
    /// Files that run, or the folder before; then files that are refused, and words of the message.
    type Case = (
        &'static [(&'static str, &'static str)],
        &'static [&'static str],
    );
    const CASES: &[Case] = &[
        (
            &[
                FIRST,
                ("0002_bad.sql", "SELECT 1;\n\nCREAT TABLE u (id INTEGER);"),
            ],
            &["0002_bad.sql", "CREAT"],
        ),
        (
            &[FIRST, ("2.sql", "SELECT 1;")],
            &["2.sql", "<number>_<what>.sql"],
        ),
        (
            &[FIRST, ("one_more.sql", "SELECT 1;")],
            &["one_more.sql", "<number>_<what>.sql"],
        ),
        (
            &[FIRST, ("1_again.sql", "SELECT 1;")],
            &["0001_first.sql", "1_again.sql", "same number"],
        ),
        (
            &[("0001_first.sql", "CREATE TABLE t (id BIGINT);")],
            &["0001_first.sql", "in a new one"],
        ),
        (&[], &["migration 1 was run", "no such file"]),
    ];
    for kind in [Kind::Sqlite, Kind::Postgres] {
        let place = Place::new(kind).await;
        let good = folder(&[FIRST]);
        place
            .open(Some(good.path()))
            .await
            .expect("a good migration")
            .close()
            .await;
        for (files, words) in CASES {
            let bad = folder(files);
            match place.open(Some(bad.path())).await.map(drop) {
                Err(StoreError::Refused(why)) => {
                    for word in *words {
                        assert!(why.contains(word), "{kind:?}: {why}");
                    }
                }
                other => panic!("{kind:?}: {files:?}: {other:?}"),
            }
        }
        let none = place
            .open(Some(Path::new("/nowhere/at/all")))
            .await
            .map(drop);
        assert!(matches!(none, Err(StoreError::Refused(_))), "{none:?}");
        // A migration that failed has left nothing, and no lock.
        let database = place
            .open(Some(good.path()))
            .await
            .expect("the good one again");
        assert!(query(&database, "SELECT id FROM t", &[]).await.is_empty());
        database.close().await;
        place.remove().await;
    }
}

#[tokio::test]
async fn postgresql_points_at_the_line() {
    let place = Place::new(Kind::Postgres).await;
    let bad = folder(&[("0001_bad.sql", "SELECT 'ü';\n\nCREAT TABLE u (id INTEGER);")]);
    match place.open(Some(bad.path())).await.map(drop) {
        Err(StoreError::Refused(why)) => assert!(why.contains("0001_bad.sql:3: "), "{why}"),
        other => panic!("{other:?}"),
    }
    place.remove().await;
}

#[tokio::test]
async fn who_is_away_is_unavailable_and_who_refuses_is_refused() {
    let server = url::Url::parse(&server("DATABASE_URL")).expect("a URL");
    let away = format!("postgres://nobody:geheim@127.0.0.1:{}/x", free_port());
    let mut unknown = server.clone();
    unknown.set_path("stagehost_test_of_nobody");
    let mut stranger = server.clone();
    stranger
        .set_username("stagehost_test_nobody")
        .expect("a URL with users");
    stranger
        .set_password(Some("geheim"))
        .expect("a URL with users");
    for (url, available) in [
        (away, false),
        (unknown.into(), true),
        (stranger.into(), true),
    ] {
        let opened = Database::connect(&SqlUrl::Postgres(url.clone()), None, 1, None).await;
        let why = match (opened.map(drop), available) {
            (Err(StoreError::Unavailable(why)), false) => why,
            (Err(StoreError::Refused(why)), true) => why,
            (other, _) => panic!("{url}: {other:?}"),
        };
        assert!(
            why.contains("PostgreSQL at ") && !why.contains("geheim"),
            "{why}"
        );
    }
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), "this is no database, however long it may be").expect("a disk");
    let opened = Database::connect(&SqlUrl::Sqlite(file.path().to_owned()), None, 1, None).await;
    assert!(matches!(opened.map(drop), Err(StoreError::Refused(_))));
}

fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, content) in files {
        std::fs::write(folder.path().join(name), content).expect("a disk");
    }
    folder
}
