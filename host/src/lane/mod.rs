//! The delivery loop of one lane: one stage on one assigned partition.
//!
//! [`transactional`] commits effects and progress together; [`ordered`] and [`concurrent`] deliver at
//! least once, in the partition's order and side by side. What all share is here, what those two share in
//! [`message`] and [`held`].

pub mod concurrent;
#[cfg(test)]
mod fakes;
mod held;
mod message;
pub mod ordered;
mod repetition;
pub mod transactional;

use std::collections::BTreeSet;
use std::iter;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use crate::capability::Away;
use crate::delivery::breaker::Breaker;
use crate::delivery::dead_letter::DeadLetters;
use crate::delivery::progress::LaneId;
use crate::delivery::retry::backoff;
use crate::delivery::{Delivery, Fault, Handler, Invocation};
use crate::log::{BatchLimits, Gap, Source, Started};
use crate::metrics::StageMetrics;
use crate::pipeline::{OnExhausted, OnGap, Order, Retry};
use crate::readiness::{LaneStatus, Readiness, Wait};
use crate::record::Record;

/// Bytes of outputs that a lane holds before it has them produced.
const MAX_HELD_BYTES: usize = 16 << 20;
/// How many messages an at-least-once lane takes beyond the first that is not done: as many may be delivered again after a
/// crash.
const MAX_AHEAD: usize = 10_000;
/// A lane that has taken so many bytes of messages that are not done takes no more.
const MAX_AHEAD_BYTES: usize = 16 << 20;
/// How a lane waits for a log that does not take its outputs.
const LOG_PATIENCE: Retry = Retry {
    max_attempts: u32::MAX,
    initial: Duration::from_millis(200),
    max: Duration::from_secs(10),
};
/// How often it is said that a lane has stopped and why.
const REMIND_INTERVAL: Duration = Duration::from_secs(60);

/// What the pipeline says of a stage's delivery.
pub struct Policy {
    /// How much is taken at a time.
    pub batch: BatchLimits,
    /// What is kept in order of a partition's messages.
    pub order: Order,
    /// Messages of a partition that the stage has at one time.
    pub concurrency: usize,
    /// How often and how fast a message is tried again.
    pub retry: Retry,
    /// And then.
    pub on_exhausted: OnExhausted,
    /// Where records were removed before they were processed.
    pub on_gap: OnGap,
    /// Topics that the stage may produce to.
    pub outputs: BTreeSet<Arc<str>>,
    /// Where messages go that are given up on.
    pub dead_letters: DeadLetters,
}

impl Policy {
    /// Whether what a lane of this input sends may go there.
    fn may_send(&self, topic: &str, input: &str) -> bool {
        self.outputs.contains(topic) || *self.dead_letters.topic_for(input) == *topic
    }
}

/// What every lane of a stage has.
pub struct Equipment<K, H> {
    /// Where outputs go.
    pub sink: Arc<K>,
    /// The stage.
    pub handler: Arc<H>,
    /// What the pipeline says.
    pub policy: Arc<Policy>,
    /// For stores that are away.
    pub breaker: Arc<Breaker>,
    /// Where a lane says what it waits for.
    pub readiness: Arc<Readiness>,
    /// What is counted.
    pub metrics: StageMetrics,
    /// Which cluster the log is: ids of outputs count in it alone.
    pub cluster: Arc<str>,
}

impl<K, H> Clone for Equipment<K, H> {
    fn clone(&self) -> Self {
        Self {
            sink: self.sink.clone(),
            handler: self.handler.clone(),
            policy: self.policy.clone(),
            breaker: self.breaker.clone(),
            readiness: self.readiness.clone(),
            metrics: self.metrics.clone(),
            cluster: self.cluster.clone(),
        }
    }
}

/// The partition is given up before the batch is done; what was not settled is delivered again.
struct Stopped;

/// A lane can't go on, and somebody has to look at it.
struct Halt(String);

