//! Exactly once: the effects of a batch, the outputs that it causes and how far the lane has got are committed
//! in one transaction of the stage's database.
//!
//! A batch is run optimistically. If something goes wrong that can't be undone by itself, the transaction is rolled
//! back and the batch is run again, carefully: with savepoints, and without calling the message again that is known
//! to fault. Outputs are produced after the commit, while the next batch runs, and the next commit waits for them.

mod batch;
mod commit;
mod outbox;
mod turn;

use std::convert::Infallible;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, warn};

use self::batch::Batch;
pub(super) use self::outbox::warn_of;
use self::outbox::{Delivery, Outbox};
use self::turn::{Plan, Ran};
use super::{Common, Equipment, Halt, LOG_PATIENCE, Stopped};
use crate::capability::{StoreError, StoreName};
use crate::delivery::Handler;
use crate::delivery::output;
use crate::delivery::progress::{Checkpoint, Claim, LaneId, Ledger, Transaction};
use crate::delivery::seen::Seen;
use crate::log::{Addressed, Gap, Source};
use crate::record::Record;

/// How long a lane that another host has taken over waits for its group to say so too.
const FENCED_WAIT: Duration = Duration::from_secs(2);

/// After so long without a record, outputs that the log has are taken out of the row: a crash would produce them again.
const IDLE: Duration = Duration::from_secs(5);

/// One stage on one partition.
pub struct Lane<S, K, H, L> {
    source: S,
    common: Common<K, H>,
    ledger: Arc<L>,
    store: StoreName,
    id: LaneId,
}

/// What the lane holds between a claim and the next.
struct Tenure {
    epoch: i64,
    generation: i64,
    commits: i64,
    next_offset: Option<i64>,
    /// Failed deliveries of the record at `next_offset`.
    attempts: u32,
    seen: Seen,
    /// Whether the row has outputs.
    has_pending: bool,
    outbox: Outbox,
}

impl Tenure {
    /// Goes on behind a gap: failed deliveries were of a record that is gone.
    fn pass_to(&mut self, offset: Option<i64>) {
        if offset != self.next_offset {
            self.next_offset = offset;
            self.attempts = 0;
        }
    }

    /// Failed deliveries of the first message of the batch that is not settled; others had none.
    fn failed(&self, batch: &Batch) -> u32 {
        let next = batch.records.get(batch.settled).map(|record| record.offset);
        if next == self.next_offset {
            self.attempts
        } else {
            0
        }
    }
}

/// Why a tenure ends.
enum Ending {
    Stopped,
    /// Another host has claimed the lane.
    Fenced,
    Halted(Halt),
}

impl From<Stopped> for Ending {
    fn from(Stopped: Stopped) -> Self {
        Self::Stopped
    }
}

