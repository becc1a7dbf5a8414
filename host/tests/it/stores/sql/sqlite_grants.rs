//! What a stage may do in a SQLite database, by its grant; and what none may.

use host::capability::StoreError;
use host::capability::sql::{Database, Error};
use host::delivery::progress::{Ledger, Mode, Transaction as _};
use host::pipeline::{SqlAccess, SqlUrl};

use super::Value::Int64;
use super::transactions::{INSERT, Owner, insert};
use super::{CONNECTIONS, Kind, Place, execute, on, query, text};

const GRANTS: [SqlAccess; 3] = [
    SqlAccess::ReadOnly,
    SqlAccess::Data,
    SqlAccess::DataDefinition,
];

/// The file, as whoever has it may do anything to it. Something has opened it before.
pub(super) fn raw(place: &Place) -> rusqlite::Connection {
    let SqlUrl::Sqlite(file) = &place.url else {
        panic!("not SQLite");
    };
    rusqlite::Connection::open(file).expect("the file")
}

#[track_caller]
fn is_refused(answer: Result<u64, Error>, why: &str, statement: &str) {
    match answer {
        Err(Error::Database(error)) => {
            assert_eq!(
                error.sqlstate.as_deref(),
                Some("0A000"),
                "{statement}: {error:?}"
            );
            assert!(error.message.contains(why), "{statement}: {error:?}");
        }
        other => panic!("{statement}: {other:?}"),
    }
}

async fn filled(database: &Database) -> Owner {
    let owner = Owner::new(database).await;
    execute(
        database,
        "CREATE TABLE posts (id INTEGER PRIMARY KEY, title TEXT)",
        &[],
    )
    .await;
    execute(
        database,
        "CREATE VIEW titles AS SELECT title FROM posts",
        &[],
    )
    .await;
    execute(database, "INSERT INTO posts VALUES (1, 'a'), (2, 'b')", &[]).await;
    owner
}

#[tokio::test]
async fn sqlite_grants_are_what_a_stage_may_do() {
    let reads = [
        "SELECT * FROM posts",
        "VALUES (1)",
        "WITH p AS (SELECT id FROM posts) SELECT * FROM p",
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 9) SELECT * FROM n",
        "SELECT title, count(*), group_concat(title) FROM titles GROUP BY title",
        "SELECT value FROM json_each('[1, 2]')",
        "SELECT json_extract('{\"a\": 1}', '$.a'), '{\"a\": 1}' ->> 'a'",
        "SELECT upper(trim(title)), strftime('%Y', 'now'), row_number() OVER (ORDER BY id) FROM posts",
        "SELECT name FROM sqlite_schema WHERE type = 'table'",
        "SELECT name FROM pragma_table_info('posts')",
        "EXPLAIN QUERY PLAN SELECT * FROM posts",
    ];
    let writes = [
        "INSERT INTO posts VALUES (3, 'c')",
        "REPLACE INTO posts VALUES (3, 'd')",
        "WITH p AS (SELECT 4 AS id) INSERT INTO posts SELECT id, 'e' FROM p",
        "INSERT INTO posts VALUES (3, 'c') ON CONFLICT (id) DO UPDATE SET title = excluded.title RETURNING id",
        "UPDATE posts SET title = 'x' WHERE id = 2",
        "EXPLAIN DELETE FROM posts",
        "DELETE FROM posts WHERE id IN (3, 4)",
    ];
    let defines = [
        "CREATE TABLE new (id INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT DEFAULT CURRENT_TIMESTAMP CHECK (length(at) > 1))",
        "INSERT INTO new (id) VALUES (NULL)",
        "CREATE INDEX by_title ON posts (lower(title))",
        "ALTER TABLE new ADD COLUMN more TEXT",
        "ALTER TABLE new RENAME COLUMN more TO less",
        "ALTER TABLE new DROP COLUMN less",
        "ALTER TABLE new RENAME TO newer",
        "INSERT INTO posts VALUES (9, 'z')",
        "CREATE VIEW ids AS SELECT id FROM posts",
        "REINDEX by_title",
        "ANALYZE posts",
        "DROP VIEW ids",
        "DROP INDEX by_title",
        "DROP TABLE newer",
        "DELETE FROM posts WHERE id = 9",
    ];
    on(Kind::Sqlite, async |_, database| {
        filled(&database).await;
        for access in GRANTS {
            let stage = database.granted(access);
            for statement in reads {
                let answer = stage.query(statement, &[]).await;
                assert!(answer.is_ok(), "{access:?}: {statement}: {answer:?}");
            }
            for statement in writes {
                let answer = stage.execute(statement, &[]).await;
                match access {
                    SqlAccess::ReadOnly => {
                        is_refused(answer, "its grant in the pipeline is read-only", statement)
                    }
                    _ => assert!(answer.is_ok(), "{access:?}: {statement}: {answer:?}"),
                }
            }
            for statement in defines {
                let answer = stage.execute(statement, &[]).await;
                if access == SqlAccess::DataDefinition {
                    assert!(answer.is_ok(), "{statement}: {answer:?}");
                } else if !statement.starts_with("INSERT") && !statement.starts_with("DELETE") {
                    assert!(
                        matches!(answer, Err(Error::Database(_))),
                        "{access:?}: {statement}: {answer:?}"
                    );
                }
            }
        }
        let stage = database.granted(SqlAccess::Data);
        let answer = stage.execute("CREATE TABLE x (id INTEGER)", &[]).await;
        is_refused(
            answer,
            "needs `access = \"data-definition\"`",
            "CREATE TABLE",
        );
    })
    .await;
}

