//! A partition: segments of record batches, in order, durable up to the high watermark.
//!
//! One writer appends and flushes; any number of readers read what is below the high watermark.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError, RwLock, Weak};

use bytes::Bytes;
use kafka_protocol::ResponseError;
use tokio::sync::Notify;
use tracing::{debug, error, warn};

use super::batch::{self, Header};
use super::compaction::{self, Abandoned, Closed, MAX_KEYS, Pass, Progress, Replacement, swap};
use super::cursor::{Cursor, Place};
use super::producers::{Producers, Verdict};
use super::records;
use super::recovery::{self, Recovered};
use super::segment::Segment;
use super::topic_config::Settings;
use super::{lock, now_ms, sync_folder};
use crate::config::StartError;

/// A partition of a topic.
#[derive(Debug)]
pub(crate) struct Partition {
    /// `topic/index`, for messages.
    name: String,
    folder: PathBuf,
    settings: RwLock<Arc<Settings>>,
    log: Mutex<Log>,
    compaction: Mutex<Compaction>,
    /// First offset that may be read.
    start: AtomicI64,
    /// First offset that may not be read yet, or does not exist.
    high_watermark: AtomicI64,
    deleted: AtomicBool,
    trouble: Mutex<Option<Trouble>>,
    /// Whether there is trouble, without a lock.
    has_trouble: AtomicBool,
    told_of_keys: Once,
    /// Fetches that wait for records.
    waiting: Mutex<Vec<Weak<Notify>>>,
    syncs: AtomicU64,
}

#[derive(Debug, Default)]
struct Log {
    /// The last one is written to.
    segments: VecDeque<Segment>,
    next_offset: i64,
    /// When the last segment was begun, or opened.
    active_since_ms: i64,
    producers: Producers,
    state: State,
    scratch: Vec<u8>,
}

/// Why the last write failed.
#[derive(Debug)]
struct Trouble {
    why: String,
    /// Bytes that there was no room for.
    len: u64,
}

#[derive(Debug, Default)]
struct Compaction {
    progress: Progress,
    /// A segment is damaged: there is nothing to be done before somebody looks at it.
    is_stuck: bool,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Online,
    /// What was flushed is not known any more; only a restart finds out.
    Offline,
    Deleted,
}

/// What a batch was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Appended {
    pub(crate) base_offset: i64,
}

/// What was read.
#[derive(Debug)]
pub(crate) struct Read {
    /// Whole batches; the first may begin before the offset asked for.
    pub(crate) records: Bytes,
    pub(crate) start: i64,
    pub(crate) high_watermark: i64,
}

impl Partition {
    /// Opens what is in `folder`, which is made with the first record. `intact`: whether all in it is known to have been
    /// on the disk when the broker last ended.
    pub(crate) fn open(
        name: String,
        folder: PathBuf,
        start: i64,
        settings: Settings,
        intact: bool,
    ) -> Result<Self, StartError> {
        let mut log = Log::default();
        if folder.exists() {
            let Recovered {
                segments,
                next_offset,
                producers,
            } = recovery::recover(&name, &folder, &settings, intact)?;
            log.segments = segments;
            log.next_offset = next_offset;
            log.producers = producers;
        }
        log.active_since_ms = now_ms();
        let first = log.segments.front().map_or(0, Segment::base_offset);
        let next = log.next_offset;
        Ok(Self {
            name,
            folder,
            settings: RwLock::new(Arc::new(settings)),
            log: Mutex::new(log),
            compaction: Mutex::default(),
            start: AtomicI64::new(start.clamp(first, next)),
            high_watermark: AtomicI64::new(next),
            deleted: AtomicBool::new(false),
            trouble: Mutex::default(),
            has_trouble: AtomicBool::new(false),
            told_of_keys: Once::new(),
            waiting: Mutex::default(),
            syncs: AtomicU64::new(0),
        })
    }

    /// `topic/index`, for messages.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn settings(&self) -> Arc<Settings> {
        let settings = self.settings.read();
        settings.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has other settings hold from now on.
    pub(crate) fn set_settings(&self, settings: Settings) {
        let mut held = self
            .settings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *held = Arc::new(settings);
    }

