//! The `sql` capability on SQLite: one file, many readers, one writer at a time.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use sqlx::sqlite::{
    SqliteArguments, SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool,
    SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, Either, Executor, SqlSafeStr, Statement as _,
};
use tokio::sync::{Mutex, MutexGuard};

use super::lease::Lease;
use super::migrate::Migrations;
use super::statement::{self, Dialect};
use super::{
    ACQUIRE_TIMEOUT, Answer, DatabaseError, Error, MAX_ANSWER_BYTES, Rows, STATEMENT_TIMEOUT,
    StoreError, Value, out_of_time, transport_error,
};

mod value;

use value::DeclaredTypes;

/// How long SQLite waits for another process that writes.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Prepared statements that a connection keeps.
const STATEMENT_CACHE: usize = 256;
/// Rows that the database's thread reads ahead. Each may have as many bytes as [`limit_values`] allows.
const ROWS_AHEAD: usize = 4;
/// Instructions of SQLite's machine between two looks at the clock: some tens of microseconds.
const INSTRUCTIONS_PER_LOOK: i32 = 10_000;

/// A SQLite database.
#[derive(Clone)]
pub(super) struct Sqlite {
    pool: SqlitePool,
    /// Held while writing: SQLite has one writer, and a queue here is fair where its own is not.
    writer: Arc<Mutex<()>>,
    declared: DeclaredTypes,
    altered: Altered,
}

/// When a table was last altered. The driver keeps the columns of prepared statements, and a connection whose
/// statement has other columns all of a sudden crashes; so connections from before are not used again.
/// With them goes what a CREATE made in `temp`.
#[derive(Clone, Default)]
struct Altered(Arc<RwLock<Option<Instant>>>);

impl Altered {
    fn note(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn is_since(&self, age: Duration) -> bool {
        let altered = *self.0.read().unwrap_or_else(PoisonError::into_inner);
        altered.is_some_and(|altered| altered.elapsed() <= age)
    }
}

/// Creates the file and its folder where they are missing, and runs the migrations.
pub(super) async fn open(
    file: &Path,
    migrations: Option<&Migrations>,
    max_connections: u32,
) -> Result<Sqlite, StoreError> {
    let place = format!("SQLite at {}", file.display());
    if let Some(folder) = file
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
    {
        tokio::fs::create_dir_all(folder)
            .await
            .map_err(|error| StoreError::Refused(format!("{}: {error}", folder.display())))?;
    }
    let options = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(BUSY_TIMEOUT)
        .statement_cache_capacity(STATEMENT_CACHE)
        .row_buffer_size(ROWS_AHEAD)
        .disable_statement_logging();
    let mut connection = options
        .connect()
        .await
        .map_err(|error| open_error(&place, &error))?;
    if let Some(migrations) = migrations {
        migrations
            .run_on_sqlite(&mut connection)
            .await
            .map_err(|error| match error {
                StoreError::Unavailable(why) => StoreError::Unavailable(format!("{place}: {why}")),
                StoreError::Refused(why) => StoreError::Refused(format!("{place}: {why}")),
            })?;
    }
    let declared = DeclaredTypes::default();
    let read = declared.read(&mut connection).await;
    read.map_err(|error| open_error(&place, &error))?;
    connection
        .close()
        .await
        .map_err(|error| open_error(&place, &error))?;

    let altered = Altered::default();
    let pool = SqlitePoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .test_before_acquire(false)
        .after_connect(|connection, _| Box::pin(limit_values(connection)))
        .before_acquire({
            let altered = altered.clone();
            move |_, metadata| {
                let current = !altered.is_since(metadata.age);
                Box::pin(async move { Ok(current) })
            }
        })
        .connect_lazy_with(options);
    Ok(Sqlite {
        pool,
        writer: Arc::default(),
        declared,
        altered,
    })
}

impl Sqlite {
    pub(super) async fn close(&self) {
        self.pool.close().await;
    }

    pub(super) async fn query(&self, text: &str, params: &[Value]) -> Result<Rows, Error> {
        let statement = Statement::new(text, params.len())?;
        let query = statement.with(params)?;
        let _writing = self.writing(&statement).await?;
        let mut connection = Lease::take(&self.pool).await?;
        let mut answer = self.fetch(&mut connection, &statement, query).await;
        if answer.is_ok() {
            let noted = self.note_altered(&mut connection, &statement).await;
            answer = answer.and_then(|rows| noted.map(|()| rows));
        }
        connection.finish(answer)
    }

