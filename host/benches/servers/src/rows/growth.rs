//! Whether throughput and memory hold as partitions, batches and the backlog grow.

use super::post;
use super::topics::{WHOLE, pipeline};
use crate::bench::{Bench, Pace, Side};
use crate::compare::{median, thousands};
use crate::report::{Goal, Row};

const BYTES: usize = 100;
const MESSAGES: u64 = 600_000;
/// More than elsewhere: the worst of several medians is what counts.
const ROUNDS: usize = 5;
const PARTITIONS: [i32; 6] = [1, 2, 4, 8, 32, 128];
const BATCHES: [usize; 5] = [1, 10, 100, 1_000, 10_000];
/// The partitions on which batches and the backlog grow.
const USUAL: i32 = 8;
const BACKLOG: u64 = 10_000_000;
/// Below the rate before: what two runs of the same differ by here.
const FALL: f64 = 0.85;

pub(crate) fn growth(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let (mut topics, mut all) = (Vec::new(), Vec::new());
    for partitions in PARTITIONS {
        let new = Topics::new(bench, partitions, MESSAGES)?;
        let what = u64::try_from(partitions)?;
        all.push(Setting::new(what, Work::Host(String::new()), &new));
        all.push(Setting::new(what, Work::Native, &new));
        topics.push(new);
    }
    let rates = in_turns(bench, "partitions", &all)?;
    let host: Vec<_> = rates.iter().copied().step_by(2).collect();
    let native: Vec<_> = rates.iter().copied().skip(1).step_by(2).collect();
    let mut of_host = row(
        "identity, 1 to 128 partitions: the rate against the best with fewer",
        &host,
    );
    of_host.figures += &format!(
        "; the native program: {:.2} ×, {}",
        fall(&native),
        figures(&native)
    );
    tell(of_host);
    for topics in topics {
        topics.remove(bench)?;
    }
    let topics = Topics::new(bench, USUAL, MESSAGES)?;
    let of_size = |batch: usize| {
        let more = format!("batch = {{ max-messages = {batch}, max-bytes = \"16MiB\" }}");
        Setting::new(batch as u64, Work::Host(more), &topics)
    };
    let all = BATCHES.map(of_size);
    let rates = in_turns(bench, "messages a batch", &all)?;
    tell(row(
        "identity, batches of 1 to 10,000: the rate against the best with smaller ones",
        &rates,
    ));
    topics.remove(bench)?;
    backlog(bench, tell)
}

fn backlog(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let mut paces = Vec::new();
    for backlog in [BACKLOG / 10, BACKLOG] {
        let topics = Topics::new(bench, USUAL, backlog)?;
        let pace = Setting::new(backlog, Work::Host(String::new()), &topics).run(bench)?;
        topics.remove(bench)?;
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

/// A filled topic, and one for what comes of it.
#[derive(Clone)]
struct Topics {
    input: String,
    output: String,
    count: u64,
}

impl Topics {
    fn new(bench: &Bench, partitions: i32, count: u64) -> anyhow::Result<Self> {
        let (input, output) = (bench.unique("input"), bench.unique("output"));
        bench.log.create(&input, partitions)?;
        bench.log.fill(&input, count, |n| post(n, BYTES))?;
        bench.log.create(&output, partitions)?;
        Ok(Self {
            input,
            output,
            count,
        })
    }

    fn remove(&self, bench: &Bench) -> anyhow::Result<()> {
        bench.log.delete(&[&self.input, &self.output])
    }
}

/// Who passes the messages on.
enum Work {
    /// With these lines of the stage.
    Host(String),
    Native,
}

impl Work {
    fn name(&self) -> &'static str {
        match self {
            Self::Host(_) => "host",
            Self::Native => "native",
        }
    }
}

/// One point of a row.
struct Setting {
    /// What grows.
    what: u64,
    work: Work,
    topics: Topics,
}

impl Setting {
    fn new(what: u64, work: Work, topics: &Topics) -> Self {
        let topics = topics.clone();
        Self { what, work, topics }
    }

    fn run(&self, bench: &Bench) -> anyhow::Result<Pace> {
        let Topics {
            input,
            output,
            count,
        } = &self.topics;
        let side = match &self.work {
            Work::Host(more) => Side::Host(pipeline(bench, "test-identity", input, output, more)),
            Work::Native => Side::Native("identity", bench.settings(input, output)),
        };
        bench.pace(&side, output, *count, WHOLE)
    }
}

/// All in turns, several times: each one's rate that lies in the middle.
fn in_turns(bench: &Bench, unit: &str, all: &[Setting]) -> anyhow::Result<Vec<(u64, f64)>> {
    let mut rates = vec![Vec::new(); all.len()];
    for round in 1..=ROUNDS {
        // Whoever went last goes first in the next round.
        let mut order: Vec<_> = all.iter().zip(&mut rates).collect();
        if round % 2 == 0 {
            order.reverse();
        }
        for (setting, rates) in order {
            let pace = setting.run(bench)?;
            eprintln!(
                "  {} {unit}, round {round} of {ROUNDS}: {} {} a second",
                setting.what,
                setting.work.name(),
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

fn row(work: &str, rates: &[(u64, f64)]) -> Row {
    Row {
        id: "F12",
        work: work.into(),
        goal: Goal::AtLeast(FALL),
        measured: fall(rates),
        unit: "×",
        figures: figures(rates),
    }
}

/// The deepest fall of the rate below the best before it.
fn fall(rates: &[(u64, f64)]) -> f64 {
    let (mut best, mut worst) = (0.0_f64, f64::INFINITY);
    for (_, rate) in rates {
        if best > 0.0 {
            worst = worst.min(rate / best);
        }
        best = best.max(*rate);
    }
    worst
}

fn figures(rates: &[(u64, f64)]) -> String {
    let rates: Vec<_> = rates
        .iter()
        .map(|(n, rate)| format!("{}: {}", thousands(*n as f64), thousands(*rate)))
        .collect();
    rates.join(", ") + " a second"
}
