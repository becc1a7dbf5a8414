//! What is kept in a store may be of any size; what it costs the host may not.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use host::capability::redis::{
    Error, MAX_ANSWER_BYTES, MAX_ANSWER_ITEMS, MAX_VALUE_BYTES, Set, Store, commands, system_clock,
};
use host::pipeline::RedisUrl;
use serde_json::{Value, json};

use crate::support::{Host, Log, component, get, server, unique};

/// Bytes that a host may grow by while it is asked for what is larger: the longest answer, as it is read and as it is kept.
const BOUND: u64 = 8 * MAX_ANSWER_BYTES as u64;
/// Bytes of a value and of a hash's field that are too large to be read.
const BLOB: usize = 256 << 20;

/// Keys of a real Redis, gone with the test.
struct Keys {
    redis: redis::Connection,
    prefix: String,
}

impl Keys {
    fn new() -> Self {
        let client = redis::Client::open(server("REDIS_URL")).expect("a URL");
        let redis = client.get_connection().expect("Redis");
        Self {
            redis,
            prefix: format!("{}:", unique("sizes")),
        }
    }

    fn run(&mut self, name: &str, arguments: &[&str]) {
        let mut command = redis::cmd(name);
        command.arg(arguments).exec(&mut self.redis).expect(name);
    }

    fn fill(&mut self) {
        let key = |name: &str| format!("{}{name}", self.prefix);
        let (blob, hash, fields, members, small) = (
            key("blob"),
            key("hash"),
            key("fields"),
            key("members"),
            key("small"),
        );
        let (most, items) = (BLOB.to_string(), (2 * MAX_ANSWER_ITEMS).to_string());
        self.run("SET", &[&small, "small"]);
        self.run("SETRANGE", &[&blob, &most, "x"]);
        self.run(
            "EVAL",
            &[
                "return redis.call('HSET', KEYS[1], 'f', string.rep('x', ARGV[1]))",
                "1",
                &hash,
                &most,
            ],
        );
        for (command, key) in [("HSET", &fields), ("SADD", &members)] {
            let value = if command == "HSET" { ", 'v'" } else { "" };
            let script =
                format!("for i = 1, ARGV[1] do redis.call('{command}', KEYS[1], i{value}) end");
            self.run("EVAL", &[&script, "1", key, &items]);
        }
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        for name in ["blob", "hash", "fields", "members", "small", "large"] {
            let key = format!("{}{name}", self.prefix);
            let _ = redis::cmd("UNLINK").arg(key).exec(&mut self.redis);
        }
    }
}

struct Fixture {
    host: Host,
    log: Log,
    input: String,
    http: String,
}

impl Fixture {
    fn start(keys: &Keys) -> Self {
        let (brokers, component) = (server("KAFKA_BROKERS"), component("test-probe"));
        let (input, output) = (unique("in"), unique("out"));
        let (redis, prefix) = (server("REDIS_URL"), &keys.prefix);
        let commands: Vec<_> = commands::names().collect();
        let host = Host::start(&format!(
            r#"
            name = "sizes"
            kafka.brokers = "{brokers}"
            admin.listen = "127.0.0.1:0"
            topics."{input}".partitions = 1
            topics."{output}".partitions = 1
            sql.db.url = "sqlite:db.sqlite"
            [redis.cache]
            url = "{redis}"
            [stages.probe]
            component = "{component}"
            input = ["{input}"]
            group = "{input}"
            output = ["{output}"]
            sql = ["db"]
            delivery = "at-least-once"
            redis = {{ cache = {{ prefix = "{prefix}", commands = {commands:?} }} }}
            [http]
            listen = "127.0.0.1:0"
            [[http.routes]]
            path = "/value/{{name}}"
            method = "GET"
            read = {{ redis = "cache", key = "{prefix}{{name}}" }}
            "#
        ));
        let http = host.address("HTTP");
        Self {
            log: Log::new(&brokers),
            host,
            input,
            http,
        }
    }

