//! Outputs that an at-least-once lane holds until the log has them.

use tracing::error;

use super::transactional::warn_of;
use crate::delivery::dead_letter;
use crate::delivery::{Cause, Fault};
use crate::log::{LogError, Sink, Unsent};
use crate::record::Outgoing;

/// Outputs in their order, each with what it came of.
pub(super) struct Held<O> {
    outputs: Vec<Outgoing>,
    /// As long as `outputs`.
    origins: Vec<O>,
    bytes: usize,
}

impl<O> Default for Held<O> {
    fn default() -> Self {
        Self {
            outputs: Vec::new(),
            origins: Vec::new(),
            bytes: 0,
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

    /// Has the outputs appended, once. A dead letter has nowhere else to go: one that is refused is to be sent again,
    /// with fewer words where it was too large.
    pub(super) async fn send(self, sink: &impl Sink) -> Sent<O> {
        let mut sent = Sent {
            refused: Vec::new(),
            again: Self::default(),
        };
        if self.is_empty() {
            return sent;
        }
        let Err(mut unsent) = sink.produce(&self.outputs).await else {
            return sent;
        };
        unsent.sort_by_key(|u| u.index);
        warn_of(&unsent);
        let mut held: Vec<_> = self
            .outputs
            .into_iter()
            .zip(self.origins)
            .map(Some)
            .collect();
        for Unsent { index, error } in unsent {
            if let Some((output, origin)) = held.get_mut(index).and_then(Option::take) {
                sent.take_in(origin, output, error);
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

    fn take_in(&mut self, origin: O, mut output: Outgoing, error: LogError) {
        let topic = &output.topic;
        let is_letter = dead_letter::is_one(&output);
        match error {
            LogError::Refused(why) | LogError::TooLarge(why) if !is_letter => {
                let why = format!("the log refused a record for {topic}: {why}");
                self.refused.push((origin, Fault::new(Cause::Reject, why)));
            }
            error => {
                if !matches!(error, LogError::Unavailable(_)) {
                    error!(
                        topic = &**topic,
                        "cannot produce a dead letter, trying again: {error}"
                    );
                }
                if is_letter && matches!(error, LogError::TooLarge(_)) {
                    dead_letter::shorten(&mut output);
                }
                self.again.hold(origin, output);
            }
        }
    }
}
