//! From topic to topic.

use std::time::Duration;

use super::{PARTITIONS, ROUNDS, post};
use crate::bench::{Bench, Side};
use crate::compare::{Compared, alternate};
use crate::report::{Goal, Row};

/// Longer than any run takes.
pub(super) const WHOLE: Duration = Duration::from_secs(600);
/// Bytes of a message, and how many of them.
const SIZES: [(usize, u64); 2] = [(100, 1_000_000), (1_000, 300_000)];

pub(crate) fn identity(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let stages = ("test-identity", "test-identity-batch");
    compare(bench, tell, ("F1", 0.8), "identity", stages, "identity")
}

pub(crate) fn json(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let stages = ("test-rewrite", "test-rewrite-batch");
    compare(bench, tell, ("F2", 0.7), "JSON changed", stages, "json")
}

/// Runs both unmeasured, so that no row pays for a broker whose code is not compiled yet.
pub(crate) fn warm_up(bench: &Bench) -> anyhow::Result<()> {
    eprintln!("the servers are warmed up; the next figures count for no row");
    let (stage, native) = ("test-identity", "identity");
    compare_at(bench, "warm-up", (stage, native), SIZES[0]).map(drop)
}

/// A stage that is called with each message and one that takes batches, with messages of each size.
fn compare(
    bench: &Bench,
    tell: &mut dyn FnMut(Row),
    (id, goal): (&'static str, f64),
    work: &str,
    (each, batches): (&str, &str),
    native: &'static str,
) -> anyhow::Result<()> {
    for (stage, how) in [(each, "a message a call"), (batches, "a batch a call")] {
        for (bytes, count) in SIZES {
            let what = format!("topic to topic, {work}, {how}, {bytes} B");
            let compared = compare_at(bench, &what, (stage, native), (bytes, count))?;
            tell(compared.row(id, what, Goal::AtLeast(goal)));
        }
    }
    Ok(())
}

fn compare_at(
    bench: &Bench,
    what: &str,
    (stage, native): (&str, &'static str),
    (bytes, count): (usize, u64),
) -> anyhow::Result<Compared> {
    let input = bench.unique("input");
    bench.log.create(&input, PARTITIONS)?;
    bench.log.fill(&input, count, |n| post(n, bytes))?;
    let output = bench.unique("output");
    bench.log.create(&output, PARTITIONS)?;
    let run = |side: Side| bench.pace(&side, &output, count, WHOLE);
    let compared = alternate(
        what,
        ROUNDS,
        || run(Side::Host(pipeline(bench, stage, &input, &output, ""))),
        || run(Side::Native(native, bench.settings(&input, &output))),
    )?;
    bench.log.delete(&[&input, &output])?;
    Ok(compared)
}

/// A pipeline of one stage that passes messages on; `more` are lines of the stage.
pub(super) fn pipeline(
    bench: &Bench,
    stage: &str,
    input: &str,
    output: &str,
    more: &str,
) -> String {
    let (brokers, component, group) = (
        &bench.log.brokers,
        bench.stage(stage),
        bench.unique("group"),
    );
    format!(
        r#"
        name = "bench"
        [kafka]
        brokers = "{brokers}"
        [stages.pass]
        component = "{component}"
        input = ["{input}"]
        group = "{group}"
        output = ["{output}"]
        config = {{ output = "{output}" }}
        {more}
        [admin]
        listen = "127.0.0.1:0"
        "#
    )
}
