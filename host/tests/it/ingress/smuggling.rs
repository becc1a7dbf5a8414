//! Requests that a proxy in front of the host could understand differently, so that a second one hides in the first.

use super::fixture::{CLOSE, FORM, Fault, GOOD, Server, get, limits};
use crate::wire::{Client, exchange, request};

/// What would be answered if it were taken for a request.
const SMUGGLED: &str = "GET /nowhere HTTP/1.1\r\nhost: test\r\n\r\n";

/// Heads without their last empty line, and why they are refused.
const REFUSED: &[(&str, &str)] = &[
    (
        "POST /post HTTP/1.1\r\nhost: test\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n",
        "there are both content-length and transfer-encoding",
    ),
    (
        "POST /post HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n",
        "there are both content-length and transfer-encoding",
    ),
    (
        "POST /post HTTP/1.1\r\nhost: test\r\ncontent-length: 3\r\ncontent-length: 3\r\n",
        "there is more than one content-length",
    ),
    (
        "POST /post HTTP/1.1\r\nhost: test\r\ncontent-length: 3\r\nContent-Length: 4\r\n",
        "there is more than one content-length",
    ),
    (
        "POST /post HTTP/1.1\r\nhost: test\r\ncontent-length: 3, 3\r\n",
        "the content-length is not a number",
    ),
    (
        "POST /post HTTP/1.1\r\nhost: test\r\ncontent-length: +3\r\n",
        "the content-length is not a number",
    ),
    (
        "POST /post HTTP/1.1\r\nhost: test\r\ntransfer-encoding: gzip, chunked\r\n",
        "the transfer-encoding is not `chunked`",
    ),
    (
        "POST /post HTTP/1.1\r\nhost: test\r\ntransfer-encoding: identity\r\n",
        "the transfer-encoding is not `chunked`",
    ),
    (
        "POST /post HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
        "there is more than one transfer-encoding",
    ),
    (
        "POST /post HTTP/1.0\r\nhost: test\r\ntransfer-encoding: chunked\r\n",
        "HTTP/1.0 has no transfer-encoding",
    ),
    (
        "GET /healthz HTTP/1.1\r\nhost: test\r\nhost: test\r\n",
        "there is more than one host",
    ),
    (
        "GET /healthz HTTP/1.1\r\naccept: */*\r\n",
        "the host is missing",
    ),
    (
        "GET http://other/healthz HTTP/1.1\r\nhost: test\r\n",
        "the target names another host than the header does",
    ),
    (
        "GET test/healthz HTTP/1.1\r\nhost: test\r\n",
        "the target is not a path",
    ),
    (
        "CONNECT test:80 HTTP/1.1\r\nhost: test:80\r\n",
        "the target is not a path",
    ),
    (
        "GET /healthz HTTP/1.1\nhost: test\r\n",
        "a line of the head ends with a bare LF",
    ),
    (
        "GET /healthz HTTP/1.1\r\nhost: test\n",
        "a line of the head ends with a bare LF",
    ),
    (
        "\nGET /healthz HTTP/1.1\r\nhost: test\r\n",
        "a line of the head ends with a bare LF",
    ),
    (
        "GET /healthz HTTP/1.1\r\nhost: test\r\nx: a\rb: c\r\n",
        "the head has a bare CR",
    ),
    (
        "GET /healthz HTTP/1.1\r\nhost: test\r\nx: a\0b\r\n",
        "a header has a control character",
    ),
    (
        "GET /healthz HTTP/1.1\r\nhost: test\r\nx: a\r\n b\r\n",
        "a line of the head has no colon",
    ),
    (
        "GET /healthz HTTP/1.1\r\nhost: test\r\nx: a\r\n b: c\r\n",
        "the name of a header is not a word",
    ),
    (
        "POST /post HTTP/1.1\r\nhost: test\r\ncontent-length : 3\r\n",
        "the name of a header is not a word",
    ),
    (
        "GET /healthz HTTP/1.1 \r\nhost: test\r\n",
        "the request line is not `METHOD TARGET VERSION`",
    ),
    (
        "GET /healthz HTTP/1.2\r\nhost: test\r\n",
        "the version is none of HTTP/1.0 and HTTP/1.1",
    ),
];

