//! The admin listener as operators and scrapers meet it.

use std::net::SocketAddr;
use std::sync::Arc;

use expect_test::{Expect, expect};
use host::admin::{self, Readiness};
use host::metrics::Metrics;
use host::pipeline::Secret;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::wire::{exchange, request};

struct Server {
    address: SocketAddr,
    readiness: Arc<Readiness>,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
    ended: JoinHandle<()>,
}

impl Server {
    async fn start(token: Option<Secret>) -> Self {
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

    async fn stop(self) {
        self.shutdown.cancel();
        self.ended.await.unwrap();
    }
}

fn get(path: &str, headers: &[&str]) -> String {
    let line = format!("GET {path} HTTP/1.1");
    request(
        &[&[line.as_str(), "connection: close"], headers].concat(),
        "",
    )
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
            &request(&["POST /metrics HTTP/1.1", "connection: close"], ""),
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
