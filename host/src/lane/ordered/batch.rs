//! What an ordered lane takes at a time.

use std::collections::BTreeSet;
use std::time::Duration;

use super::super::Common;
use crate::delivery::{Fault, Handler};
use crate::record::{Outgoing, Record};

/// Consecutive records of the partition.
pub(super) struct Batch {
    pub(super) records: Vec<Record>,
    /// Behind all that was taken, what was dropped included.
    pub(super) next_offset: Option<i64>,
    pub(super) bytes: usize,
    /// Records below this index are handled, and their outputs held.
    pub(super) handled: usize,
    /// Records below this index are settled.
    pub(super) settled: usize,
    /// Indices of the records that have a dead letter, held or sent.
    pub(super) given_up: BTreeSet<usize>,
    /// Time in calls since the last time that all was settled.
    pub(super) spent: Duration,
    /// How often a store was away for a whole call of several.
    pub(super) losses: u32,
}

impl Batch {
    pub(super) fn new(records: Vec<Record>, next_offset: Option<i64>) -> Self {
        Self {
            next_offset,
            bytes: records.iter().map(Record::size).sum(),
            records,
            handled: 0,
            settled: 0,
            given_up: BTreeSet::new(),
            spent: Duration::ZERO,
            losses: 0,
        }
    }

    /// The dead letter of a record.
    pub(super) fn give_up<K, H: Handler<()>>(
        &mut self,
        common: &Common<K, H>,
        index: usize,
        attempts: u32,
        fault: &Fault,
    ) -> Outgoing {
        self.given_up.insert(index);
        common.give_up(&self.records[index], attempts, fault)
    }

    /// The offset below which all is settled, if that is anything of this batch.
    pub(super) fn settled_below(&self) -> Option<i64> {
        if self.settled == self.records.len() {
            return self.next_offset;
        }
        Some(self.records[self.settled.checked_sub(1)?].offset + 1)
    }
}
