//! How far transactional lanes have got: the table `stagehost_progress`.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use sqlx::SqlSafeStr;
use sqlx::migrate::{MigrateError, Migration, MigrationType, Migrator};

use super::{Database, Error, Kind, StoreError, Transaction, host_error};
use crate::delivery::progress::{Claim, Commit, CommitError, LaneId, Ledger, Mode};

/// The table's name, without its schema.
pub(super) const TABLE: &str = "stagehost_progress";
/// What the host's own migrations are kept in; `_sqlx_migrations` is the user's.
const MIGRATIONS: &str = "_stagehost_migrations";
/// What makes the table on PostgreSQL, step by step. They have been run on databases: a change is another one.
pub(super) const POSTGRES: &[&str] = &[
    include_str!("ledger/postgres.sql"),
    include_str!("ledger/postgres-storage.sql"),
];
/// The same on SQLite.
pub(super) const SQLITE: &[&str] = &[include_str!("ledger/sqlite.sql")];

/// The host's migrations of one kind of database.
pub(super) fn migrator(steps: &[&'static str]) -> Migrator {
    let migration = |(version, step): (i64, &&'static str)| {
        let simple = MigrationType::Simple;
        Migration::new(
            version,
            "progress".into(),
            simple,
            step.into_sql_str(),
            false,
        )
    };
    let mut migrator = Migrator::with_migrations((1..).zip(steps).map(migration).collect());
    migrator.dangerous_set_table_name(MIGRATIONS);
    migrator
}

/// What went wrong when they ran, where the database said it.
pub(super) fn migration_error(error: MigrateError) -> Result<sqlx::Error, StoreError> {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => Ok(error),
        MigrateError::VersionMissing(version) => Err(StoreError::Refused(format!(
            "a newer version of the host has changed {TABLE} (its migration {version}): use that one here too"
        ))),
        other => Err(StoreError::Refused(format!("{TABLE}: {other}"))),
    }
}

/// How a lane's row is taken hold of.
#[derive(Clone, Copy)]
pub(super) enum Own {
    /// Whoever had it.
    Claim,
    /// Where it is of this epoch.
    Reclaim { epoch: i64 },
    /// Its generation is raised, where it is of this epoch.
    Raise { epoch: i64, generation: i64 },
    /// Not at all: it is looked at.
    Look,
}

/// The statements on the table.
pub(super) struct Statements {
    /// Asks for every column, and no row.
    pub(super) probe: Arc<str>,
    /// A row that nobody has, as it would be rolled back: `$1` is its group, `$2` what it weighs.
    pub(super) probe_write: Arc<str>,
    pub(super) claim: Arc<str>,
    pub(super) reclaim: Arc<str>,
    pub(super) raise: Arc<str>,
    pub(super) look: Arc<str>,
    /// Where the row is what the commit follows: of its epoch and generation, with one commit less.
    pub(super) save: Arc<str>,
    /// On PostgreSQL: fails unless it has written the row, with a division by zero, so that what is sent with it, a commit,
    /// finds a transaction that has failed.
    pub(super) save_or_fail: Arc<str>,
}

