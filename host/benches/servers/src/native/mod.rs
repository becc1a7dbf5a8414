//! What an expert would write without WebAssembly, for each kind of work that is measured: partition queues drained in
//! batches, pipelined produces, prepared statements. With the settings of the log and the stores that the host has too.

mod cache;
mod http;
mod keys;
mod publisher;
mod reader;
mod topic;

use anyhow::bail;
use rdkafka::config::ClientConfig;
use serde::{Deserialize, Serialize};

use crate::log;

/// What a native program works on.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) brokers: String,
    pub(crate) input: String,
    pub(crate) output: String,
    pub(crate) group: String,
    /// PostgreSQL's URL.
    pub(crate) database: String,
    /// Redis's URL.
    pub(crate) redis: String,
    /// Messages of a batch at most.
    pub(crate) batch: usize,
}

/// Runs the program of this name until it is told to end.
pub(crate) fn run(name: &str, settings: &Settings) -> anyhow::Result<()> {
    match name {
        "identity" => topic::run(settings, topic::identity),
        "json" => topic::run(settings, topic::json),
        "publisher-one-by-one" => publisher::one_by_one(settings),
        "publisher" => publisher::batches(settings),
        "cache-one-by-one" => cache::one_by_one(settings),
        "cache" => cache::pipelined(settings),
        "http" => http::run(settings),
        "keys" => keys::run(settings),
        other => bail!("there is no native program {other}"),
    }
}

/// As the host's, whose reasons stand in `log/kafka`, with larger queues: the host has a buffer of its own behind them.
fn consumer_config(settings: &Settings) -> ClientConfig {
    let mut config = log::config(&settings.brokers);
    config.set("group.id", &settings.group);
    config.set("enable.auto.commit", "false");
    config.set("enable.auto.offset.store", "false");
    config.set("auto.offset.reset", "earliest");
    config.set("partition.assignment.strategy", "cooperative-sticky");
    config.set("fetch.queue.backoff.ms", "10");
    config.set("fetch.wait.max.ms", "50");
    config.set("queued.max.messages.kbytes", "16384");
    config
}

/// As the host's, but for the guarantee against gaps that its exactly-once rests on.
fn producer_config(settings: &Settings) -> ClientConfig {
    let mut config = log::config(&settings.brokers);
    config.set("enable.idempotence", "true");
    config.set("acks", "all");
    config.set("linger.ms", "1");
    config.set("partitioner", "murmur2_random");
    config.set("queue.buffering.max.kbytes", "65536");
    config
}

/// A post as the blog's articles have it.
#[derive(Serialize, Deserialize)]
struct Post<'a> {
    uid: std::borrow::Cow<'a, str>,
    title: std::borrow::Cow<'a, str>,
    content: std::borrow::Cow<'a, str>,
    #[serde(default)]
    slug: String,
}

impl Post<'_> {
    /// From its bytes, with the slug that the blog's publisher gives it.
    fn read(bytes: &[u8]) -> serde_json::Result<Post<'_>> {
        let mut post: Post<'_> = serde_json::from_slice(bytes)?;
        let words = post.title.split(|c: char| !c.is_ascii_alphanumeric());
        let words: Vec<_> = words.filter(|word| !word.is_empty()).collect();
        post.slug = format!("{}-{}", words.join("-").to_ascii_lowercase(), post.uid);
        Ok(post)
    }
}
