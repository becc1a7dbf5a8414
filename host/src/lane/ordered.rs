//! At least once, in the partition's order.
//!
//! Effects are durable as the stage makes them, outputs are acknowledged by the log, and only then is the offset
//! given to the source to be committed.

use std::collections::BTreeSet;
use std::ops::Range;

use tokio::time::Instant;
use tracing::{debug, error};

use super::{Common, Equipment, Halt, LOG_PATIENCE, MAX_HELD_BYTES, Stopped};
use crate::delivery::dead_letter;
use crate::delivery::retry::backoff;
use crate::delivery::{Cause, Fault, Handler, Invocation};
use crate::log::{LogError, Sink, Source, Unsent};
use crate::pipeline::OnExhausted;
use crate::record::{Outgoing, Record};

/// One stage on one partition.
pub struct Lane<S, K, H> {
    source: S,
    common: Common<K, H>,
}

/// Why a lane leaves a batch before its end.
enum Leave {
    Stopped,
    Halted(Halt),
}

impl From<Stopped> for Leave {
    fn from(Stopped: Stopped) -> Self {
        Self::Stopped
    }
}

/// A batch on its way through the lane.
struct Batch {
    records: Vec<Record>,
    /// Records below this index are handled, and their outputs held.
    handled: usize,
    /// Records below this index are settled.
    settled: usize,
    held: Vec<Held>,
    held_bytes: usize,
    /// Indices of the records that have a dead letter, held or sent.
    given_up: BTreeSet<usize>,
    since: Instant,
}

/// An output, and the records of the call that it came from: in a batch call nobody can tell which.
struct Held {
    origin: Range<usize>,
    output: Outgoing,
    is_dead_letter: bool,
}

impl<S: Source, K: Sink, H: Handler<()>> Lane<S, K, H> {
    /// A lane that has not begun. Its waits are jittered by `seed`.
    pub fn new(source: S, equipment: Equipment<K, H>, seed: u64) -> Self {
        let common = Common::new(equipment, &source, seed);
        Self { source, common }
    }

    /// Delivers until the partition is to be given up. Dropping the future abandons the batch at
    /// hand: nothing of it that was not settled counts as done.
    pub async fn run(mut self, topic: &str, partition: i32) {
        if let Err(Leave::Halted(halt)) = self.deliver().await {
            self.common.halted(topic, partition, halt).await;
        }
    }

    async fn deliver(&mut self) -> Result<(), Leave> {
        let mut from = None;
        loop {
            let started = self.common.start(&mut self.source, from).await;
            started.map_err(Leave::Halted)?;
            let gap = loop {
                match self.source.next(&self.common.policy().batch).await {
                    Ok(Some(records)) => {
                        self.common.metrics().batch(records.len());
                        self.process(Batch::new(records)).await?;
                    }
                    Ok(None) => return Ok(()),
                    Err(gap) => break gap,
                }
            };
            from = Some(self.common.pass(&gap).map_err(Leave::Halted)?);
        }
    }

    async fn process(&mut self, mut batch: Batch) -> Result<(), Leave> {
        let whole = if self.common.equipment.handler.takes_batches() {
            batch.records.len()
        } else {
            1
        };
        // A batch call that failed as a whole is found by halving: `run` shrinks until the one
        // message at fault stands alone, and grows again behind the messages that were in that call.
        let (mut run, mut suspect_until) = (whole, 0);
        while batch.handled < batch.records.len() {
            if self.common.stopping.is_cancelled() {
                self.settle(&mut batch).await?;
                return Err(Leave::Stopped);
            }
            if batch.since.elapsed() >= self.common.policy().batch.max_time
                || batch.held_bytes >= MAX_HELD_BYTES
            {
                self.settle(&mut batch).await?;
            }
            if batch.handled >= suspect_until {
                run = whole;
            }
            let end = batch.records.len().min(batch.handled + run);
            if let Some(fault) = self.step(&mut batch, end).await? {
                debug!(
                    messages = end - batch.handled,
                    "a batch call failed and is halved: {}", fault.message
                );
                suspect_until = suspect_until.max(end);
                run = (end - batch.handled).div_ceil(2);
            }
        }
        Ok(self.settle(&mut batch).await?)
    }

