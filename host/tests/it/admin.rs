//! The admin listener as operators and scrapers meet it.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use expect_test::{Expect, expect};
use host::admin;
use host::metrics::Metrics;
use host::pipeline::Secret;
use host::readiness::Readiness;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::support::{self, Host};
use crate::wire::{Client, exchange};

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    readiness: Arc<Readiness>,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
    ended: JoinHandle<()>,
}

impl Server {
    pub(crate) async fn start(token: Option<Secret>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (readiness, metrics) = (Arc::new(Readiness::default()), Arc::new(Metrics::default()));
        let shutdown = CancellationToken::new();
        let serving = admin::serve(
            listener,
            token,
            Arc::clone(&readiness),
            Arc::clone(&metrics),
            shutdown.clone(),
        );
        let ended = tokio::spawn(serving);
        Self {
            address,
            readiness,
            metrics,
            shutdown,
            ended,
        }
    }

    async fn get(&self, path: &str) -> String {
        exchange(self.address, &get(path, &[])).await
    }

    async fn check(&self, request: &str, expected: Expect) {
        expected.assert_eq(&exchange(self.address, request).await);
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        self.ended.await.unwrap();
    }
}

fn get(path: &str, headers: &[&str]) -> String {
    ask(&format!("GET {path}"), "localhost:9321", headers)
}

fn ask(what: &str, host: &str, headers: &[&str]) -> String {
    let headers: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
    format!("{what} HTTP/1.1\r\nconnection: close\r\nhost: {host}\r\n{headers}\r\n")
}

