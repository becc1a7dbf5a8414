//! Connections: many, idle, slow and half-open ones, and those who must get in all the same.

use std::time::Duration;

use host::http;
use host::ingress::Limits;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::fixture::{FORM, Fault, GOOD, Server, get, limits, post, set};
use crate::support::{server, unique};
use crate::wire::{Client, exchange, request};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);

fn places(connections: usize, requests: usize) -> Limits {
    let mut limits = limits();
    limits.http.connections = connections;
    limits.http.requests = requests;
    limits
}

fn check_metrics(server: &Server, lines: &[&str]) {
    let text = server.metrics.encode().unwrap();
    for line in lines {
        assert!(text.contains(line), "no {line} in {text}");
    }
}

#[tokio::test]
async fn where_all_are_worked_for_the_next_is_sent_away() {
    let (log, asked, permits) = Fault::slow();
    let server = Server::start(log, places(2, 1)).await;
    let mut first = Client::connect(server.address).await;
    first.send(post(GOOD)).await;
    asked.acquire().await.unwrap().forget();
    let too_many = "503 [retry-after: 1] too many requests";
    server.check(&get("/post/a"), too_many).await;
    permits.add_permits(1);
    assert!(first.rest().await.starts_with("HTTP/1.1 201"));
    check_metrics(
        &server,
        &[
            r#"stagehost_http_requests_total{route="none",method="GET",status="503"} 1"#,
            r#"stagehost_http_requests_total{route="/post",method="POST",status="201"} 1"#,
            r#"stagehost_http_connections_turned_away_total{listener="http",reason="full"} 1"#,
        ],
    );
    server.stop().await;
}

