//! One assigned partition: a bounded buffer between the consumer's thread and the lane, and how far the lane has got.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::super::committed::{Committed, RowMark, Words};
use super::super::{BatchLimits, Gap, Source, Started, Unread};
use crate::record::Record;
use crate::sync::lock;

/// Reading has just begun for so long: what librdkafka did before it may still have its effects.
const JUST_BEGUN: Duration = Duration::from_secs(10);
/// A buffer with this many records is full.
const MAX_RECORDS: usize = 10_000;
/// A buffer with this many bytes is full. What is at hand in the lane comes on top.
const MAX_BYTES: usize = 8 << 20;
/// Says that nothing was committed yet.
const NOTHING: i64 = -1;

/// Wakes the consumer's thread.
#[derive(Default)]
pub struct Bell {
    thread: OnceLock<Thread>,
    wanted: AtomicBool,
}

impl Bell {
    /// It is this thread that is to be woken.
    pub(super) fn belongs_to_this_thread(&self) {
        // Set once, by the thread that waits.
        let _ = self.thread.set(thread::current());
    }

    /// There may be something to do.
    pub(super) fn ring(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// A lane wants to be read from elsewhere, or partitions have come or gone.
    pub(super) fn call(&self) {
        self.wanted.store(true, Ordering::Release);
        self.ring();
    }

    /// Whether it was called since last asked.
    pub(super) fn was_called(&self) -> bool {
        self.wanted.swap(false, Ordering::AcqRel)
    }
}

/// Where a partition is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Position {
    /// Nowhere yet: its lane has not said where.
    Waiting,
    /// The lane wants it read from this offset, or from where the group has got to.
    Wanted(Option<i64>),
    /// The next record has this offset, or a higher one where some were compacted away. `None` before the first
    /// where only the log knows it.
    Reading(Option<i64>),
    /// Records are missing, and the lane is to know.
    Gap(Gap),
}

/// Shared by the consumer's thread and the lane's source.
pub struct Partition {
    topic: Arc<str>,
    number: i32,
    buffer: Mutex<Buffer>,
    /// The buffer or the position has changed.
    changed: Notify,
    bell: Arc<Bell>,
    /// The lane is asked to end.
    stopping: CancellationToken,
    /// The lane is not waited for any longer.
    abandoned: CancellationToken,
    /// The topic's id as of the last time that reading began, where the log tells it.
    topic_id: Mutex<Option<String>>,
    settled: Mutex<Settled>,
    unread: Unread,
    /// The last offset given to the log to commit, or [`NOTHING`].
    committed: AtomicI64,
    ended: Mutex<bool>,
    ended_changed: Condvar,
}

/// What the lane has said that is done.
#[derive(Clone, Copy, Default)]
struct Settled {
    /// The offset below which all is settled.
    offset: Option<i64>,
    /// What its row says, if it has one.
    row: Option<RowMark>,
    /// Whether it has none, and has delivered all below.
    at_least_once: bool,
}

/// An offset to be committed, and what is written beside it.
pub(super) struct Commit {
    pub(super) offset: i64,
    pub(super) words: String,
}

struct Buffer {
    position: Position,
    records: VecDeque<Record>,
    bytes: usize,
    /// Behind the last record that the lane has taken since reading began.
    taken: Option<i64>,
    /// As of when reading began.
    committed: Option<Committed>,
    /// What was passed when the lane was asked to end.
    left: Option<i64>,
    /// When reading began.
    began: Option<Instant>,
}

impl Buffer {
    fn at(position: Position) -> Self {
        Self {
            position,
            records: VecDeque::new(),
            bytes: 0,
            taken: None,
            committed: None,
            left: None,
            began: None,
        }
    }

    /// The offset up to which no more records are to come, where the lane has taken all.
    fn passed(&self) -> Option<i64> {
        match self.position {
            Position::Reading(next) if self.records.is_empty() => next,
            _ => self.left,
        }
    }

