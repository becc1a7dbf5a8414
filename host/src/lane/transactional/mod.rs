//! Exactly once: the effects of a batch, the outputs that it causes and how far the lane has got are committed
//! in one transaction of the stage's database.
//!
//! A batch is run optimistically. If something goes wrong that can't be undone by itself, the transaction is rolled
//! back and the batch is run again, carefully: with savepoints, and without calling the message again that is known
//! to fault. Outputs are produced after the commit, while the next batch runs, and the next commit waits for them.

mod batch;
mod commit;
mod compare;
mod outbox;
mod row;
mod turn;

use std::convert::Infallible;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, info, warn};

use self::batch::Batch;
use self::compare::Row;
pub(super) use self::outbox::warn_of;
use self::outbox::{Delivery, Outbox};
use self::turn::{Plan, Ran};
use super::repetition::{Repetitions, Together};
use super::{Common, Equipment, Halt, LOG_PATIENCE, Stopped};
use crate::capability::{Action, Away, StoreError, StoreName};
use crate::delivery::Handler;
use crate::delivery::output;
use crate::delivery::progress::{Checkpoint, Claim, LaneId, Ledger, Transaction};
use crate::delivery::seen::{Ids, Seen};
use crate::log::committed::RowMark;
use crate::log::{Addressed, Gap, Source};
use crate::pipeline::Retry;
use crate::readiness::{Wait, Waiting};
use crate::record::{Outgoing, Record};

/// How a lane that another host has taken over waits for its group to say so too.
const FENCED_PATIENCE: Retry = Retry {
    max_attempts: u32::MAX,
    initial: Duration::from_secs(3),
    max: Duration::from_secs(10),
};
/// A lane that could not keep its row so often in a row says so on readiness: once happens when hosts come and go.
const TROUBLE: u32 = 2;
/// A row that somebody else had is the lane's own again after so long: another host of this kind would have been back.
const UNDISPUTED_AFTER: Duration = Duration::from_secs(15);

/// After so long without a record, outputs that the log has are taken out of the row: a crash would produce them again. And a
/// lane that could not keep its row before has nothing to say any more.
const IDLE: Duration = Duration::from_secs(5);
/// A lane that is idle for so many times as long looks whether its row is as it has left it: no commit would tell.
const LOOK_EVERY: u32 = 3;

/// One stage on one partition.
pub struct Lane<S, K, H, L> {
    source: S,
    common: Common<K, H>,
    ledger: Arc<L>,
    store: StoreName,
    id: LaneId,
    /// Makes the ids of its outputs.
    ids: Ids,
    repetitions: Repetitions,
    /// How often in a row it could not keep its row.
    troubles: u32,
    /// What is said of that.
    waiting: Option<Waiting>,
    /// Until then somebody else, who had its row, may take it again: a commit in between does not mean that it is kept.
    disputed_until: Option<Instant>,
    /// Outputs can't be given their partitions, since the log does not tell.
    unaddressed: Option<Waiting>,
    /// Its row as it left it last.
    left: Option<Row>,
    /// The newest state that it has known its row in.
    known: Option<Row>,
    /// Its database went back: the records below this offset are processed again.
    again: Option<(i64, Waiting)>,
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
    /// Those that it had when it was claimed, until it is compared.
    claimed: Vec<Outgoing>,
    /// Whether it is known whether the row is of the topic that is there.
    knows_topic: bool,
    /// Whether the row does not remember its topic yet.
    has_new_topic: bool,
    /// Whether the row does not say yet that what are no records was passed.
    has_passed: bool,
    outbox: Outbox,
}

impl Tenure {
    /// Whether the row has outputs that the log has once they have landed, or does not remember its topic yet or what was passed.
    fn has_news(&self) -> bool {
        self.has_pending || self.has_passed || (self.has_new_topic && self.next_offset.is_some())
    }

    fn row(&self) -> Row {
        Row {
            epoch: self.epoch,
            generation: self.generation,
            commits: self.commits,
            next_offset: self.next_offset,
        }
    }

    /// What is written beside the group's offset.
    fn mark(&self) -> Option<RowMark> {
        self.row().mark()
    }

