//! Statements: what they answer, how they fail, how far they go.

use host::capability::sql::{
    DatabaseError, Error, MAX_ANSWER_BYTES, MAX_ANSWER_ROWS, MAX_PARAMETER_LISTS, MAX_PARAMETERS,
    MAX_STATEMENT_BYTES,
};

use super::Value::{self, Int64, Null, Uuid};
use super::{CONNECTIONS, Kind, execute, on, on_each, query, text};

#[tokio::test]
async fn answers_have_names_even_without_rows() {
    on_each(async |_, database| {
        execute(&database, "CREATE TABLE t (id INTEGER, name TEXT)", &[]).await;
        for _ in 0..2 {
            let statement = "SELECT name, id AS number FROM t WHERE id = $1";
            let rows = database
                .query(statement, &[Int64(1)])
                .await
                .expect("an answer");
            assert_eq!(rows.columns, ["name", "number"]);
            assert!(rows.rows.is_empty());
        }
        let statement = "INSERT INTO t VALUES ($2, $1) RETURNING id, name";
        let rows = database
            .query(statement, &[text("x"), Int64(7)])
            .await
            .expect("an answer");
        assert_eq!(rows.columns, ["id", "name"]);
        assert_eq!(rows.rows, [[Int64(7), text("x")]]);
        let rows = database
            .query("DELETE FROM t", &[])
            .await
            .expect("an answer");
        assert!(rows.columns.is_empty() && rows.rows.is_empty());
    })
    .await;
}

#[tokio::test]
async fn rows_are_counted() {
    on_each(async |_, database| {
        for (statement, expected) in [
            ("CREATE TABLE t (id INTEGER PRIMARY KEY, v INTEGER)", 0),
            ("INSERT INTO t VALUES (1, 0), (2, 0), (3, 0)", 3),
            ("UPDATE t SET v = 1 WHERE id > 1", 2),
            ("WITH none AS (SELECT 1) SELECT * FROM none WHERE 1 = 0", 0),
            ("SELECT * FROM t", 3),
            ("SELECT * FROM t WHERE id > 5", 0),
            ("INSERT INTO t VALUES (1, 5) ON CONFLICT (id) DO NOTHING", 0),
            (
                "INSERT INTO t VALUES (1, 5), (4, 5) ON CONFLICT (id) DO UPDATE SET v = 5",
                2,
            ),
            (
                "WITH few AS (SELECT 4 AS id) DELETE FROM t WHERE id IN (SELECT id FROM few)",
                1,
            ),
            ("CREATE TABLE other (id INTEGER)", 0),
            ("DELETE FROM t RETURNING id", 3),
            ("DELETE FROM t", 0),
        ] {
            assert_eq!(
                execute(&database, statement, &[]).await,
                expected,
                "{statement}"
            );
        }
    })
    .await;
}

/// A statement, its SQLSTATE, words of the message, and the constraint as each kind names it.
type Failure = (
    &'static str,
    &'static str,
    &'static str,
    Option<&'static str>,
    Option<&'static str>,
);

#[rustfmt::skip]
const FAILURES: &[Failure] = &[
    ("INSERT INTO posts VALUES ('a', 'b', 1)", "23505", "", Some("posts_pkey"), Some("posts.uid")),
    ("INSERT INTO posts VALUES ('b', 'a', 1)", "23505", "", Some("posts_slug"), Some("posts.slug")),
    ("INSERT INTO posts VALUES ('b', NULL, 1)", "23502", "slug", None, None),
    ("INSERT INTO posts VALUES ('b', 'b', 0)", "23514", "", Some("positive"), Some("positive")),
    ("INSERT INTO notes VALUES ('x')", "23503", "", Some("of_post"), None),
    ("BEGIN", "0A000", "the host runs the transactions", None, None),
    ("SELECT 1; DELETE FROM posts", "42601", "multiple commands", None, None),
    ("SELECT $1, $2", "08P01", "", None, None),
    ("", "42601", "empty", None, None),
];

