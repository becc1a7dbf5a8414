//! A partition: segments of record batches, in order, durable up to the high watermark.
//!
//! One writer appends and flushes; any number of readers read what is below the high watermark.

mod compacting;
mod reading;
mod trouble;

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError, RwLock, Weak};

use kafka_protocol::ResponseError;
use tokio::sync::Notify;
use tracing::{error, warn};

use super::batch::{self, Header};
use super::producers::{Producers, Verdict};
use super::records;
use super::recovery::{self, Recovered};
use super::segment::Segment;
use super::topic_config::Settings;
use super::{lock, now_ms, sync_folder};
use crate::config::StartError;
use compacting::Compaction;
pub(crate) use reading::Read;
use trouble::Trouble;

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
