//! At least once, in the partition's order.
//!
//! Effects are durable as the stage makes them, outputs are acknowledged by the log, and only then is the offset
//! given to the source to be committed.

use std::collections::BTreeSet;
use std::mem;
use std::ops::Range;

use tokio::time::Instant;
use tracing::debug;

use super::held::Held;
use super::message::{End, Leave};
use super::{Common, Equipment, LOG_PATIENCE, MAX_HELD_BYTES, Stopped};
use crate::delivery::seen::Seen;
use crate::delivery::{Fault, Handler, Invocation};
use crate::log::{Sink, Source};
use crate::record::{Outgoing, Record};

/// One stage on one partition.
pub struct Lane<S, K, H> {
    source: S,
    common: Common<K, H>,
    /// Since the lane began: a repetition of what came before it is delivered again.
    seen: Seen,
}

/// A batch on its way through the lane.
struct Batch {
    records: Vec<Record>,
    /// Behind all that was taken, what was dropped included.
    next_offset: Option<i64>,
    /// Records below this index are handled, and their outputs held.
    handled: usize,
    /// Records below this index are settled.
    settled: usize,
    /// Each output with the records of the call that it came of: in a batch call nobody can tell which.
    held: Held<Range<usize>>,
    /// Indices of the records that have a dead letter, held or sent.
    given_up: BTreeSet<usize>,
    since: Instant,
}

impl<S: Source, K: Sink, H: Handler<()>> Lane<S, K, H> {
    /// A lane that has not begun. Its waits are jittered by `seed`.
    pub fn new(source: S, equipment: Equipment<K, H>, seed: u64) -> Self {
        let common = Common::new(equipment, &source, seed);
        Self {
            source,
            common,
            seen: Seen::default(),
        }
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
                        let batch = self.take(records);
                        self.process(batch).await?;
                    }
                    Ok(None) => return Ok(()),
                    Err(gap) => break gap,
                }
            };
            from = Some(self.common.pass(&gap).map_err(Leave::Halted)?);
        }
    }

    /// A batch without what was in the lane before.
    fn take(&mut self, mut records: Vec<Record>) -> Batch {
        let next_offset = records.last().map(|record| record.offset + 1);
        records.retain(|record| {
            let is_new = !self.seen.admit(record);
            if !is_new {
                self.common.metrics().messages("duplicate", 1);
            }
            is_new
        });
        Batch::new(records, next_offset)
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
                || batch.held.bytes() >= MAX_HELD_BYTES
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
    async fn redeliver(&mut self, batch: &mut Batch, fault: Fault) -> Result<(), Leave> {
        let at = batch.handled;
        if self.common.holds_up(&fault) {
            self.settle(batch).await?;
            if batch.given_up.contains(&at) {
                return Ok(());
            }
        }
        match self.common.deliver_again(&batch.records[at], fault).await? {
            End::Done(outputs) => {
                batch.hold(at..at + 1, outputs);
                self.common.metrics().messages("done", 1);
            }
            End::GivenUp { attempts, fault } => self.give_up(batch, at, attempts, &fault),
        }
        Ok(())
    }

    fn give_up(&self, batch: &mut Batch, index: usize, attempts: u32, fault: &Fault) {
        let letter = self.common.give_up(&batch.records[index], attempts, fault);
        batch.given_up.insert(index);
        batch.held.hold(index..index + 1, letter);
    }

    async fn invoke(&self, records: &[Record], attempt: u32) -> Invocation {
        let records: Vec<_> = records.iter().collect();
        self.common.invoke(&records, attempt, &()).await
    }

    /// Makes what is handled durable, and only then lets its offset be committed.
    async fn settle(&mut self, batch: &mut Batch) -> Result<(), Stopped> {
        let mut attempt = 1;
        while !batch.held.is_empty() {
            let sent = mem::take(&mut batch.held)
                .send(&*self.common.equipment.sink)
                .await;
            batch.held = sent.again;
            let is_away = !batch.held.is_empty();
            for (call, fault) in sent.refused {
                self.give_up_call(batch, call, &fault);
            }
            if is_away {
                let wait = self.common.backoff(&LOG_PATIENCE, attempt);
                attempt = attempt.saturating_add(1);
                self.common.wait(wait).await?;
            }
        }
        let settled = &batch.records[batch.settled..batch.handled];
        self.common.measure(settled.iter());
        batch.settled = batch.handled;
        if let Some(next_offset) = batch.settled_below() {
            self.source.done(next_offset);
        }
        batch.since = Instant::now();
        Ok(())
    }

    /// The log refused an output of the call, and nobody can tell whose it was.
    fn give_up_call(&self, batch: &mut Batch, call: Range<usize>, fault: &Fault) {
        for index in call {
            if !batch.given_up.contains(&index) {
                self.give_up(batch, index, 1, fault);
            }
        }
    }
}

impl Batch {
    fn new(records: Vec<Record>, next_offset: Option<i64>) -> Self {
        Self {
            records,
            next_offset,
            handled: 0,
            settled: 0,
            held: Held::default(),
            given_up: BTreeSet::new(),
            since: Instant::now(),
        }
    }

    /// The offset below which all is settled, if that is anything of this batch.
    fn settled_below(&self) -> Option<i64> {
        if self.settled == self.records.len() {
            return self.next_offset;
        }
        Some(self.records[self.settled.checked_sub(1)?].offset + 1)
    }

    fn hold(&mut self, origin: Range<usize>, outputs: Vec<Outgoing>) {
        for output in outputs {
            self.held.hold(origin.clone(), output);
        }
    }
}
