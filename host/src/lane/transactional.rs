//! Exactly once: the effects of a batch, the outputs that it causes and how far the lane has got are committed
//! in one transaction of the stage's database.
//!
//! A batch is run optimistically. If something goes wrong that can't be undone by itself, the transaction is rolled
//! back and the batch is run again, carefully: with savepoints, and without calling the message again that is known
//! to fault. Outputs are produced after the commit, while the next batch runs, and the next commit waits for them.

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use tokio::time::timeout;
use tracing::{debug, error, warn};

use super::batch::{Batch, Note};
use super::outbox::{Delivery, Outbox};
use super::{Common, Equipment, Halt, LOG_PATIENCE, MAX_HELD_BYTES, Stopped};
use crate::capability::{StoreError, StoreName};
use crate::delivery::output;
use crate::delivery::progress::{
    Broken, Checkpoint, Claim, Commit, CommitError, LaneId, Ledger, Mode, Transaction,
};
use crate::delivery::retry::backoff;
use crate::delivery::seen::Seen;
use crate::delivery::{Cause, Fault, Handler};
use crate::log::{Addressed, LogError, Source};
use crate::pipeline::OnExhausted;
use crate::record::{Outgoing, Record};

/// How long a transaction is held open for the acknowledgement of what was committed before.
const LANDING_PATIENCE: Duration = Duration::from_secs(5);
/// How long a lane that another host has taken over waits for its group to say so too.
const FENCED_WAIT: Duration = Duration::from_secs(2);

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

/// How the rest of a batch is to be run.
struct Plan {
    mode: Mode,
    /// A fault that is known from a transaction that was rolled back: its message is not called again.
    known: Option<(usize, Fault)>,
    /// Messages that a call of a batch stage takes at most, up to `suspect_until`.
    run: usize,
    suspect_until: usize,
}

impl Plan {
    fn optimistic() -> Self {
        Self {
            mode: Mode::Optimistic,
            known: None,
            run: usize::MAX,
            suspect_until: 0,
        }
    }

    fn careful(known: Option<(usize, Fault)>) -> Self {
        Self {
            mode: Mode::Careful,
            known,
            ..Self::optimistic()
        }
    }
}

/// What became of a run.
enum Ran {
    /// What is handled may be committed, and then this follows.
    Good(After),
    /// Nothing of it counts: to be rolled back, and run again by this plan.
    Void(Plan),
    /// The connection broke while the message of this index was worked on.
    Lost(usize, String),
}

/// What follows a commit.
enum After {
    GoOn,
    /// The next message is delivered again after a while; its fault counts.
    Retry(Fault),
    /// The next message is delivered again once the store is there.
    Away(StoreName, Fault),
    Halt(Halt),
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

    async fn tenure(&mut self) -> Result<std::convert::Infallible, Ending> {
        let claim = self.claim().await?;
        let mut tenure = self.take_up(claim)?;
        loop {
            let from = tenure.next_offset;
            let started = self.common.start(&mut self.source, from).await;
            tenure.next_offset = started.map_err(Ending::Halted)?;
            let gap = loop {
                match self.next(&mut tenure).await {
                    Ok(Some(records)) => {
                        self.common.metrics().batch(records.len());
                        let mut batch = Batch::new(records, &tenure.seen);
                        self.work(&mut tenure, &mut batch).await?;
                    }
                    Ok(None) => {
                        self.finish(&mut tenure).await?;
                        return Err(Ending::Stopped);
                    }
                    Err(gap) => break gap,
                }
            };
            tenure.next_offset = Some(self.common.pass(&gap).map_err(Ending::Halted)?);
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
            let wait = backoff(&LOG_PATIENCE, 1, &mut self.common.rng);
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
            seed: self.common.rng.random(),
        }
    }