/// Does some work while outputs are on their way. Dropping it drops the work; `flight` only polls them where they are, so
/// it loses nothing.
async fn alongside<T>(work: impl Future<Output = T>, flight: impl Future<Output = ()>) -> T {
    let mut work = pin!(work);
    // Most calls are ready at once.
    if let Poll::Ready(outcome) = futures::poll!(work.as_mut()) {
        return outcome;
    }
    tokio::select! {
        // In one order, so that a simulation can be repeated.
        biased;
        // Both are cancel-safe: they are polled in their places.
        outcome = &mut work => return outcome,
        () = flight => {}
    }
    work.await
}

/// What the loops of all kinds of lane work with.
struct Common<K, H> {
    equipment: Equipment<K, H>,
    status: LaneStatus,
    stopping: CancellationToken,
    /// Jitters waits; seeded, so that a simulation can be repeated.
    rng: Mutex<StdRng>,
}

impl<K, H> Common<K, H> {
    fn new(equipment: Equipment<K, H>, source: &impl Source, id: LaneId, seed: u64) -> Self {
        let stage = &equipment.policy.dead_letters.stage;
        Self {
            status: (equipment.readiness.lanes()).enter(stage, id, source.unread()),
            equipment,
            stopping: source.stopping(),
            rng: Mutex::new(StdRng::seed_from_u64(seed)),
        }
    }

    /// The same, with waits that end when this is cancelled.
    fn until(&self, stopping: CancellationToken) -> Self {
        Self {
            equipment: self.equipment.clone(),
            status: self.status.clone(),
            stopping,
            rng: Mutex::new(StdRng::seed_from_u64(self.seed())),
        }
    }

    /// A seed for what jitters its waits by itself.
    fn seed(&self) -> u64 {
        self.rng
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .random()
    }

    fn backoff(&self, patience: &Retry, attempt: u32) -> Duration {
        let mut rng = self.rng.lock().unwrap_or_else(PoisonError::into_inner);
        backoff(patience, attempt, &mut *rng)
    }

    fn policy(&self) -> &Policy {
        &self.equipment.policy
    }

    fn metrics(&self) -> &StageMetrics {
        &self.equipment.metrics
    }

    /// One call. `attempt` is the first record's; the others have not been delivered before.
    async fn invoke<T>(&self, records: &[&Record], attempt: u32, transaction: &T) -> Invocation
    where
        H: Handler<T>,
    {
        let attempts = iter::once(attempt).chain(iter::repeat(1));
        let deliveries: Vec<_> = records
            .iter()
            .zip(attempts)
            .map(|(record, attempt)| Delivery { record, attempt })
            .collect();
        self.call(&deliveries, transaction).await.0
    }

