//! The `sql` capability on PostgreSQL.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use sqlx::postgres::{
    PgArguments, PgConnectOptions, PgConnection, PgDatabaseError, PgPool, PgPoolOptions,
};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, Row, SqlSafeStr, Statement as _};

use super::lease::{Lease, is_at_rest};
use super::migrate::Migrations;
use super::statement::{self, Dialect};
use super::{
    ACQUIRE_TIMEOUT, Answer, DatabaseError, Error, Rows, STATEMENT_TIMEOUT, StoreError, Value,
    out_of_time, transport_error,
};

mod value;

/// A connection that was unused for longer is asked whether it is alive before it is used again.
const PING_AFTER_IDLE: Duration = Duration::from_secs(5);
/// How much longer than [`STATEMENT_TIMEOUT`] the host waits: the server's answer says more.
const GRACE: Duration = Duration::from_secs(2);
/// How often the server sees whether somebody still waits for a statement that runs.
const DEPARTURE_CHECK: Duration = Duration::from_secs(1);
/// Prepared statements that a connection keeps.
const STATEMENT_CACHE: usize = 256;

/// A PostgreSQL database.
#[derive(Clone)]
pub(super) struct Postgres {
    pool: PgPool,
}

/// Why a URL can't be used, without any of it.
pub(super) fn check_url(url: &str) -> Result<(), String> {
    parse(url).map(drop)
}

fn parse(url: &str) -> Result<PgConnectOptions, String> {
    PgConnectOptions::from_str(url).map_err(|error| {
        let mut why = error.to_string();
        while let Some(rest) = why.strip_prefix("error with configuration: ") {
            why = rest.to_owned();
        }
        // What it quotes is a part of the URL.
        match (why.find('"'), why.rfind('"')) {
            (Some(from), Some(to)) if from < to => format!("{}…{}", &why[..from], &why[to + 1..]),
            _ => why,
        }
    })
}

/// Connects once to see that it can be done, runs the migrations, and makes the pool.
pub(super) async fn open(
    url: &str,
    migrations: Option<&Migrations>,
    max_connections: u32,
) -> Result<Postgres, StoreError> {
    let mut options = parse(url)
        .map_err(|why| StoreError::Refused(format!("the PostgreSQL URL: {why}")))?
        .statement_cache_capacity(STATEMENT_CACHE)
        .disable_statement_logging();
    if options.get_application_name().is_none() {
        options = options.application_name("stagehost");
    }
    let place = place(&options);
    let mut connection = tokio::time::timeout(ACQUIRE_TIMEOUT, options.connect())
        .await
        .map_err(|_| {
            let waited = ACQUIRE_TIMEOUT.as_secs();
            StoreError::Unavailable(format!("{place} did not answer within {waited} s"))
        })?
        .map_err(|error| open_error(&place, &error))?;
    if let Some(migrations) = migrations {
        let noticed = notice_departures(&mut connection).await;
        noticed.map_err(|error| open_error(&place, &error))?;
        migrations
            .run_on_postgres(&mut connection)
            .await
            .map_err(|error| match error {
                StoreError::Unavailable(why) => StoreError::Unavailable(format!("{place}: {why}")),
                StoreError::Refused(why) => StoreError::Refused(format!("{place}: {why}")),
            })?;
    }
    // It did its work; that it may not close in order changes nothing.
    let _ = connection.close().await;

    let pool = PgPoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .test_before_acquire(false)
        .before_acquire(|connection, metadata| {
            Box::pin(async move {
                if metadata.idle_for > PING_AFTER_IDLE {
                    connection.ping().await?;
                }
                Ok(true)
            })
        })
        .after_connect(|connection, _| Box::pin(set_up(connection)))
        .connect_lazy_with(options);
    Ok(Postgres { pool })
}

impl Postgres {
    pub(super) async fn close(&self) {
        self.pool.close().await;
    }

