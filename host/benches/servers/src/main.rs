//! Benchmarks of the host beside native programs, on real Kafka, PostgreSQL and Redis. `make bench` runs them.

mod bench;
mod compare;
mod log;
mod native;
mod program;
mod report;
mod rows;
mod web;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::{Parser, Subcommand};

use self::bench::Bench;
use self::native::Settings;
use self::report::Row;

/// The host's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures the host beside native programs.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Measures rows, and writes the results.
    Run {
        /// The folder of results.json, table.md and chart.svg
        #[arg(long)]
        out: PathBuf,
        /// Rows such as F1; all if none is given
        rows: Vec<String>,
    },
    /// Runs a native program.
    #[command(hide = true)]
    Native { name: String, settings: String },
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Action::Run { out, rows } => run(&out, &rows),
        Action::Native { name, settings } => native(&name, &settings),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn native(name: &str, settings: &str) -> anyhow::Result<()> {
    let settings: Settings = serde_json::from_str(settings)?;
    native::run(name, &settings)
}

fn run(out: &std::path::Path, wanted: &[String]) -> anyhow::Result<()> {
    let known = |row: &String| rows::ALL.iter().any(|(id, _)| row == id);
    if let Some(unknown) = wanted.iter().find(|row| !known(row)) {
        let all: Vec<_> = rows::ALL.iter().map(|(id, _)| *id).collect();
        anyhow::bail!("there is no row {unknown}; there are {}", all.join(", "));
    }
    let bench = Bench::new()?;
    let since = Instant::now();
    let mut all: Vec<Row> = Vec::new();
    rows::warm_up(&bench)?;
    for (id, measure) in rows::ALL {
        if !wanted.is_empty() && !wanted.iter().any(|row| row == id) {
            continue;
        }
        // What the rows before have written shall not be on its way to the disk during this one.
        Command::new("sync").status()?;
        eprintln!("{id} begins after {:.0?}", since.elapsed());
        measure(&bench, &mut |row| {
            eprintln!("{}", row.line());
            all.push(row);
        })?;
    }
    println!("{}", report::HEAD);
    all.iter().for_each(|row| println!("{}", row.line()));
    report::write(out, &all)
}
