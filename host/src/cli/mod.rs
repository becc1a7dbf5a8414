//! The command line: one file a subcommand.

pub mod check;
pub mod consume;
pub mod log_args;
pub mod produce;
mod record_line;
pub mod run;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::diagnostics::Diagnostics;
use crate::log::kafka::producer;
use crate::log_output::{LogFormat, LogOutput};
use crate::metrics::Metrics;
use crate::slice;

/// The command failed while it ran.
const FAILED: u8 = 1;
/// Wrong usage, or a wrong pipeline; nothing was started.
const WRONG_USAGE: u8 = 2;

/// How long threads that librdkafka blocks may hold up the end of the process.
const BLOCKED_TIME: Duration = Duration::from_millis(500);

/// Stagehost: runs WebAssembly components (stages) on Kafka topics
#[derive(Parser, Debug)]
#[command(name = "host", version, arg_required_else_help = true, after_help = AFTER_HELP)]
struct Cli {
    /// How the log is written to stderr
    #[arg(long, value_enum, global = true, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Exit codes: 0 fine, 1 failed while running, 2 wrong usage or pipeline.
RUST_LOG sets what is logged, for example RUST_LOG=debug or RUST_LOG=info,guest=debug.";

#[derive(Subcommand, Debug)]
enum Command {
    Run(run::RunArgs),
    Check(check::CheckArgs),
    Produce(produce::ProduceArgs),
    Consume(consume::ConsumeArgs),
}

/// Parses the arguments, does what they say, and answers the exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let metrics = Arc::new(Metrics::default());
    let log = match LogOutput::start(cli.log_format, metrics.log_lines_dropped()) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("error: cannot start the thread that writes the log: {error}");
            return ExitCode::from(FAILED);
        }
    };
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the async runtime: {error}");
            return ExitCode::from(FAILED);
        }
    };
    let code = runtime.block_on(async {
        match cli.command {
            Command::Run(args) => run::run(args, metrics, &log).await,
            Command::Check(args) => report(&log, check::run(&args).await),
            Command::Produce(args) => report(&log, produce::run(args).await),
            Command::Consume(args) => report(&log, consume::run(args).await),
        }
    });
    // A question to a log that is away may still be waiting for its answer.
    runtime.shutdown_timeout(BLOCKED_TIME);
    producer::until_closed(BLOCKED_TIME);
    code
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.enable_all().on_thread_start(slice::shed).build()
}

/// A variable of the environment. What of it is not UTF-8 is replaced, for the pipeline's file to say so: it is set all the same.
fn variable(name: &str) -> Option<String> {
    let value = std::env::var_os(name)?;
    Some(value.to_string_lossy().into_owned())
}

/// Commands that end by themselves may wait for who reads what they print.
fn report(log: &LogOutput, result: anyhow::Result<()>) -> ExitCode {
    log.flush();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => match error.downcast_ref::<Diagnostics>() {
            Some(diagnostics) => {
                diagnostics.print();
                ExitCode::from(WRONG_USAGE)
            }
            None => {
                eprintln!("error: {error:#}");
                ExitCode::from(FAILED)
            }
        },
    }
}