    pub(super) async fn query(&self, text: &str, params: &[Value]) -> Result<Rows, Error> {
        let keyword = statement::check(Dialect::Postgres, text, params.len())?;
        let mut statement = Statement::new(text);
        let first = statement.with(params)?;
        let mut connection = Lease::take(&self.pool).await?;
        let mut answer = in_time(query(&mut connection, first)).await;
        if is_stale(&answer, params) {
            forget_plans(&mut connection).await?;
            answer = in_time(query(&mut connection, statement.with(params)?)).await;
        }
        finish(connection, &keyword, text, answer).await
    }

    pub(super) async fn execute(&self, text: &str, params: &[Value]) -> Result<u64, Error> {
        let keyword = statement::check(Dialect::Postgres, text, params.len())?;
        let mut statement = Statement::new(text);
        let first = statement.with(params)?;
        let mut connection = Lease::take(&self.pool).await?;
        let mut answer = in_time(execute(&mut connection, first)).await;
        if is_stale(&answer, params) {
            forget_plans(&mut connection).await?;
            answer = in_time(execute(&mut connection, statement.with(params)?)).await;
        }
        finish(connection, &keyword, text, answer).await
    }

    pub(super) async fn execute_many(
        &self,
        text: &str,
        params: &[Vec<Value>],
    ) -> Result<u64, Error> {
        let keyword = statement::check_many(Dialect::Postgres, text, params)?;
        let mut connection = Lease::take(&self.pool).await?;
        let answer = execute_many(&mut connection, text, params).await;
        finish(connection, &keyword, text, answer).await
    }
}

/// A statement's text as it is sent.
struct Statement<'a> {
    text: &'a str,
    signature: String,
    signed: Arc<str>,
}

/// A statement with its parameters encoded.
struct Prepared {
    text: Arc<str>,
    arguments: PgArguments,
}

impl<'a> Statement<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            text,
            signature: String::new(),
            signed: text.into(),
        }
    }

    /// Lists of the same types share one text.
    fn with(&mut self, params: &[Value]) -> Result<Prepared, Error> {
        let mut arguments = PgArguments::default();
        // The driver finds a prepared statement by its text, but what the server prepared depends on the
        // parameters' types too: a NULL is inferred, and an int8 is no int4. So they become part of the text.
        let mut signature = String::with_capacity(params.len());
        for param in params {
            signature.push(value::bind(&mut arguments, param)?);
        }
        if signature != self.signature {
            // The new line ends a comment of the statement's own.
            self.signed = format!("{}\n/* {signature} */", self.text).into();
            self.signature = signature;
        }
        Ok(Prepared {
            text: self.signed.clone(),
            arguments,
        })
    }
}

/// Gives the connection back as it was, or closes it where that can't be done.
async fn finish<T>(
    mut connection: Lease<sqlx::Postgres>,
    keyword: &str,
    text: &str,
    answer: Result<T, Error>,
) -> Result<T, Error> {
    let traces = is_at_rest(&answer) && statement::may_leave_traces(keyword, text);
    if traces && in_time(reset(&mut connection)).await.is_err() {
        return answer;
    }
    connection.finish(answer)
}

/// A row arrives whole, whatever its size, before it can be counted: the protocol has no way to ask for less. So
/// an answer takes at most [`super::MAX_ANSWER_BYTES`] and one row, which PostgreSQL keeps below a gigabyte.
async fn query(connection: &mut PgConnection, statement: Prepared) -> Result<Rows, Error> {
    let Prepared { text, arguments } = statement;
    let mut answer = Answer::default();
    {
        let query = sqlx::query_with(AssertSqlSafe(text.clone()), arguments);
        let mut stream = query.fetch(&mut *connection);
        while let Some(row) = stream.try_next().await.map_err(|error| error_of(&error))? {
            if answer.columns.is_empty() {
                answer.columns = value::names(row.columns());
            }
            answer.push(value::row(&row)?)?;
        }
    }
    if answer.rows.is_empty() {
        // The names come with the rows, so an empty answer asks for them; the driver has them at hand.
        let text = AssertSqlSafe(text).into_sql_str();
        let statement = (&mut *connection).prepare(text).await;
        answer.columns = value::names(statement.map_err(|error| error_of(&error))?.columns());
    }
    Ok(answer.finish())
}

