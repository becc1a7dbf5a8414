//! A connection with an open transaction.

use tokio::sync::OwnedMutexGuard;

use super::super::lease::Lease;
use super::super::transaction::{Fate, Outcome};
use super::super::{Error, Failure, STATEMENT_SAVEPOINT, SqlAccess, Work};
use super::call::{Call, Means, Running, command, is_out_of_transaction};
use super::{Sqlite, failure_of};
use crate::delivery::progress::{Commit, Mode};

/// Dropped, it is closed, and with it the transaction is rolled back; only then another may write.
pub(in super::super) struct Session {
    lease: Lease<sqlx::Sqlite>,
    running: Running,
    database: Sqlite,
    has_savepoint: bool,
    access: SqlAccess,
    /// A statement was to alter tables.
    has_altered: bool,
    _writing: OwnedMutexGuard<()>,
}

impl Session {
    pub(in super::super) async fn begin(
        database: &Sqlite,
        access: SqlAccess,
    ) -> Result<Self, Error> {
        let writing = database.writer.clone().lock_owned().await;
        let mut lease = Lease::take(&database.pool).await?;
        let running = Running::on(&mut lease).await?;
        let begun = command(&mut lease, "BEGIN IMMEDIATE").await;
        begun.map_err(Failure::into_error)?;
        Ok(Self {
            lease,
            running,
            database: database.clone(),
            has_savepoint: false,
            access,
            has_altered: false,
            _writing: writing,
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
        let guarded = call.is_many() || (mode == Mode::Careful && !call.only_reads());
        let mut means = Means {
            connection: &mut self.lease,
            running: &self.running,
            declared: &self.database.declared,
        };
        let done = match guarded {
            true => call.run_in(&STATEMENT_SAVEPOINT, &mut means).await,
            false => call.run(&mut means).await,
        };
        let outcome = match done {
            Ok(done) => Outcome::done(done),
            Err(Failure::Statement(error)) if guarded => Outcome::failed(error, Fate::Kept),
            Err(Failure::Statement(error)) => self.unguarded(error, call.only_reads()).await,
            Err(other) => Outcome::failed(other.into_error(), Fate::Lost),
        };
        self.has_altered |= call.alters_tables();
        if self.has_altered && !call.only_reads() && self.tables_changed().await.is_err() {
            return outcome.lost();
        }
        outcome
    }

    /// SQLite undoes a statement that fails; but not one whose answer can't be carried.
    async fn unguarded(&mut self, error: Error, only_reads: bool) -> Outcome {
        let fate = match is_out_of_transaction(&mut self.lease).await {
            Ok(true) | Err(_) => Fate::Lost,
            Ok(false) => match &error {
                Error::Database(_) | Error::Unavailable(_) => Fate::Kept,
                _ if only_reads => Fate::Kept,
                _ => Fate::Doomed,
            },
        };
        Outcome::failed(error, fate)
    }

    /// The driver would crash on the other columns of a statement that it knows.
    async fn tables_changed(&mut self) -> Result<(), Error> {
        use sqlx::Connection;
        self.running.renew();
        let cleared = self.lease.clear_cached_statements().await;
        cleared.map_err(|error| failure_of(&error).into_error())?;
        self.database.read_declared(&mut self.lease).await
    }

    pub(in super::super) async fn savepoint(&mut self) -> Result<(), Error> {
        let set = match self.has_savepoint {
            false => "SAVEPOINT stagehost_call",
            true => "RELEASE SAVEPOINT stagehost_call; SAVEPOINT stagehost_call",
        };
        self.has_savepoint = true;
        let set = command(&mut self.lease, set).await;
        set.map_err(Failure::into_error)
    }

    pub(in super::super) async fn rollback_to_savepoint(&mut self) -> Result<(), Error> {
        let undone = command(&mut self.lease, "ROLLBACK TO SAVEPOINT stagehost_call").await;
        undone.map_err(Failure::into_error)?;
        if self.has_altered {
            self.tables_changed().await?;
        }
        Ok(())
    }

    /// Writes the progress; answers whether the epoch still is the commit's.
    pub(in super::super) async fn save(&mut self, commit: Commit<'_>) -> Result<bool, Failure> {
        self.running.renew();
        self.database.save_on(&mut self.lease, commit).await
    }

    pub(in super::super) async fn commit(mut self) -> Result<(), Failure> {
        let committed = command(&mut self.lease, "COMMIT").await;
        match &committed {
            Ok(()) => self.give_back().await,
            // Of a deferred constraint: the transaction is still there.
            Err(Failure::Statement(_)) => self.rollback().await,
            Err(_) => {}
        }
        committed
    }

    pub(in super::super) async fn rollback(mut self) {
        if command(&mut self.lease, "ROLLBACK").await.is_ok() {
            self.give_back().await;
        }
    }

    async fn give_back(mut self) {
        if self.has_altered {
            self.database.altered.note();
            if self.tables_changed().await.is_err() {
                return;
            }
        }
        self.lease.give_back();
    }
}
