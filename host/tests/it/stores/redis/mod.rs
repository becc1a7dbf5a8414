//! One suite for a Redis server, the embedded store and the one in memory: a script of calls and the
//! answers that each of them must give.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use host::capability::redis::{Clock, Condition, Error, Reply, Set, Store, commands, system_clock};
use host::pipeline::RedisUrl;
use tempfile::TempDir;

use crate::support::server;

mod lifecycle;
mod sizes;

/// A store under test, with a prefix of its own.
struct Fixture {
    store: Store,
    prefix: String,
    /// What the embedded store takes for the time; a Redis server has its own.
    time: Option<Arc<AtomicU64>>,
    _folder: Option<TempDir>,
}

impl Fixture {
    async fn remote() -> Self {
        let url = RedisUrl::Remote(server("REDIS_URL"));
        let store = Store::connect(&url, system_clock()).await;
        Self {
            store: store.expect("the Redis server of REDIS_URL"),
            prefix: format!("test:{}:", uuid::Uuid::new_v4()),
            time: None,
            _folder: None,
        }
    }

    async fn local(folder: Option<TempDir>) -> Self {
        let url = match &folder {
            Some(folder) => RedisUrl::Embedded(folder.path().join("not/yet/there")),
            None => RedisUrl::Memory,
        };
        let time = Arc::new(AtomicU64::new(1_700_000_000_000));
        let store = Store::connect(&url, clock(&time)).await;
        Self {
            store: store.expect("a new store"),
            prefix: "test:".to_owned(),
            time: Some(time),
            _folder: folder,
        }
    }

    async fn all() -> [(&'static str, Self); 3] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        [
            ("redis", Self::remote().await),
            ("embedded", Self::local(Some(folder)).await),
            ("memory", Self::local(None).await),
        ]
    }

    fn key(&self, name: &str) -> Vec<u8> {
        format!("{}{name}", self.prefix).into_bytes()
    }

    /// Runs one line of a script, and writes its answer as the scripts do.
    async fn run(&self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        let keys = |names: &[&str]| names.iter().map(|name| self.key(name)).collect::<Vec<_>>();
        match words.as_slice() {
            ["get", name] => show(self.store.fetch(&self.key(name)).await, value),
            ["get-many", names @ ..] => show(self.store.fetch_many(&keys(names)).await, |found| {
                found.into_iter().map(value).collect::<Vec<_>>().join(" ")
            }),
            ["set", rest @ ..] => show(self.store.set(self.set(rest)).await, |written| {
                format!("{written:?}")
            }),
            ["delete", names @ ..] => show(self.store.delete(keys(names)).await, |n| n.to_string()),
            ["increment", name, delta] => {
                let delta = delta.parse().expect("a number in the script");
                show(self.store.increment(self.key(name), delta).await, |sum| {
                    sum.to_string()
                })
            }
            ["expire", name] => self.expire(name).await,
            [name, arguments @ ..] => {
                let command = commands::lookup(name).unwrap_or_else(|| panic!("no command {name}"));
                let count = match command.keys {
                    commands::Keys::First => 1.min(arguments.len()),
                    commands::Keys::All => arguments.len(),
                };
                let mut arguments: Vec<_> = arguments.iter().map(|a| text(a)).collect();
                for key in &mut arguments[..count] {
                    *key = self.key(std::str::from_utf8(key).expect("a name in the script"));
                }
                show(self.store.execute(command, arguments).await, |reply| {
                    show_reply(command.name, reply)
                })
            }
            [] => panic!("an empty line in a script"),
        }
    }