    /// One call with the records from `batch.handled` up to `end`, and the policy for those that
    /// faulted. Answers a fault where a call of several messages failed as a whole.
    async fn step(&mut self, batch: &mut Batch, end: usize) -> Result<Option<Fault>, Leave> {
        let start = batch.handled;
        let invocation = self.invoke(&batch.records[start..end], 1).await;
        let outcomes = match invocation.outcomes {
            Err(fault) if end - start > 1 => return Ok(Some(fault)),
            Err(fault) => vec![Err(fault)],
            Ok(outcomes) => outcomes,
        };
        batch.hold(start..end, invocation.outputs);
        for outcome in outcomes {
            match outcome {
                // For an output of the same call that the log refused.
                _ if batch.given_up.contains(&batch.handled) => {}
                Ok(()) => self.common.metrics().messages("done", 1),
                Err(fault) => self.redeliver(batch, fault).await?,
            }
            batch.handled += 1;
        }
        Ok(None)
    }

    /// The record at `batch.handled` faulted on its first delivery: again, as often as the policy
    /// has it, and then to the dead letters. What came before is settled first: it does not wait for it.
    async fn redeliver(&mut self, batch: &mut Batch, mut fault: Fault) -> Result<(), Leave> {
        let at = batch.handled;
        let mut attempt = 1;
        loop {
            let wait = match self.again_after(batch, attempt, &mut fault).await? {
                Some(wait) => wait,
                None => break,
            };
            if batch.given_up.contains(&at) {
                return Ok(());
            }
            if let Some(wait) = wait {
                if attempt == 1 {
                    self.common.warn_of_retry(&batch.records[at], wait, &fault);
                }
                self.common.wait(wait).await?;
                attempt += 1;
            }
            let invocation = self.invoke(&batch.records[at..=at], attempt).await;
            let outcome = match invocation.outcomes {
                Ok(outcomes) => outcomes.into_iter().next().unwrap_or(Ok(())),
                Err(fault) => Err(fault),
            };
            match outcome {
                Ok(()) => {
                    batch.hold(at..at + 1, invocation.outputs);
                    self.common.metrics().messages("done", 1);
                    return Ok(());
                }
                Err(again) => fault = again,
            }
        }
        if fault.cause == Cause::Retry && self.common.policy().on_exhausted == OnExhausted::Stop {
            let halt = self.common.exhausted(&batch.records[at], attempt, &fault);
            return Err(Leave::Halted(halt));
        }
        self.give_up(batch, at, attempt, &fault);
        Ok(())
    }

    /// Whether the record at `batch.handled` is to be delivered again after its `attempt`th delivery, and after what
    /// wait: none where it was a store's fault, which was waited for and counts no attempt.
    async fn again_after(
        &mut self,
        batch: &mut Batch,
        attempt: u32,
        fault: &mut Fault,
    ) -> Result<Option<Option<std::time::Duration>>, Leave> {
        if let Some(store) = fault.away.take() {
            self.settle(batch).await?;
            if self.common.until_there::<()>(&store).await? {
                return Ok(Some(None));
            }
            fault.cause = Cause::Retry;
        }
        let policy = self.common.policy().retry;
        if fault.cause != Cause::Retry || attempt >= policy.max_attempts {
            return Ok(None);
        }
        self.common.metrics().messages("retry", 1);
        self.common.metrics().retry();
        let wait = backoff(&policy, attempt, &mut self.common.rng);
        self.settle(batch).await?;
        Ok(Some(Some(wait)))
    }

    fn give_up(&self, batch: &mut Batch, index: usize, attempts: u32, fault: &Fault) {
        let record = &batch.records[index];
        let letters = &self.common.policy().dead_letters;
        let letter = letters.letter(record, attempts, fault);
        self.common
            .warn_of_giving_up(record, &letter.topic, attempts, fault);
        batch.given_up.insert(index);
        batch.hold_one(index..index + 1, letter, true);
    }

    async fn invoke(&self, records: &[Record], attempt: u32) -> Invocation {
        let records: Vec<_> = records.iter().collect();
        self.common.invoke(&records, attempt, &()).await
    }

