//! What all requests work on: the one node of this cluster.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex, Once};

use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::config::Config;
use crate::group::Groups;
use crate::storage::journal::{Journal, NotWritten};
use crate::storage::journal_state::Entry;
use crate::storage::lock;
use crate::storage::topics::Topics;
use crate::storage::writer::Writers;

/// The id of the only node.
pub(crate) const NODE_ID: i32 = 1;

/// What a client is told that wants a transaction.
pub(crate) const NO_TRANSACTIONS: &str =
    "the embedded broker, which is for development, has no transactions; use Apache Kafka for them";

/// What a client is told that wants KIP-848's groups.
pub(crate) const NO_CONSUMER_GROUPS: &str =
    "the embedded broker has only the classic protocol of groups; set group.protocol=classic";

/// Producer ids that one line of the journal makes available.
const PRODUCER_ID_BLOCK: i64 = 1000;

/// The node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) config: Config,
    pub(crate) address: SocketAddr,
    pub(crate) cluster: String,
    pub(crate) topics: Arc<Topics>,
    pub(crate) journal: Journal,
    pub(crate) writers: Writers,
    pub(crate) groups: Groups,
    pub(crate) shutdown: CancellationToken,
    told_of_transactions: Once,
    told_of_consumer_groups: Once,
    /// Producer ids that may be handed out.
    producer_ids: Mutex<Range<i64>>,
    /// Held while a block of producer ids is written.
    allocating: tokio::sync::Mutex<()>,
}

impl Node {
    pub(crate) fn new(
        config: Config,
        address: SocketAddr,
        topics: Arc<Topics>,
        journal: Journal,
        writers: Writers,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            address,
            cluster: journal.look(|state| state.cluster.clone()),
            topics,
            journal,
            writers,
            groups: Groups::new(&config),
            shutdown,
            told_of_transactions: Once::new(),
            told_of_consumer_groups: Once::new(),
            producer_ids: Mutex::new(0..0),
            allocating: tokio::sync::Mutex::default(),
            config,
        }
    }

    /// Says in the log, once, why a client that wants transactions is refused.
    pub(crate) fn tell_of_transactions(&self) {
        self.told_of_transactions.call_once(|| {
            warn!("a client asked for a transaction (`transactional.id`): {NO_TRANSACTIONS}");
        });
    }

    /// Says in the log, once, why a client that wants the newer protocol of groups is refused.
    pub(crate) fn tell_of_consumer_groups(&self) {
        self.told_of_consumer_groups.call_once(|| {
            warn!("a client asked for the group protocol `consumer`: {NO_CONSUMER_GROUPS}");
        });
    }

    /// A producer id that no other producer ever had in this folder.
    pub(crate) async fn next_producer_id(&self) -> Result<i64, NotWritten> {
        let _allocating = self.allocating.lock().await;
        if let Some(id) = lock(&self.producer_ids).next() {
            return Ok(id);
        }
        let first = self.journal.look(|state| state.next_producer_id);
        let next = first + PRODUCER_ID_BLOCK;
        self.journal
            .write(vec![Entry::ProducerIds { next }])
            .await?;
        *lock(&self.producer_ids) = first + 1..next;
        Ok(first)
    }
}
