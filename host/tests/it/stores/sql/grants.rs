//! What stages may do in PostgreSQL: by their grant, by their words, and as a role of their own.

use host::capability::StoreError;
use host::capability::sql::{Database, Error};
use host::delivery::progress::{CommitError, Ledger, Mode, Transaction as _};
use host::pipeline::{SqlAccess, SqlUrl};
use sqlx::ConnectOptions;

use super::Value::{self, Boolean, Int64};
use super::progress::{checkpoint, commit, lane};
use super::roles::Roles;
use super::transactions::{MODES, Owner, insert};
use super::{CONNECTIONS, Kind, Place, execute, on, query, text};

#[track_caller]
pub(super) fn is_refused<T: std::fmt::Debug>(answer: &Result<T, Error>, statement: &str) {
    match answer {
        Err(Error::Database(error)) if error.sqlstate.as_deref() == Some("0A000") => {}
        other => panic!("{statement}: {other:?}"),
    }
}

#[tokio::test]
async fn a_grant_bounds_what_statements_do() {
    const READING: &[&str] = &[
        "SELECT * FROM t",
        "WITH a AS (SELECT 1) SELECT * FROM a",
        "EXPLAIN SELECT * FROM t",
        "VALUES (1)",
    ];
    const CHANGING: &[&str] = &[
        "INSERT INTO t VALUES (1)",
        "WITH a AS (DELETE FROM t RETURNING *) SELECT * FROM a",
        "EXPLAIN ANALYZE DELETE FROM t",
        "SELECT * FROM t FOR UPDATE",
    ];
    const DEFINING: &[&str] = &[
        "CREATE TABLE u (id int)",
        "SELECT 1 AS id INTO v",
        "ALTER TABLE t ADD COLUMN name text",
        "TRUNCATE t",
        "DROP TABLE u",
    ];
    on(Kind::Postgres, async |_, database| {
        execute(&database, "CREATE TABLE t (id BIGINT)", &[]).await;
        let grants = [
            (SqlAccess::ReadOnly, 1),
            (SqlAccess::Data, 2),
            (SqlAccess::DataDefinition, 3),
        ];
        for (access, allowed) in grants {
            let granted = database.granted(access);
            for (at, statements) in [READING, CHANGING, DEFINING].into_iter().enumerate() {
                for statement in statements {
                    let done = granted.execute(statement, &[]).await;
                    match at < allowed {
                        true => assert!(done.is_ok(), "{statement}: {done:?}"),
                        false => is_refused(&done, statement),
                    }
                }
            }
        }
    })
    .await;
}

/// A function of the database's own may write, and not for a stage that only reads; the host still writes its row.
#[tokio::test]
async fn who_reads_only_writes_nothing_through_a_function() {
    const WRITE: &str =
        "CREATE FUNCTION add() RETURNS void LANGUAGE sql AS 'INSERT INTO t SELECT count(*) FROM t'";
    let place = Place::new(Kind::Postgres).await;
    let database = place.open(None).await.expect("a new database");
    let owner = Owner::new(&database).await;
    place.run(WRITE).await;
    let reading = database.granted(SqlAccess::ReadOnly);
    for _ in 0..CONNECTIONS {
        let written = reading.query("SELECT add()", &[]).await;
        assert!(matches!(written, Err(Error::Denied(_))), "{written:?}");
        let written = database.query("SELECT add()", &[]).await;
        assert!(written.is_ok(), "{written:?}");
    }
    execute(&database, "DELETE FROM t", &[]).await;
    for (commits, mode) in (1..).zip(MODES) {
        let transaction = reading.begin(mode).await.expect("a transaction");
        let read = transaction.query("SELECT count(*) FROM t", &[]).await;
        assert_eq!(read.map(|read| read.rows), Ok(vec![vec![Int64(0)]]));
        let state = checkpoint(commits);
        let commit = owner.commit_of(commits, &state);
        let committed = transaction.commit(commit).await;
        assert!(committed.is_ok(), "{committed:?}");
        let transaction = reading.begin(mode).await.expect("a transaction");
        let written = transaction.query("SELECT add()", &[]).await;
        assert!(matches!(written, Err(Error::Denied(_))), "{written:?}");
        transaction.rollback().await;
    }
    // The host writes its rows in a session that a stage had before which only reads.
    for _ in 0..CONNECTIONS {
        let read = reading.query("SELECT count(*) FROM t", &[]).await;
        assert!(read.is_ok(), "{read:?}");
        let claim = database.claim(&owner.lane).await.expect("a claim");
        assert_eq!(claim.commits, 2);
    }
    assert!(owner.numbers().await.is_empty());
    database.close().await;
    place.remove().await;
}

