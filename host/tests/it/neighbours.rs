//! Guests that take all the processor they get, and what is left of it for others.

use std::time::{Duration, Instant};

use crate::support::{Host, Log, component, get, server, unique};

/// As many spin at one time, on all partitions together.
const PARTITIONS: usize = 4;
const EACH: usize = 16;
/// What is asked of the others meanwhile. Each question waited for half a second when spinning guests kept all threads.
const QUESTIONS: u32 = 100;
const MESSAGES: usize = 300;
const MOST: Duration = Duration::from_secs(25);

/// A stage whose guests spin until they are told to end, and one that passes messages on.
fn pipeline(spins: &str, input: &str, output: &str) -> String {
    let brokers = server("KAFKA_BROKERS");
    let (spinner, neighbour) = (component("test-probe"), component("test-identity"));
    let (first, second) = (unique("group"), unique("group"));
    format!(
        r#"
        name = "neighbours"
        shutdown-timeout = "2s"
        [kafka]
        brokers = "{brokers}"
        [topics."{spins}"]
        partitions = {PARTITIONS}
        [topics."{input}"]
        [topics."{output}"]
        [sql.unused]
        url = "sqlite:unused.db"
        [redis.unused]
        url = "memory:"
        [stages.spinner]
        component = "{spinner}"
        input = ["{spins}"]
        group = "{first}"
        output = ["{output}"]
        sql = ["unused"]
        redis = {{ unused = {{ prefix = "" }} }}
        delivery = "at-least-once"
        order = "none"
        concurrency = {EACH}
        limits = {{ deadline = "1h" }}
        [stages.neighbour]
        component = "{neighbour}"
        input = ["{input}"]
        group = "{second}"
        output = ["{output}"]
        config = {{ output = "{output}" }}
        [admin]
        listen = "127.0.0.1:0"
        "#
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_that_spin_leave_others_their_share_of_the_processor() {
    let (spins, input, output) = (unique("spins"), unique("in"), unique("out"));
    let host = Host::start(&pipeline(&spins, &input, &output));
    let log = Log::new(&server("KAFKA_BROKERS"));
    let keys: Vec<_> = (0..PARTITIONS * EACH * 4).map(|n| n.to_string()).collect();
    let spin: Vec<_> = keys
        .iter()
        .map(|key| (Some(key.as_str()), r#"{"do":"spin"}"#))
        .collect();
    log.produce(&spins, &spin).await;
    let admin = host.address("admin");
    let calls = "stagehost_invocation_seconds_count{stage=\"spinner\"}";
    tokio::time::sleep(Duration::from_secs(2)).await;

    let began = Instant::now();
    for _ in 0..QUESTIONS {
        assert_eq!(get(&admin, "/healthz").0, 200);
    }
    let numbers: Vec<_> = (0..MESSAGES).map(|n| n.to_string()).collect();
    for number in &numbers {
        log.produce(&input, &[(Some("k"), number.as_str())]).await;
    }
    let seen = log.read_at_least(&output, MESSAGES);
    let values: Vec<_> = seen.iter().filter_map(|s| s.value.clone()).collect();
    assert_eq!(values, numbers);
    assert!(began.elapsed() < MOST, "it took {:?}", began.elapsed());

    // They still spin: none has come back, and a stop does not wait for them longer than it may.
    let metrics = get(&admin, "/metrics").1;
    assert!(metrics.contains(&format!("{calls} 0")), "{metrics}");
    let (status, log) = host.stop();
    assert!(status.success(), "{status}: {log}");
}