    /// Whether a commit happened that was not answered, by what the row is now; `None` where it is another one than the lane
    /// has left.
    fn has_committed(&self, claim: &Claim) -> Option<bool> {
        match claim.commits.checked_sub(self.commits) {
            Some(more @ (0 | 1)) if claim.generation == self.generation => Some(more == 1),
            _ => None,
        }
    }

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
    /// The row is not as the lane has left it.
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
        let common = Common::new(equipment, &source, id.clone(), seed);
        Self {
            source,
            ids: Ids::new(common.equipment.cluster.clone(), &id),
            repetitions: Repetitions::default(),
            common,
            ledger,
            store,
            id,
            troubles: 0,
            waiting: None,
            disputed_until: None,
            unaddressed: None,
            left: None,
            known: None,
            again: None,
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
                    let Some((patience, why)) = self.fate_of_row().await else {
                        return;
                    };
                    if self.trouble(patience, &why).await.is_err() {
                        return;
                    }
                    self.disputed_until = Some(Instant::now() + UNDISPUTED_AFTER);
                }
                Ending::Halted(halt) => {
                    self.waiting = None;
                    return self.common.halted(halt).await;
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
            let wait = Wait::Row(format!("{row}: {why}"));
            self.waiting = Some(self.common.status.begin(wait));
        }
        self.common.wait(wait).await
    }

    /// The lane has committed, or has nothing to commit.
    fn row_kept(&mut self) {
        self.unaddressed = None;
        if self
            .disputed_until
            .is_some_and(|until| Instant::now() < until)
        {
            return;
        }
        if mem::take(&mut self.troubles) >= TROUBLE {
            self.waiting = None;
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
        let ended = self.keep(&mut tenure).await;
        let row = tenure.row();
        self.left = Some(row);
        self.known = Some(row.newest(self.known));
        ended
    }

    async fn keep(&mut self, tenure: &mut Tenure) -> Result<Infallible, Ending> {
        let halt = self.deliver(tenure).await?;
        // A gap is no reason to leave outputs behind: who mends it may remove the row.
        self.finish(tenure).await?;
        Err(Ending::Halted(halt))
    }

    /// Delivers until there is a gap that may not be passed.
    async fn deliver(&mut self, tenure: &mut Tenure) -> Result<Halt, Ending> {
        let mut is_compared = false;
        loop {
            if let Some(halt) = self.begin(tenure, &mut is_compared).await? {
                // What the row says may not be of the log that is there.
                tenure.outbox.forget_done();
                return Ok(halt);
            }
            if !is_compared {
                // The partition is to be given up. Nor may the row be the newest, of which the group's commit alone tells.
                tenure.outbox.forget_done();
            }
            // What this tenure has taken: one before it may have taken more, and settled less.
            let mut is_settled = is_compared;
            let gap = loop {
                match self.next(tenure).await? {
                    Ok(Some(records)) => {
                        self.common.metrics().batch(records.len());
                        let mut batch = self.batch(tenure, records);
                        self.work(tenure, &mut batch).await?;
                        is_settled = batch.is_settled();
                    }
                    Ok(None) => {
                        if is_settled {
                            self.pass(tenure);
                        }
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

    /// Begins to read, and compares the row with what the log says, once. Answers why the lane can't go on, if it can't.
    async fn begin(
        &mut self,
        tenure: &mut Tenure,
        is_compared: &mut bool,
    ) -> Result<Option<Halt>, Ending> {
        let row = Row {
            // It was claimed just now.
            epoch: tenure.epoch.saturating_sub(1),
            ..tenure.row()
        };
        let begun = self.common.start(&mut self.source, row.next_offset).await;
        let (from, started) = match begun {
            Ok(begun) => begun,
            Err(halt) => return Ok(Some(halt)),
        };
        tenure.pass_to(from);
        let Some(started) = started.filter(|_| !*is_compared) else {
            return Ok(None);
        };
        if let Some(gap) = started.topic.and_then(|now| same_topic(tenure, now))
            && let Err(halt) = self.common.pass(&gap)
        {
            return Ok(Some(halt));
        }
        let verdict = compare::compare(row, started.committed.as_ref(), self.known);
        let halt = self.heed(tenure, row, verdict).await?;
        *is_compared = halt.is_none();
        Ok(halt)
    }

    /// A batch of records, with those marked that were there before.
    fn batch(&mut self, tenure: &Tenure, records: Vec<Record>) -> Batch {
        let cluster = &self.common.equipment.cluster;
        let batch = Batch::new(records, &tenure.seen, cluster, &mut self.repetitions);
        let together = Together::of(&batch.records);
        self.repetitions.looked(self.common.stage(), together);
        batch
    }

    async fn claim(&mut self) -> Result<Claim, Ending> {
        loop {
            match self.answer(self.ledger.claim(&self.id)).await {
                Ok(claim) => return Ok(claim),
                Err(error) => self.await_database(error).await?,
            }
        }
    }

    /// What the database answers, for which the lane waits.
    async fn answer<T>(&self, asked: impl Future<Output = T>) -> T {
        let wait = Wait::Answer(self.store.clone());
        self.common.status.during(wait, asked).await
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
            was_gone: false,
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
            claimed: pending.clone(),
            knows_topic: false,
            has_new_topic: false,
            has_passed: false,
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
            "{}: {row} holds an output or a dead letter for the topic {topic}, which the pipeline does not grant to this stage: \
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
            status: self.common.status.clone(),
            seed: self.common.seed(),
        }
    }

    /// The next records; tells the log meanwhile what is done.
    async fn next(
        &mut self,
        tenure: &mut Tenure,
    ) -> Result<Result<Option<Vec<Record>>, Gap>, Ending> {
        let mut idle = 0_u32;
        loop {
            self.tell_done(tenure);
            // The log may not have told it when reading began.
            if !tenure.knows_topic
                && let Some(gap) = self
                    .source
                    .topic_id()
                    .and_then(|now| same_topic(tenure, now))
            {
                return Ok(Err(gap));
            }
            let is_aloft = tenure.outbox.is_aloft();
            tokio::select! {
                biased;
                // All are cancel-safe: the flight goes on at the next call, records stay where they are, and a sleep
                // holds nothing.
                () = tenure.outbox.landed(), if is_aloft => {}
                records = self.source.next(&self.common.policy().batch) => return Ok(records),
                () = tokio::time::sleep(IDLE), if !is_aloft => {
                    idle = idle.wrapping_add(1);
                    self.pass(tenure);
                    match tenure.has_news() {
                        true => self.clear_pending(tenure).await?,
                        false if idle.is_multiple_of(LOOK_EVERY) => self.look_at_row(tenure.row()).await?,
                        false => self.row_kept(),
                    }
                }
            }
        }
    }

    /// So that nothing is produced again after a stop: waits for what is on its way and takes it out of the row.
    async fn finish(&mut self, tenure: &mut Tenure) -> Result<(), Ending> {
        tenure.outbox.landed().await;
        self.tell_done(tenure);
        if tenure.has_news() {
            self.clear_pending(tenure).await?;
        }
        Ok(())
    }

    /// Tells the log what is done, once all that came of it is in the log.
    fn tell_done(&mut self, tenure: &mut Tenure) {
        if let Some(done) = tenure.outbox.take_done() {
            self.source.done(done, tenure.mark());
        }
    }

    /// A lane that has settled all that it was given goes on behind what are no records: they may be removed before the next one
    /// comes, and its row is all that tells of them where an operator resets the group.
    fn pass(&self, tenure: &mut Tenure) {
        let passed = self.source.passed();
        if tenure.next_offset.is_some() && passed > tenure.next_offset {
            tenure.pass_to(passed);
            tenure.has_passed = true;
        }
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

/// What there is to tell where the lane's row is of another topic of this name. Else the row remembers which one it is of.
fn same_topic(tenure: &mut Tenure, now: String) -> Option<Gap> {
    tenure.knows_topic = true;
    match tenure.seen.topic() {
        Some(before) if before == now => None,
        Some(before) if tenure.next_offset.is_some() => Some(Gap::Replaced {
            expected: tenure.next_offset.unwrap_or_default(),
            before: before.to_owned(),
            now,
        }),
        _ => {
            tenure.seen.set_topic(&now);
            tenure.has_new_topic = true;
            None
        }
    }
}
