//! What a stage's statements do in a transaction of the host.

use std::time::Duration;

use host::capability::Action;
use host::capability::sql::{Database, Error, Transaction};
use host::delivery::progress::{
    Checkpoint, Commit, CommitError, LaneId, Ledger, Mode, Transaction as _,
};

use super::Value::{Int64, Text};
use super::progress::{checkpoint, lane};
use super::{CONNECTIONS, Kind, Place, Value, execute, on_each, query, text};

pub(super) const INSERT: &str = "INSERT INTO t VALUES ($1)";
pub(super) const MODES: [Mode; 2] = [Mode::Optimistic, Mode::Careful];

/// A lane that is claimed, beside a table `t` of unique numbers.
pub(super) struct Owner {
    pub(super) database: Database,
    pub(super) lane: LaneId,
    pub(super) epoch: i64,
    pub(super) generation: i64,
    pub(super) commits: i64,
}

impl Owner {
    pub(super) async fn new(database: &Database) -> Self {
        database.prepare_progress().await.expect("a new table");
        execute(database, "CREATE TABLE t (id BIGINT PRIMARY KEY)", &[]).await;
        let lane = lane();
        let claim = database.claim(&lane).await.expect("a claim");
        Self {
            database: database.clone(),
            lane,
            epoch: claim.epoch,
            generation: claim.generation,
            commits: 0,
        }
    }

    pub(super) async fn begin(&self, mode: Mode) -> Transaction {
        self.database.begin(mode).await.expect("a transaction")
    }

    pub(super) async fn commit(&mut self, transaction: Transaction) -> Result<(), CommitError> {
        let state = checkpoint(self.commits);
        let commit = self.commit_of(self.commits + 1, &state);
        transaction.commit(commit).await?;
        self.commits += 1;
        Ok(())
    }

    /// A commit by its claim.
    pub(super) fn commit_of<'a>(&'a self, commits: i64, checkpoint: &'a Checkpoint) -> Commit<'a> {
        Commit {
            lane: &self.lane,
            epoch: self.epoch,
            generation: self.generation,
            commits,
            checkpoint,
        }
    }

    pub(super) async fn numbers(&self) -> Vec<i64> {
        let rows = query(&self.database, "SELECT id FROM t ORDER BY id", &[]).await;
        let number = |row: &Vec<Value>| match row[..] {
            [Int64(number)] => number,
            _ => panic!("{row:?}"),
        };
        rows.iter().map(number).collect()
    }
}

pub(super) async fn insert(transaction: &Transaction, id: i64) -> Result<u64, Error> {
    transaction.execute(INSERT, &[Int64(id)]).await
}

