//! A server with routes, and the logs and stores behind it.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use host::capability::redis::Store;
use host::http;
use host::ingress::{Ingress, Limits};
use host::log::kafka::ClientSettings;
use host::log::kafka::producer::{Patience, Producer};
use host::log::kafka::tail::{Event, Start, Tail};
use host::log::kafka::topics::Admin;
use host::log::{LogError, Sink, Unsent};
use host::metrics::Metrics;
use host::pipeline::{self, Pipeline, Probe};
use host::record::{Header, Outgoing, Record};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support::{server, unique};
use crate::wire::{exchange, request};

const ROUTES: &str = r#"
    name = "test"

    [kafka]
    brokers = "${BROKERS}"

    [topics."TOPIC"]
    partitions = 1

    [redis.cache]
    url = "${REDIS}"

    [http]
    listen = "127.0.0.1:0"
    max-body = "1KiB"

    [[http.routes]]
    path = "/post"
    method = "POST"
    produce = { topic = "TOPIC", key = "uid", fields = ["title", "content"], generate = ["uid"] }
    status = 201
    body = "It will be published sooner or later."

    [[http.routes]]
    path = "/tag"
    method = "PUT"
    produce = { topic = "TOPIC", fields = ["tag"] }

    [[http.routes]]
    path = "/post/{slug}"
    method = "GET"
    read = { redis = "cache", key = "TOPIC:{slug}" }

    [[http.routes]]
    path = "/post/uid/{uid}"
    method = "GET"
    read = { redis = "cache", key = "TOPIC:uid:{uid}" }

    [[http.routes]]
    path = "/latest"
    method = "GET"
    read = { redis = "cache", key = "TOPIC:latest" }
"#;

pub(crate) const FORM: &str = "content-type: application/x-www-form-urlencoded";
pub(crate) const JSON: &str = "content-type: application/json";
pub(crate) const CLOSE: &str = "connection: close";
pub(crate) const GOOD: &str = "title=A&content=B";

/// Short, where a test waits for one of them; far, where it must not be met.
pub(crate) fn limits() -> Limits {
    let far = Duration::from_secs(60);
    Limits {
        http: http::Limits {
            connections: 100,
            requests: 100,
            body_bytes: 1 << 20,
            answer_bytes: 64 << 20,
            own_bytes: 0,
            header_timeout: far,
            body_timeout: far,
            body_window: far,
            write_timeout: far,
            drain_timeout: far,
        },
        waiting: 100,
        log_timeout: far,
        store_timeout: far,
    }
}

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) ended: JoinHandle<()>,
}

impl Server {
    pub(crate) async fn start<S: Sink + 'static>(log: S, limits: Limits) -> Self {
        Self::with(log, limits, "topic", &server("REDIS_URL")).await
    }

    pub(crate) async fn with<S: Sink + 'static>(
        log: S,
        limits: Limits,
        topic: &str,
        redis: &str,
    ) -> Self {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(ROUTES.replace("TOPIC", topic).as_bytes())
            .unwrap();
        let env = |name: &str| match name {
            "BROKERS" => Some("127.0.0.1:1".to_owned()),
            "REDIS" => Some(redis.to_owned()),
            _ => None,
        };
        let pipeline = Pipeline::load(file.path(), &env, Probe::NONE).unwrap();
        let mut stores = BTreeMap::new();
        for (name, settings) in pipeline.redis() {
            stores.insert(name.clone(), Store::open(settings).await.unwrap());
        }
        let metrics = Arc::new(Metrics::default());
        let routes = pipeline.http().unwrap();
        let ingress =
            Ingress::new(routes, Arc::new(log), &stores, Arc::clone(&metrics), limits).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let ended = tokio::spawn(ingress.serve(listener, shutdown.clone()));
        Self {
            address,
            metrics,
            shutdown,
            ended,
        }
    }

    /// Compares the answer's status, its telling headers and its body.
    pub(crate) async fn check(&self, request: &str, expected: &str) {
        let answer = exchange(self.address, request).await;
        assert_eq!(brief(&answer), expected, "the answer to {request:.200}");
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        self.ended.await.unwrap();
    }
}

