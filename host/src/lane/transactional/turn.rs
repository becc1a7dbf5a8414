//! What the stage does in one transaction.

use std::collections::BTreeMap;
use std::mem;
use std::ops::Range;

use tracing::debug;

use super::batch::{Batch, MAX_PENDING_BYTES, Note};
use super::{Ending, Lane};
use crate::capability::Away;
use crate::delivery::progress::{Broken, Ledger, Mode, Transaction};
use crate::delivery::{Cause, Fault, Handler};
use crate::lane::Halt;
use crate::log::{Addressed, LogError, Source};
use crate::pipeline::OnExhausted;
use crate::record::Outgoing;

/// How the rest of a batch is to be run.
pub(super) struct Plan {
    pub(super) mode: Mode,
    /// Faults that are known from transactions that were rolled back: their messages are not called again.
    known: BTreeMap<usize, Fault>,
    /// Messages that a call of a batch stage takes at most, up to `suspect_until`.
    run: usize,
    suspect_until: usize,
}

impl Plan {
    pub(super) fn optimistic() -> Self {
        Self {
            mode: Mode::Optimistic,
            known: BTreeMap::new(),
            run: usize::MAX,
            suspect_until: 0,
        }
    }

    pub(super) fn careful(known: Option<(usize, Fault)>) -> Self {
        Self {
            mode: Mode::Careful,
            known: known.into_iter().collect(),
            ..Self::optimistic()
        }
    }

    /// The same messages again, carefully, with what is known of them.
    pub(super) fn again(&mut self, known: Option<(usize, Fault)>) -> Self {
        let mut all = mem::take(&mut self.known);
        all.extend(known);
        Self {
            known: all,
            ..Self::careful(None)
        }
    }

    /// The same after others were in the way.
    fn exclusive(&mut self) -> Self {
        Self {
            mode: Mode::Exclusive,
            ..self.again(None)
        }
    }

    /// The same after the connection broke in a call, which may be a reason for it: a message that was called alone is
    /// at fault, and a larger call is halved.
    pub(super) fn after_loss(&mut self, call: &Range<usize>, fault: Fault) -> Self {
        if call.len() == 1 {
            return self.again(Some((call.start, fault)));
        }
        Self {
            run: call.len().div_ceil(2),
            suspect_until: self.suspect_until.max(call.end),
            ..self.again(None)
        }
    }
}

/// What became of a run.
pub(super) enum Ran {
    /// What is handled may be committed, and then this follows.
    Good(After),
    /// Nothing of it counts: to be rolled back, and run again by this plan.
    Void(Plan),
    /// The connection broke while the messages of these indices were worked on.
    Lost(Range<usize>, Fault),
    /// The log can't say where outputs belong.
    LogAway(String),
}

/// What follows a commit.
pub(super) enum After {
    GoOn,
    /// The next message is delivered again after a while; its fault counts.
    Retry(Fault),
    /// The next message is delivered again once the store is there.
    Away(Box<Away>, Fault),
    Halt(Halt),
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
    /// Or the log, which can't say where its outputs belong.
    log_away: bool,
}

impl Undo {
    fn of(index: usize, fault: Fault) -> Self {
        Self {
            index,
            fault,
            whole: false,
            worn: false,
            log_away: false,
        }
    }
}