#[tokio::test]
async fn errors_have_the_codes_of_postgresql() {
    const TABLES: &[&str] = &[
        "CREATE TABLE posts (uid TEXT PRIMARY KEY, slug TEXT NOT NULL, size INTEGER, \
         CONSTRAINT posts_slug UNIQUE (slug), CONSTRAINT positive CHECK (size > 0))",
        "CREATE TABLE notes (post TEXT CONSTRAINT of_post REFERENCES posts (uid))",
        "INSERT INTO posts VALUES ('a', 'a', 1)",
    ];
    on_each(async |kind, database| {
        for statement in TABLES {
            execute(&database, statement, &[]).await;
        }
        for (statement, sqlstate, message, on_postgres, on_sqlite) in FAILURES {
            let params: &[Value] = if statement.contains("$1") {
                &[text("x")]
            } else {
                &[]
            };
            let seen = match database.execute(statement, params).await {
                Err(Error::Database(seen)) => seen,
                other => panic!("{kind:?}: {statement}: {other:?}"),
            };
            let DatabaseError {
                sqlstate: code,
                message: words,
                constraint,
            } = seen;
            assert_eq!(
                code.as_deref(),
                Some(*sqlstate),
                "{kind:?}: {statement}: {words}"
            );
            assert!(words.contains(message), "{kind:?}: {statement}: {words}");
            let expected = match kind {
                Kind::Postgres => on_postgres,
                Kind::Sqlite => on_sqlite,
            };
            assert_eq!(constraint.as_deref(), *expected, "{kind:?}: {statement}");
        }
        let syntax = database.query("SELEC 1", &[]).await;
        assert!(
            matches!(syntax, Err(Error::Database(_))),
            "{kind:?}: {syntax:?}"
        );
        let rows = query(&database, "SELECT uid FROM posts", &[]).await;
        assert_eq!(rows, [[text("a")]], "{kind:?}: nothing else was done");
    })
    .await;
}

#[tokio::test]
async fn many_executions_are_all_done_or_none() {
    on_each(async |kind, database| {
        execute(
            &database,
            "CREATE TABLE t (id BIGINT PRIMARY KEY, name TEXT)",
            &[],
        )
        .await;
        let insert = "INSERT INTO t VALUES ($1, $2)";
        let count = async || query(&database, "SELECT count(*) FROM t", &[]).await;
        let good = [
            vec![Int64(1), text("a")],
            vec![Int64(2), Null],
            vec![Int64(3), text("c")],
        ];
        assert_eq!(database.execute_many(insert, &good).await, Ok(3));
        assert_eq!(database.execute_many(insert, &[]).await, Ok(0));
        let bad = [
            vec![Int64(4), Null],
            vec![Int64(1), Null],
            vec![Int64(5), Null],
        ];
        let error = database.execute_many(insert, &bad).await;
        assert!(
            matches!(error, Err(Error::Database(_))),
            "{kind:?}: {error:?}"
        );
        let unsupported = [vec![Int64(4), Null], vec![Int64(5), Uuid("no".into())]];
        let error = database.execute_many(insert, &unsupported).await;
        assert!(
            matches!(error, Err(Error::Unsupported(_))),
            "{kind:?}: {error:?}"
        );
        // A list is looked at when it is its turn.
        let both = [vec![Int64(1), Null], vec![Int64(5), Uuid("no".into())]];
        let error = database.execute_many(insert, &both).await;
        assert!(
            matches!(error, Err(Error::Database(_))),
            "{kind:?}: {error:?}"
        );
        let many = vec![vec![]; MAX_PARAMETER_LISTS + 1];
        match database.execute_many("DELETE FROM t", &many).await {
            Err(Error::Database(error)) => assert_eq!(error.sqlstate.as_deref(), Some("54000")),
            other => panic!("{kind:?}: {other:?}"),
        }
        let refused = database.execute_many("COMMIT", &[vec![], vec![]]).await;
        assert!(
            matches!(refused, Err(Error::Database(_))),
            "{kind:?}: {refused:?}"
        );
        assert_eq!(count().await, [[Int64(3)]], "{kind:?}");
        // Every connection is out of its transaction again.
        for id in 10..10 + 2 * i64::from(CONNECTIONS) {
            execute(&database, insert, &[Int64(id), Null]).await;
        }
    })
    .await;
}

