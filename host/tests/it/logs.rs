//! The host's log, whatever is written into it and whoever reads it.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Host, Log, component, get, server, unique, until};

/// Two stages of the probe, `loud` and `quiet`, each with an input of its own.
struct Two {
    pipeline: String,
    loud: String,
    quiet: String,
    log: Log,
}

impl Two {
    fn new() -> Self {
        let (brokers, component) = (server("KAFKA_BROKERS"), component("test-probe"));
        let (loud, quiet, output) = (unique("loud"), unique("quiet"), unique("out"));
        let stage = |name: &str, input: &str| {
            format!(
                r#"
                [stages.{name}]
                component = "{component}"
                input = ["{input}"]
                group = "{input}"
                output = ["{output}"]
                redis = {{ cache = {{ prefix = "p:" }} }}
                sql = ["db"]
                delivery = "at-least-once"
                retry = {{ max-attempts = 2, initial = "10ms", max = "50ms" }}
                "#
            )
        };
        let pipeline = format!(
            r#"
            name = "logs"
            kafka.brokers = "{brokers}"
            admin.listen = "127.0.0.1:0"
            redis.cache.url = "memory:"
            sql.db.url = "sqlite:db.sqlite"
            topics."{loud}".partitions = 1
            topics."{quiet}".partitions = 1
            topics."{output}".partitions = 1
            {}{}
            "#,
            stage("loud", &loud),
            stage("quiet", &quiet),
        );
        Self {
            pipeline,
            loud,
            quiet,
            log: Log::new(&brokers),
        }
    }

    async fn send(&self, topic: &str, messages: &[Value]) {
        let values: Vec<_> = messages.iter().map(Value::to_string).collect();
        let records: Vec<_> = values.iter().map(|v| (Some("k"), v.as_str())).collect();
        self.log.produce(topic, &records).await;
    }
}

