//! Starting, sharing, waiting and stopping.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::group_offsets::Member;
use crate::support::{Host, Log, component, get, http, server, unique, until};

/// An echo between topics of its own.
struct Echo {
    pipeline: String,
    input: String,
    output: String,
    group: String,
}

impl Echo {
    fn on(brokers: &str, settings: &str) -> Self {
        let (input, output, group) = (unique("in"), unique("out"), unique("group"));
        let component = component("test-echo");
        let pipeline = format!(
            r#"
            name = "echo"
            kafka.brokers = "{brokers}"
            topics."{input}".partitions = 8
            topics."{output}".partitions = 8
            admin.listen = "127.0.0.1:0"
            {settings}
            [stages.echo]
            component = "{component}"
            input = ["{input}"]
            group = "{group}"
            output = ["{output}"]
            config = {{ to = "{output}" }}
            "#
        );
        Self {
            pipeline,
            input,
            output,
            group,
        }
    }

    /// Sends numbers from `from` up to `to` to the partitions in turn.
    async fn send(&self, log: &Log, from: u32, to: u32) {
        let texts: Vec<_> = (from..to).map(|n| n.to_string()).collect();
        let records: Vec<_> = texts
            .iter()
            .map(|t| (Some(t.as_str()), t.as_str()))
            .collect();
        log.produce(&self.input, &records).await;
    }
}

/// Partitions that a host says it lags in: those that it owns.
fn owned(host: &Host, group: &str) -> BTreeSet<String> {
    let metrics = get(&host.address("admin"), "/metrics").1;
    let lines = metrics
        .lines()
        .filter(|l| l.starts_with("kafka_consumergroup_lag{") && l.contains(group));
    lines
        .filter_map(|l| {
            Some(
                l.split("partition=\"")
                    .nth(1)?
                    .split('"')
                    .next()?
                    .to_string(),
            )
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hosts_share_the_partitions_and_one_takes_over() {
    let brokers = server("KAFKA_BROKERS");
    let (log, echo) = (Log::new(&brokers), Echo::on(&brokers, ""));
    let first = Host::start(&echo.pipeline);
    echo.send(&log, 0, 1000).await;
    let second = Host::start(&echo.pipeline);
    until("both to own four partitions", || {
        let (a, b) = (owned(&first, &echo.group), owned(&second, &echo.group));
        (a.len() == 4 && b.len() == 4 && a.is_disjoint(&b)).then_some(())
    });
    echo.send(&log, 1000, 2000).await;
    log.wait_committed(&echo.group, &echo.input);
    let (status, said) = first.stop();
    assert!(status.success(), "{said}");
    echo.send(&log, 2000, 3000).await;
    log.wait_committed(&echo.group, &echo.input);
    until("the second to own all", || {
        (owned(&second, &echo.group).len() == 8).then_some(())
    });
    let numbers: Vec<u32> = log
        .read(&echo.output)
        .iter()
        .filter_map(|s| s.value.as_deref()?.parse().ok())
        .collect();
    let distinct: BTreeSet<_> = numbers.iter().copied().collect();
    assert_eq!(distinct.len(), 3000, "nothing is lost");
    assert_eq!(
        numbers.len(),
        3000,
        "a stop and a join in order repeat nothing"
    );
}

/// Nobody waits for it until its session is over, which is longer than this test waits for anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_partitions_leaves_its_group_at_its_stop() {
    let brokers = server("KAFKA_BROKERS");
    let log = Log::new(&brokers);
    let session = "kafka.properties.\"session.timeout.ms\" = \"300000\"";
    let mut echo = Echo::on(&brokers, session);
    echo.pipeline = echo.pipeline.replace("partitions = 8", "partitions = 1");
    let first = Host::start(&echo.pipeline);
    echo.send(&log, 0, 1).await;
    log.wait_committed(&echo.group, &echo.input);
    let members = |count| {
        until(&format!("{count} members"), || {
            (log.members(&echo.group) == count).then_some(())
        });
    };
    let second = Host::start(&echo.pipeline);
    members(2);
    assert_eq!(owned(&first, &echo.group).len(), 1);
    let (status, said) = second.stop();
    assert!(status.success(), "{said}");
    members(1);
    // And whatever it does when it is stopped.
    for wait in (0..10).map(|n| Duration::from_millis(150 * n)) {
        let host = Host::start(&echo.pipeline);
        std::thread::sleep(wait);
        let (status, said) = host.stop();
        assert!(status.success(), "after {wait:?}: {status}: {said}");
        members(1);
    }
    echo.send(&log, 1, 100).await;
    log.wait_committed(&echo.group, &echo.input);
}

/// While the group hands partitions round, it refuses commits of those that a host keeps.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_done_during_a_rebalance_is_committed() {
    let brokers = server("KAFKA_BROKERS");
    let (log, echo) = (Log::new(&brokers), Echo::on(&brokers, ""));
    let first = Host::start(&echo.pipeline);
    let second = Host::start(&echo.pipeline);
    echo.send(&log, 0, 1000).await;
    log.wait_committed(&echo.group, &echo.input);
    for host in [first, second] {
        let (status, said) = host.stop();
        assert!(status.success(), "{said}");
    }
    assert_eq!(log.read(&echo.output).len(), 1000);
}

/// A host has joined anew and waits for another member, which is slow: whatever it commits is of a generation that is over by then.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_done_before_a_stop_in_a_rebalance_is_not_done_again() {
    let brokers = server("KAFKA_BROKERS");
    let (log, echo) = (Log::new(&brokers), Echo::on(&brokers, ""));
    let first = Host::start(&echo.pipeline);
    first.ready();
    let slow = Member::join(&echo.group, &echo.input, 4);
    // It takes a part of what both have, and the slow one does not give up its own.
    let second = Host::start(&echo.pipeline);
    let kept = until("the first to give up what it has too much", || {
        let kept = owned(&first, &echo.group);
        (kept.len() < 4).then_some(kept)
    });
    let values: Vec<_> = (0..100).map(|n| n.to_string()).collect();
    for partition in &kept {
        let partition = partition.parse().expect("a number");
        log.produce_to(&echo.input, partition, &values).await;
    }
    let count = kept.len() * values.len();
    log.read_at_least(&echo.output, count);
    first.signal(libc::SIGTERM);
    std::thread::sleep(Duration::from_secs(1));
    slow.go_on();
    let (status, said) = first.ended();
    assert!(status.success(), "{said}");
    drop(slow);
    until("the second to own all", || {
        (owned(&second, &echo.group).len() == 8).then_some(())
    });
    log.produce_to(&echo.input, 0, &values).await;
    log.wait_committed(&echo.group, &echo.input);
    assert_eq!(log.read(&echo.output).len(), count + values.len(), "{said}");
}

