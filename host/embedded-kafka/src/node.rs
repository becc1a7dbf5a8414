//! What all requests work on: the one node of this cluster.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::group::Groups;
use crate::storage::journal::{Journal, NotWritten};
use crate::storage::journal_state::Entry;
use crate::storage::lock;
use crate::storage::topics::Topics;
use crate::storage::writer::Writers;

/// The id of the only node.
pub(crate) const NODE_ID: i32 = 1;

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
            producer_ids: Mutex::new(0..0),
            allocating: tokio::sync::Mutex::default(),
            config,
        }
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
