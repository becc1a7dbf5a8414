//! Stores that are sick and not gone: full, read-only, refused, paused, another's. No message pays for it, readiness, metrics
//! and the log say what it is, and all goes on by itself.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::support::{Host, Log, component, get, server, unique};

mod pgbouncer;
mod places;
mod postgres;
mod redis;
mod servers;
mod silent;
mod sqlite;

/// One stage of a test component on a store of its own.
struct Patient {
    host: Host,
    log: Log,
    input: String,
    output: String,
    group: String,
    store: &'static str,
}

/// Stores of a pipeline's, and what its stage is granted of them.
struct Stores {
    tables: String,
    grant: String,
}

impl Stores {
    fn new(grant: &str, tables: &str) -> Self {
        Self {
            tables: tables.to_owned(),
            grant: grant.to_owned(),
        }
    }

    /// Redis at this URL, and a database in a file.
    fn redis(url: &str) -> Self {
        let grant =
            "redis = { cache = { prefix = \"p:\", commands = [\"APPEND\"] } }\nsql = [\"db\"]";
        let redis = format!("[redis.cache]\nurl = \"{url}\"");
        Self::new(
            grant,
            &format!("{redis}\n[sql.db]\nurl = \"sqlite:db.sqlite\""),
        )
    }

    /// A database at this URL with this access, and a Redis in memory.
    fn database(url: &str, access: &str) -> Self {
        let redis = "redis = { cache = { prefix = \"p:\" } }";
        let grant = format!("sql = {{ db = {{ access = {access} }} }}\n{redis}");
        let database = format!("[sql.db]\nurl = \"{url}\"\nmax-connections = 3");
        Self::new(
            &grant,
            &format!("[redis.cache]\nurl = \"memory:\"\n{database}"),
        )
    }

    /// What a host says that refuses at its start to run on them.
    fn refused(&self) -> String {
        let text = pipeline(Lane::Ordered, self, &["in", "out", "group"].map(unique));
        let (status, said) = spawn(&text, &[]).ended();
        assert_eq!(status.code(), Some(1), "{said}");
        let error = said.lines().find(|line| line.starts_with("error: "));
        error
            .unwrap_or_else(|| panic!("no error: {said}"))
            .to_owned()
    }
}

/// Starts a host, and does not wait until it is ready.
fn spawn(pipeline: &str, variables: &[(&str, &str)]) -> Host {
    let folder = tempfile::tempdir().expect("a folder");
    Host::spawn(Arc::new(folder), pipeline, variables)
}

/// Waits until a host that has not started yet says on readiness and in its log what it waits for.
fn says_at_the_start(host: &Host, store: &str, words: &str) {
    let (admin, condition) = (host.admin_of_a_start(), format!("store {store}: "));
    host.wait_for(&format!("readiness to say {words:?}"), || {
        let (status, said) = get(&admin, "/readyz");
        let says = |line: &str| line.starts_with(&condition) && line.contains(words);
        (status == 503 && said.lines().any(says)).then_some(())
    });
    let (log, waiting) = (host.log(), format!("store `{store}`, next try in "));
    let says = |line: &str| line.contains(&waiting) && line.contains(words);
    assert!(log.lines().any(says), "{log}");
}

/// One stage between these topics, in this group.
fn pipeline(lane: Lane, stores: &Stores, [input, output, group]: &[String; 3]) -> String {
    let (brokers, component) = (server("KAFKA_BROKERS"), component(lane.guest()));
    let (settings, Stores { tables, grant }) = (lane.settings(), stores);
    format!(
        r#"
        name = "sick"
        [kafka]
        brokers = "{brokers}"
        [topics."{input}"]
        partitions = 1
        [topics."{output}"]
        {tables}
        [stages.probe]
        component = "{component}"
        input = ["{input}"]
        group = "{group}"
        output = ["{output}"]
        retry = {{ max-attempts = 2, initial = "10ms", max = "20ms" }}
        {grant}
        {settings}
        [admin]
        listen = "127.0.0.1:0"
        "#
    )
}

/// How its lanes work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lane {
    Ordered,
    Batches,
    Concurrent,
    Transactional,
}

impl Lane {
    fn settings(self) -> &'static str {
        match self {
            Self::Ordered | Self::Batches => "delivery = \"at-least-once\"",
            Self::Concurrent => "delivery = \"at-least-once\"\norder = \"none\"\nconcurrency = 4",
            Self::Transactional => "",
        }
    }

    fn guest(self) -> &'static str {
        match self {
            Self::Batches => "test-batch",
            _ => "test-probe",
        }
    }
}

impl Patient {
    /// On Redis at this URL.
    fn on_redis(url: &str, lane: Lane) -> Self {
        Self::with("cache", lane, &Stores::redis(url), Host::start)
    }

