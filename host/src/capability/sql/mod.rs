//! `stagehost:stage/sql`: relational databases, PostgreSQL and SQLite.
//!
//! `guest` is what components call, [`Database`] what the host holds. Every statement is prepared and
//! is one statement. It commits by itself, unless the host has put a [`Transaction`] around the call.

mod decimal;
mod done;
mod guest;
mod ledger;
mod migrate;
mod postgres;
mod sqlite;
mod statement;
mod transaction;
mod waits;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

pub use guest::bindings::{DatabaseError, Error, Rows, Value};
pub use guest::{SqlCtx, SqlGrants, SqlView, add_to_linker};
pub use transaction::Transaction;
pub use waits::{LockWait, Sight};

use super::{Action, StoreError};
use crate::pipeline::{SqlAccess, SqlStore, SqlUrl};
use statement::Dialect;

/// Bytes of one statement's text.
pub const MAX_STATEMENT_BYTES: usize = 1024 * 1024;
/// Parameters of one statement; SQLite's own limit.
pub const MAX_PARAMETERS: usize = 32_766;
/// Lists of parameters of one call.
pub const MAX_PARAMETER_LISTS: usize = 100_000;
/// Rows of one answer.
pub const MAX_ANSWER_ROWS: usize = 100_000;
/// Bytes of one answer: its values' bytes, and 16 for each value.
pub const MAX_ANSWER_BYTES: usize = 16 * 1024 * 1024;
/// What a value counts for beside its bytes, so that an answer of a million NULLs has a size.
const VALUE_OVERHEAD: usize = 16;
/// How long a call waits for a free connection, or for a new one to be made.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one statement may run in the database.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// What is said before a database's words where others were in the way just then: the message is tried again, and that counts.
const IN_THE_WAY: &str = "others were in the way: ";
/// The same where what was in the way is known to have been a lock.
const LOCKED: &str = "others were in the way: no lock was to be had: ";
/// What is said before them where it ended a statement that ran.
const CANCELED: &str = "the statement was ended: ";
/// And where it ended a transaction, and its session, that took longer than it lets them.
const ENDED: &str = "the transaction took longer than the database lets it: ";
/// What is said before them where it refuses what it did before.
const WAS_DONE: &str = "it refuses what it did before: ";

/// Why [`Database::open`] would refuse the URL of a PostgreSQL database, without any of it.
pub fn check_postgres_url(url: &str) -> Result<(), String> {
    postgres::check_url(url)
}

/// The parameters of a PostgreSQL database's URL that mean nothing, each with the one that it may be a slip of.
pub fn unknown_postgres_parameters(url: &str) -> Vec<(String, Option<&'static str>)> {
    postgres::unknown_parameters(url)
}

/// The files of certificates and keys that a PostgreSQL database's URL names, each with its parameter.
pub fn postgres_files(url: &str) -> Vec<(String, PathBuf)> {
    postgres::files(url)
}

/// An open database: a bounded pool of connections. Clones share it.
#[derive(Clone)]
pub struct Database {
    kind: Kind,
    /// What whoever holds it may have it do; the host's own statements are not asked.
    access: SqlAccess,
    /// One for each transaction that may be open at a time: at least one connection is left for single statements.
    slots: Arc<Semaphore>,
}

#[derive(Clone)]
enum Kind {
    Postgres(postgres::Postgres),
    Sqlite(sqlite::Sqlite),
}

impl Database {
    /// Connects, and runs the migrations. `pause` is the longest time that a transaction may have to wait for its
    /// next statement; `None` where there are no transactions.
    pub async fn open(settings: &SqlStore, pause: Option<Duration>) -> Result<Self, StoreError> {
        let SqlStore {
            url,
            stage_url,
            migrations,
            max_connections,
        } = settings;
        let stage_url = stage_url.as_ref();
        Self::connect_as(
            url,
            stage_url,
            migrations.as_deref(),
            *max_connections,
            pause,
        )
        .await
    }

