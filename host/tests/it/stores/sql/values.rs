//! Values on their way into the database and back.

use host::capability::sql::Error;

use super::Value::{
    self, Boolean, Bytes, BytesArray, Decimal, Float64, Float64Array, Int64, Int64Array, Json,
    Null, TextArray, Timestamp, Uuid,
};
use super::{Kind, execute, on, on_each, query, text};

/// Values that come back from a column of their type as they went in, on both kinds.
#[tokio::test]
async fn values_survive() {
    let cases: &[(&str, &[Value])] = &[
        ("BOOLEAN", &[Boolean(true), Boolean(false), Null]),
        (
            "BIGINT",
            &[Int64(0), Int64(i64::MIN), Int64(i64::MAX), Null],
        ),
        ("INTEGER", &[Int64(-7), Int64(i32::MAX as i64)]),
        ("SMALLINT", &[Int64(-7), Int64(i16::MAX as i64)]),
        (
            "DOUBLE PRECISION",
            &[Float64(0.1), Float64(-1e300), Float64(f64::INFINITY), Null],
        ),
        ("REAL", &[Float64(0.5)]),
        (
            "TEXT",
            &[text(""), text("Über Kafka & Go \u{1F980}\n\"'\\"), Null],
        ),
        ("VARCHAR(20)", &[text("a varchar"), Null]),
        (
            "TIMESTAMPTZ",
            &[
                Timestamp(0),
                Timestamp(-1),
                Timestamp(1_769_862_600_123_456),
                Null,
            ],
        ),
        (
            "TIMESTAMP",
            &[Timestamp(253_402_300_799_999_999), Timestamp(1), Null],
        ),
        (
            "UUID",
            &[
                Uuid("018f4e6a-7b1c-7000-8000-0123456789ab".to_owned()),
                Null,
            ],
        ),
        (
            "NUMERIC",
            &[
                decimal("12.5"),
                decimal("-1000000"),
                decimal("0.001"),
                decimal("0"),
                Null,
            ],
        ),
        (
            "JSONB",
            &[
                json(r#"{"a": [1, null, "x"]}"#),
                json("3"),
                json("null"),
                Null,
            ],
        ),
    ];
    on_each(async |_, database| {
        for (column, values) in cases {
            execute(&database, &format!("CREATE TABLE t (v {column})"), &[]).await;
            for value in *values {
                let value = std::slice::from_ref(value);
                assert_eq!(
                    execute(&database, "INSERT INTO t VALUES ($1)", value).await,
                    1
                );
                let back = query(&database, "SELECT v FROM t", &[]).await;
                assert_eq!(back, [value], "{column}");
                execute(&database, "DELETE FROM t", &[]).await;
            }
            execute(&database, "DROP TABLE t", &[]).await;
        }
    })
    .await;
}

/// What is kept in another form, or not at all, and what only one kind has.
#[tokio::test]
async fn values_of_one_kind() {
    let bytes = || vec![0, 255, 39];
    let cases: &[(Kind, &str, Value, Option<Value>)] = &[
        (
            Kind::Postgres,
            "BYTEA",
            Bytes(bytes()),
            Some(Bytes(bytes())),
        ),
        (Kind::Sqlite, "BLOB", Bytes(bytes()), Some(Bytes(bytes()))),
        (Kind::Sqlite, "BLOB", Bytes(vec![]), Some(Bytes(vec![]))),
        (Kind::Postgres, "INTEGER", Int64(i64::MAX), None),
        (
            Kind::Postgres,
            "NUMERIC",
            decimal("12.50"),
            Some(decimal("12.50")),
        ),
        (
            Kind::Postgres,
            "NUMERIC",
            decimal("NaN"),
            Some(decimal("NaN")),
        ),
        (
            Kind::Postgres,
            "NUMERIC",
            decimal("123456789012345678901234567890.000000000000000001"),
            Some(decimal("123456789012345678901234567890.000000000000000001")),
        ),
        (
            Kind::Postgres,
            "NUMERIC(6,2)",
            decimal("1e2"),
            Some(decimal("100.00")),
        ),
        (Kind::Postgres, "NUMERIC", decimal("12,5"), None),
        (
            Kind::Sqlite,
            "NUMERIC",
            decimal("12.50"),
            Some(decimal("12.5")),
        ),
        (Kind::Sqlite, "TEXT", decimal("12.50"), Some(text("12.50"))),
        (Kind::Sqlite, "TEXT", decimal("1234567890.1234567"), None),
        (Kind::Sqlite, "REAL", Float64(f64::NAN), None),
        (
            Kind::Postgres,
            "JSON",
            json(r#"{"a": 1}"#),
            Some(json(r#"{"a": 1}"#)),
        ),
        (Kind::Postgres, "JSONB", json("{"), None),
        (Kind::Sqlite, "JSON", json("{"), None),
        (Kind::Sqlite, "JSON", json("12345678901234567890"), None),
        (Kind::Sqlite, "INTEGER", Boolean(true), Some(Int64(1))),
        (Kind::Postgres, "CHAR(3)", text("a"), Some(text("a  "))),
        (Kind::Postgres, "NAME", text("a"), Some(text("a"))),
        (Kind::Postgres, "REAL", Float64(0.5), Some(Float64(0.5))),
        (Kind::Postgres, "TIMESTAMPTZ", Timestamp(i64::MIN), None),
        (Kind::Sqlite, "TIMESTAMP", Timestamp(i64::MAX), None),
        (Kind::Postgres, "UUID", Uuid("no".to_owned()), None),
        (Kind::Sqlite, "UUID", Uuid("no".to_owned()), None),
        (
            Kind::Postgres,
            "TEXT[]",
            TextArray(vec!["a".into(), "".into(), "{,}\"".into()]),
            Some(TextArray(vec!["a".into(), "".into(), "{,}\"".into()])),
        ),
        (
            Kind::Postgres,
            "TEXT[]",
            TextArray(vec![]),
            Some(TextArray(vec![])),
        ),
        (
            Kind::Postgres,
            "VARCHAR[]",
            TextArray(vec!["a".into()]),
            Some(TextArray(vec!["a".into()])),
        ),
        (
            Kind::Postgres,
            "BIGINT[]",
            Int64Array(vec![1, -1]),
            Some(Int64Array(vec![1, -1])),
        ),
        (
            Kind::Postgres,
            "INT[]",
            Int64Array(vec![1, -1]),
            Some(Int64Array(vec![1, -1])),
        ),
        (
            Kind::Postgres,
            "FLOAT8[]",
            Float64Array(vec![0.1]),
            Some(Float64Array(vec![0.1])),
        ),
        (
            Kind::Postgres,
            "BYTEA[]",
            BytesArray(vec![bytes()]),
            Some(BytesArray(vec![bytes()])),
        ),
        (
            Kind::Sqlite,
            "TEXT",
            TextArray(vec!["a".into(), "\"".into()]),
            Some(text(r#"["a","\""]"#)),
        ),
        (
            Kind::Sqlite,
            "TEXT",
            Int64Array(vec![1, i64::MIN]),
            Some(text("[1,-9223372036854775808]")),
        ),
        (
            Kind::Sqlite,
            "TEXT",
            Float64Array(vec![0.1, 2.0]),
            Some(text("[0.1,2.0]")),
        ),
        (
            Kind::Sqlite,
            "TEXT",
            Float64Array(vec![f64::INFINITY]),
            None,
        ),
        (Kind::Sqlite, "TEXT", BytesArray(vec![]), None),
    ];
    on_each(async |kind, database| {
        for (_, column, value, expected) in cases.iter().filter(|case| case.0 == kind) {
            execute(&database, &format!("CREATE TABLE t (v {column})"), &[]).await;
            let value = std::slice::from_ref(value);
            let inserted = database.execute("INSERT INTO t VALUES ($1)", value).await;
            match expected {
                Some(expected) => {
                    assert_eq!(inserted, Ok(1), "{column}: {value:?}");
                    let back = query(&database, "SELECT v FROM t", &[]).await;
                    assert_eq!(back, [std::slice::from_ref(expected)], "{column}");
                }
                None => assert!(
                    matches!(inserted, Err(Error::Unsupported(_) | Error::Database(_))),
                    "{column}: {value:?}: {inserted:?}"
                ),
            }
            execute(&database, "DROP TABLE t", &[]).await;
        }
    })
    .await;
}

/// The driver finds prepared statements by their text, but the server's depends on the types.
#[tokio::test]
async fn one_statement_with_parameters_of_different_types() {
    on_each(async |_, database| {
        execute(
            &database,
            "CREATE TABLE t (a INTEGER, b TEXT, c TIMESTAMP)",
            &[],
        )
        .await;
        let rows = [
            [Null, Null, Null],
            [Int64(1), text("x"), Timestamp(5)],
            [Null, text("y"), Null],
            [Int64(2), Null, Timestamp(6)],
        ];
        for row in &rows {
            execute(&database, "INSERT INTO t VALUES ($1, $2, $3) -- all", row).await;
        }
        let back = query(
            &database,
            "SELECT a, b, c FROM t WHERE a = $1 OR $1 IS NULL",
            &[Null],
        );
        assert_eq!(back.await, rows);
    })
    .await;
}

#[tokio::test]
async fn many_rows_in_one_statement() {
    on_each(async |kind, database| {
        execute(&database, "CREATE TABLE t (name TEXT, number BIGINT)", &[]).await;
        let names: Vec<_> = (0..500).map(|n| format!("name {n}")).collect();
        let params = [TextArray(names), Int64Array((0..500).collect())];
        let statement = match kind {
            Kind::Postgres => "INSERT INTO t SELECT * FROM unnest($1, $2)",
            Kind::Sqlite => {
                "INSERT INTO t SELECT n.value, m.value FROM json_each($1) n JOIN json_each($2) m USING (key)"
            }
        };
        assert_eq!(execute(&database, statement, &params).await, 500);
        let back = query(&database, "SELECT name FROM t WHERE number = $1", &[Int64(499)]).await;
        assert_eq!(back, [[text("name 499")]]);
    })
    .await;
}

#[tokio::test]
async fn columns_of_other_types_are_named() {
    on(Kind::Postgres, async |_, database| {
        for (statement, column, reason) in [
            (
                "SELECT 1 AS a, now()::date AS day",
                "\"day\" of type DATE",
                "cast it",
            ),
            (
                "SELECT NULL::inet AS address",
                "\"address\" of type INET",
                "cast it",
            ),
            (
                "SELECT ARRAY['a', NULL] AS list",
                "\"list\" of type TEXT[]",
                "NULL",
            ),
            (
                "SELECT ARRAY[ARRAY[1], ARRAY[2]] AS grid",
                "\"grid\" of type INT4[]",
                "dimension",
            ),
            (
                "SELECT 'infinity'::timestamptz AS never",
                "\"never\" of type TIMESTAMPTZ",
                "infinite",
            ),
        ] {
            match database.query(statement, &[]).await {
                Err(Error::Unsupported(why)) => {
                    assert!(
                        why.contains(column) && why.contains(reason),
                        "{statement}: {why}"
                    );
                }
                other => panic!("{statement}: {other:?}"),
            }
        }
        execute(&database, "CREATE TYPE mood AS ENUM ('happy', 'sad')", &[]).await;
        execute(&database, "CREATE TABLE t (mood mood)", &[]).await;
        let insert = "INSERT INTO t VALUES ($1::text::mood)";
        execute(&database, insert, &[text("sad")]).await;
        assert_eq!(
            query(&database, "SELECT mood FROM t", &[]).await,
            [[text("sad")]]
        );
    })
    .await;
}

fn json(value: &str) -> Value {
    Json(value.to_owned())
}

fn decimal(value: &str) -> Value {
    Decimal(value.to_owned())
}
