//! `host consume`: prints the records of a topic as JSON lines.

use std::io;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use futures::FutureExt;
use serde::{Serialize, Serializer};
use tokio::io::{AsyncWriteExt, BufWriter, stdout};
use tokio::signal::unix::{SignalKind, signal};

use super::log_args::{LogArgs, OpenLog};
use crate::log::kafka::tail::{Event, Start, Tail};
use crate::record::Record;

/// Bytes printed at once.
const BUFFER: usize = 64 << 10;

/// Print the records of a topic as JSON lines, and wait for more
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
                let mut line = serde_json::to_vec(&Line::of(&record))?;
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

/// A record as it is printed.
#[derive(Serialize)]
struct Line<'a> {
    topic: &'a str,
    partition: i32,
    offset: i64,
    /// Milliseconds since the Unix epoch.
    timestamp: Option<i64>,
    key: Option<Bytes<'a>>,
    value: Option<Bytes<'a>>,
    headers: Vec<LineHeader<'a>>,
}

#[derive(Serialize)]
struct LineHeader<'a> {
    name: &'a str,
    value: Option<Bytes<'a>>,
}

impl<'a> Line<'a> {
    fn of(record: &'a Record) -> Self {
        let headers = record.headers.iter().map(|header| LineHeader {
            name: &header.name,
            value: header.value.as_deref().map(Bytes),
        });
        Self {
            topic: &record.topic,
            partition: record.partition,
            offset: record.offset,
            timestamp: record.timestamp,
            key: record.key.as_deref().map(Bytes),
            value: record.value.as_deref().map(Bytes),
            headers: headers.collect(),
        }
    }
}

/// Text as text; anything else as `{"base64": …}`, so that no byte is lost.
struct Bytes<'a>(&'a [u8]);

impl Serialize for Bytes<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(self.0) {
            Ok(text) => serializer.serialize_str(text),
            Err(_) => serializer.collect_map([("base64", STANDARD.encode(self.0))]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Header;

    #[test]
    fn lines_keep_every_byte() {
        let record = Record {
            topic: "t".into(),
            partition: 2,
            offset: 7,
            timestamp: Some(1_700_000_000_000),
            key: Some(b"\xff\x00".to_vec()),
            value: None,
            headers: vec![
                Header::new("a", "ü"),
                Header {
                    name: "a".to_owned(),
                    value: None,
                },
                Header::new("", ""),
            ],
        };
        let line = serde_json::to_string(&Line::of(&record)).unwrap();
        assert_eq!(
            line,
            r#"{"topic":"t","partition":2,"offset":7,"timestamp":1700000000000,"key":{"base64":"/wA="},"value":null,"headers":[{"name":"a","value":"ü"},{"name":"a","value":null},{"name":"","value":""}]}"#
        );
    }

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
