//! A lane's row in `stagehost_progress` that somebody else has written into: what it says is checked before it is done.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use host::delivery::output;
use host::record::Outgoing;
use serde_json::json;
use sqlx::{ConnectOptions, Connection, PgConnection};

use crate::bench::Bench;
use crate::support::{PATIENCE, Seen, acl, get, server, unique};
use crate::waits::{Guarded, said_in_log};

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

/// Bytes of outputs in the row of a bench on SQLite.
async fn pending(bench: &Bench) -> i64 {
    let file = bench.host.folder().path().join("db.sqlite");
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(file);
    let mut connection = options.connect().await.expect("the file");
    let length = sqlx::query_scalar("SELECT length(pending) FROM stagehost_progress");
    length.fetch_one(&mut connection).await.expect("one row")
}

fn values(seen: Vec<Seen>) -> Vec<String> {
    seen.into_iter().filter_map(|seen| seen.value).collect()
}

/// Its topic did not take it, its host was killed, and meanwhile the pipeline names another topic for dead letters.
#[tokio::test(flavor = "multi_thread")]
async fn a_letter_for_the_dead_letter_topic_of_before_stays_in_the_row_and_readiness_says_so() {
    const SETTINGS: &str = "delivery = \"transactional\"";
    for mend in ["dead-letter", "output"] {
        let mut guarded = Guarded::with("transactional", 1, "");
        let bench = &mut guarded.bench;
        let (before, now) = (format!("{}.dlq", bench.input), unique("letters"));
        let reject = |n: u64| json!({ "do": "reject", "value": n });
        let emit = json!({ "do": "emit", "topic": bench.output, "value": 2 });
        let right = ["--topic", before.as_str(), "--operation", "Write"];
        let deny = [&right[..], &["--deny-principal", "User:stagehost"]].concat();
        // What is written to before is known, and a letter for it is committed though it can't be sent.
        bench.deliver(&[reject(0)]).await;
        acl(&[&["--add"][..], &deny].concat());
        bench.send(&[reject(1)]).await;
        bench.not_ready(&["WRITE on outputs", &before]);

        let pipeline = bench.pipeline.clone();
        let moved = pipeline.replace(SETTINGS, &format!("{SETTINGS}\ndead-letter = \"{now}\""));
        assert_ne!(moved, pipeline);
        bench.pipeline.clone_from(&moved);
        bench.restart();
        acl(&[&["--remove", "--force"][..], &deny].concat());
        bench.send(std::slice::from_ref(&emit)).await;
        let words = format!(
            "holds an output or a dead letter for the topic {before}, which the pipeline does not grant"
        );
        let said = bench.not_ready(&[&words]);
        assert!(
            said.contains("stage probe") && said.contains("`dead-letter`"),
            "{said}"
        );
        said_in_log(bench, &words);
        let stopped = bench.metric("stagehost_lanes_stopped{stage=\"probe\"}");
        assert_eq!(stopped.as_deref(), Some("1"));
        assert!(pending(bench).await > 0, "the letter is kept");
        for (topic, count) in [(&before, 1), (&now, 0), (&bench.output, 0)] {
            assert_eq!(bench.log.read(topic).len(), count, "{topic}");
        }

        // As it says: the old topic is the stage's again, in one way or the other.
        let output = format!("output = [\"{}\"", bench.output);
        bench.pipeline = match mend {
            "output" => moved.replace(&output, &format!("{output}, \"{before}\"")),
            _ => pipeline,
        };
        assert_ne!(bench.pipeline, moved);
        bench.host.signal(libc::SIGTERM);
        bench.host.wait_for_end();
        bench.restart();
        bench.host.ready();
        let (outputs, _) = bench.deliver(&[reject(3)]).await;
        assert_eq!(values(outputs), ["2"], "{mend}");
        let [zeroth, first, third] = [0, 1, 3].map(|n| reject(n).to_string());
        let (of_before, of_now) = match mend {
            "output" => (vec![zeroth, first], vec![third]),
            _ => (vec![zeroth, first, third], vec![]),
        };
        assert_eq!(values(bench.log.read(&before)), of_before, "{mend}");
        assert_eq!(values(bench.log.read(&now)), of_now, "{mend}");
    }
}

/// What is done to each row of a group that gets a commit, until it is dropped with `undo`.
struct Meddler<'a> {
    url: &'a str,
    name: String,
}

impl<'a> Meddler<'a> {
    /// `does` is PL/pgSQL, which sees the row as `OLD` and `NEW`.
    async fn start(url: &'a str, group: &str, does: &str) -> Self {
        let name = unique("meddler").replace('-', "_");
        let function = format!(
            "CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             IF NEW.consumer_group = '{group}' AND NEW.commits > OLD.commits THEN {does} END IF; RETURN NEW; END $$"
        );
        execute(url, function, None).await;
        let trigger = format!(
            "CREATE TRIGGER {name} BEFORE UPDATE ON stagehost_progress FOR EACH ROW EXECUTE FUNCTION {name}()"
        );
        execute(url, trigger, None).await;
        Self { url, name }
    }

