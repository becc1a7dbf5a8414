//! Removes records that are older, or more, than their topic is to keep, or that newer ones of their key replace.

use std::sync::Arc;

use tokio::time::{MissedTickBehavior, interval};
use tracing::warn;

use crate::node::Node;
use crate::storage::now_ms;

/// Looks after all partitions, again and again, until the node shuts down.
pub(crate) async fn run(node: Arc<Node>) {
    let mut ticks = interval(node.config.retention_check);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // Both are cancel-safe.
        tokio::select! {
            _ = ticks.tick() => {}
            () = node.shutdown.cancelled() => return,
        }
        let of_round = node.clone();
        let round = tokio::task::spawn_blocking(move || retain_all(&of_round));
        if round.await.is_err() {
            warn!("a round of retention failed; the next one tries again");
        }
    }
}

/// Compacts the topics that are to be, one partition after the other, until the node shuts down.
pub(crate) async fn compact(node: Arc<Node>) {
    let mut ticks = interval(node.config.compaction_check);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // Both are cancel-safe.
        tokio::select! {
            _ = ticks.tick() => {}
            () = node.shutdown.cancelled() => return,
        }
        let of_round = node.clone();
        let round = tokio::task::spawn_blocking(move || compact_all(&of_round));
        if round.await.is_err() {
            warn!("a round of compaction failed; the next one tries again");
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