/// What a stage could hurt others with, in its words.
const ATTACKS: &[&str] = &[
    // What looks like something else: options in quotes, functions as attributes, labels as words, SQL in a value.
    "EXPLAIN (\"analyze\") EXECUTE h1('g', 't', 0, 1, 1, 1, 0, '', '')",
    "EXPLAIN (\"analyze\") CREATE TEMP TABLE posts AS SELECT 1 AS a WHERE false",
    "SELECT ('SELECT to_tsvector(''simple'', set_config(''search_path'', ''x'', false))'::text).ts_stat",
    "SELECT x.pg_advisory_lock FROM generate_series(3::bigint, 3) AS x",
    "SELECT ((SELECT pid FROM pg_stat_activity LIMIT 1)).pg_terminate_backend",
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 2) SEARCH DEPTH FIRST BY n SET o \
     SELECT (1) insert INTO TEMP posts FROM t",
    "SELECT * FROM crosstab('SELECT epoch::text, ''a'', ''b'' FROM stagehost_progress') AS (a text, b text)",
    "REINDEX (VERBOSE) SCHEMA public",
    "UPDATE stagehost_progress SET epoch = epoch + 1",
    "UPDATE public.\"stagehost_progress\" SET next_offset = next_offset + 100",
    "UPDATE U&\"stagehost!005fprogress\" UESCAPE '!' SET epoch = 1",
    "INSERT INTO stagehost_progress SELECT * FROM stagehost_progress",
    "SELECT pending FROM stagehost_progress",
    "WITH a AS (DELETE FROM stagehost_progress RETURNING 1) SELECT * FROM a",
    "/* ' */ DELETE FROM stagehost_progress -- '",
    "SELECT E'\\'', 1; DELETE FROM stagehost_progress --'",
    "SELECT E'a'\n'\\' , (SELECT epoch FROM stagehost_progress) --'",
    "SELECT $a$ $a$, (SELECT epoch FROM stagehost_progress), $a$ $a$",
    "DROP TABLE stagehost_progress",
    "ALTER TABLE stagehost_progress RENAME TO gone",
    "CREATE VIEW v AS SELECT * FROM stagehost_progress",
    "CREATE INDEX ON stagehost_progress (epoch)",
    "TRUNCATE stagehost_progress",
    "SELECT table_to_xml('stagehost_progress', true, true, '')",
    "SELECT query_to_xml('DELETE FROM stagehost_progress', true, true, '')",
    "DELETE FROM _stagehost_migrations",
    "DELETE FROM _sqlx_migrations",
    "SELECT stagehost_save('\\x00', 'g', 't', 0, 1, 1, 1, 0, '', '')",
    "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE TRIGGER a AFTER INSERT ON t EXECUTE FUNCTION f()",
    "CREATE RULE a AS ON INSERT TO t DO ALSO DELETE FROM t",
    "ALTER ROLE CURRENT_USER PASSWORD 'mine'",
    "CREATE ROLE mine",
    "ALTER SYSTEM SET log_statement = 'all'",
    "ALTER DATABASE postgres SET statement_timeout = 1",
    "CREATE EXTENSION dblink",
    "DROP SCHEMA public CASCADE",
    "ALTER TABLE t OWNER TO CURRENT_USER",
    "GRANT ALL ON t TO PUBLIC",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity",
    "SELECT pg_cancel_backend(pid) FROM pg_stat_activity",
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_read_file('postgresql.conf')",
    "SELECT pg_ls_dir('.')",
    "SELECT lo_import('/etc/passwd')",
    "SELECT lo_create(1)",
    "SELECT pg_reload_conf()",
    "SELECT pg_switch_wal()",
    "SELECT setseed(0.5)",
    "SELECT pg_stat_reset()",
    "SELECT set_config('default_transaction_read_only', 'off', false)",
    "COPY t TO PROGRAM 'id'",
    "LOCK TABLE t",
    "NOTIFY mine",
    "VACUUM",
    "CALL f()",
    "CREATE TABLE u AS EXECUTE h1",
    "EXPLAIN ANALYZE EXECUTE h1",
    "UPDATE pg_class SET relname = 'gone' WHERE relname = 'stagehost' || '_progress'",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "RELEASE SAVEPOINT stagehost_call; SAVEPOINT stagehost_call",
    "ROLLBACK TO SAVEPOINT stagehost_statement",
    "SET TRANSACTION READ WRITE",
    "RESET default_transaction_read_only",
];

