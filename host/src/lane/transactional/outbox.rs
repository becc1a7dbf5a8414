//! The outputs of a transactional lane that are committed and on their way into the log.

use std::pin::Pin;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tracing::error;

use crate::delivery::dead_letter;
use crate::delivery::retry::backoff;
use crate::delivery::{Cause, Fault};
use crate::lane::{LOG_PATIENCE, Policy};
use crate::log::{LogError, Sink, Unsent};
use crate::metrics::StageMetrics;
use crate::record::Outgoing;

/// The outputs of one commit, at most, on their way.
#[derive(Default)]
pub(super) struct Outbox {
    flight: Option<BoxFuture<'static, ()>>,
    /// All below it is done once the flight has landed.
    upto: Option<i64>,
}

impl Outbox {
    /// Has outputs produced. What was launched before must have landed.
    pub(super) fn launch<K: Sink + 'static>(
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

    /// Does some work while the flight goes on. Dropping it drops the work; the flight stays.
    pub(super) async fn alongside<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        if self.is_aloft() {
            tokio::select! {
                biased;
                // Polled in place, so nothing is lost whichever is ready.
                outcome = &mut work => return outcome,
                () = self.landed() => {}
            }
        }
        work.await
    }
}

/// How outputs are produced.
pub(super) struct Delivery<K> {
    pub(super) sink: Arc<K>,
    pub(super) policy: Arc<Policy>,
    pub(super) metrics: StageMetrics,
    pub(super) seed: u64,
}

impl<K: Sink> Delivery<K> {
    /// Produces outputs in their order, for as long as it takes. One that the log refuses for what it is becomes a dead
    /// letter: its message is committed, and nothing is to be lost.
    async fn run(self, mut outputs: Vec<Outgoing>) {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let mut attempt = 1;
        while let Err(mut unsent) = self.sink.produce(&outputs).await {
            unsent.sort_by_key(|u| u.index);
            let mut refused_all = true;
            let mut slots: Vec<_> = outputs.into_iter().map(Some).collect();
            outputs = Vec::with_capacity(unsent.len());
            for Unsent { index, error } in unsent {
                let Some(output) = slots.get_mut(index).and_then(Option::take) else {
                    continue;
                };
                let is_letter = dead_letter::is_one(&output);
                refused_all &= !is_letter && !matches!(error, LogError::Unavailable(_));
                outputs.push(self.again(output, is_letter, &error));
            }
            if !refused_all {
                tokio::time::sleep(backoff(&LOG_PATIENCE, attempt, &mut rng)).await;
                attempt = attempt.saturating_add(1);
            }
        }
    }

    /// What is produced in the place of an output that the log did not take.
    fn again(&self, mut output: Outgoing, is_letter: bool, error: &LogError) -> Outgoing {
        let topic = &*output.topic;
        match error {
            LogError::Unavailable(_) => {
                error!(topic, "cannot produce, trying again: {error}");
                output
            }
            LogError::Refused(_) | LogError::TooLarge(_) if is_letter => {
                error!(topic, "cannot produce a dead letter, trying again: {error}");
                if matches!(error, LogError::TooLarge(_)) {
                    dead_letter::shorten(&mut output);
                }
                output
            }
            LogError::Refused(why) | LogError::TooLarge(why) => {
                let why = format!("the log refused a record for {topic}: {why}");
                error!(topic, "{why}; it goes to the dead letters");
                self.metrics.dead_letter(Cause::Reject.label());
                let fault = Fault::new(Cause::Reject, why);
                self.policy.dead_letters.refused(&output, &fault)
            }
        }
    }
}
