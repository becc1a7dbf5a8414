//! The `sql` capability on SQLite: one file, many readers, one writer at a time.
//!
//! A connection is a thread (`pool`), since SQLite waits and works where it is called. What a guest's statement may do is
//! decided by SQLite's authorizer (`authorizer`), what it may take by its limits (`connection`, `memory`, `functions`).

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tracing::warn;

use super::done::Done as DoneBefore;
use super::ledger::{self, Statements};
use super::migrate::Migrations;
use super::{
    ACQUIRE_TIMEOUT, Action, Done, Error, Failure, Refusal, SqlAccess, StoreError, WAS_DONE, Work,
};
use call::Call;
use connection::BUSY_TIMEOUT;
use error::{error_of, is_of_text, open_error};
use pool::{Lease, Pool};

mod authorizer;
mod call;
mod connection;
mod error;
mod file;
mod functions;
mod guard;
mod memory;
mod pattern;
mod pool;
mod progress;
mod session;
mod value;

pub(super) use session::{NotReady, Session};

/// How long until the file is opened again that another process is just making.
const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// How often who waits for the turn to write says so.
const TURN_NOTICE: Duration = Duration::from_secs(10);

/// A SQLite database.
#[derive(Clone)]
pub(super) struct Sqlite {
    pool: Arc<Pool>,
    /// Held while writing: SQLite has one writer, and a queue here is fair where its own is not.
    writer: Arc<Mutex<()>>,
    /// A transaction of this stage's read first, and then wrote too late: from then on they take the turn to write with
    /// their first statement, or all of them would run twice.
    writes_late: Arc<AtomicBool>,
    progress: Arc<Statements>,
    options: Arc<SqliteConnectOptions>,
    place: Arc<str>,
    /// Whose statements it runs, where it is one stage's.
    stage: Arc<str>,
    /// What was done for it.
    done: Arc<DoneBefore>,
}

/// A connection of the driver that runs migrations. The first one makes the file's log, which SQLite refuses at once, without
/// its own wait, while another process does so too.
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
    migrations: Option<Migrations>,
    max_connections: u32,
) -> Result<Sqlite, StoreError> {
    let place = format!("SQLite at {}", file.display());
    memory::install().map_err(|why| StoreError::Refused(format!("{place}: {why}")))?;
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
        .disable_statement_logging();
    prepare(&options, &place, migrations.as_ref()).await?;
    let place: Arc<str> = place.into();
    let newcomer = migrations.map(|migrations| Newcomer {
        // It has been there: where it has gone again, no new one is wanted.
        options: options.clone().create_if_missing(false),
        place: place.clone(),
        migrations,
    });
    // One beside that of a transaction, which may wait for the turn of a statement that has none yet.
    let size = max_connections.max(2);
    Ok(Sqlite {
        pool: Arc::new(Pool::new(file.to_owned(), size, newcomer)),
        writer: Arc::default(),
        writes_late: Arc::default(),
        progress: Arc::new(Statements::of(&format!("main.{}", ledger::TABLE))),
        options: Arc::new(options),
        place,
        stage: "".into(),
        done: Arc::new(DoneBefore::new()),
    })
}

/// Makes the file's log, and runs the migrations.
async fn prepare(
    options: &SqliteConnectOptions,
    place: &str,
    migrations: Option<&Migrations>,
) -> Result<(), StoreError> {
    let mut connection = connect(options, place).await?;
    if let Some(migrations) = migrations {
        migrations
            .run_on_sqlite(&mut connection)
            .await
            .map_err(|error| match error {
                StoreError::Unavailable(why) => StoreError::Unavailable(format!("{place}: {why}")),
                StoreError::Refused(why) => StoreError::Refused(format!("{place}: {why}")),
            })?;
    }
    let closed = connection.close().await;
    closed.map_err(|error| open_error(place, &error))
}

/// What is done to a file that somebody has put in the place of the one that the host had open, before it is used: it may be a
/// copy of before the last migrations.
pub(super) struct Newcomer {
    options: SqliteConnectOptions,
    place: Arc<str>,
    migrations: Migrations,
}

impl Newcomer {
    async fn prepare(&self) -> Result<(), StoreError> {
        prepare(&self.options, &self.place, Some(&self.migrations)).await
    }
}

