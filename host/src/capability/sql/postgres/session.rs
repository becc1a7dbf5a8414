//! A connection with an open transaction.

use std::pin::pin;

use super::super::transaction::{Fate, Outcome, unanswered};
use super::super::{Done, Error, Failure, STATEMENT_SAVEPOINT, Sight, SqlAccess, Work};
use super::call::{Call, command, forget_plans};
use super::locks::Watched;
use super::pool::Lease;
use super::{Postgres, set_access};
use crate::delivery::progress::{Commit, CommitError, Mode};

/// Around the statements of a stage that only reads, in a transaction in which the host writes its row: what is read-only
/// here is so until the savepoint is left, and no statement can undo it before.
const BEGIN_READING: &[&str] = &[
    "BEGIN",
    "SAVEPOINT stagehost_reads",
    "SET TRANSACTION READ ONLY",
];
const END_READING: &str = "RELEASE SAVEPOINT stagehost_reads";

/// How often a connection that was closed while nobody used it is replaced before a transaction begins.
const MAX_RENEWALS: usize = 8;

/// Dropped, it is closed, and with it the transaction is rolled back.
pub(in super::super) struct Session {
    lease: Lease,
    database: Postgres,
    has_savepoint: bool,
    access: SqlAccess,
    /// What begins the transaction has gone out, with its first statement.
    has_begun: bool,
}

impl Session {
    pub(in super::super) async fn begin(
        database: &Postgres,
        access: SqlAccess,
    ) -> Result<Self, Error> {
        database.renew_secret().await?;
        let lease = database.pool.take().await?;
        Ok(Self {
            lease,
            database: database.clone(),
            has_savepoint: false,
            access,
            has_begun: false,
        })
    }

    fn opening(&self) -> &'static [&'static str] {
        match self.access {
            SqlAccess::ReadOnly => BEGIN_READING,
            SqlAccess::Data | SqlAccess::DataDefinition => &["BEGIN"],
        }
    }

    /// Whether the transaction begins only with what is sent next.
    fn queue_begin(&mut self) -> Result<bool, Error> {
        if self.has_begun {
            return Ok(false);
        }
        set_access(&mut self.lease, SqlAccess::Data)?;
        let opening = self.opening();
        let queued = self.lease.queue_opening(opening);
        queued.map_err(Failure::into_error)?;
        self.has_begun = true;
        Ok(true)
    }

    async fn begin_now(&mut self) -> Result<(), Error> {
        if !self.queue_begin()? {
            return Ok(());
        }
        match command(&mut self.lease, "").await {
            Ok(()) => Ok(()),
            Err(_) if !self.lease.is_in_transaction() => self.begin_anew().await,
            Err(failure) => Err(failure.into_error()),
        }
    }

    /// Begins on another connection, where the one at hand was closed while nobody used it: nothing was done on it.
    async fn begin_anew(&mut self) -> Result<(), Error> {
        let opening = self.opening();
        let mut begun = Ok(());
        for _ in 0..MAX_RENEWALS {
            self.lease.renew().await?;
            set_access(&mut self.lease, SqlAccess::Data)?;
            begun = self.lease.queue_opening(opening);
            if begun.is_ok() {
                begun = command(&mut self.lease, "").await;
            }
            if !matches!(begun, Err(Failure::Lost(_))) {
                break;
            }
        }
        begun.map_err(Failure::into_error)
    }

    pub(in super::super) async fn call(
        &mut self,
        mode: Mode,
        text: &str,
        work: Work<'_>,
        sight: &Sight,
    ) -> Outcome {
        let mut call = match Call::new(&self.database, self.access, text, work) {
            Ok(call) => call,
            Err(error) => return Outcome::untouched(error),
        };
        let (database, watched) = (self.database.clone(), Watched::of(&self.lease));
        let (outcome, ended) = {
            let run = pin!(self.begin_and_run(mode, &mut call));
            database.watched(watched, sight, run).await
        };
        if self.access == SqlAccess::ReadOnly {
            // It was the host that said so.
            self.lease.is_spent = false;
        }
        outcome.judged(|error| database.judge(self.access, text, work, (error, Some(ended))))
    }

    async fn begin_and_run(&mut self, mode: Mode, call: &mut Call<'_>) -> Outcome {
        let begins = match self.queue_begin() {
            Ok(begins) => begins,
            Err(error) => return Outcome::failed(error, Fate::Lost),
        };
        let outcome = self.run(mode, call).await;
        if !(begins && outcome.is_lost() && !self.lease.is_in_transaction()) {
            return outcome;
        }
        match self.begin_anew().await {
            Ok(()) => self.run(mode, call).await,
            Err(error) => Outcome::failed(error, Fate::Lost),
        }
    }

    async fn run(&mut self, mode: Mode, call: &mut Call<'_>) -> Outcome {
        match mode {
            Mode::Careful | Mode::Exclusive => {
                let done = call.run_in(&STATEMENT_SAVEPOINT, &mut self.lease).await;
                match done {
                    Ok(done) => Outcome::done(done),
                    Err(Failure::Statement(error)) => Outcome::failed(error, Fate::Kept),
                    Err(other) => Outcome::failed(other.into_error(), Fate::Lost),
                }
            }
            Mode::Optimistic => {
                let done = call.run(&mut self.lease).await;
                let stale = call.is_stale(&done);
                self.optimistic(done, stale).await
            }
        }
    }

    /// Any failure but a lost connection dooms the transaction, and no more.
    async fn optimistic(&mut self, done: Result<Done, Failure>, stale: bool) -> Outcome {
        let error = match done {
            Ok(done) => return Outcome::done(done),
            Err(Failure::Lost(error)) => return Outcome::failed(error, Fate::Lost),
            Err(Failure::Statement(error) | Failure::Busy(error) | Failure::Transaction(error)) => {
                error
            }
        };
        // So that the next transaction on this connection does not meet the same plan.
        if stale && forget_plans(&mut self.lease).await.is_err() {
            return Outcome::failed(error, Fate::Lost);
        }
        Outcome::failed(error, Fate::Doomed)
    }

    pub(in super::super) async fn savepoint(&mut self) -> Result<(), Error> {
        let set = match self.has_savepoint {
            false => "SAVEPOINT stagehost_call",
            true => "RELEASE SAVEPOINT stagehost_call; SAVEPOINT stagehost_call",
        };
        self.begin_now().await?;
        let set = command(&mut self.lease, set).await;
        self.has_savepoint = true;
        set.map_err(Failure::into_error)
    }

    pub(in super::super) async fn rollback_to_savepoint(&mut self) -> Result<(), Error> {
        let undone = command(&mut self.lease, "ROLLBACK TO SAVEPOINT stagehost_call").await;
        undone.map_err(Failure::into_error)
    }

    /// Writes the progress and commits, in one trip: where the row can't be written, the commit finds its transaction failed, and
    /// rolls it back.
    pub(in super::super) async fn commit(mut self, commit: Commit<'_>) -> Result<(), CommitError> {
        self.queue_begin()
            .map_err(|error| unanswered(error.into()))?;
        let before = (self.access == SqlAccess::ReadOnly).then_some(END_READING);
        let lease = &mut self.lease;
        self.database.save_and_commit(lease, before, commit).await
    }

    pub(in super::super) async fn rollback(mut self) {
        if !self.has_begun {
            return;
        }
        // Whatever comes of it, only a connection that is at rest is used again.
        let _ = command(&mut self.lease, "ROLLBACK").await;
    }
}