#[tokio::test]
async fn no_stage_comes_near_the_hosts_tables_on_sqlite() {
    let statements = [
        "SELECT * FROM stagehost_progress",
        "SELECT count(*) FROM StageHost_Progress",
        "SELECT * FROM main.\"stagehost_progress\"",
        "SELECT * FROM [STAGEHOST_PROGRESS] AS t",
        "SELECT (SELECT max(epoch) FROM `stagehost_progress`)",
        "SELECT 1 WHERE EXISTS (SELECT 1 FROM stagehost_progress)",
        "SELECT * FROM posts JOIN stagehost_progress",
        "SELECT version FROM _stagehost_migrations",
        "UPDATE stagehost_progress SET epoch = epoch + 1",
        "UPDATE/**/main/**/./**/stagehost_progress SET pending = x''",
        "DELETE FROM 'stagehost_progress'",
        "INSERT INTO stagehost_progress DEFAULT VALUES",
        "REPLACE INTO stagehost_progress (epoch) VALUES (1)",
        "WITH a AS (SELECT 1) DELETE FROM stagehost_progress",
        "EXPLAIN SELECT * FROM stagehost_progress",
        "INSERT INTO posts SELECT epoch, 'x' FROM stagehost_progress",
        "UPDATE posts SET title = (SELECT epoch FROM stagehost_progress)",
        "DROP TABLE stagehost_progress",
        "ALTER TABLE stagehost_progress ADD COLUMN mine TEXT",
        "ALTER TABLE stagehost_progress RENAME TO mine",
        "ALTER TABLE posts RENAME TO stagehost_more",
        "CREATE INDEX i ON stagehost_progress (epoch)",
        "CREATE VIEW v AS SELECT * FROM stagehost_progress",
        "CREATE VIEW stagehost_view AS SELECT 1",
        "CREATE TABLE stagehost_x (id INTEGER)",
        "CREATE TABLE x (p TEXT REFERENCES stagehost_progress (topic))",
        "CREATE TABLE x AS SELECT * FROM stagehost_progress",
        "REINDEX stagehost_progress",
        "ANALYZE stagehost_progress",
        "SELECT * FROM pragma_table_info('stagehost_progress')",
        "SELECT * FROM pragma_index_list('Stagehost_progress')",
    ];
    let place = Place::new(Kind::Sqlite).await;
    let database = place.open(None).await.expect("a database");
    {
        let mut owner = filled(&database).await;
        for access in GRANTS {
            let stage = database.granted(access);
            for statement in statements {
                for answer in [
                    stage.execute(statement, &[]).await,
                    stage.query(statement, &[]).await.map(|_| 0),
                ] {
                    is_refused(answer, "is not for stages", statement);
                }
            }
        }
        // Nor by what the operator has made.
        let made = "CREATE VIEW peek AS SELECT epoch FROM stagehost_progress; \
                    CREATE TRIGGER poke AFTER DELETE ON posts BEGIN UPDATE stagehost_progress SET epoch = 0; END;";
        raw(&place)
            .execute_batch(made)
            .expect("a view and a trigger");
        for statement in [
            "SELECT * FROM peek",
            "DELETE FROM posts",
            "INSERT INTO posts SELECT epoch, 'x' FROM peek",
        ] {
            is_refused(
                database.execute(statement, &[]).await,
                "is not for stages",
                statement,
            );
        }
        let transaction = owner.begin(Mode::Optimistic).await;
        for statement in statements {
            is_refused(
                transaction.execute(statement, &[]).await,
                "is not for stages",
                statement,
            );
        }
        assert_eq!(transaction.broken(), None);
        assert_eq!(insert(&transaction, 1).await, Ok(1));
        owner.commit(transaction).await.expect("a commit");
        let claim = database.reclaim(&owner.lane, owner.epoch).await;
        assert_eq!(claim.expect("an answer").expect("its own row").commits, 1);
    }
    database.close().await;
    place.remove().await;
}

