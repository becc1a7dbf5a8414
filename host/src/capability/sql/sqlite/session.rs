//! A transaction, which begins when it is needed: a guest that sends no statement keeps nobody waiting, and one that only
//! reads keeps no writer waiting.
//!
//! All of it is of one moment, as if the file were its own: what it reads is as it was when it read first, and where somebody
//! else has written since, its own first write fails. Then it is [`Fate::Contended`], and run again with the turn to write
//! taken first; and its stage's next ones take that with their first statement. One that has only read needs no such care:
//! it happened when it read.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::super::transaction::{Fate, Outcome};
use super::super::{Error, Failure, STATEMENT_SAVEPOINT, SqlAccess, Work};
use super::Sqlite;
use super::call::{Call, command};
use super::connection::Connection;
use super::pool::Lease;
use crate::delivery::progress::{Commit, Mode};

/// How long a statement waits for its turn within a call, whose deadline runs meanwhile: behind it, the call must have time
/// left for its own work. Who waited in vain does so again before the call.
const PATIENCE: Duration = Duration::from_secs(1);

/// Dropped, its connection is closed, and with it the transaction is rolled back; only then another may write.
pub(in super::super) struct Session {
    database: Sqlite,
    access: SqlAccess,
    /// One for each transaction that may have a connection.
    turns: Arc<Semaphore>,
    open: Option<Open>,
    /// The lane has set a savepoint, or would have, had there been a transaction.
    has_savepoint: bool,
}

/// A transaction that has begun.
struct Open {
    lease: Lease,
    /// It has its turn to write; else it has only read.
    writes: bool,
    /// It has the file's lock: it began with it, or a statement has written.
    is_locked: bool,
    _turn: OwnedSemaphorePermit,
}

/// Why a statement was not begun.
pub(in super::super) enum NotReady {
    /// It is never sent.
    Refused(Error),
    /// The connection or the turn to write was not to be had in time.
    Contended(Error),
}

impl Session {
    /// `Mode::Exclusive` waits for its turn here, where nobody's deadline runs.
    pub(in super::super) async fn begin(
        database: &Sqlite,
        access: SqlAccess,
        mode: Mode,
        turns: Arc<Semaphore>,
    ) -> Result<Self, Error> {
        let mut session = Self {
            database: database.clone(),
            access,
            turns,
            open: None,
            has_savepoint: false,
        };
        if mode == Mode::Exclusive {
            let turn = session.turns.clone().acquire_owned().await;
            let turn = turn.map_err(|error| Error::Unavailable(error.to_string()))?;
            let mut lease = session.database.writing().await?;
            let begun = lease.run(Connection::begin_immediate).await?;
            if let Err(error) = begun {
                lease.give_back();
                return Err(super::error::error_of(&error));
            }
            session.open = Some(Open {
                lease,
                writes: true,
                is_locked: true,
                _turn: turn,
            });
        }
        Ok(session)
    }

    /// Has all that a statement needs. Dropped half-way, nothing has happened.
    pub(in super::super) async fn ready(
        &mut self,
        text: &str,
        work: Work<'_>,
    ) -> Result<Call, NotReady> {
        let call = Call::new(&self.database, self.access, text, work).map_err(NotReady::Refused)?;
        if call.is_empty() {
            return Ok(call);
        }
        let ready = tokio::time::timeout(PATIENCE, self.open_for(&call)).await;
        match ready {
            Ok(Ok(())) => Ok(call),
            Ok(Err(error)) => Err(NotReady::Contended(error)),
            Err(_) => {
                let waited = PATIENCE.as_secs();
                let why = format!("other transactions kept the database for {waited} s");
                Err(NotReady::Contended(Error::Unavailable(why)))
            }
        }
    }

    async fn open_for(&mut self, call: &Call) -> Result<(), Error> {
        let to_write = !call.only_reads()
            || (self.access > SqlAccess::ReadOnly
                && self.database.writes_late.load(Ordering::Relaxed));
        match &mut self.open {
            Some(open) if open.writes || !to_write => Ok(()),
            Some(open) => {
                open.lease.writing = Some(self.database.write().await?);
                open.writes = true;
                Ok(())
            }
            None => {
                let turn = self.turns.clone().acquire_owned().await;
                let turn = turn.map_err(|error| Error::Unavailable(error.to_string()))?;
                let writing = match to_write {
                    true => Some(self.database.write().await?),
                    false => None,
                };
                let mut lease = self.database.pool.take().await?;
                lease.writing = writing;
                let has_savepoint = self.has_savepoint;
                let begun = lease
                    .run(move |connection| begin(connection, to_write, has_savepoint))
                    .await?;
                if let Err(failure) = begun {
                    return Err(failure.into_error());
                }
                self.open = Some(Open {
                    lease,
                    writes: to_write,
                    is_locked: to_write,
                    _turn: turn,
                });
                Ok(())
            }
        }
    }

    pub(in super::super) async fn call(&mut self, mode: Mode, text: &str, call: Call) -> Outcome {
        let outcome = self.run(mode, call).await;
        outcome.judged(|error| Sqlite::judge(SqlAccess::Data, text, error))
    }

