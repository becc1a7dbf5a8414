//! The table of the lanes' progress on PostgreSQL.

use std::pin::pin;
use std::time::Duration;

use postgres_types::Type;
use sqlx::Connection;
use sqlx::migrate::Migrator;

use super::super::ledger::{self, Own, POSTGRES, Statements, TABLE};
use super::super::migrate::{self, TIMEOUT};
use super::super::transaction::{unanswered, words};
use super::super::{CANCELED, Error, Failure, IN_THE_WAY, Sight, StoreError, Value, out_of_time};
use super::call::forget_plans;
use super::client::Client;
use super::error::{STALE_PLAN, error_of};
use super::guests::{self, FENCED, Secret, UNKNOWN_SECRET};
use super::locks::Watched;
use super::value::Parameters;
use super::{Postgres, in_time, migrating};
use crate::delivery::progress::{Checkpoint, Claim, Commit, CommitError, LaneId};

const INSUFFICIENT_PRIVILEGE: &str = "42501";
const UNDEFINED_COLUMN: &str = "42703";
/// No schema of the search path exists, or may be used.
const INVALID_SCHEMA: &str = "3F000";
/// What [`Statements::save_or_fail`] makes of a row that is not the commit's any more.
const DIVISION_BY_ZERO: &str = "22012";

/// How long a claim waits for who has the row.
const ROW_PATIENCE: Duration = Duration::from_secs(5);

/// Where the table is, and what may be done with it.
struct Found {
    table: String,
    schema: String,
    role: String,
    is_granted: bool,
}

impl Postgres {
    pub(in super::super) async fn prepare_progress(&self) -> Result<(), StoreError> {
        let mut lease = self.take_own().await?;
        let (statements, schema) = prepare(&mut lease, self).await?;
        if let Some(secret) = &self.secret {
            secret.prepare(&mut lease, &schema).await?;
            // What was made just now may have come with grants.
            let mut guest = self.pool.take().await?;
            let place = self.own.server().place();
            guests::check(&place, &mut lease, &mut guest).await?;
        }
        let _ = self.progress.set(statements);
        Ok(())
    }

    pub(in super::super) async fn claim(
        &self,
        lane: &LaneId,
        how: Own,
    ) -> Result<Option<Claim>, Error> {
        let statements = self.statements();
        let mut parameters = key(lane)?;
        let text = match how {
            Own::Claim => {
                parameters.bytea(&[])?;
                parameters.int8(ledger::generation());
                &statements.claim
            }
            Own::Reclaim { epoch } => {
                parameters.int8(epoch);
                &statements.reclaim
            }
            Own::Raise { epoch, generation } => {
                parameters.int8(epoch);
                parameters.int8(generation);
                &statements.raise
            }
        };
        let mut lease = self.take_own().await?;
        let rows = match self.claim_in_time(&mut lease, text, &parameters).await {
            Ok(rows) => rows,
            Err(error) => {
                if matches!(&error, Error::Unavailable(why) if why == STALE_PLAN) {
                    // The next claim may meet this connection again; one that can't forget is closed.
                    let _ = forget_plans(&mut lease).await;
                }
                return Err(error);
            }
        };
        rows.into_iter().next().map(read_claim).transpose()
    }

    pub(in super::super) async fn save(&self, commit: Commit<'_>) -> Result<bool, Error> {
        let parameters = parameters(None, commit)?;
        let mut lease = self.take_own().await?;
        let text = &self.statements().save_or_fail;
        let saved = in_time(lease.ask(text, &parameters)).await;
        match saved {
            Ok(_) => Ok(true),
            Err(failure) => match failure.into_error() {
                error if is(&error, DIVISION_BY_ZERO) => Ok(false),
                error => Err(error),
            },
        }
    }

    /// Writes the row and commits, in a session of the stage's; `before` ends what its statements ran in.
    pub(super) async fn save_and_commit(
        &self,
        client: &mut Client,
        before: Option<&str>,
        commit: Commit<'_>,
    ) -> Result<(), CommitError> {
        let secret = self.secret.as_deref();
        let text = match secret {
            None => &*self.statements().save_or_fail,
            Some(secret) => secret.save(),
        };
        let parameters = parameters(secret.map(Secret::bytes), commit);
        let parameters = parameters.map_err(|error| unanswered(error.into()))?;
        let done = in_time(client.run_between(before, (text, &parameters), "COMMIT")).await;
        match done.map_err(unanswered)? {
            (Ok(()), Ok(())) => Ok(()),
            (Ok(()), Err(Failure::Statement(Error::Database(error)))) => {
                Err(CommitError::Refused(error.message))
            }
            (Ok(()), Err(other)) => Err(unanswered(other)),
            // The commit has found a transaction that had failed, and rolled it back.
            (Err(failure), _) => match failure.into_error() {
                error if is(&error, DIVISION_BY_ZERO) || is(&error, FENCED) => {
                    Err(CommitError::Fenced)
                }
                error => {
                    if is(&error, UNKNOWN_SECRET)
                        && let Some(secret) = secret
                    {
                        secret.forget();
                    }
                    // The row is the host's, and that it can't be written is no fault of the effects.
                    Err(CommitError::Unanswered(words(error)))
                }
            },
        }
    }