#[tokio::test]
async fn no_stage_leaves_its_database_on_sqlite() {
    let statements = [
        "ATTACH '/tmp/other.db' AS other",
        "ATTACH ':memory:' AS other",
        "DETACH main",
        "VACUUM",
        "VACUUM INTO '/tmp/copy.db'",
        "PRAGMA writable_schema = ON",
        "PRAGMA journal_mode = DELETE",
        "PRAGMA query_only = 0",
        "PRAGMA temp_store_directory = '/tmp'",
        "EXPLAIN PRAGMA hard_heap_limit(1)",
        "EXPLAIN QUERY PLAN PRAGMA foreign_keys = 0",
        "SELECT * FROM pragma_hard_heap_limit(1)",
        "SELECT * FROM pragma_integrity_check",
        "SELECT * FROM dbstat",
        "SELECT load_extension('x')",
        "SELECT fts3_tokenizer('x')",
        "SELECT sqlite_compileoption_get(1)",
        "SELECT json_patch('{}', '{}')",
        "CREATE TEMP TABLE mine (id INTEGER)",
        "CREATE TABLE temp.mine (id INTEGER)",
        "CREATE TEMP VIEW posts AS SELECT 1",
        "CREATE VIRTUAL TABLE mine USING fts5 (a)",
        "CREATE VIRTUAL TABLE temp.mine USING dbstat",
        "BEGIN",
        "BEGIN IMMEDIATE",
        "COMMIT",
        "END",
        "ROLLBACK",
        "SAVEPOINT a",
        "RELEASE stagehost_call",
        "ROLLBACK TO stagehost_call",
        "INSERT OR ROLLBACK INTO posts VALUES (1, 'a')",
    ];
    on(Kind::Sqlite, async |_, database| {
        filled(&database).await;
        for statement in statements {
            is_refused(
                database.execute(statement, &[]).await,
                "is not for stages",
                statement,
            );
        }
        for statement in [
            "INSERT INTO sqlite_schema VALUES ('table', 'x', 'x', 0, 'CREATE TABLE x (a)')",
            "UPDATE sqlite_master SET sql = 'x'",
            "DELETE FROM sqlite_schema",
            "SELECT zeroblob(1); DROP TABLE posts",
            // It would run in the statements of others, the host's among them.
            "CREATE TRIGGER t AFTER UPDATE ON stagehost_progress BEGIN SELECT 1; END",
            "CREATE TRIGGER t AFTER INSERT ON posts BEGIN UPDATE stagehost_progress SET epoch = 9; END",
            "CREATE TRIGGER t INSTEAD OF INSERT ON titles BEGIN DELETE FROM posts; END",
            "CREATE TEMP TRIGGER mine AFTER INSERT ON posts BEGIN SELECT 1; END",
            "CREATE TRIGGER t AFTER INSERT ON posts BEGIN SELECT 1",
        ] {
            let answer = database.execute(statement, &[]).await;
            assert!(
                matches!(answer, Err(Error::Database(_))),
                "{statement}: {answer:?}"
            );
        }
        // And all connections are as they were.
        let all =
            (0..CONNECTIONS).map(|_| query(&database, "SELECT title FROM posts WHERE id = 1", &[]));
        for rows in futures::future::join_all(all).await {
            assert_eq!(rows, [[text("a")]]);
        }
    })
    .await;
}