#[tokio::test]
async fn health_and_readiness() {
    let server = Server::start(None).await;
    server
        .check(
            &get("/healthz", &[]),
            expect![[r#"
        HTTP/1.1 200 OK
        content-type: text/plain; charset=utf-8
        connection: close
        content-length: 3

        ok
    "#]],
        )
        .await;
    server
        .check(
            &get("/readyz", &[]),
            expect![[r#"
        HTTP/1.1 200 OK
        content-type: text/plain; charset=utf-8
        connection: close
        content-length: 6

        ready
    "#]],
        )
        .await;
    server.readiness.not_ready("stage publisher", "starting");
    server
        .readiness
        .not_ready("log", "no broker:\n  connection refused");
    server
        .check(
            &get("/readyz", &[]),
            expect![[r#"
        HTTP/1.1 503 Service Unavailable
        content-type: text/plain; charset=utf-8
        connection: close
        content-length: 61

        log: no broker: connection refused
        stage publisher: starting
    "#]],
        )
        .await;
    server.readiness.ready("log");
    server.readiness.ready("stage publisher");
    assert!(server.get("/readyz").await.starts_with("HTTP/1.1 200"));
    server
        .check(
            &get("/", &[]),
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
            &ask("POST /metrics", "localhost", &[]),
            expect![[r#"
                HTTP/1.1 405 Method Not Allowed
                content-type: text/plain; charset=utf-8
                allow: GET, HEAD
                connection: close
                content-length: 38

                method not allowed; allowed: GET, HEAD"#]],
        )
        .await;
    server.stop().await;
}

#[tokio::test]
async fn metrics_are_there_to_scrape() {
    let server = Server::start(None).await;
    server.metrics.stage("publisher").messages("done", 2);
    let answer = server.get("/metrics").await;
    for part in [
        "HTTP/1.1 200 OK\n",
        "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\n",
        "\nstagehost_messages_total{stage=\"publisher\",outcome=\"done\"} 2\n",
        "\n# EOF\n",
    ] {
        assert!(answer.contains(part), "no {part:?} in {answer}");
    }
    server.stop().await;
}

#[tokio::test]
async fn a_token_is_asked_for_where_there_is_one() {
    // As a file has it.
    let server = Server::start(Some(Secret::new(" s3cret\n"))).await;
    for path in ["/healthz", "/readyz", "/metrics"] {
        for wrong in [
            "x: y",
            "authorization: Bearer s3cre",
            "authorization: Basic s3cret",
            "authorization: Bearer",
        ] {
            let answer = exchange(server.address, &get(path, &[wrong])).await;
            assert!(
                answer.starts_with("HTTP/1.1 401"),
                "{path} with {wrong}: {answer}"
            );
        }
        let answer = exchange(
            server.address,
            &get(path, &["Authorization: bearer s3cret"]),
        )
        .await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
    }
    server
        .check(
            &get("/metrics", &[]),
            expect![[r#"
        HTTP/1.1 401 Unauthorized
        content-type: text/plain; charset=utf-8
        www-authenticate: Bearer
        connection: close
        content-length: 35

        the admin token is missing or wrong"#]],
        )
        .await;
    server.stop().await;
}

const PATHS: [&str; 5] = ["/healthz", "/readyz", "/metrics", "/v1/stages", "/nowhere"];

#[tokio::test]
async fn without_a_token_only_loopback_names_are_answered() {
    let server = Server::start(None).await;
    for host in [
        "127.0.0.1",
        "127.0.0.1:9321",
        "127.9.9.9",
        "[::1]:80",
        "LOCALHOST",
    ] {
        let answer = exchange(server.address, &ask("GET /healthz", host, &[])).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{host}: {answer}");
    }
    for host in [
        "evil.example",
        "evil.example:9321",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "128.0.0.1",
        "0.0.0.0",
        "[::2]",
        "",
    ] {
        for path in PATHS {
            let answer = exchange(server.address, &ask(&format!("GET {path}"), host, &[])).await;
            assert!(
                answer.starts_with("HTTP/1.1 421"),
                "{host} {path}: {answer}"
            );
            assert!(answer.contains("loopback names only"), "{answer}");
        }
    }
    let text = server.metrics.encode().unwrap();
    let line = r#"stagehost_http_requests_total{route="admin",method="GET",status="421"} 40"#;
    assert!(text.contains(line), "no {line} in {text}");
    // A load balancer's check; no browser can send it.
    let answer = exchange(server.address, "GET /healthz HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn with_a_token_any_name_is_answered_to_those_who_carry_it() {
    let server = Server::start(Some(Secret::new("s3cret"))).await;
    let token = "authorization: Bearer s3cret";
    for host in ["admin.example:9321", "10.0.0.1", "localhost"] {
        let answer = exchange(server.address, &ask("GET /healthz", host, &[token])).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{host}: {answer}");
        let answer = exchange(server.address, &ask("GET /healthz", host, &[])).await;
        assert!(answer.starts_with("HTTP/1.1 401"), "{host}: {answer}");
    }
    server.stop().await;
}

#[tokio::test]
async fn pages_of_other_origins_are_refused() {
    let token = "authorization: Bearer s3cret";
    for secret in [None, Some(Secret::new("s3cret"))] {
        let server = Server::start(secret).await;
        for (from, status) in [
            (&["origin: http://evil.example"][..], 403),
            (&["origin: null"], 403),
            (&["origin: http://localhost:3000"], 403),
            (
                &["sec-fetch-site: cross-site", "sec-fetch-mode: no-cors"],
                403,
            ),
            (
                &[
                    "origin: http://localhost:9321",
                    "sec-fetch-site: same-origin",
                ],
                200,
            ),
            (&["sec-fetch-site: none"], 200),
        ] {
            for path in &PATHS[..3] {
                let answer = exchange(server.address, &get(path, &[&[token], from].concat())).await;
                let expected = format!("HTTP/1.1 {status}");
                assert!(answer.starts_with(&expected), "{from:?} {path}: {answer}");
            }
        }
        server.stop().await;
    }
}

/// A host with nothing but its admin listener and an ingress.
const IDLE: &str = r#"
    name = "idle"
    kafka.brokers = "embedded"
    topics.posts.partitions = 1
    admin.listen = "127.0.0.1:0"
    [http]
    listen = "127.0.0.1:0"
    [[http.routes]]
    path = "/post"
    method = "POST"
    produce = { topic = "posts", fields = ["title"] }
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_connections_keep_no_operator_out() {
    /// More than the admin listener has places.
    const HELD: usize = 400;
    let host = Host::start(IDLE);
    let admin = host.address("admin");
    let address: SocketAddr = admin.parse().unwrap();
    let mut held = VecDeque::new();
    let pipelined = format!("GET /metrics HTTP/1.1\r\nhost: {address}\r\n\r\n").repeat(2000);
    for sent in ["", "GET /healthz HTTP/1.1\r\n", &pipelined, "\r\n"].repeat(250) {
        let mut client = Client::connect_small(address).await;
        // One that takes no answers is not read from, either.
        let _ = timeout(Duration::from_millis(20), client.try_send(sent)).await;
        held.push_back(client);
        // The host has let the first ones go long since, and this process may have no more than 1,024 files open.
        if held.len() > HELD {
            held.pop_front();
        }
    }
    for _ in 0..10 {
        for path in ["/healthz", "/readyz", "/metrics"] {
            let (status, body) = support::get(&admin, path);
            assert_eq!(status, 200, "{path}: {body}");
        }
    }
    let (_, metrics) = support::get(&admin, "/metrics");
    let line = r#"stagehost_http_connections_turned_away_total{listener="admin",reason="idle"}"#;
    assert!(metrics.contains(line), "{metrics}");
    let log = host.log();
    let said = log.matches("all places are taken").count();
    assert!((1..20).contains(&said), "said {said} times: {log}");
    drop(held);
    assert!(host.stop().0.success());
}