#[tokio::test]
async fn what_is_the_hosts_is_out_of_reach_of_words() {
    on(Kind::Postgres, async |_, database| {
        let mut owner = Owner::new(&database).await;
        for statement in ATTACKS {
            is_refused(&database.execute(statement, &[]).await, statement);
            is_refused(&database.query(statement, &[]).await, statement);
            let transaction = owner.begin(Mode::Optimistic).await;
            assert_eq!(insert(&transaction, 1).await, Ok(1));
            let within = transaction.execute(statement, &[]).await;
            is_refused(&within, statement);
            assert_eq!(transaction.broken(), None);
            transaction.rollback().await;
        }
        let transaction = owner.begin(Mode::Optimistic).await;
        let committed = owner.commit(transaction).await;
        assert!(committed.is_ok(), "{committed:?}");
    })
    .await;
}

/// The host's own statements, letter by letter.
#[tokio::test]
async fn the_hosts_own_texts_are_not_a_stages() {
    const SAVE: &str = "WITH saved AS (UPDATE public.stagehost_progress SET commits = $5, next_offset = $6, attempts = $7, \
                        pending = $8, seen = $9, updated_at = CURRENT_TIMESTAMP WHERE consumer_group = $1 AND topic = $2 \
                        AND partition = $3 AND epoch = $4 AND generation = $10 AND commits = $5 - 1 RETURNING 1) \
                        SELECT 1 OPERATOR(pg_catalog./) pg_catalog.count(*) FROM saved";
    on(Kind::Postgres, async |_, database| {
        let mut owner = Owner::new(&database).await;
        let transaction = owner.begin(Mode::Optimistic).await;
        let committed = owner.commit(transaction).await;
        assert!(committed.is_ok(), "{committed:?}");
        let prepared = "SELECT statement FROM pg_prepared_statements WHERE name LIKE 'h%'";
        let mut texts = vec![SAVE.to_owned()];
        for row in query(&database, prepared, &[]).await {
            if let [Value::Text(statement)] = &row[..] {
                texts.push(statement.clone());
            }
        }
        for statement in texts
            .iter()
            .filter(|text| text.contains("stagehost_progress"))
        {
            let params = [text("g"), text("t"), Int64(0), Int64(1), Int64(1), Int64(1)];
            is_refused(&database.execute(statement, &params).await, statement);
        }
    })
    .await;
}

