//! The delivery loop of one lane: one stage on one assigned partition, the unit of order.
//!
//! Delivery is at least once: effects are durable as the stage makes them, outputs are acknowledged
//! by the log, and only then is the offset given to the source to be committed. Transactional
//! delivery will differ in [`Lane::settle`] alone: there, effects, outputs and progress become
//! durable together.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use crate::delivery::dead_letter::{self, DeadLetters};
use crate::delivery::retry::backoff;
use crate::delivery::{Cause, Delivery, Fault, Handler, Invocation};
use crate::log::{BatchLimits, LogError, Sink, Source, Unsent};
use crate::metrics::StageMetrics;
use crate::pipeline::Retry;
use crate::record::{Outgoing, Record};

/// Bytes of outputs that a lane holds before it has them produced.
const MAX_HELD_BYTES: usize = 16 << 20;
/// How the lane waits for a log that does not take its outputs.
const LOG_PATIENCE: Retry = Retry {
    max_attempts: u32::MAX,
    initial: Duration::from_millis(200),
    max: Duration::from_secs(10),
};

/// What the pipeline says of a stage's delivery.
pub struct Policy {
    /// How much is taken at a time.
    pub batch: BatchLimits,
    /// How often and how fast a message is tried again.
    pub retry: Retry,
    /// Where messages go that are given up on.
    pub dead_letters: DeadLetters,
}

/// One stage on one partition.
pub struct Lane<S, K, H> {
    source: S,
    sink: Arc<K>,
    handler: Arc<H>,
    policy: Arc<Policy>,
    metrics: StageMetrics,
    stopping: CancellationToken,
}

/// The partition is given up before the batch is done; what was not settled is delivered again.
struct Stopped;

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

impl<S: Source, K: Sink, H: Handler> Lane<S, K, H> {
    /// A lane that has not begun.
    pub fn new(
        source: S,
        sink: Arc<K>,
        handler: Arc<H>,
        policy: Arc<Policy>,
        metrics: StageMetrics,
    ) -> Self {
        let stopping = source.stopping();
        Self {
            source,
            sink,
            handler,
            policy,
            metrics,
            stopping,
        }
    }

    /// Delivers until the partition is to be given up. Dropping the future abandons the batch at
    /// hand: nothing of it that was not settled counts as done.
    pub async fn run(mut self) {
        while let Some(records) = self.source.next(&self.policy.batch).await {
            self.metrics.batch(records.len());
            if self.process(Batch::new(records)).await.is_err() {
                break;
            }
        }
    }

