//! PgBouncer between host and PostgreSQL.

use std::sync::Arc;
use std::time::{Duration, Instant};

use host::capability::StoreError;
use host::capability::sql::Database;
use host::pipeline::SqlUrl;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::servers;
use super::{Lane, Patient, inserts};
use crate::support::{Host, server, unique};

/// What a client may ask for at its login.
const USUAL: &str = "ignore_startup_parameters = extra_float_digits";

async fn connect(mode: &str, more: &str) -> Result<(), StoreError> {
    let direct = url::Url::parse(&server("DATABASE_URL")).expect("a URL");
    let bouncer = servers::pgbouncer(direct.port().expect("a port"), mode, more);
    let mut url = direct;
    url.set_port(Some(bouncer.port)).expect("a port");
    let opened = Database::connect(&SqlUrl::Postgres(url.into()), None, 4, None).await;
    if let Ok(database) = &opened {
        let one = database.query("SELECT 1", &[]).await;
        assert!(one.is_ok(), "{one:?}");
        database.close().await;
    }
    opened.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_shares_sessions_is_refused_with_the_reason() {
    for mode in ["transaction", "statement"] {
        match connect(mode, USUAL).await {
            Err(StoreError::Refused(why)) => {
                assert!(why.contains("pool_mode = session"), "{why}");
            }
            other => panic!("{mode}: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_gives_sessions_is_taken() {
    let taken = connect("session", USUAL).await;
    taken.expect("a session for the asking");
    match connect("session", "").await {
        Err(StoreError::Refused(why)) => {
            assert!(why.contains("ignore_startup_parameters"), "{why}");
        }
        other => panic!("{other:?}"),
    }
}

/// What it says of that has the codes of statements that are wrong.
#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_whose_server_is_away_is_waited_for() {
    let mut url = url::Url::parse(&server("DATABASE_URL")).expect("a URL");
    let port = url.port().expect("a port");
    let way = servers::Way::to(servers::free_port());
    let more = format!("{USUAL}\nserver_login_retry = 1\nquery_wait_timeout = 2");
    let bouncer = servers::pgbouncer(way.port, "session", &more);
    url.set_port(Some(bouncer.port)).expect("a port");
    let url = SqlUrl::Postgres(url.into());
    match Database::connect(&url, None, 4, None).await {
        Err(StoreError::Unavailable(why)) => {
            let words = ["server_login_retry", "query_wait_timeout"];
            assert!(words.iter().any(|word| why.contains(word)), "{why}");
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("a session without a server"),
    }
    way.lead(port);
    // As the host does at its start.
    let began = Instant::now();
    loop {
        match Database::connect(&url, None, 4, None).await {
            Ok(database) => break database.close().await,
            Err(StoreError::Unavailable(why)) => {
                assert!(began.elapsed() < Duration::from_secs(30), "{why}");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Err(other) => panic!("{other}"),
        }
    }
}

/// A database with the table that messages write to, and PgBouncer in front of it.
struct Pooled {
    direct: String,
    through: String,
    bouncer: servers::Server,
}

impl Pooled {
    async fn new(mode: &str) -> Self {
        let mut url = url::Url::parse(&server("DATABASE_URL")).expect("a URL");
        let name = unique("pooled").replace('-', "_");
        execute(url.as_str(), &format!("CREATE DATABASE {name}")).await;
        url.set_path(&name);
        let direct = url.to_string();
        execute(&direct, "CREATE TABLE t (n BIGINT)").await;
        let bouncer = servers::pgbouncer(url.port().expect("a port"), mode, USUAL);
        url.set_port(Some(bouncer.port)).expect("a port");
        Self {
            direct,
            through: url.into(),
            bouncer,
        }
    }

    /// Changes how PgBouncer shares sessions, in those that are open too.
    async fn switch(&self, from: &str, to: &str) {
        let file = self.bouncer.folder().join("pgbouncer.ini");
        let settings = std::fs::read_to_string(&file).expect("its settings");
        let before = format!("pool_mode = {from}\n");
        assert!(settings.contains(&before), "{settings}");
        let settings = settings.replace(&before, &format!("pool_mode = {to}\n"));
        std::fs::write(&file, settings).expect("its settings");
        let mut console = url::Url::parse(&self.through).expect("a URL");
        console.set_path("pgbouncer");
        for command in ["RELOAD", "RECONNECT"] {
            servers::psql(console.as_str(), command);
        }
    }

    async fn numbers(&self) -> Vec<i64> {
        let mut connection = PgConnection::connect(&self.direct)
            .await
            .expect("PostgreSQL");
        let numbers = sqlx::query_scalar("SELECT n FROM t ORDER BY n");
        numbers.fetch_all(&mut connection).await.expect("rows")
    }
}

async fn execute(url: &str, statement: &str) {
    let mut connection = PgConnection::connect(url).await.expect("PostgreSQL");
    let done = sqlx::raw_sql(AssertSqlSafe(statement.to_owned()));
    done.execute(&mut connection).await.expect("it is done");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_does_not_start_behind_a_pooler_that_shares_sessions() {
    let pooled = Pooled::new("transaction").await;
    let start = |pipeline: &str| {
        let folder = Arc::new(tempfile::tempdir().expect("a folder"));
        Host::spawn(folder, pipeline, &[])
    };
    let lane = Lane::Transactional;
    let patient = Patient::on_database_with(&pooled.through, lane, "\"data\"", start);
    let (status, log) = patient.host.ended();
    assert_eq!(status.code(), Some(1), "{log}");
    let says = |line: &str| line.contains("pool_mode = session") && line.contains("PostgreSQL at");
    assert!(log.lines().any(says), "{log}");
}

/// All that the host prepared is another session's by then, and what others prepared is where it looks for its own.
async fn begins_to_share(lane: Lane) {
    let pooled = Pooled::new("session").await;
    let patient = Patient::on_database(&pooled.through, lane);
    patient.send(&inserts(0..20)).await;
    patient.settle();
    pooled.switch("session", "transaction").await;
    patient.send(&inserts(20..60)).await;
    patient.says("write pool_mode = session");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(patient.dead(), Vec::<String>::new());
    pooled.switch("transaction", "session").await;
    patient.goes_on();
    patient.send(&inserts(60..70)).await;
    patient.goes_on();
    assert_eq!(pooled.numbers().await, Vec::from_iter(0..70));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_begins_to_share_sessions_is_waited_for_and_named() {
    begins_to_share(Lane::Ordered).await;
}

/// One is in one session from its beginning to its end, whose statements are prepared anew where they are not there.
#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_begins_to_share_sessions_breaks_no_transaction() {
    let pooled = Pooled::new("session").await;
    let patient = Patient::on_database(&pooled.through, Lane::Transactional);
    patient.send(&inserts(0..20)).await;
    patient.settle();
    pooled.switch("session", "transaction").await;
    for first in [20, 30, 40, 50] {
        patient.send(&inserts(first..first + 10)).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    pooled.switch("transaction", "session").await;
    patient.send(&inserts(60..70)).await;
    patient.goes_on();
    assert_eq!(pooled.numbers().await, Vec::from_iter(0..70));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_begins_to_share_sessions_mixes_up_no_statements() {
    begins_to_share(Lane::Concurrent).await;
}