    /// The next records; tells the log meanwhile what is done.
    async fn next(&mut self, tenure: &mut Tenure) -> Result<Option<Vec<Record>>, crate::log::Gap> {
        loop {
            if let Some(done) = tenure.outbox.take_done() {
                self.source.done(done);
            }
            tokio::select! {
                biased;
                // Both are cancel-safe: the flight goes on at the next call, and records stay where they are.
                () = tenure.outbox.landed(), if tenure.outbox.is_aloft() => {}
                records = self.source.next(&self.common.policy().batch) => return records,
            }
        }
    }

    /// So that nothing is produced again after a stop: waits for what is on its way and takes it out of the row.
    async fn finish(&mut self, tenure: &mut Tenure) -> Result<(), Ending> {
        tenure.outbox.landed().await;
        if tenure.has_pending {
            let checkpoint = self.checkpoint(tenure, tenure.next_offset, tenure.attempts, &[])?;
            let commit = Commit {
                lane: &self.id,
                epoch: tenure.epoch,
                commits: tenure.commits + 1,
                checkpoint: &checkpoint,
            };
            if let Err(error) = self.ledger.save(commit).await {
                debug!("outputs stay in the row, and may be produced once more: {error}");
            }
        }
        if let Some(done) = tenure.outbox.take_done() {
            self.source.done(done);
        }
        Ok(())
    }

    /// Works through a batch, in as many commits as it takes. Returns before its end when the lane is to stop.
    async fn work(&mut self, tenure: &mut Tenure, batch: &mut Batch) -> Result<(), Ending> {
        let mut plan = Plan::optimistic();
        while !batch.is_settled() && !self.common.stopping.is_cancelled() {
            let mut outbox = mem::take(&mut tenure.outbox);
            let attempts = tenure.attempts;
            let turn = outbox
                .alongside(self.turn(batch, &mut plan, attempts))
                .await;
            tenure.outbox = outbox;
            let (transaction, ran) = turn?;
            plan = match ran {
                Ran::Void(next) => {
                    transaction.rollback().await;
                    batch.rewind();
                    next
                }
                Ran::Lost(at, why) => {
                    drop(transaction);
                    batch.rewind();
                    self.after_loss(at, why).await?
                }
                Ran::Good(after) => self.commit(tenure, batch, transaction, after).await?,
            };
        }
        Ok(())
    }

    /// A transaction, and what the stage did in it.
    async fn turn(
        &mut self,
        batch: &mut Batch,
        plan: &mut Plan,
        attempts: u32,
    ) -> Result<(L::Transaction, Ran), Ending> {
        let transaction = loop {
            match self.ledger.begin(plan.mode).await {
                Ok(transaction) => break transaction,
                Err(error) => self.await_database(error).await?,
            }
        };
        batch.begin();
        let ran = self.handle(&transaction, batch, plan, attempts).await;
        Ok((transaction, ran))
    }

    /// Calls the stage until the batch is through, or something else is to be done first.
    async fn handle(
        &mut self,
        transaction: &L::Transaction,
        batch: &mut Batch,
        plan: &mut Plan,
        attempts: u32,
    ) -> Ran {
        while batch.handled < batch.records.len() {
            let full = batch.since.elapsed() >= self.common.policy().batch.max_time
                || batch.held_bytes >= MAX_HELD_BYTES
                || (batch.one_by_one && batch.handled > batch.settled);
            if full || self.common.stopping.is_cancelled() {
                return Ran::Good(After::GoOn);
            }
            let at = batch.handled;
            if batch.duplicate[at] {
                batch.note(Note::Duplicate);
                batch.handled += 1;
                continue;
            }
            // Failed deliveries are counted of the first message that is not settled; others had none.
            let failed = if at == batch.settled { attempts } else { 0 };
            let known = plan.known.take_if(|(index, _)| *index == at);
            let answer = match known {
                Some((_, fault)) => Answer::Fault(fault),
                None => self.call(transaction, batch, plan, failed + 1).await,
            };
            match answer {
                Answer::Done => {}
                Answer::Fault(fault) => match self.verdict(batch, fault, failed + 1) {
                    None => {}
                    Some(after) => return Ran::Good(after),
                },
                Answer::Ran(ran) => return ran,
            }
        }
        Ran::Good(After::GoOn)
    }