    /// Bytes of all records.
    pub(crate) fn bytes(&self) -> u64 {
        lock(&self.log).segments.iter().map(Segment::len).sum()
    }

    /// First offset that may be read.
    pub(crate) fn start(&self) -> i64 {
        self.start.load(Ordering::Acquire)
    }

    /// The offset after the last durable record.
    pub(crate) fn high_watermark(&self) -> i64 {
        self.high_watermark.load(Ordering::Acquire)
    }

    pub(crate) fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::Acquire)
    }

    /// Whether all that was appended is known to be on the disk.
    pub(crate) fn is_flushed(&self) -> bool {
        let log = lock(&self.log);
        match log.state {
            State::Online => self.high_watermark() == log.next_offset,
            State::Offline => false,
            State::Deleted => true,
        }
    }

    /// How often the partition was flushed.
    #[cfg(test)]
    pub(crate) fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }

    /// Writes a batch, whose header was checked, at the end. It is not durable, nor to be seen, before [`Self::sync`].
    pub(crate) fn append(&self, batch: &[u8], header: &Header) -> Result<Appended, ResponseError> {
        let settings = self.settings();
        if settings.compacts && !records::have_keys(header, batch).unwrap_or(false) {
            self.told_of_keys.call_once(|| {
                warn!(
                    partition = self.name,
                    "a record without a key was refused: the topic is compacted by its keys"
                );
            });
            return Err(ResponseError::InvalidRecord);
        }
        let log = &mut *lock(&self.log);
        log.usable()?;
        match log.producers.check(header) {
            Verdict::New => {}
            Verdict::Repeat(base_offset) => return Ok(Appended { base_offset }),
            Verdict::Refused(why) => return Err(why),
        }
        let base_offset = log.next_offset;
        let Some(next_offset) = base_offset.checked_add(i64::from(header.record_count)) else {
            return Err(ResponseError::InvalidRecord);
        };
        let header = Header {
            base_offset,
            skipped: 0,
            ..*header
        };
        batch::stamp(batch, base_offset, &mut log.scratch);
        let written = self
            .prepare(log, header.len as u64, &settings)
            .and_then(|()| {
                let active = log
                    .segments
                    .back_mut()
                    .ok_or_else(|| io::Error::other("no segment"))?;
                active.append(&log.scratch, &header)
            });
        if let Err(error) = written {
            // Clients send it again and again: what is the same as before is not said again.
            if self.set_trouble(&error, header.len as u64) {
                error!(partition = self.name, %error, "a produced batch could not be written, and is refused");
            }
            log.producers.refuse(&header);
            return Err(ResponseError::KafkaStorageError);
        }
        if self.has_trouble.load(Ordering::Relaxed) {
            self.clear_trouble();
        }
        log.next_offset = next_offset;
        log.producers.record(&header);
        Ok(Appended { base_offset })
    }

    /// Why records cannot be written, if the last could not: looks whether the same could be now. Writes what it takes
    /// back at once; what a crash leaves of it is cut as the end of any other write.
    pub(crate) fn trouble(&self) -> Option<String> {
        if !self.has_trouble.load(Ordering::Relaxed) {
            return None;
        }
        let len = lock(&self.trouble).as_ref()?.len;
        let log = &mut *lock(&self.log);
        match log.state {
            State::Deleted => return None,
            State::Offline => {}
            State::Online => {
                let tried = self.prepare(log, len, &self.settings()).and_then(|()| {
                    log.segments
                        .back_mut()
                        .map_or(Ok(()), |active| active.try_room(len))
                });
                match tried {
                    Ok(()) => self.clear_trouble(),
                    Err(error) => drop(self.set_trouble(&error, len)),
                }
            }
        }
        lock(&self.trouble)
            .as_ref()
            .map(|trouble| trouble.why.clone())
    }

    /// Whether it is news.
    fn set_trouble(&self, error: &io::Error, len: u64) -> bool {
        let why = error.to_string();
        let mut trouble = lock(&self.trouble);
        self.has_trouble.store(true, Ordering::Relaxed);
        let before = trouble.replace(Trouble {
            why: why.clone(),
            len,
        });
        before.is_none_or(|before| before.why != why)
    }

    fn clear_trouble(&self) {
        *lock(&self.trouble) = None;
        self.has_trouble.store(false, Ordering::Relaxed);
    }

    /// Makes all that was appended durable, then lets readers see it.
    pub(crate) fn sync(&self) -> Result<(), ResponseError> {
        let (file, end) = {
            let log = lock(&self.log);
            log.usable()?;
            (log.segments.back().map(Segment::file), log.next_offset)
        };
        let synced = match file {
            Some(file) if self.settings().fsync => file.and_then(|file| file.sync_data()),
            _ => Ok(()),
        };
        self.syncs.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = synced {
            self.go_offline(&mut lock(&self.log), &error);
            return Err(ResponseError::KafkaStorageError);
        }
        self.high_watermark.fetch_max(end, Ordering::AcqRel);
        self.wake();
        Ok(())
    }

    /// Reads whole batches from `offset` on, of about `max_bytes`; with `at_least_one`, one however large it is.
    pub(crate) fn read(
        &self,
        offset: i64,
        max_bytes: usize,
        at_least_one: bool,
    ) -> Result<Read, ResponseError> {
        let empty = {
            let log = lock(&self.log);
            if log.state == State::Deleted {
                return Err(ResponseError::UnknownTopicOrPartition);
            }
            let (start, high_watermark) = (self.start(), self.high_watermark());
            // Between the high watermark and the end a client can be that got its answer just before a restart.
            if offset < start || offset > log.next_offset {
                return Err(ResponseError::OffsetOutOfRange);
            }
            offset >= high_watermark
        };
        let high_watermark = self.high_watermark();
        let records = if empty {
            Bytes::new()
        } else {
            // What compaction left without records is only handed out where nothing else follows: it shows where to go on.
            match self.read_from(offset, max_bytes, at_least_one, |header| {
                header.record_count > 0
            })? {
                Some(records) => records,
                None => self
                    .read_from(offset, max_bytes, at_least_one, |_| true)?
                    .unwrap_or_default(),
            }
        };
        Ok(Read {
            records,
            start: self.start(),
            high_watermark,
        })
    }

    /// Reads from the first batch on that reaches beyond `offset` and is wanted.
    fn read_from(
        &self,
        mut offset: i64,
        max_bytes: usize,
        at_least_one: bool,
        is_wanted: impl Fn(&Header) -> bool,
    ) -> Result<Option<Bytes>, ResponseError> {
        let high_watermark = self.high_watermark();
        while offset < high_watermark {
            let (file, entry, limit, next) = {
                let log = lock(&self.log);
                let segment = log
                    .segment_of(offset)
                    .ok_or(ResponseError::OffsetOutOfRange)?;
                let (entry, next) = (segment.seek_offset(offset), segment.next_offset());
                (segment.file(), entry, segment.len(), next)
            };
            let cursor = Cursor::new(&self.name, self.readable(file)?, limit, high_watermark);
            let wanted = |header: &Header| header.next_offset() > offset && is_wanted(header);
            if let Some(first) = cursor.find(entry, wanted)? {
                return cursor
                    .batches_from(first, max_bytes, at_least_one)
                    .map(Some);
            }
            if next <= offset {
                break;
            }
            offset = next;
        }
        Ok(None)
    }

    /// Offset and timestamp of the first record that is not older than `timestamp`.
    pub(crate) fn find_timestamp(
        &self,
        timestamp: i64,
    ) -> Result<Option<(i64, i64)>, ResponseError> {
        let high_watermark = self.high_watermark();
        let mut from = self.start();
        loop {
            let (file, entry, limit, next) = {
                let log = lock(&self.log);
                let newer = |segment: &&Segment| {
                    segment.max_timestamp() >= timestamp && segment.next_offset() > from
                };
                let Some(segment) = log.segments.iter().find(newer) else {
                    return Ok(None);
                };
                (
                    segment.file(),
                    segment.seek_timestamp(timestamp),
                    segment.len(),
                    segment.next_offset(),
                )
            };
            let cursor = Cursor::new(&self.name, self.readable(file)?, limit, high_watermark);
            let newer = |header: &Header| {
                header.max_timestamp >= timestamp
                    && header.next_offset() > from
                    && header.record_count > 0
            };
            if let Some(first) = cursor.find(entry, newer)? {
                let batch = cursor.batches_from(first, 0, true)?;
                let (offset, timestamp) = batch::find_timestamp(&first.header, &batch, timestamp);
                return Ok(Some((offset.max(from), timestamp)));
            }
            from = next;
        }
    }

    /// Offset and timestamp of the newest record by its timestamp; of several, the first.
    pub(crate) fn find_newest(&self) -> Result<Option<(i64, i64)>, ResponseError> {
        let (high_watermark, start) = (self.high_watermark(), self.start());
        let mut found: Option<(Cursor<'_>, Place)> = None;
        let mut base = start;
        while base < high_watermark {
            let (file, entry, limit, next, newest) = {
                let log = lock(&self.log);
                let Some(segment) = log.segment_of(base) else {
                    break;
                };
                let (entry, next) = (segment.seek_offset(base), segment.next_offset());
                (
                    segment.file(),
                    entry,
                    segment.len(),
                    next,
                    segment.max_timestamp(),
                )
            };
            let known = found
                .as_ref()
                .map_or(-1, |(_, place)| place.header.max_timestamp);
            if newest > known {
                let file = self.readable(file)?;
                let cursor = Cursor::new(&self.name, file.clone(), limit, high_watermark);
                let best = cursor.newest(entry, |header| header.next_offset() > start)?;
                if let Some(best) = best.filter(|best| best.header.max_timestamp > known) {
                    found = Some((cursor, best));
                }
            }
            if next <= base {
                break;
            }
            base = next;
        }
        let Some((cursor, place)) = found else {
            return Ok(None);
        };
        let batch = cursor.batches_from(place, 0, true)?;
        let (offset, timestamp) = batch::find_newest(&place.header, &batch);
        Ok(Some((offset.max(start), timestamp)))
    }

    /// Has `notify` notified when records become readable. The caller looks again after this.
    pub(crate) fn wait(&self, notify: &Arc<Notify>) {
        let mut waiting = lock(&self.waiting);
        waiting.retain(|other| {
            other.strong_count() > 0 && !std::ptr::eq(other.as_ptr(), Arc::as_ptr(notify))
        });
        waiting.push(Arc::downgrade(notify));
    }

    /// The first offset that is left if the records before `offset` (-1: all) are deleted.
    pub(crate) fn start_from(&self, offset: i64) -> Result<i64, ResponseError> {
        let high_watermark = self.high_watermark();
        match offset {
            -1 => Ok(high_watermark),
            offset if (0..=high_watermark).contains(&offset) => Ok(offset.max(self.start())),
            _ => Err(ResponseError::OffsetOutOfRange),
        }
    }

    /// Deletes the records before `offset`, which [`Self::start_from`] gave. Their files go with the next
    /// [`Self::retain`].
    pub(crate) fn delete_before(&self, offset: i64) {
        self.start.fetch_max(offset, Ordering::AcqRel);
    }

    /// Removes the files that the topic's retention, or [`Self::delete_before`], left without records to keep.
    pub(crate) fn retain(&self, now_ms: i64) -> io::Result<()> {
        let mut log = lock(&self.log);
        if log.usable().is_err() {
            return Ok(());
        }
        let settings = self.settings();
        let flushed = self.high_watermark() == log.next_offset;
        let mut total: u64 = log.segments.iter().map(Segment::len).sum();
        while let Some(oldest) = log.segments.front() {
            let too_old = settings.retention_ms.is_some_and(|keep| {
                settings.deletes
                    && oldest.len() > 0
                    && oldest.max_timestamp().saturating_add(keep) < now_ms
            });
            // Kafka keeps at least what it is asked to keep: a segment goes when the rest is enough.
            let too_much = settings
                .retention_bytes
                .is_some_and(|keep| settings.deletes && total - oldest.len() >= keep);
            let below_start = oldest.next_offset() <= self.start();
            let is_last = log.segments.len() == 1;
            let goes = if is_last {
                too_old && flushed
            } else {
                too_old || too_much || below_start
            };
            if !goes {
                break;
            }
            total -= oldest.len();
            if is_last {
                // An empty segment keeps the next offset.
                let next = self.new_segment(log.next_offset)?;
                log.segments.push_back(next);
                log.active_since_ms = now_ms;
            }
            let Some(goes) = log.segments.front() else {
                break;
            };
            self.start.fetch_max(goes.next_offset(), Ordering::AcqRel);
            // A file that stays is tried again in the next round.
            remove_file(goes.path())?;
            log.segments.pop_front();
        }
        Ok(())
    }

    /// Compacts what is closed, if the topic is to be compacted and there is enough that is new. Gives up when
    /// `is_unwanted`.
    pub(crate) fn compact(&self, now_ms: i64, is_unwanted: &dyn Fn() -> bool) {
        let settings = self.settings();
        let mut state = lock(&self.compaction);
        if !settings.compacts || state.is_stuck || lock(&self.log).usable().is_err() {
            return;
        }
        let closed = lock(&self.log).closed();
        let Some(segments) = compaction::plan(closed, &state.progress, &settings, now_ms) else {
            return;
        };
        let pass = Pass {
            segments,
            settings: &settings,
            now_ms,
            is_unwanted: &|| is_unwanted() || self.is_deleted(),
            max_keys: MAX_KEYS,
            is_last_of_producer: &|header| lock(&self.log).producers.is_last(header),
        };
        match pass.run(state.progress.clean_until, |replacement| {
            self.replace(replacement)
        }) {
            Ok(progress) => {
                state.progress = progress;
                debug!(
                    partition = self.name,
                    bytes = self.bytes(),
                    offset = progress.clean_until,
                    "compacted what is before the offset"
                );
            }
            Err(Abandoned::Unwanted) => {}
            Err(_) if self.is_deleted() => {}
            Err(Abandoned::Io(error)) => {
                warn!(partition = self.name, %error, "could not compact; the next round tries again");
            }
            Err(damaged @ Abandoned::Damaged { .. }) => {
                error!(
                    partition = self.name,
                    "is not compacted any more: {damaged}"
                );
                state.is_stuck = true;
            }
        }
    }

    /// Puts what compaction left of some segments in their place.
    fn replace(&self, Replacement { olds, mut new }: Replacement) -> Result<(), Abandoned> {
        let log = &mut *lock(&self.log);
        let at = log.position_of(&olds);
        let (Some(at), Ok(())) = (at, log.usable()) else {
            remove_file(new.path())?;
            return Err(Abandoned::Unwanted);
        };
        let paths: Vec<PathBuf> = olds.iter().map(|old| old.path.clone()).collect();
        if let Err(error) = swap::publish(&mut new).and_then(|()| swap::finish(&mut new, &paths)) {
            self.go_offline(log, &error);
            return Err(error.into());
        }
        let rest = log.segments.split_off(at + olds.len());
        log.segments.truncate(at);
        log.segments.push_back(new);
        log.segments.extend(rest);
        Ok(())
    }

    /// Ends all use of the partition, before its files are removed.
    pub(crate) fn delete(&self) {
        let mut log = lock(&self.log);
        log.state = State::Deleted;
        log.segments.clear();
        self.deleted.store(true, Ordering::Release);
        drop(log);
        self.wake();
    }

    /// Makes room for `len` bytes: a segment to write to, a new one when the last is full.
    fn prepare(&self, log: &mut Log, len: u64, settings: &Settings) -> io::Result<()> {
        let now = now_ms();
        let is_old = now.saturating_sub(log.active_since_ms) > settings.max_segment_ms();
        match log.segments.back() {
            Some(active)
                if active.len() == 0
                    || (!is_old && active.len() + len <= settings.segment_bytes) =>
            {
                return Ok(());
            }
            Some(active) if settings.fsync => {
                if let Err(error) = active.file().and_then(|file| file.sync_data()) {
                    self.go_offline(log, &error);
                    return Err(error);
                }
            }
            Some(_) => {}
            None => {
                fs::create_dir_all(&self.folder)?;
                // Not only if it is new: an attempt before this one may have failed just here.
                if let (Some(topic), true) = (self.folder.parent(), settings.fsync) {
                    sync_folder(topic)?;
                    topic.parent().map_or(Ok(()), sync_folder)?;
                }
            }
        }
        let next = self.new_segment(log.next_offset)?;
        if let Some(full) = log.segments.back_mut() {
            full.close();
        }
        log.segments.push_back(next);
        log.active_since_ms = now;
        Ok(())
    }

    /// An empty segment whose name is durable, or nothing: a file left behind would be in the way of the offsets that the
    /// segment before it goes on with.
    fn new_segment(&self, base_offset: i64) -> io::Result<Segment> {
        let next = Segment::create(&self.folder, base_offset)?;
        if self.settings().fsync
            && let Err(error) = sync_folder(&self.folder)
        {
            if let Err(error) = remove_file(next.path()) {
                warn!(file = %next.path().display(), %error, "could not remove an empty segment");
            }
            return Err(error);
        }
        Ok(next)
    }

    /// After a flush that failed nobody knows what is on the disk, and a second one that succeeds says nothing about
    /// what the first one lost.
    fn go_offline(&self, log: &mut Log, error: &io::Error) {
        error!(
            partition = self.name,
            %error,
            "could not write the partition: it takes no more records until the broker is started again"
        );
        log.state = State::Offline;
        let what =
            format!("{error}; nothing more is written there until the broker is started again");
        self.set_trouble(&io::Error::new(error.kind(), what), 0);
    }

    fn readable(&self, file: io::Result<Arc<File>>) -> Result<Arc<File>, ResponseError> {
        file.map_err(|error| match error.kind() {
            // Retention took it since.
            io::ErrorKind::NotFound => ResponseError::OffsetOutOfRange,
            _ => {
                error!(partition = self.name, %error, "could not open a segment");
                ResponseError::KafkaStorageError
            }
        })
    }

    fn wake(&self) {
        for notify in lock(&self.waiting).drain(..) {
            if let Some(notify) = notify.upgrade() {
                notify.notify_one();
            }
        }
    }
}