    /// `key value…`, and what begins with a dash.
    fn set(&self, words: &[&str]) -> Set {
        let mut set = Set::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut number = || words.next().and_then(|n| n.parse().ok());
            match *word {
                "-ttl" => set.ttl = number(),
                "-version" => set.version = number(),
                "-absent" => set.condition = Some(Condition::IfAbsent),
                "-present" => set.condition = Some(Condition::IfPresent),
                name => {
                    let value = text(words.next().expect("a value in the script"));
                    set.entries.push((self.key(name), value));
                }
            }
        }
        set
    }

    /// Lets a key expire whose time to live is at most a second.
    async fn expire(&self, name: &str) -> String {
        const POLLS: usize = 1_000;
        match &self.time {
            Some(time) => {
                time.fetch_add(1_001, Ordering::SeqCst);
            }
            None => {
                for _ in 0..POLLS {
                    if self.exists(name).await == "int 0" {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
        self.exists(name).await
    }

    async fn exists(&self, name: &str) -> String {
        let command = commands::lookup("EXISTS").expect("a command of the table");
        let answer = self.store.execute(command, vec![self.key(name)]).await;
        show(answer, |reply| show_reply("EXISTS", reply))
    }

    async fn remove(&self, names: &[&str]) {
        let keys = names.iter().map(|name| self.key(name)).collect();
        self.store.delete(keys).await.expect("a store that works");
        self.store.close().await;
    }
}

fn clock(time: &Arc<AtomicU64>) -> Clock {
    let time = time.clone();
    Arc::new(move || time.load(Ordering::SeqCst))
}

/// `''` is the empty text.
fn text(word: &str) -> Vec<u8> {
    if word == "''" {
        Vec::new()
    } else {
        word.as_bytes().to_vec()
    }
}

fn value(value: Option<Vec<u8>>) -> String {
    value.map_or("nil".to_owned(), |value| {
        format!("{:?}", String::from_utf8_lossy(&value))
    })
}

fn show<T>(answer: Result<T, Error>, fine: impl FnOnce(T) -> String) -> String {
    match answer {
        Ok(answer) => fine(answer),
        Err(Error::Server(message)) => format!("error {message}"),
        Err(other) => format!("{other:?}"),
    }
}

fn show_reply(command: &str, reply: Reply) -> String {
    match reply {
        Reply::Nil => "nil".to_owned(),
        Reply::Okay => "ok".to_owned(),
        Reply::Int(number) => format!("int {number}"),
        Reply::Data(data) => value(Some(data)),
        Reply::Status(status) => format!("status {status}"),
        Reply::Items(items) => {
            let mut items: Vec<_> = items.into_iter().map(|item| value(Some(item))).collect();
            match command {
                "SMEMBERS" => items.sort(),
                "HGETALL" => {
                    let mut pairs: Vec<_> = items.chunks(2).map(|pair| pair.join("=")).collect();
                    pairs.sort();
                    items = pairs;
                }
                _ => {}
            }
            format!("items {}", items.join(" ")).trim_end().to_owned()
        }
    }
}

/// Runs a script on every kind of store: lines of a call, an arrow and its answer. Keys are a, b, c, d.
async fn check(script: &str) {
    for (kind, fixture) in Fixture::all().await {
        let mut wrong = Vec::new();
        for line in script
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
        {
            let (call, expected) = line.split_once("->").expect("an arrow in the line");
            let (call, expected) = (call.trim(), expected.trim());
            let answer = fixture.run(call).await;
            if answer != expected {
                wrong.push(format!("{call} -> {answer}, not {expected}"));
            }
        }
        fixture.remove(&["a", "b", "c", "d"]).await;
        assert!(wrong.is_empty(), "{kind}: {wrong:#?}");
    }
}

#[tokio::test]
async fn values() {
    check(
        r#"
        get a                       -> nil
        set a one                   -> [true]
        get a                       -> "one"
        set a ''                    -> [true]
        get a                       -> ""
        set a 1 b 2 c 3             -> [true, true, true]
        get-many a d c a            -> "1" nil "3" "1"
        get-many                    ->
        set                         -> []
        delete a b d                -> 2
        delete                      -> 0
        delete a a                  -> 0
        get-many a b c              -> nil nil "3"
        set c x c y                 -> [true, true]
        get c                       -> "y"
        "#,
    )
    .await;
}

#[tokio::test]
async fn conditions() {
    check(
        r#"
        set a 1 -present            -> [false]
        set a 1 -absent             -> [true]
        set a 2 -absent             -> [false]
        set a 3 -present            -> [true]
        set a 4 b 4 -absent         -> [false, true]
        get-many a b                -> "3" "4"
        HSET c f v                  -> int 1
        set c 5 -absent             -> [false]
        set c 6                     -> [true]
        get c                       -> "6"
        "#,
    )
    .await;
}

#[tokio::test]
async fn versions() {
    check(
        r#"
        set a plain                               -> [true]
        set a v9 -version 9                       -> [true]
        set a v9 -version 9                       -> [false]
        set a v8 -version 8                       -> [false]
        set a v10 -version 10                     -> [true]
        get a                                     -> "v10"
        set a last -version 18446744073709551615  -> [true]
        set a less -version 18446744073709551614  -> [false]
        get a                                     -> "last"
        set a plain                               -> [true]
        set a zero -version 0                     -> [true]
        set a zero -version 0                     -> [false]
        delete a                                  -> 1
        set a again -version 0                    -> [true]
        set a 1 b 1 c 1 -version 0                -> [false, true, true]
        set a x -version 5 -absent                -> [false]
        set a y -version 5 -present               -> [true]
        set a z -version 5 -present               -> [false]
        set d 1 -version 7 -ttl 1000              -> [true]
        set d 2 -version 7 -ttl 1000              -> [false]
        expire d                                  -> int 0
        set d 3 -version 1                        -> [true]
        increment d 1                             -> 4
        set d 5 -version 1                        -> [false]
        set e 1 f 1 e 2 -version 3                -> [true, true, false]
        get-many e f                              -> "1" "1"
        set e 4 f 4 g 4 -version 4                -> [true, true, true]
        set f 5                                   -> [true]
        set e 3 f 3 g 3 -version 3                -> [false, true, false]
        get-many e f g                            -> "4" "3" "4"
        "#,
    )
    .await;
}

/// More than a script takes at once.
#[tokio::test]
async fn thousands_of_keys_are_set_by_their_versions() {
    const KEYS: usize = 2_500;
    for (what, store) in Fixture::all().await {
        let set = |version| Set {
            entries: (0..KEYS)
                .map(|n| (store.key(&format!("many-{n}")), b"x".to_vec()))
                .collect(),
            version: Some(version),
            ..Set::default()
        };
        assert_eq!(
            store.store.set(set(1)).await,
            Ok(vec![true; KEYS]),
            "{what}"
        );
        let newer = store.set(&["many-0", "y", "many-1500", "y", "-version", "2"]);
        assert_eq!(store.store.set(newer).await, Ok(vec![true; 2]), "{what}");
        assert_eq!(
            store.store.set(set(1)).await,
            Ok(vec![false; KEYS]),
            "{what}"
        );
        let written = store.store.set(set(2)).await.expect(what);
        let kept = (0..KEYS).filter(|n| !written[*n]);
        assert_eq!(kept.collect::<Vec<_>>(), [0, 1_500], "{what}");
        assert_eq!(
            store.store.fetch(&store.key("many-1500")).await,
            Ok(Some(b"y".to_vec())),
            "{what}"
        );
        assert_eq!(
            store.store.fetch(&store.key("many-2499")).await,
            Ok(Some(b"x".to_vec())),
            "{what}"
        );
    }
}

#[tokio::test]
async fn times_to_live() {
    check(
        r#"
        set a 1 -ttl 0              -> error ERR invalid expire time in 'set' command
        set a 1 -ttl 18446744073709551615 -> error ERR invalid expire time in 'set' command
        TTL a                       -> int -2
        PTTL a                      -> int -2
        set a 1                     -> [true]
        TTL a                       -> int -1
        PTTL a                      -> int -1
        set a 1 -ttl 1000           -> [true]
        expire a                    -> int 0
        get a                       -> nil
        TTL a                       -> int -2
        delete a                    -> 0
        set a 1 -ttl 1000           -> [true]
        PERSIST a                   -> int 1
        PERSIST a                   -> int 0
        PERSIST b                   -> int 0
        TTL a                       -> int -1
        EXPIRE a 1                  -> int 1
        expire a                    -> int 0
        EXPIRE a 1                  -> int 0
        set a 1 b 1                 -> [true, true]
        EXPIRE a 0                  -> int 1
        PEXPIRE b -5                -> int 1
        get-many a b                -> nil nil
        set a 1 -ttl 1000           -> [true]
        increment a 1               -> 2
        APPEND a 0                  -> int 2
        expire a                    -> int 0
        set a 1 -ttl 1000           -> [true]
        set a 2                     -> [true]
        TTL a                       -> int -1
        PEXPIRE a 1000              -> int 1
        GETSET a 3                  -> "2"
        TTL a                       -> int -1
        SADD c x                    -> int 1
        PEXPIRE c 1000              -> int 1
        SADD c y                    -> int 1
        expire c                    -> int 0
        SMEMBERS c                  -> items
        EXPIRE a x                  -> error ERR value is not an integer or out of range
        EXPIRE a 9223372036854775807 -> error ERR invalid expire time in 'expire' command
        PEXPIRE a 9223372036854775807 -> error ERR invalid expire time in 'pexpire' command
        "#,
    )
    .await;
}

#[tokio::test]
async fn numbers() {
    check(
        r#"
        increment a 5                         -> 5
        increment a -7                        -> -2
        INCR a                                -> int -1
        DECR a                                -> int -2
        INCRBY a 10                           -> int 8
        DECRBY a 3                            -> int 5
        get a                                 -> "5"
        INCRBY a 1.5                          -> error ERR value is not an integer or out of range
        INCRBY a 9223372036854775808          -> error ERR value is not an integer or out of range
        INCRBY a +1                           -> error ERR value is not an integer or out of range
        INCRBY a 01                           -> error ERR value is not an integer or out of range
        increment a 9223372036854775807       -> error ERR increment or decrement would overflow
        DECRBY a -9223372036854775808         -> error ERR decrement would overflow
        set a 9223372036854775807             -> [true]
        INCR a                                -> error ERR increment or decrement would overflow
        get a                                 -> "9223372036854775807"
        set a text                            -> [true]
        increment a 1                         -> error ERR value is not an integer or out of range
        set a ''                              -> [true]
        INCR a                                -> error ERR value is not an integer or out of range
        set a -0                              -> [true]
        INCR a                                -> error ERR value is not an integer or out of range
        "#,
    )
    .await;
}

#[tokio::test]
async fn strings() {
    check(
        r#"
        EXISTS a                    -> int 0
        STRLEN a                    -> int 0
        SETNX a one                 -> int 1
        SETNX a two                 -> int 0
        APPEND a two                -> int 6
        APPEND b ''                 -> int 0
        EXISTS a b a c              -> int 3
        STRLEN a                    -> int 6
        MGET a c b                  -> items "onetwo" "" ""
        TYPE a                      -> status string
        TYPE c                      -> status none
        GETSET a abcdef             -> "onetwo"
        GETSET c new                -> nil
        GETRANGE a 0 -1             -> "abcdef"
        GETRANGE a 1 2              -> "bc"
        GETRANGE a -2 -1            -> "ef"
        GETRANGE a -100 100         -> "abcdef"
        GETRANGE a 4 2              -> ""
        GETRANGE a -1 -2            -> ""
        GETRANGE a 6 9              -> ""
        GETRANGE a -100 -50         -> "a"
        GETRANGE d 0 1              -> ""
        GETRANGE d x 1              -> error ERR value is not an integer or out of range
        GETDEL a                    -> "abcdef"
        GETDEL a                    -> nil
        getdel a b                  -> error ERR wrong number of arguments for 'getdel' command
        STRLEN                      -> error ERR wrong number of arguments for 'strlen' command
        MGET                        -> error ERR wrong number of arguments for 'mget' command
        EXPIRE a 1 NX               -> error ERR wrong number of arguments for 'expire' command
        "#,
    )
    .await;
}

#[tokio::test]
async fn hashes_and_sets() {
    check(
        r#"
        HSET a f 1 g 2              -> int 2
        HSET a f 3 h 4              -> int 1
        HGET a f                    -> "3"
        HGET a x                    -> nil
        HGET b x                    -> nil
        HGETALL a                   -> items "f"="3" "g"="2" "h"="4"
        HGETALL b                   -> items
        HDEL a f x                  -> int 1
        HDEL b f                    -> int 0
        TYPE a                      -> status hash
        HDEL a g h h                -> int 2
        EXISTS a                    -> int 0
        HSET a f                    -> error ERR wrong number of arguments for 'hset' command
        HSET a f 1 g                -> error ERR wrong number of arguments for 'hset' command
        SADD c x y x                -> int 2
        SADD c x z                  -> int 1
        SISMEMBER c x               -> int 1
        SISMEMBER c w               -> int 0
        SISMEMBER d w               -> int 0
        SMEMBERS c                  -> items "x" "y" "z"
        TYPE c                      -> status set
        SREM c x w                  -> int 1
        SREM d x                    -> int 0
        SREM c y z                  -> int 2
        EXISTS c                    -> int 0
        "#,
    )
    .await;
}

#[tokio::test]
async fn wrong_types() {
    const CALLS: &[&str] = &[
        "get a",
        "increment a 1",
        "APPEND a x",
        "STRLEN a",
        "GETDEL a",
        "GETSET a x",
        "GETRANGE a 0 1",
        "INCR a",
        "HGET b f",
        "HSET b f v",
        "HDEL b f",
        "HGETALL b",
        "HGET a m",
        "SADD b m",
        "SREM b m",
        "SMEMBERS b",
        "SISMEMBER b m",
    ];
    let wrong = "error WRONGTYPE Operation against a key holding the wrong kind of value";
    let mut script = "SADD a m -> int 1\n set b text -> [true]\n".to_owned();
    for call in CALLS {
        script += &format!("{call} -> {wrong}\n");
    }
    script += r#"
        get-many a b                -> nil "text"
        MGET a b                    -> items "" "text"
        SETNX a x                   -> int 0
        SMEMBERS a                  -> items "m"
        get b                       -> "text"
        delete a b                  -> 2
    "#;
    check(&script).await;
}

#[tokio::test]
async fn every_command_is_known_by_its_name() {
    for name in commands::names() {
        let command = commands::lookup(&name.to_lowercase()).expect("a name of the table");
        assert_eq!(command.name, name);
    }
    assert!(commands::lookup("FLUSHALL").is_none());
}

#[tokio::test]
async fn many_callers_at_once() {
    const CALLERS: usize = 20;
    const CALLS: usize = 20;
    for (kind, fixture) in Fixture::all().await {
        let callers = (0..CALLERS).map(|_| {
            let (store, key) = (fixture.store.clone(), fixture.key("a"));
            tokio::spawn(async move {
                for _ in 0..CALLS {
                    store
                        .increment(key.clone(), 1)
                        .await
                        .expect("a store that works");
                }
            })
        });
        for caller in callers.collect::<Vec<_>>() {
            caller.await.expect("a caller that ends");
        }
        let sum = fixture.run("get a").await;
        assert_eq!(sum, format!("\"{}\"", CALLERS * CALLS), "{kind}");
        fixture.remove(&["a"]).await;
    }
}
