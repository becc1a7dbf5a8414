//! The HTTP ingress as clients meet it: over sockets, on a real log and a real Redis.

mod wire;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use expect_test::{Expect, expect};
use host::capability::redis::Store;
use host::http;
use host::ingress::{Ingress, Limits};
use host::log::kafka::ClientSettings;
use host::log::kafka::producer::{Patience, Producer};
use host::log::kafka::tail::{Event, Start, Tail};
use host::log::kafka::topics::Admin;
use host::log::{LogError, Sink, Unsent};
use host::metrics::Metrics;
use host::pipeline::{Pipeline, Probe};
use host::record::{Header, Outgoing, Record};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use wire::{Client, exchange, request};

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
"#;

const FORM: &str = "content-type: application/x-www-form-urlencoded";
const JSON: &str = "content-type: application/json";
const CLOSE: &str = "connection: close";
const GOOD: &str = "title=A&content=B";

fn variable(name: &str) -> String {
    std::env::var(name)
        .unwrap_or_else(|_| panic!("{name} is not set: run `make test`, which starts the servers"))
}

/// A name that no other test has.
fn unique() -> String {
    format!("test-{}", Uuid::new_v4().simple())
}

/// Short, where a test waits for one of them; far, where it must not be met.
fn limits() -> Limits {
    let far = Duration::from_secs(60);
    Limits {
        http: http::Limits {
            connections: 100,
            header_timeout: far,
            body_timeout: far,
            write_timeout: far,
            drain_timeout: far,
        },
        waiting: 100,
        log_timeout: far,
        store_timeout: far,
    }
}

struct Server {
    address: SocketAddr,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
    ended: JoinHandle<()>,
}

impl Server {
    async fn start<S: Sink + 'static>(log: S, limits: Limits) -> Self {
        Self::with(log, limits, "topic", &variable("REDIS_URL")).await
    }

    async fn with<S: Sink + 'static>(log: S, limits: Limits, topic: &str, redis: &str) -> Self {
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

    async fn check(&self, request: &str, expected: Expect) {
        expected.assert_eq(&exchange(self.address, request).await);
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.ended.await.unwrap();
    }
}

fn post(body: &str) -> String {
    request(&["POST /post HTTP/1.1", FORM, CLOSE], body)
}

fn get(path: &str) -> String {
    request(&[&format!("GET {path} HTTP/1.1"), CLOSE], "")
}