/// With a name in its group, a host that is started again has its partitions as before, and no other host had them.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_with_a_name_keeps_its_partitions_over_a_restart() {
    let brokers = server("KAFKA_BROKERS");
    let (log, echo) = (Log::new(&brokers), Echo::on(&brokers, ""));
    let pipeline = format!("{}\ninstance-id = \"echo-${{MEMBER}}\"", echo.pipeline);
    let start = |member: &str| {
        let folder = Arc::new(tempfile::tempdir().expect("a folder"));
        let host = Host::spawn(folder, &pipeline, &[("MEMBER", member)]);
        host.ready();
        host
    };
    let (first, second) = (start("1"), start("2"));
    echo.send(&log, 0, 1000).await;
    let before = until("both to own four partitions", || {
        let (a, b) = (owned(&first, &echo.group), owned(&second, &echo.group));
        (a.len() == 4 && b.len() == 4 && a.is_disjoint(&b)).then_some((a, b))
    });
    log.wait_committed(&echo.group, &echo.input);
    let (status, said) = first.stop();
    assert!(status.success(), "{said}");
    echo.send(&log, 1000, 2000).await;
    let first = start("1");
    log.wait_committed(&echo.group, &echo.input);
    until("the first to own what it had", || {
        (owned(&first, &echo.group) == before.0).then_some(())
    });
    assert_eq!(owned(&second, &echo.group), before.1);
    let said = second.log();
    assert_eq!(said.matches("assigned in-").count(), 1, "{said}");
    assert_eq!(log.read(&echo.output).len(), 2000, "nothing was repeated");

    // Two of one name: the newer one is the member.
    let newer = start("1");
    let (status, said) = first.ended();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("FencedInstanceId"), "{said}");
    until("the newer one to own what the first had", || {
        (owned(&newer, &echo.group) == before.0).then_some(())
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_under_load_drains_and_repeats_nothing() {
    let brokers = server("KAFKA_BROKERS");
    let (log, echo) = (Log::new(&brokers), Echo::on(&brokers, ""));
    let host = Host::start(&echo.pipeline);
    let sending = async {
        echo.send(&log, 0, 30_000).await;
    };
    let stopping = async {
        log.read_at_least(&echo.output, 1);
        let (status, said) = tokio::task::block_in_place(|| host.stop());
        assert_eq!(status.code(), Some(0), "{said}");
    };
    tokio::join!(sending, stopping);
    let host = Host::start(&echo.pipeline);
    log.wait_committed(&echo.group, &echo.input);
    assert!(host.stop().0.success());
    assert_eq!(log.read(&echo.output).len(), 30_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_kill_nothing_is_lost() {
    let brokers = server("KAFKA_BROKERS");
    let (log, echo) = (Log::new(&brokers), Echo::on(&brokers, ""));
    let host = Host::start(&echo.pipeline);
    let sending = async { echo.send(&log, 0, 30_000).await };
    let killing = async {
        log.read_at_least(&echo.output, 1);
        host.kill();
    };
    tokio::join!(sending, killing);
    let _host = Host::start(&echo.pipeline);
    log.wait_committed(&echo.group, &echo.input);
    let seen = log.read(&echo.output);
    let distinct: BTreeSet<_> = seen.iter().map(|s| s.value.clone()).collect();
    assert_eq!(distinct.len(), 30_000);
}

/// The broker is this test's, on a port that is known before it runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_away_is_waited_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut config = embedded_kafka::Config::new(folder.path());
    let broker = embedded_kafka::Broker::start(config.clone())
        .await
        .expect("a broker");
    config.listen = broker.address();
    let brokers = broker.address().to_string();
    broker.shutdown().await;

    let echo = Echo::on(&brokers, "");
    let host = Host::spawn(
        Arc::new(tempfile::tempdir().expect("a folder")),
        &echo.pipeline,
        &[],
    );
    host.wait_for("a line that says so", || {
        let waiting = format!("waiting for the log at {brokers}");
        host.log().contains(&waiting).then_some(())
    });
    let said = host.log();
    let admin = said
        .split("admin listens on http://")
        .nth(1)
        .and_then(|s| s.lines().next());
    let (status, why) = get(admin.expect("the admin address is said at once"), "/readyz");
    assert!(status == 503 && why.contains("log: "), "{status} {why}");
    let broker = embedded_kafka::Broker::start(config.clone())
        .await
        .expect("a broker");
    host.ready();
    let log = Log::new(&brokers);
    echo.send(&log, 0, 10).await;
    log.wait_committed(&echo.group, &echo.input);

    broker.shutdown().await;
    let admin = host.address("admin");
    host.wait_for("not ready", || {
        let (status, why) = get(&admin, "/readyz");
        (status == 503 && why.contains("log")).then_some(())
    });
    assert_eq!(get(&admin, "/healthz").0, 200);
    let _broker = embedded_kafka::Broker::start(config)
        .await
        .expect("a broker");
    host.ready();
    echo.send(&log, 10, 20).await;
    log.wait_committed(&echo.group, &echo.input);
    // The broker forgot who was in the group, so what was not committed yet came again.
    let distinct: BTreeSet<_> = log
        .read(&echo.output)
        .into_iter()
        .map(|s| s.value)
        .collect();
    assert_eq!(distinct.len(), 20);
    let (status, said) = host.stop();
    assert!(status.success(), "{said}");
}

/// A client that gave up must not find later that its request was carried out after all.
#[tokio::test(flavor = "multi_thread")]
async fn http_clients_are_told_at_once_that_the_pipeline_is_starting() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let brokers = nobody.local_addr().expect("its address").to_string();
    drop(nobody);
    let http = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = http.local_addr().expect("its address").to_string();
    drop(http);
    let pipeline = format!(
        r#"
        name = "starting"
        kafka.brokers = "{brokers}"
        admin.listen = "127.0.0.1:0"
        [topics.posts]
        [http]
        listen = "{address}"
        [[http.routes]]
        path = "/post"
        method = "POST"
        produce = {{ topic = "posts", fields = ["title"] }}
        "#
    );
    let folder = Arc::new(tempfile::tempdir().expect("a folder"));
    let host = Host::spawn(folder, &pipeline, &[]);
    let head = host.wait_for("an answer", || {
        let (status, head, _) = http_post(&address, "title=a");
        (status == 503).then_some(head)
    });
    assert!(head.to_lowercase().contains("retry-after"), "{head}");
    let (status, said) = host.stop();
    assert!(status.success(), "{said}");
}

fn http_post(address: &str, body: &str) -> (u16, String, String) {
    let head = "POST /post HTTP/1.1\r\ncontent-type: application/x-www-form-urlencoded";
    crate::support::http(address, head, body)
}

#[tokio::test(flavor = "multi_thread")]
async fn too_few_partitions_are_an_error_and_not_changed() {
    let brokers = server("KAFKA_BROKERS");
    let echo = Echo::on(&brokers, "");
    assert!(Host::start(&echo.pipeline).stop().0.success());
    let more = echo.pipeline.replace("partitions = 8", "partitions = 9");
    let host = Host::spawn(Arc::new(tempfile::tempdir().expect("a folder")), &more, &[]);
    let (status, said) = host.ended();
    assert_eq!(status.code(), Some(1), "{said}");
    let words = format!(
        "topic `{}` has 8 partition(s) and the pipeline declares 9",
        echo.input
    );
    assert!(said.contains(&words), "{said}");
    assert!(Host::start(&echo.pipeline).stop().0.success());
}

#[test]
fn a_second_host_on_the_same_embedded_data_says_who_has_it() {
    let echo = Echo::on("embedded", "");
    let host = Host::start(&echo.pipeline);
    let second = Host::run(
        host.folder(),
        &host.folder().path().join("pipeline.toml"),
        &[],
    );
    let (status, said) = second.ended();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("in use by another broker"), "{said}");
    assert!(host.stop().0.success());
}

#[test]
fn a_wrong_pipeline_exits_with_2_and_starts_nothing() {
    let folder = Arc::new(tempfile::tempdir().expect("a folder"));
    let host = Host::spawn(folder.clone(), "nmae = \"x\"", &[]);
    let (status, said) = host.ended();
    assert_eq!(status.code(), Some(2), "{said}");
    assert!(said.contains("nmae") && said.contains("name"), "{said}");
    assert!(!folder.path().join("data").exists());
}

#[test]
fn a_component_that_cannot_be_instantiated_is_found_at_start() {
    let echo = Echo::on("embedded", "");
    let text = format!(
        "{}\nlimits = {{ memory = \"1MiB\" }}",
        echo.pipeline.trim_end()
    );
    let host = Host::spawn(Arc::new(tempfile::tempdir().expect("a folder")), &text, &[]);
    let (status, said) = host.ended();
    assert_eq!(status.code(), Some(2), "{said}");
    let words = "the component of `echo` can't be instantiated";
    assert!(said.contains(words), "{said}");
}

/// Clients of the broker send again what it could not write, so posts hang; who looks at `/readyz` sees why.
#[test]
fn a_full_disk_under_the_embedded_broker_is_said_and_got_over() {
    let settings = r#"
        [http]
        listen = "127.0.0.1:0"
        [[http.routes]]
        path = "/post"
        method = "POST"
        produce = { topic = "posts", key = "uid", fields = ["content"], generate = ["uid"] }
        [topics.posts]
        partitions = 1
    "#;
    let echo = Echo::on("embedded", settings);
    let host = Host::spawn_on_small_disk(&echo.pipeline, 64);
    host.ready();
    let (admin, ingress) = (host.address("admin"), host.address("HTTP"));
    let head = "POST /post HTTP/1.1\r\ncontent-type: application/x-www-form-urlencoded";
    let body = format!("content={}", "x".repeat(10_000));
    let post = || http(&ingress, head, &body).0;
    assert!(post() < 300);
    let filler = host.data().join("filler");
    let mut file = std::fs::File::create(&filler).expect("a file on the small disk");
    let zeros = vec![0; 4096];
    while file.write_all(&zeros).is_ok() {}
    let stopped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stopped.load(Ordering::Relaxed) {
                post();
            }
        });
        host.wait_for("not ready", || {
            let (status, why) = get(&admin, "/readyz");
            let said = "embedded broker: records cannot be written to posts/0: No space left";
            (status == 503 && why.contains(said)).then_some(())
        });
        drop(file);
        std::fs::remove_file(&filler).expect("the filler is removed");
        host.ready();
        stopped.store(true, Ordering::Relaxed);
    });
    assert!(post() < 300);
    let (status, said) = host.stop();
    assert!(status.success(), "{said}");
    assert!(said.contains("the broker can write again"), "{said}");
}

