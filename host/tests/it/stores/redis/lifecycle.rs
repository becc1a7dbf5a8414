//! Stores that are opened, killed, away, and back.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use host::capability::StoreError;
use host::capability::redis::{Error, Set, Store, system_clock};
use host::pipeline::RedisUrl;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::super::free_port;
use super::clock;
use crate::support::server;

#[tokio::test]
async fn the_embedded_store_survives_a_restart() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let url = RedisUrl::Embedded(folder.path().to_owned());
    let time = Arc::new(AtomicU64::new(1_000));
    let open = || Store::connect(&url, clock(&time));
    let first = open().await.expect("a new store");
    let set = |ttl| Set {
        entries: vec![(format!("ttl {ttl:?}").into_bytes(), b"value".to_vec())],
        ttl,
        ..Set::default()
    };
    for ttl in [None, Some(10), Some(1_000)] {
        assert_eq!(first.set(set(ttl)).await, Ok(vec![true]));
    }
    match open().await.map(drop) {
        Err(StoreError::Refused(why)) => assert!(why.contains("in use"), "{why}"),
        other => panic!("two stores in one folder: {other:?}"),
    }
    first.close().await;
    let closed = first.fetch(b"ttl None").await;
    assert!(matches!(closed, Err(Error::Unavailable(_))), "{closed:?}");

    time.store(1_500, Ordering::SeqCst);
    let second = open().await.expect("the store again");
    for (key, expected) in [
        ("ttl None", Some(b"value".to_vec())),
        ("ttl Some(10)", None),
        ("ttl Some(1000)", Some(b"value".to_vec())),
    ] {
        assert_eq!(second.fetch(key.as_bytes()).await, Ok(expected), "{key}");
    }
    second.close().await;
}

/// This test is its own child: it runs itself in a process that writes until it is killed.
#[tokio::test]
async fn the_embedded_store_keeps_what_it_acknowledged_before_a_kill() {
    const FOLDER: &str = "STAGEHOST_TEST_CHILD_FOLDER";
    const ACKNOWLEDGED: usize = 200;
    if let Some(folder) = std::env::var_os(FOLDER) {
        return write_until_killed(RedisUrl::Embedded(folder.into())).await;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (_, module) = module_path!()
        .split_once("::")
        .expect("a module in a crate");
    let name = "the_embedded_store_keeps_what_it_acknowledged_before_a_kill";
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", &format!("{module}::{name}"), "--nocapture"])
        .env(FOLDER, folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a child");
    let output = BufReader::new(child.stdout.take().expect("its output"));
    let acknowledged = output
        .lines()
        .map_while(Result::ok)
        .filter_map(|line| line.strip_prefix("acknowledged ").map(str::to_owned));
    let acknowledged: Vec<_> = acknowledged.take(ACKNOWLEDGED).collect();
    child.kill().expect("a child to kill");
    child.wait().expect("its end");
    assert_eq!(acknowledged.len(), ACKNOWLEDGED);

    let url = RedisUrl::Embedded(folder.path().to_owned());
    let store = Store::connect(&url, system_clock()).await;
    let store = store.expect("the store after the kill");
    for key in &acknowledged {
        let value = store.fetch(key.as_bytes()).await;
        assert_eq!(value, Ok(Some(key.clone().into_bytes())), "{key}");
    }
    assert_eq!(store.increment(b"new".to_vec(), 1).await, Ok(1));
    store.close().await;
}

async fn write_until_killed(url: RedisUrl) {
    let store = Store::connect(&url, system_clock()).await;
    let store = store.expect("a new store");
    for number in 0_u64.. {
        let text = number.to_string();
        let set = Set {
            entries: vec![(text.clone().into_bytes(), text.clone().into_bytes())],
            ..Set::default()
        };
        store.set(set).await.expect("a store that works");
        println!("\nacknowledged {text}");
    }
}

#[tokio::test]
async fn a_broken_connection_is_made_again() {
    const TRIES: usize = 100;
    let proxy = Proxy::start(&server("REDIS_URL")).await;
    let store = Store::connect(&RedisUrl::Remote(proxy.url.clone()), system_clock()).await;
    let store = store.expect("Redis behind the proxy");
    for _ in 0..3 {
        store.ping().await.expect("a connection");
        proxy.cut();
        let mut again = Err(Error::Unavailable("not tried".to_owned()));
        for _ in 0..TRIES {
            again = store.fetch(b"test:nothing").await;
            match &again {
                Ok(_) => break,
                Err(Error::Unavailable(_)) => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(other) => panic!("{other:?}"),
            }
        }
        assert_eq!(again, Ok(None));
    }
}

#[tokio::test]
async fn who_is_away_is_unavailable_and_who_refuses_is_refused() {
    let away = format!("redis://:geheim@127.0.0.1:{}", free_port());
    let error = Store::connect(&RedisUrl::Remote(away), system_clock())
        .await
        .map(drop);
    match error {
        Err(StoreError::Unavailable(why)) => {
            assert!(
                why.contains("127.0.0.1") && !why.contains("geheim"),
                "{why}"
            );
        }
        other => panic!("{other:?}"),
    }
    let address = address(&server("REDIS_URL"));
    let wrong = format!("redis://nobody:geheim@{address}");
    let error = Store::connect(&RedisUrl::Remote(wrong), system_clock())
        .await
        .map(drop);
    match error {
        Err(StoreError::Refused(why)) => {
            assert!(why.contains(&address) && !why.contains("geheim"), "{why}");
        }
        other => panic!("{other:?}"),
    }
}

/// Host and port of a `redis:` URL.
fn address(url: &str) -> String {
    let rest = url.strip_prefix("redis://").expect("a redis: URL");
    let rest = rest.rsplit_once('@').map_or(rest, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest).to_owned()
}

/// Passes connections on, until it is told to cut them.
struct Proxy {
    url: String,
    cut: watch::Sender<()>,
}

impl Proxy {
    async fn start(url: &str) -> Self {
        let target = address(url);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let own = listener.local_addr().expect("its address").to_string();
        let url = url.replacen(&target, &own, 1);
        let cut = watch::Sender::new(());
        let cuts = cut.clone();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let mut server = TcpStream::connect(&target).await.expect("the server");
                let mut cut = cuts.subscribe();
                tokio::spawn(async move {
                    // Either way both ends are dropped, which is the cut.
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        Self { url, cut }
    }

    fn cut(&self) {
        self.cut.send_replace(());
    }
}