    /// One call, and what its effects come to.
    async fn call(
        &mut self,
        transaction: &L::Transaction,
        batch: &mut Batch,
        plan: &mut Plan,
        attempt: u32,
    ) -> Answer {
        let at = batch.handled;
        let end = self.call_end(batch, plan);
        let careful = plan.mode == Mode::Careful;
        if careful && let Err(error) = transaction.savepoint().await {
            return Answer::Ran(Ran::Lost(at, error.to_string()));
        }
        let before = transaction.statements();
        let records: Vec<_> = (at..end).filter(|i| !batch.duplicate[*i]).collect();
        let invocation = {
            let records: Vec<_> = records.iter().map(|i| &batch.records[*i]).collect();
            self.common.invoke(&records, attempt, transaction).await
        };
        match transaction.broken() {
            Some(Broken::Statement) => return Answer::Ran(Ran::Void(Plan::careful(None))),
            Some(Broken::Connection(why)) => return Answer::Ran(Ran::Lost(at, why)),
            None => {}
        }
        let outputs = match invocation.outcomes {
            Ok(outcomes) => {
                let faults: Vec<_> = records
                    .into_iter()
                    .zip(outcomes)
                    .filter_map(|(index, outcome)| Some((index, outcome.err()?)))
                    .collect();
                self.judge(batch, at..end, faults, invocation.outputs).await
            }
            Err(fault) => Err(Undo {
                index: at,
                fault,
                whole: end - at > 1,
                worn: invocation.worn,
            }),
        };
        let undo = match outputs {
            Ok(()) => return Answer::Done,
            Err(undo) => undo,
        };
        let wrote = transaction.statements() > before;
        if wrote && !careful {
            let known = (!undo.whole && !undo.worn).then_some((undo.index, undo.fault));
            return Answer::Ran(Ran::Void(Plan::careful(known)));
        }
        if wrote && let Err(error) = transaction.rollback_to_savepoint().await {
            return Answer::Ran(Ran::Lost(at, error.to_string()));
        }
        self.undone(plan, undo, at..end)
    }

    /// What follows a call whose effects are undone, or that had none.
    fn undone(&self, plan: &mut Plan, undo: Undo, call: std::ops::Range<usize>) -> Answer {
        let Undo {
            index,
            fault,
            whole,
            worn,
        } = undo;
        if whole {
            debug!(
                messages = call.len(),
                "a batch call failed and is halved: {}", fault.message
            );
            plan.suspect_until = plan.suspect_until.max(call.end);
            plan.run = call.len().div_ceil(2);
            return Answer::Done;
        }
        if worn {
            debug!("once more on another instance: {}", fault.message);
            return Answer::Done;
        }
        if index > call.start {
            plan.known = Some((index, fault));
            return Answer::Done;
        }
        Answer::Fault(fault)
    }

    /// Where a call ends that begins at `batch.handled`.
    fn call_end(&self, batch: &Batch, plan: &mut Plan) -> usize {
        let at = batch.handled;
        if !self.common.equipment.handler.takes_batches() || batch.one_by_one {
            return at + 1;
        }
        if at >= plan.suspect_until {
            plan.run = usize::MAX;
        }
        let known = plan.known.as_ref().map_or(usize::MAX, |(index, _)| *index);
        batch
            .records
            .len()
            .min(at.saturating_add(plan.run))
            .min(known)
    }

