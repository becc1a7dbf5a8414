//! Statements that ask for more than they may have.

use std::time::{Duration, Instant};

use host::capability::sql::{Database, Error, MAX_ANSWER_BYTES, MAX_ANSWER_ROWS};
use host::delivery::progress::{Broken, Mode, Transaction as _};

use super::Value::Int64;
use super::transactions::{MODES, Owner, insert};
use super::{Kind, on, query};

/// Rows without an end, of which nobody asked for one.
const ENDLESS: &str = "SELECT generate_series(1, 10000000000)";
/// A value that is not even read.
const HUGE: &str = "SELECT repeat('x', 200000000)";
/// One that is thrown away as it comes.
const LARGE: &str = "SELECT repeat('x', 30000000)";

/// What a deadline would end: a wait that others' work is done in.
async fn beside<T>(database: &Database, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    let mut longest = Duration::ZERO;
    loop {
        let began = Instant::now();
        tokio::select! {
            biased;
            rows = query(database, "SELECT 7", &[]) => assert_eq!(rows, [[Int64(7)]]),
            done = &mut work => {
                assert!(longest < Duration::from_secs(2), "{longest:?}");
                return done;
            }
        }
        longest = longest.max(began.elapsed());
    }
}

/// On one thread, so that a statement which keeps it keeps all.
#[tokio::test]
async fn rows_that_nobody_asked_for_have_the_bounds_of_an_answer() {
    on(Kind::Postgres, async |_, database| {
        let most = format!("SELECT generate_series(1, {MAX_ANSWER_ROWS})");
        let counted = database.execute(&most, &[]).await;
        assert_eq!(counted, Ok(MAX_ANSWER_ROWS as u64));
        let endless = beside(&database, database.execute(ENDLESS, &[])).await;
        assert_eq!(endless, Err(Error::TooLarge(MAX_ANSWER_BYTES as u64)));
        let lists = [vec![], vec![]];
        let endless = beside(&database, database.execute_many(ENDLESS, &lists)).await;
        assert_eq!(endless, Err(Error::TooLarge(MAX_ANSWER_BYTES as u64)));
        nothing_runs(&database).await;
    })
    .await;
}

/// The server is left, and soon sees it.
async fn nothing_runs(database: &Database) {
    const RUNNING: &str = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                           AND state = 'active' AND pid <> pg_backend_pid()";
    let began = Instant::now();
    while query(database, RUNNING, &[]).await != [[Int64(0)]] {
        assert!(began.elapsed() < Duration::from_secs(20), "it runs on");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn a_deadline_ends_a_statement_that_answers_without_end() {
    on(Kind::Postgres, async |_, database| {
        for _ in 0..3 {
            let began = Instant::now();
            let endless = database.execute(ENDLESS, &[]);
            // Whichever bound is met first.
            let _ = tokio::time::timeout(Duration::from_millis(50), endless).await;
            assert!(began.elapsed() < Duration::from_secs(2));
        }
        nothing_runs(&database).await;
    })
    .await;
}

#[tokio::test]
async fn a_value_that_is_much_too_large_is_not_read() {
    on(Kind::Postgres, async |_, database| {
        let too_large = || Err(Error::TooLarge(MAX_ANSWER_BYTES as u64));
        let answer = beside(&database, database.query(HUGE, &[])).await;
        assert_eq!(answer.map(drop), too_large());
        assert_eq!(database.execute(HUGE, &[]).await.map(drop), too_large());
        let owner = Owner::new(&database).await;
        for mode in MODES {
            let transaction = owner.begin(mode).await;
            assert_eq!(insert(&transaction, 1).await, Ok(1));
            assert_eq!(transaction.query(HUGE, &[]).await.map(drop), too_large());
            let broken = transaction.broken();
            assert!(matches!(broken, Some(Broken::Connection(_))), "{broken:?}");
            transaction.rollback().await;
        }
        assert!(owner.numbers().await.is_empty());
    })
    .await;
}

/// What can be passed over costs its statement, and not the transaction.
#[tokio::test]
async fn a_value_that_is_too_large_is_passed_over() {
    on(Kind::Postgres, async |_, database| {
        let mut owner = Owner::new(&database).await;
        let transaction = owner.begin(Mode::Careful).await;
        let answer = transaction.query(LARGE, &[]).await.map(drop);
        assert_eq!(answer, Err(Error::TooLarge(MAX_ANSWER_BYTES as u64)));
        assert_eq!(transaction.broken(), None);
        assert_eq!(insert(&transaction, 1).await, Ok(1));
        let committed = owner.commit(transaction).await;
        assert!(committed.is_ok(), "{committed:?}");
        assert_eq!(owner.numbers().await, [1]);
    })
    .await;
}

/// What the server says of a value quotes it.
#[tokio::test]
async fn long_words_of_the_server_are_cut() {
    on(Kind::Postgres, async |_, database| {
        let long = super::text(&"x".repeat(1_000_000));
        match database.query("SELECT $1::text::int", &[long]).await {
            Err(Error::Database(error)) => {
                assert_eq!(error.sqlstate.as_deref(), Some("22P02"));
                assert!(error.message.len() < 10_000, "{}", error.message.len());
            }
            other => panic!("{other:?}"),
        }
    })
    .await;
}