#[track_caller]
pub(super) fn is_violation<T: std::fmt::Debug>(answer: &Result<T, Error>) {
    match answer {
        Err(Error::Database(error)) if error.sqlstate.as_deref() == Some("23505") => {}
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn effects_and_progress_are_committed_together_or_not_at_all() {
    on_each(async |kind, database| {
        let mut owner = Owner::new(&database).await;
        for (at, mode) in MODES.into_iter().enumerate() {
            let id = 10 * at as i64;
            let transaction = owner.begin(mode).await;
            assert_eq!(insert(&transaction, id).await, Ok(1), "{kind:?}");
            let clone = transaction.clone();
            let seen = clone
                .query("SELECT count(*) FROM t WHERE id = $1", &[Int64(id)])
                .await;
            assert_eq!(
                seen.map(|seen| seen.rows),
                Ok(vec![vec![Int64(1)]]),
                "{kind:?}"
            );
            assert!(
                !owner.numbers().await.contains(&id),
                "{kind:?}: nobody else sees it"
            );
            assert_eq!((transaction.statements(), transaction.broken()), (2, None));
            let committed = owner.commit(transaction).await;
            assert!(committed.is_ok(), "{kind:?}: {committed:?}");
            assert!(owner.numbers().await.contains(&id), "{kind:?}");
            let late = insert(&clone, id + 1).await;
            assert!(matches!(late, Err(Error::Unavailable(_))), "{late:?}");

            let transaction = owner.begin(mode).await;
            assert_eq!(insert(&transaction, id + 2).await, Ok(1), "{kind:?}");
            transaction.rollback().await;
            let transaction = owner.begin(mode).await;
            assert_eq!(insert(&transaction, id + 3).await, Ok(1), "{kind:?}");
            drop(transaction);
        }
        let transaction = owner.begin(Mode::Optimistic).await;
        assert_eq!(transaction.statements(), 0);
        transaction.rollback().await;
        let claim = database.claim(&owner.lane).await.expect("a claim");
        assert_eq!(claim.commits, 2, "{kind:?}");
        assert_eq!(claim.checkpoint, checkpoint(1), "{kind:?}");
        assert_eq!(owner.numbers().await, [0, 10], "{kind:?}");
    })
    .await;
}

/// Two hosts, each with its own pool.
#[tokio::test]
async fn who_has_lost_the_lane_commits_nothing() {
    for kind in [Kind::Sqlite, Kind::Postgres] {
        let place = Place::new(kind).await;
        let (here, there) = (place.open(None).await, place.open(None).await);
        let (here, there) = (here.expect("a database"), there.expect("a database"));
        let mut owner = Owner::new(&here).await;
        let zombie = match kind {
            Kind::Postgres => {
                let transaction = owner.begin(Mode::Optimistic).await;
                assert_eq!(insert(&transaction, 1).await, Ok(1));
                let claim = there.claim(&owner.lane).await.expect("a claim");
                assert_eq!(claim.epoch, owner.epoch + 1);
                transaction
            }
            // The file has one writer.
            Kind::Sqlite => {
                there.claim(&owner.lane).await.expect("a claim");
                let transaction = owner.begin(Mode::Optimistic).await;
                assert_eq!(insert(&transaction, 1).await, Ok(1));
                transaction
            }
        };
        let fenced = owner.commit(zombie).await;
        assert!(
            matches!(fenced, Err(CommitError::Fenced)),
            "{kind:?}: {fenced:?}"
        );
        assert!(owner.numbers().await.is_empty(), "{kind:?}");
        // Its connection is good for others.
        let transaction = owner.begin(Mode::Optimistic).await;
        assert_eq!(insert(&transaction, 2).await, Ok(1));
        transaction.rollback().await;
        here.close().await;
        there.close().await;
        place.remove().await;
    }
}

/// What the host refuses, or can't encode, is no statement.
#[tokio::test]
async fn what_is_never_sent_harms_nothing() {
    on_each(async |kind, database| {
        let mut owner = Owner::new(&database).await;
        for mode in MODES {
            let transaction = owner.begin(mode).await;
            for refused in ["COMMIT", "ROLLBACK", "SAVEPOINT a", ""] {
                let answer = transaction.execute(refused, &[]).await;
                assert!(matches!(answer, Err(Error::Database(_))), "{answer:?}");
            }
            let uuid = Value::Uuid("no".to_owned());
            let answer = transaction.execute(INSERT, &[uuid]).await;
            assert!(matches!(answer, Err(Error::Unsupported(_))), "{answer:?}");
            assert_eq!((transaction.statements(), transaction.broken()), (0, None));
            assert_eq!(insert(&transaction, owner.commits).await, Ok(1), "{kind:?}");
            let committed = owner.commit(transaction).await;
            assert!(committed.is_ok(), "{kind:?}: {committed:?}");
        }
        assert_eq!(owner.numbers().await, [0, 1], "{kind:?}");
    })
    .await;
}

#[tokio::test]
async fn savepoints_undo_one_call() {
    on_each(async |kind, database| {
        let mut owner = Owner::new(&database).await;
        execute(&database, INSERT, &[Int64(0)]).await;
        let transaction = owner.begin(Mode::Careful).await;
        for call in 1..=50 {
            transaction.savepoint().await.expect("a savepoint");
            assert_eq!(insert(&transaction, 2 * call).await, Ok(1), "{kind:?}");
            is_violation(&insert(&transaction, 0).await);
            assert_eq!(insert(&transaction, 2 * call + 1).await, Ok(1), "{kind:?}");
            if call % 2 == 0 {
                let undone = transaction.rollback_to_savepoint().await;
                undone.expect("a savepoint");
                // It is still there.
                assert_eq!(insert(&transaction, 2 * call).await, Ok(1), "{kind:?}");
                let undone = transaction.rollback_to_savepoint().await;
                undone.expect("a savepoint");
            }
        }
        assert_eq!(transaction.broken(), None);
        let committed = owner.commit(transaction).await;
        assert!(committed.is_ok(), "{kind:?}: {committed:?}");
        let expected = (2..=100).filter(|n| n / 2 % 2 == 1);
        let expected: Vec<i64> = [0].into_iter().chain(expected).collect();
        assert_eq!(owner.numbers().await, expected, "{kind:?}");
    })
    .await;
}

/// Tables that are made and altered half-way, and are not there after all.
#[tokio::test]
async fn tables_change_in_a_transaction() {
    on_each(async |kind, database| {
        let mut owner = Owner::new(&database).await;
        let ask = async |transaction: &Transaction| {
            let answer = transaction.query("SELECT * FROM new", &[]).await;
            answer.map(|answer| (answer.columns.len(), answer.rows.len()))
        };
        let transaction = owner.begin(Mode::Careful).await;
        for statement in [
            "CREATE TABLE new (at TIMESTAMP)",
            "INSERT INTO new VALUES ('2026-01-02 03:04:05')",
        ] {
            assert!(
                transaction.execute(statement, &[]).await.is_ok(),
                "{statement}"
            );
        }
        assert_eq!(ask(&transaction).await, Ok((1, 1)), "{kind:?}");
        transaction.savepoint().await.expect("a savepoint");
        let added = transaction
            .execute("ALTER TABLE new ADD COLUMN more TEXT", &[])
            .await;
        assert!(added.is_ok(), "{added:?}");
        assert_eq!(ask(&transaction).await, Ok((2, 1)), "{kind:?}");
        transaction
            .rollback_to_savepoint()
            .await
            .expect("a savepoint");
        assert_eq!(ask(&transaction).await, Ok((1, 1)), "{kind:?}");
        transaction.rollback().await;
        let gone = database.query("SELECT * FROM new", &[]).await;
        assert!(
            matches!(gone, Err(Error::Database(_))),
            "{kind:?}: {gone:?}"
        );

        let transaction = owner.begin(Mode::Optimistic).await;
        let made = transaction
            .execute("CREATE TABLE new (is_new BOOLEAN, name TEXT)", &[])
            .await;
        assert!(made.is_ok(), "{made:?}");
        let row = [Value::Boolean(true), text("a")];
        let inserted = transaction
            .execute("INSERT INTO new VALUES ($1, $2)", &row)
            .await;
        assert_eq!(inserted, Ok(1), "{kind:?}");
        let committed = owner.commit(transaction).await;
        assert!(committed.is_ok(), "{kind:?}: {committed:?}");
        let rows = query(&database, "SELECT * FROM new", &[]).await;
        assert_eq!(rows, [row.to_vec()], "{kind:?}");
    })
    .await;
}

#[tokio::test]
async fn lanes_take_turns() {
    const LANES: i64 = 16;
    const ROUNDS: i64 = 10;
    on_each(async |kind, database| {
        Owner::new(&database).await;
        let lane_of = |partition: i64| LaneId {
            partition: partition as i32,
            ..lane()
        };
        let work = |partition: i64| {
            let database = &database;
            async move {
                let lane = lane_of(partition);
                let claim = database.claim(&lane).await.expect("a claim");
                let mut owner = Owner {
                    epoch: claim.epoch,
                    generation: claim.generation,
                    database: database.clone(),
                    commits: 0,
                    lane,
                };
                for round in 0..ROUNDS {
                    let transaction = owner.begin(Mode::Optimistic).await;
                    let id = partition * ROUNDS + round;
                    assert_eq!(insert(&transaction, id).await, Ok(1));
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    owner.commit(transaction).await.expect("a commit");
                }
            }
        };
        futures::future::join_all((0..LANES).map(work)).await;
        let expected: Vec<i64> = (0..LANES * ROUNDS).collect();
        let owner = Owner {
            database: database.clone(),
            lane: lane(),
            epoch: 0,
            generation: 0,
            commits: 0,
        };
        assert_eq!(owner.numbers().await, expected, "{kind:?}");
    })
    .await;
}

/// Nobody's message is at fault when a turn takes long, and single statements need none.
#[tokio::test]
async fn a_turn_is_waited_for_as_long_as_it_takes() {
    on_each(async |kind, database| {
        let owner = Owner::new(&database).await;
        let (turns, mode) = match kind {
            Kind::Postgres => (CONNECTIONS - 1, Mode::Optimistic),
            Kind::Sqlite => (1, Mode::Exclusive),
        };
        let mut taken = Vec::new();
        for _ in 0..turns {
            taken.push(owner.begin(mode).await);
        }
        let next = owner.begin(mode);
        tokio::pin!(next);
        // Longer than a statement waits for a connection.
        let early = tokio::time::timeout(Duration::from_secs(6), &mut next).await;
        assert!(early.is_err(), "{kind:?}");
        assert_eq!(
            query(&database, "SELECT 7", &[]).await,
            [[Int64(7)]],
            "{kind:?}"
        );
        assert!(database.probe(&Action::Answer).await.is_ok(), "{kind:?}");
        taken.clear();
        next.await.rollback().await;
    })
    .await;
}

/// Text of many kinds, so that statements of both paths are encoded alike.
#[tokio::test]
async fn values_are_those_of_single_statements() {
    on_each(async |kind, database| {
        let owner = Owner::new(&database).await;
        execute(&database, "CREATE TABLE v (n BIGINT, s TEXT)", &[]).await;
        for mode in MODES {
            let transaction = owner.begin(mode).await;
            for params in [[Int64(1), text("ü")], [Value::Null, Value::Null]] {
                let insert = "INSERT INTO v VALUES ($1, $2)";
                assert_eq!(
                    transaction.execute(insert, &params).await,
                    Ok(1),
                    "{kind:?}"
                );
            }
            let rows = transaction
                .query("SELECT s, n FROM v ORDER BY n", &[])
                .await;
            let rows = rows.expect("what was inserted");
            assert_eq!(rows.columns, ["s", "n"], "{kind:?}");
            assert!(
                rows.rows.contains(&vec![Text("ü".to_owned()), Int64(1)]),
                "{kind:?}"
            );
            let none = transaction
                .query("SELECT n AS none FROM v WHERE n = 9", &[])
                .await;
            assert_eq!(none.map(|none| none.columns), Ok(vec!["none".to_owned()]));
            transaction.rollback().await;
        }
    })
    .await;
}
