//! What a host's process costs: its start, and many stages.

use std::fs;
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::ensure;

use super::blog;
use crate::bench::{Bench, Side};
use crate::compare::median;
use crate::program::Program;
use crate::report::{Goal, Row};
use crate::web;

const STARTS: usize = 10;
/// How often a host is asked whether it is ready, and for how long.
const ASK: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_secs(60);
const STAGES: usize = 100;
const SETTLE: Duration = Duration::from_secs(10);

/// From the process's start until `/readyz` answers 200, on what is embedded and after a first start.
pub(crate) fn start(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let folder = bench.folder.path().join("start");
    fs::create_dir(&folder)?;
    let admin = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let pipeline = blog::embedded_blog(bench);
    let file = folder.join("pipeline.toml");
    fs::write(
        &file,
        pipeline.replace(
            "[admin]\n        listen = \"127.0.0.1:0\"",
            &format!("[admin]\nlisten = \"{admin}\""),
        ),
    )?;
    let mut times = Vec::new();
    // The first start compiles, and makes the topics and the table.
    for n in 0..=STARTS {
        let mut command = Command::new(&bench.host);
        command.arg("run").arg(&file);
        let since = Instant::now();
        let mut program = Program::start(command, &folder, "output")?;
        while !web::answers(&admin, "/readyz") {
            program.check()?;
            ensure!(
                since.elapsed() < PATIENCE,
                "not ready:\n{}",
                program.output()
            );
            std::thread::sleep(ASK);
        }
        let time = since.elapsed().as_secs_f64() * 1e3;
        eprintln!("  start {n} of {STARTS}: {time:.0} ms");
        if n > 0 {
            times.push(time);
        }
        program.stop()?;
    }
    let slowest = times.iter().copied().fold(0.0, f64::max);
    tell(Row {
        id: "F10",
        work: "blog on what is embedded, from process start to ready, components compiled before"
            .into(),
        goal: Goal::AtMost(150.0),
        measured: median(times),
        unit: "ms",
        figures: format!("median of {STARTS}, the slowest {slowest:.0} ms"),
    });
    Ok(())
}

/// The memory of many stages of one component.
pub(crate) fn stages(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let input = bench.unique("input");
    bench.log.create(&input, 1)?;
    let (brokers, redis, component) = (
        &bench.log.brokers,
        &bench.redis,
        bench.stage("cache-manager"),
    );
    let stage = |n| {
        let group = bench.unique("group");
        format!(
            "[stages.cache-{n}]\ncomponent = \"{component}\"\ninput = [\"{input}\"]\n\
             group = \"{group}\"\nredis = {{ cache = {{ prefix = \"post:\" }} }}\n"
        )
    };
    let stages: String = (0..STAGES).map(stage).collect();
    let pipeline = format!(
        "name = \"bench\"\n[kafka]\nbrokers = \"{brokers}\"\n[redis.cache]\nurl = \"{redis}\"\n{stages}\
         [admin]\nlisten = \"127.0.0.1:0\"\n"
    );
    let mut program = bench.start(&Side::Host(pipeline))?;
    let admin = bench.address(&mut program, "admin")?;
    bench.until("readiness", &mut program, || {
        Ok(web::answers(&admin, "/readyz"))
    })?;
    std::thread::sleep(SETTLE);
    let usage = program.usage()?;
    program.stop()?;
    bench.log.delete(&[&input])?;
    tell(Row {
        id: "F11",
        work: format!("memory of the host, {STAGES} stages of one component, idle"),
        goal: Goal::Reported,
        measured: usage.resident as f64 / 1e6,
        unit: "MB",
        figures: "resident; each stage has a consumer and a producer of its own".into(),
    });
    Ok(())
}
