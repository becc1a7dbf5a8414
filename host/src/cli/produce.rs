//! `host produce`: appends records to a topic.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde::Serialize;
use tokio::fs::File;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, BufReader, stdin};
use tracing::warn;

use super::log_args::{LogArgs, OpenLog};
use super::record_line;
use crate::log::kafka::producer::{Patience, Producer, RawOutgoing};
use crate::log::kafka::topics::Admin;
use crate::record::{Header, Outgoing};

/// How long the log may take to acknowledge.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of a record's value that are read at most; Kafka's own limit is 1 MiB unless it is raised.
const MAX_VALUE: u64 = 256 << 20;
/// Bytes of a line at most: a value's, as base64, and as much for the rest.
const MAX_LINE: u64 = 2 * MAX_VALUE;
/// Records and bytes of lines that are under way at once.
const MAX_CHUNK: usize = 1000;
const MAX_CHUNK_BYTES: usize = 16 << 20;
/// Bytes read at once.
const READ_BUFFER: usize = 256 << 10;

/// Append a record to a topic: the whole file is its value, unless `--lines` or `--json` says otherwise
#[derive(Args, Debug)]
pub struct ProduceArgs {
    /// The topic
    topic: String,
    /// The value's file; standard input if it is left out or -
    #[arg(conflicts_with = "null")]
    file: Option<PathBuf>,
    /// The record's key
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// A header of the record; may be repeated
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = parse_header)]
    headers: Vec<Header>,
    /// Make each line the value of a record
    #[arg(long, conflicts_with = "json")]
    lines: bool,
    /// Make each line a record of its own key, value, headers and timestamp, as `consume` prints it
    #[arg(long, conflicts_with_all = ["key", "headers", "null"])]
    json: bool,
    /// Append each record to the partition that its line names, in place of its key's
    #[arg(long, requires = "json")]
    keep_partition: bool,
    /// Append a tombstone: a record without a value
    #[arg(long, conflicts_with = "lines")]
    null: bool,
    #[command(flatten)]
    log: LogArgs,
}

/// Appends, and prints a JSON line of what was acknowledged.
pub async fn run(args: ProduceArgs) -> anyhow::Result<()> {
    let mut log = args.log.open().await?;
    let done = produce(&args, &mut log).await;
    log.close().await;
    println!("{}", serde_json::to_string(&done?)?);
    Ok(())
}

/// What is printed.
#[derive(Serialize)]
#[serde(untagged)]
enum Acknowledged<'a> {
    Record {
        topic: &'a str,
        partition: i32,
        offset: i64,
    },
    Lines {
        topic: &'a str,
        records: u64,
    },
}

async fn produce<'a>(args: &'a ProduceArgs, log: &mut OpenLog) -> anyhow::Result<Acknowledged<'a>> {
    let topic = args.topic.as_str();
    find_topic(topic, log).await?;
    let producer = Producer::new(&log.settings, Patience::Bounded(PATIENCE))?;
    let template = Outgoing {
        topic: topic.into(),
        partition: None,
        timestamp: None,
        key: args.key.clone().map(String::into_bytes),
        value: None,
        headers: args.headers.clone(),
    };
    if args.lines || args.json {
        let form = match (args.json, args.keep_partition) {
            (false, _) => Form::Values,
            (true, keeps_partition) => Form::Records { keeps_partition },
        };
        let mut lines = Lines {
            input: open(args.file.as_deref()).await?,
            template: raw(template),
            form,
            read: 0,
            timeless: None,
        };
        let records = lines.produce(&producer).await;
        lines.say_timeless();
        let records = records?;
        return Ok(Acknowledged::Lines { topic, records });
    }
    let value = match args.null {
        true => None,
        false => Some(read_all(open(args.file.as_deref()).await?).await?),
    };
    let (partition, offset) = producer
        .produce_one(&Outgoing { value, ..template })
        .await?;
    Ok(Acknowledged::Record {
        topic,
        partition,
        offset,
    })
}

fn raw(mut record: Outgoing) -> RawOutgoing {
    let headers = std::mem::take(&mut record.headers);
    let headers = headers.into_iter().map(|h| (h.name.into_bytes(), h.value));
    RawOutgoing {
        headers: headers.collect(),
        record,
    }
}

/// Creates the topic if the pipeline declares it and it is missing; any other must be there, since a
/// mistyped name would otherwise become a topic.
async fn find_topic(topic: &str, log: &mut OpenLog) -> anyhow::Result<()> {
    let admin = Admin::new(&log.settings)?;
    log.topics.retain(|name, _| name == topic);
    if !log.topics.is_empty() {
        admin.ensure(&log.topics).await?;
        return Ok(());
    }
    let there = admin.partitions().await?;
    ensure!(
        there.contains_key(topic),
        "there is no topic `{topic}`: create it, or declare it in the pipeline"
    );
    Ok(())
}

type Input = Box<dyn AsyncBufRead + Send + Unpin>;

async fn open(file: Option<&Path>) -> anyhow::Result<Input> {
    Ok(match file {
        Some(path) if path != Path::new("-") => {
            let file = File::open(path).await;
            Box::new(BufReader::with_capacity(
                READ_BUFFER,
                file.with_context(|| format!("cannot read {}", path.display()))?,
            ))
        }
        _ => Box::new(BufReader::with_capacity(READ_BUFFER, stdin())),
    })
}

