//! One stage of a test component on a log of its own, and a proxy in front of its database.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::support::{Host, Log, Seen, component, get, server, unique};

/// A pipeline with one stage of a test component between topics of its own.
pub(crate) struct Bench {
    pub(crate) host: Host,
    pub(crate) log: Log,
    pub(crate) input: String,
    pub(crate) output: String,
    pub(crate) group: String,
    pub(crate) pipeline: String,
}

impl Bench {
    pub(crate) fn start(guest: &str, partitions: u32, settings: &str) -> Self {
        Self::with(guest, partitions, settings, "sqlite:db.sqlite", "")
    }

    /// `database` is the URL of the store `db`, `output_config` TOML of the output topic.
    pub(crate) fn with(
        guest: &str,
        partitions: u32,
        settings: &str,
        database: &str,
        output_config: &str,
    ) -> Self {
        let brokers = server("KAFKA_BROKERS");
        Self::on(
            &brokers,
            guest,
            partitions,
            settings,
            database,
            output_config,
        )
    }

    /// The same on another log.
    pub(crate) fn on(
        brokers: &str,
        guest: &str,
        partitions: u32,
        settings: &str,
        database: &str,
        output_config: &str,
    ) -> Self {
        let (input, output, group) = (unique("in"), unique("out"), unique("group"));
        let component = component(guest);
        let pipeline = format!(
            r#"
            name = "bench"
            [kafka]
            brokers = "{brokers}"
            # So that a host which was killed is soon taken for dead.
            properties."session.timeout.ms" = "6000"
            [topics."{input}"]
            partitions = {partitions}
            [topics."{output}"]
            partitions = 1
            {output_config}
            [redis.cache]
            url = "memory:"
            [stages.probe]
            component = "{component}"
            input = ["{input}"]
            group = "{group}"
            output = ["{output}"]
            redis = {{ cache = {{ prefix = "p:" }} }}
            sql = ["db"]
            retry = {{ max-attempts = 3, initial = "10ms", max = "50ms" }}
            {settings}
            [sql.db]
            url = "{database}"
            [admin]
            listen = "127.0.0.1:0"
            "#
        );
        let host = Host::start(&pipeline);
        Self {
            host,
            log: Log::new(brokers),
            input,
            output,
            group,
            pipeline,
        }
    }

    /// Stops the host and starts it again in the same folder.
    pub(crate) fn restart(&mut self) {
        let next = Host::spawn(self.host.folder(), &self.pipeline, &[]);
        let before = std::mem::replace(&mut self.host, next);
        drop(before);
    }

    /// Sends the messages.
    pub(crate) async fn send(&self, messages: &[Value]) {
        self.send_to(&self.input, messages).await;
    }

    async fn send_to(&self, topic: &str, messages: &[Value]) {
        let values: Vec<_> = messages.iter().map(Value::to_string).collect();
        let records: Vec<_> = values.iter().map(|v| (Some("k"), v.as_str())).collect();
        self.log.produce(topic, &records).await;
    }

    /// Sends the messages, waits until all are committed, and answers outputs and dead letters.
    pub(crate) async fn deliver(&self, messages: &[Value]) -> (Vec<Seen>, Vec<Seen>) {
        self.send(messages).await;
        self.log.wait_committed(&self.group, &self.input);
        let dead = self.log.read(&format!("{}.dlq", self.input));
        (self.log.read(&self.output), dead)
    }

    /// Waits until readiness says no, with these words; answers all that it says.
    pub(crate) fn not_ready(&self, words: &[&str]) -> String {
        let admin = self.host.address("admin");
        let what = format!("readiness to say {words:?}");
        self.host.wait_for(&what, || {
            let (status, said) = get(&admin, "/readyz");
            (status == 503 && words.iter().all(|word| said.contains(word))).then_some(said)
        })
    }

    pub(crate) fn metric(&self, line: &str) -> Option<String> {
        let metrics = get(&self.host.address("admin"), "/metrics").1;
        let found = metrics.lines().find_map(|l| l.strip_prefix(line));
        found.map(|rest| rest.trim().to_string())
    }
}

/// Another stage of a bench's host, on the same stores: with a topic and a group of its own.
pub(crate) struct Neighbour {
    pub(crate) input: String,
    group: String,
}

impl Neighbour {
    pub(crate) fn new() -> Self {
        Self {
            input: unique("beside"),
            group: unique("group"),
        }
    }

    /// What goes behind the settings of the bench's own stage.
    pub(crate) fn tables(&self, settings: &str) -> String {
        let Self { input, group } = self;
        let output = unique("out");
        let component = component("test-probe");
        format!(
            r#"
            [topics."{input}"]
            [topics."{output}"]
            [stages.neighbour]
            component = "{component}"
            input = ["{input}"]
            group = "{group}"
            output = ["{output}"]
            redis = {{ cache = {{ prefix = "n:" }} }}
            sql = ["db"]
            retry = {{ max-attempts = 3, initial = "10ms", max = "50ms" }}
            {settings}
            "#
        )
    }

    pub(crate) async fn send(&self, bench: &Bench, messages: &[Value]) {
        bench.send_to(&self.input, messages).await;
    }

    /// Waits until all that was sent is done, and nothing of it was given up on.
    pub(crate) fn is_well(&self, bench: &Bench) {
        bench.log.wait_committed(&self.group, &self.input);
        let given_up = "stagehost_messages_total{stage=\"neighbour\",outcome=\"dead-letter\"}";
        let given_up = bench.metric(given_up);
        assert!(
            matches!(given_up.as_deref(), None | Some("0")),
            "{given_up:?}"
        );
    }
}

/// Forwards TCP to a local port until it is told to hang.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    stalled: Arc<AtomicBool>,
}

impl Proxy {
    pub(crate) fn start(to: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let stalled = Arc::new(AtomicBool::new(false));
        let stall = stalled.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let server = TcpStream::connect(("127.0.0.1", to)).expect("the server");
                for (mut from, mut into) in [
                    (
                        client.try_clone().expect("a socket"),
                        server.try_clone().expect("a socket"),
                    ),
                    (server, client),
                ] {
                    let stall = stall.clone();
                    std::thread::spawn(move || {
                        let mut bytes = [0; 4096];
                        while let Ok(n @ 1..) = from.read(&mut bytes) {
                            while stall.load(Ordering::Relaxed) {
                                std::thread::sleep(Duration::from_millis(50));
                            }
                            if into.write_all(&bytes[..n]).is_err() {
                                break;
                            }
                        }
                    });
                }
            }
        });
        Self { port, stalled }
    }

    /// Lets nothing through, or all again.
    pub(crate) fn stall(&self, stalled: bool) {
        self.stalled.store(stalled, Ordering::Relaxed);
    }
}
