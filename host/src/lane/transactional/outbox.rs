//! The outputs of a transactional lane that are committed and on their way into the log.

use std::collections::BTreeMap;
use std::mem;
use std::pin::Pin;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tracing::{debug, error, warn};

use crate::delivery::dead_letter;
use crate::delivery::retry::backoff;
use crate::delivery::seen::HEADER;
use crate::delivery::{Cause, Fault};
use crate::lane::held::mend;
use crate::lane::{LOG_PATIENCE, Policy, alongside};
use crate::log::{Addressed, LogError, Unsent};
use crate::metrics::StageMetrics;
use crate::readiness::{LaneStatus, Wait};
use crate::record::{Header, Outgoing};

/// The outputs of one commit, at most, on their way.
#[derive(Default)]
pub(super) struct Outbox {
    flight: Option<BoxFuture<'static, ()>>,
    /// All below it is done once the flight has landed.
    upto: Option<i64>,
}

impl Outbox {
    /// Has outputs produced. What was launched before must have landed.
    pub(super) fn launch<K: Addressed + 'static>(
        &mut self,
        delivery: Delivery<K>,
        outputs: Vec<Outgoing>,
        upto: Option<i64>,
    ) {
        debug_assert!(self.flight.is_none(), "one flight at a time");
        self.upto = upto.or(self.upto);
        if !outputs.is_empty() {
            self.flight = Some(delivery.run(outputs).boxed());
        }
    }

    pub(super) fn is_aloft(&self) -> bool {
        self.flight.is_some()
    }

    /// Returns once all that was launched is in the log. Cancel-safe: the flight goes on at the next call.
    pub(super) async fn landed(&mut self) {
        if let Some(flight) = &mut self.flight {
            Pin::new(flight).await;
            self.flight = None;
        }
    }

    /// The offset below which all is done, once the flight has landed; each once.
    pub(super) fn take_done(&mut self) -> Option<i64> {
        if self.is_aloft() {
            return None;
        }
        self.upto.take()
    }

    /// What is done is not to be told: it may not be of this log.
    pub(super) fn forget_done(&mut self) {
        self.upto = None;
    }

    /// Does some work while the flight goes on. Dropping it drops the work; the flight stays.
    pub(super) async fn alongside<T>(&mut self, work: impl Future<Output = T>) -> T {
        alongside(work, self.landed()).await
    }
}

/// How outputs are produced.
pub(super) struct Delivery<K> {
    pub(super) sink: Arc<K>,
    pub(super) policy: Arc<Policy>,
    pub(super) metrics: StageMetrics,
    pub(super) status: LaneStatus,
    pub(super) seed: u64,
}

impl<K: Addressed> Delivery<K> {
    /// Produces outputs in their order, for as long as it takes. One that the log refuses for what it is becomes a dead
    /// letter: its message is committed, and nothing is to be lost.
    async fn run(self, outputs: Vec<Outgoing>) {
        let mut rng = StdRng::seed_from_u64(self.seed);
        // Which output is refused first depends on the log, but not the order of their letters: whoever reads them
        // drops one that comes after a later one.
        let letters = self.produce(outputs, &mut rng).await;
        self.produce(letters, &mut rng).await;
    }