/// Prepared statements are found by their text: a guest's is never the host's, nor that of a stage that may do more.
#[tokio::test]
async fn a_guest_that_sends_the_hosts_text_does_not_get_its_statement() {
    const OWN: &str = "consumer_group = $1 AND topic = $2 AND partition = $3 AND epoch = $4";
    let save = format!(
        "UPDATE main.stagehost_progress SET commits = $5, next_offset = $6, attempts = $7, pending = $8, seen = $9, \
         updated_at = CURRENT_TIMESTAMP WHERE {OWN} AND generation = $10 AND commits = $5 - 1"
    );
    let texts = [
        "BEGIN IMMEDIATE",
        "BEGIN",
        "COMMIT",
        "ROLLBACK",
        "SAVEPOINT stagehost_statement",
        "RELEASE SAVEPOINT stagehost_statement",
        "SAVEPOINT stagehost_call",
        "ROLLBACK TO SAVEPOINT stagehost_call",
        save.as_str(),
    ];
    let place = Place::new(Kind::Sqlite).await;
    // One connection for transactions, so that all meet in its cache.
    let database = Database::connect(&place.url, None, 2, None).await;
    let database = database.expect("a database");
    let mut owner = Owner::new(&database).await;
    let params = vec![Int64(1); 10];
    for round in 0..3 {
        for mode in [Mode::Optimistic, Mode::Careful, Mode::Exclusive] {
            let transaction = owner.begin(mode).await;
            transaction.savepoint().await.expect("a savepoint");
            for text in texts {
                for prefix in ["", "/*data*/", "/*data-definition*/"] {
                    let text = format!("{prefix}{text}");
                    let params = if text.contains("$9") {
                        &params[..]
                    } else {
                        &[]
                    };
                    is_refused(
                        transaction.execute(&text, params).await,
                        "is not for stages",
                        &text,
                    );
                }
            }
            assert_eq!(transaction.broken(), None);
            assert_eq!(insert(&transaction, owner.commits).await, Ok(1));
            owner.commit(transaction).await.expect("a commit");
        }
        for text in texts {
            let params = if text.contains("$9") {
                &params[..]
            } else {
                &[]
            };
            is_refused(
                database.execute(text, params).await,
                "is not for stages",
                text,
            );
        }
        assert_eq!(owner.numbers().await.len(), 3 * (round + 1));
    }
    // A text of one stage is not prepared for another.
    let reader = database.granted(SqlAccess::ReadOnly);
    for _ in 0..4 {
        assert_eq!(database.execute(INSERT, &[Int64(100)]).await, Ok(1));
        is_refused(
            reader.execute(INSERT, &[Int64(101)]).await,
            "read-only",
            INSERT,
        );
        execute(&database, "DELETE FROM t WHERE id = 100", &[]).await;
    }
    database.close().await;
    place.remove().await;
}

/// What an earlier release let a stage make would run with the host's own statement.
#[tokio::test]
async fn a_progress_table_that_a_stage_has_laid_hands_on_is_refused() {
    for (made, named) in [
        (
            "CREATE TRIGGER mine AFTER UPDATE ON stagehost_progress BEGIN SELECT RAISE(IGNORE); END",
            "trigger mine",
        ),
        (
            "CREATE INDEX mine ON stagehost_progress (abs(epoch))",
            "index mine",
        ),
    ] {
        let place = Place::new(Kind::Sqlite).await;
        let database = place.open(None).await.expect("a database");
        database.prepare_progress().await.expect("a new table");
        raw(&place)
            .execute_batch(made)
            .expect("something of a stage's");
        let refused = database.prepare_progress().await;
        assert!(
            matches!(&refused, Err(StoreError::Refused(why)) if why.contains(named) && why.contains("drop it")),
            "{refused:?}"
        );
        database.close().await;
        place.remove().await;
    }
    let place = Place::new(Kind::Sqlite).await;
    let database = place.open(None).await.expect("a database");
    let view = "CREATE VIEW stagehost_progress AS SELECT 1 AS epoch";
    raw(&place).execute_batch(view).expect("a view");
    let refused = database.prepare_progress().await;
    assert!(
        matches!(&refused, Err(StoreError::Refused(_))),
        "{refused:?}"
    );
    database.close().await;
    place.remove().await;
}