#[tokio::test]
async fn a_role_for_stages_as_the_readme_makes_it() {
    let roles = Roles::new().await;
    let database = roles.open().await.unwrap_or_else(|error| panic!("{error}"));
    database
        .prepare_progress()
        .await
        .unwrap_or_else(|error| panic!("{error}"));
    // A migration of the host's role.
    let SqlUrl::Postgres(url) = &roles.url else {
        panic!("not PostgreSQL")
    };
    let options: sqlx::postgres::PgConnectOptions = url.parse().expect("a URL");
    let mut host = options.connect().await.expect("the host's role");
    let made = sqlx::raw_sql("CREATE TABLE t (id BIGINT PRIMARY KEY)").execute(&mut host);
    made.await.expect("a table");
    let lane = lane();
    let mut own = database.claim(&lane).await.expect("a claim");
    for (commits, mode) in (1..).zip(MODES) {
        let transaction = database.begin(mode).await.expect("a transaction");
        assert_eq!(insert(&transaction, commits).await, Ok(1));
        let who = "SELECT current_user = $1 AND session_user = $1";
        let who = transaction.query(who, &[text(&roles.stage)]).await;
        assert_eq!(who.map(|who| who.rows), Ok(vec![vec![Boolean(true)]]));
        let state = checkpoint(commits);
        let committed = transaction
            .commit(commit(&lane, &own, commits, &state))
            .await;
        assert!(committed.is_ok(), "{committed:?}");
    }
    let claim = database.claim(&lane).await.expect("a claim");
    assert_eq!((claim.commits, &claim.checkpoint), (2, &checkpoint(2)));
    let transaction = database
        .begin(Mode::Optimistic)
        .await
        .expect("a transaction");
    assert_eq!(insert(&transaction, 9).await, Ok(1));
    let state = checkpoint(3);
    let fenced = transaction.commit(commit(&lane, &own, 3, &state)).await;
    assert!(matches!(fenced, Err(CommitError::Fenced)), "{fenced:?}");
    own = claim;
    let saved = database.save(commit(&lane, &own, 3, &state)).await;
    assert!(saved.is_ok(), "{saved:?}");
    let rows = query(&database, "SELECT id FROM t ORDER BY id", &[]).await;
    assert_eq!(rows, [[Int64(1)], [Int64(2)]]);

    // Another host, with another secret, at the same time; and a secret that the database has lost.
    let other = roles.open().await.expect("another host");
    other.prepare_progress().await.expect("the same tables");
    roles.place.run("DELETE FROM stagehost_secrets").await;
    let transaction = database
        .begin(Mode::Optimistic)
        .await
        .expect("a transaction");
    let unknown = transaction.commit(commit(&lane, &own, 4, &state)).await;
    assert!(
        matches!(unknown, Err(CommitError::Unanswered(_))),
        "{unknown:?}"
    );
    let transaction = database
        .begin(Mode::Optimistic)
        .await
        .expect("a transaction");
    let committed = transaction.commit(commit(&lane, &own, 4, &state)).await;
    assert!(committed.is_ok(), "{committed:?}");
    other.close().await;
    database.close().await;
    roles.remove().await;
}

/// Whoever logs in as the stages' role, whatever is said: no word is looked at here.
#[tokio::test]
async fn what_is_the_hosts_is_out_of_reach_of_the_stages_role() {
    const TRIED: &[&str] = &[
        "UPDATE stagehost_progress SET epoch = 1",
        "SELECT pending FROM stagehost_progress",
        "DELETE FROM stagehost_progress",
        "LOCK TABLE stagehost_progress",
        "SELECT hash FROM stagehost_secrets",
        "INSERT INTO stagehost_secrets VALUES (sha256('mine'), now() + interval '1 day')",
        "DELETE FROM _stagehost_migrations",
        "SELECT stagehost_save('mine', 'service.publisher', 'app.newPosts', 3, 1, 1, 1, 0, '', '', 1)",
        "ALTER FUNCTION stagehost_save(bytea, text, text, int, bigint, bigint, bigint, int, bytea, bytea, bigint) SECURITY INVOKER",
        "CREATE OR REPLACE FUNCTION stagehost_save(secret bytea, of_group text, of_topic text, of_partition integer, \
         of_epoch bigint, new_commits bigint, new_offset bigint, new_attempts integer, new_pending bytea, new_seen bytea, \
         of_generation bigint) RETURNS void LANGUAGE sql AS 'SELECT'",
        "DROP TABLE stagehost_progress",
        "CREATE TRIGGER mine AFTER UPDATE ON stagehost_progress EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "CREATE TABLE mine (id int)",
        "CREATE TEMP TABLE mine (id int)",
        "SET ROLE {host}",
        "SET SESSION AUTHORIZATION {host}",
        "SELECT set_config('role', '{host}', false)",
        "ALTER ROLE {host} PASSWORD 'mine'",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{host}'",
        "COPY (SELECT 1) TO PROGRAM 'id'",
        "SELECT pg_read_file('postgresql.conf')",
    ];
    let roles = Roles::new().await;
    let database = roles.open().await.expect("a database");
    database.prepare_progress().await.expect("tables");
    let lane = lane();
    let own = database.claim(&lane).await.expect("a claim");
    let mut stage = roles.as_stage().await;
    for statement in TRIED {
        let statement = statement.replace("{host}", &roles.host);
        let done = sqlx::raw_sql(sqlx::AssertSqlSafe(statement.clone())).execute(&mut stage);
        let refused = done.await;
        assert!(refused.is_err(), "{statement}: {refused:?}");
    }
    let transaction = database
        .begin(Mode::Optimistic)
        .await
        .expect("a transaction");
    let state = checkpoint(1);
    let committed = transaction.commit(commit(&lane, &own, 1, &state)).await;
    assert!(committed.is_ok(), "{committed:?}");
    database.close().await;
    roles.remove().await;
}

