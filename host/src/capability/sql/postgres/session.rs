//! A connection with an open transaction.

use super::super::lease::Lease;
use super::super::transaction::{Fate, Outcome};
use super::super::{Done, Error, Failure, STATEMENT_SAVEPOINT, SqlAccess, Work};
use super::Postgres;
use super::call::{Call, command, forget_plans};
use crate::delivery::progress::{Commit, Mode};

/// Dropped, it is closed, and with it the transaction is rolled back.
pub(in super::super) struct Session {
    lease: Lease<sqlx::Postgres>,
    database: Postgres,
    /// A statement may have left something in the session.
    traces: bool,
    has_savepoint: bool,
    access: SqlAccess,
}

impl Session {
    pub(in super::super) async fn begin(
        database: &Postgres,
        access: SqlAccess,
    ) -> Result<Self, Error> {
        let mut lease = Lease::take(&database.pool).await?;
        let begun = command(&mut lease, "BEGIN").await;
        begun.map_err(Failure::into_error)?;
        Ok(Self {
            lease,
            database: database.clone(),
            traces: false,
            has_savepoint: false,
            access,
        })
    }

    pub(in super::super) async fn call(
        &mut self,
        mode: Mode,
        text: &str,
        work: Work<'_>,
    ) -> Outcome {
        let mut call = match Call::new(self.access, text, work) {
            Ok(call) => call,
            Err(error) => return Outcome::untouched(error),
        };
        self.traces |= call.may_leave_traces();
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
        let set = command(&mut self.lease, set).await;
        self.has_savepoint = true;
        set.map_err(Failure::into_error)
    }

    pub(in super::super) async fn rollback_to_savepoint(&mut self) -> Result<(), Error> {
        let undone = command(&mut self.lease, "ROLLBACK TO SAVEPOINT stagehost_call").await;
        undone.map_err(Failure::into_error)
    }

    /// Writes the progress; answers whether the epoch still is the commit's.
    pub(in super::super) async fn save(&mut self, commit: Commit<'_>) -> Result<bool, Failure> {
        if self.traces {
            // Whoever the stage has made itself, the row is the host's.
            command(
                &mut self.lease,
                "SET SESSION AUTHORIZATION DEFAULT; RESET ROLE",
            )
            .await?;
        }
        self.database.save_on(&mut self.lease, commit).await
    }

    /// Whether what a statement has left may be why the progress could not be saved.
    pub(in super::super) fn has_traces(&self) -> bool {
        self.traces
    }

    pub(in super::super) async fn commit(mut self) -> Result<(), Failure> {
        // PostgreSQL rolls back what it refuses to commit.
        let committed = command(&mut self.lease, "COMMIT").await;
        if !matches!(committed, Err(Failure::Lost(_))) {
            self.give_back().await;
        }
        committed
    }

    pub(in super::super) async fn rollback(mut self) {
        if command(&mut self.lease, "ROLLBACK").await.is_ok() {
            self.give_back().await;
        }
    }

    async fn give_back(mut self) {
        let settings = self.database.settings;
        if !self.traces || settings.reset(&mut self.lease).await.is_ok() {
            self.lease.give_back();
        }
    }
}