    /// Takes in what a call that returned has answered; or says which message stands against its effects.
    async fn judge(
        &mut self,
        batch: &mut Batch,
        call: std::ops::Range<usize>,
        faults: Vec<(usize, Fault)>,
        outputs: Vec<Outgoing>,
    ) -> Result<(), Undo> {
        let single = call.len() == 1;
        // In a larger call the stage has left out what it rejects; what it wants again must wait for what is before it.
        let against = faults
            .iter()
            .find(|(_, fault)| single || fault.cause == Cause::Retry || fault.away.is_some());
        if let Some((index, fault)) = against {
            return Err(Undo::of(*index, fault.clone()));
        }
        let outputs = match self.address(outputs).await {
            Ok(outputs) => outputs,
            Err(fault) if single => return Err(Undo::of(call.start, fault)),
            Err(fault) => {
                return Err(Undo {
                    whole: true,
                    ..Undo::of(call.start, fault)
                });
            }
        };
        batch.hold(call.end - 1, outputs);
        let done = (call.clone())
            .filter(|index| !batch.duplicate[*index] && !faults.iter().any(|(i, _)| i == index))
            .count();
        batch.note(Note::Done(done));
        for (index, fault) in faults {
            self.give_up(batch, index, call.end - 1, 1, fault);
        }
        batch.handled = call.end;
        Ok(())
    }

    /// Gives each output its partition, which it keeps however often it is produced.
    async fn address(&self, mut outputs: Vec<Outgoing>) -> Result<Vec<Outgoing>, Fault> {
        for output in &mut outputs {
            output.partition = Some(self.partition_of(output).await?);
        }
        Ok(outputs)
    }

    async fn partition_of(&self, output: &Outgoing) -> Result<i32, Fault> {
        match self.common.equipment.sink.partition_of(output).await {
            Ok(partition) => Ok(partition),
            Err(error @ LogError::Unavailable(_)) => {
                Err(Fault::new(Cause::Retry, error.to_string()))
            }
            Err(error) => {
                let why = format!("the log refused a record for {}: {error}", output.topic);
                Err(Fault::new(Cause::Reject, why))
            }
        }
    }

    /// What becomes of the message at `batch.handled`, whose effects are undone, after its `attempt`th delivery.
    /// `None` where it is given up on, and the batch goes on.
    fn verdict(&mut self, batch: &mut Batch, mut fault: Fault, attempt: u32) -> Option<After> {
        let at = batch.handled;
        if let Some(store) = fault.away.take() {
            fault.cause = Cause::Retry;
            return Some(After::Away(store, fault));
        }
        let policy = self.common.policy();
        if fault.cause == Cause::Retry {
            if attempt < policy.retry.max_attempts {
                return Some(After::Retry(fault));
            }
            if policy.on_exhausted == OnExhausted::Stop {
                let halt = self.common.exhausted(&batch.records[at], attempt, &fault);
                return Some(After::Halt(halt));
            }
        }
        self.give_up(batch, at, at, attempt, fault);
        batch.handled += 1;
        None
    }

    /// The dead letter is one more output of the batch; `origin` is the last message of its call.
    fn give_up(&self, batch: &mut Batch, index: usize, origin: usize, attempts: u32, fault: Fault) {
        let letters = &self.common.policy().dead_letters;
        let letter = letters.letter(&batch.records[index], attempts, &fault);
        batch.note(Note::GivenUp {
            index,
            attempts,
            to: letter.topic.clone(),
            fault,
        });
        batch.hold(origin, vec![letter]);
    }

    /// After the connection broke in the middle of a run. Where the database had not been away, the message that was
    /// worked on may be the reason, and it counts.
    async fn after_loss(&mut self, at: usize, why: String) -> Result<Plan, Ending> {
        warn!(
            stage = self.common.stage(),
            topic = &*self.id.topic,
            partition = self.id.partition,
            "the transaction was lost, and is begun again: {why}"
        );
        if self
            .common
            .until_there::<L::Transaction>(&self.store)
            .await?
        {
            return Ok(Plan::optimistic());
        }
        let why = format!("{}: {why}", self.store);
        Ok(Plan::careful(Some((at, Fault::new(Cause::Retry, why)))))
    }