/// What a database's administrator has to mend is said, as statements that mend it.
#[tokio::test]
async fn a_role_that_is_no_bound_is_refused() {
    let roles = Roles::new().await;
    let (host, stage) = (roles.host.clone(), roles.stage.clone());
    let database = roles.open().await.expect("a database");
    database.prepare_progress().await.expect("tables");
    database.close().await;
    for wrong in [
        format!("ALTER ROLE {stage} SUPERUSER"),
        format!("ALTER ROLE {stage} CREATEROLE"),
        format!("ALTER ROLE {stage} REPLICATION BYPASSRLS"),
        format!("GRANT {host} TO {stage}"),
        format!("GRANT pg_write_server_files, pg_signal_backend TO {stage}"),
        format!("ALTER SCHEMA public OWNER TO {stage}"),
        format!("GRANT pg_write_all_data TO {stage}"),
        format!("REVOKE USAGE ON SCHEMA public FROM PUBLIC, {stage}"),
    ] {
        roles.place.run(&wrong).await;
        let why = roles.refusal().await;
        assert!(!why.contains("geheim"), "{why}");
        let (words, mending) = why.split_once('\n').expect("words, then statements");
        assert!(words.contains(&stage), "{why}");
        roles.place.run(mending).await;
        let opened = roles.open().await;
        let opened = opened.unwrap_or_else(|error| panic!("{wrong}: {error}"));
        opened.close().await;
    }
    // What the host can take, it takes.
    let grant = format!("GRANT ALL ON ALL TABLES IN SCHEMA public TO {stage}");
    roles.place.run(&grant).await;
    let opened = roles.open().await.expect("it took the grants");
    opened.close().await;
    let mut stage = roles.as_stage().await;
    let read = sqlx::raw_sql("SELECT epoch FROM stagehost_progress").execute(&mut stage);
    assert!(read.await.is_err());
    drop(stage);
    // The same role twice.
    let same = Database::connect_as(&roles.url, Some(&roles.url), None, 1, None).await;
    match same.map(drop) {
        Err(StoreError::Refused(why)) => assert!(why.contains("the role of url"), "{why}"),
        other => panic!("{other:?}"),
    }
    roles.remove().await;
}

/// Where the host's role may not make what it needs, it says what whoever may is to run.
#[tokio::test]
async fn missing_rights_for_the_function_are_named_with_what_to_do() {
    let roles = Roles::new().await;
    let alone = Database::connect(&roles.url, None, 1, None).await;
    let alone = alone.expect("the host's role");
    alone.prepare_progress().await.expect("a table");
    alone.close().await;
    let (place, host) = (&roles.place, &roles.host);
    place
        .run(&format!(
            "REVOKE CREATE ON SCHEMA public FROM {host}; ALTER TABLE stagehost_progress OWNER TO CURRENT_USER; \
             GRANT SELECT, INSERT, UPDATE ON stagehost_progress TO {host}"
        ))
        .await;
    // What the host can't take from the stages' role, somebody else has to.
    let why = roles.refusal().await;
    let (_, statements) = why.split_once('\n').expect("words, then statements");
    place.run(statements).await;
    let database = roles.open().await.expect("a database");
    let why = match database.prepare_progress().await {
        Err(StoreError::Refused(why)) => why,
        other => panic!("{other:?}"),
    };
    let (words, statements) = why.split_once('\n').expect("words, then statements");
    let grant = format!("GRANT CREATE ON SCHEMA public TO {host};");
    assert!(words.contains(&grant), "{why}");
    place.run(statements).await;
    database
        .prepare_progress()
        .await
        .unwrap_or_else(|error| panic!("{error}"));
    let lane = lane();
    let own = database.claim(&lane).await.expect("a claim");
    let transaction = database.begin(Mode::Optimistic).await.expect("a turn");
    let state = checkpoint(1);
    let committed = transaction.commit(commit(&lane, &own, 1, &state)).await;
    assert!(committed.is_ok(), "{committed:?}");
    database.close().await;
    roles.remove().await;
}

