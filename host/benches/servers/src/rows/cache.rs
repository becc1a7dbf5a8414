//! The blog's cache manager: two keys in Redis for each post.

use std::time::{Duration, Instant};

use super::{PARTITIONS, ROUNDS, post};
use crate::bench::{Bench, Pace, Side};
use crate::compare::alternate;
use crate::native::Settings;
use crate::report::{Goal, Row};

const BYTES: usize = 300;
const MESSAGES: u64 = 200_000;
/// Keys of a message.
const KEYS: u64 = 2;
/// Messages a batch, of both sides.
const BATCH: usize = 500;
const MOST: Duration = Duration::from_secs(5);
/// How often Redis is asked how many keys it has.
const LOOK: Duration = Duration::from_millis(10);

pub(crate) fn cache(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let input = bench.unique("input");
    bench.log.create(&input, PARTITIONS)?;
    bench.log.fill(&input, MESSAGES, |n| {
        let (uid, mut value) = post(n, BYTES);
        value.truncate(value.len() - 1);
        value.extend_from_slice(format!(",\"slug\":\"post-number-{uid}\"}}").as_bytes());
        (uid, value)
    })?;
    // The blog's stage takes a batch a call. The other one is called with each message, and awaits each set.
    let (batches, each) = (
        ("cache manager", "cache-manager", ""),
        (
            "cache manager called message by message",
            "test-cache-each",
            "order = \"key\"\nconcurrency = 16",
        ),
    );
    let (awaiting, pipelines) = (
        ("awaiting each answer", "cache-one-by-one"),
        ("in pipelines", "cache"),
    );
    let rows = [
        (each, awaiting, Goal::AtLeast(5.0)),
        (batches, pipelines, Goal::AtLeast(0.7)),
        (each, pipelines, Goal::Reported),
    ];
    for ((who, stage, more), (how, native), goal) in rows {
        let work = format!("{who}, two sets a message, against native {how}");
        let compared = alternate(
            &work,
            ROUNDS,
            || run(bench, &Side::Host(pipeline(bench, stage, &input, more))),
            || run(bench, &Side::Native(native, settings(bench, &input))),
        )?;
        tell(compared.row("F5", work, goal));
    }
    bench.log.delete(&[&input])?;
    Ok(())
}

/// From the first key in Redis to the last; of a slow program, as many as there are in a while.
fn run(bench: &Bench, side: &Side) -> anyhow::Result<Pace> {
    let mut redis = redis::Client::open(bench.redis.as_str())?.get_connection()?;
    let _: () = redis::cmd("FLUSHALL").query(&mut redis)?;
    let mut program = bench.start(side)?;
    let mut begun = None;
    let (seconds, messages) = loop {
        program.check()?;
        // A key of its own holds the version.
        let messages = redis::cmd("DBSIZE").query::<u64>(&mut redis)? / (KEYS + 1);
        if messages > 0 {
            let (since, before) = *begun.get_or_insert_with(|| (Instant::now(), messages));
            if messages >= MESSAGES || since.elapsed() > MOST {
                break (since.elapsed().as_secs_f64(), messages - before);
            }
        }
        std::thread::sleep(LOOK);
    };
    let usage = program.usage()?;
    program.stop()?;
    Ok(Pace {
        rate: messages as f64 / seconds,
        cpu_per_message: usage.cpu.div_f64(messages.max(1) as f64),
        usage,
    })
}

fn settings(bench: &Bench, input: &str) -> Settings {
    Settings {
        batch: BATCH,
        ..bench.settings(input, "")
    }
}

/// A pipeline of one stage; `more` are lines of the stage.
fn pipeline(bench: &Bench, stage: &str, input: &str, more: &str) -> String {
    let (brokers, component, group) = (
        &bench.log.brokers,
        bench.stage(stage),
        bench.unique("group"),
    );
    let redis = &bench.redis;
    format!(
        r#"
        name = "bench"
        [kafka]
        brokers = "{brokers}"
        [redis.cache]
        url = "{redis}"
        [stages.cache-manager]
        component = "{component}"
        input = ["{input}"]
        group = "{group}"
        redis = {{ cache = {{ prefix = "post:" }} }}
        {more}
        [admin]
        listen = "127.0.0.1:0"
        "#
    )
}
