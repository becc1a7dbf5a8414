//! One assigned partition, as its lane reads it.

use std::sync::{Arc, Mutex};

use host::log::committed::{self, Committed, Mark, RowMark};
use host::log::{BatchLimits, Gap, Source, Started};
use host::record::Record;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::broker::{Broker, Seat};
use super::lock;
use super::process::Process;
use super::trace::Subject;

/// Records that are at hand at a time, at most.
const AT_HAND: usize = 12;
/// Of one in so many beginnings, the topic's id is not known.
const UNTOLD: i64 = 4;

/// What a process and the lane on one of its partitions share.
pub(crate) struct Slot {
    pub(crate) seat: Seat,
    /// The lane is asked to end.
    pub(crate) stopping: CancellationToken,
    /// The lane is not waited for any longer.
    pub(crate) abandoned: CancellationToken,
    settled: Mutex<Settled>,
    /// Something was settled.
    pub(crate) dirty: Notify,
    /// Cancelled when the lane has ended.
    pub(crate) ended: CancellationToken,
}

#[derive(Default)]
struct Settled {
    offset: Option<i64>,
    row: Option<RowMark>,
    /// Whether its lane keeps no row, and has delivered all below.
    at_least_once: bool,
    committed: Option<i64>,
}

impl Slot {
    pub(crate) fn new(seat: Seat) -> Arc<Self> {
        Arc::new(Self {
            seat,
            stopping: CancellationToken::new(),
            abandoned: CancellationToken::new(),
            settled: Mutex::default(),
            dirty: Notify::new(),
            ended: CancellationToken::new(),
        })
    }

    /// The settled offset, if it is not committed yet.
    pub(crate) fn uncommitted(&self) -> Option<Committed> {
        let settled = lock(&self.settled);
        let offset = settled.offset?;
        let mark = Mark {
            row: settled.row,
            at_least_once: settled.at_least_once,
            ..Mark::default()
        };
        (settled.committed != Some(offset)).then_some(Committed {
            offset,
            mark: Some(mark),
        })
    }

    pub(crate) fn committed(&self, offset: i64) {
        lock(&self.settled).committed = Some(offset);
    }

    /// A row that went back to an older copy counts: what was done beyond it is to be done again, and the log is told so.
    fn goes_back_to(&self, offset: Option<i64>) {
        let mut settled = lock(&self.settled);
        if offset.is_some() && settled.offset > offset {
            *settled = Settled::default();
        }
    }

    /// What is no record is done with all below it. A lane that has a row says so there, which is what is looked at.
    fn passes(&self, from: i64, end: i64) {
        let mut settled = lock(&self.settled);
        let is_done = settled
            .offset
            .is_some_and(|offset| (from..end).contains(&offset));
        if is_done && settled.row.is_none() {
            settled.offset = Some(end);
            self.dirty.notify_one();
        }
    }

    /// A lane that has no row begins here. It says so, and says nothing of what is below.
    fn begins_at(&self, offset: i64) {
        let mut settled = lock(&self.settled);
        if settled.offset.is_none() {
            settled.offset = Some(offset);
            self.dirty.notify_one();
        }
    }
}

pub(crate) struct PartitionSource {
    process: Process,
    broker: Arc<Broker>,
    slot: Arc<Slot>,
    topic: Arc<str>,
    position: Option<i64>,
}

impl PartitionSource {
    pub(crate) fn new(process: Process, broker: Arc<Broker>, slot: Arc<Slot>) -> Self {
        let topology = process.world().topology();
        Self {
            topic: topology.stages[slot.seat.0].input.clone(),
            process,
            broker,
            slot,
            position: None,
        }
    }

    fn partition(&self) -> i32 {
        self.slot.seat.1
    }

    /// Waits for the log; false when the partition is to be given up meanwhile.
    async fn until_up(&self) -> bool {
        tokio::select! {
            biased;
            () = self.slot.stopping.cancelled() => false,
            () = self.broker.until_up() => true,
        }
    }