fn rewrite(sql: &rusqlite::Connection) -> rusqlite::Result<()> {
    let version: i64 = sql.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let rewrite = format!("BEGIN IMMEDIATE; PRAGMA user_version = {version}; COMMIT");
    let written = sql.execute_batch(&rewrite);
    if written.is_err() && !sql.is_autocommit() {
        // What it says of that changes nothing.
        let _ = sql.execute_batch("ROLLBACK");
    }
    written
}

impl Sqlite {
    /// The same, and what is learnt of the one stage is not taken for another's.
    pub(super) fn for_stage(&self) -> Self {
        Self {
            writes_late: Arc::default(),
            done: Arc::new(DoneBefore::new()),
            ..self.clone()
        }
    }

    pub(super) fn used_by(&mut self, stage: &str) {
        self.stage = stage.into();
    }

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
        let call = Call::new(self, access, text, work)?;
        if call.is_empty() {
            return Ok(Done::affected(0));
        }
        let writing = match call.only_reads() && !call.is_many() {
            true => None,
            false => Some(self.write().await?),
        };
        let mut lease = self.pool.take().await?;
        lease.writing = writing;
        let done = lease
            .run(move |connection| call.run_alone(connection))
            .await?;
        match done {
            Ok(done) => {
                lease.give_back();
                Ok(done)
            }
            Err(Failure::Lost(error)) => Err(error),
            Err(failure) => {
                lease.give_back();
                Err(failure.into_error())
            }
        }
    }

    /// What the failure of a guest's statement says of the file.
    pub(super) fn judge(access: SqlAccess, text: &str, error: Error) -> Refusal {
        match error {
            Error::Unavailable(why) if why.starts_with(WAS_DONE) => {
                // What it is run with has no part in it.
                Refusal::away(why, Action::Statement(text.into(), [].into()))
            }
            error => Refusal::of(error, access),
        }
    }

    /// Sees whether the file has again what a statement speaks of that was done before. Nothing is run.
    pub(super) async fn probe_statement(&self, access: SqlAccess, text: &str) -> Result<(), Error> {
        let text = connection::marked(access, text);
        let mut lease = self.pool.take().await?;
        let prepared = lease
            .run(move |connection| connection.try_to_prepare(access, &text))
            .await?;
        lease.give_back();
        prepared.map_err(|error| match (is_of_text(&error), error_of(&error)) {
            (true, Error::Database(said)) => Error::Unavailable(said.message),
            (_, error) => error,
        })
    }

    /// Writes what is there once more, which goes to the disk as anything else does.
    pub(super) async fn probe_write(&self) -> Result<(), Error> {
        let writing = self.write().await?;
        let mut lease = self.pool.take().await?;
        lease.writing = Some(writing);
        let written = lease.run(|connection| connection.as_host(rewrite)).await?;
        lease.give_back();
        written.map_err(|error| error_of(&error))
    }

    /// The turn to write, for who has somebody to tell that it was not to be had.
    async fn write(&self) -> Result<OwnedMutexGuard<()>, Error> {
        let lock = tokio::time::timeout(ACQUIRE_TIMEOUT, self.writer.clone().lock_owned()).await;
        lock.map_err(|_| {
            let waited = ACQUIRE_TIMEOUT.as_secs();
            Error::Unavailable(format!("other writers kept the database for {waited} s"))
        })
    }

    /// The turn to write, however long it takes: who has it gives it back at its stage's deadline at the latest.
    async fn write_in_turn(&self) -> OwnedMutexGuard<()> {
        let mut waited = Duration::ZERO;
        let lock = self.writer.clone().lock_owned();
        tokio::pin!(lock);
        loop {
            if let Ok(turn) = tokio::time::timeout(TURN_NOTICE, &mut lock).await {
                return turn;
            }
            waited += TURN_NOTICE;
            warn!(
                stage = &*self.stage,
                "{}: the stage has waited {} s for its turn to write: others keep transactions open",
                self.place,
                waited.as_secs()
            );
        }
    }

    /// A connection that may write. Waits for both.
    async fn writing(&self) -> Result<Lease, Error> {
        let writing = self.write_in_turn().await;
        let mut lease = self.pool.take().await?;
        lease.writing = Some(writing);
        Ok(lease)
    }
}