    pub(super) async fn execute(&self, text: &str, params: &[Value]) -> Result<u64, Error> {
        let statement = Statement::new(text, params.len())?;
        let query = statement.with(params)?;
        let _writing = self.writing(&statement).await?;
        let mut connection = Lease::take(&self.pool).await?;
        let running = Running::default();
        let mut answer = execute(&mut connection, &running, &statement, query).await;
        if answer.is_ok() {
            let noted = self.note_altered(&mut connection, &statement).await;
            answer = answer.and_then(|rows| noted.map(|()| rows));
        }
        connection.finish(answer)
    }

    async fn note_altered(
        &self,
        connection: &mut SqliteConnection,
        statement: &Statement,
    ) -> Result<(), Error> {
        if !statement.alters_tables() {
            return Ok(());
        }
        self.altered.note();
        let running = Running::default();
        running.limit(connection).await?;
        let read = self.declared.read(connection).await;
        read.map_err(|error| error_of(&error))
    }

    pub(super) async fn execute_many(
        &self,
        text: &str,
        params: &[Vec<Value>],
    ) -> Result<u64, Error> {
        let keyword = statement::check_many(Dialect::Sqlite, text, params)?;
        if params.is_empty() {
            return Ok(0);
        }
        let text = text.into();
        let statement = Statement { keyword, text };
        let _writing = self.write().await?;
        let mut connection = Lease::take(&self.pool).await?;
        let mut answer = execute_many(&mut connection, &statement, params).await;
        if answer.is_ok() {
            let noted = self.note_altered(&mut connection, &statement).await;
            answer = answer.and_then(|rows| noted.map(|()| rows));
        }
        connection.finish(answer)
    }

    async fn writing(&self, statement: &Statement) -> Result<Option<MutexGuard<'_, ()>>, Error> {
        if statement.only_reads() {
            return Ok(None);
        }
        self.write().await.map(Some)
    }

    async fn write(&self) -> Result<MutexGuard<'_, ()>, Error> {
        let lock = tokio::time::timeout(ACQUIRE_TIMEOUT, self.writer.lock()).await;
        lock.map_err(|_| {
            let waited = ACQUIRE_TIMEOUT.as_secs();
            Error::Unavailable(format!("other writers kept the database for {waited} s"))
        })
    }

    async fn fetch(
        &self,
        connection: &mut SqliteConnection,
        statement: &Statement,
        query: Query,
    ) -> Result<Rows, Error> {
        let running = Running::default();
        running.limit(connection).await?;
        let mut answer = Answer::default();
        {
            let mut stream = query.fetch(&mut *connection);
            while let Some(row) = stream.try_next().await.map_err(|e| error_of(&e))? {
                if answer.columns.is_empty() {
                    answer.columns = value::names(sqlx::Row::columns(&row));
                }
                answer.push(value::row(&row, &self.declared)?)?;
            }
        }
        if answer.rows.is_empty() {
            // The names come with the rows, so an empty answer has to ask for them.
            let text = AssertSqlSafe(statement.text.clone()).into_sql_str();
            let prepared = (&mut *connection).prepare(text).await;
            let prepared = prepared.map_err(|error| error_of(&error))?;
            answer.columns = value::names(prepared.columns());
        }
        Ok(answer.finish())
    }
}

/// A statement that may be sent.
struct Statement {
    keyword: String,
    text: Arc<str>,
}

/// It and its parameters.
type Query = sqlx::query::Query<'static, sqlx::Sqlite, SqliteArguments>;

impl Statement {
    fn new(text: &str, params: usize) -> Result<Self, Error> {
        let keyword = statement::check(Dialect::Sqlite, text, params)?;
        let text = text.into();
        Ok(Self { keyword, text })
    }

    fn with(&self, params: &[Value]) -> Result<Query, Error> {
        let mut arguments = SqliteArguments::default();
        for param in params {
            value::bind(&mut arguments, param)?;
        }
        Ok(sqlx::query_with(
            AssertSqlSafe(self.text.clone()),
            arguments,
        ))
    }

