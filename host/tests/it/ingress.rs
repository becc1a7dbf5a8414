//! The HTTP ingress as clients meet it: over sockets, on a real log and a real Redis.

#[path = "ingress/connections.rs"]
mod connections;
#[path = "ingress/fixture.rs"]
mod fixture;
#[path = "ingress/flood.rs"]
mod flood;
#[path = "ingress/smuggling.rs"]
mod smuggling;

use std::time::Duration;

use expect_test::expect;
use host::http;
use host::ingress::Limits;
use host::record::Header;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::{Host, http as http_of, server, unique};
use crate::wire::{Client, exchange, request};
use fixture::{CLOSE, FORM, Fault, GOOD, JSON, Server, Topic, get, limits, post, set};

#[tokio::test]
async fn a_form_and_json_make_the_same_record() {
    let topic = Topic::create().await;
    let server = Server::with(
        topic.producer(),
        limits(),
        &topic.name,
        &server("REDIS_URL"),
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
        &server("REDIS_URL"),
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
    let properties = &mut topic.settings.properties;
    properties.insert("message.max.bytes".to_owned(), "1000".to_owned());
    let redis = server("REDIS_URL");
    let server = Server::with(topic.producer(), limits(), &topic.name, &redis).await;
    let body = format!("title=A&content={}", "x".repeat(1000));
    server
        .check(&post(&body), "413 the record is larger than the log takes")
        .await;
    assert!(
        exchange(server.address, &post(GOOD))
            .await
            .starts_with("HTTP/1.1 201")
    );
    server.stop().await;
}

/// librdkafka's own limit is a little lower than Kafka's.
#[tokio::test(flavor = "multi_thread")]
async fn a_post_may_be_as_large_as_its_topic_takes() {
    let (topic, brokers) = (unique("large"), server("KAFKA_BROKERS"));
    let host = Host::start(&format!(
        r#"
        name = "large"
        [kafka]
        brokers = "{brokers}"
        [topics."{topic}"]
        [http]
        listen = "127.0.0.1:0"
        [[http.routes]]
        path = "/post"
        method = "POST"
        produce = {{ topic = "{topic}", fields = ["n"] }}
        [admin]
        listen = "127.0.0.1:0"
        "#
    ));
    host.ready();
    let form = "content-type: application/x-www-form-urlencoded";
    let head = format!("POST /post HTTP/1.1\r\n{form}");
    let body = format!("n={}", "x".repeat(1_020_000));
    let (status, _, said) = http_of(&host.address("HTTP"), &head, &body);
    assert_eq!(status, 202, "{said}");
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
    let send = |kind, body| request(&["POST /post HTTP/1.1", kind, CLOSE], body);
    let chunked = send("transfer-encoding: chunked", "").replace(CLOSE, FORM) + "zz\r\n";
    let cases = [
        (
            post("title=A&uid=1"),
            r#"400 the field "uid" is unknown; the fields are "title", "content""#,
        ),
        (
            send(JSON, r#"{"title":1}"#),
            r#"400 the JSON is wrong: the field "title" is a number, and must be a string at line 1 column 10"#,
        ),
        (
            send("content-type: text/xml", "<a/>"),
            r#"415 the content-type "text/xml" is not taken: send application/x-www-form-urlencoded or application/json"#,
        ),
        (
            send("accept: */*", "a"),
            "415 the content-type is missing: send application/x-www-form-urlencoded or application/json",
        ),
        (get("/nowhere"), "404 not found"),
        (get("/post/"), "404 not found"),
        (
            get("/post"),
            "405 [allow: POST] method not allowed; allowed: POST",
        ),
        (
            request(&["DELETE /post/a HTTP/1.1", CLOSE], ""),
            "405 [allow: GET, HEAD] method not allowed; allowed: GET, HEAD",
        ),
        (
            get("/post/a%00b"),
            "400 slug in the path has a control character",
        ),
        (get("/post/%ff"), "400 slug in the path is not UTF-8"),
        (
            "nonsense\r\n\r\n".to_owned(),
            "400 the request line is not `METHOD TARGET VERSION`",
        ),
        (
            chunked,
            "400 the body could not be read: Invalid chunk size line: missing size digit",
        ),
    ];
    for (request, expected) in cases {
        server.check(&request, expected).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_large_body_is_refused_and_its_sender_told() {
    let server = Server::start(Fault::Away, limits()).await;
    let too_large = "413 the body is larger than 1024 bytes";
    // One that fits gets as far as the log.
    let fits = format!(
        "title=A&content={}",
        "x".repeat(1024 - "title=A&content=".len())
    );
    server
        .check(
            &post(&fits),
            "503 [retry-after: 1] the log is not available",
        )
        .await;
    server.check(&post(&format!("{fits}x")), too_large).await;
    // Refused by its length alone: the body is never sent.
    let announced = request(
        &["POST /post HTTP/1.1", JSON, "content-length: 99999999"],
        "",
    );
    server.check(&announced, too_large).await;
    // Sent to the end, much of it, without a word about its length.
    let mut chunked = request(
        &["POST /post HTTP/1.1", FORM, "transfer-encoding: chunked"],
        "",
    );
    for _ in 0..4096 {
        chunked.push_str(&format!("400\r\n{}\r\n", "x".repeat(1024)));
    }
    chunked.push_str("0\r\n\r\n");
    server.check(&chunked, too_large).await;
    server.stop().await;
}

#[tokio::test]
async fn faults_of_the_log_are_not_the_clients() {
    let quick = Limits {
        log_timeout: Duration::from_millis(50),
        ..limits()
    };
    let cases = [
        (Fault::Away, "503 [retry-after: 1] the log is not available"),
        (
            Fault::slow().0,
            "503 [retry-after: 1] the log has not acknowledged in time; the record may still arrive",
        ),
        (Fault::Refusing, "500 the log refused the record"),
        (Fault::Panicking, "500 internal error"),
    ];
    for (log, expected) in cases {
        let server = Server::start(log, quick).await;
        server.check(&post(GOOD), expected).await;
        server.check(&get("/post/unknown"), "404 not found").await;
        server.stop().await;
    }
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
            "503 [retry-after: 1] too many requests wait for the log",
        )
        .await;
    permits.add_permits(1);
    assert!(first.rest().await.starts_with("HTTP/1.1 201"));
    server.stop().await;
}

#[tokio::test]
async fn a_body_without_room_is_worth_another_try() {
    let (log, asked, permits) = Fault::slow();
    let mut narrow = limits();
    // Less than four of the largest bodies, which is what there is room for in any case.
    narrow.http.body_bytes = 0;
    let server = Server::start(log, narrow).await;
    let largest = format!("{GOOD}{}", "x".repeat(1024 - GOOD.len()));
    let mut clients = Vec::new();
    for _ in 0..4 {
        let mut client = Client::connect(server.address).await;
        client.send(post(&largest)).await;
        clients.push(client);
    }
    asked.acquire_many(4).await.unwrap().forget();
    let no_room = "503 [retry-after: 1] too many requests send their bodies";
    server.check(&post(GOOD), no_room).await;
    let chunked = request(
        &["POST /post HTTP/1.1", FORM, "transfer-encoding: chunked"],
        "",
    );
    server.check(&(chunked + "1\r\nx\r\n"), no_room).await;
    permits.add_permits(5);
    for mut client in clients {
        assert!(client.rest().await.starts_with("HTTP/1.1 201"));
    }
    let answer = exchange(server.address, &post(GOOD)).await;
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn slow_and_silent_clients_are_let_go() {
    // Long enough for a whole head to come in on a busy machine.
    let second = Duration::from_secs(1);
    let check = async |http: http::Limits, sent: &str, expected: &str| {
        let server = Server::start(Fault::Away, Limits { http, ..limits() }).await;
        server.check(sent, expected).await;
        server.stop().await;
    };
    let slow_body = http::Limits {
        body_timeout: second,
        ..limits().http
    };
    let half = post(GOOD);
    check(
        slow_body,
        &half[..half.len() - 1],
        "408 the body took too long",
    )
    .await;
    let slow_pace = http::Limits {
        body_window: second,
        ..limits().http
    };
    check(
        slow_pace,
        &half[..half.len() - 1],
        "408 the body came too slowly",
    )
    .await;
    let slow_head = http::Limits {
        header_timeout: second,
        ..limits().http
    };
    check(slow_head, "", "").await;
    check(slow_head, "POST /post HTTP/1.1\r\nhost:", "").await;
    // Idle after an answer.
    check(
        slow_head,
        &request(&["GET /post/a HTTP/1.1"], ""),
        "404 not found",
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
async fn a_client_that_does_not_read_is_let_go() {
    // More than the kernel buffers for a sender.
    const LARGE: usize = 15 << 20;
    let topic = unique("test");
    let url = server("REDIS_URL");
    let mut short = limits();
    short.http.write_timeout = Duration::from_millis(50);
    // A connection that is held on to would hold the server, too.
    short.http.drain_timeout = Duration::from_secs(3600);
    let server = Server::with(Fault::Away, short, &topic, &url).await;
    set(&url, &format!("{topic}:large"), &"x".repeat(LARGE)).await;
    let mut client = Client::connect_small(server.address).await;
    client.send(get("/post/large")).await;
    client.wait_for_byte().await;
    server.stop().await;
    let rest = client.rest().await;
    assert!(rest.starts_with("HTTP/1.1 200"), "{rest:.300}");
    assert!(rest.len() < LARGE);
}

#[tokio::test]
async fn reads_answer_what_redis_holds() {
    let topic = unique("test");
    let url = server("REDIS_URL");
    let server = Server::with(Fault::Away, limits(), &topic, &url).await;
    let kept = [
        ("über kafka", r#"{"title":"Über"}"#),
        ("uid:1", r#"{"uid":"1"}"#),
        ("empty", ""),
        ("latest", "1"),
        ("a%3Ab", "2"),
    ];
    for (key, value) in kept {
        set(&url, &format!("{topic}:{key}"), value).await;
    }
    let json = "200 [content-type: application/json]";
    let cases = [
        (
            get("/post/%C3%BCber%20kafka"),
            format!(r#"{json} {{"title":"Über"}}"#),
        ),
        (get("/post/uid/1"), format!(r#"{json} {{"uid":"1"}}"#)),
        (get("/post/empty"), format!("{json} ")),
        (get("/post/unknown?a=b"), "404 not found".to_owned()),
        (get("/latest"), format!("{json} 1")),
        // Decoded once.
        (get("/post/a%253Ab"), format!("{json} 2")),
        (
            request(&["HEAD /post/uid/1 HTTP/1.1", CLOSE], ""),
            format!("{json} "),
        ),
    ];
    for (request, expected) in cases {
        server.check(&request, &expected).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_path_reaches_the_keys_of_its_own_route_only() {
    let topic = unique("test");
    let url = server("REDIS_URL");
    let server = Server::with(Fault::Away, limits(), &topic, &url).await;
    for key in ["uid:1", "latest", "a:b", ":", "uid:1:c"] {
        set(&url, &format!("{topic}:{key}"), "another's").await;
    }
    for path in [
        "/post/uid:1",
        "/post/uid%3A1",
        "/post/uid%3a1",
        "/post/%75id%3A1",
        "/post/latest",
        "/post/%6Catest",
        "/post/a:b",
        "/post/%3A",
        "/post/uid/1:c",
        "/post/uid/1%3Ac",
    ] {
        server.check(&get(path), "404 not found").await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_redis_that_is_away_is_worth_another_try() {
    let behind = server("REDIS_URL");
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
            "503 [retry-after: 1] the store is not available",
        )
        .await;
    server.stop().await;
}
