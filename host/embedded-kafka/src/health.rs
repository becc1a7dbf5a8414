//! Whether the broker can write, told to whoever runs it: on a full disk it refuses records, clients send them again, and
//! nobody would hear of it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::node::Node;

/// How often the broker looks whether it can write, once it could not, and whether it could.
const CHECK: Duration = Duration::from_millis(500);

/// Looks, again and again, until the node shuts down. Tells why records or offsets cannot be written, or `None`.
pub(crate) async fn run(node: Arc<Node>, told: watch::Sender<Option<String>>) {
    let mut ticks = interval(CHECK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // Both are cancel-safe.
        tokio::select! {
            _ = ticks.tick() => {}
            () = node.shutdown.cancelled() => return,
        }
        let looked = node.clone();
        let Ok(mut reason) = tokio::task::spawn_blocking(move || look(&looked)).await else {
            continue;
        };
        if let Some(why) = node.journal.trouble() {
            // With nothing to write, it only looks whether it could.
            if node.journal.write(Vec::new()).await.is_err() {
                reason = reason.or(Some(format!(
                    "topics and committed offsets cannot be written: {why}"
                )));
            }
        }
        told.send_if_modified(|old| {
            let changed = *old != reason;
            match &reason {
                Some(why) if changed => warn!("{why}"),
                None if changed => info!("the broker can write again"),
                _ => {}
            }
            *old = reason;
            changed
        });
    }
}

/// Tries again where a write had failed.
fn look(node: &Node) -> Option<String> {
    let mut first = None;
    let mut more = 0;
    for topic in node.topics.all() {
        for partition in topic.partitions() {
            match (partition.trouble(), &first) {
                (None, _) => {}
                (Some(why), None) => first = Some(format!("{}: {why}", partition.name())),
                (Some(_), Some(_)) => more += 1,
            }
        }
    }
    let first = first?;
    Some(match more {
        0 => format!("records cannot be written to {first}"),
        more => format!("records cannot be written to {more} more partitions and {first}"),
    })
}