    fn only_reads(&self) -> bool {
        matches!(self.keyword.as_str(), "SELECT" | "VALUES" | "EXPLAIN")
    }

    fn alters_tables(&self) -> bool {
        matches!(self.keyword.as_str(), "CREATE" | "ALTER" | "DROP")
    }
}

/// How many rows were changed or, as PostgreSQL counts, answered.
async fn execute(
    connection: &mut SqliteConnection,
    running: &Running,
    statement: &Statement,
    query: Query,
) -> Result<u64, Error> {
    running.limit(connection).await?;
    // SQLite's count of changed rows is about the last statement that may have changed some.
    let earlier = match statement.keyword.as_str() {
        "WITH" => Some(total_changes(connection).await?),
        _ => None,
    };
    let (mut answered, mut changed) = (0, 0);
    {
        let mut stream = connection.fetch_many(query);
        while let Some(item) = stream.try_next().await.map_err(|error| error_of(&error))? {
            match item {
                Either::Left(done) => changed += done.rows_affected(),
                Either::Right(_) => answered += 1,
            }
        }
    }
    let changes_rows = match statement.keyword.as_str() {
        "INSERT" | "UPDATE" | "DELETE" | "REPLACE" => true,
        "WITH" => earlier != Some(total_changes(connection).await?),
        _ => false,
    };
    Ok(match answered {
        0 if changes_rows => changed,
        answered => answered,
    })
}

async fn total_changes(connection: &mut SqliteConnection) -> Result<i64, Error> {
    let count = sqlx::query_scalar("SELECT total_changes()").fetch_one(connection);
    count.await.map_err(|error| error_of(&error))
}

/// All or none, in a transaction; what is not committed is rolled back.
async fn execute_many(
    connection: &mut SqliteConnection,
    statement: &Statement,
    params: &[Vec<Value>],
) -> Result<u64, Error> {
    let running = Running::default();
    running.limit(connection).await?;
    let begun = connection.begin_with("BEGIN IMMEDIATE").await;
    let mut transaction = begun.map_err(|error| error_of(&error))?;
    match execute_all(&mut transaction, &running, statement, params).await {
        Ok(affected) => {
            let committed = transaction.commit().await;
            committed.map_err(|error| error_of(&error))?;
            Ok(affected)
        }
        Err(error) => {
            let rolled_back = transaction.rollback().await;
            Err(rolled_back.map_or_else(|error| error_of(&error), |()| error))
        }
    }
}

async fn execute_all(
    connection: &mut SqliteConnection,
    running: &Running,
    statement: &Statement,
    params: &[Vec<Value>],
) -> Result<u64, Error> {
    let mut affected = 0;
    for params in params {
        let query = statement.with(params)?;
        affected += execute(connection, running, statement, query).await?;
    }
    Ok(affected)
}

/// A call that waits for SQLite. Dropped with the call, and SQLite sees it.
#[derive(Default)]
struct Running(Arc<()>);

impl Running {
    /// Has SQLite give up on the next statement in time, and when nobody waits for it any more.
    async fn limit(&self, connection: &mut SqliteConnection) -> Result<(), Error> {
        self.limit_to(connection, Instant::now() + STATEMENT_TIMEOUT)
            .await
    }

    async fn limit_to(
        &self,
        connection: &mut SqliteConnection,
        ends: Instant,
    ) -> Result<(), Error> {
        let mut handle = connection
            .lock_handle()
            .await
            .map_err(|error| error_of(&error))?;
        let running = Arc::downgrade(&self.0);
        handle.set_progress_handler(INSTRUCTIONS_PER_LOOK, move || {
            running.strong_count() > 0 && Instant::now() < ends
        });
        Ok(())
    }
}

/// Has SQLite refuse values and rows that no answer could carry, before it makes them.
#[allow(
    unsafe_code,
    reason = "neither the driver nor any statement sets this limit"
)]
async fn limit_values(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    let mut handle = connection.lock_handle().await?;
    let bytes = i32::try_from(MAX_ANSWER_BYTES).unwrap_or(i32::MAX);
    // SAFETY: the pointer is the connection's own, open and ours alone for as long as `handle` is locked, and the
    // call keeps nothing of it.
    unsafe {
        libsqlite3_sys::sqlite3_limit(
            handle.as_raw_handle().as_ptr(),
            libsqlite3_sys::SQLITE_LIMIT_LENGTH,
            bytes,
        );
    }
    Ok(())
}