async fn read_all(input: Input) -> anyhow::Result<Vec<u8>> {
    let mut value = Vec::new();
    input
        .take(MAX_VALUE + 1)
        .read_to_end(&mut value)
        .await
        .context("cannot read the value")?;
    ensure!(
        value.len() as u64 <= MAX_VALUE,
        "the value is larger than {MAX_VALUE} bytes"
    );
    Ok(value)
}

/// What a line is.
#[derive(Clone, Copy)]
enum Form {
    /// A record's value.
    Values,
    /// A record as `consume` prints it.
    Records { keeps_partition: bool },
}

/// Lines that become records.
struct Lines {
    input: Input,
    /// What a value lacks of a record.
    template: RawOutgoing,
    form: Form,
    /// How many were read.
    read: u64,
    /// How many records have a timestamp that can't be sent, and the line of the first.
    timeless: Option<(u64, u64)>,
}

/// Records that are sent together.
#[derive(Default)]
struct Chunk {
    records: Vec<RawOutgoing>,
    /// Each one's line.
    lines: Vec<u64>,
    /// Why the line behind them is no record.
    fault: Option<String>,
}

impl Lines {
    /// Answers how many were acknowledged.
    async fn produce(&mut self, producer: &Producer) -> anyhow::Result<u64> {
        let mut acknowledged = 0;
        loop {
            let chunk = self.next_chunk().await?;
            if let Err(unsent) = producer.produce_raw(&chunk.records).await {
                let sent = acknowledged + (chunk.records.len() - unsent.len()) as u64;
                match unsent.into_iter().min_by_key(|unsent| unsent.index) {
                    Some(first) => bail!(
                        "line {}: {}; {sent} lines were acknowledged",
                        chunk.lines[first.index],
                        first.error
                    ),
                    None => bail!("some lines were not acknowledged"),
                }
            }
            acknowledged += chunk.records.len() as u64;
            if let Some(fault) = chunk.fault {
                bail!("{fault}; {acknowledged} lines were acknowledged");
            }
            if chunk.records.is_empty() {
                return Ok(acknowledged);
            }
        }
    }

    /// The next lines as records, none at the end; waits for the first one only, so that lines may be typed in.
    async fn next_chunk(&mut self) -> anyhow::Result<Chunk> {
        let mut chunk = Chunk::default();
        let mut bytes = 0;
        loop {
            let mut line = Vec::new();
            let read = (&mut self.input)
                .take(MAX_LINE + 1)
                .read_until(b'\n', &mut line)
                .await;
            if read.context("cannot read the lines")? == 0 {
                return Ok(chunk);
            }
            ensure!(
                line.len() as u64 <= MAX_LINE,
                "a line is larger than {MAX_LINE} bytes"
            );
            if line.last() == Some(&b'\n') {
                line.pop();
            }
            self.read += 1;
            bytes += line.len();
            match self.record(line) {
                Ok(Some(record)) => {
                    chunk.records.push(record);
                    chunk.lines.push(self.read);
                }
                Ok(None) => {}
                Err(fault) => {
                    chunk.fault = Some(format!("line {}: {fault}", self.read));
                    return Ok(chunk);
                }
            }
            let is_full = chunk.records.len() == MAX_CHUNK || bytes >= MAX_CHUNK_BYTES;
            if is_full || !chunk.records.is_empty() && !has_line(&mut self.input).await? {
                return Ok(chunk);
            }
        }
    }

    /// `None` for a blank line between records.
    fn record(&mut self, line: Vec<u8>) -> Result<Option<RawOutgoing>, String> {
        let Form::Records { keeps_partition } = self.form else {
            let mut value = self.template.clone();
            value.record.value = Some(line);
            return Ok(Some(value));
        };
        if line.trim_ascii().is_empty() {
            return Ok(None);
        }
        let record = record_line::read(&line)?;
        match record.timestamp {
            Some(..0) => return Err("a timestamp is not negative".to_owned()),
            Some(0) => {
                let (count, _) = self.timeless.get_or_insert((0, self.read));
                *count += 1;
            }
            _ => {}
        }
        let partition = match (keeps_partition, record.partition) {
            (false, _) => None,
            (true, Some(partition @ 0..)) => Some(partition),
            (true, _) => return Err("there is no partition to keep".to_owned()),
        };
        Ok(Some(RawOutgoing {
            record: Outgoing {
                topic: self.template.record.topic.clone(),
                partition,
                timestamp: record.timestamp,
                key: record.key,
                value: record.value,
                headers: Vec::new(),
            },
            headers: record.headers,
        }))
    }

    /// librdkafka takes 0 for none.
    fn say_timeless(&self) {
        if let Some((count, first)) = self.timeless {
            warn!(
                "{count} record(s), the first in line {first}, have the timestamp 0, which librdkafka can't send: \
                 the copies have the current time"
            );
        }
    }
}

/// Whether a whole line is at hand already.
async fn has_line(input: &mut Input) -> anyhow::Result<bool> {
    // Never waits: polled once, it either has something or leaves the reader as it was.
    let filled = futures::FutureExt::now_or_never(input.fill_buf());
    Ok(match filled {
        Some(buffer) => buffer.context("cannot read the lines")?.contains(&b'\n'),
        None => false,
    })
}

fn parse_header(text: &str) -> Result<Header, String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok(Header::new(name, value)),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}