    /// As [`Buffer::passed`], where all that the lane has taken is settled.
    fn passed_when(&self, settled: Option<i64>) -> Option<i64> {
        let all_done = self.taken.is_none_or(|taken| settled >= Some(taken));
        self.passed().filter(|_| all_done)
    }

    fn room(&self) -> usize {
        if self.bytes >= MAX_BYTES {
            return 0;
        }
        MAX_RECORDS.saturating_sub(self.records.len())
    }
}

/// What became of records that were pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// All are in.
    Taken,
    /// Those that are left are not what is to be read now.
    Unwanted,
    /// The first of those that are left is not the next one, but this is: records may be missing before it.
    Jump(i64),
}

impl Partition {
    /// One that is not read yet. `bell` wakes who reads it.
    pub fn new(topic: &str, number: i32, bell: Arc<Bell>) -> Arc<Self> {
        Arc::new(Self {
            topic: Arc::from(topic),
            number,
            buffer: Mutex::new(Buffer::at(Position::Waiting)),
            changed: Notify::new(),
            bell,
            stopping: CancellationToken::new(),
            abandoned: CancellationToken::new(),
            topic_id: Mutex::default(),
            settled: Mutex::default(),
            unread: Unread::default(),
            committed: AtomicI64::new(NOTHING),
            ended: Mutex::new(false),
            ended_changed: Condvar::new(),
        })
    }

    pub(super) fn topic(&self) -> &Arc<str> {
        &self.topic
    }

    pub(super) fn number(&self) -> i32 {
        self.number
    }

    /// Takes records in, as far as they are the ones to be read next; those that are not are left in the list.
    pub fn push(&self, records: &mut VecDeque<Record>) -> Pushed {
        let mut buffer = self.buffer();
        let mut taken = false;
        let pushed = loop {
            let Some(record) = records.front() else {
                break Pushed::Taken;
            };
            match buffer.position {
                Position::Reading(None) => {}
                Position::Reading(Some(next)) if next == record.offset => {}
                Position::Reading(Some(next)) => break Pushed::Jump(next),
                Position::Waiting | Position::Wanted(_) | Position::Gap(_) => {
                    break Pushed::Unwanted;
                }
            }
            buffer.position = Position::Reading(Some(record.offset + 1));
            buffer.bytes += record.size();
            buffer.records.extend(records.pop_front());
            taken = true;
        };
        drop(buffer);
        if taken {
            self.changed.notify_one();
        }
        pushed
    }

    /// Where the lane wants it read, if it is not read there yet.
    pub(super) fn wanted(&self) -> Option<Option<i64>> {
        match self.buffer().position {
            Position::Wanted(offset) => Some(offset),
            _ => None,
        }
    }

    /// It is read from somewhere else now, or not at all. What was read before stays.
    pub fn set_position(&self, position: Position) {
        self.buffer().position = position;
        self.changed.notify_one();
    }

    /// Reading begins as it was wanted, and this is what the group has committed.
    pub(super) fn begin(&self, wanted: Option<i64>, from: i64, committed: Option<Committed>) {
        let mut buffer = self.buffer();
        // Unless the lane has gone elsewhere, or away, meanwhile.
        if buffer.position == Position::Wanted(wanted) {
            buffer.position = Position::Reading(Some(from));
            buffer.committed = committed;
            buffer.began = Some(Instant::now());
        }
        drop(buffer);
        self.unread.set_start(None);
        self.changed.notify_one();
    }

    /// Whether reading began a moment ago.
    pub(super) fn has_just_begun(&self) -> bool {
        let began = self.buffer().began;
        began.is_some_and(|began| began.elapsed() < JUST_BEGUN)
    }

    /// The next record that is expected, where it is read.
    pub(super) fn expected(&self) -> Option<i64> {
        match self.buffer().position {
            Position::Reading(next) => next,
            _ => None,
        }
    }

