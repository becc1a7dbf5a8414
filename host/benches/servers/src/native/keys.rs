//! Messages that each wait a while, one at a time a key, all keys side by side.

use std::collections::HashMap;
use std::time::Duration;

use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::message::Message;
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde::Deserialize;
use tokio::sync::mpsc;

use super::{Settings, consumer_config, producer_config};

/// How many milliseconds a message waits.
#[derive(Deserialize)]
struct Work {
    ms: u64,
}

pub(super) fn run(settings: &Settings) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let producer: FutureProducer = producer_config(settings).create()?;
        let consumer: StreamConsumer = consumer_config(settings).create()?;
        consumer.subscribe(&[&settings.input])?;
        let mut keys = HashMap::<Vec<u8>, mpsc::UnboundedSender<u64>>::new();
        loop {
            let message = consumer.recv().await?;
            let work: Work = serde_json::from_slice(message.payload().unwrap_or_default())?;
            let key = message.key().unwrap_or_default().to_vec();
            let (producer, output) = (producer.clone(), settings.output.clone());
            let sender = keys.entry(key).or_insert_with_key(|key| {
                let (sender, waits) = mpsc::unbounded_channel();
                tokio::spawn(handle(key.clone(), waits, producer, output));
                sender
            });
            sender.send(work.ms)?;
        }
    })
}

async fn handle(
    key: Vec<u8>,
    mut waits: mpsc::UnboundedReceiver<u64>,
    producer: FutureProducer,
    output: String,
) {
    while let Some(wait) = waits.recv().await {
        tokio::time::sleep(Duration::from_millis(wait)).await;
        let record = FutureRecord::to(&output).key(&key).payload("done");
        if producer.send_result(record).is_err() {
            std::process::exit(1);
        }
    }
}
