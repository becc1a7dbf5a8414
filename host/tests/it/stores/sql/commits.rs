//! Commits on the wire: what they cost, and what is known when no answer comes.

use host::capability::sql::Database;
use host::delivery::progress::{CommitError, Ledger, Mode};

use super::Value::Int64;
use super::proxy::{Cut, Proxy};
use super::transactions::Owner;
use super::{Kind, Place};

/// Bind, Execute, Sync: a statement that the server knows already.
const STATEMENT: &str = "BES";
/// The same behind BEGIN, of which the server does nothing if that fails.
const FIRST_STATEMENT: &str = "PBEBES";

/// The happy path pays for the stage's statements, and the progress and COMMIT, which go out together, and no more.
#[tokio::test]
async fn a_batch_costs_two_trips_beside_its_statements() {
    let place = Place::new(Kind::Postgres).await;
    let (proxy, url) = Proxy::before(&place.url).await;
    // One connection, so that it knows the statements from the first round.
    let database = Database::connect(&url, None, 1, None)
        .await
        .expect("a database");
    let mut owner = Owner::new(&database).await;
    for round in 0..3 {
        proxy.take_trips();
        let transaction = owner.begin(Mode::Optimistic).await;
        for id in 0..4 {
            let id = Int64(10 * round + id);
            let inserted = transaction
                .execute("INSERT INTO t VALUES ($1)", &[id])
                .await;
            assert_eq!(inserted, Ok(1));
        }
        let none = transaction
            .query("SELECT id FROM t WHERE id < 0", &[])
            .await;
        assert!(none.is_ok(), "{none:?}");
        owner.commit(transaction).await.expect("a commit");
        let trips = proxy.take_trips();
        if round == 0 {
            continue;
        }
        let statement = STATEMENT;
        let expected = [
            FIRST_STATEMENT,
            statement,
            statement,
            statement,
            statement,
            statement,
            "COMMIT",
        ];
        assert_eq!(trips, expected);
    }
    database.close().await;
    place.remove().await;
}

#[tokio::test]
async fn a_commit_without_an_answer_is_looked_up() {
    let place = Place::new(Kind::Postgres).await;
    let (proxy, url) = Proxy::before(&place.url).await;
    let database = Database::connect(&url, None, 4, None)
        .await
        .expect("a database");
    let mut owner = Owner::new(&database).await;
    for (at, cut) in [Cut::AfterCommit, Cut::BeforeCommit, Cut::AfterCommit]
        .into_iter()
        .enumerate()
    {
        let transaction = owner.begin(Mode::Optimistic).await;
        let id = Int64(at as i64);
        let inserted = transaction
            .execute("INSERT INTO t VALUES ($1)", std::slice::from_ref(&id))
            .await;
        assert_eq!(inserted, Ok(1));
        proxy.cut(cut);
        let unanswered = owner.commit(transaction).await;
        assert!(
            matches!(unanswered, Err(CommitError::Unanswered(_))),
            "{cut:?}: {unanswered:?}"
        );
        let claim = database.reclaim(&owner.lane, owner.epoch).await;
        let claim = claim.expect("an answer").expect("a claim");
        let happened = cut == Cut::AfterCommit;
        owner.commits += i64::from(happened);
        owner.epoch = claim.epoch;
        assert_eq!(claim.commits, owner.commits, "{cut:?}");
        let count = "SELECT count(*) FROM t WHERE id = $1";
        let rows = database.query(count, &[id]).await.expect("a count").rows;
        assert_eq!(rows, [[Int64(i64::from(happened))]], "{cut:?}");
    }
    database.close().await;
    place.remove().await;
}
