//! One open transaction, shared by the lane that it belongs to and the calls of its stage.

use std::mem;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OwnedSemaphorePermit;

use super::{
    Database, Done, ENDED, Error, Failure, Kind, Refusal, Rows, Sight, SqlAccess, StoreError,
    Value, Work, host_error, postgres, sqlite,
};
use crate::delivery::progress::{self, Broken, Commit, CommitError, Mode};

/// An open transaction of a [`Database`]. Clones are the same one. When the last is dropped, or while a statement runs,
/// its connection is closed, and it is rolled back.
#[derive(Clone)]
pub struct Transaction(Arc<Shared>);

struct Shared {
    mode: Mode,
    access: SqlAccess,
    statements: AtomicU64,
    state: Mutex<State>,
}

enum State {
    /// At rest.
    Open(Box<Held>),
    /// A statement runs; or ran, and was given up, and the connection with it.
    Busy,
    /// It can only be rolled back.
    Doomed(Box<Held>),
    /// A statement waits for its turn to write; or waited too long, or in vain.
    Contended(Option<Box<Held>>),
    /// There is no connection any more.
    Gone(String),
}

/// The connection is let go before its turn is.
struct Held {
    session: Session,
    /// SQLite's session takes it when it needs it.
    _turn: Option<OwnedSemaphorePermit>,
}

enum Session {
    Postgres(Box<postgres::Session>),
    Sqlite(Box<sqlite::Session>),
}

/// What a statement has answered, and what is left of the transaction.
pub(super) struct Outcome {
    answer: Result<Done, Refusal>,
    fate: Fate,
}

/// What becomes of a transaction after a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// The statement was not begun.
    Untouched,
    /// It goes on, and if the statement failed, nothing of it is left.
    Kept,
    /// It can only be rolled back.
    Doomed,
    /// The same, for others write: nothing is wrong with it.
    Contended,
    /// Its connection is to be closed.
    Lost,
}

impl Outcome {
    pub(super) fn done(done: Done) -> Self {
        Self {
            answer: Ok(done),
            fate: Fate::Kept,
        }
    }

    pub(super) fn untouched(error: Error) -> Self {
        Self::failed(error, Fate::Untouched)
    }

    pub(super) fn failed(error: Error, fate: Fate) -> Self {
        Self {
            // Whoever knows more says more.
            answer: Err(Refusal::of(error, SqlAccess::Data)),
            fate,
        }
    }

    /// What a failure says of the database, by who knows it.
    pub(super) fn judged(self, judge: impl FnOnce(Error) -> Refusal) -> Self {
        let answer = self.answer.map_err(|refusal| judge(refusal.error));
        Self { answer, ..self }
    }

    pub(super) fn is_lost(&self) -> bool {
        self.fate == Fate::Lost
    }

    /// Whatever was answered, the connection can't be used any more.
    pub(super) fn lost(self) -> Self {
        let fate = Fate::Lost;
        Self { fate, ..self }
    }
}

impl Transaction {
    pub(super) async fn begin(database: &Database, mode: Mode) -> Result<Self, StoreError> {
        let (access, turns) = (database.access, database.slots.clone());
        let (session, turn) = match &database.kind {
            Kind::Postgres(database) => {
                // The semaphore is never closed; without it, the pool's own limit holds.
                let turn = turns.acquire_owned().await;
                let turn = turn.map_err(|error| StoreError::Unavailable(error.to_string()))?;
                let session = postgres::Session::begin(database, access)
                    .await
                    .map_err(host_error)?;
                (Session::Postgres(Box::new(session)), Some(turn))
            }
            Kind::Sqlite(database) => {
                let session = sqlite::Session::begin(database, access, mode, turns)
                    .await
                    .map_err(host_error)?;
                (Session::Sqlite(Box::new(session)), None)
            }
        };
        let held = Box::new(Held {
            session,
            _turn: turn,
        });
        Ok(Self(Arc::new(Shared {
            mode,
            access,
            statements: AtomicU64::new(0),
            state: Mutex::new(State::Open(held)),
        })))
    }

    /// As [`Database::query`], in the transaction.
    pub async fn query(&self, statement: &str, params: &[Value]) -> Result<Rows, Error> {
        let sight = Sight::default();
        let done = self.call(statement, Work::Query(params), &sight).await;
        Ok(done.map_err(Refusal::into_error)?.rows)
    }

    /// As [`Database::execute`], in the transaction.
    pub async fn execute(&self, statement: &str, params: &[Value]) -> Result<u64, Error> {
        let sight = Sight::default();
        let done = self.call(statement, Work::Execute(params), &sight).await;
        Ok(done.map_err(Refusal::into_error)?.affected)
    }

    /// As [`Database::execute_many`], in the transaction.
    pub async fn execute_many(&self, statement: &str, params: &[Vec<Value>]) -> Result<u64, Error> {
        let sight = Sight::default();
        let done = self
            .call(statement, Work::ExecuteMany(params), &sight)
            .await;
        Ok(done.map_err(Refusal::into_error)?.affected)
    }

