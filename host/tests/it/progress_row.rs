//! A lane's row in `stagehost_progress` that somebody else has written into: what it says is checked before it is done.

use host::delivery::output;
use host::record::Outgoing;
use sqlx::{Connection, PgConnection};

use crate::bench::Bench;
use crate::support::{server, unique};

/// A database of its own, for what is done to the table in it is done to all lanes.
pub(crate) async fn database() -> String {
    let (url, name) = (server("DATABASE_URL"), unique("db").replace('-', "_"));
    execute(&url, format!("CREATE DATABASE {name}"), None).await;
    let (server, _) = url.rsplit_once('/').expect("a database's name");
    format!("{server}/{name}")
}

async fn execute(url: &str, statement: String, bytes: Option<Vec<u8>>) -> u64 {
    let connected = PgConnection::connect(url).await;
    let mut connection = connected.expect("PostgreSQL");
    let mut query = sqlx::query(sqlx::AssertSqlSafe(statement));
    if let Some(bytes) = bytes {
        query = query.bind(bytes);
    }
    let done = query.execute(&mut connection).await;
    done.expect("the statement is run").rows_affected()
}

/// Locks all rows until it is dropped.
pub(crate) async fn lock_rows(url: &str) -> PgConnection {
    let mut connection = PgConnection::connect(url).await.expect("PostgreSQL");
    for statement in ["BEGIN", "SELECT epoch FROM stagehost_progress FOR UPDATE"] {
        let locked = sqlx::query(statement).execute(&mut connection).await;
        locked.expect("the statement is run");
    }
    connection
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_that_are_not_granted_stay_in_the_row_and_readiness_says_so() {
    let url = database().await;
    let mut bench = Bench::with("test-probe", 1, "", &url, "");
    let emit = serde_json::json!({ "do": "emit", "topic": bench.output, "value": 1 });
    bench.deliver(std::slice::from_ref(&emit)).await;
    let foreign = unique("foreign");
    let smuggled = Outgoing {
        topic: foreign.as_str().into(),
        partition: Some(0),
        timestamp: None,
        key: None,
        value: Some(b"smuggled".to_vec()),
        headers: Vec::new(),
    };
    bench.host.signal(libc::SIGTERM);
    bench.host.wait_for_end();
    let group = bench.group.clone();
    let pending = output::encode(&[smuggled]).expect("encoded");
    let row =
        format!("UPDATE stagehost_progress SET pending = $1 WHERE consumer_group = '{group}'");
    assert_eq!(execute(&url, row, Some(pending)).await, 1);

    bench.restart();
    let said = bench.not_ready(&[&foreign]);
    assert!(said.contains("does not grant"), "{said}");
    let stopped = bench.metric("stagehost_lanes_stopped{stage=\"probe\"}");
    assert_eq!(stopped.as_deref(), Some("1"));
    let kept = format!(
        "UPDATE stagehost_progress SET epoch = epoch WHERE consumer_group = '{group}' AND length(pending) > 0"
    );
    assert_eq!(execute(&url, kept, None).await, 1, "the output is kept");

    // Granted again, it is sent, and the lane goes on.
    let granted = format!("output = [\"{}\"", bench.output);
    bench.pipeline = bench
        .pipeline
        .replace(&granted, &format!("{granted}, \"{foreign}\""))
        .replace(
            "[redis.cache]",
            &format!("[topics.\"{foreign}\"]\n[redis.cache]"),
        );
    bench.restart();
    bench.host.ready();
    let sent = bench.log.read_at_least(&foreign, 1);
    assert_eq!(sent[0].value.as_deref(), Some("smuggled"));
    bench.deliver(&[emit]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_cannot_keep_its_row_is_not_ready() {
    let url = database().await;
    let bench = Bench::with("test-probe", 1, "", &url, "");
    let (group, name) = (&bench.group, unique("thief").replace('-', "_"));
    // As if another host took the row before each commit.
    let steals = format!(
        "CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
         IF NEW.consumer_group = '{group}' AND NEW.commits > OLD.commits THEN RETURN NULL; END IF; RETURN NEW; END $$"
    );
    execute(&url, steals, None).await;
    let trigger = format!(
        "CREATE TRIGGER {name} BEFORE UPDATE ON stagehost_progress FOR EACH ROW EXECUTE FUNCTION {name}()"
    );
    execute(&url, trigger, None).await;
    let emit = serde_json::json!({ "do": "emit", "topic": bench.output, "value": 1 });
    bench.send(std::slice::from_ref(&emit)).await;
    let said = bench.not_ready(&["can't be kept"]);
    assert!(said.contains("times in a row"), "{said}");
    let stopped = bench.metric("stagehost_lanes_stopped{stage=\"probe\"}");
    assert_eq!(stopped.as_deref(), Some("1"));

    execute(
        &url,
        format!("DROP TRIGGER {name} ON stagehost_progress"),
        None,
    )
    .await;
    bench.log.wait_committed(&bench.group, &bench.input);
    bench.host.ready();
    assert_eq!(bench.log.read(&bench.output).len(), 1);
    execute(&url, format!("DROP FUNCTION {name}()"), None).await;
}