/// Refused with 400, whatever follows is not answered, and the connection ends.
async fn check(address: std::net::SocketAddr, head: &str, why: &str) {
    let head = head.replace("test", &address.to_string());
    let fine = format!("GET /nowhere HTTP/1.1\r\nhost: {address}\r\n\r\n");
    for before in [0, 1, 2] {
        let sent = format!("{}{head}\r\nabc{SMUGGLED}{SMUGGLED}", fine.repeat(before));
        let answers = exchange(address, &sent).await;
        let statuses = answers.matches("HTTP/1.1 4").count();
        assert_eq!(statuses, before + 1, "{head:?} after {before}: {answers}");
        let last = answers.rsplit("HTTP/1.1 4").next().unwrap();
        let is_refused = last.starts_with("00 ") && last.ends_with(why);
        assert!(is_refused, "{head:?} after {before}: {answers}");
        assert!(last.contains("\nconnection: close\n"), "{answers}");
    }
}

#[tokio::test]
async fn what_a_proxy_could_read_differently_is_refused() {
    let server = Server::start(Fault::Away, limits()).await;
    for (head, why) in REFUSED {
        check(server.address, head, why).await;
    }
    let count = 3 * REFUSED.len();
    let line = format!(
        r#"stagehost_http_requests_total{{route="none",method="other",status="400"}} {count}"#
    );
    let text = server.metrics.encode().unwrap();
    assert!(text.contains(&line), "no {line} in {text}");
    server.stop().await;
}

#[tokio::test]
async fn the_admin_listener_refuses_the_same() {
    let server = crate::admin::Server::start(None).await;
    for (head, why) in REFUSED {
        check(server.address, head, why).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_head_is_refused_however_it_is_cut() {
    let server = Server::start(Fault::Away, limits()).await;
    let head = "GET /post/a HTTP/1.1\r\nhost: test\nx: y\r\n\r\n";
    for cut in 1..head.len() {
        let mut client = Client::connect(server.address).await;
        client.send(&head[..cut]).await;
        tokio::task::yield_now().await;
        client.try_send(&head[cut..]).await;
        let answer = client.rest().await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{cut}: {answer}");
    }
    server.stop().await;
}

#[tokio::test]
async fn requests_one_behind_the_other_keep_their_ends() {
    let server = Server::start(Fault::Away, limits()).await;
    let form = request(&["POST /post HTTP/1.1", FORM], GOOD);
    let ignored = request(&["DELETE /post HTTP/1.1", FORM], "GET / HTTP/1.1\r\n");
    let read = request(&["GET http://TEST/post/a HTTP/1.1"], "");
    let last = get("/post/b");
    let check = async |all: &str, step: usize, expected: &[&str]| {
        let mut client = Client::connect(server.address).await;
        for part in all.as_bytes().chunks(step) {
            client.send(part).await;
        }
        let answers = client.rest().await;
        let answers = answers.split("HTTP/1.1 ").skip(1);
        let statuses: Vec<&str> = answers.map(|answer| &answer[..3]).collect();
        assert_eq!(statuses, expected, "in steps of {step}");
    };
    let all = format!("\r\n{form}\r\n{read}{form}{last}");
    for step in [1, 7, 64, all.len()] {
        check(&all, step, &["503", "404", "503", "404"]).await;
    }
    // A body that nobody reads is no request.
    let all = format!("{ignored}{form}{last}");
    check(&all, all.len(), &["405", "503", "404"]).await;
    server.stop().await;
}

#[tokio::test]
async fn nothing_is_read_behind_a_body_in_chunks() {
    let server = Server::start(Fault::Away, limits()).await;
    for line in [
        "POST /post HTTP/1.1",
        "GET /post/a HTTP/1.1",
        "POST /nowhere HTTP/1.1",
    ] {
        let chunked = request(&[line, FORM, "transfer-encoding: chunked"], "");
        let body = format!("11\r\n{GOOD}\r\n0\r\n\r\n");
        let answers = exchange(server.address, &format!("{chunked}{body}{SMUGGLED}")).await;
        assert_eq!(answers.matches("HTTP/1.1").count(), 1, "{answers}");
        assert!(answers.contains("\nconnection: close\n"), "{answers}");
    }
    // HTTP/1.0 needs no host.
    let old = format!("GET /post/a HTTP/1.0\r\n{CLOSE}\r\n\r\n");
    let answer = exchange(server.address, &old).await;
    assert!(answer.starts_with("HTTP/1.0 404"), "{answer}");
    server.stop().await;
}
