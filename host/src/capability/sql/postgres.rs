//! The `sql` capability on PostgreSQL.

use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

use super::done::Done as DoneBefore;
use super::migrate::Migrations;
use super::statement::postgres::Words;
use super::{
    ACQUIRE_TIMEOUT, Done, Error, Failure, Refusal, STATEMENT_TIMEOUT, Sight, SqlAccess,
    StoreError, Value, Work, ledger, out_of_time,
};
use call::Call;
use client::Client;
use error::{at, open_error};
use guests::Secret;
use locks::{Limits, Watched};
use pool::{Lease, Pool};
use server::Server;
use value::Parameters;

mod call;
mod client;
mod error;
mod guests;
mod locks;
mod plans;
mod pool;
mod pooler;
mod probe;
mod progress;
mod server;
mod session;
mod value;
mod wire;

pub(super) use session::Session;

/// How much longer than [`STATEMENT_TIMEOUT`] the host waits: the server's answer says more.
const GRACE: Duration = Duration::from_secs(2);
/// How often the server sees whether somebody still waits for a statement that runs.
const DEPARTURE_CHECK: Duration = Duration::from_secs(1);
/// How much longer than its longest pause a transaction may wait for its next statement.
const PAUSE_MARGIN: Duration = Duration::from_secs(10);
/// Connections of the host's own, where stages log in as another role: for claims, and what is saved without effects.
const OWN_CONNECTIONS: u32 = 4;
/// And one where statements wait for others' locks, to see whose: made while one waits.
const LOOK_CONNECTIONS: u32 = 1;

/// A PostgreSQL database.
#[derive(Clone)]
pub(super) struct Postgres {
    /// Sessions for stages' statements.
    pool: Pool,
    /// Sessions of the host; the same ones where stages have no role of their own.
    own: Pool,
    /// What the server has of functions, and which of them stages may call.
    words: Arc<Words>,
    /// Where stages have a role of their own: what the host writes its rows with in their sessions.
    secret: Option<Arc<Secret>>,
    /// Known once it is known where the table is.
    progress: Arc<OnceLock<ledger::Statements>>,
    /// A session that looks what others wait for.
    looks: Pool,
    /// Where stages have a role of their own: what their sessions are called, as the server has it.
    stage_name: Option<Arc<str>>,
    /// What was done for the stage that it works for.
    done: Arc<DoneBefore>,
}

/// What a session is given beside what the database, the role and the URL say.
#[derive(Clone, Copy)]
struct Settings {
    /// The longest time that a transaction may have to wait for its next statement.
    pause: Option<Duration>,
}

/// Why a URL can't be used, without any of it.
pub(super) fn check_url(url: &str) -> Result<(), String> {
    server::parse(url).map(drop)
}

/// The parameters of a URL that are left out, each with the one that it may be a slip of.
pub(super) fn unknown_parameters(url: &str) -> Vec<(String, Option<&'static str>)> {
    server::unknown_parameters(url)
}

/// The files that a URL names, each with its parameter.
pub(super) fn files(url: &str) -> Vec<(String, PathBuf)> {
    server::files(url)
}

