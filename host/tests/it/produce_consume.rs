//! `host produce` and `host consume`, as they are run in a shell.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use host::log::kafka::ClientSettings;
use host::log::kafka::topics::Admin;
use host::pipeline::Topic;
use tempfile::TempDir;

use crate::support::server;

const PIPELINE: &str = r#"
    name = "test"

    [kafka]
    brokers = "embedded"

    [topics."declared"]
    partitions = 1

    [http]
    listen = "127.0.0.1:0"

    [[http.routes]]
    path = "/"
    method = "POST"
    produce = { topic = "declared", fields = ["a"] }
"#;

/// A shell in a folder of its own.
struct Shell {
    folder: TempDir,
    /// Arguments that say which log.
    log: Vec<String>,
}

impl Shell {
    /// One that talks to the embedded broker of a pipeline.
    fn embedded() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("pipeline.toml"), PIPELINE).unwrap();
        Self {
            folder,
            log: vec![],
        }
    }

    /// One that talks to the real log.
    fn real() -> Self {
        let brokers = server("KAFKA_BROKERS");
        let log = vec!["--brokers".to_owned(), brokers];
        Self {
            folder: tempfile::tempdir().unwrap(),
            log,
        }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn start(&self, arguments: &[&str]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_host"))
            .args(arguments)
            .args(&self.log)
            .current_dir(self.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn run(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut child = self.start(arguments);
        // A command that needs no input may be gone already.
        let _ = child.stdin.take().unwrap().write_all(input);
        child.wait_with_output().unwrap()
    }

    /// Runs it and compares its output, timestamps left out.
    fn check(&self, arguments: &[&str], input: &[u8], expected: &str) {
        let output = self.run(arguments, input);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?} failed: {error}");
        let printed: Vec<String> = String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(without_timestamp)
            .collect();
        assert_eq!(printed.join("\n"), expected, "{arguments:?} {error}");
    }

    fn check_fails(&self, arguments: &[&str], code: i32, message: &str) {
        let output = self.run(arguments, b"");
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(
            error.contains(message),
            "{arguments:?}: no {message:?} in {error}"
        );
    }

    /// What must hold on every log. The topic has one partition and no records.
    fn check_a_topic(&self, topic: &str) {
        let produced = |offset| format!(r#"{{"topic":"{topic}","partition":0,"offset":{offset}}}"#);
        let consumed = |offset, rest: &str| {
            format!(r#"{{"topic":"{topic}","partition":0,"offset":{offset},{rest}}}"#)
        };
        std::fs::write(self.path().join("value"), "from a\nfile\n").unwrap();
        let typed = [
            "produce", topic, "--key", "k", "--header", "a=1", "--header", "a=x=y",
        ];
        self.check(&typed, "from ü".as_bytes(), &produced(0));
        self.check(&["produce", topic, "value"], b"", &produced(1));
        self.check(&["produce", topic, "-"], b"\xff", &produced(2));
        self.check(
            &["produce", topic, "--null", "--key", "k"],
            b"",
            &produced(3),
        );
        let lines = format!(r#"{{"topic":"{topic}","records":3}}"#);
        self.check(&["produce", topic, "--lines"], b"one\n\nthree", &lines);

        let records = [
            consumed(
                0,
                r#""key":"k","value":"from ü","headers":[{"name":"a","value":"1"},{"name":"a","value":"x=y"}]"#,
            ),
            consumed(1, r#""key":null,"value":"from a\nfile\n","headers":[]"#),
            consumed(2, r#""key":null,"value":{"base64":"/w=="},"headers":[]"#),
            consumed(3, r#""key":"k","value":null,"headers":[]"#),
            consumed(4, r#""key":null,"value":"one","headers":[]"#),
            consumed(5, r#""key":null,"value":"","headers":[]"#),
            consumed(6, r#""key":null,"value":"three","headers":[]"#),
        ];
        self.check(&["consume", topic, "--exit"], b"", &records.join("\n"));
        self.check(
            &["consume", topic, "--count", "2"],
            b"",
            &records[..2].join("\n"),
        );
        self.check(
            &["consume", topic, "--from", "5", "--count", "1"],
            b"",
            &records[5],
        );
        self.check(&["consume", topic, "--from", "end", "--exit"], b"", "");
        self.check(&["consume", topic, "--from", "99", "--exit"], b"", "");
        self.check(&["consume", topic, "--count", "0"], b"", "");
    }
}

fn without_timestamp(line: &str) -> String {
    let Some((before, after)) = line.split_once("\"timestamp\":") else {
        return line.to_owned();
    };
    let (_, after) = after.split_once(',').unwrap();
    format!("{before}{after}")
}

/// A topic of one partition on the real log.
fn create_topic() -> String {
    let topic = format!("test-{}", uuid::Uuid::new_v4().simple());
    let settings = ClientSettings {
        brokers: server("KAFKA_BROKERS"),
        properties: [].into(),
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let admin = Admin::new(&settings).unwrap();
        admin
            .ensure(&[(topic.clone(), Topic::default())].into())
            .await
            .unwrap();
    });
    topic
}

#[test]
fn on_the_real_log() {
    Shell::real().check_a_topic(&create_topic());
}

#[test]
fn consume_follows_until_a_signal() {
    let (shell, topic) = (Shell::real(), create_topic());
    for signal in ["-INT", "-TERM"] {
        let mut child = shell.start(&["consume", &topic]);
        let mut printed = BufReader::new(child.stdout.take().unwrap()).lines();
        for value in ["one", "two"] {
            let value = format!("{value} before {signal}");
            let produced = shell.run(&["produce", &topic], value.as_bytes());
            assert!(produced.status.success());
            let line = printed.find(|line| line.as_ref().unwrap().contains(&value));
            assert!(line.is_some(), "consume ended without {value}");
        }
        let id = child.id().to_string();
        let kill = Command::new("kill").args([signal, &id]).status();
        assert!(kill.unwrap().success());
        assert_eq!(child.wait().unwrap().code(), Some(0), "{signal}");
    }
}

#[test]
fn on_an_embedded_log_that_nobody_runs() {
    Shell::embedded().check_a_topic("declared");
}

#[test]
fn on_the_embedded_log_of_a_running_host() {
    let shell = Shell::embedded();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let config = embedded_kafka::Config::new(shell.path().join("data/kafka"));
    let broker = runtime
        .block_on(embedded_kafka::Broker::start(config))
        .unwrap();
    shell.check_a_topic("declared");
    runtime.block_on(broker.shutdown());
}

#[test]
fn mistakes_are_told() {
    let shell = Shell::embedded();
    let no_topic = "there is no topic `undeclared`";
    shell.check_fails(&["produce", "undeclared"], 1, no_topic);
    shell.check_fails(&["consume", "undeclared"], 1, no_topic);
    shell.check_fails(
        &["produce", "declared", "nowhere"],
        1,
        "cannot read nowhere",
    );
    shell.check_fails(
        &["produce", "declared", "--header", "a"],
        2,
        "write NAME=VALUE",
    );
    let start = ["consume", "declared", "--from", "start"];
    shell.check_fails(&start, 2, "write beginning, end or an offset");
    let no_file = ["consume", "declared", "--pipeline", "nowhere.toml"];
    shell.check_fails(&no_file, 2, "nowhere.toml");
}
