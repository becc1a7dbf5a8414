//! A batch on its way through a transactional lane.

use std::mem;
use std::sync::Arc;

use tokio::time::Instant;

use crate::delivery::Fault;
use crate::delivery::seen::{HEADER, Ids, Place, Seen};
use crate::lane::repetition::Repetitions;
use crate::record::{Header, Outgoing, Record};

/// Bytes of outputs that a lane holds before it commits them. They are written into its row.
pub(super) const MAX_PENDING_BYTES: usize = 4 << 20;

/// Consecutive messages, and what came of those that are handled and not settled: all of it belongs to one transaction.
pub(super) struct Batch {
    pub(super) records: Vec<Record>,
    /// Which of them are outputs of another lane that were taken in before.
    pub(super) duplicate: Vec<bool>,
    /// Records below this index are handled.
    pub(super) handled: usize,
    /// Records below this index are committed.
    pub(super) settled: usize,
    /// The message that was called alone when the connection broke last, and how often in a row it was.
    pub(super) lost: (usize, u32),
    /// Each commit takes one message.
    pub(super) one_by_one: bool,
    /// Since when the transaction is open.
    pub(super) since: Instant,
    pub(super) held_bytes: usize,
    /// In the order of their origins: the index of the last record of the call that they came of.
    held: Vec<(usize, Outgoing)>,
    /// What is counted and said once it is committed.
    notes: Vec<Note>,
}

/// How the handling of messages ended.
pub(super) enum Note {
    Done(usize),
    Duplicate,
    GivenUp {
        index: usize,
        attempts: u32,
        to: Arc<str>,
        fault: Fault,
    },
}

impl Batch {
    /// `seen` is as of the last commit. What is dropped is told to `repetitions`.
    pub(super) fn new(
        records: Vec<Record>,
        seen: &Seen,
        cluster: &str,
        repetitions: &mut Repetitions,
    ) -> Self {
        let duplicate = if Seen::concerns(&records) {
            let mut seen = seen.clone();
            let admit = |record| repetitions.is_one(seen.admit(record, cluster));
            records.iter().map(admit).collect()
        } else {
            vec![false; records.len()]
        };
        Self {
            records,
            duplicate,
            handled: 0,
            settled: 0,
            lost: (0, 0),
            one_by_one: false,
            since: Instant::now(),
            held_bytes: 0,
            held: Vec::new(),
            notes: Vec::new(),
        }
    }

    pub(super) fn is_settled(&self) -> bool {
        self.settled == self.records.len()
    }

    /// The connection broke while this one was called; answers how often in a row.
    pub(super) fn lose(&mut self, index: usize) -> u32 {
        let (before, times) = self.lost;
        let times = if before == index { times + 1 } else { 1 };
        self.lost = (index, times);
        times
    }

    /// A transaction begins.
    pub(super) fn begin(&mut self) {
        self.since = Instant::now();
    }

    /// Its transaction is rolled back: back to what is committed.
    pub(super) fn rewind(&mut self) {
        self.handled = self.settled;
        self.held.clear();
        self.held_bytes = 0;
        self.notes.clear();
    }

    pub(super) fn hold(&mut self, origin: usize, outputs: Vec<Outgoing>) {
        for output in outputs {
            self.held_bytes += output.size();
            self.held.push((origin, output));
        }
    }

    pub(super) fn note(&mut self, note: Note) {
        match (self.notes.last_mut(), &note) {
            (Some(Note::Done(before)), Note::Done(more)) => *before += more,
            _ => self.notes.push(note),
        }
    }

    /// The offset to commit: behind what is handled.
    pub(super) fn next_offset(&self) -> Option<i64> {
        let offset = |index: usize| self.records.get(index).map(|record| record.offset);
        // Attempts are counted of the record at the offset, so it is that of the next one where there is one.
        offset(self.handled).or_else(|| Some(offset(self.handled.checked_sub(1)?)? + 1))
    }

    /// What is held and has no partition yet.
    pub(super) fn unplaced(&mut self) -> impl Iterator<Item = &mut Outgoing> {
        let outputs = self.held.iter_mut().map(|(_, output)| output);
        outputs.filter(|output| output.partition.is_none())
    }

    /// Takes what is held, with ids that grow as the outputs do. All have their partitions.
    pub(super) fn take_outputs(&mut self, ids: &Ids, generation: i64) -> Vec<Outgoing> {
        let mut place = Place {
            generation,
            ..Place::default()
        };
        let mut last = None;
        let with_id = |(origin, mut output): (usize, Outgoing)| {
            place.index = if last == Some(origin) {
                place.index + 1
            } else {
                0
            };
            last = Some(origin);
            place.offset = self.records[origin].offset;
            let partition = output.partition.unwrap_or_default();
            let id = ids.id(&output.topic, partition, place);
            output.headers.push(Header::new(HEADER, id));
            output
        };
        self.held_bytes = 0;
        mem::take(&mut self.held).into_iter().map(with_id).collect()
    }

    /// Remembers the outputs of other lanes that are handled.
    pub(super) fn admit_into(&self, seen: &mut Seen, cluster: &str) {
        for record in self.unsettled_handled() {
            seen.admit(record, cluster);
        }
    }

    pub(super) fn unsettled_handled(&self) -> impl Iterator<Item = &Record> {
        self.records[self.settled..self.handled].iter()
    }

    /// What is handled is committed.
    pub(super) fn settle(&mut self) -> Vec<Note> {
        self.settled = self.handled;
        self.held.clear();
        self.held_bytes = 0;
        mem::take(&mut self.notes)
    }
}
