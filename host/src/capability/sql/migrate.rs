//! Migrations: `<number>_<what>.sql` files of a folder, each run once, in the order of their numbers.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sqlx::Connection;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::{PgConnection, PgDatabaseError, PgErrorPosition};
use sqlx::sqlite::SqliteConnection;
use tracing::{info, warn};

use super::StoreError;

/// How long all migrations may take together, waiting for another host that runs them included.
pub(super) const TIMEOUT: Duration = Duration::from_secs(600);

/// How often it is said that they still run.
const NOTICE: Duration = Duration::from_secs(10);

/// The migrations of one folder.
pub(super) struct Migrations {
    migrator: Migrator,
    folder: PathBuf,
    files: BTreeMap<i64, PathBuf>,
}

impl Migrations {
    /// Reads the folder. Every `.sql` file in it must have a number of its own.
    pub(super) async fn load(folder: &Path) -> Result<Self, StoreError> {
        let files = files(folder).await?;
        let migrator = Migrator::new(folder)
            .await
            .map_err(|error| StoreError::Refused(error.to_string()))?;
        Ok(Self {
            migrator,
            folder: folder.to_owned(),
            files,
        })
    }

    /// Runs what has not run yet, under an advisory lock of the database.
    pub(super) async fn run_on_postgres(
        &self,
        connection: &mut PgConnection,
    ) -> Result<(), StoreError> {
        let outcome = self.in_time(TIMEOUT, self.migrator.run(connection)).await?;
        outcome.map_err(|error| self.explain(error))
    }

    /// Runs what has not run yet. A file that begins with `-- no-transaction` gets none; where no file does,
    /// all run in one, so that another host waits.
    pub(super) async fn run_on_sqlite(
        &self,
        connection: &mut SqliteConnection,
    ) -> Result<(), StoreError> {
        let run = run_on_sqlite(&self.migrator, connection);
        let outcome = self.in_time(TIMEOUT, run).await?;
        outcome.map_err(|error| self.explain(error))
    }

    async fn in_time<T>(
        &self,
        limit: Duration,
        work: impl Future<Output = T>,
    ) -> Result<T, StoreError> {
        let folder = self.folder.display();
        let began = Instant::now();
        let work = tokio::time::timeout(limit, work);
        tokio::pin!(work);
        let outcome = loop {
            match tokio::time::timeout(NOTICE, &mut work).await {
                Ok(outcome) => break outcome,
                Err(_) => warn!(
                    "migrations of {folder} go on, for {:.0?} now",
                    began.elapsed()
                ),
            }
        };
        let outcome = outcome.map_err(|_| out_of_time(&folder, limit))?;
        info!(
            "migrations of {folder} were looked through in {:.1?}",
            began.elapsed()
        );
        Ok(outcome)
    }

    fn explain(&self, error: MigrateError) -> StoreError {
        let folder = self.folder.display();
        StoreError::Refused(match error {
            MigrateError::ExecuteMigration(error, version) => {
                let file = self.file(version);
                let line = self.line(&error, version);
                let line = line.map_or(String::new(), |line| format!(":{line}"));
                let why = match &error {
                    sqlx::Error::Database(database) => database.message().to_owned(),
                    other => other.to_string(),
                };
                format!("migration {file}{line}: {why}")
            }
            MigrateError::Execute(sqlx::Error::Database(error)) => {
                format!("migrations of {folder}: {}", error.message())
            }
            MigrateError::Execute(error) => {
                return StoreError::Unavailable(format!("migrations of {folder}: {error}"));
            }
            MigrateError::VersionMismatch(version) => format!(
                "migration {} is not what was run on this database; \
                 bring the old file back and make the change in a new one",
                self.file(version)
            ),
            MigrateError::VersionMissing(version) => format!(
                "migration {version} was run on this database, but {folder} has no such file"
            ),
            MigrateError::Dirty(version) => format!(
                "migration {} was run in part; finish or undo it by hand, and remove its row from _sqlx_migrations",
                self.file(version)
            ),
            other => format!("migrations of {folder}: {other}"),
        })
    }

    fn file(&self, version: i64) -> String {
        match self.files.get(&version) {
            Some(file) => file.display().to_string(),
            None => version.to_string(),
        }
    }

    /// The line that PostgreSQL points at.
    fn line(&self, error: &sqlx::Error, version: i64) -> Option<usize> {
        let error = error
            .as_database_error()?
            .try_downcast_ref::<PgDatabaseError>()?;
        let PgErrorPosition::Original(position) = error.position()? else {
            return None;
        };
        let migration = self.migrator.iter().find(|m| m.version == version)?;
        let before = migration
            .sql
            .as_str()
            .chars()
            .take(position.saturating_sub(1));
        Some(before.filter(|char| *char == '\n').count() + 1)
    }
}

/// Migrations that do not come to an end.
pub(super) fn out_of_time(of: impl Display, limit: Duration) -> StoreError {
    StoreError::Unavailable(format!(
        "migrations of {of} did not end within {} s: another host may be running them, or something keeps a table \
         locked",
        limit.as_secs()
    ))
}

/// All in one transaction, unless one of them has none.
pub(super) async fn run_on_sqlite(
    migrator: &Migrator,
    connection: &mut SqliteConnection,
) -> Result<(), MigrateError> {
    if migrator.iter().any(|migration| migration.no_tx) {
        return migrator.run(connection).await;
    }
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
    migrator.run(&mut *transaction).await?;
    Ok(transaction.commit().await?)
}

/// The `.sql` files by number. A name that the migrator would pass over in silence is an error.
async fn files(folder: &Path) -> Result<BTreeMap<i64, PathBuf>, StoreError> {
    let unreadable =
        |error| StoreError::Refused(format!("migrations folder {}: {error}", folder.display()));
    let mut entries = tokio::fs::read_dir(folder).await.map_err(unreadable)?;
    let mut files: BTreeMap<i64, PathBuf> = BTreeMap::new();
    while let Some(entry) = entries.next_entry().await.map_err(unreadable)? {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.ends_with(".sql") || name.ends_with(".down.sql") {
            continue;
        }
        let number = name
            .split_once('_')
            .and_then(|(number, _)| number.parse().ok());
        let Some(number) = number.filter(|number| *number > 0) else {
            let path = path.display();
            let message =
                format!("migration {path}: name it <number>_<what>.sql, as 0001_posts.sql");
            return Err(StoreError::Refused(message));
        };
        if let Some(other) = files.insert(number, path.clone()) {
            let (path, other) = (path.display(), other.display());
            let message = format!("migrations {other} and {path} have the same number");
            return Err(StoreError::Refused(message));
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn migrations_that_do_not_end_are_given_up() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let migrations = Migrations::load(folder.path()).await;
        let migrations = migrations.expect("no migrations");
        let endless = migrations.in_time(Duration::ZERO, std::future::pending::<()>());
        match endless.await {
            Err(StoreError::Unavailable(why)) => {
                let folder = folder.path().display().to_string();
                assert!(why.contains(&folder) && why.contains("locked"), "{why}");
            }
            other => panic!("{other:?}"),
        }
    }
}
