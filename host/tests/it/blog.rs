//! The blog of `examples/`, as it stands there: on what is embedded, and on Kafka, PostgreSQL and Redis.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Host, Log, component, get, http, server, unique};

/// What the POST route answers.
const RECEIVED: &str = "We have received your post and it will be published sooner or later.";
/// Connections that the load tool keeps open.
const CONNECTIONS: usize = 32;

/// The example in a folder of its own, so that its data is the test's.
fn blog_folder() -> Arc<TempDir> {
    let example = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../examples/blog");
    let folder = tempfile::tempdir().expect("a folder");
    let built = Path::new(&component("publisher"))
        .parent()
        .expect("a folder")
        .display()
        .to_string();
    let pipeline = std::fs::read_to_string(example.join("pipeline.toml")).expect("the example");
    let pipeline = pipeline.replace("../../target/stages", &built);
    std::fs::write(folder.path().join("pipeline.toml"), pipeline).expect("a copy");
    let migrations = folder.path().join("migrations");
    std::fs::create_dir(&migrations).expect("a folder");
    for file in std::fs::read_dir(example.join("migrations")).expect("the migrations") {
        let file = file.expect("a file");
        std::fs::copy(file.path(), migrations.join(file.file_name())).expect("a copy");
    }
    Arc::new(folder)
}

fn start(folder: &Arc<TempDir>, variables: &[(&str, &str)]) -> Host {
    let mut all = vec![
        ("HTTP_LISTEN", "127.0.0.1:0"),
        ("ADMIN_LISTEN", "127.0.0.1:0"),
    ];
    all.extend(variables);
    let host = Host::run(folder.clone(), &folder.path().join("pipeline.toml"), &all);
    host.ready();
    host
}

/// Writes a post, and answers its uid.
fn post(http_address: &str, form: &str) -> String {
    let head = "POST /post HTTP/1.1\r\ncontent-type: application/x-www-form-urlencoded";
    let (status, head, body) = http(http_address, head, form);
    assert_eq!((status, body.as_str()), (201, RECEIVED), "{head}");
    let uid = head.lines().find_map(|l| l.strip_prefix("stagehost-uid: "));
    uid.expect("the header stagehost-uid").trim().to_string()
}

/// Reads until it is there.
fn read(host: &Host, http_address: &str, path: &str) -> Value {
    let body = host.wait_for(path, || {
        let (status, body) = get(http_address, path);
        (status == 200).then_some(body)
    });
    serde_json::from_str(&body).expect("the post is JSON")
}

