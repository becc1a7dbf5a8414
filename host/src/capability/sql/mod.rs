//! `stagehost:stage/sql`: relational databases, PostgreSQL and SQLite.
//!
//! `guest` is what components call, [`Database`] what the host holds. Every statement is prepared,
//! is one statement, and commits by itself; transactions belong to the host.

mod decimal;
mod guest;
mod lease;
mod migrate;
mod postgres;
mod sqlite;
mod statement;
mod transaction;

use std::path::Path;
use std::time::Duration;

pub use guest::bindings::{DatabaseError, Error, Rows, Value};
pub use guest::{SqlCtx, SqlGrants, SqlView, add_to_linker};
pub use transaction::Transaction;

use super::StoreError;
use crate::pipeline::{SqlStore, SqlUrl};

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

/// Why [`Database::open`] would refuse the URL of a PostgreSQL database, without any of it.
pub fn check_postgres_url(url: &str) -> Result<(), String> {
    postgres::check_url(url)
}

/// An open database: a bounded pool of connections. Clones share it.
#[derive(Clone)]
pub struct Database(Kind);

#[derive(Clone)]
enum Kind {
    Postgres(postgres::Postgres),
    Sqlite(sqlite::Sqlite),
}

impl Database {
    /// Connects, and runs the migrations.
    pub async fn open(settings: &SqlStore) -> Result<Self, StoreError> {
        let migrations = settings.migrations.as_deref();
        Self::connect(&settings.url, migrations, settings.max_connections).await
    }

    /// As [`Database::open`], from the settings one by one.
    pub async fn connect(
        url: &SqlUrl,
        migrations: Option<&Path>,
        max_connections: u32,
    ) -> Result<Self, StoreError> {
        let migrations = match migrations {
            Some(folder) => Some(migrate::Migrations::load(folder).await?),
            None => None,
        };
        Ok(Self(match url {
            SqlUrl::Postgres(url) => {
                Kind::Postgres(postgres::open(url, migrations.as_ref(), max_connections).await?)
            }
            SqlUrl::Sqlite(file) => {
                Kind::Sqlite(sqlite::open(file, migrations.as_ref(), max_connections).await?)
            }
        }))
    }

    /// Asks the database for nothing, to see that it answers.
    pub async fn ping(&self) -> Result<(), StoreError> {
        match self.query("SELECT 1", &[]).await {
            Ok(_) => Ok(()),
            Err(Error::Unavailable(why)) => Err(StoreError::Unavailable(why)),
            Err(Error::Database(error)) => Err(StoreError::Refused(error.message)),
            Err(other) => Err(StoreError::Refused(other.to_string())),
        }
    }

    /// Waits for the statements that are running, and closes the connections.
    pub async fn close(&self) {
        match &self.0 {
            Kind::Postgres(database) => database.close().await,
            Kind::Sqlite(database) => database.close().await,
        }
    }

    /// Runs one statement and answers its rows.
    pub async fn query(&self, statement: &str, params: &[Value]) -> Result<Rows, Error> {
        match &self.0 {
            Kind::Postgres(database) => database.query(statement, params).await,
            Kind::Sqlite(database) => database.query(statement, params).await,
        }
    }

    /// Runs one statement and answers how many rows it affected.
    pub async fn execute(&self, statement: &str, params: &[Value]) -> Result<u64, Error> {
        match &self.0 {
            Kind::Postgres(database) => database.execute(statement, params).await,
            Kind::Sqlite(database) => database.execute(statement, params).await,
        }
    }

    /// Runs one statement once for every list of parameters in one transaction, and answers how
    /// many rows were affected in all.
    pub async fn execute_many(&self, statement: &str, params: &[Vec<Value>]) -> Result<u64, Error> {
        match &self.0 {
            Kind::Postgres(database) => database.execute_many(statement, params).await,
            Kind::Sqlite(database) => database.execute_many(statement, params).await,
        }
    }
}

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
    Error::Unavailable(format!(
        "the statement took more than {} s",
        STATEMENT_TIMEOUT.as_secs()
    ))
}