    /// The most memory that it has had, in bytes.
    fn peak(&self) -> u64 {
        self.host.peak_mib() << 20
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_in_redis_costs_no_memory_and_nobody_else_anything() {
    let mut keys = Keys::new();
    keys.fill();
    let fixture = Fixture::start(&keys);
    let key = |name: &str| format!("{}{name}", keys.prefix);
    let too_large = json!({ "error": { "too-large": MAX_ANSWER_BYTES } });
    let small = json!({ "do": "redis", "store": "cache", "call": "get", "key": key("small"),
                        "expect": { "ok": "small" } });
    let mut messages: Vec<Value> = vec![
        json!({ "do": "redis", "store": "cache", "call": "get", "key": key("blob"), "expect": too_large }),
        json!({ "do": "redis", "store": "cache", "call": "get-many", "keys": [key("small"), key("blob")],
                "expect": too_large }),
    ];
    for (command, arguments) in [
        ("MGET", vec![key("small"), key("blob")]),
        ("GETRANGE", vec![key("blob"), "0".into(), "-1".into()]),
        ("GETSET", vec![key("blob"), "new".into()]),
        ("GETDEL", vec![key("blob")]),
        ("HGET", vec![key("hash"), "f".into()]),
        ("HGETALL", vec![key("hash")]),
        ("HGETALL", vec![key("fields")]),
        ("SMEMBERS", vec![key("members")]),
    ] {
        messages.push(
            json!({ "do": "redis", "store": "cache", "call": "execute", "command": command,
                              "arguments": arguments, "expect": too_large }),
        );
    }
    messages.push(
        json!({ "do": "redis", "store": "cache", "call": "execute", "command": "GETRANGE",
        "arguments": [key("blob"), "-1", "-1"], "expect": { "ok": { "data": "x" } } }),
    );
    messages.push(
        json!({ "do": "redis", "store": "cache", "call": "execute", "command": "STRLEN",
        "arguments": [key("blob")], "expect": { "ok": { "int": BLOB + 1 } } }),
    );
    let messages: Vec<_> = (messages.into_iter())
        .flat_map(|message| [message, small.clone()])
        .collect();
    // What a first message costs is not counted.
    fixture
        .log
        .produce(&fixture.input, &[(None, &small.to_string())])
        .await;
    fixture.log.wait_committed(&fixture.input, &fixture.input);
    assert_eq!(get(&fixture.http, "/value/small").0, 200);
    let before = fixture.peak();
    let values: Vec<_> = messages.iter().map(Value::to_string).collect();
    let records: Vec<_> = values.iter().map(|v| (None, v.as_str())).collect();
    fixture.log.produce(&fixture.input, &records).await;
    for _ in 0..3 {
        assert_eq!(get(&fixture.http, "/value/blob").0, 500);
        assert_eq!(get(&fixture.http, "/value/hash").0, 500, "of another type");
        assert_eq!(get(&fixture.http, "/value/none").0, 404);
        assert_eq!(get(&fixture.http, "/value/small").1, "small");
    }
    fixture.log.wait_committed(&fixture.input, &fixture.input);
    let dead = fixture.log.read(&format!("{}.dlq", fixture.input));
    assert_eq!(dead, [], "no message was given up on, or tried again");
    let grown = fixture.peak().saturating_sub(before);
    assert!(grown < BOUND, "it grew by {grown} bytes");
    assert!(fixture.host.stop().0.success());
}

/// As many as there may be connections, each for a value that is just not too large, by clients who take nothing.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_do_not_take_large_values_are_not_kept_one_each() {
    const CLIENTS: usize = 150;
    const LARGE: usize = MAX_ANSWER_BYTES - 1;
    let mut keys = Keys::new();
    let (large, small) = (
        format!("{}large", keys.prefix),
        format!("{}small", keys.prefix),
    );
    keys.run("SETRANGE", &[&large, &LARGE.to_string(), "x"]);
    keys.run("SET", &[&small, "small"]);
    let fixture = Fixture::start(&keys);
    let before = fixture.peak();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let mut client = TcpStream::connect(&fixture.http).expect("a connection");
            write!(client, "GET /value/large HTTP/1.1\r\nhost: x\r\n\r\n").expect("a request");
            client
        })
        .collect();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(get(&fixture.http, "/value/small").1, "small");
    let grown = fixture.peak().saturating_sub(before);
    // A copy each for those that may be there, and one that is being read.
    let bound = 3 * 16 * MAX_ANSWER_BYTES as u64;
    assert!(grown < bound, "it grew by {grown} bytes");
    drop(clients);
    // Their room is free again.
    let mut client = TcpStream::connect(&fixture.http).expect("a connection");
    write!(
        client,
        "GET /value/large HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    )
    .expect("a request");
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).expect("an answer");
    assert!(answer.len() > LARGE, "{} bytes", answer.len());
}

/// What the embedded store keeps at a key it reads whole.
#[tokio::test]
async fn an_entry_of_the_embedded_store_does_not_grow_without_end() {
    let store = Store::connect(&RedisUrl::Memory, system_clock())
        .await
        .expect("a store");
    let command = |name| commands::lookup(name).expect("a command");
    let (append, hset) = (command("APPEND"), command("HSET"));
    let too_large = Error::TooLarge(MAX_ANSWER_BYTES as u64);
    let more = vec![b'x'; MAX_VALUE_BYTES];
    for expected in [true, true, false, false] {
        let arguments = vec![b"value".to_vec(), more.clone()];
        let answer = store.execute(append, arguments).await;
        assert_eq!(answer.is_ok(), expected, "{answer:?}");
        let arguments = vec![
            b"hash".to_vec(),
            uuid::Uuid::new_v4().to_string().into_bytes(),
            more[..more.len() - 100].to_vec(),
        ];
        let answer = store.execute(hset, arguments).await;
        assert_eq!(answer.is_ok(), expected, "{answer:?}");
    }
    let whole = store.fetch(b"value").await.expect("it can still be read");
    assert_eq!(whole.map(|value| value.len()), Some(MAX_ANSWER_BYTES));
    for name in ["HGETALL", "STRLEN"] {
        let key = if name == "STRLEN" {
            b"value"
        } else {
            &b"hash"[..]
        };
        let answer = store.execute(command(name), vec![key.to_vec()]).await;
        answer.expect(name);
    }
    let set = Set {
        entries: vec![(b"value".to_vec(), b"short".to_vec())],
        ..Set::default()
    };
    assert_eq!(store.set(set).await, Ok(vec![true]));
    assert_ne!(store.fetch(b"value").await, Err(too_large));
}