async fn execute(connection: &mut PgConnection, statement: Prepared) -> Result<u64, Error> {
    let Prepared { text, arguments } = statement;
    let query = sqlx::query_with(AssertSqlSafe(text), arguments);
    match query.execute(connection).await {
        Ok(done) => Ok(done.rows_affected()),
        Err(error) => Err(error_of(&error)),
    }
}

/// All or none, in a transaction; what is not committed is rolled back.
async fn execute_many(
    connection: &mut PgConnection,
    text: &str,
    params: &[Vec<Value>],
) -> Result<u64, Error> {
    let begun = in_time(async {
        let begun = connection.begin().await;
        begun.map_err(|error| transport_error(&error))
    });
    let mut transaction = begun.await?;
    match execute_all(&mut transaction, text, params).await {
        Ok(affected) => {
            // A deferred constraint speaks up only here.
            in_time(async { transaction.commit().await.map_err(|error| error_of(&error)) }).await?;
            Ok(affected)
        }
        Err(error) => {
            let rolled_back = in_time(async {
                let rolled_back = transaction.rollback().await;
                rolled_back.map_err(|error| transport_error(&error))
            });
            rolled_back.await?;
            Err(error)
        }
    }
}

async fn execute_all(
    connection: &mut PgConnection,
    text: &str,
    params: &[Vec<Value>],
) -> Result<u64, Error> {
    let mut statement = Statement::new(text);
    let mut affected = 0;
    for params in params {
        affected += in_time(execute(connection, statement.with(params)?)).await?;
    }
    Ok(affected)
}

/// Not waiting for ever for a server that is gone without a word.
async fn in_time<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(STATEMENT_TIMEOUT + GRACE, work)
        .await
        .unwrap_or_else(|_| Err(out_of_time()))
}

/// What a statement fails with whose plan gives other columns than it did when it was prepared.
const STALE_PLAN: &str = "a table was altered after the statement had been prepared";

/// Whether a table may have been altered after the statement had been prepared. Nothing has been done then, so
/// the statement can be prepared and run once more, unless a transaction failed with it.
fn is_stale<T>(answer: &Result<T, Error>, params: &[Value]) -> bool {
    const DATATYPE_MISMATCH: &str = "42804";
    const UNDEFINED_FUNCTION: &str = "42883";
    match answer {
        Err(Error::Unavailable(why)) => why == STALE_PLAN,
        // The types that were inferred for NULLs stay with the prepared statement.
        Err(Error::Database(error)) if params.contains(&Value::Null) => matches!(
            error.sqlstate.as_deref(),
            Some(DATATYPE_MISMATCH | UNDEFINED_FUNCTION)
        ),
        _ => false,
    }
}

async fn forget_plans(connection: &mut PgConnection) -> Result<(), Error> {
    let forgotten = in_time(async {
        let cleared = connection.clear_cached_statements().await;
        cleared.map_err(|error| transport_error(&error))
    });
    forgotten.await
}

fn error_of(error: &sqlx::Error) -> Error {
    let sqlx::Error::Database(database) = error else {
        return transport_error(error);
    };
    let database: &PgDatabaseError = match database.try_downcast_ref() {
        Some(database) => database,
        None => return transport_error(error),
    };
    if database.routine() == Some("RevalidateCachedQuery") {
        return Error::Unavailable(STALE_PLAN.to_owned());
    }
    if is_unavailable(database.code()) {
        return Error::Unavailable(database.message().to_owned());
    }
    Error::Database(DatabaseError {
        sqlstate: Some(database.code().to_owned()),
        message: database.message().to_owned(),
        constraint: database.constraint().map(str::to_owned),
    })
}