impl<S, K, H, L> Lane<S, K, H, L>
where
    S: Source,
    K: Addressed + 'static,
    H: Handler<L::Transaction>,
    L: Ledger,
{
    /// A lane that has not begun. `store` is the ledger's name. Its waits are jittered by `seed`.
    pub fn new(
        source: S,
        equipment: Equipment<K, H>,
        ledger: Arc<L>,
        store: StoreName,
        id: LaneId,
        seed: u64,
    ) -> Self {
        let common = Common::new(equipment, &source, seed);
        Self {
            source,
            common,
            ledger,
            store,
            id,
        }
    }

    /// Delivers until the partition is to be given up. Dropping the future abandons the batch at
    /// hand: its transaction is rolled back.
    pub async fn run(mut self) {
        loop {
            let Err(ending) = self.tenure().await;
            match ending {
                Ending::Stopped => return,
                Ending::Fenced => {
                    warn!(
                        stage = self.common.stage(),
                        topic = &*self.id.topic,
                        partition = self.id.partition,
                        "another host has taken the partition over"
                    );
                    if self.common.wait(FENCED_WAIT).await.is_err() {
                        return;
                    }
                }
                Ending::Halted(halt) => {
                    let LaneId {
                        topic, partition, ..
                    } = &self.id;
                    return self.common.halted(topic, *partition, halt).await;
                }
            }
        }
    }

    async fn tenure(&mut self) -> Result<Infallible, Ending> {
        let claim = self.claim().await?;
        let mut tenure = self.take_up(claim)?;
        let halt = self.deliver(&mut tenure).await?;
        // A gap is no reason to leave outputs behind: who mends it may remove the row.
        self.finish(&mut tenure).await?;
        Err(Ending::Halted(halt))
    }

    /// Delivers until there is a gap that may not be passed.
    async fn deliver(&mut self, tenure: &mut Tenure) -> Result<Halt, Ending> {
        loop {
            let from = tenure.next_offset;
            match self.common.start(&mut self.source, from).await {
                Ok(from) => tenure.pass_to(from),
                Err(halt) => return Ok(halt),
            }
            let gap = loop {
                match self.next(tenure).await? {
                    Ok(Some(records)) => {
                        self.common.metrics().batch(records.len());
                        let mut batch = Batch::new(records, &tenure.seen);
                        self.work(tenure, &mut batch).await?;
                    }
                    Ok(None) => {
                        self.finish(tenure).await?;
                        return Err(Ending::Stopped);
                    }
                    Err(gap) => break gap,
                }
            };
            match self.common.pass(&gap) {
                Ok(first) => tenure.pass_to(Some(first)),
                Err(halt) => return Ok(halt),
            }
        }
    }

    async fn claim(&mut self) -> Result<Claim, Ending> {
        loop {
            match self.ledger.claim(&self.id).await {
                Ok(claim) => return Ok(claim),
                Err(error) => self.await_database(error).await?,
            }
        }
    }

    /// After an error of the database that is no message's fault.
    async fn await_database(&mut self, error: StoreError) -> Result<(), Ending> {
        if let StoreError::Refused(why) = error {
            return Err(Ending::Halted(Halt(format!("{}: {why}", self.store))));
        }
        debug!("{}: {error}", self.store);
        let was_away = self
            .common
            .until_there::<L::Transaction>(&self.store)
            .await?;
        if !was_away {
            // It answers, and yet it failed: not again at once.
            let wait = self.common.backoff(&LOG_PATIENCE, 1);
            self.common.wait(wait).await?;
        }
        Ok(())
    }

    /// Begins where the row says, and produces once more what it has of outputs.
    fn take_up(&mut self, claim: Claim) -> Result<Tenure, Ending> {
        let LaneId {
            group,
            topic,
            partition,
        } = &self.id;
        let unreadable = |error| {
            let row = format!("the row of {group}, {topic}, {partition} in stagehost_progress");
            Ending::Halted(Halt(format!("{}: {row}: {error}", self.store)))
        };
        let Checkpoint {
            next_offset,
            attempts,
            pending,
            seen,
        } = claim.checkpoint;
        let pending = output::decode(&pending).map_err(unreadable)?;
        let mut tenure = Tenure {
            epoch: claim.epoch,
            generation: claim.generation,
            commits: claim.commits,
            next_offset,
            attempts,
            seen: output::decode_seen(&seen).map_err(unreadable)?,
            has_pending: !pending.is_empty(),
            outbox: Outbox::default(),
        };
        let delivery = self.delivery();
        tenure.outbox.launch(delivery, pending, next_offset);
        Ok(tenure)
    }

    fn delivery(&mut self) -> Delivery<K> {
        let Equipment {
            sink,
            policy,
            metrics,
            ..
        } = &self.common.equipment;
        Delivery {
            sink: sink.clone(),
            policy: policy.clone(),
            metrics: metrics.clone(),
            seed: self.common.seed(),
        }
    }

    /// The next records; tells the log meanwhile what is done.
    async fn next(
        &mut self,
        tenure: &mut Tenure,
    ) -> Result<Result<Option<Vec<Record>>, Gap>, Ending> {
        loop {
            if let Some(done) = tenure.outbox.take_done() {
                self.source.done(done);
            }
            let is_aloft = tenure.outbox.is_aloft();
            tokio::select! {
                biased;
                // All are cancel-safe: the flight goes on at the next call, records stay where they are, and a sleep
                // holds nothing.
                () = tenure.outbox.landed(), if is_aloft => {}
                records = self.source.next(&self.common.policy().batch) => return Ok(records),
                () = tokio::time::sleep(IDLE), if !is_aloft && tenure.has_pending => {
                    self.clear_pending(tenure).await?;
                }
            }
        }
    }

    /// So that nothing is produced again after a stop: waits for what is on its way and takes it out of the row.
    async fn finish(&mut self, tenure: &mut Tenure) -> Result<(), Ending> {
        tenure.outbox.landed().await;
        if let Some(done) = tenure.outbox.take_done() {
            self.source.done(done);
        }
        if tenure.has_pending {
            self.clear_pending(tenure).await?;
        }
        Ok(())
    }

    /// Works through a batch, in as many commits as it takes. Returns before its end when the lane is to stop.
    async fn work(&mut self, tenure: &mut Tenure, batch: &mut Batch) -> Result<(), Ending> {
        let mut plan = Plan::optimistic();
        while !batch.is_settled() && !self.common.stopping.is_cancelled() {
            let mut outbox = mem::take(&mut tenure.outbox);
            let failed = tenure.failed(batch);
            let turn = outbox.alongside(self.turn(batch, &mut plan, failed)).await;
            tenure.outbox = outbox;
            let (transaction, ran) = turn?;
            plan = match ran {
                Ran::Void(next) => {
                    transaction.rollback().await;
                    batch.rewind();
                    next
                }
                Ran::Lost(call, fault) => {
                    drop(transaction);
                    batch.rewind();
                    self.after_loss(batch, &mut plan, &call, fault).await?
                }
                Ran::LogAway(why) => {
                    self.log_away(batch, transaction, &why).await?;
                    plan
                }
                Ran::Good(after) => self.commit(tenure, batch, plan, transaction, after).await?,
            };
        }
        Ok(())
    }
}