    /// The topic's id, as of the last time that reading began.
    pub(super) fn topic_id(&self) -> Option<String> {
        lock(&self.topic_id).clone()
    }

    /// The log has told it again.
    pub(super) fn set_topic_id(&self, id: &str) {
        *lock(&self.topic_id) = Some(id.to_owned());
    }

    /// The id of the topic that the group's offset was committed for, as of when reading began.
    pub(super) fn committed_topic(&self) -> Option<String> {
        let buffer = self.buffer();
        Some(buffer.committed.as_ref()?.topic()?.to_owned())
    }

    /// What the group had committed when reading began.
    pub(super) fn committed_offset(&self) -> Option<i64> {
        Some(self.buffer().committed.as_ref()?.offset)
    }

    /// Where it is said why nothing comes of it.
    pub(super) fn unread(&self) -> &Unread {
        &self.unread
    }

    /// Whether its lane has nothing left to take, so that it waits for the log.
    pub(super) fn is_drained(&self) -> bool {
        let buffer = self.buffer();
        match buffer.position {
            Position::Wanted(_) => true,
            Position::Reading(_) => buffer.records.is_empty(),
            Position::Waiting | Position::Gap(_) => false,
        }
    }

    /// How many records there is room for. One more may be larger than what is left of the buffer's bytes.
    pub(super) fn room(&self) -> usize {
        self.buffer().room()
    }

    /// Asks the lane to end. Records that it has not taken are left to the partition's next owner.
    pub(super) fn stop(&self) {
        self.stopping.cancel();
        let settled = lock(&self.settled);
        let mut buffer = self.buffer();
        let left = buffer.passed_when(settled.offset);
        *buffer = Buffer::at(Position::Waiting);
        buffer.left = left;
        self.changed.notify_one();
    }

    /// As [`Partition::set_position`], where it still is what it was; answers whether it was.
    pub(super) fn replace_position(&self, before: &Position, position: Position) -> bool {
        let mut buffer = self.buffer();
        let same = buffer.position == *before;
        if same {
            buffer.position = position;
            self.changed.notify_one();
        }
        same
    }

    /// The lane's future is to be dropped.
    pub(super) fn abandon(&self) {
        self.abandoned.cancel();
    }

    /// Waits until the lane has ended; false when it has not in `time`. Blocks the thread.
    pub(super) fn wait_ended(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        while !*ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            ended = self
                .ended_changed
                .wait_timeout(ended, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// The offset below which all is settled: also behind what are no records, once all before them is.
    pub(super) fn settled(&self) -> Option<i64> {
        let mut settled = lock(&self.settled);
        let offset = settled.offset?;
        let passed = self.buffer().passed_when(Some(offset));
        // Kept, for what comes next does not take it back.
        settled.offset = passed.max(Some(offset));
        settled.offset
    }

    /// A row that went back to an older copy counts: what was done beyond it is to be done again, and the log is told so. And what
    /// is known of a row that another host has taken on since is not told of the offset that it is at now.
    fn goes_back_to(&self, offset: Option<i64>) {
        let mut settled = lock(&self.settled);
        if offset.is_some() && settled.offset != offset {
            *settled = Settled::default();
            self.commit_again();
        }
    }

    /// The settled offset, if it was not yet given to the log.
    pub(super) fn take_uncommitted(&self) -> Option<Commit> {
        let offset = self.settled()?;
        let before = self.committed.swap(offset, Ordering::AcqRel);
        if before == offset {
            return None;
        }
        let topic = lock(&self.topic_id);
        let Settled {
            row, at_least_once, ..
        } = *lock(&self.settled);
        let words = Words {
            offset,
            topic: topic.as_deref(),
            row,
            at_least_once,
        };
        let words = words.to_string();
        Some(Commit { offset, words })
    }

    /// The last commit may not have reached the log: it is to be given again.
    pub(super) fn commit_again(&self) {
        self.committed.store(NOTHING, Ordering::Release);
    }

    fn buffer(&self) -> MutexGuard<'_, Buffer> {
        lock(&self.buffer)
    }
}

/// The lane's end of a partition. Dropping it says that the lane has ended.
pub struct PartitionSource(Arc<Partition>);

impl PartitionSource {
    /// The end for a partition that has no lane yet.
    pub fn new(partition: Arc<Partition>) -> Self {
        Self(partition)
    }

