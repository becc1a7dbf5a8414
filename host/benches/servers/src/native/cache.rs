//! The blog's cache manager: two keys in Redis for each post, one of them with its version, as the stage writes them.

use std::collections::BTreeMap;
use std::sync::Arc;

use rdkafka::consumer::{CommitMode, Consumer, StreamConsumer};
use rdkafka::message::Message;
use redis::aio::MultiplexedConnection;
use redis::{AsyncCommands, Script};

use super::publisher::at_hand;
use super::reader::{Lane, read};
use super::{Settings, consumer_config};

/// A newer value is kept, and so is its version beside it.
const SET_NEWER: &str = "local known = redis.call('GET', KEYS[2])
    if known and tonumber(known) > tonumber(ARGV[2]) then return 0 end
    redis.call('SET', KEYS[1], ARGV[1])
    redis.call('SET', KEYS[2], ARGV[2])
    return 1";
/// The same for pairs of a key and its version's key, with one version for all.
const SET_ALL_NEWER: &str = "for i = 1, #KEYS, 2 do
        local known = redis.call('GET', KEYS[i + 1])
        if not (known and tonumber(known) > tonumber(ARGV[1])) then
            redis.call('MSET', KEYS[i], ARGV[1 + (i + 1) / 2], KEYS[i + 1], ARGV[1])
        end
    end";

#[derive(serde::Deserialize)]
struct Names<'a> {
    uid: &'a str,
    slug: &'a str,
}

/// Each answer is waited for before the next command, and each message's offset is committed.
pub(super) fn one_by_one(settings: &Settings) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut redis = connect(settings).await?;
        let script = Script::new(SET_NEWER);
        let consumer: StreamConsumer = consumer_config(settings).create()?;
        consumer.subscribe(&[&settings.input])?;
        loop {
            let message = consumer.recv().await?;
            let value = message.payload().unwrap_or_default();
            let names: Names<'_> = serde_json::from_slice(value)?;
            let key = format!("post:{}", names.slug);
            let _: i64 = script
                .key(&key)
                .key(version_of(&key))
                .arg(value)
                .arg(message.offset())
                .invoke_async(&mut redis)
                .await?;
            let _: () = redis.set(format!("post:uid:{}", names.uid), value).await?;
            consumer.commit_message(&message, CommitMode::Async)?;
        }
    })
}

/// All of a batch in one pipeline of two commands, the partitions side by side.
pub(super) fn pipelined(settings: &Settings) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let runtime = Arc::new(runtime);
    let redis = runtime.block_on(connect(settings))?;
    let batch = settings.batch;
    read(settings, move |lane| {
        if let Err(error) = runtime.block_on(cache(&lane, redis.clone(), batch)) {
            eprintln!("{error:#}");
            std::process::exit(1);
        }
    })
}

async fn cache(lane: &Lane, mut redis: MultiplexedConnection, batch: usize) -> anyhow::Result<()> {
    let script = Script::new(SET_ALL_NEWER);
    script.load_async(&mut redis).await?;
    loop {
        let messages = at_hand(lane, batch)?;
        let Some(last) = messages.last() else {
            continue;
        };
        let (mut slugs, mut uids) = (BTreeMap::new(), BTreeMap::new());
        for message in &messages {
            let value = message.payload().unwrap_or_default();
            let names: Names<'_> = serde_json::from_slice(value)?;
            slugs.insert(format!("post:{}", names.slug), value);
            uids.insert(format!("post:uid:{}", names.uid), value);
        }
        let mut newer = redis::cmd("EVALSHA");
        newer.arg(script.get_hash()).arg(2 * slugs.len());
        for key in slugs.keys() {
            newer.arg(key).arg(version_of(key));
        }
        newer.arg(last.offset());
        for value in slugs.values() {
            newer.arg(*value);
        }
        let mut pipe = redis::pipe();
        pipe.add_command(newer).ignore();
        pipe.mset(&Vec::from_iter(uids)).ignore();
        let _: () = pipe.query_async(&mut redis).await?;
        lane.done.up_to(last.offset() + 1);
    }
}

fn version_of(key: &str) -> String {
    format!("stagehost:version:{{{key}}}")
}

async fn connect(settings: &Settings) -> redis::RedisResult<MultiplexedConnection> {
    let client = redis::Client::open(settings.redis.as_str())?;
    client.get_multiplexed_async_connection().await
}