    /// As [`Database::open`], from the settings one by one, without a URL for stages.
    pub async fn connect(
        url: &SqlUrl,
        migrations: Option<&Path>,
        max_connections: u32,
        pause: Option<Duration>,
    ) -> Result<Self, StoreError> {
        Self::connect_as(url, None, migrations, max_connections, pause).await
    }

    /// As [`Database::connect`]; stages log in with `stage_url`, where there is one.
    pub async fn connect_as(
        url: &SqlUrl,
        stage_url: Option<&SqlUrl>,
        migrations: Option<&Path>,
        max_connections: u32,
        pause: Option<Duration>,
    ) -> Result<Self, StoreError> {
        let migrations = match migrations {
            Some(folder) => Some(migrate::Migrations::load(folder).await?),
            None => None,
        };
        let kind = match url {
            SqlUrl::Postgres(url) => {
                let stage_url = stage_url.and_then(|url| match url {
                    SqlUrl::Postgres(url) => Some(url.as_str()),
                    SqlUrl::Sqlite(_) => None,
                });
                let opened =
                    postgres::open(url, stage_url, migrations.as_ref(), max_connections, pause);
                Kind::Postgres(opened.await?)
            }
            SqlUrl::Sqlite(file) => {
                Kind::Sqlite(sqlite::open(file, migrations, max_connections).await?)
            }
        };
        let slots = max_connections.saturating_sub(1).max(1) as usize;
        let slots = Arc::new(Semaphore::new(slots));
        Ok(Self {
            kind,
            access: SqlAccess::DataDefinition,
            slots,
        })
    }

    /// The same database, for a stage that may do so much in it.
    pub fn granted(&self, access: SqlAccess) -> Self {
        let kind = match &self.kind {
            Kind::Postgres(database) => Kind::Postgres(database.for_stage()),
            Kind::Sqlite(database) => Kind::Sqlite(database.for_stage()),
        };
        Self {
            kind,
            access,
            slots: self.slots.clone(),
        }
    }

    /// The same database, which says whom it works for where it has something to say.
    pub fn used_by(mut self, stage: &str) -> Self {
        if let Kind::Sqlite(database) = &mut self.kind {
            database.used_by(stage);
        }
        self
    }

    /// Sees whether the database does what it did not do. Nothing changes.
    pub async fn probe(&self, action: &Action) -> Result<(), StoreError> {
        if let Kind::Postgres(database) = &self.kind {
            database.probe_pooler().await?;
        }
        let answer = match (&self.kind, action) {
            (Kind::Postgres(database), Action::Lock(wait)) => database.probe_locks(wait).await,
            (_, Action::Answer | Action::Read | Action::Command(_) | Action::Lock(_)) => {
                self.query("SELECT 1", &[]).await.map(drop)
            }
            (Kind::Postgres(database), Action::Write) => database.probe_write(self.access).await,
            (Kind::Postgres(database), Action::Statement(text, params)) => {
                return database.probe_statement(text, params).await;
            }
            (Kind::Sqlite(database), Action::Statement(text, _)) => {
                database.probe_statement(self.access, text).await
            }
            (Kind::Sqlite(database), Action::Write) => database.probe_write().await,
        };
        // What speaks of the store is unavailable already; with what else it may say, it answers.
        answer.map_err(StoreError::from)
    }

    /// Waits for the statements that are running, and closes the connections.
    pub async fn close(&self) {
        match &self.kind {
            Kind::Postgres(database) => database.close().await,
            Kind::Sqlite(database) => database.close().await,
        }
    }

    /// Runs one statement and answers its rows.
    pub async fn query(&self, statement: &str, params: &[Value]) -> Result<Rows, Error> {
        let sight = Sight::default();
        let done = self.call(statement, Work::Query(params), &sight).await;
        Ok(done.map_err(Refusal::into_error)?.rows)
    }

    /// Runs one statement and answers how many rows it affected.
    pub async fn execute(&self, statement: &str, params: &[Value]) -> Result<u64, Error> {
        let sight = Sight::default();
        let done = self.call(statement, Work::Execute(params), &sight).await;
        Ok(done.map_err(Refusal::into_error)?.affected)
    }

