//! Guests that take all the processor they get, and what is left of it for others.

use std::time::{Duration, Instant};

use crate::support::{Host, Log, component, get, server, unique};

/// As many spin at one time, on all partitions together.
const PARTITIONS: usize = 4;
const EACH: usize = 16;
/// What is asked of the others meanwhile. Each question waited for half a second when spinning guests kept all threads.
const QUESTIONS: u32 = 100;
const MESSAGES: usize = 300;
const MOST: Duration = Duration::from_secs(20);

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

/// The neighbour of guests that do this, as often as there are messages. Answers how often they have come back.
async fn check_neighbour(of: &str, messages: usize) -> u64 {
    let (spins, input, output) = (unique("spins"), unique("in"), unique("out"));
    let host = Host::start(&pipeline(&spins, &input, &output));
    let log = Log::new(&server("KAFKA_BROKERS"));
    let keys: Vec<_> = (0..messages).map(|n| n.to_string()).collect();
    let spin: Vec<_> = keys.iter().map(|key| (Some(key.as_str()), of)).collect();
    log.produce(&spins, &spin).await;
    let admin = host.address("admin");
    tokio::time::sleep(Duration::from_secs(2)).await;

    let began = Instant::now();
    let mut times: Vec<_> = (0..QUESTIONS)
        .map(|_| {
            let asked = Instant::now();
            assert_eq!(get(&admin, "/healthz").0, 200);
            asked.elapsed()
        })
        .collect();
    times.sort();
    println!(
        "{of}: /healthz {:?} and at most {:?}",
        times[times.len() / 2],
        times[times.len() - 1]
    );
    let numbers: Vec<_> = (0..MESSAGES).map(|n| n.to_string()).collect();
    for number in &numbers {
        log.produce(&input, &[(Some("k"), number.as_str())]).await;
    }
    let seen = log.read_at_least(&output, MESSAGES);
    let values: Vec<_> = seen.iter().filter_map(|s| s.value.clone()).collect();
    assert_eq!(values, numbers);
    println!("{of}: {MESSAGES} messages after {:?}", began.elapsed());
    assert!(began.elapsed() < MOST, "it took {:?}", began.elapsed());

    let metrics = get(&admin, "/metrics").1;
    let calls = "stagehost_invocation_seconds_count{stage=\"spinner\"} ";
    let calls = metrics.lines().find_map(|line| line.strip_prefix(calls));
    let calls = calls.and_then(|calls| calls.parse().ok());
    // A stop does not wait for them longer than it may.
    let (status, log) = host.stop();
    assert!(status.success(), "{status}: {log}");
    calls.unwrap_or_else(|| panic!("no calls in {metrics}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_that_spin_leave_others_their_share_of_the_processor() {
    let calls = check_neighbour(r#"{"do":"spin"}"#, PARTITIONS * EACH * 4).await;
    assert_eq!(calls, 0, "they still spin");
}

/// A slice is never used up, and a timer of the runtime is what wakes them.
#[tokio::test(flavor = "multi_thread")]
async fn guests_that_rest_before_their_slice_is_over_leave_others_their_share_of_the_processor() {
    let calls = check_neighbour(r#"{"do":"bursts"}"#, PARTITIONS * EACH * 4).await;
    assert_eq!(calls, 0, "they still go on");
}

/// Each is short; but there are always more of them.
#[tokio::test(flavor = "multi_thread")]
async fn calls_of_milliseconds_one_after_another_leave_others_their_share_of_the_processor() {
    let calls = check_neighbour(r#"{"do":"compute","micros":3000}"#, 100_000).await;
    assert!(calls > 0, "none was made");
}
