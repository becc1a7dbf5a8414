//! The `sql` capability on PostgreSQL.

use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

use super::lease::{Lease, is_at_rest};
use super::migrate::Migrations;
use super::{
    ACQUIRE_TIMEOUT, Done, Error, Failure, STATEMENT_TIMEOUT, SqlAccess, StoreError, Work, ledger,
    out_of_time,
};
use call::Call;
use error::open_error;

mod call;
mod error;
mod progress;
mod session;
mod value;

pub(super) use session::Session;

/// A connection that was unused for longer is asked whether it is alive before it is used again.
const PING_AFTER_IDLE: Duration = Duration::from_secs(5);
/// How much longer than [`STATEMENT_TIMEOUT`] the host waits: the server's answer says more.
const GRACE: Duration = Duration::from_secs(2);
/// How often the server sees whether somebody still waits for a statement that runs.
const DEPARTURE_CHECK: Duration = Duration::from_secs(1);
/// How much longer than its longest pause a transaction may wait for its next statement.
const PAUSE_MARGIN: Duration = Duration::from_secs(10);
/// Prepared statements that a connection keeps.
const STATEMENT_CACHE: usize = 256;

/// A PostgreSQL database.
#[derive(Clone)]
pub(super) struct Postgres {
    pool: PgPool,
    settings: Settings,
    /// Known once it is known where the table is.
    progress: Arc<OnceLock<ledger::Statements>>,
}

/// What a session is given beside what the database, the role and the URL say.
#[derive(Clone, Copy)]
struct Settings {
    /// The longest time that a transaction may have to wait for its next statement.
    pause: Option<Duration>,
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
    pause: Option<Duration>,
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

    let settings = Settings { pause };
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
        .after_connect(move |connection, _| Box::pin(settings.apply(connection)))
        .connect_lazy_with(options);
    Ok(Postgres {
        pool,
        settings,
        progress: Arc::default(),
    })
}

impl Postgres {
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
        let mut connection = Lease::take(&self.pool).await?;
        let answer = call.run_alone(&mut connection).await;
        let answer = answer.map_err(Failure::into_error);
        let traces = is_at_rest(&answer) && call.may_leave_traces();
        if traces && self.settings.reset(&mut connection).await.is_err() {
            // What can't be given back as it was is closed.
            return answer;
        }
        connection.finish(answer)
    }
}

/// Not waiting for ever for a server that is gone without a word.
async fn in_time<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::time::timeout(STATEMENT_TIMEOUT + GRACE, work)
        .await
        .unwrap_or_else(|_| Err(Failure::Lost(out_of_time())))
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

impl Settings {
    /// Undoes what a statement may have left for the connection's next user. It is DISCARD ALL without the plans,
    /// which stay good.
    async fn reset(self, connection: &mut PgConnection) -> Result<(), Failure> {
        const RESET: &str = "SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; UNLISTEN *; \
                             SELECT pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES";
        call::command(connection, RESET).await?;
        in_time(async {
            let applied = self.apply(connection).await;
            applied.map_err(|error| error::failure_of(&error))
        })
        .await
    }

    /// Has the server give up on statements in time, unless the database, the role or the URL says otherwise, and when
    /// nobody waits for them; and on transactions whose host does nothing any more, so that their locks go. Not as
    /// parameters of the connection: a pooler between may refuse those.
    async fn apply(self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        let mut limits = limit("statement_timeout", STATEMENT_TIMEOUT);
        if let Some(pause) = self.pause {
            let longest = pause + PAUSE_MARGIN;
            limits = format!(
                "{limits}; {}",
                limit("idle_in_transaction_session_timeout", longest)
            );
        }
        let limited = sqlx::raw_sql(AssertSqlSafe(limits));
        limited.execute(&mut *connection).await?;
        notice_departures(connection).await
    }
}

/// Sets what is not set.
fn limit(name: &str, time: Duration) -> String {
    format!(
        "SELECT set_config('{name}', '{}ms', false) WHERE current_setting('{name}', true) = '0'",
        time.as_millis()
    )
}

/// Since PostgreSQL 14.
async fn notice_departures(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let notice = limit("client_connection_check_interval", DEPARTURE_CHECK);
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
