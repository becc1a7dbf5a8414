//! Outputs that an at-least-once lane holds until the log has them.

use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{error, warn};

use super::transactional::warn_of;
use super::{Common, Stopped};
use crate::delivery::dead_letter;
use crate::delivery::{Cause, Fault};
use crate::log::{LogError, Sink, Unsent};
use crate::metrics::StageMetrics;
use crate::readiness::{LaneStatus, Wait, Waiting};
use crate::record::Outgoing;

/// Outputs in their order, each with what it came of.
pub(super) struct Held<O> {
    outputs: Vec<Outgoing>,
    /// As long as `outputs`.
    origins: Vec<O>,
    bytes: usize,
    /// Why the log did not take them before, and since when.
    unsent: Option<(Instant, String)>,
}

impl<O> Default for Held<O> {
    fn default() -> Self {
        Self {
            outputs: Vec::new(),
            origins: Vec::new(),
            bytes: 0,
            unsent: None,
        }
    }
}

/// What came of sending.
pub(super) struct Sent<O> {
    /// What the log refused for what it is, and would refuse again: its origin, and why.
    pub(super) refused: Vec<(O, Fault)>,
    /// What is to be sent again after a while.
    pub(super) again: Held<O>,
}

impl<O> Held<O> {
    pub(super) fn hold(&mut self, origin: O, output: Outgoing) {
        self.bytes += output.size();
        self.outputs.push(output);
        self.origins.push(origin);
    }

    /// Holds what another one held behind its own.
    pub(super) fn append(&mut self, other: &mut Self) {
        self.outputs.append(&mut other.outputs);
        self.origins.append(&mut other.origins);
        self.bytes += std::mem::take(&mut other.bytes);
        self.unsent = self.unsent.take().or(other.unsent.take());
    }

    pub(super) fn is_empty(&self) -> bool {
        self.outputs.is_empty()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn origins(&self) -> impl Iterator<Item = &O> {
        self.origins.iter()
    }

    /// Waits before what the log did not take is sent again.
    pub(super) async fn wait<K, H>(
        &self,
        common: &Common<K, H>,
        time: Duration,
    ) -> Result<(), Stopped> {
        let _waiting = self.waiting(&common.status);
        common.wait(time).await
    }

    fn waiting(&self, status: &LaneStatus) -> Waiting {
        let topic = self.outputs.first().map(|output| output.topic.clone());
        let (since, why) = match &self.unsent {
            Some((since, why)) => (*since, Some(why.clone())),
            None => (Instant::now(), None),
        };
        let topic = topic.unwrap_or_default();
        status.begin_since(since, Wait::Log { topic, why })
    }

    /// Says that the lane waits only where it does: a record of its own would cost each flight as much as a record.
    async fn produce<K: Sink, H>(&self, common: &Common<K, H>) -> Result<(), Vec<Unsent>> {
        let mut producing = pin!(common.equipment.sink.produce(&self.outputs));
        if let Poll::Ready(produced) = futures::poll!(producing.as_mut()) {
            return produced;
        }
        let _waiting = self.waiting(&common.status);
        producing.await
    }

    /// Has the outputs appended, once. A dead letter has nowhere else to go: one that is refused is to be sent again,
    /// with fewer words where it was too large.
    pub(super) async fn send<K: Sink, H>(self, common: &Common<K, H>) -> Sent<O> {
        let mut sent = Sent {
            refused: Vec::new(),
            again: Self::default(),
        };
        if self.is_empty() {
            return sent;
        }
        let Err(mut unsent) = self.produce(common).await else {
            return sent;
        };
        unsent.sort_by_key(|u| u.index);
        warn_of(&unsent);
        if let Some(first) = unsent.first() {
            let since = self.unsent.map_or_else(Instant::now, |(since, _)| since);
            sent.again.unsent = Some((since, first.error.to_string()));
        }
        let mut held: Vec<_> = self
            .outputs
            .into_iter()
            .zip(self.origins)
            .map(Some)
            .collect();
        for Unsent { index, error } in unsent {
            if let Some((output, origin)) = held.get_mut(index).and_then(Option::take) {
                sent.take_in(origin, output, error, common.metrics());
            }
        }
        sent
    }
}

impl<O> Sent<O> {
    /// Whether the log has all of it.
    pub(super) fn is_complete(&self) -> bool {
        self.refused.is_empty() && self.again.is_empty()
    }

    fn take_in(
        &mut self,
        origin: O,
        mut output: Outgoing,
        error: LogError,
        metrics: &StageMetrics,
    ) {
        let is_letter = dead_letter::is_one(&output);
        if error.is_refusal() && !is_letter {
            let why = format!("the log refused a record for {}: {error}", output.topic);
            self.refused.push((origin, Fault::new(Cause::Reject, why)));
            return;
        }
        if error.is_refusal() {
            mend(&mut output, &error, metrics);
        }
        self.again.hold(origin, output);
    }
}

/// The log has refused a dead letter, which has nowhere else to go.
pub(super) fn mend(letter: &mut Outgoing, error: &LogError, metrics: &StageMetrics) {
    let changed = dead_letter::mend(letter, error);
    let (topic, of) = (&*letter.topic, dead_letter::place(letter));
    match changed {
        Some(how) => {
            warn!(
                topic,
                of, "the log refused a dead letter, which is changed, {how}: {error}"
            );
            metrics.dead_letter_cut();
        }
        None => error!(
            topic,
            of, "cannot produce a dead letter, trying again: {error}"
        ),
    }
}
