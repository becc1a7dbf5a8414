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

use tracing::{debug, info, warn};

use self::batch::Batch;
pub(super) use self::outbox::warn_of;
use self::outbox::{Delivery, Outbox};
use self::turn::{Plan, Ran};
use super::{Common, Equipment, Halt, LOG_PATIENCE, Standstill, Stopped};
use crate::capability::{Action, Away, StoreError, StoreName};
use crate::delivery::Handler;
use crate::delivery::output;
use crate::delivery::progress::{Checkpoint, Claim, LaneId, Ledger, Transaction};
use crate::delivery::seen::Seen;
use crate::log::{Addressed, Gap, Source};
use crate::pipeline::Retry;
use crate::record::{Outgoing, Record};

/// How a lane that another host has taken over waits for its group to say so too.
const FENCED_PATIENCE: Retry = Retry {
    max_attempts: u32::MAX,
    initial: Duration::from_secs(3),
    max: Duration::from_secs(10),
};
/// A lane that could not keep its row so often in a row says so on readiness: once happens when hosts come and go.
const TROUBLE: u32 = 2;

/// After so long without a record, outputs that the log has are taken out of the row: a crash would produce them again. And a
/// lane that could not keep its row before has nothing to say any more.
const IDLE: Duration = Duration::from_secs(5);

/// One stage on one partition.
pub struct Lane<S, K, H, L> {
    source: S,
    common: Common<K, H>,
    ledger: Arc<L>,
    store: StoreName,
    id: LaneId,
    /// How often in a row it could not keep its row.
    troubles: u32,
    standstill: Option<Standstill>,
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
            troubles: 0,
            standstill: None,
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
                    let why = "another host has taken the partition over";
                    if self.trouble(&FENCED_PATIENCE, why).await.is_err() {
                        return;
                    }
                }
                Ending::Halted(halt) => {
                    self.standstill = None;
                    let LaneId {
                        topic, partition, ..
                    } = &self.id;
                    return self.common.halted(topic, *partition, halt).await;
                }
            }
        }
    }

    /// The lane could not keep its row: waits before the next try, longer each time in a row, and says why.
    async fn trouble(&mut self, patience: &Retry, why: &str) -> Result<(), Stopped> {
        self.troubles = self.troubles.saturating_add(1);
        let LaneId {
            topic, partition, ..
        } = &self.id;
        let (times, wait) = (self.troubles, self.common.backoff(patience, self.troubles));
        warn!(
            stage = self.common.stage(),
            topic = &**topic,
            partition,
            times,
            "{why}; next try in {wait:.1?}"
        );
        if times >= TROUBLE {
            let row =
                format!("its row in stagehost_progress can't be kept, {times} times in a row");
            // One after the other: both are about the same condition.
            self.standstill = None;
            self.standstill = Some(self.common.standstill(
                topic,
                *partition,
                &format!("{row}: {why}"),
            ));
        }
        self.common.wait(wait).await
    }

    /// The lane has committed, or has nothing to commit.
    fn row_kept(&mut self) {
        if mem::take(&mut self.troubles) >= TROUBLE {
            self.standstill = None;
            info!(
                stage = self.common.stage(),
                topic = &*self.id.topic,
                partition = self.id.partition,
                "the lane's row is kept again"
            );
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
        let why = format!("{}: {error}", self.store);
        let away = Away {
            store: self.store.clone(),
            action: Action::Write,
            why: error.to_string(),
        };
        // No message is at fault: how long to wait is the lane's affair.
        let waiting = self.common.until_there::<L::Transaction>(&away, 0);
        if !waiting.await? {
            // It answers, and yet it failed: not again at once.
            self.trouble(&LOG_PATIENCE, &why).await?;
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
        self.check_granted(&pending)?;
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

    /// Outputs that the row has were granted when they were committed. The grant may have been taken away since; or
    /// somebody else has written into the row.
    fn check_granted(&self, pending: &[Outgoing]) -> Result<(), Ending> {
        let LaneId {
            group,
            topic: input,
            partition,
        } = &self.id;
        let policy = self.common.policy();
        let foreign = pending.iter().find(|o| !policy.may_send(&o.topic, input));
        let Some(Outgoing { topic, .. }) = foreign else {
            return Ok(());
        };
        let row = format!("the row of {group}, {input}, {partition} in stagehost_progress");
        Err(Ending::Halted(Halt(format!(
            "{}: {row} holds an output for the topic {topic}, which the pipeline does not grant to this stage: \
             add it to `output` (or as `dead-letter`) and start the host again; the output is kept until then",
            self.store
        ))))
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
            let is_idle = !is_aloft && (tenure.has_pending || self.troubles > 0);
            tokio::select! {
                biased;
                // All are cancel-safe: the flight goes on at the next call, records stay where they are, and a sleep
                // holds nothing.
                () = tenure.outbox.landed(), if is_aloft => {}
                records = self.source.next(&self.common.policy().batch) => return Ok(records),
                () = tokio::time::sleep(IDLE), if is_idle => match tenure.has_pending {
                    true => self.clear_pending(tenure).await?,
                    false => self.row_kept(),
                },
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
