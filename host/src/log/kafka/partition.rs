//! One assigned partition: a bounded buffer between the consumer's thread and the lane, and how far the lane has got.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::super::{BatchLimits, Source};
use crate::record::Record;

/// A buffer with this many records is full.
const MAX_RECORDS: usize = 10_000;
/// A buffer with this many bytes is full. What is at hand in the lane comes on top.
const MAX_BYTES: usize = 8 << 20;
/// Says that nothing was settled yet.
const NOTHING: i64 = -1;

/// Shared by the consumer's thread and the lane's source.
pub(super) struct Partition {
    topic: Arc<str>,
    number: i32,
    buffer: Mutex<Buffer>,
    filled: Notify,
    /// The lane is asked to end.
    stopping: CancellationToken,
    /// The lane is not waited for any longer.
    abandoned: CancellationToken,
    /// The offset below which all is settled, or [`NOTHING`].
    settled: AtomicI64,
    /// The last offset given to the log to commit, or [`NOTHING`].
    committed: AtomicI64,
    ended: Mutex<bool>,
    ended_changed: Condvar,
}

#[derive(Default)]
struct Buffer {
    records: VecDeque<Record>,
    bytes: usize,
}

impl Partition {
    pub(super) fn new(topic: &str, number: i32) -> Arc<Self> {
        Arc::new(Self {
            topic: Arc::from(topic),
            number,
            buffer: Mutex::default(),
            filled: Notify::new(),
            stopping: CancellationToken::new(),
            abandoned: CancellationToken::new(),
            settled: AtomicI64::new(NOTHING),
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

    /// Takes a record in; answers whether the buffer is full now, so that the partition is to be paused.
    pub(super) fn push(&self, record: Record) -> bool {
        let mut buffer = self.buffer();
        buffer.bytes += record.size();
        buffer.records.push_back(record);
        self.filled.notify_one();
        buffer.records.len() >= MAX_RECORDS || buffer.bytes >= MAX_BYTES
    }

    /// Whether a paused partition may be resumed.
    pub(super) fn has_room(&self) -> bool {
        let buffer = self.buffer();
        buffer.records.len() <= MAX_RECORDS / 2 && buffer.bytes <= MAX_BYTES / 2
    }

    /// Asks the lane to end. Records that it has not taken are left to the partition's next owner.
    pub(super) fn stop(&self) {
        self.stopping.cancel();
        *self.buffer() = Buffer::default();
        self.filled.notify_one();
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

    /// The offset below which all is settled.
    pub(super) fn settled(&self) -> Option<i64> {
        Some(self.settled.load(Ordering::Acquire)).filter(|o| *o != NOTHING)
    }

    /// The settled offset, if it was not yet given to the log.
    pub(super) fn take_uncommitted(&self) -> Option<i64> {
        let settled = self.settled()?;
        let before = self.committed.swap(settled, Ordering::AcqRel);
        (before != settled).then_some(settled)
    }

    /// The last commit did not reach the log: it is to be given again.
    pub(super) fn commit_failed(&self) {
        self.committed.store(NOTHING, Ordering::Release);
    }

    fn buffer(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The lane's end of a partition. Dropping it says that the lane has ended.
pub struct PartitionSource(Arc<Partition>);

impl PartitionSource {
    pub(super) fn new(partition: Arc<Partition>) -> Self {
        Self(partition)
    }

    /// Cancelled when the lane is not waited for any longer: its future is to be dropped.
    pub fn abandoned(&self) -> CancellationToken {
        self.0.abandoned.clone()
    }

    fn take(&self, limits: &BatchLimits) -> Vec<Record> {
        let mut buffer = self.0.buffer();
        let mut taken = Vec::new();
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
        taken
    }
}

impl Source for PartitionSource {
    async fn next(&mut self, limits: &BatchLimits) -> Option<Vec<Record>> {
        loop {
            if self.0.stopping.is_cancelled() {
                return None;
            }
            let taken = self.take(limits);
            if !taken.is_empty() {
                return Some(taken);
            }
            // `notify_one` keeps a permit, so a record that came since `take` is not missed.
            self.0.filled.notified().await;
        }
    }

    fn done(&mut self, next_offset: i64) {
        self.0.settled.store(next_offset, Ordering::Release);
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

    fn limits(max_messages: usize, max_bytes: usize) -> BatchLimits {
        BatchLimits {
            max_messages,
            max_bytes,
            max_time: Duration::from_secs(1),
        }
    }

    #[tokio::test]
    async fn takes_what_is_at_hand_within_the_limits() {
        let partition = Partition::new("t", 0);
        let mut source = PartitionSource::new(partition.clone());
        for (offset, size) in [(0, 10), (1, 10), (2, 10), (3, 100), (4, 1)] {
            partition.push(record(offset, size));
        }
        for (limits, expected) in [
            (limits(2, 1000), vec![0, 1]),
            (limits(9, 15), vec![2]),
            // Larger than a batch may be, and still delivered.
            (limits(9, 15), vec![3]),
            (limits(9, 15), vec![4]),
        ] {
            let taken = source.next(&limits).await.expect("not stopped");
            let offsets: Vec<_> = taken.iter().map(|r| r.offset).collect();
            assert_eq!(offsets, expected);
        }
    }

    #[tokio::test]
    async fn next_is_cancel_safe() {
        let partition = Partition::new("t", 0);
        let mut source = PartitionSource::new(partition.clone());
        let one = limits(1, 1);
        for offset in 0..100 {
            tokio::select! {
                biased;
                _ = source.next(&one) => panic!("nothing is there"),
                () = std::future::ready(()) => {}
            }
            partition.push(record(offset, 1));
            let taken = source.next(&limits(1, 1)).await.expect("not stopped");
            assert_eq!(taken[0].offset, offset);
        }
    }

    #[tokio::test]
    async fn ends_when_it_is_stopped_and_says_so() {
        let partition = Partition::new("t", 0);
        let mut source = PartitionSource::new(partition.clone());
        partition.push(record(0, 1));
        partition.stop();
        assert_eq!(source.next(&limits(1, 1)).await, None);
        assert!(!partition.wait_ended(Duration::ZERO));
        drop(source);
        assert!(partition.wait_ended(Duration::ZERO));
    }

    #[test]
    fn commits_each_offset_once_unless_it_failed() {
        let partition = Partition::new("t", 0);
        let mut source = PartitionSource::new(partition.clone());
        assert_eq!(partition.take_uncommitted(), None);
        source.done(7);
        assert_eq!(partition.take_uncommitted(), Some(7));
        assert_eq!(partition.take_uncommitted(), None);
        partition.commit_failed();
        assert_eq!(partition.take_uncommitted(), Some(7));
    }

    #[test]
    fn says_when_it_is_full_and_when_it_has_room_again() {
        let partition = Partition::new("t", 0);
        let source = PartitionSource::new(partition.clone());
        let filled = (0..).position(|offset| partition.push(record(offset, 1 << 20)));
        assert_eq!(filled, Some(MAX_BYTES / (1 << 20) - 1));
        assert!(!partition.has_room());
        source.take(&limits(4, usize::MAX));
        assert!(partition.has_room());
    }
}
