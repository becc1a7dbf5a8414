//! The `sql` capability on SQLite: one file, many readers, one writer at a time.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions,
    SqliteSynchronous,
};
use sqlx::{ConnectOptions, Connection};
use tokio::sync::{Mutex, MutexGuard};

use super::lease::Lease;
use super::ledger::{self, Statements};
use super::migrate::Migrations;
use super::{ACQUIRE_TIMEOUT, Done, Error, Failure, MAX_ANSWER_BYTES, SqlAccess, StoreError, Work};
use call::{Call, Means, Running};
use error::{failure_of, open_error};
use value::DeclaredTypes;

mod call;
mod error;
mod progress;
mod session;
mod value;

pub(super) use session::Session;

/// How long SQLite waits for another process that writes.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long until the next try where it does not wait.
const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// Prepared statements that a connection keeps.
const STATEMENT_CACHE: usize = 256;
/// Rows that the database's thread reads ahead. Each may have as many bytes as [`limit_values`] allows.
const ROWS_AHEAD: usize = 4;

/// A SQLite database.
#[derive(Clone)]
pub(super) struct Sqlite {
    pool: SqlitePool,
    /// Held while writing: SQLite has one writer, and a queue here is fair where its own is not.
    writer: Arc<Mutex<()>>,
    declared: DeclaredTypes,
    altered: Altered,
    progress: Arc<Statements>,
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

/// The first connection makes the file's log. SQLite refuses that at once, without its own wait, while another process
/// does so too.
async fn connect(
    options: &SqliteConnectOptions,
    place: &str,
) -> Result<SqliteConnection, StoreError> {
    let deadline = Instant::now() + BUSY_TIMEOUT;
    loop {
        match options
            .connect()
            .await
            .map_err(|error| open_error(place, &error))
        {
            Err(StoreError::Unavailable(_)) if Instant::now() < deadline => {
                tokio::time::sleep(BUSY_PAUSE).await;
            }
            connected => return connected,
        }
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
    let mut connection = connect(&options, &place).await?;
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
        .after_connect(|connection, _| Box::pin(limit_values(connection, MAX_ANSWER_BYTES)))
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
        progress: Arc::new(Statements::of(&format!("main.{}", ledger::TABLE))),
    })
}

impl Sqlite {
    pub(super) async fn close(&self) {
        self.pool.close().await;
    }

    /// Runs a statement on a connection of the pool, where it commits by itself.
    pub(super) async fn call(
        &self,
        access: SqlAccess,
        text: &str,
        work: Work<'_>,
    ) -> Result<Done, Error> {
        let mut call = Call::new(access, text, work)?;
        if let Work::ExecuteMany([]) = work {
            return Ok(Done::affected(0));
        }
        let _writing = match call.only_reads() && !call.is_many() {
            true => None,
            false => Some(self.write().await?),
        };
        let mut connection = Lease::take(&self.pool).await?;
        let answer = self.run(&mut connection, &mut call).await;
        connection.finish(answer)
    }

    async fn run(
        &self,
        connection: &mut SqliteConnection,
        call: &mut Call<'_>,
    ) -> Result<Done, Error> {
        let running = Running::on(connection).await?;
        let mut means = Means {
            connection,
            running: &running,
            declared: &self.declared,
        };
        let answer = call.run_alone(&mut means).await;
        let answer = answer.map_err(Failure::into_error)?;
        if call.alters_tables() {
            self.altered.note();
            running.renew();
            self.read_declared(connection).await?;
        }
        Ok(answer)
    }

    async fn read_declared(&self, connection: &mut SqliteConnection) -> Result<(), Error> {
        let read = self.declared.read(connection).await;
        read.map_err(|error| error::error_of(&error))
    }

    async fn write(&self) -> Result<MutexGuard<'_, ()>, Error> {
        let lock = tokio::time::timeout(ACQUIRE_TIMEOUT, self.writer.lock()).await;
        lock.map_err(|_| {
            let waited = ACQUIRE_TIMEOUT.as_secs();
            Error::Unavailable(format!("other writers kept the database for {waited} s"))
        })
    }
}

/// Has SQLite refuse values and rows that no answer could carry, before it makes them.
#[allow(
    unsafe_code,
    reason = "neither the driver nor any statement sets this limit"
)]
async fn limit_values(connection: &mut SqliteConnection, bytes: usize) -> Result<(), sqlx::Error> {
    let mut handle = connection.lock_handle().await?;
    let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
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
