//! What is left of a transaction after a statement, or a commit, that failed.

use std::time::Duration;

use host::capability::sql::{Database, Error, Transaction};
use host::delivery::progress::{Broken, CommitError, Ledger, Mode, Transaction as _};
use host::pipeline::SqlUrl;
use sqlx::{ConnectOptions, Executor};

use super::Value::Int64;
use super::transactions::{INSERT, MODES, Owner, insert, is_violation};
use super::{Kind, Place, admin, execute, on, on_each, query};

#[track_caller]
fn is_lost(transaction: &Transaction) {
    let broken = transaction.broken();
    assert!(matches!(broken, Some(Broken::Connection(_))), "{broken:?}");
}

#[tokio::test]
async fn a_failed_statement_costs_itself_or_the_optimistic_transaction() {
    on_each(async |kind, database| {
        let mut owner = Owner::new(&database).await;
        execute(&database, INSERT, &[Int64(0)]).await;
        let many = [vec![Int64(5)], vec![Int64(6)], vec![Int64(0)]];
        for mode in MODES {
            let transaction = owner.begin(mode).await;
            assert_eq!(insert(&transaction, 1).await, Ok(1));
            is_violation(&insert(&transaction, 0).await);
            if kind == Kind::Postgres && mode == Mode::Optimistic {
                assert_eq!(transaction.broken(), Some(Broken::Statement));
                let next = insert(&transaction, 2).await;
                assert!(matches!(next, Err(Error::Unavailable(_))), "{next:?}");
                assert_eq!(transaction.statements(), 2);
                transaction.rollback().await;
                let transaction = owner.begin(mode).await;
                is_violation(&transaction.execute_many(INSERT, &many).await);
                assert_eq!(transaction.broken(), Some(Broken::Statement));
                transaction.rollback().await;
                assert_eq!(owner.numbers().await, [0]);
                continue;
            }
            assert_eq!(transaction.broken(), None, "{kind:?}");
            is_violation(&transaction.execute_many(INSERT, &many).await);
            assert_eq!(transaction.execute_many(INSERT, &many[..1]).await, Ok(1));
            assert_eq!(transaction.execute_many(INSERT, &[]).await, Ok(0));
            let wrong = transaction.query("SELEC 1", &[]).await;
            assert!(matches!(wrong, Err(Error::Database(_))), "{wrong:?}");
            assert_eq!(insert(&transaction, 2).await, Ok(1), "{kind:?}");
            assert_eq!(transaction.broken(), None, "{kind:?}");
            let committed = owner.commit(transaction).await;
            assert!(committed.is_ok(), "{kind:?}: {committed:?}");
            assert_eq!(owner.numbers().await, [0, 1, 2, 5], "{kind:?}");
            execute(&database, "DELETE FROM t WHERE id > 0", &[]).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_statement_that_is_given_up_takes_the_transaction_with_it() {
    for kind in [Kind::Sqlite, Kind::Postgres] {
        let place = Place::new(kind).await;
        // One transaction at a time, so that the next shows that the turn and the lock are given back.
        let database = Database::connect(&place.url, None, 2, None).await;
        let database = database.expect("a database");
        let owner = Owner::new(&database).await;
        let endless = match kind {
            Kind::Postgres => "SELECT pg_sleep(60)",
            Kind::Sqlite => {
                "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT count(*) FROM n"
            }
        };
        for mode in MODES {
            let transaction = owner.begin(mode).await;
            assert_eq!(insert(&transaction, 1).await, Ok(1), "{kind:?}");
            let slow = transaction.query(endless, &[]);
            let given_up = tokio::time::timeout(Duration::from_millis(200), slow).await;
            assert!(given_up.is_err(), "{given_up:?}");
            is_lost(&transaction);
            let next = insert(&transaction, 2).await;
            assert!(matches!(next, Err(Error::Unavailable(_))), "{next:?}");
            let next = tokio::time::timeout(Duration::from_secs(5), owner.begin(mode)).await;
            next.expect("a turn").rollback().await;
            transaction.rollback().await;
        }
        assert!(owner.numbers().await.is_empty(), "{kind:?}");
        database.close().await;
        place.remove().await;
    }
}

#[tokio::test]
async fn a_session_that_the_server_ends_is_lost() {
    on(Kind::Postgres, async |_, database| {
        let mut owner = Owner::new(&database).await;
        const PID: &str = "SELECT pg_backend_pid()::bigint";
        let end = async |transaction: &Transaction| {
            let pid = transaction.query(PID, &[]).await.expect("a session").rows;
            let [Int64(pid)] = pid[0][..] else {
                panic!("{pid:?}")
            };
            admin(&format!("SELECT pg_terminate_backend({pid})")).await;
        };
        for mode in MODES {
            let transaction = owner.begin(mode).await;
            end(&transaction).await;
            let answer = insert(&transaction, 1).await;
            assert!(matches!(answer, Err(Error::Unavailable(_))), "{answer:?}");
            is_lost(&transaction);
        }
        let transaction = owner.begin(Mode::Optimistic).await;
        end(&transaction).await;
        let commit = owner.commit(transaction).await;
        assert!(
            matches!(commit, Err(CommitError::Unanswered(_))),
            "{commit:?}"
        );
        let claim = database.reclaim(&owner.lane, owner.epoch).await;
        assert_eq!(claim.expect("an answer").expect("a claim").commits, 0);
    })
    .await;
}

/// The guest learns of it only where it costs nothing but the statement.
#[tokio::test]
async fn timeouts_and_deadlocks_of_the_server_cost_a_statement() {
    let place = Place::new(Kind::Postgres).await;
    let database = place.open(None).await.expect("a new database");
    let owner = Owner::new(&database).await;
    execute(&database, INSERT, &[Int64(0)]).await;
    for limit in ["lock_timeout", "statement_timeout"] {
        let limited = place.with_option(&format!("-c {limit}=50ms")).await;
        for mode in MODES {
            let holding = owner.begin(Mode::Optimistic).await;
            let delete = "DELETE FROM t WHERE id = 0";
            assert_eq!(holding.execute(delete, &[]).await, Ok(1));
            let transaction = limited.begin(mode).await.expect("a transaction");
            let answer = transaction.execute(delete, &[]).await;
            assert!(matches!(answer, Err(Error::Unavailable(_))), "{answer:?}");
            match mode {
                Mode::Optimistic => assert_eq!(transaction.broken(), Some(Broken::Statement)),
                Mode::Careful | Mode::Exclusive => {
                    assert_eq!(transaction.broken(), None);
                    assert_eq!(insert(&transaction, 1).await, Ok(1));
                }
            }
            transaction.rollback().await;
            holding.rollback().await;
        }
        limited.close().await;
    }
    database.close().await;
    place.remove().await;
}

/// A plan that is out of date is no fault of the message's.
#[tokio::test]
async fn stale_plans_are_made_anew() {
    let place = Place::new(Kind::Postgres).await;
    let (database, other) = (
        Database::connect(&place.url, None, 1, None)
            .await
            .expect("a database"),
        place.open(None).await.expect("a database"),
    );
    let owner = Owner::new(&database).await;
    const ALL: &str = "SELECT * FROM t";
    let ask = async |transaction: &Transaction| {
        transaction
            .query(ALL, &[])
            .await
            .map(|answer| answer.columns.len())
    };
    let add = async |column: &str| {
        execute(
            &other,
            &format!("ALTER TABLE t ADD COLUMN {column} TEXT"),
            &[],
        )
        .await;
    };
    let transaction = owner.begin(Mode::Optimistic).await;
    assert_eq!(ask(&transaction).await, Ok(1));
    transaction.rollback().await;
    add("a").await;
    let transaction = owner.begin(Mode::Optimistic).await;
    let stale = ask(&transaction).await;
    assert!(matches!(stale, Err(Error::Unavailable(_))), "{stale:?}");
    assert_eq!(transaction.broken(), Some(Broken::Statement));
    transaction.rollback().await;
    let transaction = owner.begin(Mode::Optimistic).await;
    assert_eq!(ask(&transaction).await, Ok(2));
    transaction.rollback().await;
    add("b").await;
    let transaction = owner.begin(Mode::Careful).await;
    assert_eq!(ask(&transaction).await, Ok(3));
    assert_eq!(transaction.broken(), None);
    transaction.rollback().await;
    database.close().await;
    other.close().await;
    place.remove().await;
}

/// An answer that can't be carried is the statement's failure: nothing of it stays.
#[tokio::test]
async fn answers_beyond_the_limit_undo_their_statement() {
    on_each(async |kind, database| {
        let owner = Owner::new(&database).await;
        let (large, write) = match kind {
            Kind::Postgres => ("SELECT repeat('x', 9000000) FROM generate_series(1, 3)", "repeat('x', 9000000)"),
            Kind::Sqlite => (
                "SELECT hex(zeroblob(4500000)) FROM (SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3)",
                "hex(zeroblob(4500000))",
            ),
        };
        let write = format!("INSERT INTO t VALUES (1), (2), (3) RETURNING id, {write}");
        for mode in MODES {
            for (statement, reads) in [(large, true), (&write, false)] {
                let transaction = owner.begin(mode).await;
                let answer = transaction.query(statement, &[]).await;
                let answer = answer.map(|rows| rows.rows.len());
                assert!(matches!(answer, Err(Error::TooLarge(_))), "{kind:?}: {answer:?}");
                let goes_on = mode == Mode::Careful || (kind == Kind::Sqlite && reads);
                let broken = (!goes_on).then_some(Broken::Statement);
                assert_eq!(transaction.broken(), broken, "{kind:?}: {mode:?}");
                if goes_on {
                    let count = transaction.query("SELECT count(*) FROM t", &[]).await;
                    assert_eq!(count.map(|rows| rows.rows), Ok(vec![vec![Int64(0)]]), "{kind:?}");
                }
                transaction.rollback().await;
            }
        }
    })
    .await;
}

/// However SQLite comes to end a transaction by itself, nothing after it commits by itself.
#[tokio::test]
async fn a_transaction_that_sqlite_ends_is_lost() {
    let place = Place::new(Kind::Sqlite).await;
    let database = place.open(None).await.expect("a new database");
    let owner = Owner::new(&database).await;
    let SqlUrl::Sqlite(file) = &place.url else {
        panic!("not SQLite");
    };
    // No stage may make this, but a migration may.
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(file);
    let mut connection = options.connect().await.expect("the file");
    let made = connection.execute(
        "CREATE TRIGGER no_more BEFORE INSERT ON t WHEN new.id > 9 BEGIN SELECT RAISE(ROLLBACK, 'too many'); END; \
         CREATE TABLE u (id BIGINT UNIQUE ON CONFLICT ROLLBACK)",
    );
    made.await.expect("a trigger and a table");
    for mode in MODES {
        for (statement, lists) in [(INSERT, [1, 10]), ("INSERT INTO u VALUES ($1)", [1, 1])] {
            let lists = lists.map(|id| vec![Int64(id)]);
            let transaction = owner.begin(mode).await;
            for params in &lists[..1] {
                assert_eq!(transaction.execute(statement, params).await, Ok(1));
            }
            let ended = transaction.execute(statement, &lists[1]).await;
            assert!(matches!(ended, Err(Error::Database(_))), "{ended:?}");
            is_lost(&transaction);
            let next = insert(&transaction, 2).await;
            assert!(matches!(next, Err(Error::Unavailable(_))), "{next:?}");
            drop(transaction);

            let transaction = owner.begin(mode).await;
            let ended = transaction.execute_many(statement, &lists).await;
            assert!(matches!(ended, Err(Error::Database(_))), "{ended:?}");
            is_lost(&transaction);
        }
    }
    let both = "SELECT (SELECT count(*) FROM t), (SELECT count(*) FROM u)";
    assert_eq!(query(&database, both, &[]).await, [[Int64(0), Int64(0)]]);
    database.close().await;
}

#[tokio::test]
async fn a_deferred_constraint_refuses_the_commit() {
    on_each(async |kind, database| {
        let mut owner = Owner::new(&database).await;
        let child =
            "CREATE TABLE child (id BIGINT REFERENCES t (id) DEFERRABLE INITIALLY DEFERRED)";
        execute(&database, child, &[]).await;
        let child = "INSERT INTO child VALUES (1)";
        let transaction = owner.begin(Mode::Optimistic).await;
        assert_eq!(transaction.execute(child, &[]).await, Ok(1), "{kind:?}");
        match owner.commit(transaction).await {
            Err(CommitError::Refused(why)) => {
                assert!(
                    why.to_lowercase().contains("foreign key"),
                    "{kind:?}: {why}"
                );
            }
            other => panic!("{kind:?}: {other:?}"),
        }
        let claim = database.reclaim(&owner.lane, owner.epoch).await;
        let claim = claim.expect("an answer").expect("a claim");
        assert_eq!(claim.commits, 0, "{kind:?}");
        owner.epoch = claim.epoch;
        let transaction = owner.begin(Mode::Optimistic).await;
        assert_eq!(transaction.execute(child, &[]).await, Ok(1), "{kind:?}");
        assert_eq!(insert(&transaction, 1).await, Ok(1), "{kind:?}");
        let committed = owner.commit(transaction).await;
        assert!(committed.is_ok(), "{kind:?}: {committed:?}");
    })
    .await;
}
