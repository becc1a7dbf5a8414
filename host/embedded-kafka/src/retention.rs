//! Removes records that are older, or more, than their topic is to keep, or that newer ones of their key replace.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tracing::warn;

use crate::node::Node;
use crate::storage::now_ms;

/// Removes from all partitions what is to go, again and again, until the node shuts down.
pub(crate) async fn run(node: Arc<Node>) {
    let every = node.config.retention_check;
    rounds(node, every, "retention", retain_all).await;
}

/// Compacts the topics that are to be, one partition after the other, until the node shuts down.
pub(crate) async fn compact(node: Arc<Node>) {
    let every = node.config.compaction_check;
    rounds(node, every, "compaction", compact_all).await;
}

async fn rounds(node: Arc<Node>, every: Duration, what: &str, work: fn(&Node)) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // Both are cancel-safe.
        tokio::select! {
            _ = ticks.tick() => {}
            () = node.shutdown.cancelled() => return,
        }
        let of_round = node.clone();
        let round = tokio::task::spawn_blocking(move || work(&of_round));
        if round.await.is_err() {
            warn!("a round of {what} failed; the next one tries again");
        }
    }
}

fn compact_all(node: &Node) {
    let is_unwanted = || node.shutdown.is_cancelled();
    for topic in node.topics.all() {
        for partition in topic.partitions() {
            if is_unwanted() {
                return;
            }
            partition.compact(now_ms(), &is_unwanted);
        }
    }
}

fn retain_all(node: &Node) {
    let now = now_ms();
    for topic in node.topics.all() {
        for partition in topic.partitions() {
            if let Err(error) = partition.retain(now) {
                warn!(partition = partition.name(), %error, "could not remove old records");
            }
        }
    }
}
