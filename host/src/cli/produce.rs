//! `host produce`: appends records to a topic.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde::Serialize;
use tokio::fs::File;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, BufReader, stdin};

use super::log_args::{LogArgs, OpenLog};
use crate::log::Sink;
use crate::log::kafka::producer::{Patience, Producer};
use crate::log::kafka::topics::Admin;
use crate::record::{Header, Outgoing};

/// How long the log may take to acknowledge.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of a record's value that are read at most; Kafka's own limit is 1 MiB unless it is raised.
const MAX_VALUE: u64 = 256 << 20;
/// Records and bytes of lines that are under way at once.
const MAX_CHUNK: usize = 1000;
const MAX_CHUNK_BYTES: usize = 16 << 20;
/// Bytes read at once.
const READ_BUFFER: usize = 256 << 10;

/// Append a record to a topic: the whole file is its value
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
    /// Make each line a record
    #[arg(long)]
    lines: bool,
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
    if args.lines {
        let records =
            produce_lines(open(args.file.as_deref()).await?, &template, &producer).await?;
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

/// Answers how many were acknowledged.
async fn produce_lines(
    mut input: Input,
    template: &Outgoing,
    producer: &Producer,
) -> anyhow::Result<u64> {
    let mut acknowledged = 0;
    loop {
        let chunk = read_lines(&mut input, template).await?;
        if chunk.is_empty() {
            return Ok(acknowledged);
        }
        if let Err(unsent) = producer.produce(&chunk).await {
            let sent = acknowledged + (chunk.len() - unsent.len()) as u64;
            match unsent.into_iter().min_by_key(|unsent| unsent.index) {
                Some(first) => bail!(
                    "line {}: {}; {sent} lines were acknowledged",
                    acknowledged + first.index as u64 + 1,
                    first.error
                ),
                None => bail!("some lines were not acknowledged"),
            }
        }
        acknowledged += chunk.len() as u64;
    }
}

/// The next lines as records; waits for the first one only, so that lines may be typed in.
async fn read_lines(input: &mut Input, template: &Outgoing) -> anyhow::Result<Vec<Outgoing>> {
    let mut chunk = Vec::new();
    let mut bytes = 0;
    loop {
        let mut line = Vec::new();
        let read = (&mut *input)
            .take(MAX_VALUE + 1)
            .read_until(b'\n', &mut line)
            .await;
        if read.context("cannot read the lines")? == 0 {
            return Ok(chunk);
        }
        ensure!(
            line.len() as u64 <= MAX_VALUE,
            "a line is larger than {MAX_VALUE} bytes"
        );
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        bytes += line.len();
        chunk.push(Outgoing {
            value: Some(line),
            ..template.clone()
        });
        if chunk.len() == MAX_CHUNK || bytes >= MAX_CHUNK_BYTES || !has_line(input).await? {
            return Ok(chunk);
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