    /// Claims, not waiting longer for who has the row than a commit of another host takes: whoever keeps it is named.
    async fn claim_in_time(
        &self,
        client: &mut Client,
        text: &str,
        parameters: &Parameters,
    ) -> Result<Vec<Vec<Value>>, Error> {
        let begin = format!(
            "BEGIN; SET LOCAL lock_timeout = '{}ms'",
            ROW_PATIENCE.as_millis()
        );
        let begun = in_time(client.command(&begin)).await;
        begun.map_err(Failure::into_error)?;
        let (watched, sight) = (Watched::of(client), Sight::default());
        let (claimed, waited) = {
            let claiming = pin!(in_time(client.ask(text, parameters)));
            self.watched(watched, &sight, claiming).await
        };
        let end = match claimed {
            Ok(_) => "COMMIT",
            Err(_) => "ROLLBACK",
        };
        let ended = in_time(client.command(end)).await;
        let error = match (claimed, ended) {
            (Ok(rows), Ok(())) => return Ok(rows),
            (Err(failure), _) | (Ok(_), Err(failure)) => failure.into_error(),
        };
        let Error::Unavailable(why) = &error else {
            return Err(error);
        };
        let is_locked = why.starts_with(IN_THE_WAY);
        let who = match waited.wait.who() {
            Some(who) if is_locked || why.starts_with(CANCELED) || error == out_of_time() => who,
            None if is_locked => "end its transaction".to_owned(),
            _ => return Err(error),
        };
        Err(Error::Unavailable(format!(
            "another session keeps the lane's row in {TABLE} locked: {who}"
        )))
    }

    fn statements(&self) -> &Statements {
        self.progress.get_or_init(|| Statements::of(TABLE))
    }

    /// Sees to it that the server knows the host's secret; asks it once a day.
    pub(super) async fn renew_secret(&self) -> Result<(), Error> {
        match &self.secret {
            Some(secret) if !secret.is_known() => {
                let mut lease = self.take_own().await?;
                let made = secret.register(&mut lease).await;
                made.map_err(Failure::into_error)
            }
            _ => Ok(()),
        }
    }
}

fn key(lane: &LaneId) -> Result<Parameters, Error> {
    let mut parameters = Parameters::default();
    parameters.text(&lane.group)?;
    parameters.text(&lane.topic)?;
    parameters.int4(lane.partition);
    Ok(parameters)
}

fn parameters(secret: Option<&[u8]>, commit: Commit<'_>) -> Result<Parameters, Error> {
    let Commit {
        lane,
        epoch,
        commits,
        checkpoint,
    } = commit;
    let mut parameters = key(lane)?;
    parameters.int8(epoch);
    parameters.int8(commits);
    match checkpoint.next_offset {
        Some(offset) => parameters.int8(offset),
        None => parameters.null(Type::INT8),
    }
    parameters.int4(i32::try_from(checkpoint.attempts).unwrap_or(i32::MAX));
    parameters.bytea(&checkpoint.pending)?;
    parameters.bytea(&checkpoint.seen)?;
    if let Some(secret) = secret {
        parameters.bytea(secret)?;
    }
    Ok(parameters)
}

fn read_claim(row: Vec<Value>) -> Result<Claim, Error> {
    let unreadable = || Error::Unsupported(format!("{TABLE} has a row that can't be read"));
    let row: [Value; 7] = row.try_into().map_err(|_| unreadable())?;
    let [
        Value::Int64(epoch),
        Value::Int64(generation),
        Value::Int64(commits),
        next_offset,
        Value::Int64(attempts),
        Value::Bytes(pending),
        Value::Bytes(seen),
    ] = row
    else {
        return Err(unreadable());
    };
    let next_offset = match next_offset {
        Value::Int64(offset) => Some(offset),
        _ => None,
    };
    let attempts = u32::try_from(attempts).unwrap_or_default();
    Ok(Claim {
        epoch,
        generation,
        commits,
        checkpoint: Checkpoint {
            next_offset,
            attempts,
            pending,
            seen,
        },
    })
}