/// Runs the migrations, connects once to see that it can be done, and makes the pools. `stage_url` is what stages log in with.
pub(super) async fn open(
    url: &str,
    stage_url: Option<&str>,
    migrations: Option<&Migrations>,
    max_connections: u32,
    pause: Option<Duration>,
) -> Result<Postgres, StoreError> {
    let server = Server::new(url)?;
    let place = server.place();
    let mut client = connect(&server).await.map_err(|error| at(&place, error))?;
    let checked = pooler::check(&server, &mut client).await;
    checked.map_err(|error| at(&place, error))?;
    if let Some(migrations) = migrations {
        let ran = migrate(&server, &place, migrations).await;
        ran.map_err(|error| at(&place, error))?;
    }
    let words = words(&mut client).await;
    let words = words.map_err(|failure| at(&place, failure.into_error().into()))?;
    let settings = Settings { pause };
    let looks = Pool::new(server.clone(), Settings { pause: None }, LOOK_CONNECTIONS);
    let (pool, own, secret, name) = match stage_url {
        None => {
            let checked = guests::warn_of_host_role(&place, &mut client).await;
            checked.map_err(|error| at(&place, error))?;
            let pool = Pool::new(server, settings, max_connections);
            (pool.clone(), pool, None, None)
        }
        Some(stage_url) => {
            let stages = Server::new(stage_url)?;
            let mut guest = connect(&stages).await;
            let guest = guest.as_mut().map_err(|error| {
                let place = format!("{}, stage-url", stages.place());
                at(
                    &place,
                    std::mem::replace(error, StoreError::Refused(String::new())),
                )
            })?;
            let checked = pooler::check(&stages, guest).await;
            checked.map_err(|error| at(&format!("{}, stage-url", stages.place()), error))?;
            let role = guests::check(&place, &mut client, guest).await;
            let role = role.map_err(|error| at(&place, error))?;
            let name = in_time(guest.look(locks::OWN_NAME)).await;
            let name = name.map_err(|failure| at(&place, failure.into_error().into()))?;
            let pool = Pool::new(stages, settings, max_connections);
            let own = Pool::new(server, settings, OWN_CONNECTIONS);
            (pool, own, Some(Arc::new(Secret::new(role))), name)
        }
    };
    client.close().await;
    Ok(Postgres {
        pool,
        own,
        words: Arc::new(words),
        secret,
        progress: Arc::default(),
        looks,
        stage_name: name.map(Into::into),
        done: Arc::new(DoneBefore::new()),
    })
}

async fn connect(server: &Server) -> Result<Client, StoreError> {
    let connected = tokio::time::timeout(ACQUIRE_TIMEOUT, server.connect()).await;
    let connected = connected.map_err(|_| unanswered())?;
    connected.map_err(StoreError::from)
}

fn unanswered() -> StoreError {
    let waited = ACQUIRE_TIMEOUT.as_secs();
    StoreError::Unavailable(format!("it did not answer within {waited} s"))
}

/// On a connection of another driver, which lives as long as the migrations run.
async fn migrate(server: &Server, place: &str, migrations: &Migrations) -> Result<(), StoreError> {
    let mut connection = migrating(server, place).await?;
    migrations.run_on_postgres(&mut connection).await?;
    // It did its work; that it may not close in order changes nothing.
    let _ = connection.close().await;
    Ok(())
}

async fn migrating(server: &Server, place: &str) -> Result<PgConnection, StoreError> {
    let connected = tokio::time::timeout(ACQUIRE_TIMEOUT, server.options().connect()).await;
    let connected = connected.map_err(|_| unanswered())?;
    let mut connection = connected.map_err(|error| open_error(place, &error))?;
    let notice = limit("client_connection_check_interval", DEPARTURE_CHECK);
    let noticed = sqlx::raw_sql(AssertSqlSafe(notice)).execute(&mut connection);
    match noticed.await {
        // There are servers that can't.
        Ok(_) | Err(sqlx::Error::Database(_)) => Ok(connection),
        Err(error) => Err(open_error(place, &error)),
    }
}

/// The functions of the server, and its own tables.
async fn words(client: &mut Client) -> Result<Words, Failure> {
    const FUNCTIONS: &str = "SELECT proname::text, bool_or(provolatile = 'v') FROM pg_catalog.pg_proc \
                             WHERE pronamespace = 'pg_catalog'::regnamespace \
                             AND 'internal'::regtype::oid <> ALL (proargtypes::oid[]) GROUP BY proname";
    const CATALOGS: &str = "SELECT relname::text FROM pg_catalog.pg_class \
                            WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind IN ('r', 'v')";
    let mut words = Words::default();
    for row in in_time(client.ask(CATALOGS, &Parameters::default())).await? {
        if let [Value::Text(name)] = &row[..] {
            words.add_catalog(name);
        }
    }
    for row in in_time(client.ask(FUNCTIONS, &Parameters::default())).await? {
        if let [Value::Text(name), Value::Boolean(volatile)] = &row[..] {
            words.add(name, *volatile);
        }
    }
    Ok(words)
}