impl<S, K, H, L> Lane<S, K, H, L>
where
    S: Source,
    K: Addressed + 'static,
    H: Handler<L::Transaction>,
    L: Ledger,
{
    /// A transaction, and what the stage did in it.
    pub(super) async fn turn(
        &mut self,
        batch: &mut Batch,
        plan: &mut Plan,
        attempts: u32,
    ) -> Result<(L::Transaction, Ran), Ending> {
        let transaction = loop {
            match self.answer(self.ledger.begin(plan.mode)).await {
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
            // A call that takes longer than a batch may is no reason to end it with nothing.
            let full = batch.handled > batch.settled
                && (batch.one_by_one
                    || batch.since.elapsed() >= self.common.policy().batch.max_time
                    || batch.held_bytes >= MAX_PENDING_BYTES);
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
            // What a row says may be any number.
            let attempt = failed.saturating_add(1);
            let answer = match plan.known.get(&at) {
                Some(fault) => Answer::Fault(fault.clone()),
                None => self.call(transaction, batch, plan, attempt).await,
            };
            match answer {
                Answer::Done => {}
                Answer::Fault(fault) => {
                    // Should the transaction be lost, the message needn't be called again.
                    plan.known.insert(at, fault.clone());
                    if let Some(after) = self.verdict(batch, fault, attempt) {
                        return Ran::Good(after);
                    }
                }
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
        let records: Vec<_> = (at..end).filter(|i| !batch.duplicate[*i]).collect();
        // A message that is called alone is alone, whatever duplicates are behind it.
        let end = if records.len() == 1 { at + 1 } else { end };
        let careful = plan.mode != Mode::Optimistic;
        if careful && let Err(error) = transaction.savepoint().await {
            return Answer::Ran(Ran::Lost(at..end, lost(error)));
        }
        let before = transaction.statements();
        let invocation = {
            let records: Vec<_> = records.iter().map(|i| &batch.records[*i]).collect();
            self.common.invoke(&records, attempt, transaction).await
        };
        match transaction.broken() {
            Some(Broken::Statement) => return Answer::Ran(Ran::Void(plan.again(None))),
            Some(Broken::Contended) => return Answer::Ran(Ran::Void(plan.exclusive())),
            Some(Broken::Connection(why)) => {
                let fault = match invocation.outcomes {
                    Err(fault) if fault.cause == Cause::Slow => out_of_time(why, fault),
                    Err(fault) => Fault {
                        away: fault.away,
                        ..lost(why)
                    },
                    Ok(_) => lost(why),
                };
                return Answer::Ran(Ran::Lost(at..end, fault));
            }
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
                whole: end - at > 1,
                worn: invocation.worn,
                ..Undo::of(at, fault)
            }),
        };
        let undo = match outputs {
            Ok(()) => return Answer::Done,
            Err(undo) if undo.log_away => {
                return Answer::Ran(Ran::LogAway(undo.fault.message));
            }
            Err(undo) => undo,
        };
        let wrote = transaction.statements() > before;
        if wrote && !careful {
            let known = (!undo.whole && !undo.worn).then_some((undo.index, undo.fault));
            return Answer::Ran(Ran::Void(plan.again(known)));
        }
        if wrote && let Err(error) = transaction.rollback_to_savepoint().await {
            return Answer::Ran(Ran::Lost(at..end, lost(error)));
        }
        self.undone(plan, undo, at..end)
    }

    /// What follows a call whose effects are undone, or that had none.
    fn undone(&self, plan: &mut Plan, undo: Undo, call: Range<usize>) -> Answer {
        let Undo {
            index,
            fault,
            whole,
            worn,
            ..
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
            debug!("once more on a new instance: {}", fault.message);
            return Answer::Done;
        }
        if index > call.start {
            plan.known.insert(index, fault);
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
        let known = plan.known.range(at + 1..).next();
        let known = known.map_or(usize::MAX, |(index, _)| *index);
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
        call: Range<usize>,
        faults: Vec<(usize, Fault)>,
        outputs: Vec<Outgoing>,
    ) -> Result<(), Undo> {
        let single = call.len() == 1;
        // In a larger call the stage has left out what it rejects; what it wants again must wait for what is before it.
        let against = faults
            .iter()
            .find(|(_, fault)| single || fault.cause.is_tried_again() || fault.away.is_some());
        if let Some((index, fault)) = against {
            return Err(Undo::of(*index, fault.clone()));
        }
        let outputs = match self.address(outputs).await {
            Ok(outputs) => outputs,
            Err(fault) => {
                return Err(Undo {
                    whole: !single,
                    log_away: fault.cause == Cause::Retry,
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

    /// The fault is a retry where the log is away, for which no message is to pay.
    pub(super) async fn partition_of(&self, output: &Outgoing) -> Result<i32, Fault> {
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
    fn verdict(&mut self, batch: &mut Batch, fault: Fault, attempt: u32) -> Option<After> {
        let at = batch.handled;
        if let Some(away) = fault.away.clone() {
            return Some(After::Away(away, fault));
        }
        let policy = self.common.policy();
        if fault.cause.is_tried_again() {
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
}

/// The statement that broke off the connection was out of time; the call knows whose time that was.
fn out_of_time(why: String, fault: Fault) -> Fault {
    let message = match fault.message.contains(&why) {
        true => why,
        false => format!("{why}; {}", fault.message),
    };
    Fault { message, ..fault }
}

/// What stands against the message that was worked on, should the database be there.
fn lost(why: impl ToString) -> Fault {
    Fault::new(Cause::Retry, why.to_string())
}
