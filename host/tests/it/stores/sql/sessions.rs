//! What a call may leave behind for those that use its connection after it: nothing.

use std::time::Duration;

use host::capability::sql::{Database, Error, MAX_ANSWER_BYTES};
use host::delivery::progress::{Mode, Transaction as _};

use super::Value::{Boolean, Int64};
use super::grants::is_refused;
use super::transactions::Owner;
use super::{CONNECTIONS, Kind, execute, on, on_each, query, text};

/// Whatever would outlive a call is refused, however it is written.
#[tokio::test]
async fn nothing_is_left_in_a_session_of_postgresql() {
    const LEAVING: &[&str] = &[
        "SELECT set_config('stagehost.test', 'mine', false)",
        "SELECT pg_catalog.\"set_config\" ('statement_timeout', '12s', false)",
        "WITH it AS (SELECT pg_advisory_lock(7)) SELECT 1 FROM it",
        "SELECT 1 AS id INTO TEMP mine",
        "CREATE TEMP TABLE mine (id int)",
        "CREATE TABLE pg_temp.mine (id int)",
        "EXPLAIN ANALYZE SELECT set_config('search_path', 'mine', false)",
        "UPDATE pg_settings SET setting = 'mine' WHERE name = 'search_path'",
        "SELECT U&\"set\\005fconfig\"('search_path', 'mine', false)",
        "SELECT E'\\'', set_config('search_path', 'mine', false) --'",
        "SELECT query_to_xml('SELECT set_config(''search_path'', ''mine'', false)', true, true, '')",
        "CREATE FUNCTION leave() RETURNS text LANGUAGE sql AS $$SELECT set_config('search_path', 'mine', false)$$",
        "DO $$ BEGIN PERFORM set_config('search_path', 'mine', false); END $$",
        "SET search_path = mine",
        "LISTEN mine",
        "PREPARE mine AS SELECT 1",
        "DEALLOCATE ALL",
        "DECLARE mine CURSOR WITH HOLD FOR SELECT 1",
    ];
    const CLEAN: &str = "SELECT coalesce(current_setting('stagehost.test', true), '') = '' \
                         AND current_setting('statement_timeout') = '30s' \
                         AND current_setting('search_path') <> 'mine' \
                         AND to_regclass('mine') IS NULL \
                         AND NOT EXISTS (SELECT FROM pg_locks \
                                         WHERE locktype = 'advisory' AND pid = pg_backend_pid())";
    on(Kind::Postgres, async |_, database| {
        let owner = Owner::new(&database).await;
        for statement in LEAVING {
            is_refused(&database.execute(statement, &[]).await, statement);
            let many = database.execute_many(statement, &[vec![]]).await;
            is_refused(&many, statement);
            let transaction = owner.begin(Mode::Optimistic).await;
            let within = transaction.execute(statement, &[]).await;
            is_refused(&within, statement);
            assert_eq!(transaction.broken(), None, "it was not begun: {statement}");
            transaction.rollback().await;
            let all = (0..CONNECTIONS).map(|_| query(&database, CLEAN, &[]));
            for rows in futures::future::join_all(all).await {
                assert_eq!(rows, [[Boolean(true)]], "{statement}");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn postgresql_ends_what_nobody_waits_for() {
    const POLLS: usize = 100;
    const RUNNING: &str = "SELECT count(*) FROM pg_stat_activity \
                           WHERE datname = current_database() AND query LIKE '%pg_sleep(25)' \
                           AND pid <> pg_backend_pid()";
    on(Kind::Postgres, async |_, database| {
        give_up(&database, "SELECT pg_sleep(25)").await;
        let mut running = query(&database, RUNNING, &[]).await;
        for _ in 0..POLLS {
            if running == [[Int64(0)]] {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            running = query(&database, RUNNING, &[]).await;
        }
        assert_eq!(running, [[Int64(0)]]);
    })
    .await;
}

#[tokio::test]
async fn sqlite_ends_what_nobody_waits_for() {
    on(Kind::Sqlite, async |_, database| {
        execute(&database, "CREATE TABLE t (id INTEGER)", &[]).await;
        let endless = "INSERT INTO t WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i FROM n) \
                       SELECT count(*) FROM n";
        give_up(&database, endless).await;
        // It held the write lock.
        execute(&database, "INSERT INTO t VALUES (1)", &[]).await;
        assert_eq!(
            query(&database, "SELECT id FROM t", &[]).await,
            [[Int64(1)]]
        );
    })
    .await;
}

async fn give_up(database: &Database, statement: &str) {
    let slow = database.execute(statement, &[]);
    let given_up = tokio::time::timeout(Duration::from_millis(200), slow).await;
    assert!(given_up.is_err(), "{given_up:?}");
}

#[tokio::test]
async fn values_that_no_answer_could_carry() {
    on_each(async |kind, database| {
        let big = match kind {
            Kind::Postgres => "SELECT repeat('x', $1::int4)",
            Kind::Sqlite => "SELECT zeroblob($1)",
        };
        let answer = database
            .query(big, &[Int64(MAX_ANSWER_BYTES as i64 + 1)])
            .await;
        match (kind, answer) {
            (Kind::Postgres, Err(Error::TooLarge(_))) => {}
            (Kind::Sqlite, Err(Error::Database(error))) => {
                assert_eq!(error.sqlstate.as_deref(), Some("54000"), "{error:?}");
            }
            (_, other) => panic!("{kind:?}: {:?}", other.map(|rows| rows.rows.len())),
        }
        let small = query(&database, "SELECT $1", &[text("x")]).await;
        assert_eq!(small, [[text("x")]], "{kind:?}");
    })
    .await;
}
