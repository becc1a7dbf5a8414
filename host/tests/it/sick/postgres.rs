//! A PostgreSQL database that is sick.

use std::time::{Duration, Instant};

use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};

use super::servers::{self, Certificate};
use super::{Lane, Patient, Stores, inserts};
use crate::support::{get, server, unique};

const LANES: [Lane; 3] = [Lane::Ordered, Lane::Batches, Lane::Transactional];

/// A database of its own with a role that stages log in as, and a table.
pub(super) struct Place {
    admin: String,
    name: String,
    pub(super) url: String,
}

impl Place {
    pub(super) async fn new() -> Self {
        Self::at(&server("DATABASE_URL"), "").await
    }

    /// On this server, in a database with these options.
    async fn at(url: &str, options: &str) -> Self {
        let name = unique("sick").replace('-', "_");
        run(url, &format!("CREATE DATABASE {name} {options}")).await;
        run(url, &format!("CREATE ROLE {name} LOGIN PASSWORD 'geheim'")).await;
        let mut admin = url::Url::parse(url).expect("a URL");
        admin.set_path(&name);
        let mut own = admin.clone();
        own.set_username(&name).expect("a URL with users");
        own.set_password(Some("geheim")).expect("a URL with users");
        let place = Self {
            admin: admin.into(),
            name,
            url: own.into(),
        };
        place.run("CREATE TABLE t (n BIGINT)").await;
        place
            .run("GRANT ALL ON TABLE t TO {role}; GRANT ALL ON SCHEMA public TO {role}")
            .await;
        place
    }

    /// As whoever runs the database; `{role}` is the stages' role.
    pub(super) async fn run(&self, statements: &str) {
        let statements = statements.replace("{role}", &self.name);
        run(&self.admin, &statements).await;
    }

    /// Ends the role's sessions, so that what holds for new ones holds.
    pub(super) async fn end_sessions(&self) {
        self.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'")
            .await;
    }

    /// Somebody else's transaction that has done this, and is left open.
    async fn left_open(&self, statement: &str) -> PgConnection {
        let mut other = PgConnection::connect(&self.admin)
            .await
            .expect("PostgreSQL");
        let begin = AssertSqlSafe(format!("BEGIN; {statement}"));
        let begun = sqlx::raw_sql(begin).execute(&mut other).await;
        begun.unwrap_or_else(|error| panic!("{statement}: {error}"));
        other
    }

    pub(super) async fn numbers(&self) -> Vec<i64> {
        let mut connection = PgConnection::connect(&self.admin)
            .await
            .expect("PostgreSQL");
        let rows = sqlx::query("SELECT n FROM t ORDER BY n")
            .fetch_all(&mut connection)
            .await;
        rows.expect("rows").iter().map(|row| row.get(0)).collect()
    }
}

async fn run(url: &str, statements: &str) {
    let done = try_run(url, statements).await;
    done.unwrap_or_else(|error| panic!("{statements}: {error}"));
}

async fn try_run(url: &str, statements: &str) -> Result<(), sqlx::Error> {
    let mut connection = PgConnection::connect(url).await.expect("PostgreSQL");
    let done = sqlx::raw_sql(AssertSqlSafe(statements))
        .execute(&mut connection)
        .await;
    done.map(drop)
}

/// While the database refuses, nothing is given up on, however long it takes; then all goes on, and each message had its
/// effect once.
async fn refuses(lane: Lane, words: &str, sicken: &str, heal: &str) {
    let place = Place::new().await;
    let patient = Patient::on_database(&place.url, lane);
    patient.send(&inserts(0..10)).await;
    patient.settle();
    place.run(sicken).await;
    place.end_sessions().await;
    patient.send(&inserts(10..40)).await;
    is_held(&patient, words).await;
    place.run(heal).await;
    patient.goes_on();
    assert_eq!(
        place.numbers().await,
        Vec::from_iter(0..40),
        "{lane:?}: {sicken}"
    );
}