impl Statements {
    /// `table` with its schema, as it may stand in a statement.
    pub(super) fn of(table: &str) -> Self {
        const KEY: &str = "consumer_group, topic, partition";
        const ROW: &str = "epoch, generation, commits, next_offset, attempts, pending, seen";
        const LANE: &str = "consumer_group = $1 AND topic = $2 AND partition = $3";
        const OWN: &str = "consumer_group = $1 AND topic = $2 AND partition = $3 AND epoch = $4";
        const NOW: &str = "updated_at = CURRENT_TIMESTAMP";
        let save = format!(
            "UPDATE {table} SET commits = $5, next_offset = $6, attempts = $7, pending = $8, seen = $9, {NOW} \
             WHERE {OWN} AND generation = $10 AND commits = $5 - 1"
        );
        Self {
            probe: format!("SELECT {KEY}, {ROW}, updated_at FROM {table} LIMIT 0").into(),
            probe_write: format!(
                "INSERT INTO {table} ({KEY}, epoch, generation, commits, attempts, pending, seen) \
                 VALUES ($1, '', -1, 0, 0, 0, 0, $2, $2)"
            )
            .into(),
            claim: format!(
                "INSERT INTO {table} AS p ({KEY}, {ROW}) VALUES ($1, $2, $3, 1, $5, 0, NULL, 0, $4, $4) \
                 ON CONFLICT ({KEY}) DO UPDATE SET epoch = p.epoch + 1, {NOW} RETURNING {ROW}"
            )
            .into(),
            reclaim: format!("UPDATE {table} SET epoch = epoch + 1, {NOW} WHERE {OWN} RETURNING {ROW}").into(),
            raise: format!(
                "UPDATE {table} SET generation = CASE WHEN generation < $5 THEN $5 ELSE generation END, {NOW} \
                 WHERE {OWN} RETURNING {ROW}"
            )
            .into(),
            look: format!("SELECT {ROW} FROM {table} WHERE {LANE}").into(),
            save_or_fail: format!(
                "WITH saved AS ({save} RETURNING 1) \
                 SELECT 1 OPERATOR(pg_catalog./) pg_catalog.count(*) FROM saved"
            )
            .into(),
            save: save.into(),
        }
    }
}

/// A new row's generation: above that of any row which the lane had before and lost, so that what comes of it is not taken for
/// what came of that one. Milliseconds since the Unix epoch.
pub(super) fn generation() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    i64::try_from(now.unwrap_or_default().as_millis()).unwrap_or_default()
}

impl Database {
    /// Sees to it that the table `stagehost_progress` is there and may be used: makes it, where it is not.
    pub async fn prepare_progress(&self) -> Result<(), StoreError> {
        match &self.kind {
            Kind::Postgres(database) => database.prepare_progress().await,
            Kind::Sqlite(database) => database.prepare_progress().await,
        }
    }

    async fn own(&self, lane: &LaneId, how: Own) -> Result<Option<Claim>, StoreError> {
        let claim = match &self.kind {
            Kind::Postgres(database) => database.claim(lane, how).await,
            Kind::Sqlite(database) => database.claim(lane, how).await,
        };
        claim.map_err(host_error)
    }
}

impl Ledger for Database {
    type Transaction = Transaction;

    async fn claim(&self, lane: &LaneId) -> Result<Claim, StoreError> {
        let claim = self.own(lane, Own::Claim).await?;
        claim.ok_or_else(|| StoreError::Refused(format!("{TABLE} takes no rows")))
    }

    async fn reclaim(&self, lane: &LaneId, epoch: i64) -> Result<Option<Claim>, StoreError> {
        self.own(lane, Own::Reclaim { epoch }).await
    }

    async fn look(&self, lane: &LaneId) -> Result<Option<Claim>, StoreError> {
        self.own(lane, Own::Look).await
    }

    async fn raise(
        &self,
        lane: &LaneId,
        epoch: i64,
        generation: i64,
    ) -> Result<Option<Claim>, StoreError> {
        self.own(lane, Own::Raise { epoch, generation }).await
    }

    async fn begin(&self, mode: Mode) -> Result<Transaction, StoreError> {
        Transaction::begin(self, mode).await
    }

    async fn save(&self, commit: Commit<'_>) -> Result<(), CommitError> {
        let saved = match &self.kind {
            Kind::Postgres(database) => database.save(commit).await,
            Kind::Sqlite(database) => database.save(commit).await,
        };
        match saved {
            Ok(true) => Ok(()),
            Ok(false) => Err(CommitError::Fenced),
            Err(Error::Database(error)) => Err(CommitError::Unanswered(error.message)),
            Err(Error::Unavailable(why)) => Err(CommitError::Unanswered(why)),
            Err(other) => Err(CommitError::Unanswered(other.to_string())),
        }
    }
}
