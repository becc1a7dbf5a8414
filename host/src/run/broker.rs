//! The embedded broker of a pipeline, and what it says of itself.

use std::sync::Arc;

use anyhow::Context;

use super::EMBEDDED_FOLDER;
use crate::pipeline::{Brokers, Pipeline};
use crate::readiness::Readiness;

/// What must hold of it before the host is ready.
const CONDITION: &str = "embedded broker";

/// Starts it, if the pipeline has one. From then on, readiness says whether it can write.
pub(super) async fn start(
    pipeline: &Pipeline,
    readiness: &Arc<Readiness>,
) -> anyhow::Result<Option<embedded_kafka::Broker>> {
    let Brokers::Embedded { listen } = pipeline.kafka.brokers else {
        return Ok(None);
    };
    let mut config = embedded_kafka::Config::new(pipeline.data_dir.join(EMBEDDED_FOLDER));
    config.listen = listen;
    let broker = embedded_kafka::Broker::start(config)
        .await
        .context("the embedded broker cannot start")?;
    let mut trouble = broker.trouble();
    let readiness = Arc::clone(readiness);
    tokio::spawn(async move {
        loop {
            match &*trouble.borrow_and_update() {
                None => drop(readiness.ready(CONDITION)),
                Some(why) => drop(readiness.not_ready(CONDITION, why.as_str())),
            }
            // It ends with the broker.
            if trouble.changed().await.is_err() {
                return;
            }
        }
    });
    Ok(Some(broker))
}