/// It says what is wrong, and gives up on nothing, however long it takes.
async fn is_held(patient: &Patient, words: &str) {
    patient.says(words);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(patient.dead(), Vec::<String>::new(), "{words}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_read_only_is_waited_for_and_named() {
    for lane in LANES {
        let set = "ALTER ROLE {role} SET default_transaction_read_only = on";
        refuses(
            lane,
            "read-only",
            set,
            "ALTER ROLE {role} RESET default_transaction_read_only",
        )
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_taken_from_a_databases_role_and_given_back_costs_no_message() {
    for lane in LANES {
        let revoke = "REVOKE INSERT ON t FROM {role}";
        refuses(
            lane,
            "permission denied",
            revoke,
            "GRANT INSERT ON t TO {role}",
        )
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_renamed_and_back_costs_no_message() {
    let rename = "ALTER TABLE t RENAME TO u";
    refuses(
        Lane::Transactional,
        "does not exist",
        rename,
        "ALTER TABLE u RENAME TO t",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_progress_that_may_not_be_written_is_waited_for_and_named() {
    let revoke = "REVOKE UPDATE, INSERT ON stagehost_progress FROM {role}";
    let grant = "GRANT UPDATE, INSERT ON stagehost_progress TO {role}";
    refuses(Lane::Transactional, "permission denied", revoke, grant).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_lets_nobody_in_is_waited_for_and_named() {
    for lane in [Lane::Ordered, Lane::Transactional] {
        let none = "ALTER ROLE {role} CONNECTION LIMIT 0";
        refuses(
            lane,
            "too many connections",
            none,
            "ALTER ROLE {role} CONNECTION LIMIT -1",
        )
        .await;
        let out = "ALTER ROLE {role} NOLOGIN";
        refuses(
            lane,
            "not permitted to log in",
            out,
            "ALTER ROLE {role} LOGIN",
        )
        .await;
    }
}

fn admin_of(own: &servers::Server) -> String {
    format!("postgres://postgres:geheim@127.0.0.1:{}/postgres", own.port)
}

/// The old one is put back, or the pipeline gets the new one.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_password_of_a_database_is_waited_for_and_named() {
    const WORDS: &str = "password authentication failed";
    let own = servers::postgres();
    for lane in [Lane::Ordered, Lane::Transactional] {
        let place = Place::at(&admin_of(&own), "").await;
        let change = async |password: &str| {
            let change = format!("ALTER ROLE {{role}} PASSWORD '{password}'");
            place.run(&change).await;
            place.end_sessions().await;
        };
        let mut patient = Patient::on_database(&place.url, lane);
        patient.send(&inserts(0..10)).await;
        patient.settle();
        change("other").await;
        patient.send(&inserts(10..20)).await;
        is_held(&patient, WORDS).await;
        change("geheim").await;
        patient.goes_on();
        change("other").await;
        patient.send(&inserts(20..40)).await;
        is_held(&patient, WORDS).await;
        patient.restart(":geheim@", ":other@");
        patient.goes_on();
        assert_eq!(place.numbers().await, Vec::from_iter(0..40), "{lane:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_a_database_refuses_is_refused_at_the_start_without_the_password() {
    let own = servers::postgres();
    let place = Place::at(&admin_of(&own), "").await;
    let why = refused(&place, &place.url.replace(":geheim@", ":falsch@"));
    assert!(
        why.contains("password authentication failed for user"),
        "{why}"
    );
    assert!(!why.contains("falsch"), "{why}");
}

/// What a host says that refuses this URL of the place's at its start, behind the place.
fn refused(place: &Place, url: &str) -> String {
    let port = url::Url::parse(url).expect("a URL").port().expect("a port");
    let at = format!(
        "error: SQL store `db`: PostgreSQL at 127.0.0.1:{port}/{}: ",
        place.name
    );
    let error = Stores::database(url, "\"data\"").refused();
    let why = error.strip_prefix(&at);
    why.unwrap_or_else(|| panic!("{error}")).to_owned()
}

/// Waits until the server asks everybody for TLS, or lets them in without it.
async fn asks_for_tls(own: &servers::Server, place: &Place, asks: bool) {
    servers::admit(own, if asks { "hostssl" } else { "host" });
    place.run("SELECT pg_reload_conf()").await;
    let plain = format!("{}?sslmode=disable", place.url);
    let is_let_in = async || PgConnection::connect(&plain).await.is_ok();
    while is_let_in().await == asks {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_on_one_side_only_of_a_database_is_refused_with_the_reason() {
    let own = servers::postgres();
    let place = Place::at(&admin_of(&own), "").await;
    let url = |mode: &str| format!("{}?sslmode={mode}", place.url);
    for mode in ["require", "verify-full"] {
        let why = refused(&place, &url(mode));
        let words = "the server does not support TLS, which sslmode asks for";
        assert_eq!(why, words, "{mode}");
    }
    servers::give_certificate(&own, &Certificate::new());
    place.run("ALTER SYSTEM SET ssl = on").await;
    asks_for_tls(&own, &place, true).await;
    let why = refused(&place, &url("disable"));
    let words = ["no pg_hba.conf entry for host", "no encryption"];
    assert!(words.iter().all(|words| why.contains(words)), "{why}");
    // Nobody knows who signed its certificate.
    let why = refused(&place, &url("verify-full"));
    assert!(why.contains("certificate verify failed"), "{why}");
    for (n, mode) in [(0, "prefer"), (10, "require")] {
        let patient = Patient::on_database(&url(mode), Lane::Transactional);
        patient.send(&inserts(n..n + 10)).await;
        patient.goes_on();
    }
    assert_eq!(place.numbers().await, Vec::from_iter(0..20));
}

/// As of a proxy that ends TLS: PostgreSQL's protocol begins in the clear, and asks for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_speaks_tls_from_the_first_byte_in_the_place_of_postgresql_is_named() {
    const WORDS: &str = "speaks TLS from the first byte on";
    // Whose it is does not matter: nothing is said in it.
    let (_other, tls) = servers::redis_with_tls(&Certificate::new());
    let place = Place::new().await;
    let mut url = url::Url::parse(&place.url).expect("a URL");
    let port = url.port().expect("a port");
    let way = servers::Way::to(tls);
    url.set_port(Some(way.port)).expect("a port");
    for (n, mode) in [(0, "disable"), (20, "prefer")] {
        way.lead(tls);
        let url = format!("{url}?sslmode={mode}");
        let starts = |pipeline: &str| {
            let host = super::spawn(pipeline, &[]);
            super::says_at_the_start(&host, "db", WORDS);
            way.lead(port);
            host.ready();
            host
        };
        let patient = Patient::on_database_with(&url, Lane::Transactional, "\"data\"", starts);
        patient.send(&inserts(n..n + 10)).await;
        patient.goes_on();
        way.lead(tls);
        way.cut();
        patient.send(&inserts(n + 10..n + 20)).await;
        is_held(&patient, WORDS).await;
        way.lead(port);
        patient.goes_on();
    }
    assert_eq!(place.numbers().await, Vec::from_iter(0..40));
}

/// Sessions that are open stay, so they are ended: as after a restart.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_asks_for_tls_all_at_once_is_waited_for_and_named() {
    let own = servers::postgres();
    servers::give_certificate(&own, &Certificate::new());
    for lane in [Lane::Ordered, Lane::Transactional] {
        let place = Place::at(&admin_of(&own), "").await;
        place.run("ALTER SYSTEM SET ssl = on").await;
        let patient = Patient::on_database(&format!("{}?sslmode=disable", place.url), lane);
        patient.send(&inserts(0..10)).await;
        patient.settle();
        asks_for_tls(&own, &place, true).await;
        place.end_sessions().await;
        patient.send(&inserts(10..40)).await;
        is_held(&patient, "no encryption").await;
        asks_for_tls(&own, &place, false).await;
        patient.goes_on();
        assert_eq!(place.numbers().await, Vec::from_iter(0..40), "{lane:?}");
    }
}

/// The standby is promoted and the address leads to it; sessions that are open stay with the old primary, which takes no more
/// writes.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_failover_of_postgresql_the_new_primary_is_found() {
    let old = servers::postgres();
    let url_at =
        |user: &str, port: u16| format!("postgres://{user}:geheim@127.0.0.1:{port}/postgres");
    let primary = url_at("postgres", old.port);
    run(
        &primary,
        "CREATE TABLE t (n BIGINT); CREATE ROLE stages LOGIN PASSWORD 'geheim'; \
         GRANT ALL ON TABLE t TO stages; GRANT ALL ON SCHEMA public TO stages",
    )
    .await;
    let new = servers::standby(&old);
    let standby = url_at("postgres", new.port);
    let way = servers::Way::to(old.port);
    let patient = Patient::on_database(&url_at("stages", way.port), Lane::Transactional);
    patient.send(&inserts(0..10)).await;
    patient.settle();
    run(
        &primary,
        "ALTER SYSTEM SET default_transaction_read_only = on",
    )
    .await;
    run(&primary, "SELECT pg_reload_conf()").await;
    patient.send(&inserts(10..20)).await;
    patient.says("read-only");
    let written = one::<String>(&primary, "SELECT pg_current_wal_lsn()::text").await;
    let replayed = format!("SELECT pg_last_wal_replay_lsn() >= '{written}'::pg_lsn");
    while !one::<bool>(&standby, &replayed).await {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    run(&standby, "SELECT pg_promote()").await;
    way.lead(new.port);
    patient.send(&inserts(20..40)).await;
    patient.goes_on();
    let count = "SELECT count(*) * 1000 + count(DISTINCT n) FROM t";
    assert_eq!(one::<i64>(&standby, count).await, 40 * 1000 + 40);
    assert_eq!(one::<i64>(&primary, count).await, 10 * 1000 + 10);
}

/// The one value of a query.
async fn one<T>(url: &str, query: &str) -> T
where
    T: Send + Unpin + sqlx::Type<sqlx::Postgres> + for<'r> sqlx::Decode<'r, sqlx::Postgres>,
{
    let mut connection = PgConnection::connect(url).await.expect("PostgreSQL");
    let value = sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(&mut connection);
    value
        .await
        .unwrap_or_else(|error| panic!("{query}: {error}"))
}

/// What its grant does not allow is the message's own, though the database says the same of it as of a standby.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_of_a_stage_that_may_only_read_is_denied() {
    let place = Place::new().await;
    place
        .run(
            "CREATE FUNCTION writes() RETURNS bigint LANGUAGE sql VOLATILE AS 'INSERT INTO t VALUES (1) RETURNING n'",
        )
        .await;
    for lane in [Lane::Ordered, Lane::Transactional] {
        let patient = Patient::reads_and_writes(&place.url, lane, "\"read-only\"");
        let call = json!({ "do": "sql", "store": "db", "statement": "SELECT writes()" });
        let read = json!({ "do": "sql", "store": "db", "statement": "SELECT n FROM t" });
        patient.send(&[read.clone(), call, read]).await;
        patient.settle();
        let dead = patient.dead();
        let is_denied =
            matches!(&dead[..], [one] if one.starts_with("denied") && one.contains("read-only"));
        assert!(is_denied, "{lane:?}: {dead:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_a_stage_never_had_is_denied() {
    let place = Place::new().await;
    place.run("CREATE TABLE other (n BIGINT)").await;
    for lane in [Lane::Ordered, Lane::Transactional] {
        let patient = Patient::on_database(&place.url, lane);
        let other = json!({ "do": "sql", "store": "db", "statement": "SELECT n FROM other" });
        patient.send(&[other]).await;
        patient.send(&inserts(0..2)).await;
        patient.settle();
        let dead = patient.dead();
        let is_denied = matches!(&dead[..], [one] if one.starts_with("denied") && one.contains("permission denied"));
        assert!(is_denied, "{lane:?}: {dead:?}");
    }
}

/// An administrator's transaction that is left open, on a table or on a row of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_somebody_else_keeps_is_waited_for_and_named() {
    for (lane, lock) in [
        (Lane::Ordered, "LOCK TABLE t"),
        (Lane::Transactional, "LOCK TABLE t"),
        (
            Lane::Transactional,
            "SELECT n FROM t WHERE n = 0 FOR UPDATE",
        ),
    ] {
        let place = Place::new().await;
        let patient = Patient::on_database(&place.url, lane);
        patient.send(&inserts(0..10)).await;
        patient.settle();
        let mut other = PgConnection::connect(&place.admin)
            .await
            .expect("PostgreSQL");
        let begin = format!("BEGIN; {lock}");
        let begun = sqlx::raw_sql(AssertSqlSafe(begin))
            .execute(&mut other)
            .await;
        begun.expect("a lock");
        let update =
            json!({ "do": "sql", "store": "db", "statement": "UPDATE t SET n = n WHERE n = 0" });
        patient.send(&[update]).await;
        patient.send(&inserts(10..20)).await;
        patient.says("wait for a lock");
        tokio::time::sleep(Duration::from_secs(15)).await;
        assert_eq!(patient.dead(), Vec::<String>::new(), "{lane:?}: {lock}");
        let ended = sqlx::raw_sql("ROLLBACK").execute(&mut other).await;
        ended.expect("an end");
        patient.goes_on();
        assert_eq!(
            place.numbers().await,
            Vec::from_iter(0..20),
            "{lane:?}: {lock}"
        );
    }
}

/// Whatever its sessions call themselves, those of the host's own and those of stages, and whatever PostgreSQL makes of it, and
/// PgBouncer.
#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_another_host_has_for_a_moment_is_nobodys_trouble() {
    let place = Place::new().await;
    place
        .run("REVOKE ALL ON SCHEMA public FROM {role}, public; GRANT USAGE ON SCHEMA public TO {role}")
        .await;
    let (own, stages) = ("own-".repeat(20), "Stufen-für-alle");
    let stores = format!(
        "[redis.cache]\nurl = \"memory:\"\n[sql.db]\nurl = \"{}?application_name={own}\"\n\
         stage-url = \"{}?application_name={stages}\"",
        place.admin, place.url
    );
    let through_pgbouncer = format!("{stages} - 10.0.0.1:6432");
    let grant = "sql = [\"db\"]\nredis = { cache = { prefix = \"p:\" } }";
    let patient = Patient::start("db", Lane::Ordered, grant, &stores);
    patient.send(&inserts(0..10)).await;
    patient.settle();
    for (name, is_named) in [
        (&*own, false),
        (stages, false),
        (&*through_pgbouncer, false),
        ("another", true),
    ] {
        let lock = format!("SET application_name = '{name}'; UPDATE t SET n = n WHERE n = 0");
        let mut other = place.left_open(&lock).await;
        patient.send(&[update()]).await;
        if is_named {
            patient.says("wait for a lock");
        } else {
            // It is looked first after a quarter of that.
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert_eq!(
                get(&patient.host.address("admin"), "/readyz").0,
                200,
                "{name}"
            );
        }
        let ended = sqlx::raw_sql("ROLLBACK").execute(&mut other).await;
        ended.expect("an end");
        patient.goes_on();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_progress_that_somebody_keeps_locked_costs_nothing_and_is_named() {
    let place = Place::new().await;
    let patient = Patient::on_database(&place.url, Lane::Transactional);
    patient.send(&inserts(0..10)).await;
    patient.settle();
    let mut other = PgConnection::connect(&place.admin)
        .await
        .expect("PostgreSQL");
    let begin = sqlx::raw_sql("BEGIN; SELECT * FROM stagehost_progress FOR UPDATE");
    begin.execute(&mut other).await.expect("a lock");
    patient.send(&inserts(10..20)).await;
    let admin = patient.host.address("admin");
    patient.host.wait_for("readiness to name it", || {
        let (status, said) = crate::support::get(&admin, "/readyz");
        (status == 503 && said.contains("in stagehost_progress locked")).then_some(())
    });
    assert_eq!(patient.dead(), Vec::<String>::new());
    sqlx::raw_sql("ROLLBACK")
        .execute(&mut other)
        .await
        .expect("an end");
    patient.goes_on();
    assert_eq!(place.numbers().await, Vec::from_iter(0..20));
}

#[tokio::test(flavor = "multi_thread")]
async fn something_else_at_the_address_of_postgresql_is_named_and_passes() {
    let place = Place::new().await;
    let mut url = url::Url::parse(&place.url).expect("a URL");
    let port = url.port().expect("a port");
    let way = servers::Way::to(port);
    url.set_port(Some(way.port)).expect("a port");
    for lane in [Lane::Ordered, Lane::Transactional] {
        place.run("TRUNCATE t").await;
        let patient = Patient::on_database(url.as_str(), lane);
        patient.send(&inserts(0..10)).await;
        patient.settle();
        way.lead(servers::foreign());
        way.cut();
        patient.send(&inserts(10..20)).await;
        patient.says("does not speak PostgreSQL's protocol");
        tokio::time::sleep(Duration::from_secs(5)).await;
        way.lead(port);
        patient.goes_on();
        assert_eq!(place.numbers().await, Vec::from_iter(0..20), "{lane:?}");
    }
}

/// An update of the row that others may have locked.
fn update() -> serde_json::Value {
    json!({ "do": "sql", "store": "db", "statement": "UPDATE t SET n = n WHERE n = 0" })
}

/// They end a statement before the host would, which then has seen for what it waited: a lock, and whose.
#[tokio::test(flavor = "multi_thread")]
async fn limits_of_the_server_that_end_who_waits_for_a_lock_cost_no_message() {
    for (lane, limit, lock) in [
        (Lane::Ordered, "lock_timeout = '200ms'", "LOCK TABLE t"),
        (
            Lane::Transactional,
            "lock_timeout = '200ms'",
            "UPDATE t SET n = n WHERE n = 0",
        ),
        (
            Lane::Ordered,
            "statement_timeout = '600ms'",
            "UPDATE t SET n = n WHERE n = 0",
        ),
        (
            Lane::Transactional,
            "statement_timeout = '600ms'",
            "LOCK TABLE t",
        ),
    ] {
        let what = format!("{lane:?}: {limit}: {lock}");
        let place = Place::new().await;
        place.run(&format!("ALTER ROLE {{role}} SET {limit}")).await;
        let patient = Patient::on_database(&place.url, lane);
        patient.send(&inserts(0..10)).await;
        patient.settle();
        let mut other = place.left_open(lock).await;
        let process = sqlx::query("SELECT pg_backend_pid()").fetch_one(&mut other);
        let process: i32 = process.await.expect("its process").get(0);
        patient.send(&[update()]).await;
        patient.send(&inserts(10..20)).await;
        patient.says(&format!(
            "wait for a lock that another session has: process {process} "
        ));
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(patient.dead(), Vec::<String>::new(), "{what}");
        let ended = sqlx::raw_sql("ROLLBACK").execute(&mut other).await;
        ended.expect("an end");
        patient.goes_on();
        assert_eq!(place.numbers().await, Vec::from_iter(0..20), "{what}");
    }
}

/// One lane waits for a lock; what another stage's message takes is its own affair, and none is held for who waits no more.
#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_waits_for_no_lock_is_its_messages_own_while_others_wait_for_one() {
    let place = Place::new().await;
    place
        .run("ALTER ROLE {role} SET statement_timeout = '600ms'; INSERT INTO t VALUES (0)")
        .await;
    let waits = Patient::on_database(&place.url, Lane::Transactional);
    let slow = Patient::on_database(&place.url, Lane::Ordered);
    let mut other = place.left_open("UPDATE t SET n = n WHERE n = 0").await;
    waits.send(&[update()]).await;
    waits.says("wait for a lock");
    let sleep = json!({ "do": "sql", "store": "db", "statement": "SELECT pg_sleep(60)" });
    slow.send(&[sleep]).await;
    slow.settle();
    let dead = slow.dead();
    assert!(
        matches!(&dead[..], [one] if one.starts_with("deadline") && one.contains("600ms")),
        "{dead:?}"
    );
    assert_eq!(waits.dead(), Vec::<String>::new());
    let ended = sqlx::raw_sql("ROLLBACK").execute(&mut other).await;
    ended.expect("an end");
    waits.goes_on();
}

/// A call's time is up before anybody has looked, again and again.
#[tokio::test(flavor = "multi_thread")]
async fn a_lock_is_waited_for_however_little_time_a_call_has() {
    for lane in [Lane::Ordered, Lane::Transactional] {
        let place = Place::new().await;
        let grant = "limits = { deadline = \"100ms\" }\nsql = [\"db\"]\nredis = { cache = { prefix = \"p:\" } }";
        let stores = format!(
            "[redis.cache]\nurl = \"memory:\"\n[sql.db]\nurl = \"{}\"",
            place.url
        );
        let patient = Patient::start("db", lane, grant, &stores);
        patient.send(&inserts(0..10)).await;
        patient.settle();
        let other = place
            .left_open("SELECT n FROM t WHERE n = 0 FOR UPDATE")
            .await;
        let update =
            json!({ "do": "sql", "store": "db", "statement": "UPDATE t SET n = n WHERE n = 0" });
        patient.send(&[update]).await;
        patient.says("wait for a lock");
        // More than the losses at one message that are put down to its store.
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert_eq!(patient.dead(), Vec::<String>::new(), "{lane:?}");
        other.close().await.expect("an end");
        patient.goes_on();
    }
}

/// The call's time is up before anybody has looked, and the lock is gone by a savepoint, not with its transaction.
#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_is_let_go_holds_nobody_though_its_transaction_stays_open() {
    for lane in [Lane::Ordered, Lane::Transactional] {
        let place = Place::new().await;
        let patient = Patient::on_database(&place.url, lane);
        patient.send(&inserts(0..10)).await;
        patient.settle();
        let lock = "SELECT 1; SAVEPOINT s; LOCK TABLE t";
        let mut other = place.left_open(lock).await;
        patient.send(&inserts(10..20)).await;
        patient.says("has AccessExclusiveLock on t");
        // The server sees soon that nobody waits for the statement that was given up.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let let_go = sqlx::raw_sql("ROLLBACK TO SAVEPOINT s").execute(&mut other);
        let_go.await.expect("a savepoint");
        patient.goes_on();
        assert_eq!(place.numbers().await, Vec::from_iter(0..20), "{lane:?}");
        drop(other);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_somebody_cancels_costs_no_message() {
    let place = Place::new().await;
    for lane in [Lane::Ordered, Lane::Transactional] {
        place.run("TRUNCATE t").await;
        let patient = Patient::on_database(&place.url, lane);
        let slow = "INSERT INTO t SELECT 10 FROM pg_sleep(1.5)";
        let slow = json!({ "do": "sql", "store": "db", "statement": slow, "execute": true });
        patient.send(&[slow]).await;
        let mut other = PgConnection::connect(&place.admin)
            .await
            .expect("PostgreSQL");
        let cancel = "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity \
                      WHERE usename = $1 AND state = 'active' AND query LIKE '%pg_sleep(1.5)%'";
        let (mut cancelled, since) = (0, Instant::now());
        while cancelled < 4 {
            assert!(
                since.elapsed() < Duration::from_secs(60),
                "{cancelled} were there"
            );
            let count = sqlx::query(cancel).bind(&place.name).fetch_one(&mut other);
            cancelled += count.await.expect("an answer").get::<i64, _>(0);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        patient.goes_on();
        assert_eq!(place.numbers().await, [10], "{lane:?}");
    }
}

/// Transactions are the batch's, so the pauses of one message may end what others have done; each is tried by itself then.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_the_server_ends_for_a_pause_costs_who_makes_the_pause_only() {
    let place = Place::new().await;
    place
        .run("ALTER ROLE {role} SET idle_in_transaction_session_timeout = '700ms'")
        .await;
    let patient = Patient::on_database(&place.url, Lane::Transactional);
    let pause = json!({ "do": "sleep", "ms": 2000 });
    let insert = |n| inserts(n..n + 1).remove(0);
    let pauses_inside = json!({ "do": "steps", "steps": [insert(100), pause, insert(101)] });
    let pauses_after = json!({ "do": "steps", "steps": [insert(102), pause] });
    let mut messages = inserts(0..5);
    messages.push(pause.clone());
    messages.extend(inserts(5..10));
    messages.extend([pauses_inside, insert(10), pauses_after]);
    messages.extend(inserts(11..15));
    patient.send(&messages).await;
    patient.settle();
    let dead = patient.dead();
    let is_named = |letter: &String| {
        letter.starts_with("deadline") && letter.contains("idle_in_transaction_session_timeout")
    };
    assert!(dead.len() == 2 && dead.iter().all(is_named), "{dead:?}");
    assert_eq!(place.numbers().await, Vec::from_iter(0..15));
    let log = patient.host.log();
    assert!(
        log.contains("idle_in_transaction_session_timeout is 700ms"),
        "{log}"
    );
    patient.host.ready();
}

/// What it has stands beside no process. And what the host's own rows are locked by.
#[tokio::test(flavor = "multi_thread")]
async fn a_prepared_transaction_that_keeps_a_lock_is_waited_for_and_named() {
    let own = servers::postgres();
    for (lane, lock) in [
        (Lane::Ordered, "LOCK TABLE t"),
        (Lane::Transactional, "UPDATE t SET n = n WHERE n = 0"),
    ] {
        let place = Place::at(&admin_of(&own), "").await;
        let patient = Patient::on_database(&place.url, lane);
        patient.send(&inserts(0..10)).await;
        patient.settle();
        let prepare = format!("BEGIN; {lock}; PREPARE TRANSACTION 'left behind'");
        place.run(&prepare).await;
        patient.send(&[update()]).await;
        patient.send(&inserts(10..20)).await;
        patient.says("prepared transaction 'left behind' of postgres since ");
        tokio::time::sleep(Duration::from_secs(8)).await;
        assert_eq!(patient.dead(), Vec::<String>::new(), "{lane:?}");
        place.run("ROLLBACK PREPARED 'left behind'").await;
        patient.goes_on();
        assert_eq!(place.numbers().await, Vec::from_iter(0..20), "{lane:?}");
        if lane == Lane::Transactional {
            let lock = "BEGIN; SELECT * FROM stagehost_progress FOR UPDATE; \
                        PREPARE TRANSACTION 'left behind'";
            place.run(lock).await;
            patient.send(&inserts(20..30)).await;
            let admin = patient.host.address("admin");
            patient.host.wait_for("readiness to name it", || {
                let (status, said) = crate::support::get(&admin, "/readyz");
                let words = "in stagehost_progress locked: prepared transaction 'left behind'";
                (status == 503 && said.contains(words)).then_some(())
            });
            place.run("ROLLBACK PREPARED 'left behind'").await;
            patient.goes_on();
            assert_eq!(place.numbers().await, Vec::from_iter(0..30));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_under_postgresql_is_waited_for_and_named() {
    let own = servers::postgres();
    let admin = admin_of(&own);
    let small = own.folder().join("small");
    run(
        &admin,
        &format!("CREATE TABLESPACE small LOCATION '{}'", small.display()),
    )
    .await;
    for lane in [Lane::Ordered, Lane::Transactional] {
        let place = Place::at(&admin, "TABLESPACE small").await;
        place
            .run("ALTER TABLE t ADD filler CHAR(4000) DEFAULT ''; ALTER TABLE t ALTER filler SET STORAGE PLAIN")
            .await;
        let patient = Patient::on_database(&place.url, lane);
        patient.send(&inserts(0..10)).await;
        patient.settle();
        place
            .run("CREATE TABLE filler (LIKE t INCLUDING ALL)")
            .await;
        for rows in [2_000, 200, 20, 2, 1] {
            let fill = format!("INSERT INTO filler SELECT n FROM generate_series(1, {rows}) AS n");
            while try_run(&place.admin, &fill).await.is_ok() {}
        }
        patient.send(&inserts(10..40)).await;
        patient.says("No space left on device");
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(patient.dead(), Vec::<String>::new(), "{lane:?}");
        place.run("DROP TABLE filler").await;
        patient.goes_on();
        assert_eq!(place.numbers().await, Vec::from_iter(0..40), "{lane:?}");
        drop(patient);
        run(
            &admin,
            &format!("DROP DATABASE {} WITH (FORCE)", place.name),
        )
        .await;
    }
}