/// What is not about the statement, and may be gone when it is sent again.
fn is_unavailable(sqlstate: &str) -> bool {
    const PROTOCOL_VIOLATION: &str = "08P01";
    match sqlstate {
        // A wrong number of parameters, for one.
        PROTOCOL_VIOLATION => false,
        // Serialization failure, deadlock; query cancelled, by statement_timeout too; shutdowns, start.
        "40001" | "40P01" | "57014" | "57P01" | "57P02" | "57P03" | "57P05" => true,
        // Lock not available; read-only, as a primary that became a standby is.
        "55P03" | "25006" => true,
        // Connection exceptions; out of connections, memory, disk; system errors.
        _ => matches!(sqlstate.get(..2), Some("08" | "53" | "58")),
    }
}

fn open_error(place: &str, error: &sqlx::Error) -> StoreError {
    match error {
        sqlx::Error::Database(_) => match error_of(error) {
            Error::Unavailable(why) => StoreError::Unavailable(format!("{place}: {why}")),
            Error::Database(database) => {
                StoreError::Refused(format!("{place}: {}", database.message))
            }
            other => StoreError::Refused(format!("{place}: {other}")),
        },
        sqlx::Error::Configuration(_) | sqlx::Error::Tls(_) => {
            StoreError::Refused(format!("{place}: {error}"))
        }
        other => StoreError::Unavailable(format!("{place}: {other}")),
    }
}

/// The database's address, without user and password.
fn place(options: &PgConnectOptions) -> String {
    let database = options.get_database().unwrap_or(options.get_username());
    match options.get_socket() {
        Some(socket) => format!("PostgreSQL at {}/{database}", socket.display()),
        None => format!(
            "PostgreSQL at {}:{}/{database}",
            options.get_host(),
            options.get_port()
        ),
    }
}

/// Undoes what a statement may have left for the connection's next user. It is DISCARD ALL without the plans,
/// which stay good.
async fn reset(connection: &mut PgConnection) -> Result<(), Error> {
    const RESET: &str = "SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; UNLISTEN *; \
                         SELECT pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES";
    let done = sqlx::raw_sql(RESET).execute(&mut *connection).await;
    done.map_err(|error| error_of(&error))?;
    set_up(connection).await.map_err(|error| error_of(&error))
}

/// Has the server give up on statements in time, unless the database, the role or the URL says otherwise, and when
/// nobody waits for them. Not as parameters of the connection: a pooler between may refuse those.
async fn set_up(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let limit = format!(
        "SELECT set_config('statement_timeout', '{}ms', false) \
         WHERE current_setting('statement_timeout') = '0'",
        STATEMENT_TIMEOUT.as_millis()
    );
    let limited = sqlx::raw_sql(AssertSqlSafe(limit));
    limited.execute(&mut *connection).await?;
    notice_departures(connection).await
}

/// Since PostgreSQL 14.
async fn notice_departures(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    const NAME: &str = "client_connection_check_interval";
    let notice = format!(
        "SELECT set_config('{NAME}', '{}ms', false) WHERE current_setting('{NAME}', true) = '0'",
        DEPARTURE_CHECK.as_millis()
    );
    let noticed = sqlx::raw_sql(AssertSqlSafe(notice));
    match noticed.execute(connection).await {
        // There are systems on which PostgreSQL can't see it.
        Ok(_) | Err(sqlx::Error::Database(_)) => Ok(()),
        Err(other) => Err(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_refused_without_their_words() {
        for url in [
            "postgres://me:geheim@127.0.0.1/db?sslmode=geheim",
            "postgres://me:geheim@127.0.0.1/db?hostaddr=geheim",
            "postgres://me:geheim@127.0.0.1/db?port=geheim",
            "postgres://me:%ff@127.0.0.1/db",
        ] {
            let why = check_url(url).expect_err(url);
            assert!(!why.is_empty() && !why.contains("geheim"), "{why}");
        }
        assert_eq!(
            check_url("postgres://me@127.0.0.1/db?sslmode=disable"),
            Ok(())
        );
    }
}