    /// On a database at this URL.
    fn on_database(url: &str, lane: Lane) -> Self {
        Self::reads_and_writes(url, lane, "\"data\"")
    }

    /// The same, with this access.
    fn reads_and_writes(url: &str, lane: Lane, access: &str) -> Self {
        Self::on_database_with(url, lane, access, Host::start)
    }

    /// The same, with how its host is started.
    fn on_database_with(
        url: &str,
        lane: Lane,
        access: &str,
        start: impl FnOnce(&str) -> Host,
    ) -> Self {
        Self::with("db", lane, &Stores::database(url, access), start)
    }

    fn start(store: &'static str, lane: Lane, grant: &str, tables: &str) -> Self {
        Self::with(store, lane, &Stores::new(grant, tables), Host::start)
    }

    fn with(
        store: &'static str,
        lane: Lane,
        stores: &Stores,
        start: impl FnOnce(&str) -> Host,
    ) -> Self {
        let names = ["in", "out", "group"].map(unique);
        let host = start(&pipeline(lane, stores, &names));
        let [input, output, group] = names;
        Self {
            host,
            log: Log::new(&server("KAFKA_BROKERS")),
            input,
            output,
            group,
            store,
        }
    }

    /// Stops the host, and starts it again once this was changed in its pipeline.
    fn restart(&mut self, before: &str, after: &str) {
        self.host.signal(libc::SIGTERM);
        self.host.wait_for_end();
        let file = self.host.folder().path().join("pipeline.toml");
        let pipeline = std::fs::read_to_string(file).expect("its pipeline");
        assert!(pipeline.contains(before), "{before}");
        let pipeline = pipeline.replace(before, after);
        self.host = Host::spawn(self.host.folder(), &pipeline, &[]);
    }

    async fn send(&self, messages: &[Value]) {
        let values: Vec<_> = messages.iter().map(Value::to_string).collect();
        let records: Vec<_> = values.iter().map(|v| (Some("k"), v.as_str())).collect();
        self.log.produce(&self.input, &records).await;
    }

    fn settle(&self) {
        self.log.wait_committed(&self.group, &self.input);
    }

    /// Waits until readiness, metrics and the log say what is wrong with the store.
    fn says(&self, words: &str) {
        let admin = self.host.address("admin");
        let condition = format!("store {}: ", self.store);
        self.host
            .wait_for(&format!("readiness to say {words:?}"), || {
                let (status, said) = get(&admin, "/readyz");
                let says = |line: &str| line.starts_with(&condition) && line.contains(words);
                (status == 503 && said.lines().any(says)).then_some(())
            });
        self.host.wait_for("the metric", || {
            let open = format!("stagehost_circuit_open{{store=\"{}\"}} 1", self.store);
            get(&admin, "/metrics").1.contains(&open).then_some(())
        });
        self.host.wait_for("the log", || {
            let log = self.host.log();
            let says = |line: &str| line.contains(self.store) && line.contains(words);
            log.lines().any(says).then_some(())
        });
    }

    /// Waits until all is done, and sees that nothing was given up on.
    fn goes_on(&self) {
        self.settle();
        self.host.ready();
        assert_eq!(self.dead(), Vec::<String>::new());
    }

    /// What was given up on, as its cause and words.
    fn dead(&self) -> Vec<String> {
        let dead = self.log.read(&format!("{}.dlq", self.input));
        let words = |name: &str, d: &crate::support::Seen| d.header(name).unwrap_or("").to_owned();
        let letter = |d| {
            let cause = words("stagehost-cause", d);
            format!("{cause}: {}", words("__dlq.errors.message", d))
        };
        dead.iter().map(letter).collect()
    }
}

/// Messages that leave a trace each, which tells how often they had an effect.
fn appends(numbers: std::ops::Range<u32>) -> Vec<Value> {
    let append = |n| {
        json!({ "do": "redis", "store": "cache", "call": "execute", "command": "APPEND",
                "arguments": [format!("p:{n}"), "x"] })
    };
    numbers.map(append).collect()
}

/// Messages that write a value each, which may be written twice.
fn sets(numbers: std::ops::Range<u32>) -> Vec<Value> {
    let set = |n| json!({ "do": "redis", "store": "cache", "call": "set", "key": format!("p:{n}"), "value": "x" });
    numbers.map(set).collect()
}

/// Messages that insert a row each.
fn inserts(numbers: std::ops::Range<u32>) -> Vec<Value> {
    let insert = |n| json!({ "do": "sql", "store": "db", "statement": "INSERT INTO t VALUES ($1)", "params": [n], "execute": true });
    numbers.map(insert).collect()
}
