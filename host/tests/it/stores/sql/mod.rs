//! PostgreSQL and SQLite: the same cases on both, and what is only one's own.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::path::Path;

use futures::FutureExt;
use host::capability::StoreError;
use host::capability::sql::{Database, Value};
use host::pipeline::SqlUrl;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};
use tempfile::TempDir;

use crate::support::server;

mod commits;
mod failures;
mod grants;
mod hunger;
mod lifecycle;
mod progress;
mod proxy;
mod roles;
mod sessions;
mod sqlite_grants;
mod sqlite_limits;
mod sqlite_turns;
mod statements;
mod transactions;
mod values;

const CONNECTIONS: u32 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Postgres,
    Sqlite,
}

/// A database of its own, removed afterwards.
struct Place {
    kind: Kind,
    url: SqlUrl,
    name: String,
    _folder: TempDir,
}

impl Place {
    async fn new(kind: Kind) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let name = format!("stagehost_test_{}", uuid::Uuid::new_v4().simple());
        let url = match kind {
            Kind::Sqlite => SqlUrl::Sqlite(folder.path().join("not/yet/there.db")),
            Kind::Postgres => {
                admin(&format!("CREATE DATABASE {name}")).await;
                let mut url = url::Url::parse(&server("DATABASE_URL")).expect("a URL");
                url.set_path(&name);
                SqlUrl::Postgres(url.into())
            }
        };
        Self {
            kind,
            url,
            name,
            _folder: folder,
        }
    }

    async fn open(&self, migrations: Option<&Path>) -> Result<Database, StoreError> {
        Database::connect(&self.url, migrations, CONNECTIONS, None).await
    }

    /// The database in sessions of PostgreSQL that have an option of the server's.
    async fn with_option(&self, option: &str) -> Database {
        let SqlUrl::Postgres(url) = &self.url else {
            panic!("not PostgreSQL");
        };
        let mut url = url::Url::parse(url).expect("a URL");
        url.query_pairs_mut().append_pair("options", option);
        let url = SqlUrl::Postgres(url.into());
        let database = Database::connect(&url, None, CONNECTIONS, None).await;
        database.expect("a database")
    }

    /// Runs statements as whoever runs the database: what the host refuses stages is done so.
    async fn run(&self, statements: &str) {
        let done = match &self.url {
            SqlUrl::Postgres(url) => {
                let options: sqlx::postgres::PgConnectOptions = url.parse().expect("a URL");
                let mut owner = options.connect().await.expect("the owner's connection");
                let done = sqlx::raw_sql(AssertSqlSafe(statements)).execute(&mut owner);
                done.await.map(drop)
            }
            SqlUrl::Sqlite(file) => {
                let options = sqlx::sqlite::SqliteConnectOptions::new().filename(file);
                let mut owner = options.connect().await.expect("the file");
                let done = sqlx::raw_sql(AssertSqlSafe(statements)).execute(&mut owner);
                let done = done.await.map(drop);
                // Dropped, it would have the file for a moment longer.
                owner.close().await.expect("the file is closed");
                done
            }
        };
        done.unwrap_or_else(|error| panic!("{statements}: {error}"));
    }

    async fn remove(self) {
        if self.kind == Kind::Postgres {
            admin(&format!("DROP DATABASE {} WITH (FORCE)", self.name)).await;
        }
    }
}

/// Runs a statement on the server's own database.
async fn admin(statement: &str) {
    let url = url::Url::parse(&server("DATABASE_URL")).expect("a URL");
    let options = sqlx::postgres::PgConnectOptions::from_url(&url).expect("a PostgreSQL URL");
    let mut connection = options.connect().await.expect("the server of DATABASE_URL");
    let done = sqlx::raw_sql(AssertSqlSafe(statement))
        .execute(&mut connection)
        .await;
    done.unwrap_or_else(|error| panic!("{statement}: {error}"));
}

/// Runs a test on a new database of each kind, and removes it even if the test fails.
async fn on_each<F: Future<Output = ()>>(test: impl Fn(Kind, Database) -> F) {
    for kind in [Kind::Sqlite, Kind::Postgres] {
        on(kind, &test).await;
    }
}

async fn on<F: Future<Output = ()>>(kind: Kind, test: impl Fn(Kind, Database) -> F) {
    let place = Place::new(kind).await;
    let database = place.open(None).await.expect("a new database");
    let outcome = AssertUnwindSafe(test(kind, database.clone()))
        .catch_unwind()
        .await;
    database.close().await;
    place.remove().await;
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

async fn execute(database: &Database, statement: &str, params: &[Value]) -> u64 {
    let done = database.execute(statement, params).await;
    done.unwrap_or_else(|error| panic!("{statement}: {error:?}"))
}

async fn query(database: &Database, statement: &str, params: &[Value]) -> Vec<Vec<Value>> {
    let done = database.query(statement, params).await;
    done.unwrap_or_else(|error| panic!("{statement}: {error:?}"))
        .rows
}

fn text(value: &str) -> Value {
    Value::Text(value.to_owned())
}