    /// Makes what is handled durable, and only then lets its offset be committed.
    async fn settle(&mut self, batch: &mut Batch) -> Result<(), Stopped> {
        let mut attempt = 1;
        while let Err(unsent) = self.produce(batch).await {
            let refused = self.refusals(batch, unsent);
            if refused {
                continue;
            }
            let wait = backoff(&LOG_PATIENCE, attempt, &mut self.common.rng);
            attempt = attempt.saturating_add(1);
            self.common.wait(wait).await?;
        }
        if batch.handled > batch.settled {
            let settled = &batch.records[batch.settled..batch.handled];
            self.common.measure(settled.iter());
            self.source
                .done(batch.records[batch.handled - 1].offset + 1);
            batch.settled = batch.handled;
        }
        batch.since = Instant::now();
        Ok(())
    }

    /// Produces what is held; what the log did not take stays held.
    async fn produce(&self, batch: &mut Batch) -> Result<(), Vec<LogError>> {
        if batch.held.is_empty() {
            return Ok(());
        }
        let outputs: Vec<_> = batch.held.iter().map(|h| h.output.clone()).collect();
        match self.common.equipment.sink.produce(&outputs).await {
            Ok(()) => {
                batch.release_all();
                Ok(())
            }
            Err(unsent) => Err(batch.keep_only(unsent)),
        }
    }

    /// What the log refuses, it would refuse again: the messages of the call that caused it are given up
    /// on. A dead letter has nowhere else to go, so it is kept, with fewer words, and tried again.
    /// Answers whether there is nothing to wait for.
    fn refusals(&self, batch: &mut Batch, errors: Vec<LogError>) -> bool {
        let mut all_handled = true;
        let held = std::mem::take(&mut batch.held);
        batch.held_bytes = 0;
        for (mut held, error) in held.into_iter().zip(errors) {
            match error {
                LogError::Refused(why) | LogError::TooLarge(why) if !held.is_dead_letter => {
                    let why = format!("the log refused a record for {}: {why}", held.output.topic);
                    self.give_up_call(batch, held.origin, &Fault::new(Cause::Reject, why));
                }
                error => {
                    let topic = &*held.output.topic;
                    error!(topic, "cannot produce, trying again: {error}");
                    all_handled = false;
                    if held.is_dead_letter && matches!(error, LogError::TooLarge(_)) {
                        dead_letter::shorten(&mut held.output);
                    }
                    batch.hold_one(held.origin, held.output, held.is_dead_letter);
                }
            }
        }
        all_handled
    }

    fn give_up_call(&self, batch: &mut Batch, call: Range<usize>, fault: &Fault) {
        for index in call {
            if !batch.given_up.contains(&index) {
                self.give_up(batch, index, 1, fault);
            }
        }
    }
}

impl Batch {
    fn new(records: Vec<Record>) -> Self {
        Self {
            records,
            handled: 0,
            settled: 0,
            held: Vec::new(),
            held_bytes: 0,
            given_up: BTreeSet::new(),
            since: Instant::now(),
        }
    }

    fn hold(&mut self, origin: Range<usize>, outputs: Vec<Outgoing>) {
        for output in outputs {
            self.hold_one(origin.clone(), output, false);
        }
    }

    fn hold_one(&mut self, origin: Range<usize>, output: Outgoing, is_dead_letter: bool) {
        self.held_bytes += output.size();
        self.held.push(Held {
            origin,
            output,
            is_dead_letter,
        });
    }

    fn release_all(&mut self) {
        self.held.clear();
        self.held_bytes = 0;
    }

    /// Keeps the unsent, in order, and answers their errors in the same order.
    fn keep_only(&mut self, mut unsent: Vec<Unsent>) -> Vec<LogError> {
        unsent.sort_by_key(|u| u.index);
        let mut held: Vec<_> = std::mem::take(&mut self.held)
            .into_iter()
            .map(Some)
            .collect();
        let mut errors = Vec::with_capacity(unsent.len());
        self.held_bytes = 0;
        for Unsent { index, error } in unsent {
            if let Some(held) = held.get_mut(index).and_then(Option::take) {
                self.held_bytes += held.output.size();
                self.held.push(held);
                errors.push(error);
            }
        }
        errors
    }
}
