//! A Redis server that is sick.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use host::capability::redis::{Error, Set, Store, commands, system_clock};
use host::capability::{Action, StoreError};
use host::pipeline::RedisUrl;
use serde_json::json;

use super::postgres::Place;
use super::servers::{self, Certificate, Server, Way, cli};
use super::{Lane, Patient, Stores, appends, inserts, sets};
use crate::support::get;

fn url(port: u16) -> String {
    format!("redis://127.0.0.1:{port}")
}

/// That each of them was done, once.
fn done_once(server: &Server, numbers: std::ops::Range<u32>) {
    for n in numbers {
        assert_eq!(cli(server, &["GET", &format!("p:{n}")]), "x", "message {n}");
    }
}

/// While Redis refuses, nothing is given up on, however long it takes; then all goes on.
async fn refuses(lane: Lane, words: &str, sicken: &[&[&str]], heal: &[&[&str]]) {
    let redis = servers::redis(&[]);
    let patient = Patient::on_redis(&url(redis.port), lane);
    patient.send(&appends(0..10)).await;
    patient.settle();
    for command in sicken {
        cli(&redis, command);
    }
    patient.send(&appends(10..40)).await;
    patient.says(words);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(patient.dead(), Vec::<String>::new(), "{lane:?}");
    for command in heal {
        cli(&redis, command);
    }
    patient.goes_on();
    done_once(&redis, 0..40);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_redis_is_waited_for_and_named() {
    for lane in [Lane::Ordered, Lane::Concurrent, Lane::Batches] {
        let full: &[&str] = &["CONFIG", "SET", "maxmemory", "1"];
        let empty: &[&str] = &["CONFIG", "SET", "maxmemory", "0"];
        refuses(lane, "OOM", &[full], &[empty]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_read_only_or_without_its_replicas_is_waited_for_and_named() {
    let replica: &[&str] = &["REPLICAOF", "127.0.0.1", "1"];
    let master: &[&str] = &["REPLICAOF", "NO", "ONE"];
    refuses(Lane::Ordered, "READONLY", &[replica], &[master]).await;
    let alone: &[&str] = &["CONFIG", "SET", "min-replicas-to-write", "1"];
    let enough: &[&str] = &["CONFIG", "SET", "min-replicas-to-write", "0"];
    refuses(Lane::Ordered, "NOREPLICAS", &[alone], &[enough]).await;
}

/// A folder stands where the server would save.
fn can_not_save(server: &Server) {
    let saved = server.folder().join("dump.rdb");
    let _ = std::fs::remove_file(&saved);
    std::fs::create_dir_all(saved.join("in the way")).expect("a folder");
    save(server, "rdb_last_bgsave_status:err");
}

fn can_save(server: &Server) {
    let saved = server.folder().join("dump.rdb");
    std::fs::remove_dir_all(&saved).expect("the folder is removed");
    save(server, "rdb_last_bgsave_status:ok");
}

fn save(server: &Server, status: &str) {
    cli(server, &["BGSAVE"]);
    crate::support::until("the end of saving", || {
        let info = cli(server, &["INFO", "persistence"]);
        let is_over = info.contains("rdb_bgsave_in_progress:0");
        (is_over && info.contains(status)).then_some(())
    });
}

/// It refuses `PING`, too, by which a new connection is tried.
#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_can_not_save_is_read_on_new_connections() {
    let redis = servers::redis(&["--save", "3600 1"]);
    cli(&redis, &["SET", "p:1", "x"]);
    let early = store(&url(redis.port)).await;
    can_not_save(&redis);
    assert!(cli(&redis, &["PING"]).contains("MISCONF"));
    cli(&redis, &["CLIENT", "KILL", "TYPE", "normal"]);
    // The first call finds that the connection is gone.
    let _ = early.fetch(b"p:1").await;
    let late = store(&url(redis.port)).await;
    for store in [early, late] {
        assert_eq!(store.fetch(b"p:1").await, Ok(Some(b"x".to_vec())));
        assert!(store.probe("p:", &Action::Read).await.is_ok());
        let probed = store.probe("p:", &Action::Write).await;
        assert!(
            matches!(&probed, Err(StoreError::Unavailable(why)) if why.contains("MISCONF")),
            "{probed:?}"
        );
    }
    can_save(&redis);
}

/// It hangs up with a word, which the connection's own error is not.
#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_has_no_place_for_a_client_is_named_and_waited_for() {
    const FULL: &str = "max number of clients reached";
    for (password, options) in [
        ("", &["--maxclients", "1"][..]),
        (
            ":geheim@",
            &["--maxclients", "1", "--requirepass", "geheim"],
        ),
    ] {
        let redis = servers::redis(options);
        let url = format!("redis://{password}127.0.0.1:{}", redis.port);
        // Who looked whether it is there may have the place for a moment.
        let client = crate::support::until("the place", || {
            let mut client = TcpStream::connect(("127.0.0.1", redis.port)).ok()?;
            client.write_all(b"PING\r\n").ok()?;
            let mut answer = [0; 64];
            let read = client.read(&mut answer).ok()?;
            let is_in = !String::from_utf8_lossy(&answer[..read]).contains(FULL);
            (read > 0 && is_in).then_some(client)
        });
        let open = Store::connect(&RedisUrl::Remote(url.clone()), system_clock()).await;
        let open = open.map(drop);
        assert!(
            matches!(&open, Err(StoreError::Unavailable(why)) if why.contains(FULL)),
            "{open:?}"
        );
        drop(client);
        // The server may see only a moment later that there is a place.
        let url = RedisUrl::Remote(url);
        let deadline = Instant::now() + crate::support::PATIENCE;
        while let Err(error) = Store::connect(&url, system_clock()).await {
            assert!(Instant::now() < deadline, "{error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Of what a set takes, each has an answer of its own.
#[tokio::test(flavor = "multi_thread")]
async fn of_the_answers_to_a_set_the_one_that_speaks_of_redis_is_named() {
    let redis = servers::redis(&[]);
    let store = store(&user(&redis, &["~*", "+@all"])).await;
    assert_eq!(store.set(one("p:1", None)).await, Ok(vec![true]));
    allow(&redis, &["-del"]);
    cli(&redis, &["REPLICAOF", "127.0.0.1", "1"]);
    let set = store.set(one("p:1", None)).await;
    assert!(
        matches!(&set, Err(Error::Unavailable(why)) if why.starts_with("READONLY")),
        "{set:?}"
    );
}

/// One after the other on one server.
#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_can_not_save_is_busy_loading_or_without_its_master_is_waited_for_and_named() {
    let redis = servers::redis(&["--enable-debug-command", "yes", "--save", "3600 1"]);
    let patient = Patient::on_redis(&url(redis.port), Lane::Ordered);
    let mut sent = 0;
    let mut send = async || {
        patient.send(&appends(sent..sent + 10)).await;
        sent += 10;
        sent
    };
    let well = |sent| {
        patient.goes_on();
        done_once(&redis, 0..sent);
    };
    let sent = send().await;
    well(sent);

    can_not_save(&redis);
    let sent = send().await;
    patient.says("MISCONF");
    can_save(&redis);
    well(sent);

    // A script of somebody else's that never ends.
    cli(&redis, &["CONFIG", "SET", "busy-reply-threshold", "100"]);
    let is_answered = |words: &str| {
        crate::support::until(words, || {
            cli(&redis, &["GET", "p:1"]).contains(words).then_some(())
        });
    };
    let mut endless = servers::begin(&redis, &["EVAL", "while true do end", "0"]);
    is_answered("BUSY");
    let sent = send().await;
    patient.says("BUSY");
    cli(&redis, &["SCRIPT", "KILL"]);
    endless.wait().expect("it ends with its script");
    well(sent);

    // A large data set that is read at a start, or again.
    cli(&redis, &["DEBUG", "POPULATE", "300"]);
    cli(&redis, &["CONFIG", "SET", "key-load-delay", "10000"]);
    cli(
        &redis,
        &[
            "CONFIG",
            "SET",
            "loading-process-events-interval-bytes",
            "1024",
        ],
    );
    let mut reload = servers::begin(&redis, &["DEBUG", "RELOAD"]);
    is_answered("LOADING");
    let sent = send().await;
    patient.says("LOADING");
    reload.wait().expect("it ends once all is read");
    well(sent);

    // A replica whose master is away, and that does not answer with what is old.
    let get = json!({ "do": "redis", "store": "cache", "call": "get", "key": "p:1" });
    cli(&redis, &["CONFIG", "SET", "replica-serve-stale-data", "no"]);
    cli(&redis, &["REPLICAOF", "127.0.0.1", "1"]);
    patient.send(&[get]).await;
    let sent = send().await;
    patient.says("MASTERDOWN");
    cli(&redis, &["REPLICAOF", "NO", "ONE"]);
    well(sent);
}

/// The connection is everybody's: commands that come after one in a transaction that can't be ended would wait with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_redis_user_who_may_not_end_a_transaction_leaves_nobody_in_one() {
    let redis = servers::redis(&[]);
    for rights in [&["-exec"][..], &["-multi"], &["-exec", "-discard"]] {
        let url = user(&redis, &[&["~*", "+@all"], rights].concat());
        let store = store(&url).await;
        for version in [None, Some(1)] {
            let what = format!("{rights:?}, version {version:?}");
            assert_eq!(
                store.set(one("p:1", version)).await,
                Ok(vec![true]),
                "{what}"
            );
            let value = store.fetch(b"p:1").await;
            assert_eq!(value, Ok(Some(b"x".to_vec())), "{what}");
            assert_eq!(store.delete(vec![b"p:1".to_vec()]).await, Ok(1), "{what}");
            assert_eq!(store.fetch(b"p:1").await, Ok(None), "{what}");
        }
        let set = commands::lookup("HSET").expect("a command");
        let set = store.execute(set, ["p:h", "a", "b"].map(Into::into).to_vec());
        assert!(set.await.is_ok(), "{rights:?}");
        cli(&redis, &["FLUSHALL"]);
    }
    // Taken away while stages are at work.
    let patient = Patient::on_redis(&user(&redis, &["~*", "+@all"]), Lane::Concurrent);
    patient.send(&sets(0..10)).await;
    patient.settle();
    allow(&redis, &["-exec", "-discard", "-multi"]);
    patient.send(&sets(10..20)).await;
    patient.send(&appends(20..30)).await;
    patient.goes_on();
    done_once(&redis, 0..30);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_taken_from_redis_user_and_given_back_costs_no_message() {
    let redis = servers::redis(&[]);
    let user = ["ACL", "SETUSER", "stages", "on", ">geheim", "~*", "+@all"];
    cli(&redis, &user);
    let url = format!("redis://stages:geheim@127.0.0.1:{}", redis.port);
    let patient = Patient::on_redis(&url, Lane::Ordered);
    patient.send(&appends(0..10)).await;
    patient.settle();
    cli(&redis, &["ACL", "SETUSER", "stages", "-append"]);
    patient.send(&appends(10..20)).await;
    patient.says("NOPERM");
    tokio::time::sleep(Duration::from_secs(2)).await;
    cli(&redis, &["ACL", "SETUSER", "stages", "+append"]);
    patient.goes_on();
    done_once(&redis, 0..20);
    // What it never could do is the message's own.
    cli(&redis, &["ACL", "SETUSER", "stages", "-get", "-getrange"]);
    let get = json!({ "do": "redis", "store": "cache", "call": "get", "key": "p:1" });
    patient.send(&[get]).await;
    patient.settle();
    let dead = patient.dead();
    assert!(
        matches!(&dead[..], [one] if one.starts_with("denied") && one.contains("NOPERM")),
        "{dead:?}"
    );
}

/// A user of this server with these rights, as a URL.
fn user(server: &Server, rights: &[&str]) -> String {
    allow(server, &[&["reset", "on", ">geheim"], rights].concat());
    format!("redis://stages:geheim@127.0.0.1:{}", server.port)
}

fn allow(server: &Server, rights: &[&str]) {
    cli(server, &[&["ACL", "SETUSER", "stages"], rights].concat());
}

/// Its user may do what the calls take, and no more.
#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_a_redis_user_of_scripts_loses_for_a_while_costs_no_message() {
    const RIGHTS: &[&str] = &[
        "~*",
        "+ping",
        "+multi",
        "+evalsha",
        "+script|load",
        "+get",
        "+mset",
    ];
    let redis = servers::redis(&[]);
    let patient = Patient::on_redis(&user(&redis, RIGHTS), Lane::Ordered);
    let set = |n| json!({ "do": "redis", "store": "cache", "call": "set", "key": format!("p:{n}"), "value": "x", "version": 1 });
    patient.send(&(0..10).map(set).collect::<Vec<_>>()).await;
    patient.settle();
    for (first, right) in [(10, "mset"), (20, "script|load")] {
        allow(&redis, &[&format!("-{right}")]);
        // As after a restart.
        cli(&redis, &["SCRIPT", "FLUSH"]);
        let sets: Vec<_> = (first..first + 10).map(set).collect();
        patient.send(&sets).await;
        patient.says("NOPERM");
        tokio::time::sleep(Duration::from_secs(2)).await;
        allow(&redis, &[&format!("+{right}")]);
        patient.goes_on();
    }
    done_once(&redis, 0..30);
}

/// Commands for many keys only make it faster.
#[tokio::test(flavor = "multi_thread")]
async fn many_keys_are_set_by_a_redis_user_who_may_set_one() {
    const RIGHTS: &[&str] = &[
        "~*",
        "+ping",
        "+evalsha",
        "+script|load",
        "+get",
        "+set",
        "+del",
    ];
    let redis = servers::redis(&[]);
    let store = store(&user(&redis, RIGHTS)).await;
    let many = |version| Set {
        entries: (0..3)
            .map(|n| (format!("p:{n}").into(), b"x".to_vec()))
            .collect(),
        version,
        ..Set::default()
    };
    for (version, written) in [
        (Some(2), true),
        (Some(1), false),
        (None, true),
        (Some(1), true),
    ] {
        assert_eq!(
            store.set(many(version)).await,
            Ok(vec![written; 3]),
            "{version:?}"
        );
    }
}

/// A set without a version or a condition needs no script.
#[tokio::test(flavor = "multi_thread")]
async fn a_plain_set_takes_set_and_del_of_a_redis_user() {
    let redis = servers::redis(&[]);
    let store = store(&user(&redis, &["~*", "+ping", "+multi", "+set", "+del"])).await;
    let entries = [1, 2]
        .map(|n| (format!("p:{n}").into(), b"x".to_vec()))
        .into();
    let set = Set {
        entries,
        ttl: Some(60_000),
        ..Set::default()
    };
    assert_eq!(store.set(set.clone()).await, Ok(vec![true; 2]));
    allow(&redis, &["-set"]);
    let refused = store.set(set).await;
    let missed = |why: &str| why.contains("NOPERM") && why.contains("'set'");
    assert!(
        matches!(&refused, Err(Error::Unavailable(why)) if missed(why)),
        "{refused:?}"
    );
}

/// The keys that the server gives its user are fewer than those of the grant, and the host's own are not among them.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_not_its_users_on_redis_costs_its_own_message_only() {
    let redis = servers::redis(&[]);
    let rights = ["~p:0", "~p:1*", "~stagehost:version:*", "+@all"];
    let patient = Patient::on_redis(&user(&redis, &rights), Lane::Ordered);
    patient.send(&appends(0..3)).await;
    patient.settle();
    let dead = patient.dead();
    assert!(
        matches!(&dead[..], [one] if one.starts_with("denied") && one.contains("NOPERM")),
        "{dead:?}"
    );
    done_once(&redis, 0..2);
}

/// Who may run no transaction can't be asked for without an effect what it may do.
#[tokio::test(flavor = "multi_thread")]
async fn where_redis_rights_can_not_be_asked_for_nothing_is_done_and_a_message_is_held_for_a_while_only()
 {
    let redis = servers::redis(&[]);
    let url = user(&redis, &["~*", "+@all", "-multi"]);
    let patient = Patient::on_redis(&url, Lane::Ordered);
    patient.send(&appends(0..2)).await;
    patient.settle();
    allow(&redis, &["-append"]);
    patient.send(&appends(2..3)).await;
    patient.says("NOPERM");
    patient.settle();
    let dead = patient.dead();
    assert!(
        matches!(&dead[..], [one] if one.contains("NOPERM")),
        "{dead:?}"
    );
    done_once(&redis, 0..2);
    assert_eq!(cli(&redis, &["DBSIZE"]), "2");
}

async fn store(url: &str) -> Store {
    let url = RedisUrl::Remote(url.to_owned());
    let store = Store::connect(&url, system_clock()).await;
    store.expect("it is let in")
}

fn one(key: &str, version: Option<u64>) -> Set {
    Set {
        entries: vec![(key.into(), b"x".to_vec())],
        version,
        ..Set::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_redis_did_for_one_grant_is_not_expected_for_another() {
    let redis = servers::redis(&[]);
    let rights = ["~post:*", "~stagehost:version:*", "+@all"];
    let store = store(&user(&redis, &rights)).await;
    let (posts, users) = (store.granted(), store.granted());
    for version in [None, Some(1)] {
        let set = posts.set(one("post:1", version)).await;
        assert_eq!(set, Ok(vec![true]));
        let denied = users.set(one("user:1", version)).await;
        assert!(matches!(denied, Err(Error::Denied(_))), "{denied:?}");
    }
    // A script of its own is a kind of its own.
    let absent = Set {
        condition: Some(host::capability::redis::Condition::IfAbsent),
        ..one("user:2", None)
    };
    let denied = posts.set(absent).await;
    assert!(matches!(denied, Err(Error::Denied(_))), "{denied:?}");
}

/// Makes the call of that name, at a key that is not there, or that has an older version.
async fn call(store: &Store, name: &str, version: u64) -> Result<(), Error> {
    let key = || b"p:none".to_vec();
    match name {
        "get" => store.fetch(&key()).await.map(drop),
        "get-many" => store.fetch_many(&[key()]).await.map(drop),
        "set" => store.set(one("p:set", None)).await.map(drop),
        "set-if" => store.set(one("p:if", Some(version))).await.map(drop),
        "delete" => store.delete(vec![key()]).await.map(drop),
        name => {
            let command = commands::lookup(name).expect("a command");
            store.execute(command, vec![key()]).await.map(drop)
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_redis_takes_from_any_call_is_missed_until_it_is_given_back() {
    let redis = servers::redis(&[]);
    let store = store(&user(&redis, &["~*", "+@all"])).await;
    for (name, right) in [
        ("get", "get"),
        ("get", "evalsha"),
        ("get-many", "mget"),
        ("MGET", "mget"),
        ("GETDEL", "getdel"),
        ("set", "set"),
        ("get", "script|load"),
        ("set-if", "mset"),
        ("set-if", "script|load"),
        ("delete", "del"),
        ("EXISTS", "exists"),
    ] {
        let (what, probe) = (format!("{name} without {right}"), Action::Command(name));
        assert_eq!(call(&store, name, 1).await, Ok(()), "{what}");
        allow(&redis, &[&format!("-{right}")]);
        // As after a restart.
        cli(&redis, &["SCRIPT", "FLUSH"]);
        let refused = call(&store, name, 2).await;
        let missed = |why: &str| why.contains("refuses what it did before");
        assert!(
            matches!(&refused, Err(Error::Unavailable(why)) if missed(why)),
            "{what}: {refused:?}"
        );
        let probed = store.probe("p:", &probe).await;
        assert!(
            matches!(&probed, Err(StoreError::Unavailable(why)) if missed(why)),
            "{what}: {probed:?}"
        );
        allow(&redis, &[&format!("+{right}")]);
        let probed = store.probe("p:", &probe).await;
        assert!(probed.is_ok(), "{what}: {probed:?}");
        cli(&redis, &["FLUSHALL"]);
    }
}

/// What is refused on another connection says nothing of the one that all calls are on.
#[tokio::test(flavor = "multi_thread")]
async fn a_rehearsal_that_redis_refuses_leaves_the_connection_there() {
    let redis = servers::redis(&[]);
    let store = store(&user(&redis, &["~*", "+@all"])).await;
    assert_eq!(store.set(one("p:1", Some(1))).await, Ok(vec![true]));
    let connections = || -> Vec<String> {
        let list = cli(&redis, &["CLIENT", "LIST"]);
        let ours = list.lines().filter(|line| line.contains("user=stages"));
        ours.filter_map(|line| line.split(' ').next().map(str::to_owned))
            .collect()
    };
    let before = connections();
    cli(&redis, &["REPLICAOF", "127.0.0.1", "1"]);
    let probed = store.probe("p:", &Action::Command("set-if")).await;
    assert!(
        matches!(&probed, Err(StoreError::Unavailable(why)) if why.contains("READONLY")),
        "{probed:?}"
    );
    crate::support::until("only the connection there was", || {
        (connections() == before).then_some(())
    });
    assert!(store.fetch(b"p:1").await.is_ok());
    assert_eq!(connections(), before);
}

/// Connections that are open stay let in, so they are cut: as after a restart, or by whoever changes passwords.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_password_of_redis_is_waited_for_and_named() {
    let redis = servers::redis(&["--requirepass", "geheim"]);
    let admin = |arguments: &[&str], password: &str| {
        let mut all = vec!["--no-auth-warning", "-a", password];
        all.extend(arguments);
        cli(&redis, &all)
    };
    let url = format!("redis://:geheim@127.0.0.1:{}", redis.port);
    let patient = Patient::on_redis(&url, Lane::Ordered);
    patient.send(&appends(0..10)).await;
    patient.settle();
    admin(&["CONFIG", "SET", "requirepass", "other"], "geheim");
    admin(
        &["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"],
        "other",
    );
    patient.send(&appends(10..40)).await;
    patient.says("password");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(patient.dead(), Vec::<String>::new());
    admin(&["CONFIG", "SET", "requirepass", "geheim"], "other");
    patient.goes_on();
    for n in 0..40 {
        assert_eq!(
            admin(&["GET", &format!("p:{n}")], "geheim"),
            "x",
            "message {n}"
        );
    }
}

/// A password where there was none: the connection is made, and each answer is NOAUTH.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_redis_asks_for_all_at_once_is_waited_for_and_named() {
    let redis = servers::redis(&[]);
    let patient = Patient::on_redis(&url(redis.port), Lane::Concurrent);
    patient.send(&appends(0..10)).await;
    patient.settle();
    cli(&redis, &["CONFIG", "SET", "requirepass", "geheim"]);
    let auth = ["--no-auth-warning", "-a", "geheim"];
    cli(
        &redis,
        &[&auth[..], &["CLIENT", "KILL", "TYPE", "normal"]].concat(),
    );
    patient.send(&appends(10..40)).await;
    patient.says("NOAUTH");
    tokio::time::sleep(Duration::from_secs(2)).await;
    cli(
        &redis,
        &[&auth[..], &["CONFIG", "SET", "requirepass", ""]].concat(),
    );
    patient.goes_on();
    done_once(&redis, 0..40);
}

#[tokio::test(flavor = "multi_thread")]
async fn something_else_at_the_address_of_redis_is_named_and_passes() {
    let redis = servers::redis(&[]);
    let way = Way::to(redis.port);
    let patient = Patient::on_redis(&url(way.port), Lane::Ordered);
    patient.send(&appends(0..10)).await;
    patient.settle();
    way.lead(servers::foreign());
    way.cut();
    patient.send(&appends(10..40)).await;
    patient.says("does not speak Redis's protocol");
    tokio::time::sleep(Duration::from_secs(5)).await;
    way.lead(redis.port);
    patient.goes_on();
    done_once(&redis, 0..40);
}

/// The old master becomes a replica, and the address leads to the new one: open connections stay where they are.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_failover_of_redis_the_new_master_is_found() {
    let (old, new) = (servers::redis(&[]), servers::redis(&[]));
    let port = |server: &Server| server.port.to_string();
    let way = Way::to(old.port);
    let patient = Patient::on_redis(&url(way.port), Lane::Ordered);
    patient.send(&appends(0..10)).await;
    patient.settle();
    cli(&new, &["REPLICAOF", "127.0.0.1", &port(&old)]);
    crate::support::until("the replica", || {
        cli(&new, &["INFO", "replication"])
            .contains("master_link_status:up")
            .then_some(())
    });
    cli(&new, &["REPLICAOF", "NO", "ONE"]);
    cli(&old, &["REPLICAOF", "127.0.0.1", &port(&new)]);
    way.lead(new.port);
    patient.send(&appends(10..40)).await;
    patient.goes_on();
    done_once(&new, 0..40);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_redis_is_waited_for_and_named() {
    let redis = servers::redis(&[]);
    let patient = Patient::on_redis(&url(redis.port), Lane::Ordered);
    patient.send(&sets(0..10)).await;
    patient.settle();
    redis.signal(libc::SIGSTOP);
    patient.send(&sets(10..40)).await;
    patient.says("no answer");
    redis.signal(libc::SIGCONT);
    patient.goes_on();
    done_once(&redis, 0..40);
}

/// Paused for good, and another one has its address: open connections stay with the one that is paused.
#[tokio::test(flavor = "multi_thread")]
async fn another_redis_at_the_address_of_a_paused_one_is_found() {
    let (paused, other) = (servers::redis(&[]), servers::redis(&[]));
    let way = Way::to(paused.port);
    let patient = Patient::on_redis(&url(way.port), Lane::Ordered);
    patient.send(&sets(0..10)).await;
    patient.settle();
    paused.signal(libc::SIGSTOP);
    way.lead(other.port);
    patient.send(&sets(10..40)).await;
    patient.goes_on();
    done_once(&other, 10..40);
}

/// A value that is larger than what is left is its message's own affair, and holds its partition for a while only.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_redis_alone_refuses_holds_its_partition_for_a_while_only() {
    let redis = servers::redis(&[]);
    let patient = Patient::on_redis(&url(redis.port), Lane::Ordered);
    patient.send(&appends(0..1)).await;
    patient.settle();
    // A third of it is what Redis has of buffers when a large value comes.
    let used: u64 = cli(&redis, &["INFO", "memory"])
        .lines()
        .find_map(|line| line.trim().strip_prefix("used_memory:"))
        .and_then(|used| used.parse().ok())
        .expect("its memory");
    cli(
        &redis,
        &["CONFIG", "SET", "maxmemory", &(used + 600_000).to_string()],
    );
    let large = json!({ "do": "redis", "store": "cache", "call": "set", "key": "p:large",
                        "value": "x".repeat(900_000) });
    patient.send(&[large]).await;
    patient.send(&appends(1..10)).await;
    patient.settle();
    let dead = patient.dead();
    assert!(
        matches!(&dead[..], [one] if one.contains("OOM")),
        "{dead:?}"
    );
    done_once(&redis, 0..10);
}

/// A node of a cluster that nobody has made yet.
fn node_of_a_cluster() -> Server {
    // Else the bus has a port that Linux may have given to a connection.
    let bus = servers::free_port().to_string();
    servers::redis(&["--cluster-enabled", "yes", "--cluster-port", &bus])
}

const NODE: &str = "it is a node of a Redis Cluster, which the host does not support: take a server without `cluster-enabled`";

#[test]
fn a_node_of_a_redis_cluster_is_refused_with_the_reason() {
    let node = node_of_a_cluster();
    let why = Stores::redis(&url(node.port)).refused();
    let place = format!(
        "error: Redis store `cache`: Redis at 127.0.0.1:{}: ",
        node.port
    );
    assert!(why.starts_with(&(place + NODE)), "{why}");
}

/// As where the data was moved into a cluster under a running host, and back.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_of_a_redis_cluster_in_the_place_of_redis_is_waited_for_and_named() {
    let (redis, node) = (servers::redis(&[]), node_of_a_cluster());
    let way = Way::to(redis.port);
    let patient = Patient::on_redis(&url(way.port), Lane::Ordered);
    patient.send(&appends(0..10)).await;
    patient.settle();
    way.lead(node.port);
    way.cut();
    patient.send(&appends(10..40)).await;
    patient.says(NODE);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(patient.dead(), Vec::<String>::new());
    way.lead(redis.port);
    patient.goes_on();
    done_once(&redis, 0..40);
}

/// At the start, and under a running host.
#[tokio::test(flavor = "multi_thread")]
async fn tls_on_one_side_only_is_named() {
    let certificate = Certificate::new();
    let (redis, tls) = servers::redis_with_tls(&certificate);
    for (scheme, right, wrong, words) in [
        (
            "redis",
            redis.port,
            tls,
            "the server speaks TLS there: write rediss:// in place of redis://",
        ),
        (
            "rediss",
            tls,
            redis.port,
            "the server does not speak TLS there: write redis:// in place of rediss://",
        ),
    ] {
        let way = Way::to(wrong);
        let stores = Stores::redis(&format!("{scheme}://127.0.0.1:{}", way.port));
        let patient = Patient::with("cache", Lane::Ordered, &stores, |pipeline| {
            let trusted = ("SSL_CERT_FILE", &*certificate.file("certificate"));
            let host = super::spawn(pipeline, &[trusted]);
            super::says_at_the_start(&host, "cache", words);
            way.lead(right);
            host.ready();
            host
        });
        patient.send(&appends(0..10)).await;
        patient.goes_on();
        way.lead(wrong);
        way.cut();
        patient.send(&appends(10..40)).await;
        patient.says(words);
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(patient.dead(), Vec::<String>::new(), "{scheme}");
        way.lead(right);
        patient.goes_on();
        done_once(&redis, 0..40);
        cli(&redis, &["FLUSHALL"]);
    }
}

#[test]
fn a_login_that_redis_refuses_is_refused_at_the_start_without_the_password() {
    let redis = servers::redis(&["--requirepass", "geheim"]);
    for (login, words) in [
        (":falsch@", "were the password or the user changed?"),
        ("", "NOAUTH"),
    ] {
        let url = format!("redis://{login}127.0.0.1:{}", redis.port);
        let why = Stores::redis(&url).refused();
        let place = format!(
            "error: Redis store `cache`: Redis at 127.0.0.1:{}: ",
            redis.port
        );
        assert!(why.starts_with(&place) && why.contains(words), "{why}");
        assert!(!why.contains("falsch"), "{why}");
    }
}

/// A transactional stage, which has Redis beside its database.
struct Beside {
    place: Place,
    patient: Patient,
}

impl Beside {
    async fn new(url: &str) -> Self {
        let place = Place::new().await;
        let grant = "redis = { cache = { prefix = \"p:\" } }\nsql = [\"db\"]";
        let redis = format!("[redis.cache]\nurl = \"{url}\"");
        let tables = format!("{redis}\n[sql.db]\nurl = \"{}\"", place.url);
        let patient = Patient::start("cache", Lane::Transactional, grant, &tables);
        Self { place, patient }
    }

    /// Sends messages that have each a row, a value and an output: what is done before Redis refuses has to be undone, each time.
    async fn send(&self, numbers: std::ops::Range<u32>) {
        let (rows, values) = (inserts(numbers.clone()), sets(numbers.clone()));
        let messages = numbers.zip(rows.into_iter().zip(values));
        let messages = messages.map(|(n, (row, value))| {
            let output = json!({ "do": "emit", "topic": self.patient.output, "value": n });
            json!({ "do": "steps", "steps": [row, output, value] })
        });
        self.patient.send(&messages.collect::<Vec<_>>()).await;
    }

    /// That these have their row and their output once, and no other has.
    async fn has_once(&self, numbers: std::ops::Range<i64>) {
        let expected = Vec::from_iter(numbers);
        assert_eq!(self.place.numbers().await, expected, "rows");
        let outputs = self.patient.log.read(&self.patient.output);
        let mut outputs: Vec<_> = outputs.iter().map(|seen| seen.json().as_i64()).collect();
        outputs.sort_unstable();
        let expected: Vec<_> = expected.into_iter().map(Some).collect();
        assert_eq!(outputs, expected, "outputs");
    }

    /// While Redis refuses, nothing is given up on and nothing is committed; then each message has its effects once.
    async fn is_held(url: &str, words: &str, sicken: impl FnOnce(), heal: impl FnOnce()) {
        let stage = Self::new(url).await;
        let patient = &stage.patient;
        stage.send(0..10).await;
        patient.settle();
        sicken();
        stage.send(10..40).await;
        patient.says(words);
        let admin = patient.host.address("admin");
        patient.host.wait_for("the lane to wait", || {
            let waits = "stagehost_lanes_waiting{stage=\"probe\",for=\"store\"} 1";
            get(&admin, "/metrics").1.contains(waits).then_some(())
        });
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(patient.dead(), Vec::<String>::new(), "{words}");
        stage.has_once(0..10).await;
        heal();
        patient.goes_on();
        stage.has_once(0..40).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_redis_holds_a_transactional_stage_which_has_all_once_afterwards() {
    let redis = servers::redis(&[]);
    let limit = |bytes: &str| {
        cli(&redis, &["CONFIG", "SET", "maxmemory", bytes]);
    };
    Beside::is_held(&url(redis.port), "OOM", || limit("1"), || limit("0")).await;
    done_once(&redis, 0..40);
}

/// The one that the pipeline has is another's all at once, or one is asked for where none was.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_password_of_redis_holds_a_transactional_stage_which_has_all_once_afterwards() {
    let redis = servers::redis(&[]);
    let password = |password: &str| {
        allow(&redis, &["resetpass", &format!(">{password}")]);
        cli(&redis, &["CLIENT", "KILL", "USER", "stages"]);
    };
    let (url_of_user, words) = (
        user(&redis, &["~*", "+@all"]),
        "password or the user changed",
    );
    Beside::is_held(
        &url_of_user,
        words,
        || password("other"),
        || password("geheim"),
    )
    .await;
    done_once(&redis, 0..40);
    cli(&redis, &["FLUSHALL"]);
    let ask = || {
        cli(&redis, &["CONFIG", "SET", "requirepass", "geheim"]);
        let auth = ["--no-auth-warning", "-a", "geheim"];
        cli(
            &redis,
            &[&auth[..], &["CLIENT", "KILL", "TYPE", "normal"]].concat(),
        );
    };
    let ask_no_more = || {
        let auth = ["--no-auth-warning", "-a", "geheim"];
        cli(
            &redis,
            &[&auth[..], &["CONFIG", "SET", "requirepass", ""]].concat(),
        );
    };
    Beside::is_held(&url(redis.port), "NOAUTH", ask, ask_no_more).await;
    done_once(&redis, 0..40);
}

/// They have a condition and a series of metrics each.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_stores_of_one_name_the_sick_one_is_named() {
    let redis = servers::redis(&[]);
    let stores = format!(
        "[redis.twin]\nurl = \"{}\"\n[sql.twin]\nurl = \"sqlite:db.sqlite\"\n[redis.cache]\nurl = \"memory:\"",
        url(redis.port)
    );
    let grant = "sql = [\"twin\"]\n\
                 redis = { twin = { prefix = \"p:\", commands = [\"APPEND\"] }, cache = { prefix = \"\" } }";
    let patient = Patient::start("twin", Lane::Ordered, grant, &stores);
    let append = |n| {
        json!({ "do": "redis", "store": "twin", "call": "execute", "command": "APPEND",
                "arguments": [format!("p:{n}"), "x"] })
    };
    patient.send(&[append(0)]).await;
    patient.settle();
    cli(&redis, &["CONFIG", "SET", "maxmemory", "1"]);
    patient.send(&[append(1)]).await;
    let admin = patient.host.address("admin");
    patient.host.wait_for("readiness to name it", || {
        let (status, said) = crate::support::get(&admin, "/readyz");
        assert!(!said.contains("store twin (sql)"), "{said}");
        (status == 503 && said.contains("store twin (redis): OOM")).then_some(())
    });
    let metrics = crate::support::get(&admin, "/metrics").1;
    for series in [
        "stagehost_circuit_open{store=\"twin\",kind=\"redis\"} 1",
        "stagehost_circuit_open{store=\"twin\",kind=\"sql\"} 0",
        "stagehost_circuit_open{store=\"cache\"} 0",
    ] {
        assert!(metrics.contains(series), "{metrics}");
    }
    cli(&redis, &["CONFIG", "SET", "maxmemory", "0"]);
    patient.goes_on();
    done_once(&redis, 0..2);
}
