//! Messages that wait, side by side a key.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::topics::{WHOLE, pipeline};
use crate::bench::{Bench, Side};
use crate::compare::median;
use crate::report::{Goal, Row};

const MESSAGES: u64 = 10_000;
const KEYS: u64 = 100;
const MAX_WAIT: u64 = 5;
const ROUNDS: usize = 5;

/// Each message's key, and how many milliseconds it waits.
fn work() -> Vec<(u64, u64)> {
    let mut rng = StdRng::seed_from_u64(8);
    let message = |_| (rng.random_range(0..KEYS), rng.random_range(0..=MAX_WAIT));
    (0..MESSAGES).map(message).collect()
}

pub(crate) fn concurrency(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let (input, output) = (bench.unique("input"), bench.unique("output"));
    bench.log.create(&input, 1)?;
    bench.log.create(&output, 1)?;
    let work = work();
    bench.log.fill(&input, MESSAGES, |n| {
        let (key, wait) = work[usize::try_from(n).unwrap_or_default()];
        let message = format!("{{\"ms\":{wait}}}");
        (format!("key-{key}"), message.into_bytes())
    })?;
    let waits = |key| {
        work.iter()
            .filter(move |(of, _)| *of == key)
            .map(|(_, wait)| wait)
    };
    let longest = (0..KEYS)
        .map(|key| waits(key).sum::<u64>())
        .max()
        .unwrap_or_default();
    let ideal = Duration::from_millis(longest);
    let more = "delivery = \"at-least-once\"\norder = \"key\"\nconcurrency = 100";
    let (mut host, mut native) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        let side = Side::Native("keys", bench.settings(&input, &output));
        let by_native = bench.pace(&side, &output, MESSAGES, WHOLE)?;
        let side = Side::Host(pipeline(bench, "test-waits", &input, &output, more));
        let by_host = bench.pace(&side, &output, MESSAGES, WHOLE)?;
        let seconds = |rate: f64| MESSAGES as f64 / rate;
        host.push(seconds(by_host.rate));
        native.push(seconds(by_native.rate));
        eprintln!(
            "  keys, round {round} of {ROUNDS}: host {:.3} s, native {:.3} s, ideal {ideal:?}",
            seconds(by_host.rate),
            seconds(by_native.rate)
        );
    }
    bench.log.delete(&[&input, &output])?;
    let (host, native) = (median(host), median(native));
    tell(Row {
        id: "F8",
        work: "10,000 messages of 0 to 5 ms, one partition, 100 keys side by side, against the ideal time".into(),
        goal: Goal::AtMost(1.5),
        measured: host / ideal.as_secs_f64(),
        unit: "×",
        figures: format!(
            "{:.0} ms; the ideal, the waits of the longest key, is {:.0} ms; tasks of a native program took {:.0} ms",
            host * 1e3,
            ideal.as_secs_f64() * 1e3,
            native * 1e3
        ),
    });
    Ok(())
}