fn dropped(admin: &str, labels: &str) -> u64 {
    let metrics = get(admin, "/metrics").1;
    let line = format!("stagehost_log_lines_dropped_total{{{labels}}} ");
    let found = metrics.lines().find_map(|l| l.strip_prefix(&line));
    found.and_then(|n| n.parse().ok()).unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_writes_without_end_fills_no_disk_and_hides_nothing() {
    const BOUND: usize = 4 << 20;
    let two = Two::new();
    let host = Host::start(&two.pipeline);
    let lines = |print| json!({ "do": "log-many", "n": 20_000, "bytes": 1_000, "print": print });
    let print = json!({ "do": "log-many", "n": 1, "bytes": 1, "print": true });
    let poison: Vec<_> = (0..3_000).map(|_| json!({ "do": "reject" })).collect();
    two.send(&two.loud, &[lines(false), lines(true), lines(false), print])
        .await;
    two.send(&two.loud, &poison).await;
    two.log.wait_committed(&two.loud, &two.loud);
    two.send(
        &two.quiet,
        &[json!({ "do": "log", "message": "heard all the same" })],
    )
    .await;
    two.log.wait_committed(&two.quiet, &two.quiet);
    host.wait_for("the quiet stage", || {
        host.log().contains("heard all the same").then_some(())
    });
    host.wait_for("what was dropped", || {
        let log = host.log();
        let said = |line: &&str| line.contains("lines of the stage were dropped");
        let line = log.lines().find(said)?.to_owned();
        assert!(line.contains("loud"), "{line}");
        Some(())
    });
    let admin = host.address("admin");
    let loud = "stage=\"loud\",reason=\"budget\"";
    assert!(dropped(&admin, loud) > 50_000, "{}", dropped(&admin, loud));
    assert_eq!(dropped(&admin, "stage=\"quiet\",reason=\"budget\""), 0);
    assert!(host.log().len() < BOUND, "{} bytes", host.log().len());
    assert!(
        host.log().contains("given up on"),
        "the host has its own say"
    );
    assert!(host.stop().0.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_of_a_guest_is_one_line() {
    const FORGED: &str =
        "a\n2026-11-29T00:00:00.000000Z ERROR forged\r\u{1b}[2J\u{2028}b\u{202e}c\u{85}d";
    let messages = |topic: &str| {
        let steps = |step: Value| json!({ "do": "steps", "steps": [step, { "do": "ok" }] });
        [
            steps(json!({ "do": "log", "message": FORGED })),
            steps(json!({ "do": "print", "message": FORGED })),
            json!({ "do": "redis", "store": FORGED, "call": "get", "key": FORGED }),
            json!({ "do": "emit", "topic": format!("{topic}{FORGED}") }),
        ]
    };
    for format in ["text", "json"] {
        let two = Two::new();
        let folder = std::sync::Arc::new(tempfile::tempdir().expect("a folder"));
        let file = folder.path().join("pipeline.toml");
        std::fs::write(&file, &two.pipeline).expect("the pipeline file");
        let host = Host::run_with(folder, &file, &[], &["--log-format", format]);
        host.ready();
        two.send(&two.loud, &messages(&two.loud)).await;
        two.log.wait_committed(&two.loud, &two.loud);
        let (status, log) = host.stop();
        assert!(status.success(), "{log}");
        assert!(log.contains("forged"), "{log}");
        for line in log.split('\n') {
            assert!(!line.starts_with("2026-11-29T00:00:00.000000Z"), "{line:?}");
            assert!(
                !line.contains(['\r', '\u{1b}', '\u{2028}', '\u{202e}', '\u{85}']),
                "{line:?}"
            );
            if format == "json" {
                serde_json::from_str::<Value>(line).expect(line);
            }
        }
    }
}

/// A host whose stderr is a pipe that is read when the test says so.
struct Unread(Child);

impl Unread {
    fn start(pipeline: &str, folder: &tempfile::TempDir) -> (Self, String) {
        let file = folder.path().join("pipeline.toml");
        std::fs::write(&file, pipeline).expect("the pipeline file");
        let child = Command::new(env!("CARGO_BIN_EXE_host"))
            .arg("run")
            .arg(&file)
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the host starts");
        let mut host = Self(child);
        let mut out = std::io::BufReader::new(host.0.stdout.take().expect("its stdout"));
        let admin = loop {
            let mut line = String::new();
            let read = std::io::BufRead::read_line(&mut out, &mut line).expect("a line");
            assert!(read > 0, "the host says where it listens");
            if let Some(rest) = line.trim().strip_prefix("admin") {
                let address = rest.split_whitespace().next().unwrap_or_default();
                break address.trim_start_matches("http://").to_owned();
            }
        };
        (host, admin)
    }

    /// SIGTERM, and whether it exits 0.
    fn stop(&mut self) -> bool {
        let id = i32::try_from(self.0.id()).expect("a process id");
        // SAFETY: plain system call on the id of a child that was not waited for.
        #[allow(unsafe_code)]
        let sent = unsafe { libc::kill(id, libc::SIGTERM) };
        assert_eq!(sent, 0);
        until("the host to end", || self.0.try_wait().expect("its status")).success()
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_reads_stops_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let two = Two::new();
    let (mut host, admin) = Unread::start(&two.pipeline, &folder);
    let lines = json!({ "do": "log-many", "n": 400, "bytes": 300 });
    let stalled = || dropped(&admin, "stage=\"\",reason=\"stalled\"");
    let deadline = Instant::now() + Duration::from_secs(60);
    while stalled() == 0 {
        assert!(
            Instant::now() < deadline,
            "what can't be written is counted"
        );
        two.send(&two.loud, &vec![lines.clone(); 10]).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    two.log.wait_committed(&two.loud, &two.loud);
    two.send(&two.quiet, &[json!({ "do": "ok" })]).await;
    two.log.wait_committed(&two.quiet, &two.quiet);
    assert_eq!(get(&admin, "/healthz").0, 200);
    // Somebody reads again: it is said what is missing.
    let mut err = host.0.stderr.take().expect("its stderr");
    let (sender, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = [0; 1 << 16];
        while let Ok(n @ 1..) = err.read(&mut bytes) {
            let _ = sender.send(String::from_utf8_lossy(&bytes[..n]).into_owned());
        }
    });
    let mut said = String::new();
    until("what was dropped to be said", || {
        said.extend(lines.try_iter());
        said.contains("stderr was not read fast enough")
            .then_some(())
    });
    assert!(host.stop());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_whose_log_nobody_reads_ends_all_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let two = Two::new();
    let (mut host, _) = Unread::start(&two.pipeline, &folder);
    let lines = json!({ "do": "log-many", "n": 400, "bytes": 300 });
    two.send(&two.loud, &vec![lines; 10]).await;
    two.log.wait_committed(&two.loud, &two.loud);
    assert!(host.stop(), "exit 0");
}

/// The driver of the migrations passes on what the server says, and knows of no stores.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_database_says_during_migrations_names_its_store() {
    let (url, component) = (
        crate::progress_row::database().await,
        component("test-echo"),
    );
    let folder = Arc::new(tempfile::tempdir().expect("a folder"));
    let migrations = folder.path().join("migrations");
    std::fs::create_dir(&migrations).expect("a folder");
    let statement = "DO $$ BEGIN RAISE WARNING 'look at this'; END $$;";
    std::fs::write(migrations.join("0001_warn.sql"), statement).expect("a migration");
    let pipeline = format!(
        r#"
        name = "migrated"
        kafka.brokers = "embedded"
        admin.listen = "127.0.0.1:0"
        topics.a = {{}}
        topics.b = {{}}
        sql.posts = {{ url = "{url}", migrations = "migrations" }}
        [stages.one]
        component = "{component}"
        input = ["a"]
        group = "g"
        output = ["b"]
        config = {{ to = "b" }}
        "#
    );
    let host = Host::spawn(folder, &pipeline, &[]);
    host.ready();
    let (_, log) = host.stop();
    let line = log.lines().find(|line| line.contains("look at this"));
    let line = line.unwrap_or_else(|| panic!("not said:\n{log}"));
    assert!(line.contains(r#"sql{store="posts"}"#), "{line}");
    let line = log.lines().find(|line| line.contains("migrations of "));
    assert!(
        line.is_some_and(|line| line.contains(r#"sql{store="posts"}"#)),
        "{log}"
    );
}