    /// One call, and how long it took.
    async fn call<T>(&self, deliveries: &[Delivery<'_>], transaction: &T) -> (Invocation, Duration)
    where
        H: Handler<T>,
    {
        let since = Instant::now();
        let invocation = self.equipment.handler.call(deliveries, transaction).await;
        let took = since.elapsed();
        self.metrics().invocation(took);
        if invocation.repeated {
            self.metrics().call_repeated();
        }
        (invocation, took)
    }

    /// Waits before a message is delivered again.
    async fn wait_to_retry(&self, time: Duration) -> Result<(), Stopped> {
        self.status.during(Wait::Retry, self.wait(time)).await
    }

    async fn wait(&self, time: Duration) -> Result<(), Stopped> {
        tokio::select! {
            // In one order, so that a simulation can be repeated.
            biased;
            // Both are cancel-safe: neither holds anything.
            () = tokio::time::sleep(time) => Ok(()),
            () = self.stopping.cancelled() => Err(Stopped),
        }
    }

    /// Waits for a store that a call may have failed for, so often in a row at one message, and answers whether it was the
    /// store's own failing.
    async fn until_there<T>(&self, away: &Away, losses: u32) -> Result<bool, Stopped>
    where
        H: Handler<T>,
    {
        let Equipment {
            breaker, handler, ..
        } = &self.equipment;
        let _waiting = self.status.begin(Wait::Store(away.store.clone()));
        // In a box: it is seldom waited for, and a lane's future is as large as all that it may wait for.
        let waiting = Box::pin(breaker.until_there(away, losses, || handler.probe(away)));
        tokio::select! {
            biased;
            // Both are cancel-safe: to ask a store changes nothing.
            is_its_own = waiting => Ok(is_its_own),
            () = self.stopping.cancelled() => Err(Stopped),
        }
    }

    /// Begins to read, behind a gap if the pipeline says so. Answers where, if it is not where the group has got to; and what
    /// the log has said, unless the partition is to be given up.
    async fn start(
        &self,
        source: &mut impl Source,
        mut from: Option<i64>,
    ) -> Result<(Option<i64>, Option<Started>), Halt> {
        loop {
            let reading = Wait::Read { why: None };
            match self.status.during(reading, source.start(from)).await {
                Ok(started) => return Ok((from, started)),
                Err(gap) => from = Some(self.pass(&gap)?),
            }
        }
    }

    /// The offset behind a gap, if it may be passed.
    fn pass(&self, gap: &Gap) -> Result<i64, Halt> {
        match gap {
            Gap::Removed { expected, first } if self.policy().on_gap == OnGap::Continue => {
                error!(
                    stage = self.stage(),
                    "{gap}; going on behind them, as `on-gap` says"
                );
                self.metrics()
                    .gap(u64::try_from(first - expected).unwrap_or_default());
                Ok(*first)
            }
            Gap::Removed { first, .. } => Err(Halt(format!(
                "{gap}: write `on-gap = \"continue\"` to go on at offset {first}, and give the topic a longer \
                 `retention.ms`"
            ))),
            Gap::Recreated { .. } | Gap::Replaced { .. } => Err(Halt(format!(
                "{gap}: if it was meant, remove what the old topic's records left in the database, and the lane's \
                 row from stagehost_progress and the group's committed offsets; then start again"
            ))),
        }
    }

    fn stage(&self) -> &str {
        &self.policy().dead_letters.stage
    }

    /// Once a message: an outage shows in the log, and does not fill it.
    fn warn_of_retry(&self, record: &Record, wait: Duration, fault: &Fault) {
        warn!(
            stage = self.stage(),
            topic = &*record.topic,
            partition = record.partition,
            offset = record.offset,
            "will be delivered again in {wait:.1?}, {} times in all at most: {}",
            self.policy().retry.max_attempts,
            fault.message
        );
    }

    fn warn_of_giving_up(&self, record: &Record, to: &str, attempts: u32, fault: &Fault) {
        warn!(
            stage = self.stage(),
            topic = &*record.topic,
            partition = record.partition,
            offset = record.offset,
            cause = fault.cause.label(),
            attempts,
            "given up on, to {to}: {}",
            fault.message
        );
        self.metrics().messages("dead-letter", 1);
        self.metrics().dead_letter(fault.cause.label());
    }

    /// Why a lane stops at a message whose retries are exhausted.
    fn exhausted(&self, record: &Record, attempts: u32, fault: &Fault) -> Halt {
        Halt(format!(
            "offset {} has failed {attempts} times, and `on-exhausted = \"stop\"`: mend the cause and start the \
             host again; it failed with: {}",
            record.offset, fault.message
        ))
    }

    /// Records the time from each record's timestamp to now.
    fn measure<'a>(&self, settled: impl Iterator<Item = &'a Record>) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        for timestamp in settled.filter_map(|r| r.timestamp) {
            let then = Duration::from_millis(u64::try_from(timestamp).unwrap_or_default());
            self.metrics().end_to_end(now.saturating_sub(then));
        }
    }

    /// Holds the partition, and says why, until it is to be given up.
    async fn halted(&self, Halt(why): Halt) {
        let LaneId {
            topic, partition, ..
        } = self.status.id();
        let _waiting = self.status.begin(Wait::Stopped(why.clone()));
        loop {
            error!(
                stage = self.stage(),
                topic = &**topic,
                partition,
                "stopped: {why}"
            );
            if self.wait(REMIND_INTERVAL).await.is_err() {
                return;
            }
        }
    }
}
