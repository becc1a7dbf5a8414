//! The table of the lanes' progress on SQLite.

use rusqlite::{OptionalExtension, ToSql};
use sqlx::Connection as _;

use super::super::ledger::{self, Own, SQLITE, Statements, TABLE};
use super::super::migrate::{self, TIMEOUT};
use super::super::{Error, Failure, StoreError};
use super::connection::{Connection, bind};
use super::error::{error_of, failure_of, open_error};
use super::pool::Lease;
use super::{Sqlite, connect};
use crate::delivery::progress::{Checkpoint, Claim, Commit, LaneId};

impl Sqlite {
    pub(in super::super) async fn prepare_progress(&self) -> Result<(), StoreError> {
        let mut lease = self.writing().await?;
        if self.probe(&mut lease).await.is_err() {
            self.make().await?;
            if self.probe(&mut lease).await.is_err() {
                // It was made once, and somebody has dropped it since.
                let made = lease.run(|sql| sql.as_host(|sql| sql.execute_batch(&SQLITE.concat())));
                made.await?
                    .map_err(|error| StoreError::from(error_of(&error)))?;
                self.probe(&mut lease).await?;
            }
        }
        let attached = lease.run(|connection| connection.as_host(attached)).await?;
        lease.give_back();
        match attached.map_err(|error| StoreError::from(error_of(&error)))? {
            None => Ok(()),
            Some(what) => Err(StoreError::Refused(format!(
                "{}: {TABLE}, in which lanes keep their progress, has the {what}, which is not the host's and would run with \
                 each commit: drop it",
                self.place
            ))),
        }
    }

    async fn probe(&self, lease: &mut Lease) -> Result<(), Error> {
        let statements = self.progress.clone();
        let probed = lease.run(move |connection| {
            connection.as_host(|sql| sql.query_row(&statements.probe, [], |_| Ok(())).optional())
        });
        probed.await?.map(drop).map_err(|error| error_of(&error))
    }

    /// By the driver that runs migrations; whoever calls has the turn to write.
    async fn make(&self) -> Result<(), StoreError> {
        let migrator = ledger::migrator(SQLITE);
        let mut connection = connect(&self.options, &self.place).await?;
        let run = migrate::run_on_sqlite(&migrator, &mut connection);
        let run = tokio::time::timeout(TIMEOUT, run).await;
        let run = run.map_err(|_| migrate::out_of_time(TABLE, TIMEOUT))?;
        if let Err(error) = run {
            let error = ledger::migration_error(error)?;
            return Err(match open_error(&self.place, &error) {
                StoreError::Refused(why) => StoreError::Refused(format!(
                    "{why}: the table {TABLE}, which lanes keep their progress in, can't be made"
                )),
                other => other,
            });
        }
        let closed = connection.close().await;
        closed.map_err(|error| open_error(&self.place, &error))
    }

    pub(in super::super) async fn claim(
        &self,
        lane: &LaneId,
        how: Own,
    ) -> Result<Option<Claim>, Error> {
        let mut lease = match how {
            Own::Look => self.pool.take().await?,
            _ => self.writing().await?,
        };
        let (statements, lane) = (self.progress.clone(), lane.clone());
        let claimed = lease.run(move |connection| {
            connection.until_free(|connection| {
                connection.as_host(|sql| claim(sql, &statements, &lane, how))
            })
        });
        let claimed = claimed.await?;
        lease.give_back();
        claimed.map_err(|error| error_of(&error))
    }

    pub(in super::super) async fn save(&self, commit: Commit<'_>) -> Result<bool, Error> {
        let mut lease = self.writing().await?;
        let saved = save_on(&self.progress, &mut lease, commit).await;
        if !matches!(saved, Err(Failure::Lost(_))) {
            lease.give_back();
        }
        saved.map_err(Failure::into_error)
    }
}

/// What is attached to the table that only a stage of an earlier release can have made, in words.
fn attached(sql: &rusqlite::Connection) -> rusqlite::Result<Option<String>> {
    const ATTACHED: &str = "SELECT type || ' ' || name FROM main.sqlite_schema \
                            WHERE (tbl_name = $1 COLLATE NOCASE AND type IN ('trigger', 'index') AND sql IS NOT NULL) \
                            OR (name = $1 COLLATE NOCASE AND type = 'view') ORDER BY type DESC";
    let mut statement = sql.prepare(ATTACHED)?;
    statement.query_row([TABLE], |row| row.get(0)).optional()
}

fn claim(
    sql: &rusqlite::Connection,
    statements: &Statements,
    lane: &LaneId,
    how: Own,
) -> rusqlite::Result<Option<Claim>> {
    let LaneId {
        group,
        topic,
        partition,
    } = lane;
    let read = |row: &rusqlite::Row<'_>| -> rusqlite::Result<Claim> {
        Ok(Claim {
            epoch: row.get(0)?,
            generation: row.get(1)?,
            commits: row.get(2)?,
            checkpoint: Checkpoint {
                next_offset: row.get(3)?,
                attempts: u32::try_from(row.get::<_, i64>(4)?).unwrap_or_default(),
                pending: row.get(5)?,
                seen: row.get(6)?,
            },
        })
    };
    let (none, generation) = (Vec::<u8>::new(), ledger::generation());
    let (text, more): (_, &[&dyn ToSql]) = match &how {
        Own::Claim => (&statements.claim, &[&none, &generation]),
        Own::Reclaim { epoch } => (&statements.reclaim, &[epoch]),
        Own::Raise { epoch, generation } => (&statements.raise, &[epoch, generation]),
        Own::Look => (&statements.look, &[]),
    };
    let mut statement = sql.prepare_cached(text)?;
    let key: &[&dyn ToSql] = &[&&**group, &&**topic, partition];
    bind(&mut statement, &[key, more].concat())?;
    let mut rows = statement.raw_query();
    let claimed = rows.next()?.map(read).transpose()?;
    // What the row says is so only once the statement is through: with its end it is committed, or is not, on a full disk say.
    while rows.next()?.is_some() {}
    Ok(claimed)
}

/// Writes the lane's new state; answers whether the row was what the commit follows.
pub(super) async fn save_on(
    statements: &std::sync::Arc<Statements>,
    lease: &mut Lease,
    commit: Commit<'_>,
) -> Result<bool, Failure> {
    let statements = statements.clone();
    let (lane, checkpoint) = (commit.lane.clone(), commit.checkpoint.clone());
    let (epoch, commits, generation) = (commit.epoch, commit.commits, commit.generation);
    let saved = lease.run(move |connection: &mut Connection| {
        if connection.is_replaced() {
            let why = "another file is in the database's place";
            return Err(Failure::Lost(Error::Unavailable(why.to_owned())));
        }
        let saved = connection.until_free(|connection| {
            connection.as_host(|sql| {
                let mut statement = sql.prepare_cached(&statements.save)?;
                let params: [&dyn ToSql; 10] = [
                    &&*lane.group,
                    &&*lane.topic,
                    &lane.partition,
                    &epoch,
                    &commits,
                    &checkpoint.next_offset,
                    &checkpoint.attempts,
                    &checkpoint.pending,
                    &checkpoint.seen,
                    &generation,
                ];
                bind(&mut statement, &params)?;
                statement.raw_execute()
            })
        });
        saved.map_err(|error| failure_of(&error, &connection.guard))
    });
    Ok(saved.await.map_err(Failure::Lost)?? > 0)
}