/// Runs kcat and answers its stdout.
fn kcat(arguments: &[&str], input: &[u8]) -> String {
    let mut child = Command::new("kcat")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kcat is installed: run `make test`");
    child
        .stdin
        .take()
        .expect("stdin")
        .write_all(input)
        .expect("kcat reads");
    let output = child.wait_with_output().expect("kcat ends");
    assert!(
        output.status.success(),
        "kcat {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The same on every log and store.
fn check_blog(host: &Host) {
    let (address, brokers) = (host.address("HTTP"), host.address("Kafka"));

    let uid = post(&address, "title=%C3%9Cber+Kafka+%26+Go&content=It+works.");
    let slug = format!("uber-kafka-go-{uid}");
    let expected =
        json!({ "uid": uid, "title": "Über Kafka & Go", "content": "It works.", "slug": slug });
    assert_eq!(read(host, &address, &format!("/post/{slug}")), expected);
    assert_eq!(read(host, &address, &format!("/post/uid/{uid}")), expected);
    assert_eq!(get(&address, "/post/unknown"), (404, "not found".into()));

    let json = r#"{"title":"In JSON","content":"{}"}"#;
    let head = "POST /post HTTP/1.1\r\ncontent-type: application/json";
    assert_eq!(http(&address, head, json).0, 201);

    // Other clients of the log read what the stages write, and feed them.
    let fed = uuid::Uuid::new_v4().to_string();
    let record = json!({ "uid": fed, "title": "From kcat", "content": "fed" }).to_string();
    kcat(
        &["-b", &brokers, "-P", "-t", "app.newPosts", "-k", &fed],
        record.as_bytes(),
    );
    let slug = read(host, &address, &format!("/post/uid/{fed}"))["slug"].clone();
    assert_eq!(slug, format!("from-kcat-{fed}"));
    let published = kcat(
        &[
            "-b",
            &brokers,
            "-C",
            "-t",
            "app.publishedPosts",
            "-e",
            "-q",
            "-f",
            "%k\n",
        ],
        b"",
    );
    assert!(published.lines().any(|l| l == slug), "kcat reads {slug}");

    // What is not JSON is put aside, byte for byte, and its partition goes on.
    let poison = format!("poison \u{1F480} {}", unique("x"));
    for value in [poison.as_str(), &record] {
        kcat(
            &[
                "-b",
                &brokers,
                "-P",
                "-t",
                "app.newPosts",
                "-p",
                "3",
                "-k",
                "bad",
                "-H",
                "who=kcat",
            ],
            value.as_bytes(),
        );
    }
    let log = Log::new(&brokers);
    log.wait_committed("service.publisher", "app.newPosts");
    let dead = log.read("app.newPosts.dlq");
    let dead: Vec<_> = dead
        .iter()
        .filter(|d| d.value.as_deref() == Some(&poison))
        .collect();
    assert_eq!(dead.len(), 1, "one dead letter");
    for (name, value) in [
        ("who", "kcat"),
        ("__dlq.errors.topic", "app.newPosts"),
        ("__dlq.errors.partition", "3"),
        ("__dlq.errors.group", "service.publisher"),
        ("__dlq.errors.delivery.count", "1"),
        ("stagehost-stage", "publisher"),
        ("stagehost-cause", "reject"),
    ] {
        assert_eq!(dead[0].header(name), Some(value), "header {name}");
    }
    assert_eq!(dead[0].key.as_deref(), Some("bad"));
}

/// Many posts at once; answers their uids.
async fn load(address: &str, posts: usize) -> Vec<String> {
    let client: Client<_, Full<bytes::Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let mut tasks = tokio::task::JoinSet::new();
    for connection in 0..CONNECTIONS {
        let (client, uri) = (client.clone(), format!("http://{address}/post"));
        tasks.spawn(async move {
            let mut uids = Vec::new();
            for n in (connection..posts).step_by(CONNECTIONS) {
                let body = format!("title=Post+{n}&content=Content+of+{n}");
                let request = hyper::Request::post(&uri)
                    .header("content-type", "application/x-www-form-urlencoded")
                    .body(Full::from(body))
                    .expect("a request");
                let answer = client.request(request).await.expect("an answer");
                assert_eq!(answer.status(), 201);
                let uid = answer.headers()["stagehost-uid"]
                    .to_str()
                    .expect("text")
                    .to_string();
                answer.into_body().collect().await.expect("the body");
                uids.push(uid);
            }
            uids
        });
    }
    tasks.join_all().await.concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn on_what_is_embedded_and_it_is_still_there_after_a_restart() {
    let folder = blog_folder();
    let host = start(&folder, &[]);
    check_blog(&host);
    let address = host.address("HTTP");
    let uids = load(&address, 500).await;
    for uid in &uids {
        read(&host, &address, &format!("/post/uid/{uid}"));
    }
    let ends = |brokers: &str| Log::new(brokers).read("app.publishedPosts").len();
    Log::new(&host.address("Kafka")).wait_committed("service.publisher", "app.newPosts");
    let published = ends(&host.address("Kafka"));
    let (status, log) = host.stop();
    assert!(status.success(), "{log}");

    let host = start(&folder, &[]);
    let address = host.address("HTTP");
    for uid in &uids {
        assert_eq!(
            get(&address, &format!("/post/uid/{uid}")).0,
            200,
            "{uid} is still there"
        );
    }
    let log = Log::new(&host.address("Kafka"));
    assert_eq!(
        log.lag("service.publisher", "app.newPosts"),
        0,
        "offsets are still there"
    );
    assert_eq!(
        ends(&host.address("Kafka")),
        published,
        "nothing was published again"
    );
    host.kill();

    // What was acknowledged before a crash is published after it.
    let host = start(&folder, &[]);
    let uid = post(&host.address("HTTP"), "title=Crash&content=soon");
    host.kill();
    let host = start(&folder, &[]);
    let found = read(&host, &host.address("HTTP"), &format!("/post/uid/{uid}"));
    assert_eq!(found["title"], "Crash");
}

#[tokio::test(flavor = "multi_thread")]
async fn on_kafka_postgresql_and_redis_under_load() {
    let (kafka, redis) = (server("KAFKA_BROKERS"), server("REDIS_URL"));
    let (database, name) = fresh_database().await;
    let variables = [
        ("KAFKA_BROKERS", kafka.as_str()),
        ("DATABASE_URL", database.as_str()),
        ("REDIS_URL", redis.as_str()),
    ];
    let posts = 10_000;
    let host = start(&blog_folder(), &variables);
    let uids = load(&host.address("HTTP"), posts).await;
    let log = Log::new(&kafka);
    log.wait_committed("service.publisher", "app.newPosts");
    log.wait_committed("service.cacheManager", "app.publishedPosts");

    let pool = sqlx::PgPool::connect(&database).await.expect("PostgreSQL");
    let rows: Vec<String> = sqlx::query_scalar("SELECT uid FROM posts")
        .fetch_all(&pool)
        .await
        .expect("rows");
    pool.close().await;
    let rows: std::collections::BTreeSet<_> = rows.into_iter().collect();
    let missing = uids.iter().filter(|uid| !rows.contains(*uid)).count();
    assert_eq!(
        (uids.len(), missing),
        (posts, 0),
        "every post is in the table"
    );

    let client = redis::Client::open(redis.as_str()).expect("Redis");
    let mut connection = client
        .get_multiplexed_async_connection()
        .await
        .expect("Redis");
    let mut cached = 0;
    for chunk in uids.chunks(500) {
        let keys: Vec<_> = chunk.iter().map(|uid| format!("post:uid:{uid}")).collect();
        let found: Vec<Option<String>> = redis::cmd("MGET")
            .arg(&keys)
            .query_async(&mut connection)
            .await
            .expect("values");
        cached += found.iter().flatten().count();
    }
    assert_eq!(cached, posts, "every post is in Redis");
    let said = host.log();
    let errors: Vec<_> = said
        .lines()
        .filter(|l| l.contains("ERROR") || l.contains(" WARN "))
        // The tests' role may do anything, which the host does not like.
        .filter(|l| !l.contains("stage-url"))
        .collect();
    assert_eq!(errors, [] as [&str; 0], "no error in the log");

    check_blog(&host);
    let (status, log) = host.stop();
    assert!(status.success(), "{log}");
    drop_database(&name).await;
}

/// A database of the test's own: its URL and name.
async fn fresh_database() -> (String, String) {
    let name = unique("blog").replace('-', "_");
    administer(&format!("CREATE DATABASE {name}")).await;
    let mut url = url::Url::parse(&server("DATABASE_URL")).expect("DATABASE_URL is a URL");
    url.set_path(&name);
    (url.to_string(), name)
}

async fn drop_database(name: &str) {
    administer(&format!("DROP DATABASE {name} WITH (FORCE)")).await;
}

async fn administer(statement: &str) {
    let pool = sqlx::PgPool::connect(&server("DATABASE_URL"))
        .await
        .expect("PostgreSQL");
    sqlx::raw_sql(sqlx::AssertSqlSafe(statement.to_string()))
        .execute(&pool)
        .await
        .expect("the database is administered");
    pool.close().await;
}

/// The example as it stands in the repository is what `make demo` runs.
#[test]
fn the_example_is_fine() {
    let folder = blog_folder();
    let output = Command::new(env!("CARGO_BIN_EXE_host"))
        .args(["check", "--skip-ports"])
        .arg(folder.path().join("pipeline.toml"))
        .env_remove("KAFKA_BROKERS")
        .env_remove("DATABASE_URL")
        .env_remove("REDIS_URL")
        .output()
        .expect("the host runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The cache manager takes batches. However they are cut, a post that is delivered again does not undo a newer one, and one
/// that can't be cached takes none of its batch with it.
#[tokio::test(flavor = "multi_thread")]
async fn the_cache_keeps_the_newest_however_batches_are_cut() {
    const POSTS: usize = 60;
    const SLUGS: usize = 4;
    let (kafka, redis) = (server("KAFKA_BROKERS"), server("REDIS_URL"));
    let run = unique("run");
    let pipeline = |topic: &str, group: &str, batch: usize| {
        format!(
            r#"
            name = "cache"
            [kafka]
            brokers = "{kafka}"
            [topics."{topic}"]
            partitions = 1
            [redis.cache]
            url = "{redis}"
            [stages.cache]
            component = "{}"
            input = ["{topic}"]
            group = "{group}"
            redis = {{ cache = {{ prefix = "post:" }} }}
            batch = {{ max-messages = {batch} }}
            [[http.routes]]
            path = "/post/{{slug}}"
            method = "GET"
            read = {{ redis = "cache", key = "post:{{slug}}" }}
            [http]
            listen = "127.0.0.1:0"
            [admin]
            listen = "127.0.0.1:0"
            "#,
            component("cache-manager")
        )
    };
    let posts: Vec<_> = (0..POSTS)
        .map(|n| match n {
            17 => "no post".to_owned(),
            // Redis's interface takes no such key.
            23 => json!({ "uid": "u".repeat(20_000), "slug": format!("{run}-long") }).to_string(),
            _ => {
                json!({ "uid": format!("{run}-{n}"), "slug": format!("{run}-{}", n % SLUGS), "n": n })
                    .to_string()
            }
        })
        .collect();
    let records: Vec<_> = posts.iter().map(|post| (None, post.as_str())).collect();
    let log = Log::new(&kafka);
    let newest = |address: &str| -> Vec<Option<u64>> {
        let read = |slug| {
            let (_, body) = get(address, &format!("/post/{run}-{slug}"));
            serde_json::from_str::<Value>(&body).ok()?["n"].as_u64()
        };
        (0..SLUGS).map(read).collect()
    };
    let expected: Vec<_> = (POSTS - SLUGS..POSTS).map(|n| Some(n as u64)).collect();
    // What comes after the first time is what had come half-way.
    for (count, batch) in [
        (POSTS, 40),
        (POSTS / 2, 7),
        (POSTS / 2, 500),
        (POSTS / 2, 1),
    ] {
        let (topic, group) = (unique("published"), unique("group"));
        let host = Host::start(&pipeline(&topic, &group, batch));
        host.ready();
        log.produce(&topic, &records[..count]).await;
        log.wait_committed(&group, &topic);
        let dead = log.read(&format!("{topic}.dlq"));
        assert_eq!(dead.len(), 2, "those that are no posts");
        let address = host.address("HTTP");
        assert_eq!(newest(&address), expected, "batches of {batch}");
    }
}