fn error_of(error: &sqlx::Error) -> Error {
    let sqlx::Error::Database(database) = error else {
        return transport_error(error);
    };
    let code: i32 = match database.code().and_then(|code| code.parse().ok()) {
        Some(code) => code,
        None => return transport_error(error),
    };
    match code & 0xff {
        INTERRUPT => return out_of_time(),
        BUSY | LOCKED | NO_MEMORY | IO_ERROR | FULL | CANNOT_OPEN => {
            return Error::Unavailable(database.message().to_owned());
        }
        _ => {}
    }
    let message = database.message();
    Error::Database(DatabaseError {
        sqlstate: sqlstate(code).map(str::to_owned),
        message: message.to_owned(),
        constraint: constraint(code, message).map(str::to_owned),
    })
}

// SQLite's result codes.
const BUSY: i32 = 5;
const LOCKED: i32 = 6;
const NO_MEMORY: i32 = 7;
const INTERRUPT: i32 = 9;
const IO_ERROR: i32 = 10;
const FULL: i32 = 13;
const CANNOT_OPEN: i32 = 14;
const TOO_BIG: i32 = 18;
const CONSTRAINT: i32 = 19;
const MISMATCH: i32 = 20;
const CONSTRAINT_CHECK: i32 = 275;
const CONSTRAINT_FOREIGN_KEY: i32 = 787;
const CONSTRAINT_NOT_NULL: i32 = 1299;
const CONSTRAINT_PRIMARY_KEY: i32 = 1555;
const CONSTRAINT_TRIGGER: i32 = 1811;
const CONSTRAINT_UNIQUE: i32 = 2067;
const CONSTRAINT_ROW_ID: i32 = 2579;
const CONSTRAINT_DATA_TYPE: i32 = 3091;

/// What PostgreSQL calls it.
fn sqlstate(code: i32) -> Option<&'static str> {
    Some(match code {
        CONSTRAINT_UNIQUE | CONSTRAINT_PRIMARY_KEY | CONSTRAINT_ROW_ID => "23505",
        CONSTRAINT_NOT_NULL => "23502",
        CONSTRAINT_FOREIGN_KEY => "23503",
        CONSTRAINT_CHECK => "23514",
        CONSTRAINT_TRIGGER => "P0001",
        CONSTRAINT_DATA_TYPE => "42804",
        _ => match code & 0xff {
            CONSTRAINT => "23000",
            MISMATCH => "42804",
            TOO_BIG => "54000",
            _ => return None,
        },
    })
}

/// `UNIQUE constraint failed: posts.slug` names the columns, `CHECK constraint failed: positive` the constraint.
fn constraint(code: i32, message: &str) -> Option<&str> {
    match code {
        CONSTRAINT_UNIQUE | CONSTRAINT_PRIMARY_KEY | CONSTRAINT_CHECK => message
            .split_once(" constraint failed: ")
            .map(|(_, name)| name),
        _ => None,
    }
}

fn open_error(place: &str, error: &sqlx::Error) -> StoreError {
    match error_of(error) {
        Error::Unavailable(why) => StoreError::Unavailable(format!("{place}: {why}")),
        Error::Database(database) => StoreError::Refused(format!("{place}: {}", database.message)),
        other => StoreError::Refused(format!("{place}: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_statement_that_does_not_end_is_interrupted() {
        let options = SqliteConnectOptions::new().in_memory(true);
        let mut connection = options.connect().await.expect("a database in memory");
        let running = Running::default();
        let limited = running.limit_to(&mut connection, Instant::now()).await;
        limited.expect("a connection");
        let endless = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) \
                       SELECT count(*) FROM n";
        let answer = sqlx::query(endless).fetch_all(&mut connection).await;
        let error = answer.map(|rows| rows.len()).expect_err("an interruption");
        assert_eq!(error_of(&error), out_of_time());
    }
}
