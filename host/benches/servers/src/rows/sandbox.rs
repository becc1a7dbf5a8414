//! What a call through the sandbox costs, without a log.

use std::time::Duration;

use super::stage::{calls, stage};
use crate::bench::Bench;
use crate::compare::median;
use crate::report::{Goal, Row};

const SAMPLES: usize = 15;
/// How long one sample takes, about.
const SAMPLE: Duration = Duration::from_millis(100);
const BATCH: u32 = 100;
const WARM: Goal = Goal::AtMost(3_000.0);
const FRESH: Goal = Goal::AtMost(30_000.0);

pub(crate) fn cost(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let rows = [
        ("a warm call, identity", "identity", "warm", 1, WARM),
        ("a warm call, JSON changed", "rewrite", "warm", 1, WARM),
        (
            "a message of a batch of 100, identity",
            "identity-batch",
            "warm",
            BATCH,
            Goal::Reported,
        ),
        (
            "a message of a batch of 100, JSON changed",
            "rewrite-batch",
            "warm",
            BATCH,
            Goal::Reported,
        ),
        ("a fresh instance, identity", "identity", "fresh", 1, FRESH),
        (
            "a fresh instance, JSON changed",
            "rewrite",
            "fresh",
            1,
            FRESH,
        ),
    ];
    for (work, guest, instances, messages, goal) in rows {
        let folder = tempfile::tempdir()?;
        let stage = stage(folder.path(), guest, instances);
        let time = |rounds| bench.runtime.block_on(calls(&stage, rounds, messages));
        let one = time(100).as_secs_f64() / 100.0;
        let rounds = (SAMPLE.as_secs_f64() / one / f64::from(messages)).max(1.0) as u64;
        let samples = (0..SAMPLES).map(|_| time(rounds).as_secs_f64() * 1e9 / rounds as f64);
        tell(Row {
            id: "F9",
            work: format!("{work}, with its deadline"),
            goal,
            measured: median(samples.collect()),
            unit: "ns",
            figures: format!(
                "median of {SAMPLES} times {rounds} calls; a post of some 280 bytes in, one out"
            ),
        });
    }
    Ok(())
}