impl Log {
    fn usable(&self) -> Result<(), ResponseError> {
        match self.state {
            State::Online => Ok(()),
            State::Offline => Err(ResponseError::KafkaStorageError),
            State::Deleted => Err(ResponseError::UnknownTopicOrPartition),
        }
    }

    /// The segments that nothing is written to any more.
    fn closed(&self) -> Vec<Closed> {
        let count = self.segments.len().saturating_sub(1);
        let closed = |segment: &Segment| Closed {
            base_offset: segment.base_offset(),
            next_offset: segment.next_offset(),
            path: segment.path().to_owned(),
            len: segment.len(),
            max_timestamp: segment.max_timestamp(),
        };
        self.segments.iter().take(count).map(closed).collect()
    }

    /// Where these closed segments are, if all of them are here still.
    fn position_of(&self, closed: &[Closed]) -> Option<usize> {
        let first = closed.first()?;
        let at = self
            .segments
            .iter()
            .position(|segment| segment.base_offset() == first.base_offset)?;
        let here = self.segments.iter().skip(at).zip(closed);
        let all_here = here.clone().count() == closed.len()
            && here
                .into_iter()
                .all(|(segment, closed)| segment.path() == closed.path)
            && at + closed.len() < self.segments.len();
        all_here.then_some(at)
    }

    fn segment_of(&self, offset: i64) -> Option<&Segment> {
        let after = self
            .segments
            .partition_point(|segment| segment.base_offset() <= offset);
        self.segments.get(after.checked_sub(1)?)
    }
}

/// Removes a file; one that is gone already is removed.
fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod compaction_tests;
#[cfg(test)]
mod tests;
