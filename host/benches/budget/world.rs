//! What is around a lane, as cheap as it can be: a log and a database in memory, and a stage that passes messages on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use host::capability::{Away, StoreError};
use host::delivery::progress::{
    Broken, Checkpoint, Claim, Commit, CommitError, LaneId, Ledger, Mode, Transaction,
};
use host::delivery::{Delivery, Handler, Invocation};
use host::log::committed::RowMark;
use host::log::{Addressed, BatchLimits, Gap, LogError, Sink, Source, Started, Unsent};
use host::record::{Header, Outgoing, Record};
use tokio_util::sync::CancellationToken;

/// Keys of the messages, in turn.
const KEYS: i64 = 1_000;
/// As long as Kafka's are.
pub(crate) const CLUSTER: &str = "nUcoD3k0SHyTn1WYwXqZCg";
const VALUE: [u8; 256] = [b'x'; 256];

/// A partition that asks its lane to end once all is done.
pub(crate) struct Log {
    topic: Arc<str>,
    partition: i32,
    next: i64,
    end: i64,
    /// What its records' ids begin with.
    sent: String,
    stopping: CancellationToken,
}

impl Log {
    pub(crate) fn new(topic: &str, partition: i32, messages: u64) -> Self {
        Self {
            topic: Arc::from(topic),
            partition,
            next: 0,
            end: i64::try_from(messages).expect("an offset"),
            sent: format!("@{CLUSTER}/{topic}/{partition}/up/in/0/1/"),
            stopping: CancellationToken::new(),
        }
    }

    fn record(&self, offset: i64) -> Record {
        Record {
            topic: self.topic.clone(),
            partition: self.partition,
            offset,
            timestamp: None,
            key: Some((offset % KEYS).to_be_bytes().to_vec()),
            value: Some(VALUE.to_vec()),
            headers: vec![Header::new(
                "stagehost-id",
                format!("{}{offset}/0", self.sent),
            )],
        }
    }
}

impl Source for Log {
    async fn start(&mut self, _: Option<i64>) -> Result<Option<Started>, Gap> {
        Ok(Some(Started::default()))
    }

    async fn next(&mut self, limits: &BatchLimits) -> Result<Option<Vec<Record>>, Gap> {
        if self.next == self.end {
            self.stopping.cancelled().await;
            return Ok(None);
        }
        let count = i64::try_from(limits.max_messages).unwrap_or(i64::MAX);
        let until = self.end.min(self.next.saturating_add(count));
        let records = (self.next..until).map(|offset| self.record(offset));
        let records = records.collect();
        self.next = until;
        Ok(Some(records))
    }

    fn done(&mut self, next_offset: i64, _: Option<RowMark>) {
        if next_offset == self.end {
            self.stopping.cancel();
        }
    }

    fn stopping(&self) -> CancellationToken {
        self.stopping.clone()
    }
}

/// Takes all outputs, and counts them.
#[derive(Default)]
pub(crate) struct Sent(AtomicU64);

impl Sent {
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Sink for Sent {
    async fn produce(&self, records: &[Outgoing]) -> Result<(), Vec<Unsent>> {
        // An acknowledgement is never there at once.
        tokio::task::yield_now().await;
        self.0.fetch_add(records.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

impl Addressed for Sent {
    async fn partition_of(&self, _: &Outgoing) -> Result<i32, LogError> {
        Ok(0)
    }
}

/// Passes each message on.
pub(crate) struct Stage;

impl Stage {
    fn pass_on(deliveries: &[Delivery<'_>]) -> Invocation {
        let output = |delivery: &Delivery<'_>| Outgoing {
            topic: delivery.record.topic.clone(),
            partition: None,
            timestamp: None,
            key: delivery.record.key.clone(),
            value: delivery.record.value.clone(),
            headers: Vec::new(),
        };
        Invocation {
            outcomes: Ok(deliveries.iter().map(|_| Ok(())).collect()),
            outputs: deliveries.iter().map(output).collect(),
            worn: false,
            repeated: false,
        }
    }
}

impl Handler<()> for Stage {
    fn takes_batches(&self) -> bool {
        false
    }

    async fn call(&self, deliveries: &[Delivery<'_>], (): &()) -> Invocation {
        Self::pass_on(deliveries)
    }

    async fn probe(&self, _: &Away) -> Result<(), StoreError> {
        Ok(())
    }
}

impl Handler<Effects> for Stage {
    fn takes_batches(&self) -> bool {
        false
    }

    async fn call(&self, deliveries: &[Delivery<'_>], effects: &Effects) -> Invocation {
        effects.0.fetch_add(1, Ordering::Relaxed);
        Self::pass_on(deliveries)
    }

    async fn probe(&self, _: &Away) -> Result<(), StoreError> {
        Ok(())
    }
}

/// Forgets what it is given, and says that it has it.
#[derive(Default)]
pub(crate) struct Database;

/// A transaction, which counts its statements.
pub(crate) struct Effects(AtomicU64);

impl Ledger for Database {
    type Transaction = Effects;

    async fn claim(&self, _: &LaneId) -> Result<Claim, StoreError> {
        Ok(Claim {
            epoch: 1,
            generation: 1,
            commits: 0,
            checkpoint: Checkpoint::default(),
        })
    }

    async fn reclaim(&self, lane: &LaneId, _: i64) -> Result<Option<Claim>, StoreError> {
        self.claim(lane).await.map(Some)
    }

    async fn look(&self, lane: &LaneId) -> Result<Option<Claim>, StoreError> {
        self.claim(lane).await.map(Some)
    }

    async fn raise(&self, lane: &LaneId, _: i64, _: i64) -> Result<Option<Claim>, StoreError> {
        self.claim(lane).await.map(Some)
    }

    async fn begin(&self, _: Mode) -> Result<Effects, StoreError> {
        Ok(Effects(AtomicU64::new(0)))
    }

    async fn save(&self, _: Commit<'_>) -> Result<(), CommitError> {
        Ok(())
    }
}

impl Transaction for Effects {
    fn statements(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn broken(&self) -> Option<Broken> {
        None
    }

    async fn savepoint(&self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn rollback_to_savepoint(&self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn commit(self, commit: Commit<'_>) -> Result<(), CommitError> {
        std::hint::black_box(commit.checkpoint);
        Ok(())
    }

    async fn rollback(self) {}
}
