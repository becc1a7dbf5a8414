//! What a transaction comes to: the commit, and what follows it.

use std::mem;
use std::ops::Range;
use std::time::Duration;

use tokio::time::timeout;
use tracing::{debug, error, warn};

use super::batch::{Batch, Note};
use super::turn::{After, Plan};
use super::{Ending, Lane, Tenure};
use crate::capability::{Action, Away};
use crate::delivery::output;
use crate::delivery::progress::{Checkpoint, Commit, CommitError, Ledger, Transaction};
use crate::delivery::{Cause, Fault, Handler};
use crate::lane::{Halt, LOG_PATIENCE};
use crate::log::{Addressed, Source};
use crate::readiness::Wait;
use crate::record::Outgoing;

/// How long a transaction is held open for the acknowledgement of what was committed before.
const LANDING_PATIENCE: Duration = Duration::from_secs(5);

impl<S, K, H, L> Lane<S, K, H, L>
where
    S: Source,
    K: Addressed + 'static,
    H: Handler<L::Transaction>,
    L: Ledger,
{
    /// After the connection broke in the middle of a run. Where the database had not been away, the message that was
    /// worked on may be the reason, and it counts.
    pub(super) async fn after_loss(
        &mut self,
        batch: &mut Batch,
        plan: &mut Plan,
        call: &Range<usize>,
        fault: Fault,
    ) -> Result<Plan, Ending> {
        let why = &fault.message;
        warn!(
            stage = self.common.stage(),
            topic = &*self.id.topic,
            partition = self.id.partition,
            "the transaction was lost, and is begun again: {why}"
        );
        let losses = if call.len() == 1 {
            batch.lose(call.start)
        } else {
            0
        };
        let silent = || Away {
            store: self.store.clone(),
            action: Action::Answer,
            why: why.clone(),
            // Who ends a connection is there.
            was_gone: false,
        };
        let away = (fault.away.as_deref().cloned()).unwrap_or_else(silent);
        let waiting = self.common.until_there::<L::Transaction>(&away, losses);
        if waiting.await? {
            return Ok(Plan::optimistic());
        }
        if call.len() == 1 && call.start > batch.settled && !batch.one_by_one {
            // What the database ends for its time, say, may have been the doing of those before.
            batch.one_by_one = true;
            return Ok(plan.again(None));
        }
        let why = format!("{}: {why}", self.store);
        Ok(plan.after_loss(call, Fault::new(fault.cause, why)))
    }

    /// Commits what is handled, has its outputs produced, and does what comes after. The same messages are run again by
    /// the same plan if that fails: what was known of them still is.
    pub(super) async fn commit(
        &mut self,
        tenure: &mut Tenure,
        batch: &mut Batch,
        plan: Plan,
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
            return Ok(plan);
        }
        self.tell_done(tenure);
        let attempts = match &after {
            After::Retry(_) if batch.handled == batch.settled => {
                tenure.failed(batch).saturating_add(1)
            }
            After::Retry(_) => 1,
            After::GoOn | After::Away(..) | After::Halt(_) => 0,
        };
        if batch.handled == batch.settled && !matches!(after, After::Retry(_)) {
            transaction.rollback().await;
            return self.follow(tenure, batch, after).await;
        }
        let next_offset = batch.next_offset();
        let outputs = match self.outputs(tenure.generation, batch).await {
            Ok(outputs) => outputs,
            Err(fault) => {
                self.log_away(batch, transaction, &fault.message).await?;
                return Ok(plan);
            }
        };
        let mut seen = tenure.seen.clone();
        batch.admit_into(&mut seen, &self.common.equipment.cluster);
        mem::swap(&mut tenure.seen, &mut seen);
        let checkpoint = self.checkpoint(tenure, next_offset, attempts, &outputs)?;
        let commit = Commit {
            lane: &self.id,
            epoch: tenure.epoch,
            generation: tenure.generation,
            commits: tenure.commits.saturating_add(1),
            checkpoint: &checkpoint,
        };
        let mut lost = String::new();
        let committed = match self.answer(transaction.commit(commit)).await {
            Ok(()) => true,
            Err(CommitError::Fenced) => return Err(Ending::Fenced),
            Err(CommitError::Unanswered(why)) => {
                lost = format!("{}: {why}", self.store);
                self.find_out(tenure, why).await?
            }
            Err(CommitError::Refused(why)) => {
                tenure.seen = seen;
                let why = format!("{} refused the commit: {why}", self.store);
                return Ok(Self::refused(batch, Fault::new(Cause::Reject, why)));
            }
            Err(CommitError::TooLong(why)) => {
                let why = format!("{}: {why}", self.store);
                // The server may have ended the session when the commit was done.
                let is_done = self.find_out(tenure, why.clone()).await?;
                if !is_done {
                    tenure.seen = seen;
                    return Ok(Self::refused(batch, Fault::new(Cause::Slow, why)));
                }
                is_done
            }
        };
        if !committed {
            tenure.seen = seen;
            batch.rewind();
            self.trouble(&LOG_PATIENCE, &lost).await?;
            return Ok(plan);
        }
        self.row_kept();
        tenure.commits = tenure.commits.saturating_add(1);
        tenure.next_offset = next_offset;
        tenure.attempts = attempts;
        tenure.has_pending = !outputs.is_empty();
        tenure.has_new_topic = false;
        tenure.has_passed = false;
        self.caught_up(next_offset);
        let delivery = self.delivery();
        tenure.outbox.launch(delivery, outputs, next_offset);
        self.settled(batch);
        self.follow(tenure, batch, after).await
    }

    /// Takes outputs out of the row that the log has.
    pub(super) async fn clear_pending(&mut self, tenure: &mut Tenure) -> Result<(), Ending> {
        self.write_row(tenure, &[]).await.map(drop)
    }

    /// Writes the row without effects, with these outputs in it; answers whether it is written.
    pub(super) async fn write_row(
        &mut self,
        tenure: &mut Tenure,
        outputs: &[Outgoing],
    ) -> Result<bool, Ending> {
        let checkpoint = self.checkpoint(tenure, tenure.next_offset, tenure.attempts, outputs)?;
        let commit = Commit {
            lane: &self.id,
            epoch: tenure.epoch,
            generation: tenure.generation,
            commits: tenure.commits.saturating_add(1),
            checkpoint: &checkpoint,
        };
        let written = match self.answer(self.ledger.save(commit)).await {
            Ok(()) => true,
            Err(CommitError::Fenced) => return Err(Ending::Fenced),
            Err(CommitError::Unanswered(why) | CommitError::TooLong(why)) => {
                self.find_out(tenure, why).await?
            }
            Err(CommitError::Refused(why)) => {
                debug!("outputs stay in the row, and may be produced once more: {why}");
                return Ok(false);
            }
        };
        if written {
            self.row_kept();
            tenure.commits = tenure.commits.saturating_add(1);
            tenure.has_pending = !outputs.is_empty();
            tenure.has_new_topic = false;
            tenure.has_passed = false;
            self.caught_up(tenure.next_offset);
        }
        Ok(written)
    }

    /// Where outputs or dead letters belong can't be looked up. Nothing of the transaction counts, and no lock is to be held.
    pub(super) async fn log_away(
        &mut self,
        batch: &mut Batch,
        transaction: L::Transaction,
        why: &str,
    ) -> Result<(), Ending> {
        error!("cannot produce, trying again: {why}");
        let wait = Wait::Place {
            why: why.to_owned(),
        };
        match &self.unaddressed {
            Some(waiting) => waiting.is_for(wait),
            None => self.unaddressed = Some(self.common.status.begin(wait)),
        }
        transaction.rollback().await;
        batch.rewind();
        let wait = self.common.backoff(&LOG_PATIENCE, 3);
        Ok(self.common.wait(wait).await?)
    }

    /// Waits for the log for as long as it takes, unless the partition is to be given up.
    pub(super) async fn land(&self, tenure: &mut Tenure) -> Result<(), Ending> {
        tokio::select! {
            biased;
            // Both are cancel-safe: the flight goes on at the next call.
            () = tenure.outbox.landed() => Ok(()),
            () = self.common.stopping.cancelled() => Err(Ending::Stopped),
        }
    }

    /// The outputs of what is handled, each with its id and its partition.
    async fn outputs(&self, generation: i64, batch: &mut Batch) -> Result<Vec<Outgoing>, Fault> {
        for output in batch.unplaced() {
            output.partition = Some(self.partition_of(output).await?);
        }
        Ok(batch.take_outputs(&self.ids, generation))
    }

    pub(super) fn checkpoint(
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
    /// never will. A row that tells of neither is another one.
    async fn find_out(&mut self, tenure: &mut Tenure, why: String) -> Result<bool, Ending> {
        warn!(
            stage = self.common.stage(),
            topic = &*self.id.topic,
            partition = self.id.partition,
            "a commit was not answered, looking whether it happened: {why}"
        );
        loop {
            match self
                .answer(self.ledger.reclaim(&self.id, tenure.epoch))
                .await
            {
                Ok(Some(claim)) => {
                    tenure.epoch = claim.epoch;
                    return tenure.has_committed(&claim).ok_or(Ending::Fenced);
                }
                Ok(None) => return Err(Ending::Fenced),
                Err(error) => self.await_database(error).await?,
            }
        }
    }

    /// The database refused the batch only at its commit: a message at a time tells which one it is.
    fn refused(batch: &mut Batch, fault: Fault) -> Plan {
        let single = batch.handled - batch.settled == 1;
        let at = batch.settled;
        batch.rewind();
        if single {
            return Plan::careful(Some((at, fault)));
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
        batch: &mut Batch,
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
                let wait = self.common.backoff(&self.common.policy().retry, attempts);
                if attempts == 1 {
                    let record = &batch.records[batch.settled];
                    self.common.warn_of_retry(record, wait, &fault);
                }
                self.pause(tenure, wait).await?;
            }
            After::Away(away, mut fault) => {
                let losses = batch.lose(batch.settled);
                let mut outbox = mem::take(&mut tenure.outbox);
                let waiting = self.common.until_there::<L::Transaction>(&away, losses);
                let is_its_own = outbox.alongside(waiting).await;
                tenure.outbox = outbox;
                if !is_its_own? {
                    fault.count();
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
        let _ = tenure
            .outbox
            .alongside(self.common.wait_to_retry(wait))
            .await;
        self.tell_done(tenure);
        Ok(())
    }
}
