//! Who waits for whom on one SQLite file.

use std::time::Duration;

use host::capability::sql::Error;
use host::delivery::progress::{Broken, Ledger, Mode, Transaction as _};
use host::pipeline::SqlAccess;

use super::Value::Int64;
use super::transactions::{INSERT, MODES, Owner, insert};
use super::{CONNECTIONS, Kind, Place, execute, on, query};

/// Well below what a statement waits for another's turn.
const AT_ONCE: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_without_statements_keeps_nobody_waiting() {
    let place = Place::new(Kind::Sqlite).await;
    let (here, there) = (place.open(None).await, place.open(None).await);
    let (here, there) = (here.expect("a database"), there.expect("a database"));
    let mut owner = Owner::new(&here).await;
    let mut idle = Vec::new();
    for _ in 0..3 * CONNECTIONS {
        for mode in MODES {
            let transaction = owner.begin(mode).await;
            transaction.savepoint().await.expect("a savepoint");
            idle.push(transaction);
        }
    }
    let work = async {
        for id in 0..5 {
            let transaction = owner.begin(Mode::Optimistic).await;
            assert_eq!(insert(&transaction, id).await, Ok(1));
            owner.commit(transaction).await.expect("a commit");
            execute(&here, INSERT, &[Int64(100 + id)]).await;
            // As another process does.
            execute(&there, INSERT, &[Int64(200 + id)]).await;
        }
    };
    tokio::time::timeout(AT_ONCE, work)
        .await
        .expect("nothing to wait for");
    // And each of them may still write.
    let last = idle.pop().expect("a transaction");
    assert_eq!(insert(&last, 300).await, Ok(1));
    owner.commit(last).await.expect("a commit");
    for transaction in idle {
        transaction.rollback().await;
    }
    assert_eq!(owner.numbers().await.len(), 16);
    here.close().await;
    there.close().await;
    place.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_has_only_read_keeps_no_writer_waiting_and_commits() {
    on(Kind::Sqlite, async |_, database| {
        let mut owner = Owner::new(&database).await;
        for mode in MODES {
            let transaction = owner.begin(mode).await;
            let count = async || {
                transaction
                    .query("SELECT count(*) FROM t", &[])
                    .await
                    .expect("a count")
                    .rows
            };
            let before = count().await;
            let row = [Int64(owner.commits)];
            let write = execute(&database, INSERT, &row);
            tokio::time::timeout(AT_ONCE, write)
                .await
                .expect("nothing to wait for");
            // All of it is of one moment.
            assert_eq!(count().await, before);
            owner.commit(transaction).await.expect("a commit");
        }
        let claim = database.reclaim(&owner.lane, owner.epoch).await;
        assert_eq!(claim.expect("an answer").expect("its own row").commits, 2);
    })
    .await;
}

/// Nothing that somebody else has written since is overwritten unseen; the lane runs its batch again.
#[tokio::test(flavor = "multi_thread")]
async fn who_reads_and_then_writes_what_others_have_changed_runs_again() {
    for here_too in [true, false] {
        let place = Place::new(Kind::Sqlite).await;
        let (here, there) = (place.open(None).await, place.open(None).await);
        let (here, there) = (here.expect("a database"), there.expect("a database"));
        let mut owner = Owner::new(&here).await;
        execute(&here, "CREATE TABLE counter (n BIGINT)", &[]).await;
        execute(&here, "INSERT INTO counter VALUES (0)", &[]).await;
        const READ: &str = "SELECT n FROM counter";
        const WRITE: &str = "UPDATE counter SET n = $1";
        for mode in MODES {
            // A stage that nothing is known of yet.
            owner.database = here.granted(SqlAccess::Data);
            let transaction = owner.begin(mode).await;
            let read = transaction.query(READ, &[]).await.expect("a row").rows;
            let Int64(n) = read[0][0] else {
                panic!("{read:?}")
            };
            let other = if here_too { &here } else { &there };
            execute(other, WRITE, &[Int64(n + 1)]).await;
            let stale = transaction.execute(WRITE, &[Int64(n + 1)]).await;
            assert!(matches!(stale, Err(Error::Unavailable(_))), "{stale:?}");
            assert_eq!(transaction.broken(), Some(Broken::Contended));
            transaction.rollback().await;
            // Now nobody can be in the way.
            let transaction = owner.begin(Mode::Exclusive).await;
            let read = transaction.query(READ, &[]).await.expect("a row").rows;
            assert_eq!(read, [[Int64(n + 1)]]);
            assert_eq!(transaction.execute(WRITE, &[Int64(n + 2)]).await, Ok(1));
            owner.commit(transaction).await.expect("a commit");
            // The stage's next ones do so with their first statement.
            let transaction = owner.begin(mode).await;
            assert!(transaction.query(READ, &[]).await.is_ok());
            let other = tokio::spawn({
                let other = other.clone();
                async move { other.execute(WRITE, &[Int64(0)]).await }
            });
            tokio::time::sleep(Duration::from_millis(200)).await;
            assert_eq!(transaction.execute(WRITE, &[Int64(n + 2)]).await, Ok(1));
            owner.commit(transaction).await.expect("a commit");
            assert_eq!(other.await.expect("an answer"), Ok(1));
            execute(&here, WRITE, &[Int64(n + 2)]).await;
        }
        assert_eq!(query(&here, READ, &[]).await, [[Int64(4)]]);
        here.close().await;
        there.close().await;
        place.remove().await;
    }
}

/// However long another keeps its turn, who waits for it has lost nothing, and is not at fault.
#[tokio::test(flavor = "multi_thread")]
async fn who_waits_in_vain_for_a_turn_to_write_runs_again() {
    on(Kind::Sqlite, async |_, database| {
        let mut owner = Owner::new(&database).await;
        let holder = owner.begin(Mode::Optimistic).await;
        assert_eq!(insert(&holder, 1).await, Ok(1));
        // Its own deadline comes first.
        let waiting = owner.begin(Mode::Optimistic).await;
        let given_up = tokio::time::timeout(Duration::from_millis(300), insert(&waiting, 2)).await;
        assert!(given_up.is_err(), "{given_up:?}");
        assert_eq!(waiting.broken(), Some(Broken::Contended));
        waiting.rollback().await;
        // The host's patience does.
        let waiting = owner.begin(Mode::Careful).await;
        let in_vain = insert(&waiting, 2).await;
        assert!(matches!(in_vain, Err(Error::Unavailable(_))), "{in_vain:?}");
        assert_eq!(waiting.broken(), Some(Broken::Contended));
        waiting.rollback().await;
        let next = database.begin(Mode::Exclusive);
        tokio::pin!(next);
        assert!(
            tokio::time::timeout(Duration::from_millis(300), &mut next)
                .await
                .is_err()
        );
        holder.rollback().await;
        let transaction = next.await.expect("a transaction");
        assert_eq!(insert(&transaction, 2).await, Ok(1));
        owner.commit(transaction).await.expect("a commit");
        assert_eq!(owner.numbers().await, [2]);
    })
    .await;
}
