//! How much memory and time a statement on SQLite can take.

use std::time::{Duration, Instant};

use host::capability::sql::{Database, Error, Value};
use host::delivery::progress::{Mode, Transaction as _};
use host::pipeline::SqlUrl;

use super::Value::{Bytes, Int64};
use super::transactions::{Owner, insert};
use super::{Kind, Place, execute, on, query, text};

/// Far more than any of these takes, far less than what they would take without bounds.
const SOON: Duration = Duration::from_secs(20);

/// The same expression so often.
fn columns(expression: &str, count: usize) -> String {
    format!("SELECT {}", vec![expression; count].join(", "))
}

const ENDLESS: &str = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)";

fn greedy() -> Vec<String> {
    let endless = |select: &str| format!("{ENDLESS} {select}");
    vec![
        columns("zeroblob(16000000)", 900),
        columns("hex(zeroblob(8000000))", 900),
        columns("randomblob(8000000)", 900),
        columns("replace(hex(zeroblob(1000000)), '0', 'abcdefgh')", 200),
        columns("printf('%.*c', 15000000, 'x')", 100),
        "SELECT x || x || x FROM (SELECT hex(zeroblob(6000000)) AS x)".to_owned(),
        endless("SELECT max(i) FROM (SELECT i, randomblob(1000) AS r FROM n ORDER BY r)"),
        endless("SELECT group_concat(i, 'something between') FROM n"),
        endless("SELECT json_group_array(i) FROM n"),
        endless("SELECT count(DISTINCT hex(randomblob(100))) FROM n"),
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION SELECT i + 1 FROM n) SELECT count(*) FROM n"
            .to_owned(),
        endless("INSERT INTO sink SELECT zeroblob(1000000) FROM n ORDER BY i DESC"),
        "WITH a (x) AS (SELECT hex(zeroblob(4000000))), b AS (SELECT x, x AS y FROM a), \
         c AS (SELECT p.x, q.y FROM b AS p, b AS q) SELECT * FROM c AS d, c AS e, c AS f, c AS g"
            .to_owned(),
    ]
}

/// Each is refused by a limit, or ends with its call; and the next one finds all as before.
#[tokio::test(flavor = "multi_thread")]
async fn a_greedy_statement_on_sqlite_costs_its_sender_alone() {
    on(Kind::Sqlite, async |_, database| {
        execute(&database, "CREATE TABLE sink (b BLOB)", &[]).await;
        for statement in greedy() {
            let start = Instant::now();
            let answer =
                tokio::time::timeout(Duration::from_secs(10), database.query(&statement, &[]))
                    .await;
            let shown = statement.get(..80).unwrap_or(&statement);
            if let Ok(answer) = answer {
                let answer = answer.map(|rows| rows.rows.len());
                assert!(
                    matches!(answer, Ok(1) | Err(Error::Database(_) | Error::TooLarge(_))),
                    "{shown}: {answer:?}"
                );
            }
            assert!(start.elapsed() < SOON, "{shown}");
            let next = tokio::time::timeout(
                SOON,
                execute(&database, "INSERT INTO sink VALUES (x'01')", &[]),
            )
            .await;
            assert_eq!(next, Ok(1), "{shown}");
        }
    })
    .await;
}