    /// Runs one statement once for every list of parameters in one transaction, and answers how
    /// many rows were affected in all.
    pub async fn execute_many(&self, statement: &str, params: &[Vec<Value>]) -> Result<u64, Error> {
        let sight = Sight::default();
        let done = self
            .call(statement, Work::ExecuteMany(params), &sight)
            .await;
        Ok(done.map_err(Refusal::into_error)?.affected)
    }

    /// What it waits for meanwhile is noted in `sight`, as far as it can be seen.
    async fn call(&self, text: &str, work: Work<'_>, sight: &Sight) -> Result<Done, Refusal> {
        match &self.kind {
            Kind::Postgres(database) => database.call(self.access, text, work, sight).await,
            Kind::Sqlite(database) => {
                sight.heard();
                let done = database.call(self.access, text, work).await;
                sight.end();
                done.map_err(|error| sqlite::Sqlite::judge(self.access, text, error))
            }
        }
    }
}

/// Why a statement was not done, and what the database did not do, if that is its own failing.
#[derive(Debug)]
struct Refusal {
    error: Error,
    away: Option<Action>,
    /// It took longer than it had, and that was its own doing.
    is_slow: bool,
}

impl Refusal {
    /// By the error alone.
    fn of(error: Error, access: SqlAccess) -> Self {
        if error == out_of_time() {
            return Self::slow(error);
        }
        let away = match &error {
            Error::Unavailable(why) if why.starts_with(IN_THE_WAY) => Some(Action::Answer),
            Error::Unavailable(_) if access == SqlAccess::ReadOnly => Some(Action::Read),
            Error::Unavailable(_) => Some(Action::Write),
            _ => None,
        };
        Self {
            error,
            away,
            is_slow: false,
        }
    }

    fn slow(error: Error) -> Self {
        Self {
            error,
            away: None,
            is_slow: true,
        }
    }

    fn away(why: String, action: Action) -> Self {
        Self {
            error: Error::Unavailable(why),
            away: Some(action),
            is_slow: false,
        }
    }

    fn into_error(self) -> Error {
        self.error
    }
}

/// Of a statement of the host's own, for which no message is to blame: whatever the database says, it is waited for.
fn host_error(error: Error) -> StoreError {
    match error {
        Error::Database(error) => StoreError::Unavailable(error.message),
        other => other.into(),
    }
}