pub(super) fn is(error: &Error, code: &str) -> bool {
    matches!(error, Error::Database(error) if error.sqlstate.as_deref() == Some(code))
}

/// Finds the table, or makes it; and names it with its schema, so that no search path hides it.
async fn prepare(
    client: &mut Client,
    database: &Postgres,
) -> Result<(Statements, String), StoreError> {
    let mut migrated = false;
    loop {
        let Some(found) = find(client).await? else {
            if migrated {
                let words = format!("{TABLE} was made, and can't be found in the search path");
                return Err(StoreError::Refused(words));
            }
            make(client, database).await?;
            migrated = true;
            continue;
        };
        let Found {
            table,
            role,
            schema,
            is_granted,
        } = found;
        if !is_granted {
            return Err(StoreError::Refused(format!(
                "the role {role} needs more rights on {table}: GRANT SELECT, INSERT, UPDATE ON {table} TO {role}"
            )));
        }
        let statements = Statements::of(&table);
        match in_time(client.command(&statements.probe)).await {
            Ok(()) => return Ok((statements, schema)),
            Err(failure) => match failure.into_error() {
                error if is(&error, UNDEFINED_COLUMN) && !migrated => {
                    make(client, database).await?;
                    migrated = true;
                }
                error => return Err(error.into()),
            },
        }
    }
}

async fn find(client: &mut Client) -> Result<Option<Found>, StoreError> {
    const FIND: &str = "SELECT format('%I.%I', n.nspname, c.relname), quote_ident(n.nspname), quote_ident(current_user), \
                        has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'INSERT') \
                        AND has_table_privilege(c.oid, 'UPDATE') \
                        FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace \
                        WHERE c.oid = to_regclass($1)";
    let mut name = Parameters::default();
    name.text(TABLE)?;
    let rows = in_time(client.ask(FIND, &name)).await;
    let row = rows.map_err(Failure::into_error)?.into_iter().next();
    let Some(row) = row else { return Ok(None) };
    match <[Value; 4]>::try_from(row) {
        Ok(
            [
                Value::Text(table),
                Value::Text(schema),
                Value::Text(role),
                Value::Boolean(is_granted),
            ],
        ) => Ok(Some(Found {
            table,
            schema,
            role,
            is_granted,
        })),
        _ => Err(StoreError::Refused(format!("{TABLE} can't be asked for"))),
    }
}

async fn make(client: &mut Client, database: &Postgres) -> Result<(), StoreError> {
    let server = database.own.server();
    let mut connection = migrating(server, &server.place()).await?;
    let migrator: Migrator = ledger::migrator(POSTGRES);
    let run = tokio::time::timeout(TIMEOUT, migrator.run(&mut connection)).await;
    let run = run.map_err(|_| migrate::out_of_time(TABLE, TIMEOUT))?;
    let error = match run {
        Ok(()) => {
            // It did its work; that it may not close in order changes nothing.
            let _ = connection.close().await;
            return Ok(());
        }
        // Dropped, the connection is closed, and the migrator's lock is gone with it.
        Err(error) => error_of(&ledger::migration_error(error)?),
    };
    if is(&error, INSUFFICIENT_PRIVILEGE) || is(&error, INVALID_SCHEMA) {
        return Err(not_allowed(client, &error).await);
    }
    Err(error.into())
}

/// What to do where the role may not make the table.
async fn not_allowed(client: &mut Client, error: &Error) -> StoreError {
    const ASK: &str =
        "SELECT quote_ident(current_user), coalesce(quote_ident(current_schema()), 'public')";
    let asked = match in_time(client.ask(ASK, &Parameters::default())).await {
        Ok(rows) => rows.into_iter().flatten().collect::<Vec<_>>(),
        Err(failure) => return failure.into_error().into(),
    };
    let [Value::Text(role), Value::Text(schema)] = &asked[..] else {
        return error.clone().into();
    };
    let error = words(error.clone());
    StoreError::Refused(format!(
        "{error}: the role {role} may not make the table {TABLE}, which lanes keep their progress in. Either let it: \
         GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}; or make the table as a role that may:\n\
         {}GRANT SELECT, INSERT, UPDATE ON {TABLE} TO {role};",
        POSTGRES.concat()
    ))
}