/// Expressions of which one alone would go on for minutes, or that can't be interrupted and are many. `$1` is a long text.
fn slow() -> Vec<String> {
    let patterns = ["%a%b%c%", "%_a_b"].map(|pattern| format!("SELECT $1 LIKE '{pattern}'"));
    let wildcards = "%a".repeat(20_000);
    let set = (0x100..0x2000)
        .filter_map(char::from_u32)
        .collect::<String>();
    let mut all = vec![
        "SELECT instr(hex(zeroblob(4000000)), hex(zeroblob(2000000)) || '1')".to_owned(),
        "SELECT instr($1, $1 || 'b')".to_owned(),
        "SELECT replace(hex(zeroblob(4000000)), hex(zeroblob(2000000)) || '1', 'x')".to_owned(),
        format!("SELECT length(trim($1, '{set}'))"),
        format!("SELECT $1 LIKE '{wildcards}b'"),
        format!("SELECT $1 LIKE '%{}b'", "a".repeat(40_000)),
        format!("SELECT $1 GLOB '*{}b'", "a".repeat(40_000)),
        format!("SELECT $1 GLOB '*{}b'", "[a-z]".repeat(9_000)),
        format!("{ENDLESS} SELECT sum(length($1)) FROM n"),
        format!("{ENDLESS} SELECT sum($1 LIKE '%b%') FROM n"),
        format!("{ENDLESS} INSERT INTO sink SELECT max(i) FROM n"),
        columns("length($1)", 900),
        columns("$1 + 1", 900),
        columns("$1 = upper($1)", 900),
        columns("unicode(substr($1, -1))", 900),
        columns("json_valid('[' || $1 || ']')", 900),
        columns("CAST($1 AS REAL)", 900),
        columns("soundex($1)", 900),
        columns("quote($1) IS NULL", 400),
        // Each is twice the one before.
        format!(
            "WITH a0 AS (SELECT 1){} SELECT count(*) FROM a40",
            (1..=40)
                .map(|n| format!(", a{n} AS (SELECT 1 FROM a{0}, a{0})", n - 1))
                .collect::<String>()
        ),
        columns("lower($1) = upper($1)", 400),
        columns("hex($1) = 'a'", 400),
        format!("SELECT {}", vec!["length($1)"; 900].join(" + ")),
        format!("SELECT 1 WHERE {}", vec!["$1 LIKE '%b%'"; 900].join(" OR ")),
    ];
    all.extend(patterns);
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_statement_on_sqlite_ends_with_its_call_and_gives_its_turn_to_write_back() {
    on(Kind::Sqlite, async |_, database| {
        execute(&database, "CREATE TABLE sink (n INTEGER)", &[]).await;
        for long in [text(&"a".repeat(16_000_000)), text(&"1".repeat(16_000_000))] {
            for statement in slow() {
                let shown = statement.get(..80).unwrap_or(&statement);
                // With the lock held, and the answer thrown away.
                let writing = match statement.starts_with("SELECT ") && !statement.contains(',') {
                    true => format!("INSERT INTO sink {statement}"),
                    false => statement.clone(),
                };
                let start = Instant::now();
                let call = database.execute(&writing, std::slice::from_ref(&long));
                let answer = tokio::time::timeout(Duration::from_millis(300), call).await;
                let next = tokio::time::timeout(
                    SOON,
                    execute(&database, "INSERT INTO sink VALUES (1)", &[]),
                )
                .await;
                assert_eq!(next, Ok(1), "{shown}: {answer:?}");
                assert!(start.elapsed() < SOON, "{shown}: {:?}", start.elapsed());
            }
        }
    })
    .await;
}

/// SQLite goes down into a binary document as deep as it is, and a thread's stack has an end.
#[tokio::test(flavor = "multi_thread")]
async fn a_deep_json_document_does_not_end_the_process() {
    on(Kind::Sqlite, async |_, database| {
        // Arrays of one element, each of the form whose length takes four bytes.
        let deep = |bytes: usize| {
            let mut document = Vec::with_capacity(bytes);
            while document.len() + 5 < bytes {
                let rest = u32::try_from(bytes - document.len() - 5).expect("a short document");
                document.push(0xeb);
                document.extend_from_slice(&rest.to_be_bytes());
            }
            document.resize(bytes, 0);
            document
        };
        for bytes in [900_000, 1_000_000, 15_000_000] {
            for function in [
                "json",
                "jsonb",
                "json_pretty",
                "json_valid",
                "json_type",
                "json_quote",
                "json_array",
            ] {
                let document = [Bytes(deep(bytes))];
                let statement = format!("SELECT length({function}($1))");
                let answer = database.query(&statement, &document).await;
                let answer = answer.map(|rows| rows.rows.len());
                assert!(
                    matches!(answer, Ok(1) | Err(Error::Database(_))),
                    "{function} of {bytes} bytes: {answer:?}"
                );
            }
        }
        let nested = "[".repeat(100_000);
        let answer = query(&database, "SELECT json_valid($1)", &[text(&nested)]).await;
        assert_eq!(answer, [[Int64(0)]]);
        let parentheses = format!("SELECT {}1{}", "(".repeat(100_000), ")".repeat(100_000));
        let negations = format!("SELECT {}1", "-~".repeat(100_000));
        let unions = vec!["SELECT 1"; 5_000].join(" UNION ALL ");
        let arguments = format!("SELECT max({})", vec!["1"; 5_000].join(", "));
        for statement in [parentheses, negations, unions, arguments] {
            let answer = database.query(&statement, &[]).await;
            let answer = answer.map(|rows| rows.rows);
            assert!(
                matches!(answer, Ok(_) | Err(Error::Database(_))),
                "{answer:?}"
            );
        }
    })
    .await;
}

/// What is undone in the end has been on the disk before.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_on_sqlite_fills_no_disk() {
    let place = Place::new(Kind::Sqlite).await;
    let database = place.open(None).await.expect("a database");
    let owner = Owner::new(&database).await;
    execute(&database, "CREATE TABLE sink (b BLOB)", &[]).await;
    let endless = format!("{ENDLESS} INSERT INTO sink SELECT randomblob(100000) FROM n");
    let answer = database.execute(&endless, &[]).await;
    let is_limit = |answer: &Result<u64, Error>| matches!(answer, Err(Error::Database(error)) if error.sqlstate.as_deref() == Some("54000"));
    assert!(is_limit(&answer), "{answer:?}");
    let transaction = owner.begin(Mode::Optimistic).await;
    let some = format!("{ENDLESS} INSERT INTO sink SELECT randomblob(100000) FROM n LIMIT 500");
    let mut last = Ok(0);
    for _ in 0..10 {
        last = transaction.execute(&some, &[]).await;
        if last.is_err() {
            break;
        }
    }
    assert!(is_limit(&last), "{last:?}");
    transaction.rollback().await;
    assert_eq!(
        query(&database, "SELECT count(*) FROM sink", &[]).await,
        [[Int64(0)]]
    );
    let SqlUrl::Sqlite(file) = &place.url else {
        panic!("not SQLite");
    };
    let log = std::fs::metadata(file.with_extension("db-wal"))
        .expect("its log")
        .len();
    assert!(log < 600 << 20, "{log} bytes");
    database.close().await;
    place.remove().await;
}

