//! `host produce` and `host consume`, as they are run in a shell.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use host::log::kafka::ClientSettings;
use host::log::kafka::topics::Admin;
use host::pipeline::Topic;
use tempfile::TempDir;

use crate::support::{server, unique};

const PIPELINE: &str = r#"
    name = "test"

    [kafka]
    brokers = "embedded"

    [topics."declared"]
    partitions = 1
    # What is old stays.
    [topics."from"]
    partitions = 2
    config = { "retention.ms" = -1 }
    [topics."to"]
    partitions = 2
    config = { "retention.ms" = -1 }

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

    /// One that talks to the real log by way of a pipeline that declares two topics, of two partitions each.
    fn declaring(from: &str, to: &str) -> Self {
        let pipeline = PIPELINE
            .replace("\"embedded\"", &format!("\"{}\"", server("KAFKA_BROKERS")))
            .replace("\"from\"", &format!("\"{from}\""))
            .replace("\"to\"", &format!("\"{to}\""));
        let shell = Self::embedded();
        std::fs::write(shell.path().join("pipeline.toml"), pipeline).unwrap();
        shell
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

/// Records with all that may be lost of one: order and repetitions of headers, nulls beside what is empty, any bytes.
const RECORDS: &str = r#"
{"key":"k","value":"ü \u0000 \n","headers":[{"name":"b","value":"2"},{"name":"a","value":"1"},{"name":"b","value":"3"}],"timestamp":1}
{"key":{"base64":"/wA="},"value":{"base64":"/v8="},"headers":[{"name":"a","value":null},{"name":"a","value":""},{"name":"","value":{"base64":"gA=="}}],"timestamp":1700000000000}
{"key":null,"value":"","partition":1,"timestamp":1700000000001}

{"key":"","value":null,"partition":1,"timestamp":1700000000002}
{"value":"null","headers":[{"name":"with\u0000NUL","value":"v\u0000"},{"name":"ü","value":"{\"base64\":\"\"}"}],"timestamp":1700000000003,"partition":1}
"#;

impl Shell {
    /// What `consume` prints of a topic, with other words for the topic, in the order of the places.
    fn consumed(&self, topic: &str) -> Vec<String> {
        let output = self.run(&["consume", topic, "--exit"], b"");
        assert!(output.status.success(), "{output:?}");
        let printed = String::from_utf8(output.stdout).unwrap();
        let topic = format!("{{\"topic\":\"{topic}\",");
        let mut lines: Vec<_> = printed
            .lines()
            .map(|l| l.replacen(&topic, "{", 1))
            .collect();
        lines.sort();
        lines
    }

    /// Two topics of two partitions each, without records.
    fn check_a_round_trip(&self, from: &str, to: &str) {
        let given = RECORDS.replace("{\"key\":\"k\"", "{\"partition\":0,\"key\":\"k\"");
        let given = given.replace("{\"key\":{", "{\"partition\":0,\"key\":{");
        let acknowledged = |topic: &str| format!(r#"{{"topic":"{topic}","records":5}}"#);
        let json = ["produce", from, "--json", "--keep-partition"];
        self.check(&json, given.as_bytes(), &acknowledged(from));
        let consumed = self.consumed(from);
        let expected = [
            r#"{"partition":0,"offset":0,"timestamp":1,"key":"k","value":"ü \u0000 \n","headers":[{"name":"b","value":"2"},{"name":"a","value":"1"},{"name":"b","value":"3"}]}"#,
            r#"{"partition":0,"offset":1,"timestamp":1700000000000,"key":{"base64":"/wA="},"value":{"base64":"/v8="},"headers":[{"name":"a","value":null},{"name":"a","value":""},{"name":"","value":{"base64":"gA=="}}]}"#,
            r#"{"partition":1,"offset":0,"timestamp":1700000000001,"key":null,"value":"","headers":[]}"#,
            r#"{"partition":1,"offset":1,"timestamp":1700000000002,"key":"","value":null,"headers":[]}"#,
            r#"{"partition":1,"offset":2,"timestamp":1700000000003,"key":null,"value":"null","headers":[{"name":"with\u0000NUL","value":"v\u0000"},{"name":"ü","value":"{\"base64\":\"\"}"}]}"#,
        ];
        assert_eq!(consumed, expected);
        let printed = self.run(&["consume", from, "--exit"], b"").stdout;
        let json = ["produce", to, "--json", "--keep-partition"];
        self.check(&json, &printed, &acknowledged(to));
        assert_eq!(self.consumed(to), expected);
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

#[test]
fn what_consume_prints_can_be_produced() {
    let shell = Shell::embedded();
    shell.check_a_round_trip("from", "to");
    let (from, to) = (unique("from"), unique("to"));
    let shell = Shell::declaring(&from, &to);
    shell.check_a_round_trip(&from, &to);
    large_record(&shell, &to);
}

/// As large as the topic takes, which may be more than clients take by themselves.
fn large_record(shell: &Shell, topic: &str) {
    let value = "x".repeat(1_040_000);
    let line = format!("{{\"value\":\"{value}\",\"key\":\"large\"}}");
    let output = shell.run(&["produce", topic, "--json"], line.as_bytes());
    assert!(output.status.success(), "{output:?}");
    let consumed = shell.consumed(topic);
    assert!(consumed.iter().any(|line| line.contains(&value)));
}

#[test]
fn what_can_not_be_produced_byte_for_byte_is_said() {
    let (shell, topic) = (Shell::real(), create_topic());
    let said = |input: &[u8], code: i32, message: &str| {
        let output = shell.run(&["produce", &topic, "--json"], input);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{error}");
        assert!(error.contains(message), "no {message:?} in {error}");
    };
    said(
        b"{\"value\":\"a\",\"timestamp\":5}\n{\"value\":\"b\",\"timestamp\":0}\n",
        0,
        "1 record(s), the first in line 2, have the timestamp 0",
    );
    said(
        b"{\"value\":\"c\"}\n\n{\"value\":\"d\",\"timestamp\":-5}\n{\"value\":\"e\"}",
        1,
        "line 3: a timestamp is not negative; 1 lines were acknowledged",
    );
    said(b"plain text\n", 1, "line 1: expected value (column 1)");
    said(b"{\"key\":\"k\"}\n", 1, "line 1: missing field `value`");
    let values = ["\"value\":\"a\"", "\"value\":\"b\"", "\"value\":\"c\""];
    let consumed = shell.consumed(&topic);
    assert_eq!(consumed.len(), values.len(), "{consumed:?}");
    for (line, value) in consumed.iter().zip(values) {
        assert!(line.contains(value), "{line}");
    }
    // A name that is no text, from a client that takes any.
    let header = std::ffi::OsStr::from_bytes(b"\xff=v");
    let mut kcat = Command::new("kcat")
        .args(["-P", "-b", &server("KAFKA_BROKERS"), "-t", &topic, "-H"])
        .arg(header)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    kcat.stdin.take().unwrap().write_all(b"f").unwrap();
    assert!(kcat.wait().unwrap().success());
    let line = shell.consumed(&topic).pop().unwrap();
    let name = r#""headers":[{"name":{"base64":"/w=="},"value":"v"}]"#;
    assert!(line.contains(name), "{line}");
    said(line.as_bytes(), 0, "");
    let copy = shell.consumed(&topic).pop().unwrap();
    assert_ne!(copy, line);
    assert!(copy.contains(name), "{copy}");
}