    /// Runs a statement, and notes in `sight` what it waits for. After an error, [`progress::Transaction::broken`] tells whether
    /// there can be another.
    pub(super) async fn call(
        &self,
        text: &str,
        work: Work<'_>,
        sight: &Sight,
    ) -> Result<Done, Refusal> {
        let access = self.0.access;
        let taken = self.take();
        let mut held = taken.map_err(|error| Refusal {
            // What keeps it from going on was told before.
            away: None,
            ..Refusal::of(error, access)
        })?;
        self.0.statements.fetch_add(1, Ordering::Relaxed);
        let mode = self.0.mode;
        let Outcome { answer, fate } = match &mut held.session {
            Session::Postgres(session) => session.call(mode, text, work, sight).await,
            Session::Sqlite(session) => {
                sight.heard();
                // Who gives up on it here has lost nothing.
                *self.state() = State::Contended(None);
                let outcome = match session.ready(text, work).await {
                    Ok(call) => {
                        *self.state() = State::Busy;
                        session.call(mode, text, call).await
                    }
                    Err(sqlite::NotReady::Refused(error)) => Outcome::untouched(error),
                    Err(sqlite::NotReady::Contended(error)) => {
                        Outcome::failed(error, Fate::Contended)
                    }
                };
                sight.end();
                outcome
            }
        };
        if fate == Fate::Untouched {
            self.0.statements.fetch_sub(1, Ordering::Relaxed);
        }
        let state = match (fate, &answer) {
            (Fate::Untouched | Fate::Kept, _) => State::Open(held),
            (Fate::Doomed, _) => State::Doomed(held),
            (Fate::Contended, _) => State::Contended(Some(held)),
            (Fate::Lost, Ok(_)) => State::Gone("a statement broke the connection".to_owned()),
            (Fate::Lost, Err(refusal)) => State::Gone(words(refusal.error.clone())),
        };
        *self.state() = state;
        answer
    }

    /// The connection, for a statement that runs alone.
    fn take(&self) -> Result<Box<Held>, Error> {
        let mut state = self.state();
        match mem::replace(&mut *state, State::Busy) {
            State::Open(held) => Ok(held),
            other => {
                *state = other;
                let why = "the transaction can't go on".to_owned();
                Err(Error::Unavailable(why))
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the connection back after a command of the host's own, which must not fail.
    fn put_back(&self, held: Box<Held>, done: Result<(), Error>) -> Result<(), StoreError> {
        let done = done.map_err(host_error);
        *self.state() = match &done {
            Ok(()) => State::Open(held),
            Err(error) => State::Gone(error.to_string()),
        };
        done
    }
}

impl progress::Transaction for Transaction {
    fn statements(&self) -> u64 {
        self.0.statements.load(Ordering::Relaxed)
    }

    fn broken(&self) -> Option<Broken> {
        match &*self.state() {
            State::Open(_) => None,
            State::Busy => {
                let why = "a statement was given up half-way";
                Some(Broken::Connection(why.to_owned()))
            }
            State::Doomed(_) => Some(Broken::Statement),
            State::Contended(_) => Some(Broken::Contended),
            State::Gone(why) => Some(Broken::Connection(why.clone())),
        }
    }

    async fn savepoint(&self) -> Result<(), StoreError> {
        let mut held = self.take()?;
        let set = match &mut held.session {
            Session::Postgres(session) => session.savepoint().await,
            Session::Sqlite(session) => session.savepoint().await,
        };
        self.put_back(held, set)
    }

    async fn rollback_to_savepoint(&self) -> Result<(), StoreError> {
        let mut held = self.take()?;
        let undone = match &mut held.session {
            Session::Postgres(session) => session.rollback_to_savepoint().await,
            Session::Sqlite(session) => session.rollback_to_savepoint().await,
        };
        self.put_back(held, undone)
    }

    async fn commit(self, commit: Commit<'_>) -> Result<(), CommitError> {
        let held = self
            .take()
            .map_err(|error| CommitError::Unanswered(words(error)))?;
        let Held { session, _turn } = *held;
        let mut session = match session {
            Session::Postgres(session) => return session.commit(commit).await,
            Session::Sqlite(session) => session,
        };
        match session.save(commit).await {
            Ok(true) => session.commit().await.map_err(commit_error),
            Ok(false) => {
                session.rollback().await;
                Err(CommitError::Fenced)
            }
            // The row is the host's, and that it can't be written is no fault of the effects.
            Err(Failure::Statement(error)) => {
                session.rollback().await;
                Err(CommitError::Unanswered(words(error)))
            }
            Err(failure) => Err(unanswered(failure)),
        }
    }

    async fn rollback(self) {
        let ended = State::Gone("it was rolled back".to_owned());
        let state = mem::replace(&mut *self.state(), ended);
        if let State::Open(held) | State::Doomed(held) | State::Contended(Some(held)) = state {
            held.session.rollback().await;
        }
    }
}

impl Session {
    async fn rollback(self) {
        match self {
            Self::Postgres(session) => session.rollback().await,
            Self::Sqlite(session) => session.rollback().await,
        }
    }
}

fn commit_error(failure: Failure) -> CommitError {
    match failure {
        Failure::Statement(Error::Database(error)) => CommitError::Refused(error.message),
        other => unanswered(other),
    }
}

pub(super) fn unanswered(failure: Failure) -> CommitError {
    match words(failure.into_error()) {
        // Before it has read the commit.
        why if why.starts_with(ENDED) => CommitError::TooLong(why),
        why => CommitError::Unanswered(why),
    }
}

pub(super) fn words(error: Error) -> String {
    match error {
        Error::Unavailable(why) | Error::Denied(why) | Error::Unsupported(why) => why,
        Error::Database(error) => error.message,
        Error::TooLarge(limit) => format!("the answer is larger than the limit of {limit}"),
    }
}