/// What a log can do to a request.
enum Fault {
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
    fn slow() -> (Self, Arc<Semaphore>, Arc<Semaphore>) {
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
struct Topic {
    name: String,
    settings: ClientSettings,
}

impl Topic {
    async fn create() -> Self {
        let name = unique();
        let settings = ClientSettings {
            brokers: variable("KAFKA_BROKERS"),
            properties: BTreeMap::new(),
        };
        let admin = Admin::new(&settings).unwrap();
        admin
            .ensure(&BTreeMap::new(), &[name.clone()].into())
            .await
            .unwrap();
        Self { name, settings }
    }

    fn producer(&self) -> Producer {
        Producer::new(&self.settings, Patience::Bounded(Duration::from_secs(30))).unwrap()
    }

    async fn records(&self) -> Vec<Record> {
        let mut tail = Tail::open(&self.settings, &self.name, Start::Beginning)
            .await
            .unwrap();
        let mut records = Vec::new();
        while let Event::Record(record) = tail.next().await.unwrap() {
            records.push(record);
        }
        records
    }
}

#[tokio::test]
async fn a_form_and_json_make_the_same_record() {
    let topic = Topic::create().await;
    let server = Server::with(
        topic.producer(),
        limits(),
        &topic.name,
        &variable("REDIS_URL"),
    )
    .await;
    let bodies = [
        (FORM, "content=1+%2B+1&title=%C3%9Cber+%22Kafka%22"),
        (
            JSON,
            r#"{"title": "\u00dcber \"Kafka\"", "content": "1 + 1"}"#,
        ),
    ];
    for (kind, body) in bodies {
        let parent = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let answer = exchange(
            server.address,
            &request(&["POST /post HTTP/1.1", kind, parent, CLOSE], body),
        )
        .await;
        let uid = header(&answer, "stagehost-uid");
        assert_eq!(uid.parse::<Uuid>().unwrap().get_version_num(), 7);
        expect![[r#"
            HTTP/1.1 201 Created
            content-type: text/plain; charset=utf-8
            stagehost-uid: UID
            connection: close
            content-length: 37

            It will be published sooner or later."#]]
        .assert_eq(&answer.replace(&uid, "UID"));

        let record = topic.records().await.pop().unwrap();
        assert_eq!(record.key.as_deref(), Some(uid.as_bytes()));
        assert_eq!(
            String::from_utf8(record.value.unwrap()).unwrap(),
            format!(r#"{{"uid":"{uid}","title":"Über \"Kafka\"","content":"1 + 1"}}"#)
        );
        let value = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(record.headers, [Header::new("traceparent", value)]);
    }
    assert_eq!(topic.records().await.len(), bodies.len());
    server.stop().await;
}

#[tokio::test]
async fn a_route_without_key_and_body_answers_its_defaults() {
    let topic = Topic::create().await;
    let server = Server::with(
        topic.producer(),
        limits(),
        &topic.name,
        &variable("REDIS_URL"),
    )
    .await;
    let malformed = "traceparent: 00-0-0-0";
    let put = request(&["PUT /tag HTTP/1.1", FORM, malformed, CLOSE], "tag=x");
    let answer = exchange(server.address, &put).await;
    assert!(answer.starts_with("HTTP/1.1 2"), "{answer}");
    let record = topic.records().await.pop().unwrap();
    assert_eq!(
        (record.key, record.value, record.headers),
        (None, Some(br#"{"tag":"x"}"#.to_vec()), vec![])
    );
    server.stop().await;
}

#[tokio::test]
async fn a_record_that_the_log_finds_too_large_is_the_clients_fault() {
    let mut topic = Topic::create().await;
    topic
        .settings
        .properties
        .insert("message.max.bytes".to_owned(), "1000".to_owned());
    let server = Server::with(
        topic.producer(),
        limits(),
        &topic.name,
        &variable("REDIS_URL"),
    )
    .await;
    let body = format!("title=A&content={}", "x".repeat(1000));
    server
        .check(
            &post(&body),
            expect![[r#"
        HTTP/1.1 413 Payload Too Large
        content-type: text/plain; charset=utf-8
        connection: close
        content-length: 39

        the record is larger than the log takes"#]],
        )
        .await;
    assert!(
        exchange(server.address, &post(GOOD))
            .await
            .starts_with("HTTP/1.1 201")
    );
    server.stop().await;
}

fn header(answer: &str, name: &str) -> String {
    let prefix = format!("{name}: ");
    let value = answer.lines().find_map(|line| line.strip_prefix(&prefix));
    value
        .unwrap_or_else(|| panic!("no {name} in {answer}"))
        .to_owned()
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_said() {
    // Whatever reached the log would be answered 503.
    let server = Server::start(Fault::Away, limits()).await;
    server
        .check(
            &post("title=A&uid=1"),
            expect![[r#"
        HTTP/1.1 400 Bad Request
        content-type: text/plain; charset=utf-8
        connection: close
        content-length: 69

        missing: "content"; unknown: "uid"; the fields are "title", "content""#]],
        )
        .await;
    server
        .check(
            &request(&["POST /post HTTP/1.1", JSON, CLOSE], r#"{"title":1}"#),
            expect![[r#"
                HTTP/1.1 400 Bad Request
                content-type: text/plain; charset=utf-8
                connection: close
                content-length: 90

                the JSON is wrong: the field "title" is a number, and must be a string at line 1 column 11"#]],
        )
        .await;
    server
        .check(
            &request(
                &["POST /post HTTP/1.1", "content-type: text/xml", CLOSE],
                "<a/>",
            ),
            expect![[r#"
                HTTP/1.1 415 Unsupported Media Type
                content-type: text/plain; charset=utf-8
                connection: close
                content-length: 100

                the content-type "text/xml" is not taken: send application/x-www-form-urlencoded or application/json"#]],
        )
        .await;
    server
        .check(&request(&["POST /post HTTP/1.1", CLOSE], "a"), expect![[r#"
            HTTP/1.1 415 Unsupported Media Type
            content-type: text/plain; charset=utf-8
            connection: close
            content-length: 87

            the content-type is missing: send application/x-www-form-urlencoded or application/json"#]])
        .await;
    server
        .check(
            &get("/nowhere"),
            expect![[r#"
        HTTP/1.1 404 Not Found
        content-type: text/plain; charset=utf-8
        connection: close
        content-length: 9

        not found"#]],
        )
        .await;
    server
        .check(
            &get("/post/"),
            expect![[r#"
        HTTP/1.1 404 Not Found
        content-type: text/plain; charset=utf-8
        connection: close
        content-length: 9

        not found"#]],
        )
        .await;
    server
        .check(
            &get("/post"),
            expect![[r#"
        HTTP/1.1 405 Method Not Allowed
        content-type: text/plain; charset=utf-8
        allow: POST
        connection: close
        content-length: 33

        method not allowed; allowed: POST"#]],
        )
        .await;
    server
        .check(
            &request(&["DELETE /post/a HTTP/1.1", CLOSE], ""),
            expect![[r#"
                HTTP/1.1 405 Method Not Allowed
                content-type: text/plain; charset=utf-8
                allow: GET, HEAD
                connection: close
                content-length: 38

                method not allowed; allowed: GET, HEAD"#]],
        )
        .await;
    server
        .check(
            &get("/post/a%00b"),
            expect![[r#"
        HTTP/1.1 400 Bad Request
        content-type: text/plain; charset=utf-8
        connection: close
        content-length: 40

        slug in the path has a control character"#]],
        )
        .await;
    server
        .check(
            &get("/post/%ff"),
            expect![[r#"
        HTTP/1.1 400 Bad Request
        content-type: text/plain; charset=utf-8
        connection: close
        content-length: 29

        slug in the path is not UTF-8"#]],
        )
        .await;
    server
        .check(
            "nonsense\r\n\r\n",
            expect![[r#"
        HTTP/1.1 400 Bad Request
        connection: close
        content-length: 0

    "#]],
        )
        .await;
    server
        .check(
            &request(
                &[
                    "POST /post HTTP/1.1",
                    FORM,
                    CLOSE,
                    "transfer-encoding: chunked",
                ],
                "",
            )
            .replace("\r\n\r\n", "\r\n\r\nzz\r\n"),
            expect![[r#"
                HTTP/1.1 400 Bad Request
                content-type: text/plain; charset=utf-8
                connection: close
                content-length: 71

                the body could not be read: Invalid chunk size line: missing size digit"#]],
        )
        .await;
    server.stop().await;
}

#[tokio::test]
async fn a_large_body_is_refused_and_its_sender_told() {
    let server = Server::start(Fault::Away, limits()).await;
    let too_large = expect![[r#"
        HTTP/1.1 413 Payload Too Large
        content-type: text/plain; charset=utf-8
        connection: close
        content-length: 34

        the body is larger than 1024 bytes"#]];
    // One that fits gets as far as the log.
    let fits = format!(
        "title=A&content={}",
        "x".repeat(1024 - "title=A&content=".len())
    );
    assert!(
        exchange(server.address, &post(&fits))
            .await
            .starts_with("HTTP/1.1 503")
    );
    let large = format!("{fits}x");
    too_large.assert_eq(&exchange(server.address, &post(&large)).await);
    // Refused by its length alone: the body is never sent.
    let announced = "POST /post HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: 99999999\r\n\r\n";
    too_large.assert_eq(&exchange(server.address, announced).await);
    // Sent to the end, much of it, without a word about its length.
    let mut chunked = request(
        &["POST /post HTTP/1.1", FORM, "transfer-encoding: chunked"],
        "",
    );
    for _ in 0..4096 {
        chunked.push_str(&format!("400\r\n{}\r\n", "x".repeat(1024)));
    }
    chunked.push_str("0\r\n\r\n");
    too_large.assert_eq(&exchange(server.address, &chunked).await);
    server.stop().await;
}

#[tokio::test]
async fn faults_of_the_log_are_not_the_clients() {
    let quick = Limits {
        log_timeout: Duration::from_millis(50),
        ..limits()
    };
    let check = async |log: Fault, expected: Expect| {
        let server = Server::start(log, quick).await;
        server.check(&post(GOOD), expected).await;
        assert!(
            exchange(server.address, &get("/post/unknown"))
                .await
                .starts_with("HTTP/1.1 404")
        );
        server.stop().await;
    };
    check(
        Fault::Away,
        expect![[r#"
        HTTP/1.1 503 Service Unavailable
        content-type: text/plain; charset=utf-8
        retry-after: 1
        connection: close
        content-length: 24

        the log is not available"#]],
    )
    .await;
    check(
        Fault::slow().0,
        expect![[r#"
        HTTP/1.1 503 Service Unavailable
        content-type: text/plain; charset=utf-8
        retry-after: 1
        connection: close
        content-length: 65

        the log has not acknowledged in time; the record may still arrive"#]],
    )
    .await;
    check(
        Fault::Refusing,
        expect![[r#"
        HTTP/1.1 500 Internal Server Error
        content-type: text/plain; charset=utf-8
        connection: close
        content-length: 26

        the log refused the record"#]],
    )
    .await;
    check(
        Fault::Panicking,
        expect![[r#"
        HTTP/1.1 500 Internal Server Error
        content-type: text/plain; charset=utf-8
        connection: close
        content-length: 14

        internal error"#]],
    )
    .await;
}

#[tokio::test]
async fn requests_beyond_those_that_may_wait_are_sent_away() {
    let (log, asked, permits) = Fault::slow();
    let server = Server::start(
        log,
        Limits {
            waiting: 1,
            ..limits()
        },
    )
    .await;
    let mut first = Client::connect(server.address).await;
    first.send(post(GOOD)).await;
    asked.acquire().await.unwrap().forget();
    server
        .check(
            &post(GOOD),
            expect![[r#"
        HTTP/1.1 503 Service Unavailable
        content-type: text/plain; charset=utf-8
        retry-after: 1
        connection: close
        content-length: 34

        too many requests wait for the log"#]],
        )
        .await;
    permits.add_permits(1);
    assert!(first.rest().await.starts_with("HTTP/1.1 201"));
    server.stop().await;
}

#[tokio::test]
async fn connections_beyond_those_served_are_sent_away() {
    let mut few = limits();
    few.http.connections = 1;
    let server = Server::start(Fault::Away, few).await;
    let mut first = Client::connect(server.address).await;
    first.send(request(&["GET /post/a HTTP/1.1"], "")).await;
    first.answer().await;
    server
        .check(
            &request(&["GET /post/a HTTP/1.1"], ""),
            expect![[r#"
            HTTP/1.1 503 Service Unavailable
            content-type: text/plain; charset=utf-8
            retry-after: 1
            connection: close
            content-length: 20

            too many connections"#]],
        )
        .await;
    first.send(get("/post/a")).await;
    assert!(first.rest().await.starts_with("HTTP/1.1 404"));
    let text = server.metrics.encode().unwrap();
    for line in [
        r#"stagehost_http_requests_total{route="none",method="GET",status="503"} 1"#,
        r#"stagehost_http_requests_total{route="/post/{slug}",method="GET",status="404"} 2"#,
    ] {
        assert!(text.contains(line), "no {line} in {text}");
    }
    server.stop().await;
}

#[tokio::test]
async fn slow_and_silent_clients_are_let_go() {
    let check = async |set: fn(&mut http::Limits, Duration), sent: &str, expected: Expect| {
        let mut short = limits();
        // Long enough for a whole head to come in on a busy machine.
        set(&mut short.http, Duration::from_secs(1));
        let server = Server::start(Fault::Away, short).await;
        server.check(sent, expected).await;
        server.stop().await;
    };
    let half_body = post(GOOD);
    let half_body = &half_body[..half_body.len() - 1];
    check(
        |limits, short| limits.body_timeout = short,
        half_body,
        expect![[r#"
            HTTP/1.1 408 Request Timeout
            content-type: text/plain; charset=utf-8
            connection: close
            content-length: 22

            the body took too long"#]],
    )
    .await;
    check(
        |limits, short| limits.header_timeout = short,
        "",
        expect![[""]],
    )
    .await;
    check(
        |limits, short| limits.header_timeout = short,
        "POST /post HTTP/1.1\r\nhost:",
        expect![[""]],
    )
    .await;
    // Idle after an answer.
    let idle = request(&["GET /post/a HTTP/1.1"], "");
    check(
        |limits, short| limits.header_timeout = short,
        &idle,
        expect![[r#"
            HTTP/1.1 404 Not Found
            content-type: text/plain; charset=utf-8
            content-length: 9

            not found"#]],
    )
    .await;
}

#[tokio::test]
async fn a_connection_serves_one_request_after_another() {
    let server = Server::start(Fault::Away, limits()).await;
    let mut client = Client::connect(server.address).await;
    for _ in 0..3 {
        client.send(request(&["GET /post/a HTTP/1.1"], "")).await;
        assert!(client.answer().await.starts_with("HTTP/1.1 404"));
    }
    // Both at once, and our side closed behind them.
    client
        .send(request(&["GET /post/a HTTP/1.1"], "") + &get("/post/b"))
        .await;
    assert!(client.answer().await.starts_with("HTTP/1.1 404"));
    assert!(client.rest().await.starts_with("HTTP/1.1 404"));
    server.stop().await;
}

#[tokio::test]
async fn requests_in_flight_finish_when_the_server_stops() {
    let (log, asked, permits) = Fault::slow();
    let server = Server::start(log, limits()).await;
    let mut idle = Client::connect(server.address).await;
    idle.send(request(&["GET /post/a HTTP/1.1"], "")).await;
    idle.answer().await;
    let mut busy = Client::connect(server.address).await;
    busy.send(request(&["POST /post HTTP/1.1", FORM], GOOD))
        .await;
    asked.acquire().await.unwrap().forget();

    server.shutdown.cancel();
    assert_eq!(idle.rest().await, "");
    drop(idle);
    assert!(
        TcpStream::connect(server.address).await.is_err(),
        "the server still accepts"
    );
    permits.add_permits(1);
    assert!(busy.rest().await.starts_with("HTTP/1.1 201"));
    drop(busy);
    server.ended.await.unwrap();
}

#[tokio::test]
async fn a_server_that_stops_does_not_wait_for_ever() {
    let (log, asked, _permits) = Fault::slow();
    let mut short = limits();
    short.http.drain_timeout = Duration::from_millis(50);
    let server = Server::start(log, short).await;
    let mut stuck = Client::connect(server.address).await;
    stuck.send(post(GOOD)).await;
    asked.acquire().await.unwrap().forget();
    server.stop().await;
}

#[tokio::test]
async fn reads_answer_what_redis_holds() {
    let topic = unique();
    let url = variable("REDIS_URL");
    let server = Server::with(Fault::Away, limits(), &topic, &url).await;
    let mut redis = redis::Client::open(url)
        .unwrap()
        .get_multiplexed_async_connection()
        .await
        .unwrap();
    for (key, value) in [
        (format!("{topic}:über kafka"), r#"{"title":"Über"}"#),
        (format!("{topic}:uid:1"), r#"{"uid":"1"}"#),
        (format!("{topic}:empty"), ""),
    ] {
        redis::cmd("SET")
            .arg(key)
            .arg(value)
            .exec_async(&mut redis)
            .await
            .unwrap();
    }
    server
        .check(
            &get("/post/%C3%BCber%20kafka"),
            expect![[r#"
            HTTP/1.1 404 Not Found
            content-type: text/plain; charset=utf-8
            connection: close
            content-length: 9

            not found"#]],
        )
        .await;
    server
        .check(
            &get("/post/uid/1"),
            expect![[r#"
        HTTP/1.1 404 Not Found
        content-type: text/plain; charset=utf-8
        connection: close
        content-length: 9

        not found"#]],
        )
        .await;
    server
        .check(
            &get("/post/empty"),
            expect![[r#"
        HTTP/1.1 404 Not Found
        content-type: text/plain; charset=utf-8
        connection: close
        content-length: 9

        not found"#]],
        )
        .await;
    server
        .check(
            &get("/post/unknown?a=b"),
            expect![[r#"
        HTTP/1.1 404 Not Found
        content-type: text/plain; charset=utf-8
        connection: close
        content-length: 9

        not found"#]],
        )
        .await;
    server
        .check(
            &request(&["HEAD /post/uid/1 HTTP/1.1", CLOSE], ""),
            expect![[r#"
                HTTP/1.1 404 Not Found
                content-type: text/plain; charset=utf-8
                connection: close
                content-length: 9

            "#]],
        )
        .await;
    server.stop().await;
}

#[tokio::test]
async fn a_redis_that_is_away_is_worth_another_try() {
    let behind = variable("REDIS_URL");
    let behind = url::Url::parse(&behind).unwrap();
    let behind = format!(
        "{}:{}",
        behind.host_str().unwrap(),
        behind.port().unwrap_or(6379)
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("redis://{}", listener.local_addr().unwrap());
    let link = tokio::spawn(async move {
        let mut links = JoinSet::new();
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = TcpStream::connect(&behind).await.unwrap();
            links.spawn(async move { copy_bidirectional(&mut near, &mut far).await });
        }
    });
    let server = Server::with(Fault::Away, limits(), "topic", &url).await;
    assert!(
        exchange(server.address, &get("/post/unknown"))
            .await
            .starts_with("HTTP/1.1 404")
    );
    link.abort();
    assert!(link.await.unwrap_err().is_cancelled());
    server
        .check(
            &get("/post/unknown"),
            expect![[r#"
        HTTP/1.1 404 Not Found
        content-type: text/plain; charset=utf-8
        connection: close
        content-length: 9

        not found"#]],
        )
        .await;
    server.stop().await;
}
