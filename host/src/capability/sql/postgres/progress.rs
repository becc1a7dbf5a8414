//! The table of the lanes' progress on PostgreSQL.

use sqlx::migrate::Migrator;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Row};

use super::super::lease::Lease;
use super::super::ledger::{self, POSTGRES, Statements, TABLE};
use super::super::migrate::{self, TIMEOUT};
use super::super::{Error, Failure, StoreError};
use super::error::{error_of, failure_of};
use super::{Postgres, in_time};
use crate::delivery::progress::{Claim, Commit, LaneId};

const INSUFFICIENT_PRIVILEGE: &str = "42501";
const UNDEFINED_COLUMN: &str = "42703";
/// No schema of the search path exists, or may be used.
const INVALID_SCHEMA: &str = "3F000";

/// Where the table is, and what may be done with it.
struct Found {
    table: String,
    role: String,
    is_granted: bool,
}

impl Postgres {
    pub(in super::super) async fn prepare_progress(&self) -> Result<(), StoreError> {
        let mut lease = Lease::take(&self.pool).await?;
        // What fails may leave the migrator's lock behind, so the connection is closed then.
        let statements = prepare(&mut lease).await?;
        lease.give_back();
        let _ = self.progress.set(statements);
        Ok(())
    }

    pub(in super::super) async fn claim(
        &self,
        lane: &LaneId,
        epoch: Option<i64>,
    ) -> Result<Option<Claim>, Error> {
        let mut lease = Lease::take(&self.pool).await?;
        let claim = in_time(async {
            let statements = self.statements();
            let claim = ledger::claim::<sqlx::Postgres>(&mut lease, statements, lane, epoch).await;
            claim.map_err(|error| failure_of(&error))
        });
        let claim = claim.await.map_err(Failure::into_error);
        lease.finish(claim)
    }

    pub(in super::super) async fn save(&self, commit: Commit<'_>) -> Result<bool, Error> {
        let mut lease = Lease::take(&self.pool).await?;
        let saved = self.save_on(&mut lease, commit).await;
        lease.finish(saved.map_err(Failure::into_error))
    }

    pub(super) async fn save_on(
        &self,
        connection: &mut PgConnection,
        commit: Commit<'_>,
    ) -> Result<bool, Failure> {
        in_time(async {
            let statements = self.statements();
            let saved = ledger::save::<sqlx::Postgres>(connection, statements, commit).await;
            let saved = saved.map_err(|error| failure_of(&error))?;
            Ok(saved.rows_affected() > 0)
        })
        .await
    }

    fn statements(&self) -> &Statements {
        self.progress.get_or_init(|| Statements::of(TABLE))
    }
}

/// Finds the table, or makes it; and names it with its schema, so that no search path that a stage sets hides it.
async fn prepare(connection: &mut PgConnection) -> Result<Statements, StoreError> {
    let mut migrated = false;
    loop {
        let Some(found) = find(connection).await? else {
            if migrated {
                let words = format!("{TABLE} was made, and can't be found in the search path");
                return Err(StoreError::Refused(words));
            }
            make(connection).await?;
            migrated = true;
            continue;
        };
        let Found { table, role, .. } = &found;
        if !found.is_granted {
            return Err(StoreError::Refused(format!(
                "the role {role} needs more rights on {table}: GRANT SELECT, INSERT, UPDATE ON {table} TO {role}"
            )));
        }
        let statements = Statements::of(table);
        let probe = sqlx::raw_sql(AssertSqlSafe(statements.probe.clone()));
        match probe.execute(&mut *connection).await {
            Ok(_) => return Ok(statements),
            Err(error) if has_code(&error, UNDEFINED_COLUMN) && !migrated => {
                make(connection).await?;
                migrated = true;
            }
            Err(error) => return Err(error_of(&error).into()),
        }
    }
}

async fn find(connection: &mut PgConnection) -> Result<Option<Found>, StoreError> {
    const FIND: &str = "SELECT format('%I.%I', n.nspname, c.relname), quote_ident(current_user), \
                        has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'INSERT') \
                        AND has_table_privilege(c.oid, 'UPDATE') \
                        FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace \
                        WHERE c.oid = to_regclass($1)";
    let row = sqlx::query(FIND)
        .bind(TABLE)
        .fetch_optional(connection)
        .await;
    let found = row.and_then(|row| match row {
        None => Ok(None),
        Some(row) => Ok(Some(Found {
            table: row.try_get(0)?,
            role: row.try_get(1)?,
            is_granted: row.try_get(2)?,
        })),
    });
    found.map_err(|error| error_of(&error).into())
}

async fn make(connection: &mut PgConnection) -> Result<(), StoreError> {
    let migrator: Migrator = ledger::migrator(POSTGRES);
    let run = tokio::time::timeout(TIMEOUT, migrator.run(&mut *connection)).await;
    let run = run.map_err(|_| migrate::out_of_time(TABLE, TIMEOUT))?;
    let error = match run {
        Ok(()) => return Ok(()),
        Err(error) => ledger::migration_error(error)?,
    };
    if has_code(&error, INSUFFICIENT_PRIVILEGE) || has_code(&error, INVALID_SCHEMA) {
        return Err(not_allowed(connection, &error).await);
    }
    Err(error_of(&error).into())
}

/// What to do where the role may not make the table.
async fn not_allowed(connection: &mut PgConnection, error: &sqlx::Error) -> StoreError {
    // The migration's transaction has failed with it.
    let _ = sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await;
    let asked =
        "SELECT quote_ident(current_user), coalesce(quote_ident(current_schema()), 'public')";
    let asked = sqlx::query_as(asked).fetch_one(connection).await;
    let (role, schema): (String, String) = match asked {
        Ok(asked) => asked,
        Err(error) => return error_of(&error).into(),
    };
    let error = error
        .as_database_error()
        .map_or("", |error| error.message());
    StoreError::Refused(format!(
        "{error}: the role {role} may not make the table {TABLE}, which lanes keep their progress in. Either let it: \
         GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}; or make the table as a role that may:\n\
         {}GRANT SELECT, INSERT, UPDATE ON {TABLE} TO {role};",
        POSTGRES.concat()
    ))
}

fn has_code(error: &sqlx::Error, code: &str) -> bool {
    let error = error.as_database_error();
    error.is_some_and(|error| error.code().as_deref() == Some(code))
}