    async fn undo(self) {
        let drop = format!("DROP FUNCTION {} CASCADE", self.name);
        execute(self.url, drop, None).await;
    }
}

/// How often the lane could not keep its row, as its log has it: once a try.
fn tries(bench: &Bench) -> usize {
    bench.host.log().matches("; next try in ").count()
}

/// What readiness says is in the log and in metrics too. A lane that does not wait longer each time would try again some
/// thousand times meanwhile.
async fn check_trouble(bench: &Bench, words: &str) {
    const LOOK: Duration = Duration::from_secs(10);
    const MOST_TRIES: usize = 6;
    for metric in [
        "stagehost_lanes_stopped{stage=\"probe\"}",
        "stagehost_lanes_waiting{stage=\"probe\",for=\"row\"}",
    ] {
        assert_eq!(bench.metric(metric).as_deref(), Some("1"), "{metric}");
    }
    let log = bench.host.log();
    let said = log.lines().find(|line| line.contains("; next try in "));
    let said = said.unwrap_or_else(|| panic!("nothing is said of it: {log}"));
    for part in ["WARN", "stage=\"probe\"", words] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    let before = tries(bench);
    tokio::time::sleep(LOOK).await;
    let more = tries(bench) - before;
    assert!(more <= MOST_TRIES, "{more} tries in {LOOK:?}");
}

/// The trouble is over, and said to be.
fn check_over(bench: &Bench) {
    bench.log.wait_committed(&bench.group, &bench.input);
    bench.host.ready();
    for metric in [
        "stagehost_lanes_stopped{stage=\"probe\"}",
        "stagehost_lanes_waiting{stage=\"probe\",for=\"row\"}",
    ] {
        assert_eq!(bench.metric(metric).as_deref(), Some("0"), "{metric}");
    }
    assert!(bench.host.log().contains("the lane's row is kept again"));
}

/// As if another host took the row before each commit.
#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_cannot_keep_its_row_is_not_ready() {
    let url = database().await;
    let bench = Bench::with("test-probe", 1, "", &url, "");
    let meddler = Meddler::start(&url, &bench.group, "RETURN NULL;").await;
    let emit = serde_json::json!({ "do": "emit", "topic": bench.output, "value": 1 });
    bench.send(std::slice::from_ref(&emit)).await;
    let said = bench.not_ready(&["can't be kept"]);
    assert!(said.contains("times in a row"), "{said}");
    check_trouble(&bench, "does not take a commit").await;
    meddler.undo().await;
    check_over(&bench);
    assert_eq!(bench.log.read(&bench.output).len(), 1);
}

/// Each of the lane's commits is taken, and the row is another's right after it: a host of another cluster that has the same
/// group and database, say, or somebody who sets the row again and again.
#[tokio::test(flavor = "multi_thread")]
async fn a_lane_whose_row_is_taken_after_each_commit_is_not_ready_and_waits_longer_each_time() {
    const MEDDLERS: [(&str, &str); 3] = [
        (
            "NEW.epoch := OLD.epoch + 1;",
            "another host has taken the partition over",
        ),
        (
            "NEW.generation := OLD.generation + 1;",
            "is another one than it has left",
        ),
        ("NEW := OLD;", "is another one than it has left"),
    ];
    for (does, words) in MEDDLERS {
        let url = database().await;
        let bench = Bench::with("test-probe", 1, "", &url, "");
        let admin = bench.host.address("admin");
        let emit = |n: u64| serde_json::json!({ "do": "emit", "topic": bench.output, "value": n });
        bench.deliver(&[emit(0)]).await;
        let meddler = Meddler::start(&url, &bench.group, does).await;
        let mut sent = 1;
        let deadline = Instant::now() + PATIENCE;
        loop {
            bench.send(&[emit(sent)]).await;
            sent += 1;
            let (status, said) = get(&admin, "/readyz");
            if status == 503 && said.contains("can't be kept, 4 times in a row") {
                assert!(said.contains(words), "{does} {said}");
                break;
            }
            assert!(Instant::now() < deadline, "{does} {said}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        check_trouble(&bench, words).await;
        meddler.undo().await;
        check_over(&bench);
        // Those that were in a row came again, as the same outputs or as ones that the lost row no longer knew.
        let outputs = bench.log.read(&bench.output);
        let values: BTreeSet<_> = outputs
            .iter()
            .map(|output| output.json().as_u64())
            .collect();
        assert_eq!(values, (0..sent).map(Some).collect(), "{does}");
    }
}