    async fn process(&mut self, mut batch: Batch) -> Result<(), Stopped> {
        let whole = if self.handler.takes_batches() {
            batch.records.len()
        } else {
            1
        };
        // A batch call that failed as a whole is found by halving: `run` shrinks until the one
        // message at fault stands alone, and grows again behind the messages that were in that call.
        let (mut run, mut suspect_until) = (whole, 0);
        while batch.handled < batch.records.len() {
            if self.stopping.is_cancelled() {
                self.settle(&mut batch).await?;
                return Err(Stopped);
            }
            if batch.since.elapsed() >= self.policy.batch.max_time
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
        self.settle(&mut batch).await
    }

    /// One call with the records from `batch.handled` up to `end`, and the policy for those that
    /// faulted. Answers a fault where a call of several messages failed as a whole.
    async fn step(&mut self, batch: &mut Batch, end: usize) -> Result<Option<Fault>, Stopped> {
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
                Ok(()) => self.metrics.messages("done", 1),
                Err(fault) => self.redeliver(batch, fault).await?,
            }
            batch.handled += 1;
        }
        Ok(None)
    }

    /// The record at `batch.handled` faulted on its first delivery: again, as often as the policy
    /// has it, and then to the dead letters.
    async fn redeliver(&mut self, batch: &mut Batch, mut fault: Fault) -> Result<(), Stopped> {
        let mut attempt = 1;
        while fault.cause == Cause::Retry && attempt < self.policy.retry.max_attempts {
            self.metrics.messages("retry", 1);
            self.metrics.retry();
            let wait = backoff(&self.policy.retry, attempt, &mut rand::rng());
            if attempt == 1 {
                self.warn_of_retry(&batch.records[batch.handled], wait, &fault);
            }
            // What came before does not wait for it.
            self.settle(batch).await?;
            let at = batch.handled;
            if batch.given_up.contains(&at) {
                return Ok(());
            }
            self.wait(wait).await?;
            attempt += 1;
            let invocation = self.invoke(&batch.records[at..=at], attempt).await;
            let outcome = match invocation.outcomes {
                Ok(outcomes) => outcomes.into_iter().next().unwrap_or(Ok(())),
                Err(fault) => Err(fault),
            };
            match outcome {
                Ok(()) => {
                    batch.hold(at..at + 1, invocation.outputs);
                    self.metrics.messages("done", 1);
                    return Ok(());
                }
                Err(again) => fault = again,
            }
        }
        self.give_up(batch, batch.handled, attempt, &fault);
        Ok(())
    }

    /// Once a message: an outage shows in the log, and does not fill it.
    fn warn_of_retry(&self, record: &Record, wait: Duration, fault: &Fault) {
        warn!(
            stage = &*self.policy.dead_letters.stage,
            topic = &*record.topic,
            partition = record.partition,
            offset = record.offset,
            "will be delivered again in {wait:.1?}, {} times in all at most: {}",
            self.policy.retry.max_attempts,
            fault.message
        );
    }

    fn give_up(&self, batch: &mut Batch, index: usize, attempts: u32, fault: &Fault) {
        let record = &batch.records[index];
        let letter = self.policy.dead_letters.letter(record, attempts, fault);
        warn!(
            stage = &*self.policy.dead_letters.stage,
            topic = &*record.topic,
            partition = record.partition,
            offset = record.offset,
            cause = fault.cause.label(),
            attempts,
            "given up on, to {}: {}",
            letter.topic,
            fault.message
        );
        batch.given_up.insert(index);
        self.metrics.messages("dead-letter", 1);
        self.metrics.dead_letter(fault.cause.label());
        batch.hold_one(index..index + 1, letter, true);
    }

    async fn invoke(&self, records: &[Record], attempt: u32) -> Invocation {
        let deliveries: Vec<_> = records
            .iter()
            .map(|record| Delivery { record, attempt })
            .collect();
        let since = Instant::now();
        let invocation = self.handler.call(&deliveries).await;
        self.metrics.invocation(since.elapsed());
        invocation
    }

    /// Makes what is handled durable, and only then lets its offset be committed.
    async fn settle(&mut self, batch: &mut Batch) -> Result<(), Stopped> {
        let mut attempt = 1;
        while let Err(unsent) = self.produce(batch).await {
            let refused = self.refusals(batch, unsent);
            if refused {
                continue;
            }
            let wait = backoff(&LOG_PATIENCE, attempt, &mut rand::rng());
            attempt = attempt.saturating_add(1);
            self.wait(wait).await?;
        }
        if batch.handled > batch.settled {
            let settled = &batch.records[batch.settled..batch.handled];
            self.measure(settled);
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
        match self.sink.produce(&outputs).await {
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

    /// Records the time from each record's timestamp to now.
    fn measure(&self, settled: &[Record]) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        for timestamp in settled.iter().filter_map(|r| r.timestamp) {
            let then = Duration::from_millis(u64::try_from(timestamp).unwrap_or_default());
            self.metrics.end_to_end(now.saturating_sub(then));
        }
    }

    async fn wait(&self, time: Duration) -> Result<(), Stopped> {
        tokio::select! {
            // Both are cancel-safe: neither holds anything.
            () = tokio::time::sleep(time) => Ok(()),
            () = self.stopping.cancelled() => Err(Stopped),
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