impl Postgres {
    /// The same for a stage: what was done for it is known of it alone.
    pub(super) fn for_stage(&self) -> Self {
        Self {
            done: Arc::new(DoneBefore::new()),
            ..self.clone()
        }
    }

    pub(super) async fn close(&self) {
        self.pool.close().await;
        self.looks.close().await;
        if self.secret.is_some() {
            self.own.close().await;
        }
    }

    /// Runs a statement on a connection of the pool, where it commits by itself.
    pub(super) async fn call(
        &self,
        access: SqlAccess,
        text: &str,
        work: Work<'_>,
        sight: &Sight,
    ) -> Result<Done, Refusal> {
        let judge = |error| self.judge(access, text, work, (error, None));
        let mut call = Call::new(self, access, text, work).map_err(judge)?;
        let mut lease = self.take(access).await.map_err(judge)?;
        let watched = Watched::of(&lease);
        let (answer, ended) = {
            let run = pin!(call.run_alone(&mut lease));
            self.watched(watched, sight, run).await
        };
        if access == SqlAccess::ReadOnly {
            // It was the host that said so.
            lease.is_spent = false;
        }
        let judge = |error| self.judge(access, text, work, (error, Some(ended)));
        answer.map_err(|failure| judge(failure.into_error()))
    }

    /// A session whose transactions begin as the access says.
    async fn take(&self, access: SqlAccess) -> Result<Lease, Error> {
        let mut lease = self.pool.take().await?;
        set_access(&mut lease, access)?;
        Ok(lease)
    }
}

impl Postgres {
    /// A session for the host's own statements. Where a stage that only reads had it before, it was made to read only.
    async fn take_own(&self) -> Result<Lease, Error> {
        let mut lease = self.own.take().await?;
        set_access(&mut lease, SqlAccess::Data)?;
        Ok(lease)
    }
}

/// Has the session's transactions begin as the access says.
fn set_access(client: &mut Client, access: SqlAccess) -> Result<(), Error> {
    let reads_only = access == SqlAccess::ReadOnly;
    if client.reads_only != reads_only {
        let set = match reads_only {
            true => "SET default_transaction_read_only = on",
            false => "RESET default_transaction_read_only",
        };
        client.queue_before(set).map_err(Failure::into_error)?;
        client.reads_only = reads_only;
    }
    Ok(())
}

/// Not waiting for ever for a server that is gone without a word.
async fn in_time<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::time::timeout(STATEMENT_TIMEOUT + GRACE, work)
        .await
        .unwrap_or_else(|_| Err(Failure::Lost(out_of_time())))
}

impl Settings {
    /// Has the server give up on statements in time, unless the database, the role or the URL says otherwise, and when
    /// nobody waits for them; and on transactions whose host does nothing any more, so that their locks go. Not as
    /// parameters of the connection: a pooler between may refuse those. What a quote means is what the host reads in
    /// statements, too.
    async fn apply(self, client: &mut Client) -> Result<(), Failure> {
        let mut settings = limit("statement_timeout", STATEMENT_TIMEOUT);
        if let Some(pause) = self.pause {
            let longest = limit("idle_in_transaction_session_timeout", pause + PAUSE_MARGIN);
            settings = format!("{settings}; {longest}");
        }
        let ask = Limits::ASK;
        let settings = format!("SET standard_conforming_strings = on; {settings}; {ask}");
        let limits = in_time(client.look(&settings)).await?;
        let (limits, process) = Limits::read(limits.as_deref().unwrap_or_default());
        client.limits = limits;
        client.process = process.unwrap_or(client.process);
        let notice = limit("client_connection_check_interval", DEPARTURE_CHECK);
        match call::command(client, &notice).await {
            // There are systems on which PostgreSQL can't see it, before version 14 everywhere.
            Ok(()) | Err(Failure::Statement(_)) => Ok(()),
            Err(other) => Err(other),
        }
    }
}

/// Sets what is not set.
fn limit(name: &str, time: Duration) -> String {
    format!(
        "SELECT set_config('{name}', '{}ms', false) WHERE current_setting('{name}', true) = '0'",
        time.as_millis()
    )
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