/// What a statement is run for, and its parameters.
#[derive(Clone, Copy)]
enum Work<'a> {
    /// Its rows.
    Query(&'a [Value]),
    /// How many rows it affects.
    Execute(&'a [Value]),
    /// The same, once for every list: all or none of them.
    ExecuteMany(&'a [Vec<Value>]),
}

impl<'a> Work<'a> {
    /// Parameters as it has them: those of the first list, where it has many.
    fn example(self) -> &'a [Value] {
        match self {
            Work::Query(params) | Work::Execute(params) => params,
            Work::ExecuteMany(lists) => lists.first().map_or(&[], Vec::as_slice),
        }
    }

    /// The statement's first word, if it may be sent.
    fn check(self, dialect: Dialect, access: SqlAccess, text: &str) -> Result<String, Error> {
        match self {
            Work::Query(params) | Work::Execute(params) => {
                statement::check(dialect, access, text, params.len())
            }
            Work::ExecuteMany(lists) => statement::check_many(dialect, access, text, lists),
        }
    }

    fn is_many(self) -> bool {
        matches!(self, Work::ExecuteMany(_))
    }
}

/// What a statement answered.
struct Done {
    /// To a query.
    rows: Rows,
    /// To what is no query.
    affected: u64,
}

impl Done {
    fn rows(rows: Rows) -> Self {
        Self { rows, affected: 0 }
    }

    fn affected(affected: u64) -> Self {
        let rows = Answer::default().finish();
        Self { rows, affected }
    }
}

/// Why a statement failed, and what that means for the transaction around it.
#[derive(Debug)]
enum Failure {
    /// It is the statement's own failure.
    Statement(Error),
    /// The same, for another one writes: nothing of it was done, and it is worth trying again.
    Busy(Error),
    /// The transaction has failed as a whole. The connection is at rest.
    Transaction(Error),
    /// Nobody knows what the connection is doing: it is to be closed.
    Lost(Error),
}

impl Failure {
    fn into_error(self) -> Error {
        match self {
            Self::Statement(error)
            | Self::Busy(error)
            | Self::Transaction(error)
            | Self::Lost(error) => error,
        }
    }

    /// Where the statement was what had to keep a transaction in order.
    fn lost(self) -> Self {
        Self::Lost(self.into_error())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Statement(error)
    }
}

impl From<Error> for StoreError {
    fn from(error: Error) -> Self {
        match error {
            Error::Unavailable(why) => Self::Unavailable(why),
            Error::Database(error) => Self::Refused(error.message),
            other => Self::Refused(other.to_string()),
        }
    }
}

/// Commands that make several statements one.
struct Bracket {
    open: &'static str,
    keep: &'static str,
    undo: &'static str,
}

/// Around a statement in a transaction.
const STATEMENT_SAVEPOINT: Bracket = Bracket {
    open: "SAVEPOINT stagehost_statement",
    keep: "RELEASE SAVEPOINT stagehost_statement",
    undo: "ROLLBACK TO SAVEPOINT stagehost_statement; RELEASE SAVEPOINT stagehost_statement",
};

/// An answer as it grows, up to the limits.
#[derive(Default)]
struct Answer {
    columns: Vec<String>,
    rows: Vec<Vec<Value>>,
    bytes: usize,
}

impl Answer {
    /// Takes a row, or says that the answer is too large.
    fn push(&mut self, row: Vec<Value>) -> Result<(), Error> {
        if self.rows.len() == MAX_ANSWER_ROWS {
            return Err(Error::TooLarge(MAX_ANSWER_ROWS as u64));
        }
        self.bytes += row.iter().map(size).sum::<usize>();
        if self.bytes > MAX_ANSWER_BYTES {
            return Err(Error::TooLarge(MAX_ANSWER_BYTES as u64));
        }
        self.rows.push(row);
        Ok(())
    }

    fn finish(self) -> Rows {
        Rows {
            columns: self.columns,
            rows: self.rows,
        }
    }
}

fn size(value: &Value) -> usize {
    let bytes = match value {
        Value::Null | Value::Boolean(_) => 0,
        Value::Int64(_) | Value::Float64(_) | Value::Timestamp(_) => 8,
        Value::Text(text) | Value::Uuid(text) | Value::Decimal(text) | Value::Json(text) => {
            text.len()
        }
        Value::Bytes(bytes) => bytes.len(),
        Value::TextArray(items) => items.iter().map(|i| i.len() + VALUE_OVERHEAD).sum(),
        Value::Int64Array(items) => items.len() * 8,
        Value::Float64Array(items) => items.len() * 8,
        Value::BytesArray(items) => items.iter().map(|i| i.len() + VALUE_OVERHEAD).sum(),
    };
    bytes + VALUE_OVERHEAD
}

/// An error in the database's own terms.
fn database_error(sqlstate: &str, message: impl Into<String>) -> Error {
    Error::Database(DatabaseError {
        sqlstate: Some(sqlstate.to_owned()),
        message: message.into(),
        constraint: None,
    })
}

/// What is not the database's word on a statement, but trouble on the way to it and back.
fn transport_error(error: &sqlx::Error) -> Error {
    match error {
        sqlx::Error::PoolTimedOut => Error::Unavailable(format!(
            "no connection became free within {} s",
            ACQUIRE_TIMEOUT.as_secs()
        )),
        sqlx::Error::Encode(why) | sqlx::Error::Decode(why) => Error::Unsupported(why.to_string()),
        sqlx::Error::ColumnDecode { index, source } => {
            Error::Unsupported(format!("column {index}: {source}"))
        }
        other => Error::Unavailable(other.to_string()),
    }
}

fn out_of_time() -> Error {
    out_of(STATEMENT_TIMEOUT)
}

/// Of a statement that took all of the time that it had.
fn out_of(time: Duration) -> Error {
    let time = humantime::format_duration(time);
    Error::Unavailable(format!("the statement took more than {time}"))
}
