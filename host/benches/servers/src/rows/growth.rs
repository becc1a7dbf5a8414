//! Whether throughput and memory hold as partitions, batches and the backlog grow.

use super::post;
use super::topics::{WHOLE, pipeline};
use crate::bench::{Bench, Pace, Side};
use crate::compare::thousands;
use crate::report::{Goal, Row};

const BYTES: usize = 100;
const MESSAGES: u64 = 400_000;
const PARTITIONS: [i32; 6] = [1, 2, 4, 8, 32, 128];
const BATCHES: [usize; 5] = [1, 10, 100, 1_000, 10_000];
/// The partitions on which batches and the backlog grow.
const USUAL: i32 = 8;
const BACKLOG: u64 = 10_000_000;
/// Below the rate before: what two runs of the same differ by here.
const FALL: f64 = 0.85;

pub(crate) fn growth(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let mut paces = Vec::new();
    for partitions in PARTITIONS {
        let pace = run(bench, partitions, MESSAGES, "")?;
        eprintln!(
            "  {partitions} partitions: {} a second",
            thousands(pace.rate)
        );
        paces.push((u64::try_from(partitions)?, pace));
    }
    tell(row(
        "identity, 1 to 128 partitions: the rate against the best with fewer",
        &paces,
    ));
    let mut paces = Vec::new();
    for batch in BATCHES {
        let more = format!("batch = {{ max-messages = {batch}, max-bytes = \"16MiB\" }}");
        let pace = run(bench, USUAL, MESSAGES, &more)?;
        eprintln!("  batches of {batch}: {} a second", thousands(pace.rate));
        paces.push((u64::try_from(batch)?, pace));
    }
    tell(row(
        "identity, batches of 1 to 10,000: the rate against the best with smaller ones",
        &paces,
    ));
    let mut paces = Vec::new();
    for backlog in [BACKLOG / 10, BACKLOG] {
        let pace = run(bench, USUAL, backlog, "")?;
        eprintln!(
            "  backlog of {backlog}: {} a second, {} MB",
            thousands(pace.rate),
            pace.usage.peak / 1_000_000
        );
        paces.push((backlog, pace));
    }
    tell(row(
        "identity, a backlog of 10 million against one of a million",
        &paces,
    ));
    let (few, many) = (paces[0].1.usage.peak as f64, paces[1].1.usage.peak as f64);
    tell(Row {
        id: "F12",
        work: "memory over a backlog of 10 million against a million".into(),
        goal: Goal::AtMost(1.15),
        measured: many / few,
        unit: "×",
        figures: format!("{:.0} MB against {:.0} MB at most", many / 1e6, few / 1e6),
    });
    Ok(())
}

/// The deepest fall of the rate below the best before it.
fn row(work: &str, paces: &[(u64, Pace)]) -> Row {
    let (mut best, mut worst) = (0.0_f64, f64::INFINITY);
    for (_, pace) in paces {
        if best > 0.0 {
            worst = worst.min(pace.rate / best);
        }
        best = best.max(pace.rate);
    }
    let rates: Vec<_> = paces
        .iter()
        .map(|(n, pace)| format!("{}: {}", thousands(*n as f64), thousands(pace.rate)))
        .collect();
    Row {
        id: "F12",
        work: work.into(),
        goal: Goal::AtLeast(FALL),
        measured: worst,
        unit: "×",
        figures: rates.join(", ") + " a second",
    }
}

fn run(bench: &Bench, partitions: i32, count: u64, more: &str) -> anyhow::Result<Pace> {
    let (input, output) = (bench.unique("input"), bench.unique("output"));
    bench.log.create(&input, partitions)?;
    bench.log.create(&output, partitions)?;
    bench.log.fill(&input, count, |n| post(n, BYTES))?;
    let side = Side::Host(pipeline(bench, "test-identity", &input, &output, more));
    let pace = bench.pace(&side, &output, count, WHOLE)?;
    bench.log.delete(&[&input, &output])?;
    Ok(pace)
}
