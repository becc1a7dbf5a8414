//! Messages of one partition side by side.

use std::collections::{BTreeMap, BTreeSet};

use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::bench::Bench;
use crate::support::{Seen, until};

const MESSAGES: u64 = 2_000;
const KEYS: u64 = 50;

/// Takes up to 40 ms; some are delivered twice first, and some are rejected.
fn message(n: u64, output: &str, rng: &mut impl Rng) -> Value {
    let sleep = json!({ "do": "sleep", "ms": rng.random_range(0..=40) });
    let answer = match n % 100 {
        7 => json!({ "do": "reject" }),
        13 => json!({ "do": "retry-until", "n": 2 }),
        _ => json!({ "do": "ok" }),
    };
    let emit = json!({ "do": "emit", "topic": output, "value": n });
    json!({ "do": "steps", "steps": [sleep, answer, emit] })
}

fn number(output: &Seen) -> u64 {
    output.json().as_u64().expect("a number")
}

/// A key's outputs come in its order, others in between, and a host that is killed half-way loses nothing.
#[tokio::test(flavor = "multi_thread")]
async fn each_key_keeps_its_order_and_a_crash_loses_nothing() {
    let settings = "delivery = \"at-least-once\"\norder = \"key\"";
    let mut bench = Bench::start("test-probe", 1, settings);
    let mut rng = rand::rngs::StdRng::seed_from_u64(7);
    let messages: Vec<_> = (0..MESSAGES)
        .map(|n| {
            let key = format!("key-{}", rng.random_range(0..KEYS));
            (key, message(n, &bench.output, &mut rng).to_string())
        })
        .collect();
    let records: Vec<_> = (messages.iter())
        .map(|(key, value)| (Some(key.as_str()), value.as_str()))
        .collect();
    bench.log.produce(&bench.input, &records).await;
    let done = "stagehost_messages_total{stage=\"probe\",outcome=\"done\"}";
    let half_way = until("some messages", || {
        let done: u64 = bench.metric(done)?.parse().ok()?;
        (done >= MESSAGES / 4).then_some(done)
    });
    assert!(half_way < MESSAGES * 3 / 4, "{half_way} is not half-way");
    bench.restart();
    bench.log.wait_committed(&bench.group, &bench.input);

    let mut outputs = bench.log.read(&bench.output);
    let mut known = BTreeSet::new();
    // What came again after the crash says nothing of order.
    outputs.retain(|output| known.insert(number(output)));
    let expected: BTreeSet<_> = (0..MESSAGES).filter(|n| n % 100 != 7).collect();
    assert_eq!(known, expected);
    let mut by_key: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for output in &outputs {
        by_key.entry(&output.key).or_default().push(number(output));
    }
    for (key, numbers) in by_key {
        assert!(numbers.is_sorted(), "{key:?}: {numbers:?}");
    }
    let in_order = outputs.is_sorted_by_key(number);
    assert!(!in_order, "one message ran after the other");

    let dead = bench.log.read(&format!("{}.dlq", bench.input));
    let dead: BTreeSet<_> = (dead.iter())
        .filter_map(|letter| letter.header("__dlq.errors.offset")?.parse().ok())
        .collect();
    let expected: BTreeSet<u64> = (0..MESSAGES).filter(|n| n % 100 == 7).collect();
    assert_eq!(dead, expected);
}

/// Memory is at hand for 500 of them.
#[tokio::test(flavor = "multi_thread")]
async fn there_may_be_any_number_of_fresh_instances() {
    let settings =
        "delivery = \"at-least-once\"\norder = \"none\"\nconcurrency = 1000\ninstances = \"fresh\"";
    let bench = Bench::start("test-probe", 1, settings);
    let sleep = json!({ "do": "sleep", "ms": 500 });
    let emit = json!({ "do": "emit", "topic": bench.output, "value": 1 });
    let message = json!({ "do": "steps", "steps": [sleep, emit] });
    let (outputs, dead) = bench.deliver(&vec![message; 1_200]).await;
    assert_eq!((outputs.len(), dead.len()), (1_200, 0));
    let retries = bench.metric("stagehost_retries_total{stage=\"probe\"}");
    assert_eq!(retries.as_deref(), Some("0"));
}
