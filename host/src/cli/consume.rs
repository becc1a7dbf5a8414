//! `host consume`: prints the records of a topic as JSON lines.

use std::io;

use anyhow::Context;
use clap::Args;
use futures::FutureExt;
use tokio::io::{AsyncWriteExt, BufWriter, stdout};
use tokio::signal::unix::{SignalKind, signal};

use super::log_args::{LogArgs, OpenLog};
use super::record_line;
use crate::log::kafka::tail::{Event, Start, Tail};

/// Bytes printed at once.
const BUFFER: usize = 64 << 10;

/// Print the records of a topic as JSON lines, and wait for more; `produce --json` reads them
#[derive(Args, Debug)]
pub struct ConsumeArgs {
    /// The topic
    topic: String,
    /// Where in each partition to begin: beginning, end or an offset
    #[arg(long, value_name = "PLACE", default_value = "beginning", value_parser = parse_start)]
    from: Start,
    /// End after so many records
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// End at the newest record in place of waiting for more
    #[arg(long)]
    exit: bool,
    #[command(flatten)]
    log: LogArgs,
}

/// Prints until the count, the end or a signal; whoever reads may leave before that.
pub async fn run(args: ConsumeArgs) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for signals")?;
    let log = args.log.open().await?;
    // A signal drops the other half wherever it waits: nothing of it outlives the process.
    let done = tokio::select! {
        done = consume(&args, &log) => done,
        _ = tokio::signal::ctrl_c() => Ok(()),
        _ = terminate.recv() => Ok(()),
    };
    log.close().await;
    done
}

async fn consume(args: &ConsumeArgs, log: &OpenLog) -> anyhow::Result<()> {
    let mut left = args.count.unwrap_or(u64::MAX);
    if left == 0 {
        return Ok(());
    }
    let mut tail = Tail::open(&log.settings, &args.topic, args.from).await?;
    let mut out = BufWriter::with_capacity(BUFFER, stdout());
    while left > 0 {
        // `next` is cancel-safe, so it may be asked once and then again.
        let event = match tail.next().now_or_never() {
            Some(event) => event?,
            None => {
                if is_gone(out.flush().await)? {
                    return Ok(());
                }
                tail.next().await?
            }
        };
        match event {
            Event::Record(record) => {
                let mut line = record_line::write(&args.topic, &record)?;
                line.push(b'\n');
                if is_gone(out.write_all(&line).await)? {
                    return Ok(());
                }
                left -= 1;
            }
            Event::End if args.exit => break,
            Event::End => {}
        }
    }
    is_gone(out.flush().await)?;
    Ok(())
}

/// Whether the reader has left, as `head` does: no error of ours.
fn is_gone(written: io::Result<()>) -> anyhow::Result<bool> {
    match written {
        Ok(()) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(true),
        Err(error) => Err(error).context("cannot print"),
    }
}

fn parse_start(text: &str) -> Result<Start, String> {
    match text {
        "beginning" => Ok(Start::Beginning),
        "end" => Ok(Start::End),
        _ => match text.parse() {
            Ok(offset @ 0..) => Ok(Start::Offset(offset)),
            _ => Err("write beginning, end or an offset".to_owned()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let check = |text: &str, expected: Option<Start>| {
            assert_eq!(parse_start(text).ok(), expected, "{text}")
        };
        check("beginning", Some(Start::Beginning));
        check("end", Some(Start::End));
        check("0", Some(Start::Offset(0)));
        check("42", Some(Start::Offset(42)));
        check("-1", None);
        check("start", None);
    }
}