#[tokio::test]
async fn answers_have_limits() {
    on_each(async |kind, database| {
        let (rows, bytes) = match kind {
            Kind::Postgres => (
                "SELECT * FROM generate_series(1, $1::int8)",
                "SELECT repeat('x', 1000000) FROM generate_series(1, $1::int8)",
            ),
            Kind::Sqlite => (
                "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < $1) \
                 SELECT i FROM n",
                "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < $1) \
                 SELECT hex(zeroblob(500000)) FROM n",
            ),
        };
        for _ in 0..2 * CONNECTIONS {
            let answer = database
                .query(rows, &[Int64(2 * MAX_ANSWER_ROWS as i64)])
                .await;
            assert_eq!(
                answer,
                Err(Error::TooLarge(MAX_ANSWER_ROWS as u64)),
                "{kind:?}"
            );
            let answer = database.query(bytes, &[Int64(1_000)]).await;
            assert_eq!(
                answer,
                Err(Error::TooLarge(MAX_ANSWER_BYTES as u64)),
                "{kind:?}"
            );
        }
        let most = query(&database, rows, &[Int64(MAX_ANSWER_ROWS as i64)]).await;
        assert_eq!(most.len(), MAX_ANSWER_ROWS, "{kind:?}");
        let long = format!("SELECT '{}'", "x".repeat(MAX_STATEMENT_BYTES));
        let params = vec![Null; MAX_PARAMETERS + 1];
        for (statement, params, code) in
            [(&*long, &[][..], "54000"), ("SELECT 1", &params, "54023")]
        {
            match database.query(statement, params).await {
                Err(Error::Database(error)) => assert_eq!(error.sqlstate.as_deref(), Some(code)),
                other => panic!("{kind:?}: {code}: {other:?}"),
            }
        }
    })
    .await;
}

#[tokio::test]
async fn tables_that_change_under_prepared_statements() {
    on_each(async |kind, database| {
        execute(&database, "CREATE TABLE t (a INTEGER)", &[]).await;
        execute(&database, "INSERT INTO t VALUES (1)", &[]).await;
        let insert = "INSERT INTO other VALUES ($1)";
        for column in ["UUID", "TIMESTAMP", "TEXT"] {
            execute(&database, &format!("CREATE TABLE other (b {column})"), &[]).await;
            // Often enough that every connection has prepared both.
            let all = (0..4 * CONNECTIONS).map(|_| async {
                execute(&database, insert, &[Null]).await;
                query(&database, "SELECT * FROM t", &[]).await
            });
            for rows in futures::future::join_all(all).await {
                assert_eq!(rows[0][0], Int64(1), "{kind:?}: {column}");
            }
            execute(&database, "DROP TABLE other", &[]).await;
            execute(
                &database,
                &format!("ALTER TABLE t ADD COLUMN {column} TEXT"),
                &[],
            )
            .await;
        }
        let rows = query(&database, "SELECT * FROM t", &[]).await;
        assert_eq!(rows, [[Int64(1), Null, Null, Null]], "{kind:?}");
    })
    .await;
}

#[tokio::test]
async fn sqlite_shares_one_writer() {
    const WRITERS: i64 = 8;
    const ROWS: i64 = 25;
    on(Kind::Sqlite, async |_, database| {
        execute(&database, "CREATE TABLE t (id INTEGER PRIMARY KEY)", &[]).await;
        let writers = (0..WRITERS).map(|writer| {
            let database = database.clone();
            tokio::spawn(async move {
                for row in 0..ROWS {
                    let id = [Int64(writer * ROWS + row)];
                    execute(&database, "INSERT INTO t VALUES ($1)", &id).await;
                    query(&database, "SELECT count(*) FROM t", &[]).await;
                }
            })
        });
        for writer in writers.collect::<Vec<_>>() {
            writer.await.expect("a writer that ends");
        }
        let count = query(&database, "SELECT count(*) FROM t", &[]).await;
        assert_eq!(count, [[Int64(WRITERS * ROWS)]]);
    })
    .await;
}