    /// Commits what is handled, has its outputs produced, and does what comes after.
    async fn commit(
        &mut self,
        tenure: &mut Tenure,
        batch: &mut Batch,
        transaction: L::Transaction,
        after: After,
    ) -> Result<Plan, Ending> {
        // At most one commit's outputs are on their way. A log that is away must not keep locks in the database.
        if timeout(LANDING_PATIENCE, tenure.outbox.landed())
            .await
            .is_err()
        {
            transaction.rollback().await;
            batch.rewind();
            self.land(tenure).await?;
            return Ok(Plan::optimistic());
        }
        if let Some(done) = tenure.outbox.take_done() {
            self.source.done(done);
        }
        let attempts = match &after {
            After::Retry(_) => {
                1 + if batch.handled == batch.settled {
                    tenure.attempts
                } else {
                    0
                }
            }
            _ if batch.handled == batch.settled => tenure.attempts,
            _ => 0,
        };
        if batch.handled == batch.settled && !matches!(after, After::Retry(_)) {
            transaction.rollback().await;
            return self.follow(tenure, batch, after).await;
        }
        let next_offset = batch.next_offset();
        let outputs = match self.outputs(tenure.generation, batch).await {
            Ok(outputs) => outputs,
            Err(fault) => {
                // A dead letter's topic can't be looked up: the log is away.
                error!("cannot produce, trying again: {}", fault.message);
                transaction.rollback().await;
                batch.rewind();
                let wait = backoff(&LOG_PATIENCE, 3, &mut self.common.rng);
                self.common.wait(wait).await?;
                return Ok(Plan::optimistic());
            }
        };
        let mut seen = tenure.seen.clone();
        batch.admit_into(&mut seen);
        mem::swap(&mut tenure.seen, &mut seen);
        let checkpoint = self.checkpoint(tenure, next_offset, attempts, &outputs)?;
        let commit = Commit {
            lane: &self.id,
            epoch: tenure.epoch,
            commits: tenure.commits + 1,
            checkpoint: &checkpoint,
        };
        let committed = match transaction.commit(commit).await {
            Ok(()) => true,
            Err(CommitError::Fenced) => return Err(Ending::Fenced),
            Err(CommitError::Unanswered(why)) => self.find_out(tenure, why).await?,
            Err(CommitError::Refused(why)) => {
                tenure.seen = seen;
                return Ok(self.refused(batch, why));
            }
        };
        if !committed {
            tenure.seen = seen;
            batch.rewind();
            return Ok(Plan::optimistic());
        }
        tenure.commits += 1;
        tenure.next_offset = next_offset;
        tenure.attempts = attempts;
        tenure.has_pending = !outputs.is_empty();
        let delivery = self.delivery();
        tenure.outbox.launch(delivery, outputs, next_offset);
        self.settled(batch);
        self.follow(tenure, batch, after).await
    }

    /// Waits for the log for as long as it takes, unless the partition is to be given up.
    async fn land(&self, tenure: &mut Tenure) -> Result<(), Ending> {
        tokio::select! {
            biased;
            // Both are cancel-safe: the flight goes on at the next call.
            () = tenure.outbox.landed() => Ok(()),
            () = self.common.stopping.cancelled() => Err(Ending::Stopped),
        }
    }

    /// The outputs of what is handled, each with its id and its partition.
    async fn outputs(&self, generation: i64, batch: &Batch) -> Result<Vec<Outgoing>, Fault> {
        let mut outputs = batch.outputs(&self.id, generation);
        for output in &mut outputs {
            if output.partition.is_none() {
                output.partition = Some(self.partition_of(output).await?);
            }
        }
        Ok(outputs)
    }

    fn checkpoint(
        &self,
        tenure: &Tenure,
        next_offset: Option<i64>,
        attempts: u32,
        outputs: &[Outgoing],
    ) -> Result<Checkpoint, Ending> {
        let impossible =
            |error| Ending::Halted(Halt(format!("progress can't be encoded: {error}")));
        Ok(Checkpoint {
            next_offset,
            attempts,
            pending: output::encode(outputs).map_err(impossible)?,
            seen: output::encode_seen(&tenure.seen).map_err(impossible)?,
        })
    }