    /// Produces all that the log takes, and answers the dead letters of the rest, in their order.
    async fn produce(&self, mut outputs: Vec<Outgoing>, rng: &mut StdRng) -> Vec<Outgoing> {
        let mut letters = BTreeMap::new();
        let mut numbers: Vec<usize> = (0..outputs.len()).collect();
        let Some(first) = outputs.first() else {
            return Vec::new();
        };
        let waiting = self.status.begin(waits_for(first, None));
        let mut attempt = 1;
        while !outputs.is_empty()
            && let Err(mut unsent) = self.sink.produce(&outputs).await
        {
            unsent.sort_by_key(|u| u.index);
            warn_of(&unsent);
            if let Some(Unsent { index, error }) = unsent.first() {
                waiting.is_for(waits_for(&outputs[*index], Some(error)));
            }
            let sent = mem::take(&mut outputs)
                .into_iter()
                .zip(mem::take(&mut numbers));
            let mut slots: Vec<_> = sent.map(Some).collect();
            for Unsent { index, error } in unsent {
                let Some((output, number)) = slots.get_mut(index).and_then(Option::take) else {
                    continue;
                };
                match self.again(output, &error, rng).await {
                    Again::Same(output) => {
                        outputs.push(output);
                        numbers.push(number);
                    }
                    Again::Letter(letter) => {
                        letters.insert(number, letter);
                    }
                }
            }
            if !outputs.is_empty() {
                tokio::time::sleep(backoff(&LOG_PATIENCE, attempt, rng)).await;
                attempt = attempt.saturating_add(1);
            }
        }
        letters.into_values().collect()
    }

    async fn again(&self, mut output: Outgoing, error: &LogError, rng: &mut StdRng) -> Again {
        let topic = &*output.topic;
        match error {
            LogError::Unavailable(_) => {
                // One says it for all that were sent with it.
                debug!(topic, "cannot produce, trying again: {error}");
                Again::Same(output)
            }
            error if dead_letter::is_one(&output) => {
                mend(&mut output, error, &self.metrics);
                Again::Same(output)
            }
            error => {
                let why = format!("the log refused a record for {topic}: {error}");
                error!(topic, "{why}; it goes to the dead letters");
                self.metrics.dead_letter(Cause::Reject.label());
                let fault = Fault::new(Cause::Reject, why);
                Again::Letter(self.letter(&output, &fault, rng).await)
            }
        }
    }

    /// The dead letter of an output, which goes to the same partition, by the same id, if it is made again after a crash.
    async fn letter(&self, output: &Outgoing, fault: &Fault, rng: &mut StdRng) -> Outgoing {
        let mut letter = self.policy.dead_letters.refused(output, fault);
        let id = dead_letter::id_of_output(output);
        let by_id = || id.as_ref().map(|id| id.to_string().into_bytes());
        let place = Outgoing {
            topic: letter.topic.clone(),
            partition: None,
            timestamp: None,
            key: letter.key.clone().or_else(by_id),
            value: None,
            headers: Vec::new(),
        };
        let partition = self.partition_of(&place, rng).await;
        letter.partition = Some(partition);
        let own = id.map(|id| id.of_its_letter(&letter.topic, partition).to_string());
        // Behind the cause it is the letter's own.
        let own = own.map(|own| Header::new(HEADER, own));
        letter.headers.extend(own);
        letter
    }

    /// Where a letter belongs: the first partition of a topic that is not there yet.
    async fn partition_of(&self, letter: &Outgoing, rng: &mut StdRng) -> i32 {
        let mut attempt = 1;
        loop {
            match self.sink.partition_of(letter).await {
                Ok(partition) => return partition,
                Err(LogError::Unavailable(why)) => {
                    debug!("cannot place a dead letter, trying again: {why}");
                    tokio::time::sleep(backoff(&LOG_PATIENCE, attempt, rng)).await;
                    attempt = attempt.saturating_add(1);
                }
                Err(_) => return 0,
            }
        }
    }
}

fn waits_for(output: &Outgoing, error: Option<&LogError>) -> Wait {
    Wait::Log {
        topic: output.topic.clone(),
        why: error.map(LogError::to_string),
    }
}

/// Says that outputs wait for the log, once for all of a flight.
pub(in crate::lane) fn warn_of(unsent: &[Unsent]) {
    let away = |u: &&Unsent| matches!(u.error, LogError::Unavailable(_));
    if let Some(first) = unsent.iter().find(away) {
        let outputs = unsent.iter().filter(away).count();
        warn!(outputs, "cannot produce, trying again: {}", first.error);
    }
}

/// What is produced in the place of an output that the log did not take.
enum Again {
    Same(Outgoing),
    Letter(Outgoing),
}
