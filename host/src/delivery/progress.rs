//! How far a transactional lane has got: kept by its database, in the transactions of its effects.
//!
//! A lane's row is owned by whoever raised its epoch last. [`Ledger::claim`] raises it; a commit
//! succeeds for the epoch that it was claimed with and no other, so that a host that was away, and comes back
//! with a transaction half done, can't commit it. And it follows the commit before it, of the same generation, so that a
//! database that is another one than it was, such as an older copy, is noticed by the first commit that meets it.

use std::future::Future;
use std::sync::Arc;

use crate::capability::StoreError;

/// One group's way through one partition.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneId {
    /// The consumer group.
    pub group: Arc<str>,
    /// The topic.
    pub topic: Arc<str>,
    /// The partition, from 0.
    pub partition: i32,
}

/// What a commit makes durable beside the effects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// All records below it are done. `None` before the first commit: the log's committed offset holds.
    pub next_offset: Option<i64>,
    /// Failed deliveries of the record at `next_offset`.
    pub attempts: u32,
    /// The outputs of what was committed last, encoded: they are produced after the commit, and again after a crash.
    pub pending: Vec<u8>,
    /// The newest output of each lane upstream that was taken in, encoded.
    pub seen: Vec<u8>,
}

/// A lane's row as it was when it was claimed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The claim's own number: commits must name it.
    pub epoch: i64,
    /// Raised by a replay that somebody asked for, and where the database went back to an older copy, so that outputs are not
    /// taken for duplicates.
    pub generation: i64,
    /// How often the lane has committed.
    pub commits: i64,
    /// As of the last commit.
    pub checkpoint: Checkpoint,
}

/// What a lane commits, and by which claim.
#[derive(Clone, Copy, Debug)]
pub struct Commit<'a> {
    /// The lane.
    pub lane: &'a LaneId,
    /// The epoch that the lane was claimed with.
    pub epoch: i64,
    /// The generation that the lane's row has.
    pub generation: i64,
    /// One more than the row has.
    pub commits: i64,
    /// The new state.
    pub checkpoint: &'a Checkpoint,
}

/// Why a commit did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The lane's row is not what the commit follows: somebody else has claimed it, or the database is another one.
    /// Nothing was committed. [`Ledger::look`] tells.
    #[error("the lane's row is not as its last commit has left it")]
    Fenced,
    /// The database refused the effects only now, as it does with deferred constraints. Nothing was committed.
    #[error("the commit was refused: {0}")]
    Refused(String),
    /// The database had ended the transaction, which took longer than it lets them. Nothing was committed.
    #[error("{0}")]
    TooLong(String),
    /// Nobody knows whether it happened: [`Ledger::reclaim`] tells.
    #[error("the commit was not answered: {0}")]
    Unanswered(String),
}

/// How a transaction treats failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As fast as it goes. A failed statement may doom the transaction, which then is [`Broken::Statement`].
    Optimistic,
    /// With a savepoint around every statement, so that one that fails costs itself alone.
    Careful,
    /// As careful, and with all that others could keep from it taken before it begins: after [`Broken::Contended`].
    Exclusive,
}

/// Why a transaction can't go on: nothing of it counts, and no statement is run in it any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Broken {
    /// A statement failed in an optimistic transaction. It is worth a careful one.
    Statement,
    /// Others wrote, or kept it from writing. It is worth an exclusive one, and no message is at fault.
    Contended,
    /// The connection was lost, or a statement on it was given up half-way. In words.
    Connection(String),
}

/// A database that keeps the progress of lanes.
pub trait Ledger: Send + Sync + 'static {
    /// One batch's effects.
    type Transaction: Transaction;

    /// Takes the lane over, whoever had it, and answers its row, which is made if there is none.
    /// Waits for a transaction that is committing just now.
    fn claim(&self, lane: &LaneId) -> impl Future<Output = Result<Claim, StoreError>> + Send;

    /// As [`Ledger::claim`], if the lane's epoch still is `epoch`; `None` if it is not. After it, a transaction
    /// of that epoch is committed, as the row's `commits` tell, or never will be.
    fn reclaim(
        &self,
        lane: &LaneId,
        epoch: i64,
    ) -> impl Future<Output = Result<Option<Claim>, StoreError>> + Send;

    /// The lane's row as it is, which stays whose it is; `None` if there is none.
    fn look(&self, lane: &LaneId)
    -> impl Future<Output = Result<Option<Claim>, StoreError>> + Send;

    /// Raises the lane's generation, if it is lower and the epoch still is `epoch`, and answers the row; `None` if the epoch
    /// is another.
    fn raise(
        &self,
        lane: &LaneId,
        epoch: i64,
        generation: i64,
    ) -> impl Future<Output = Result<Option<Claim>, StoreError>> + Send;

    /// Begins a transaction, once one can be had or as soon as it needs one: however many lanes there are, they take turns.
    fn begin(
        &self,
        mode: Mode,
    ) -> impl Future<Output = Result<Self::Transaction, StoreError>> + Send;

    /// Commits progress alone, without effects, in one statement.
    fn save(&self, commit: Commit<'_>) -> impl Future<Output = Result<(), CommitError>> + Send;
}

/// One batch's effects, as its lane holds them. The stage's calls run statements in it. Dropped, it is rolled back.
pub trait Transaction: Send + Sync {
    /// Statements that were begun in it so far, whatever came of them.
    fn statements(&self) -> u64;

    /// Why it can't go on, if it can't.
    fn broken(&self) -> Option<Broken>;

    /// In a careful transaction: sets the savepoint, in the place of the one before.
    fn savepoint(&self) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// In a careful transaction: undoes all since the savepoint, which stays.
    fn rollback_to_savepoint(&self) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Makes the effects and the progress durable together, or neither.
    fn commit(self, commit: Commit<'_>) -> impl Future<Output = Result<(), CommitError>> + Send;

    /// Undoes all.
    fn rollback(self) -> impl Future<Output = ()> + Send;
}
