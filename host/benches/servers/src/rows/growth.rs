//! Whether throughput and memory hold as partitions, batches and the backlog grow.

use super::topics::{WHOLE, pipeline};
use super::{ROUNDS, post};
use crate::bench::{Bench, Pace, Side};
use crate::compare::{median, thousands};
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
    let mut all = Vec::new();
    for partitions in PARTITIONS {
        let what = u64::try_from(partitions)?;
        all.push(Setting::new(bench, what, partitions, MESSAGES)?);
    }
    let rates = in_turns(bench, "partitions", &all)?;
    tell(row(
        "identity, 1 to 128 partitions: the rate against the best with fewer",
        &rates,
    ));
    remove(bench, &all)?;
    let mut all = Vec::new();
    for batch in BATCHES {
        let setting = Setting::new(bench, u64::try_from(batch)?, USUAL, MESSAGES)?;
        let more = format!("batch = {{ max-messages = {batch}, max-bytes = \"16MiB\" }}");
        all.push(Setting { more, ..setting });
    }
    let rates = in_turns(bench, "messages a batch", &all)?;
    tell(row(
        "identity, batches of 1 to 10,000: the rate against the best with smaller ones",
        &rates,
    ));
    remove(bench, &all)?;
    backlog(bench, tell)
}

fn backlog(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let mut paces = Vec::new();
    for backlog in [BACKLOG / 10, BACKLOG] {
        let setting = Setting::new(bench, backlog, USUAL, backlog)?;
        let pace = setting.run(bench)?;
        remove(bench, &[setting])?;
        eprintln!(
            "  backlog of {backlog}: {} a second, {} MB",
            thousands(pace.rate),
            pace.usage.peak / 1_000_000
        );
        paces.push((backlog, pace));
    }
    let rates: Vec<_> = paces.iter().map(|(n, pace)| (*n, pace.rate)).collect();
    tell(row(
        "identity, a backlog of 10 million against one of a million",
        &rates,
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

/// A topic, and a pipeline that reads it.
struct Setting {
    /// What grows.
    what: u64,
    input: String,
    partitions: i32,
    count: u64,
    /// Lines of the stage.
    more: String,
}

impl Setting {
    fn new(bench: &Bench, what: u64, partitions: i32, count: u64) -> anyhow::Result<Self> {
        let input = bench.unique("input");
        bench.log.create(&input, partitions)?;
        bench.log.fill(&input, count, |n| post(n, BYTES))?;
        Ok(Self {
            what,
            input,
            partitions,
            count,
            more: String::new(),
        })
    }

    fn run(&self, bench: &Bench) -> anyhow::Result<Pace> {
        let output = bench.unique("output");
        bench.log.create(&output, self.partitions)?;
        let pipeline = pipeline(bench, "test-identity", &self.input, &output, &self.more);
        let pace = bench.pace(&Side::Host(pipeline), &output, self.count, WHOLE)?;
        bench.log.delete(&[&output])?;
        Ok(pace)
    }
}

fn remove(bench: &Bench, all: &[Setting]) -> anyhow::Result<()> {
    let inputs: Vec<_> = all.iter().map(|setting| setting.input.as_str()).collect();
    bench.log.delete(&inputs)
}

/// All in turns, several times: each one's rate that lies in the middle.
fn in_turns(bench: &Bench, unit: &str, all: &[Setting]) -> anyhow::Result<Vec<(u64, f64)>> {
    let mut rates = vec![Vec::new(); all.len()];
    for round in 1..=ROUNDS {
        for (setting, rates) in all.iter().zip(&mut rates) {
            let pace = setting.run(bench)?;
            eprintln!(
                "  {} {unit}, round {round} of {ROUNDS}: {} a second",
                setting.what,
                thousands(pace.rate)
            );
            rates.push(pace.rate);
        }
    }
    let rates = all.iter().zip(rates);
    Ok(rates
        .map(|(setting, rates)| (setting.what, median(rates)))
        .collect())
}

/// The deepest fall of the rate below the best before it.
fn row(work: &str, rates: &[(u64, f64)]) -> Row {
    let (mut best, mut worst) = (0.0_f64, f64::INFINITY);
    for (_, rate) in rates {
        if best > 0.0 {
            worst = worst.min(rate / best);
        }
        best = best.max(*rate);
    }
    let rates: Vec<_> = rates
        .iter()
        .map(|(n, rate)| format!("{}: {}", thousands(*n as f64), thousands(*rate)))
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