    /// Cancelled when the lane is not waited for any longer: its future is to be dropped.
    pub fn abandoned(&self) -> CancellationToken {
        self.0.abandoned.clone()
    }

    /// The partition's topic.
    pub fn topic(&self) -> Arc<str> {
        self.0.topic.clone()
    }

    /// Its number, from 0.
    pub fn number(&self) -> i32 {
        self.0.number
    }

    fn take(&self, limits: &BatchLimits) -> Vec<Record> {
        let mut buffer = self.0.buffer();
        let had_room = buffer.room() > 0;
        let mut taken = Vec::with_capacity(buffer.records.len().min(limits.max_messages));
        let mut bytes = 0;
        while let Some(record) = buffer.records.front() {
            let size = record.size();
            let full = taken.len() >= limits.max_messages || bytes + size > limits.max_bytes;
            if full && !taken.is_empty() {
                break;
            }
            bytes += size;
            taken.extend(buffer.records.pop_front());
        }
        buffer.bytes -= bytes;
        if let Some(last) = taken.last() {
            buffer.taken = Some(last.offset + 1);
        }
        drop(buffer);
        if !had_room {
            self.0.bell.ring();
        }
        taken
    }
}

impl Source for PartitionSource {
    async fn start(&mut self, offset: Option<i64>) -> Result<Option<Started>, Gap> {
        *self.0.buffer() = Buffer::at(Position::Wanted(offset));
        self.0.goes_back_to(offset);
        self.0.bell.call();
        loop {
            if self.0.stopping.is_cancelled() {
                return Ok(None);
            }
            let found = {
                let buffer = self.0.buffer();
                match &buffer.position {
                    Position::Reading(from) => Some((*from, buffer.committed.clone())),
                    Position::Gap(gap) => return Err(gap.clone()),
                    Position::Wanted(_) | Position::Waiting => None,
                }
            };
            if let Some((from, committed)) = found {
                let is_of_a_row = committed.as_ref().is_some_and(|c| c.row().is_some());
                // Where a row counts, its lane says what is done.
                if offset.is_none() && !is_of_a_row {
                    let mut settled = lock(&self.0.settled);
                    settled.offset = settled.offset.or(from);
                }
                let topic = self.0.topic_id();
                return Ok(Some(Started { committed, topic }));
            }
            self.0.changed.notified().await;
        }
    }

    async fn next(&mut self, limits: &BatchLimits) -> Result<Option<Vec<Record>>, Gap> {
        loop {
            if self.0.stopping.is_cancelled() {
                return Ok(None);
            }
            let taken = self.take(limits);
            if !taken.is_empty() {
                return Ok(Some(taken));
            }
            if let Position::Gap(gap) = &self.0.buffer().position {
                return Err(gap.clone());
            }
            // `notify_one` keeps a permit, so a record that came since `take` is not missed.
            self.0.changed.notified().await;
        }
    }

    fn done(&mut self, next_offset: i64, row: Option<RowMark>) {
        let mut settled = lock(&self.0.settled);
        settled.offset = settled.offset.max(Some(next_offset));
        settled.row = row;
        settled.at_least_once = row.is_none();
    }

    fn passed(&self) -> Option<i64> {
        self.0.buffer().passed()
    }

    fn topic_id(&self) -> Option<String> {
        self.0.topic_id()
    }

    fn unread(&self) -> Unread {
        self.0.unread.clone()
    }

