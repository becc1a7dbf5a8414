//! The table of the lanes' progress on SQLite.

use sqlx::AssertSqlSafe;
use sqlx::sqlite::SqliteConnection;

use super::super::lease::Lease;
use super::super::ledger::{self, SQLITE, TABLE};
use super::super::migrate::{self, TIMEOUT};
use super::super::{Error, Failure, MAX_ANSWER_BYTES, StoreError};
use super::call::Running;
use super::error::{error_of, failure_of};
use super::{Sqlite, limit_values};
use crate::delivery::progress::{Claim, Commit, LaneId};

/// Bytes of a row of the table, of which SQLite itself has none larger than 1,000,000,000.
const MAX_ROW_BYTES: usize = 1_000_000_000;

impl Sqlite {
    pub(in super::super) async fn prepare_progress(&self) -> Result<(), StoreError> {
        let _writing = self.writer.lock().await;
        let mut lease = Lease::take(&self.pool).await?;
        let running = Running::on(&mut lease).await?;
        if self.probe(&mut lease).await.is_err() {
            self.make(&mut lease).await?;
            running.renew();
            self.altered.note();
            self.read_declared(&mut lease).await?;
            let probed = self.probe(&mut lease).await;
            probed.map_err(|error| StoreError::from(error_of(&error)))?;
        }
        lease.give_back();
        Ok(())
    }

    async fn probe(&self, connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        let probe = sqlx::raw_sql(AssertSqlSafe(self.progress.probe.clone()));
        probe.execute(connection).await.map(drop)
    }

    async fn make(&self, connection: &mut SqliteConnection) -> Result<(), StoreError> {
        let migrator = ledger::migrator(SQLITE);
        let run = migrate::run_on_sqlite(&migrator, connection);
        let run = tokio::time::timeout(TIMEOUT, run).await;
        let run = run.map_err(|_| migrate::out_of_time(TABLE, TIMEOUT))?;
        match run {
            Ok(()) => Ok(()),
            Err(error) => Err(match ledger::migration_error(error)? {
                error @ sqlx::Error::Database(_) => match error_of(&error).into() {
                    StoreError::Refused(why) => StoreError::Refused(format!(
                        "{why}: the table {TABLE}, which lanes keep their progress in, can't be made"
                    )),
                    other => other,
                },
                error => error_of(&error).into(),
            }),
        }
    }

    pub(in super::super) async fn claim(
        &self,
        lane: &LaneId,
        epoch: Option<i64>,
    ) -> Result<Option<Claim>, Error> {
        let _writing = self.writer.lock().await;
        let mut lease = Lease::take(&self.pool).await?;
        let claim = self.claim_on(&mut lease, lane, epoch).await;
        lease.finish(claim.map_err(Failure::into_error))
    }

    async fn claim_on(
        &self,
        connection: &mut SqliteConnection,
        lane: &LaneId,
        epoch: Option<i64>,
    ) -> Result<Option<Claim>, Failure> {
        let _running = Running::on(connection).await?;
        limit(connection, MAX_ROW_BYTES).await?;
        let claim = ledger::claim::<sqlx::Sqlite>(connection, &self.progress, lane, epoch).await;
        limit(connection, MAX_ANSWER_BYTES).await?;
        claim.map_err(|error| failure_of(&error))
    }

    pub(in super::super) async fn save(&self, commit: Commit<'_>) -> Result<bool, Error> {
        let _writing = self.writer.lock().await;
        let mut lease = Lease::take(&self.pool).await?;
        let saved = async {
            let _running = Running::on(&mut lease).await?;
            self.save_on(&mut lease, commit).await
        };
        let saved = saved.await.map_err(Failure::into_error);
        lease.finish(saved)
    }

    pub(super) async fn save_on(
        &self,
        connection: &mut SqliteConnection,
        commit: Commit<'_>,
    ) -> Result<bool, Failure> {
        let checkpoint = commit.checkpoint;
        let is_large = checkpoint.pending.len() + checkpoint.seen.len() > MAX_ANSWER_BYTES / 2;
        if is_large {
            limit(connection, MAX_ROW_BYTES).await?;
        }
        let saved = ledger::save::<sqlx::Sqlite>(connection, &self.progress, commit).await;
        if is_large {
            limit(connection, MAX_ANSWER_BYTES).await?;
        }
        let saved = saved.map_err(|error| failure_of(&error))?;
        Ok(saved.rows_affected() > 0)
    }
}

async fn limit(connection: &mut SqliteConnection, bytes: usize) -> Result<(), Failure> {
    let limited = limit_values(connection, bytes).await;
    limited.map_err(|error| failure_of(&error).lost())
}
