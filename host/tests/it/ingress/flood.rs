//! A real host under clients that send as much as they may of what it does not want.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{Host, get, http};

/// Of the ingress, for a body.
const MAX_BODY: usize = 1 << 20;
const CONNECTIONS: usize = 50;
/// How long the clients send.
const FLOOD: Duration = Duration::from_secs(5);
/// `/healthz` at its worst. Without load it takes a few milliseconds; the clients share the machine's cores with the
/// host, and other tests do.
const WORST: Duration = Duration::from_millis(1000);
/// Half of the questions are answered within this.
const USUAL: Duration = Duration::from_millis(150);

const PIPELINE: &str = r#"
    name = "flood"
    kafka.brokers = "embedded"
    topics.posts.partitions = 1
    topics.posts.config = { "max.message.bytes" = 2097152 }
    kafka.properties = { "message.max.bytes" = 2097152 }
    admin.listen = "127.0.0.1:0"
    [http]
    listen = "127.0.0.1:0"
    [[http.routes]]
    path = "/post"
    method = "POST"
    produce = { topic = "posts", fields = ["title"] }
"#;

const JSON: &str = "application/json";
const FORM: &str = "application/x-www-form-urlencoded";

fn request(kind: &str, body: &str) -> String {
    format!(
        "POST /post HTTP/1.1\r\nhost: test\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Sends the request and reads the answer, over and over, on as many connections as may be; answers how often it was
/// answered so, and how long `/healthz` took meanwhile, sorted.
fn flood(host: &Host, request: &str, status: &str) -> (usize, Vec<Duration>) {
    let (ingress, admin) = (host.address("HTTP"), host.address("admin"));
    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let expected = format!("HTTP/1.1 {status} ");
    let mut took = Vec::new();
    thread::scope(|scope| {
        for _ in 0..CONNECTIONS {
            scope.spawn(|| {
                let mut stream = TcpStream::connect(&ingress).expect("a connection");
                let mut answer = [0; 4096];
                while !stop.load(Ordering::Relaxed) {
                    stream.write_all(request.as_bytes()).expect("it is read");
                    let read = stream.read(&mut answer).expect("an answer");
                    let answer = String::from_utf8_lossy(&answer[..read]);
                    assert!(answer.starts_with(&expected), "{answer}");
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let began = Instant::now();
        while began.elapsed() < FLOOD {
            let asked = Instant::now();
            assert_eq!(get(&admin, "/healthz").0, 200);
            took.push(asked.elapsed());
            thread::sleep(Duration::from_millis(10));
        }
        stop.store(true, Ordering::Relaxed);
    });
    took.sort();
    (answered.load(Ordering::Relaxed), took)
}

#[test]
fn bodies_that_are_refused_and_large_ones_that_are_not_hold_nobody_up() {
    let host = Host::start(PIPELINE);
    let keys: String = (0..80_000).map(|i| format!("\"k{i}\":\"\",")).collect();
    let pairs: String = (0..140_000).map(|i| format!("k{i}&")).collect();
    let escapes = "\\u0041".repeat(MAX_BODY / 6 - 10);
    let percents = "%41".repeat(MAX_BODY / 3 - 10);
    let cases = [
        ("unknown keys", JSON, format!("{{{keys}\"a\":1}}"), "400"),
        ("unknown fields", FORM, pairs, "400"),
        (
            "deep arrays",
            JSON,
            format!("{{\"title\":{}", "[".repeat(MAX_BODY - 20)),
            "400",
        ),
        (
            "wide objects",
            JSON,
            format!("{{\"title\":{{{keys}}}}}"),
            "400",
        ),
        ("whitespace", JSON, " ".repeat(MAX_BODY), "400"),
        ("one long name", JSON, format!("{{\"{escapes}\":1}}"), "400"),
        ("the same field", FORM, "title&".repeat(MAX_BODY / 6), "400"),
        (
            "a large text",
            JSON,
            format!("{{\"title\":\"{}\"}}", "x".repeat(900_000)),
            "202",
        ),
        (
            "escapes",
            JSON,
            format!("{{\"title\":\"{escapes}\"}}"),
            "202",
        ),
        ("percents", FORM, format!("title={percents}"), "202"),
    ];
    for (what, kind, body, status) in cases {
        assert!(body.len() <= MAX_BODY, "{what}");
        let (answered, took) = flood(&host, &request(kind, &body), status);
        let (middle, worst) = (took[took.len() / 2], took[took.len() - 1]);
        let late = took[took.len() * 99 / 100];
        println!(
            "{what}: {answered} answers; /healthz p50 {middle:?}, p99 {late:?}, worst {worst:?}"
        );
        assert!(answered > CONNECTIONS, "{what}: {answered}");
        assert!(
            middle < USUAL && worst < WORST,
            "{what}: {middle:?}, {worst:?}"
        );
    }
    assert!(host.stop().0.success());
}

#[test]
fn bodies_that_are_only_announced_or_come_by_bytes_turn_nobody_away() {
    let host = Host::start(PIPELINE);
    let (ingress, admin) = (host.address("HTTP"), host.address("admin"));
    let head = |length: &str| {
        format!("POST /post HTTP/1.1\r\nhost: test\r\ncontent-type: {FORM}\r\n{length}\r\n\r\n")
    };
    let announced = head("content-length: 1048576");
    let chunked = head("transfer-encoding: chunked") + "100000\r\n";
    // All but the last byte: together more than there is room for.
    let nearly = format!("{announced}{}", "x".repeat(MAX_BODY - 1));
    let mut held = Vec::new();
    for (sent, count) in [(&announced, 256), (&chunked, 128), (&nearly, 280)] {
        for _ in 0..count {
            let mut stream = TcpStream::connect(&ingress).expect("a connection");
            let _ = stream.set_write_timeout(Some(Duration::from_secs(5)));
            let _ = stream.write_all(sent.as_bytes());
            held.push(stream);
        }
        let small = "title=A".to_owned();
        let large = format!("title={}", "x".repeat(500_000));
        for body in [small, large] {
            let kind = format!("POST /post HTTP/1.1\r\ncontent-type: {FORM}");
            let (status, _, said) = http(&ingress, &kind, &body);
            assert_eq!(status, 202, "{} bytes: {said}", body.len());
        }
        for stream in &mut held {
            let _ = stream.write_all(b"t");
        }
        assert_eq!(get(&admin, "/healthz").0, 200);
    }
    drop(held);
    assert!(host.stop().0.success());
}

#[test]
fn a_body_in_crumbs_is_refused() {
    let host = Host::start(PIPELINE);
    let crumbs = "1\r\nx\r\n".repeat(MAX_BODY - 10);
    let request = format!(
        "POST /post HTTP/1.1\r\nhost: test\r\ncontent-type: {FORM}\r\ntransfer-encoding: chunked\r\n\r\n{crumbs}"
    );
    let mut stream = TcpStream::connect(host.address("HTTP")).expect("a connection");
    let _ = stream.write_all(request.as_bytes());
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(
        answer.ends_with("the body comes in too small pieces"),
        "{answer}"
    );
    assert!(host.stop().0.success());
}