#[test]
fn a_pipeline_for_a_cluster_runs_on_the_embedded_broker() {
    let echo = Echo::on("embedded", "");
    let cluster = "replication = 3\n\
                   config = { \"min.insync.replicas\" = \"2\", \"cleanup.policy\" = \"compact\" }";
    let text = format!("{}\n[topics.more]\n{cluster}", echo.pipeline);
    let host = Host::start(&text);
    let (status, said) = host.stop();
    assert!(status.success(), "{said}");
    assert!(said.contains("leaves out `min.insync.replicas`"), "{said}");
    assert!(!said.contains("leaves out `cleanup.policy`"), "{said}");
}

/// KIP-848: the broker assigns the partitions.
#[tokio::test(flavor = "multi_thread")]
async fn the_new_group_protocol_can_be_switched_on() {
    let brokers = server("KAFKA_BROKERS");
    let property = "kafka.properties.\"group.protocol\" = \"consumer\"";
    let (log, echo) = (Log::new(&brokers), Echo::on(&brokers, property));
    let host = Host::start(&echo.pipeline);
    echo.send(&log, 0, 100).await;
    log.wait_committed(&echo.group, &echo.input);
    let (status, said) = host.stop();
    assert!(status.success(), "{said}");
    assert_eq!(log.read(&echo.output).len(), 100);
}