/// `<status> [<header>] <body>`, without the headers that every answer has.
fn brief(answer: &str) -> String {
    let Some((head, body)) = answer.split_once("\n\n") else {
        return answer.to_owned();
    };
    let usual = [
        "connection: close",
        "content-type: text/plain; charset=utf-8",
    ];
    let mut lines = head.lines();
    let status = lines
        .next()
        .and_then(|line| line.split(' ').nth(1))
        .unwrap_or("no status");
    let headers: String = lines
        .filter(|line| !usual.contains(line) && !line.starts_with("content-length: "))
        .map(|line| format!("[{line}] "))
        .collect();
    format!("{status} {headers}{body}")
}

pub(crate) fn post(body: &str) -> String {
    request(&["POST /post HTTP/1.1", FORM, CLOSE], body)
}

pub(crate) fn get(path: &str) -> String {
    request(&[&format!("GET {path} HTTP/1.1"), CLOSE], "")
}

/// What a log can do to a request.
pub(crate) enum Fault {
    Away,
    Refusing,
    Panicking,
    /// Acknowledges once there are permits; says when it is asked.
    Slow {
        asked: Arc<Semaphore>,
        permits: Arc<Semaphore>,
    },
}

impl Fault {
    pub(crate) fn slow() -> (Self, Arc<Semaphore>, Arc<Semaphore>) {
        let (asked, permits) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let log = Self::Slow {
            asked: Arc::clone(&asked),
            permits: Arc::clone(&permits),
        };
        (log, asked, permits)
    }
}

impl Sink for Fault {
    async fn produce(&self, _records: &[Outgoing]) -> Result<(), Vec<Unsent>> {
        let error = match self {
            Self::Away => LogError::Unavailable("no broker".to_owned()),
            Self::Refusing => LogError::Refused("no such topic".to_owned()),
            Self::Panicking => panic!("a bug"),
            Self::Slow { asked, permits } => {
                asked.add_permits(1);
                permits.acquire().await.unwrap().forget();
                return Ok(());
            }
        };
        Err(vec![Unsent { index: 0, error }])
    }
}

/// A topic on the real log.
pub(crate) struct Topic {
    pub(crate) name: String,
    pub(crate) settings: ClientSettings,
}

impl Topic {
    pub(crate) async fn create() -> Self {
        let name = unique("test");
        let settings = ClientSettings {
            brokers: server("KAFKA_BROKERS"),
            properties: BTreeMap::new(),
        };
        let admin = Admin::new(&settings).unwrap();
        admin
            .ensure(&[(name.clone(), pipeline::Topic::default())].into())
            .await
            .unwrap();
        Self { name, settings }
    }

    pub(crate) fn producer(&self) -> Producer {
        Producer::new(&self.settings, Patience::Bounded(Duration::from_secs(30))).unwrap()
    }

    pub(crate) async fn records(&self) -> Vec<Record> {
        let mut tail = Tail::open(&self.settings, &self.name, Start::Beginning)
            .await
            .unwrap();
        let mut records = Vec::new();
        while let Event::Record(record) = tail.next().await.unwrap() {
            let header = |(name, value)| Header {
                name: String::from_utf8(name).unwrap(),
                value,
            };
            records.push(Record {
                topic: self.name.as_str().into(),
                partition: record.partition,
                offset: record.offset,
                timestamp: record.timestamp,
                key: record.key,
                value: record.value,
                headers: record.headers.into_iter().map(header).collect(),
            });
        }
        records
    }
}

/// Puts a value into Redis, for a while.
pub(crate) async fn set(url: &str, key: &str, value: &str) {
    let client = redis::Client::open(url).unwrap();
    let mut redis = client.get_multiplexed_async_connection().await.unwrap();
    redis::cmd("SET")
        .arg(key)
        .arg(value)
        .arg("EX")
        .arg(600)
        .exec_async(&mut redis)
        .await
        .unwrap();
}