/// What an earlier version's hosts call stays for them; it does not look at commits, so this one has its own beside it. Who may
/// not make it is told at the start.
#[tokio::test]
async fn the_function_of_an_earlier_version_stays_beside_this_ones() {
    const EARLIER: &str = include_str!("../../earlier/postgres-stages.sql");
    const FUNCTIONS: &str = "SELECT count(*) FROM pg_proc WHERE proname = 'stagehost_save'";
    for may_create in [true, false] {
        let roles = Roles::new().await;
        let (place, host) = (&roles.place, &roles.host);
        let alone = Database::connect(&roles.url, None, 1, None).await;
        let alone = alone.expect("the host's role");
        alone.prepare_progress().await.expect("a table");
        alone.close().await;
        let earlier = EARLIER
            .replace("{schema}", "public")
            .replace("{role}", &roles.stage);
        place.run(&earlier).await;
        let rights = "GRANT SELECT, INSERT, UPDATE, DELETE ON stagehost_secrets TO";
        place.run(&format!("{rights} {host}")).await;
        let database = roles.open().await;
        let database = database.unwrap_or_else(|error| panic!("{error}"));
        if !may_create {
            let revoke = format!("REVOKE CREATE ON SCHEMA public FROM {host}");
            place.run(&revoke).await;
            let why = match database.prepare_progress().await {
                Err(StoreError::Refused(why)) => why,
                other => panic!("{other:?}"),
            };
            let (words, statements) = why.split_once('\n').expect("words, then statements");
            assert!(words.contains("GRANT CREATE ON SCHEMA public"), "{why}");
            place.run(statements).await;
        }
        let prepared = database.prepare_progress().await;
        prepared.unwrap_or_else(|error| panic!("{error}"));
        let count = query(&database, FUNCTIONS, &[]).await;
        assert_eq!(count, [[Int64(2)]], "may create: {may_create}");
        let lane = lane();
        let own = database.claim(&lane).await.expect("a claim");
        for (commits, is_next) in [(1, true), (1, false), (3, false), (2, true)] {
            let transaction = database.begin(Mode::Optimistic).await.expect("a turn");
            let state = checkpoint(commits);
            let committed = transaction
                .commit(commit(&lane, &own, commits, &state))
                .await;
            assert_eq!(committed.is_ok(), is_next, "{commits}: {committed:?}");
        }
        database.close().await;
        roles.remove().await;
    }
}

/// No session shows the secret to another.
#[tokio::test]
async fn the_secret_is_in_no_text() {
    let roles = Roles::new().await;
    let database = roles.open().await.expect("a database");
    database.prepare_progress().await.expect("tables");
    let lane = lane();
    let own = database.claim(&lane).await.expect("a claim");
    let transaction = database
        .begin(Mode::Optimistic)
        .await
        .expect("a transaction");
    let state = checkpoint(1);
    transaction
        .commit(commit(&lane, &own, 1, &state))
        .await
        .expect("a commit");
    let all = (0..CONNECTIONS).map(|_| async {
        let own = "SELECT statement FROM pg_prepared_statements";
        query(&database, own, &[]).await
    });
    let mut seen = futures::future::join_all(all).await.concat();
    seen.extend(query(&database, "SELECT query FROM pg_stat_activity", &[]).await);
    let save = |row: &&Vec<Value>| matches!(&row[..], [Value::Text(text)] if text.contains("stagehost_save"));
    let saves: Vec<_> = seen.iter().filter(save).collect();
    assert!(!saves.is_empty());
    for save in saves {
        let [Value::Text(text)] = &save[..] else {
            continue;
        };
        assert!(text.contains("($11, $1"), "{text}");
        assert!(!text.contains("\\x"), "{text}");
    }
    database.close().await;
    roles.remove().await;
}
