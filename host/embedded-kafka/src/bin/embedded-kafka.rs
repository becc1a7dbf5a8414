//! A broker as a process of its own: `embedded-kafka FOLDER [ADDRESS [CHECK]]`, by default on a free port of 127.0.0.1.
//! `CHECK`: milliseconds after which retention and compaction look again.
//!
//! It prints the address that it listens on, logs to stderr, and ends when its standard input does, so that it does
//! not outlive whoever started it.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use embedded_kafka::{Broker, Config};

#[tokio::main]
async fn main() -> ExitCode {
    let colours = io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(colours)
        .init();
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments
        .next()
        .ok_or("usage: embedded-kafka FOLDER [ADDRESS [CHECK]]")?;
    let mut config = Config::new(folder);
    if let Some(address) = arguments.next() {
        config.listen = address
            .parse()
            .map_err(|_| format!("{address} is not an address such as 127.0.0.1:9092"))?;
    }
    if let Some(check) = arguments.next() {
        let millis = check
            .parse()
            .map_err(|_| format!("{check} is not a number of milliseconds"))?;
        config.retention_check = Duration::from_millis(millis);
        config.compaction_check = config.retention_check;
    }
    let broker = Broker::start(config).await?;
    println!("{}", broker.address());
    io::stdout().flush()?;
    tokio::task::spawn_blocking(|| io::copy(&mut io::stdin(), &mut io::sink())).await??;
    broker.shutdown().await;
    Ok(())
}