    async fn run(&mut self, mode: Mode, call: Call) -> Outcome {
        let Some(open) = &mut self.open else {
            return Outcome::done(super::super::Done::affected(0));
        };
        if call.is_empty() {
            return Outcome::done(super::super::Done::affected(0));
        }
        let only_reads = call.only_reads();
        let guarded = call.is_many() || (mode != Mode::Optimistic && !only_reads);
        let done = open.lease.run(move |connection| {
            let done = match guarded {
                true => call.run_in(&STATEMENT_SAVEPOINT, connection),
                false => call.run(connection),
            };
            (done, connection.sql.is_autocommit())
        });
        match done.await {
            Err(error) => Outcome::failed(error, Fate::Lost),
            Ok((Ok(done), false)) => {
                open.is_locked |= !only_reads;
                Outcome::done(done)
            }
            // SQLite ends a transaction by itself when a constraint or a trigger says so, or the disk or memory is
            // full. A statement would commit by itself then.
            Ok((Ok(done), true)) => Outcome::done(done).lost(),
            Ok((Err(failure), true)) => Outcome::failed(failure.into_error(), Fate::Lost),
            Ok((Err(Failure::Busy(error)), false)) => {
                self.database.writes_late.store(true, Ordering::Relaxed);
                Outcome::failed(error, Fate::Contended)
            }
            Ok((Err(Failure::Statement(error)), false)) => {
                let fate = fate(&error, guarded, only_reads);
                Outcome::failed(error, fate)
            }
            Ok((Err(failure), false)) => Outcome::failed(failure.into_error(), Fate::Lost),
        }
    }

    pub(in super::super) async fn savepoint(&mut self) -> Result<(), Error> {
        let had = std::mem::replace(&mut self.has_savepoint, true);
        let Some(open) = &mut self.open else {
            return Ok(());
        };
        let set = match had {
            false => SAVEPOINT,
            true => "RELEASE SAVEPOINT stagehost_call; SAVEPOINT stagehost_call",
        };
        let set = open
            .lease
            .run(move |connection| command(connection, set))
            .await?;
        set.map_err(Failure::into_error)
    }

    pub(in super::super) async fn rollback_to_savepoint(&mut self) -> Result<(), Error> {
        let Some(open) = &mut self.open else {
            return Ok(());
        };
        let undo = |connection: &mut Connection| {
            command(connection, "ROLLBACK TO SAVEPOINT stagehost_call")
        };
        open.lease.run(undo).await?.map_err(Failure::into_error)
    }

    /// Writes the progress; answers whether the epoch still is the commit's.
    pub(in super::super) async fn save(&mut self, commit: Commit<'_>) -> Result<bool, Failure> {
        let statements = self.database.progress.clone();
        let open = self.open_to_commit().await.map_err(Failure::Statement)?;
        super::progress::save_on(&statements, &mut open.lease, commit).await
    }

    /// The transaction, with the file's lock, however long that takes.
    async fn open_to_commit(&mut self) -> Result<&mut Open, Error> {
        let mut open = match self.open.take() {
            Some(open) if open.is_locked => return Ok(self.open.insert(open)),
            // Nothing was written, and what was read may be of long ago.
            Some(mut open) => {
                let end = |connection: &mut Connection| command(connection, "ROLLBACK");
                open.lease.run(end).await?.map_err(Failure::into_error)?;
                if open.lease.writing.is_none() {
                    open.lease.writing = Some(self.database.write_in_turn().await);
                }
                open
            }
            None => {
                let turn = self.turns.clone().acquire_owned().await;
                let turn = turn.map_err(|error| Error::Unavailable(error.to_string()))?;
                Open {
                    lease: self.database.writing().await?,
                    writes: true,
                    is_locked: true,
                    _turn: turn,
                }
            }
        };
        (open.writes, open.is_locked) = (true, true);
        let begun = open.lease.run(Connection::begin_immediate).await?;
        if let Err(error) = begun {
            open.lease.give_back();
            return Err(super::error::error_of(&error));
        }
        Ok(self.open.insert(open))
    }

    pub(in super::super) async fn commit(mut self) -> Result<(), Failure> {
        let Some(open) = &mut self.open else {
            return Ok(());
        };
        let end = |connection: &mut Connection| command(connection, "COMMIT");
        let committed = open.lease.run(end).await.map_err(Failure::Lost)?;
        match &committed {
            Ok(()) => self.give_back(),
            // Of a deferred constraint: the transaction is still there.
            Err(Failure::Statement(_)) => self.rollback().await,
            Err(_) => {}
        }
        committed
    }

    pub(in super::super) async fn rollback(mut self) {
        let Some(open) = &mut self.open else {
            return;
        };
        let undo = |connection: &mut Connection| command(connection, "ROLLBACK");
        if let Ok(Ok(())) = open.lease.run(undo).await {
            self.give_back();
        }
    }

    fn give_back(self) {
        if let Some(open) = self.open {
            open.lease.give_back();
        }
    }
}

const SAVEPOINT: &str = "SAVEPOINT stagehost_call";

fn begin(connection: &mut Connection, to_write: bool, has_savepoint: bool) -> Result<(), Failure> {
    match to_write {
        true => {
            let begun = connection.begin_immediate();
            begun.map_err(|error| super::error::failure_of(&error, &connection.guard))?;
        }
        false => command(connection, "BEGIN")?,
    }
    match has_savepoint {
        true => command(connection, SAVEPOINT),
        false => Ok(()),
    }
}

/// What becomes of the transaction after a statement that failed in it. SQLite undoes one that fails; but not one whose
/// answer can't be carried.
fn fate(error: &Error, guarded: bool, only_reads: bool) -> Fate {
    match error {
        _ if guarded || only_reads => Fate::Kept,
        Error::Database(_) | Error::Unavailable(_) => Fate::Kept,
        _ => Fate::Doomed,
    }
}
