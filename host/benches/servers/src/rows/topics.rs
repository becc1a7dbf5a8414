//! From topic to topic.

use std::time::Duration;

use super::{PARTITIONS, ROUNDS, post};
use crate::bench::{Bench, Side};
use crate::compare::alternate;
use crate::report::{Goal, Row};

/// Longer than any run takes.
pub(super) const WHOLE: Duration = Duration::from_secs(600);
/// Bytes of a message, and how many of them.
const SIZES: [(usize, u64); 2] = [(100, 1_000_000), (1_000, 300_000)];

pub(crate) fn identity(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    both(
        bench,
        tell,
        "F1",
        "identity",
        ("test-identity", "identity"),
        0.8,
    )
}

pub(crate) fn json(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    both(
        bench,
        tell,
        "F2",
        "JSON changed",
        ("test-rewrite", "json"),
        0.7,
    )
}

fn both(
    bench: &Bench,
    tell: &mut dyn FnMut(Row),
    id: &'static str,
    work: &str,
    (stage, native): (&str, &'static str),
    goal: f64,
) -> anyhow::Result<()> {
    for (bytes, count) in SIZES {
        let input = bench.unique("input");
        bench.log.create(&input, PARTITIONS)?;
        bench.log.fill(&input, count, |n| post(n, bytes))?;
        let output = bench.unique("output");
        bench.log.create(&output, PARTITIONS)?;
        let run = |side: Side| bench.pace(&side, &output, count, WHOLE);
        let what = format!("topic to topic, {work}, {bytes} B");
        let compared = alternate(
            &what,
            ROUNDS,
            || run(Side::Host(pipeline(bench, stage, &input, &output, ""))),
            || run(Side::Native(native, bench.settings(&input, &output))),
        )?;
        bench.log.delete(&[&input, &output])?;
        tell(Row {
            id,
            work: what,
            goal: Goal::AtLeast(goal),
            measured: compared.ratio,
            unit: "×",
            figures: compared.figures(),
        });
    }
    Ok(())
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
