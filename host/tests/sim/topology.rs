//! The stages of a run, the topics between them, and what each stage does with each message.

use std::sync::Arc;

use host::delivery::progress::LaneId;
use host::pipeline::{OnExhausted, Order};

use crate::world::trace::digest;

/// A mark in the value of a record that topics of outputs refuse.
const REFUSED: char = '!';

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// In transactions of the database of this number.
    Transactional(usize),
    /// At least once, into the key-value store.
    Ordered,
}

#[derive(Clone, Debug)]
pub(crate) struct Stage {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) input: Arc<str>,
    pub(crate) output: Option<Arc<str>>,
    pub(crate) letters: Arc<str>,
    /// It takes many messages in one call.
    pub(crate) batches: bool,
    /// Of a stage that delivers at least once.
    pub(crate) order: Order,
    pub(crate) max_attempts: u32,
    pub(crate) on_exhausted: OnExhausted,
    pub(crate) max_messages: usize,
    /// In milliseconds.
    pub(crate) max_time: u64,
    /// How likely each script is.
    pub(crate) mix: Mix,
}

impl Stage {
    pub(crate) fn group(&self) -> Arc<str> {
        format!("group/{}", self.name).into()
    }

    pub(crate) fn lane(&self, partition: i32) -> LaneId {
        LaneId {
            group: self.group(),
            topic: self.input.clone(),
            partition,
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Topology {
    pub(crate) seed: u64,
    pub(crate) stages: Vec<Stage>,
    /// Each topic with its number of partitions.
    pub(crate) topics: Vec<(Arc<str>, usize)>,
    pub(crate) databases: usize,
}

impl Topology {
    pub(crate) fn partitions(&self, topic: &str) -> usize {
        let found = self.topics.iter().find(|(name, _)| **name == *topic);
        found.map_or(0, |(_, partitions)| *partitions)
    }

    /// What a stage does with a message, always the same.
    pub(crate) fn script(&self, stage: usize, id: &str) -> Script {
        let spec = &self.stages[stage];
        let number = digest(self.seed, &[spec.name, id]);
        spec.mix.choose(number)
    }

    /// The ids of the outputs that a stage makes of a message that it is done with.
    pub(crate) fn outputs(&self, stage: usize, id: &str) -> Vec<String> {
        if self.stages[stage].output.is_none() {
            return Vec::new();
        }
        let number = digest(self.seed, &["outputs", self.stages[stage].name, id]);
        let count = match number % 8 {
            0 => 0,
            1 | 2 => 2,
            _ => 1,
        };
        let refused = self.script(stage, id) == Script::RefusedOutput;
        let name = |n| match (refused, n) {
            (true, 0) => format!("{id}.{n}{REFUSED}"),
            _ => format!("{id}.{n}"),
        };
        (0..count).map(name).collect()
    }

    /// Whether the log refuses a record of this value; a dead letter's topic takes everything.
    pub(crate) fn refuses(&self, topic: &str, value: &str) -> bool {
        value.ends_with(REFUSED) && self.stages.iter().all(|stage| *stage.letters != *topic)
    }
}

/// What a stage does with a message. `wrote` is whether it has written before it faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Script {
    Fine,
    Reject {
        wrote: bool,
    },
    Trap {
        wrote: bool,
    },
    /// Takes longer than a call may.
    Hangs {
        wrote: bool,
    },
    /// Wants another delivery on each attempt before this one.
    Retry {
        until: u32,
        wrote: bool,
    },
    /// A statement of its fails, and it goes on.
    CaughtFailure,
    /// The database refuses its row at the commit.
    RefusedCommit,
    /// Its statement breaks the connection.
    KillsConnection,
    /// It takes some time.
    Slow,
    /// Traps on an instance that is worn.
    Worn,
    /// The log refuses its first output.
    RefusedOutput,
    /// Needs the key-value store too.
    NeedsStore,
}

impl Script {
    /// How often its call answers that it wants another delivery, if nothing else comes between.
    pub(crate) fn retries(self, max_attempts: u32) -> u32 {
        match self {
            Self::Retry { until, .. } => (until - 1).min(max_attempts),
            Self::KillsConnection => max_attempts,
            _ => 0,
        }
    }

    /// Whether it ends with its effects, and not as a dead letter, if nothing else comes between.
    pub(crate) fn succeeds(self, max_attempts: u32) -> bool {
        match self {
            Self::Reject { .. }
            | Self::Trap { .. }
            | Self::Hangs { .. }
            | Self::RefusedCommit
            | Self::KillsConnection => false,
            Self::Retry { until, .. } => until <= max_attempts,
            Self::Fine
            | Self::CaughtFailure
            | Self::Slow
            | Self::Worn
            | Self::RefusedOutput
            | Self::NeedsStore => true,
        }
    }
}

/// How many messages of a hundred have each script; the rest is fine.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mix {
    pub(crate) rejects: u64,
    pub(crate) traps: u64,
    pub(crate) retries: u64,
    pub(crate) failures: u64,
    pub(crate) refused_commits: u64,
    pub(crate) kills: u64,
    pub(crate) slow: u64,
    pub(crate) refused_outputs: u64,
    pub(crate) needs_store: u64,
}

impl Mix {
    fn choose(&self, number: u64) -> Script {
        let wrote = (number >> 8).is_multiple_of(2);
        let variant = (number >> 16) % 6;
        let retry = Script::Retry {
            until: match variant {
                0 => u32::MAX,
                n => 1 + u32::try_from(n).unwrap_or(1),
            },
            wrote,
        };
        let trap = match variant {
            0 => Script::Hangs { wrote },
            1 => Script::Worn,
            _ => Script::Trap { wrote },
        };
        let table = [
            (self.rejects, Script::Reject { wrote }),
            (self.traps, trap),
            (self.retries, retry),
            (self.failures, Script::CaughtFailure),
            (self.refused_commits, Script::RefusedCommit),
            (self.kills, Script::KillsConnection),
            (self.slow, Script::Slow),
            (self.refused_outputs, Script::RefusedOutput),
            (self.needs_store, Script::NeedsStore),
        ];
        let mut left = (number >> 32) % 100;
        for (share, script) in table {
            if left < share {
                return script;
            }
            left -= share;
        }
        Script::Fine
    }
}