/// What a statement needs beyond its share is its own failure; the transaction is run again without it.
#[tokio::test(flavor = "multi_thread")]
async fn a_neighbour_and_the_progress_row_have_their_own_memory() {
    on(Kind::Sqlite, async |_, database| {
        let mut owner = Owner::new(&database).await;
        let greedy = "SELECT max(i) FROM (WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) \
                      SELECT i, randomblob(1000) AS r FROM n ORDER BY r)";
        let both = async |database: Database| {
            let answer = database.query(greedy, &[]).await;
            let answer = answer.map(|rows| rows.rows.len());
            match answer {
                Err(Error::Database(error)) => {
                    assert_eq!(error.sqlstate.as_deref(), Some("53200"), "{error:?}")
                }
                other => panic!("{other:?}"),
            }
        };
        for id in 0..5 {
            let transaction = owner.begin(Mode::Optimistic).await;
            assert_eq!(insert(&transaction, id).await, Ok(1));
            let work = async {
                let large = text(&"x".repeat(10_000_000));
                let rows = transaction.query("SELECT length($1)", &[large]).await;
                assert_eq!(
                    rows.map(|rows| rows.rows),
                    Ok(vec![vec![Int64(10_000_000)]])
                );
            };
            tokio::join!(both(database.clone()), work);
            owner.commit(transaction).await.expect("a commit");
        }
        assert_eq!(owner.numbers().await, [0, 1, 2, 3, 4]);
    })
    .await;
}

/// In ordinary use no limit is met.
#[tokio::test(flavor = "multi_thread")]
async fn large_statements_have_room() {
    on(Kind::Sqlite, async |_, database| {
        execute(
            &database,
            "CREATE TABLE wide (id INTEGER PRIMARY KEY, a TEXT, b TEXT, c BLOB)",
            &[],
        )
        .await;
        let insert = "INSERT INTO wide VALUES ($1, $2, $3, $4)";
        let megabytes = [
            Int64(0),
            text(&"a".repeat(5_000_000)),
            text("b"),
            Bytes(vec![7; 5_000_000]),
        ];
        assert_eq!(execute(&database, insert, &megabytes).await, 1);
        let lists: Vec<_> = (1..20_000)
            .map(|id| vec![Int64(id), text("a"), Value::Null, Bytes(vec![1])])
            .collect();
        assert_eq!(database.execute_many(insert, &lists).await, Ok(19_999));
        let rows = (0..8_000).map(|row| {
            format!(
                "(${}, ${}, ${}, ${})",
                4 * row + 1,
                4 * row + 2,
                4 * row + 3,
                4 * row + 4
            )
        });
        let many = format!(
            "INSERT INTO wide VALUES {}",
            rows.collect::<Vec<_>>().join(", ")
        );
        let params: Vec<_> = (0..8_000)
            .flat_map(|row| {
                [
                    Int64(100_000 + row),
                    text("some text"),
                    Value::Null,
                    Bytes(vec![1; 100]),
                ]
            })
            .collect();
        assert_eq!(execute(&database, &many, &params).await, 8_000);
        let sorted = query(
            &database,
            "SELECT id, a, b FROM wide WHERE id > 0 ORDER BY a, id DESC",
            &[],
        )
        .await;
        assert_eq!(sorted.len(), 27_999);
        let large = query(
            &database,
            "SELECT a, c FROM wide WHERE id = 0 AND a LIKE 'aa%'",
            &[],
        )
        .await;
        assert_eq!(large.len(), 1);
        execute(&database, "CREATE TABLE j (doc JSON)", &[]).await;
        let document = format!("[{}1]", "1, ".repeat(100_000));
        let inserted = execute(
            &database,
            "INSERT INTO j SELECT json($1)",
            &[text(&document)],
        )
        .await;
        assert_eq!(inserted, 1);
        let count = "SELECT count(*) FROM j, json_each(j.doc)";
        assert_eq!(query(&database, count, &[]).await, [[Int64(100_001)]]);
    })
    .await;
}