    fn stopping(&self) -> CancellationToken {
        self.0.stopping.clone()
    }
}

impl Drop for PartitionSource {
    fn drop(&mut self) {
        *self.0.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.ended_changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(offset: i64, size: usize) -> Record {
        Record {
            topic: Arc::from("t"),
            partition: 0,
            offset,
            timestamp: None,
            key: None,
            value: Some(vec![0; size]),
            headers: Vec::new(),
        }
    }

    /// One that is read from its first record on.
    fn partition() -> Arc<Partition> {
        let partition = Partition::new("t", 0, Arc::default());
        partition.set_position(Position::Reading(None));
        partition
    }

    fn push(partition: &Partition, record: Record) -> Pushed {
        partition.push(&mut VecDeque::from([record]))
    }

    fn limits(max_messages: usize, max_bytes: usize) -> BatchLimits {
        BatchLimits {
            max_messages,
            max_bytes,
            max_time: Duration::from_secs(1),
        }
    }

    #[tokio::test]
    async fn takes_what_is_at_hand_within_the_limits() {
        let partition = partition();
        let mut source = PartitionSource::new(partition.clone());
        for (offset, size) in [(0, 10), (1, 10), (2, 10), (3, 100), (4, 1)] {
            push(&partition, record(offset, size));
        }
        for (limits, expected) in [
            (limits(2, 1000), vec![0, 1]),
            (limits(9, 15), vec![2]),
            // Larger than a batch may be, and still delivered.
            (limits(9, 15), vec![3]),
            (limits(9, 15), vec![4]),
        ] {
            let taken = source.next(&limits).await.expect("no gap");
            let taken = taken.expect("not stopped");
            let offsets: Vec<_> = taken.iter().map(|r| r.offset).collect();
            assert_eq!(offsets, expected);
        }
    }

    #[tokio::test]
    async fn next_is_cancel_safe() {
        let partition = partition();
        let mut source = PartitionSource::new(partition.clone());
        let one = limits(1, 1);
        for offset in 0..100 {
            tokio::select! {
                biased;
                _ = source.next(&one) => panic!("nothing is there"),
                () = std::future::ready(()) => {}
            }
            push(&partition, record(offset, 1));
            let taken = source.next(&limits(1, 1)).await.expect("no gap");
            assert_eq!(taken.expect("not stopped")[0].offset, offset);
        }
    }

    #[tokio::test]
    async fn ends_when_it_is_stopped_and_says_so() {
        let partition = partition();
        let mut source = PartitionSource::new(partition.clone());
        push(&partition, record(0, 1));
        partition.stop();
        assert_eq!(source.next(&limits(1, 1)).await, Ok(None));
        assert!(!partition.wait_ended(Duration::ZERO));
        drop(source);
        assert!(partition.wait_ended(Duration::ZERO));
    }

    /// What is told to the group beyond its row has a transactional lane go on there.
    #[tokio::test]
    async fn what_is_taken_and_not_settled_is_not_passed_at_a_stop() {
        for (done, passed) in [(2, None), (3, Some(5))] {
            let partition = partition();
            let mut source = PartitionSource::new(partition.clone());
            for offset in 0..3 {
                push(&partition, record(offset, 1));
            }
            let taken = source.next(&limits(9, 9)).await.expect("no gap");
            assert_eq!(taken.expect("not stopped").len(), 3);
            source.done(done, None);
            // Markers.
            partition.replace_position(&Position::Reading(Some(3)), Position::Reading(Some(5)));
            partition.stop();
            assert_eq!(source.passed(), passed);
            assert_eq!(partition.settled(), passed.or(Some(done)));
        }
    }

    #[tokio::test]
    async fn is_read_where_its_lane_wants_and_says_what_is_missing() {
        let bell = Arc::new(Bell::default());
        let partition = Partition::new("t", 0, bell.clone());
        let mut source = PartitionSource::new(partition.clone());
        assert_eq!(push(&partition, record(0, 1)), Pushed::Unwanted);
        let poller = async {
            while !bell.was_called() {
                tokio::task::yield_now().await;
            }
            assert_eq!(partition.wanted(), Some(Some(5)));
            partition.begin(Some(5), 5, None);
        };
        let (started, ()) = tokio::join!(source.start(Some(5)), poller);
        assert_eq!(started, Ok(Some(Started::default())));
        assert_eq!(push(&partition, record(5, 1)), Pushed::Taken);
        assert_eq!(push(&partition, record(9, 1)), Pushed::Jump(6));
        let gap = Gap::Removed {
            expected: 6,
            first: 9,
        };
        partition.set_position(Position::Gap(gap.clone()));
        let taken = source.next(&limits(9, 9)).await.expect("what is before");
        assert_eq!(taken.expect("not stopped").len(), 1);
        assert_eq!(source.next(&limits(9, 9)).await, Err(gap));
    }

    #[test]
    fn commits_each_offset_once_unless_it_failed() {
        let partition = partition();
        let take = || partition.take_uncommitted().map(|commit| commit.offset);
        let mut source = PartitionSource::new(partition.clone());
        assert_eq!(take(), None);
        source.done(7, None);
        assert_eq!(take(), Some(7));
        assert_eq!(take(), None);
        partition.commit_again();
        assert_eq!(take(), Some(7));
    }

    #[test]
    fn says_beside_an_offset_what_it_is_of() {
        let partition = partition();
        partition.set_topic_id("an-id");
        let row = RowMark {
            generation: 3,
            commits: 2,
            next_offset: 7,
        };
        PartitionSource::new(partition.clone()).done(7, Some(row));
        let commit = partition.take_uncommitted().expect("an offset");
        let read = Committed::read(commit.offset, &commit.words);
        assert_eq!((read.topic(), read.row()), (Some("an-id"), Some(row)));
    }

    #[tokio::test]
    async fn what_are_no_records_is_passed_once_all_before_is_done() {
        let partition = partition();
        let mut source = PartitionSource::new(partition.clone());
        for offset in [0, 1] {
            push(&partition, record(offset, 1));
        }
        // A transaction's marker follows.
        partition.set_position(Position::Reading(Some(3)));
        assert_eq!(source.passed(), None, "the records are not taken");
        source.next(&limits(9, 9)).await.expect("no gap");
        assert_eq!(source.passed(), Some(3));
        assert_eq!(partition.settled(), None);
        source.done(1, None);
        assert_eq!(partition.settled(), Some(1), "the second is not done");
        source.done(2, None);
        assert_eq!(partition.settled(), Some(3));
        push(&partition, record(3, 1));
        assert_eq!(partition.settled(), Some(3), "it is not taken back");
    }

    #[test]
    fn says_how_much_room_there_is() {
        let partition = partition();
        let source = PartitionSource::new(partition.clone());
        assert_eq!(partition.room(), MAX_RECORDS);
        let filled = (0..).find(|offset| {
            push(&partition, record(*offset, 1 << 20));
            partition.room() == 0
        });
        assert_eq!(filled, Some((MAX_BYTES >> 20) as i64 - 1));
        source.take(&limits(1, usize::MAX));
        assert!(partition.room() > 0);
    }

    #[test]
    fn what_is_not_next_is_left() {
        let partition = partition();
        let mut records: VecDeque<_> = [0, 1, 5, 6].map(|offset| record(offset, 1)).into();
        assert_eq!(partition.push(&mut records), Pushed::Jump(2));
        assert_eq!(records.len(), 2);
        partition.set_position(Position::Reading(Some(5)));
        assert_eq!(partition.push(&mut records), Pushed::Taken);
        assert_eq!(push(&partition, record(7, 1)), Pushed::Taken);
    }
}