    fn take(&mut self, limits: &BatchLimits) -> Result<Vec<Record>, Gap> {
        let Some(position) = self.position else {
            return Ok(Vec::new());
        };
        let (first, _) = self.broker.range(&self.topic, self.partition());
        let end = self.broker.end_of_records(&self.topic, self.partition());
        if position < first {
            return Err(Gap::Removed {
                expected: position,
                first,
            });
        }
        if position >= end || !self.broker.is_up() {
            return Ok(Vec::new());
        }
        let count = self.process.world().roll(1..=AT_HAND);
        let count = count.min(limits.max_messages);
        let records = self
            .broker
            .read(&self.topic, self.partition(), position, count);
        self.position = records.last().map(|record| record.offset + 1);
        Ok(records)
    }

    fn note(&self, what: &'static str, numbers: [i64; 2]) {
        let subject = Subject::Place(self.topic.clone(), self.partition());
        self.process.note(what, subject, numbers);
    }
}

impl Source for PartitionSource {
    async fn start(&mut self, offset: Option<i64>) -> Result<Option<Started>, Gap> {
        self.process.point("start").await;
        self.slot.goes_back_to(offset);
        if !self.until_up().await {
            return Ok(None);
        }
        self.process.world().travel().await;
        let committed = self.broker.group_commit(self.slot.seat);
        let known = committed::known(offset, committed.as_ref());
        let (first, end) = self.broker.range(&self.topic, self.partition());
        self.note("start at", [known.unwrap_or(-1), end]);
        match known {
            Some(expected) if expected < first => return Err(Gap::Removed { expected, first }),
            Some(expected) if expected > end => return Err(Gap::Recreated { expected, end }),
            known => self.position = Some(known.unwrap_or(first)),
        }
        let is_of_a_row = committed.as_ref().is_some_and(|c| c.row().is_some());
        // Where a row counts, its lane says what is done.
        if offset.is_none() && !is_of_a_row {
            self.slot.begins_at(known.unwrap_or(first));
        }
        self.process.point("started").await;
        // Of some, the log tells it only when they are read.
        let is_told = known.unwrap_or_default() % UNTOLD != 1;
        let topic = is_told.then(|| self.broker.topic_id(&self.topic));
        Ok(Some(Started { committed, topic }))
    }

    async fn next(&mut self, limits: &BatchLimits) -> Result<Option<Vec<Record>>, Gap> {
        self.process.point("next").await;
        loop {
            if self.slot.stopping.is_cancelled() {
                return Ok(None);
            }
            let broker = self.broker.clone();
            let changed = broker.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let taken = self.take(limits)?;
            if let (Some(first), Some(last)) = (taken.first(), taken.last()) {
                self.note("batch", [first.offset, last.offset]);
                return Ok(Some(taken));
            }
            if let Some((from, end)) = self.position.zip(self.passed()) {
                self.slot.passes(from, end);
            }
            tokio::select! {
                biased;
                () = self.slot.stopping.cancelled() => {}
                () = changed => {}
            }
        }
    }

    fn done(&mut self, next_offset: i64, row: Option<RowMark>) {
        // What a dead process says, nobody hears.
        if self.process.is_dead() {
            return;
        }
        self.broker
            .check_durable(self.slot.seat, next_offset, "done");
        let mut settled = lock(&self.slot.settled);
        settled.offset = settled.offset.max(Some(next_offset));
        settled.row = row;
        settled.at_least_once = row.is_none();
        drop(settled);
        self.slot.dirty.notify_one();
    }

    fn passed(&self) -> Option<i64> {
        let (_, end) = self.broker.range(&self.topic, self.partition());
        let records = self.broker.end_of_records(&self.topic, self.partition());
        // Behind what was taken, or behind what are no records where that was all.
        let behind = |at| if at >= records { end } else { at };
        self.position.map(behind)
    }

    fn topic_id(&self) -> Option<String> {
        Some(self.broker.topic_id(&self.topic))
    }

    fn stopping(&self) -> CancellationToken {
        self.slot.stopping.clone()
    }
}

impl Drop for PartitionSource {
    fn drop(&mut self) {
        self.slot.ended.cancel();
    }
}
