//! `host run`: runs a pipeline until it is told to stop.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{FAILED, WRONG_USAGE};
use crate::diagnostics::Diagnostics;
use crate::log_output::LogOutput;
use crate::metrics::Metrics;
use crate::pipeline::{Pipeline, Probe};

/// Shells, `make` and supervisors pass a signal on that the process group has got already.
const SAME_SIGNAL: Duration = Duration::from_secs(1);

/// Run a pipeline until SIGTERM or Ctrl-C
#[derive(Args, Debug)]
pub struct RunArgs {
    /// The pipeline file
    #[arg(value_name = "FILE", default_value = "pipeline.toml")]
    pipeline: PathBuf,
}

/// Checks the pipeline, runs it, and drains it at the first signal; a second one ends the process at once.
pub async fn run(args: RunArgs, metrics: Arc<Metrics>, log: &LogOutput) -> ExitCode {
    let env = super::variable;
    let pipeline = match Pipeline::load(&args.pipeline, &env, Probe::ALL) {
        Ok(pipeline) => pipeline,
        Err(problems) => {
            problems.print();
            return ExitCode::from(WRONG_USAGE);
        }
    };
    let shutdown = CancellationToken::new();
    if let Err(error) = on_signal(shutdown.clone(), log.clone()) {
        eprintln!("error: {error:#}");
        return ExitCode::from(FAILED);
    }
    match crate::run::run(pipeline, metrics, shutdown).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Diagnostics>() => {
            log.flush();
            log.print(&error.to_string());
            ExitCode::from(WRONG_USAGE)
        }
        Err(error) => {
            log.print(&format!("error: {error:#}\n"));
            ExitCode::from(FAILED)
        }
    }
}

fn on_signal(shutdown: CancellationToken, log: LogOutput) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    tokio::spawn(async move {
        let mut first = None;
        loop {
            // Both are cancel-safe: a signal that came is kept.
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            let first = *first.get_or_insert_with(Instant::now);
            if shutdown.is_cancelled() && first.elapsed() < SAME_SIGNAL {
                continue;
            }
            if shutdown.is_cancelled() {
                warn!("{name} again: ending at once; what was not settled will be delivered again");
                log.flush();
                std::process::exit(i32::from(FAILED));
            }
            info!("{name}: shutting down");
            shutdown.cancel();
        }
    });
    Ok(())
}
