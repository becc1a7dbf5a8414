//! The command line: one file a subcommand.

pub mod check;
pub mod consume;
pub mod log_args;
pub mod produce;
pub mod run;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::diagnostics::Diagnostics;
use crate::log::kafka::producer;

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

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum LogFormat {
    /// For people
    Text,
    /// A JSON object a line
    Json,
}

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
    init_log(cli.log_format);
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the async runtime: {error}");
            return ExitCode::from(FAILED);
        }
    };
    let code = runtime.block_on(async {
        match cli.command {
            Command::Run(args) => run::run(args).await,
            Command::Check(args) => check::run(&args),
            Command::Produce(args) => report(produce::run(args).await),
            Command::Consume(args) => report(consume::run(args).await),
        }
    });
    // A question to a log that is away may still be waiting for its answer.
    runtime.shutdown_timeout(BLOCKED_TIME);
    producer::until_closed(BLOCKED_TIME);
    code
}

fn report(result: anyhow::Result<()>) -> ExitCode {
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

fn init_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => builder.with_target(false).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
}