#[tokio::test]
async fn the_longest_idle_connection_gives_way_to_a_new_one() {
    let server = Server::start(Fault::Away, places(2, 2)).await;
    let mut kept = Vec::new();
    for _ in 0..2 {
        let mut client = Client::connect(server.address).await;
        client.send(request(&["GET /post/a HTTP/1.1"], "")).await;
        client.answer().await;
        kept.push(client);
        sleep(Duration::from_millis(20)).await;
    }
    let [first, second] = &mut kept[..] else {
        panic!("two connections");
    };
    let mut third = Client::connect(server.address).await;
    assert_eq!(first.rest().await, "");
    for client in [second, &mut third] {
        client.send(request(&["GET /post/a HTTP/1.1"], "")).await;
        assert!(client.answer().await.starts_with("HTTP/1.1 404"));
    }
    check_metrics(
        &server,
        &[r#"stagehost_http_connections_turned_away_total{listener="http",reason="idle"} 1"#],
    );
    server.stop().await;
}

/// It looks idle only because nobody has looked at its socket: a new connection takes no place whose request lies there.
#[tokio::test]
async fn a_request_that_lies_in_its_socket_is_answered_before_its_place_is_taken() {
    let server = Server::start(Fault::Away, places(1, 1)).await;
    let mut idle = Client::connect(server.address).await;
    sleep(Duration::from_millis(20)).await;
    // The server runs on this thread, and sees both at once.
    std::thread::sleep(Duration::from_millis(100));
    let next = std::net::TcpStream::connect(server.address).expect("the kernel accepts");
    idle.send(request(&["GET /post/a HTTP/1.1"], "")).await;
    assert!(idle.answer().await.starts_with("HTTP/1.1 404"));
    next.set_nonblocking(true).expect("a socket");
    let mut next = Client::of(next);
    next.send(request(&["GET /post/a HTTP/1.1"], "")).await;
    let answer = timeout(PATIENCE, next.answer()).await;
    assert!(answer.unwrap().starts_with("HTTP/1.1 404"));
    server.stop().await;
}

#[tokio::test]
async fn connections_that_send_nothing_or_half_a_head_keep_nobody_out() {
    let server = Server::start(Fault::Away, places(10, 10)).await;
    let mut held = Vec::new();
    for sent in ["", "G", "GET /post/a HTTP/1.1\r\nhost: te", "\r\n"].repeat(50) {
        let mut client = Client::connect(server.address).await;
        client.try_send(sent).await;
        held.push(client);
    }
    for _ in 0..20 {
        let answer = timeout(PATIENCE, exchange(server.address, &get("/post/a"))).await;
        assert!(answer.unwrap().starts_with("HTTP/1.1 404"));
    }
    drop(held);
    server.stop().await;
}

#[tokio::test]
async fn requests_one_behind_the_other_keep_nobody_out() {
    let server = Server::start(Fault::Away, places(8, 2)).await;
    let (address, mut greedy) = (server.address, JoinSet::new());
    // As many as may be connected.
    for _ in 0..8 {
        greedy.spawn(async move {
            let many = request(&["GET /post/a HTTP/1.1"], "").repeat(1000);
            loop {
                let mut client = Client::connect(address).await;
                client.try_send(&many).await;
                client.some_rest().await;
            }
        });
    }
    for _ in 0..20 {
        let answer = timeout(PATIENCE, exchange(address, &get("/post/a"))).await;
        assert!(answer.unwrap().starts_with("HTTP/1.1 404"));
    }
    greedy.shutdown().await;
    server.stop().await;
}

#[tokio::test]
async fn slow_bodies_and_answers_give_way_where_all_places_are_taken() {
    // More than the kernel buffers for a sender.
    const LARGE: usize = 15 << 20;
    let topic = unique("test");
    let url = server("REDIS_URL");
    let server = Server::with(Fault::Away, places(2, 2), &topic, &url).await;
    set(&url, &format!("{topic}:large"), &"x".repeat(LARGE)).await;
    let mut sender = Client::connect(server.address).await;
    let half = post(GOOD);
    sender.send(&half[..half.len() - 2]).await;
    let mut taker = Client::connect_small(server.address).await;
    taker.send(get("/post/large")).await;
    taker.wait_for_byte().await;
    // Both are slow after a second, whatever they bring in meanwhile.
    sleep(Duration::from_millis(600)).await;
    sender.send(&half[half.len() - 2..half.len() - 1]).await;
    sleep(Duration::from_millis(600)).await;
    let mut kept = Vec::new();
    for _ in 0..2 {
        let mut client = Client::connect(server.address).await;
        client.send(request(&["GET /post/a HTTP/1.1"], "")).await;
        assert!(client.answer().await.starts_with("HTTP/1.1 404"));
        kept.push(client);
    }
    check_metrics(
        &server,
        &[r#"stagehost_http_connections_turned_away_total{listener="http",reason="stalled"} 2"#],
    );
    server.stop().await;
}

/// Its place and its room would be given to others before it is taken: behind what is left of the body, the next request is
/// looked for.
#[tokio::test]
async fn a_large_answer_whose_request_has_a_body_left_is_the_last_one() {
    const LARGE: usize = 1 << 20;
    let topic = unique("test");
    let url = server("REDIS_URL");
    let server = Server::with(Fault::Away, limits(), &topic, &url).await;
    set(&url, &format!("{topic}:large"), &"x".repeat(LARGE)).await;
    let with_body = request(&["GET /post/large HTTP/1.1"], "x");
    let answer = timeout(PATIENCE, exchange(server.address, &with_body)).await;
    let answer = answer.expect("it ends");
    assert!(answer.contains("connection: close") && answer.len() > LARGE);
    server.stop().await;
}

#[tokio::test]
async fn a_client_that_takes_a_byte_now_and_then_is_let_go() {
    const LARGE: usize = 15 << 20;
    let topic = unique("test");
    let url = server("REDIS_URL");
    let mut short = limits();
    short.http.write_timeout = Duration::from_millis(200);
    short.http.drain_timeout = PATIENCE * 10;
    let server = Server::with(Fault::Away, short, &topic, &url).await;
    set(&url, &format!("{topic}:large"), &"x".repeat(LARGE)).await;
    let mut client = Client::connect_small(server.address).await;
    client.send(get("/post/large")).await;
    client.wait_for_byte().await;
    server.shutdown.cancel();
    let drip = async {
        loop {
            client.byte().await;
            sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        ended = timeout(PATIENCE, server.ended) => ended.expect("it is let go").unwrap(),
        () = drip => {}
    }
}

#[tokio::test]
async fn answers_that_are_not_taken_give_their_room_to_others() {
    const LARGE: usize = 15 << 20;
    let topic = unique("test");
    let url = server("REDIS_URL");
    let mut narrow = limits();
    narrow.http.answer_bytes = LARGE + 1000;
    let server = Server::with(Fault::Away, narrow, &topic, &url).await;
    set(&url, &format!("{topic}:large"), &"x".repeat(LARGE)).await;
    let mut first = Client::connect_small(server.address).await;
    first.send(get("/post/large")).await;
    first.wait_for_byte().await;
    let no_room = "503 [retry-after: 1] too many large answers wait for their clients";
    server.check(&get("/post/large"), no_room).await;
    server.check(&get("/post/small"), "404 not found").await;
    sleep(Duration::from_millis(1200)).await;
    for _ in 0..3 {
        let mut client = Client::connect(server.address).await;
        client
            .send(request(&["GET /post/large HTTP/1.1"], ""))
            .await;
        let mut taken = 0;
        while taken < LARGE {
            taken += client.some().await;
        }
    }
    server.stop().await;
    assert!(first.some_rest().await < LARGE, "it was let go");
}

#[tokio::test]
async fn announced_bodies_take_no_room() {
    let mut narrow = places(300, 300);
    narrow.http.body_bytes = 0;
    narrow.http.own_bytes = 16;
    let server = Server::start(Fault::Away, narrow).await;
    let mut held = Vec::new();
    for (count, chunked) in [(200, false), (50, true)] {
        let length = ["content-length: 1024", "transfer-encoding: chunked"][usize::from(chunked)];
        let head = request(&["POST /post HTTP/1.1", FORM, length], "");
        for sent in ["", "1\r\nt"].into_iter().cycle().take(count) {
            let mut client = Client::connect(server.address).await;
            client.send(format!("{head}{sent}")).await;
            held.push(client);
        }
    }
    let largest = post(&format!("{GOOD}{}", "x".repeat(1024 - GOOD.len())));
    for _ in 0..10 {
        server
            .check(&largest, "503 [retry-after: 1] the log is not available")
            .await;
    }
    drop(held);
    server.stop().await;
}

#[tokio::test]
async fn a_body_that_comes_slowly_gives_its_room_to_others() {
    let mut narrow = limits();
    // That is four of the largest bodies.
    narrow.http.body_bytes = 0;
    let server = Server::start(Fault::Away, narrow).await;
    let largest = post(&format!("{GOOD}{}", "x".repeat(1024 - GOOD.len())));
    let mut slow = Vec::new();
    for _ in 0..4 {
        let mut client = Client::connect(server.address).await;
        client.send(&largest[..largest.len() - 1]).await;
        slow.push(client);
    }
    sleep(Duration::from_millis(1200)).await;
    server
        .check(&largest, "503 [retry-after: 1] the log is not available")
        .await;
    let mut told = 0;
    for mut client in slow {
        let answer = timeout(Duration::from_millis(500), client.rest()).await;
        told += usize::from(answer.is_ok_and(|answer| answer.contains("too many requests send")));
    }
    assert_eq!(told, 1, "one of them has made room");
    server.stop().await;
}

#[tokio::test]
async fn chunks_are_what_they_should_be() {
    let server = Server::start(Fault::Away, limits()).await;
    let chunked = request(
        &["POST /post HTTP/1.1", FORM, "transfer-encoding: chunked"],
        "",
    );
    let long = "x".repeat(20_000);
    for (body, why) in [
        (format!("1;{long}\r\nx\r\n"), "chunk extensions over limit"),
        (
            format!("0\r\na: {long}\r\n\r\n"),
            "chunk trailers bytes over limit",
        ),
        (
            "1\nx\r\n".to_owned(),
            "Invalid chunk size line: Invalid Size",
        ),
        (
            "1;a\nx\r\n".to_owned(),
            "invalid chunk extension contains newline",
        ),
        (
            "ffffffffffffffffff\r\n".to_owned(),
            "invalid chunk size: overflow",
        ),
        (
            "-1\r\n".to_owned(),
            "Invalid chunk size line: missing size digit",
        ),
        ("2\r\nxxx\r\n".to_owned(), "Invalid chunk body CR"),
    ] {
        server
            .check(
                &format!("{chunked}{body}"),
                &format!("400 the body could not be read: {why}"),
            )
            .await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_head_has_an_end() {
    let server = Server::start(Fault::Away, limits()).await;
    let long = format!("x: {}", "x".repeat(70_000));
    server
        .check(
            &request(&["GET /post/a HTTP/1.1", &long], ""),
            "431 the head is too large",
        )
        .await;
    let many = "x: y\r\n".repeat(200);
    server
        .check(
            &format!("GET /post/a HTTP/1.1\r\n{many}host: test\r\n\r\n"),
            "431 the head has too many lines",
        )
        .await;
    check_metrics(
        &server,
        &[r#"stagehost_http_requests_total{route="none",method="other",status="431"} 2"#],
    );
    server.stop().await;
}

#[tokio::test]
async fn half_a_head_and_then_silence_is_let_go() {
    let quick = Limits {
        http: http::Limits {
            header_timeout: Duration::from_secs(1),
            ..limits().http
        },
        ..limits()
    };
    let server = Server::start(Fault::Away, quick).await;
    let mut client = Client::connect(server.address).await;
    let head = request(&["GET /post/a HTTP/1.1"], "");
    let drip = async {
        for byte in head.bytes().take(head.len() - 1) {
            client.try_send([byte]).await;
            sleep(Duration::from_millis(100)).await;
        }
        client.ended().await
    };
    assert!(timeout(PATIENCE, drip).await.expect("it is let go"));
    server.stop().await;
}
