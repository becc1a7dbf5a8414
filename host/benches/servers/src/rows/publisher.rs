//! The blog's publisher: a row in PostgreSQL and an event for each post.

use std::time::Duration;

use anyhow::ensure;

use super::{PARTITIONS, ROUNDS, post};
use crate::bench::{Bench, Pace, Side};
use crate::compare::alternate;
use crate::native::Settings;
use crate::report::{Goal, Row};

/// Where the component emits to.
pub(super) const OUTPUT: &str = "app.publishedPosts";
const BYTES: usize = 300;
/// Messages of the whole run; the slow side is stopped before its end.
const MESSAGES: u64 = 200_000;
const MOST: Duration = Duration::from_secs(5);
/// Messages a batch, of both sides.
const BATCH: usize = 500;

pub(crate) fn one_by_one(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let work =
        "publisher, a message at a time, against a commit, a produce and an offset commit each";
    compare(
        bench,
        tell,
        ("F3", work, 10.0),
        ("publisher", "publisher-one-by-one"),
    )
}

pub(crate) fn batches(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let work = "publisher as a batch stage, against one transaction a batch";
    compare(
        bench,
        tell,
        ("F4", work, 0.8),
        ("test-publisher-batch", "publisher"),
    )
}

fn compare(
    bench: &Bench,
    tell: &mut dyn FnMut(Row),
    (id, work, goal): (&'static str, &str, f64),
    (stage, native): (&str, &'static str),
) -> anyhow::Result<()> {
    let input = bench.unique("input");
    bench.log.create(&input, PARTITIONS)?;
    bench.log.fill(&input, MESSAGES, |n| post(n, BYTES))?;
    bench.log.make_anew(OUTPUT, PARTITIONS)?;
    let compared = alternate(
        work,
        ROUNDS,
        || {
            run(bench, |database| {
                Side::Host(pipeline(bench, stage, &input, database))
            })
        },
        || {
            run(bench, |database| {
                Side::Native(native, settings(bench, &input, database))
            })
        },
    )?;
    bench.log.delete(&[&input])?;
    tell(compared.row(id, work, Goal::AtLeast(goal)));
    Ok(())
}

fn run(bench: &Bench, side: impl Fn(&str) -> Side) -> anyhow::Result<Pace> {
    let (database, before) = (bench.database()?, bench.log.ends(OUTPUT)?);
    let pace = bench.pace(&side(&database), OUTPUT, MESSAGES, MOST)?;
    let (rows, events) = (bench.rows(&database)?, bench.log.behind(OUTPUT, &before)?);
    // One that was stopped may have rows whose events it did not send, and never the other way round.
    ensure!(rows >= events, "{rows} rows and {events} events");
    bench.drop_database(&database)?;
    Ok(pace)
}

fn settings(bench: &Bench, input: &str, database: &str) -> Settings {
    Settings {
        database: database.into(),
        batch: BATCH,
        ..bench.settings(input, OUTPUT)
    }
}

fn pipeline(bench: &Bench, stage: &str, input: &str, database: &str) -> String {
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
        [sql.posts]
        url = "{database}"
        [stages.publisher]
        component = "{component}"
        input = ["{input}"]
        group = "{group}"
        output = ["{OUTPUT}"]
        sql = ["posts"]
        batch = {{ max-messages = {BATCH} }}
        [admin]
        listen = "127.0.0.1:0"
        "#
    )
}