    /// Whether a commit happened whose answer was lost. The lane is claimed again for it: after that, it has happened or
    /// never will.
    async fn find_out(&mut self, tenure: &mut Tenure, why: String) -> Result<bool, Ending> {
        warn!(
            stage = self.common.stage(),
            topic = &*self.id.topic,
            partition = self.id.partition,
            "a commit was not answered, looking whether it happened: {why}"
        );
        loop {
            match self.ledger.reclaim(&self.id, tenure.epoch).await {
                Ok(Some(claim)) => {
                    tenure.epoch = claim.epoch;
                    return Ok(claim.commits > tenure.commits);
                }
                Ok(None) => return Err(Ending::Fenced),
                Err(error) => self.await_database(error).await?,
            }
        }
    }

    /// The database refused the batch only at its commit: a message at a time tells which one it is.
    fn refused(&self, batch: &mut Batch, why: String) -> Plan {
        let single = batch.handled - batch.settled == 1;
        let at = batch.settled;
        batch.rewind();
        if single {
            let why = format!("{} refused the commit: {why}", self.store);
            return Plan::careful(Some((at, Fault::new(Cause::Reject, why))));
        }
        batch.one_by_one = true;
        Plan::optimistic()
    }

    /// Counts and reports what is committed.
    fn settled(&self, batch: &mut Batch) {
        self.common.measure(batch.unsettled_handled());
        for note in batch.settle() {
            match note {
                Note::Done(messages) => self.common.metrics().messages("done", messages as u64),
                Note::Duplicate => self.common.metrics().messages("duplicate", 1),
                Note::GivenUp {
                    index,
                    attempts,
                    to,
                    fault,
                } => {
                    let record = &batch.records[index];
                    self.common.warn_of_giving_up(record, &to, attempts, &fault);
                }
            }
        }
    }

    async fn follow(
        &mut self,
        tenure: &mut Tenure,
        batch: &Batch,
        after: After,
    ) -> Result<Plan, Ending> {
        match after {
            After::GoOn => {}
            After::Halt(halt) => {
                self.finish(tenure).await?;
                return Err(Ending::Halted(halt));
            }
            After::Retry(fault) => {
                self.common.metrics().messages("retry", 1);
                self.common.metrics().retry();
                let attempts = tenure.attempts;
                let retry = self.common.policy().retry;
                let wait = backoff(&retry, attempts, &mut self.common.rng);
                if attempts == 1 {
                    let record = &batch.records[batch.settled];
                    self.common.warn_of_retry(record, wait, &fault);
                }
                self.pause(tenure, wait).await?;
            }
            After::Away(store, fault) => {
                let mut outbox = mem::take(&mut tenure.outbox);
                let waiting = self.common.until_there::<L::Transaction>(&store);
                let was_away = outbox.alongside(waiting).await;
                tenure.outbox = outbox;
                if !was_away? {
                    return Ok(Plan::careful(Some((batch.settled, fault))));
                }
            }
        }
        Ok(Plan::optimistic())
    }

    /// Waits before another delivery, while what is committed gets into the log, which is told of it. A stop ends the wait,
    /// and the batch.
    async fn pause(&mut self, tenure: &mut Tenure, wait: Duration) -> Result<(), Ending> {
        // To be stopped here is no reason to leave outputs behind: the loops end by themselves.
        let _ = tenure.outbox.alongside(self.common.wait(wait)).await;
        if let Some(done) = tenure.outbox.take_done() {
            self.source.done(done);
        }
        Ok(())
    }
}

/// What came of a call, or of a fault that was known before.
enum Answer {
    /// It is taken in, or the plan has changed.
    Done,
    /// The message at `batch.handled` has faulted, and nothing of its effects is left.
    Fault(Fault),
    /// The run is over.
    Ran(Ran),
}

/// The effects of a call that can't stay.
struct Undo {
    /// The message that stands against them.
    index: usize,
    fault: Fault,
    /// Or nobody knows which of several.
    whole: bool,
    /// Or the instance.
    worn: bool,
}

impl Undo {
    fn of(index: usize, fault: Fault) -> Self {
        Self {
            index,
            fault,
            whole: false,
            worn: false,
        }
    }
}
