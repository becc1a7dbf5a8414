//! Guests that take all the processor they get, and what is left of it for others.

use std::time::Duration;

use rdkafka::message::Message;
use serde_json::{Value, json};

use crate::support::{Host, Log, component, get, server, unique};

/// As many are at it at one time, on all partitions together.
const PARTITIONS: usize = 4;
const EACH: usize = 16;
const AT_ONCE: usize = PARTITIONS * EACH;
/// What is asked of the others meanwhile, each time after the answer. Where spinning guests kept all threads, each step of the
/// host waited for half a second: so many are not done then for as long as a test waits.
const QUESTIONS: usize = 100;
const MESSAGES: usize = 200;
/// What a guest writes into the log before it goes on for ever.
const BEGUN: &str = "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx";

/// A stage whose guests keep the processor or their places, and one that passes messages on.
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
        partitions = 1
        [topics."{output}"]
        partitions = 1
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

/// Calls that have come back.
fn calls(host: &Host) -> usize {
    const CALLS: &str = "stagehost_invocation_seconds_count{stage=\"spinner\"} ";
    let metrics = get(&host.address("admin"), "/metrics").1;
    let calls = metrics.lines().find_map(|line| line.strip_prefix(CALLS));
    let calls = calls.and_then(|calls| calls.parse().ok());
    calls.unwrap_or_else(|| panic!("no calls in {metrics}"))
}

/// The neighbour of guests that do this, as often as there are messages, once they have begun. Answers how many calls had come
/// back before it was asked anything, and after all was answered.
async fn check_neighbour(
    of: &Value,
    messages: usize,
    have_begun: impl Fn(&Host) -> bool,
) -> [usize; 2] {
    let (spins, input, output) = (unique("spins"), unique("in"), unique("out"));
    let host = Host::start(&pipeline(&spins, &input, &output));
    let log = Log::new(&server("KAFKA_BROKERS"));
    let (of, keys) = (of.to_string(), 0..messages);
    let keys: Vec<_> = keys.map(|n| n.to_string()).collect();
    let spin: Vec<_> = keys.iter().map(|key| (Some(key.as_str()), &*of)).collect();
    log.produce(&spins, &spin).await;
    host.wait_for("guests", || have_begun(&host).then_some(()));
    let before = calls(&host);

    let admin = host.address("admin");
    for _ in 0..QUESTIONS {
        assert_eq!(get(&admin, "/healthz").0, 200);
    }
    pass(&host, &log, &input, &output);
    let after = calls(&host);
    // A stop does not wait for them longer than it may.
    let (status, log) = host.stop();
    assert!(status.success(), "{status}: {log}");
    [before, after]
}

/// One message of the neighbour after the other, each once the one before it has come out.
fn pass(host: &Host, log: &Log, input: &str, output: &str) {
    const POLL: Duration = Duration::from_millis(100);
    let runtime = tokio::runtime::Handle::current();
    let send = |n: usize| {
        let value = n.to_string();
        let sent = [(Some("k"), value.as_str())];
        tokio::task::block_in_place(|| runtime.block_on(log.produce(input, &sent)));
    };
    let (outputs, mut values) = (log.follow(output), Vec::new());
    send(0);
    host.wait_for("the neighbour's messages", || {
        let message = outputs.poll(POLL)?.ok()?;
        let value = message.payload().unwrap_or_default();
        values.push(String::from_utf8_lossy(value).into_owned());
        if values.len() < MESSAGES {
            send(values.len());
        }
        (values.len() == MESSAGES).then_some(())
    });
    let sent: Vec<_> = (0..MESSAGES).map(|n| n.to_string()).collect();
    assert_eq!(values, sent);
}

/// Of guests that do not come back: as many as may are in their calls, all the time.
async fn check_neighbour_of_endless(does: Value) {
    let begin = json!({ "do": "log-many", "n": 1, "bytes": BEGUN.len(), "print": false });
    let message = json!({ "do": "steps", "steps": [begin, does] });
    let begun = |host: &Host| host.log().matches(BEGUN).count();
    let calls = check_neighbour(&message, 4 * AT_ONCE, |host| begun(host) == AT_ONCE).await;
    assert_eq!(calls, [0, 0], "they still go on");
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_that_spin_leave_others_their_share_of_the_processor() {
    check_neighbour_of_endless(json!({ "do": "spin" })).await;
}

/// A slice is never used up, and a timer of the runtime is what wakes them.
#[tokio::test(flavor = "multi_thread")]
async fn guests_that_rest_before_their_slice_is_over_leave_others_their_share_of_the_processor() {
    check_neighbour_of_endless(json!({ "do": "bursts" })).await;
}

/// They want no processor: what they have is their places, their instances and the waiting of their lanes.
#[tokio::test(flavor = "multi_thread")]
async fn guests_that_sleep_keep_nobody_else_waiting() {
    check_neighbour_of_endless(json!({ "do": "sleep", "ms": 3_000_000 })).await;
}

/// Each is short; but there are always more of them.
#[tokio::test(flavor = "multi_thread")]
async fn calls_of_milliseconds_one_after_another_leave_others_their_share_of_the_processor() {
    const SHORT: usize = 100_000;
    let compute = json!({ "do": "compute", "micros": 3_000 });
    let have_begun = |host: &Host| calls(host) >= AT_ONCE;
    let [before, after] = check_neighbour(&compute, SHORT, have_begun).await;
    assert!(before < after, "none was made meanwhile");
    assert!(after < SHORT, "they were over before the neighbour was");
}
