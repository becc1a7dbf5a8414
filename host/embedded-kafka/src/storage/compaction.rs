//! Compaction: of each key the newest record stays, and a tombstone for a while; offsets stay as they are.
//!
//! As Kafka does it: a pass reads the part that is new since the last one and remembers the newest offset of each key
//! (`keys.rs`), then goes over the closed segments from the first on, writes beside each what stays of it (`filter.rs`),
//! and puts it in the place of what was (`swap.rs`). The segment that is written to is left alone. A pass is bounded by
//! the keys that it can remember: where there are more, it goes as far as it got, and the next one goes on there.

mod filter;
mod keys;
pub(super) mod swap;

use std::fs::File;
use std::io;
use std::path::PathBuf;

use super::batch::{self, BadBatch, Header};
use super::records::{BadRecords, Records};
use super::segment::{Batches, Depth, Segment};
use super::topic_config::Settings;
use filter::{Filter, Kept};
use keys::LatestKeys;

/// Keys that a pass remembers: some 26 MB. Kafka's cleaner has room for five million.
pub(super) const MAX_KEYS: usize = 900_000;

/// A closed segment, as it was when the pass began.
#[derive(Clone, Debug)]
pub(super) struct Closed {
    pub(super) base_offset: i64,
    pub(super) next_offset: i64,
    pub(super) path: PathBuf,
    pub(super) len: u64,
    pub(super) max_timestamp: i64,
}

/// What passes remember of a partition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// Below it, no key is there twice.
    pub(super) clean_until: i64,
    /// When the first of the tombstones that were kept may go.
    pub(super) next_horizon: Option<i64>,
}

/// Why a pass ended before its end. What it had put in place stays.
#[derive(Debug, thiserror::Error)]
pub(super) enum Abandoned {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{} is damaged at offset {offset}: {bad}", file.display())]
    Damaged {
        file: PathBuf,
        offset: i64,
        bad: BadBatch,
    },
    /// The broker stops, or the topic was deleted, or retention took a segment.
    #[error("it is wanted no more")]
    Unwanted,
}

/// A pass over the closed segments of a partition.
pub(super) struct Pass<'a> {
    pub(super) segments: Vec<Closed>,
    pub(super) settings: &'a Settings,
    pub(super) now_ms: i64,
    pub(super) is_unwanted: &'a dyn Fn() -> bool,
    /// Keys that it can remember.
    pub(super) max_keys: usize,
    /// Whether a batch is the last that its producer sent.
    pub(super) is_last_of_producer: &'a dyn Fn(&Header) -> bool,
}

/// Segments next to each other, and what stays of them.
pub(super) struct Replacement {
    pub(super) olds: Vec<Closed>,
    pub(super) new: Segment,
}

/// The segments that a pass may read, of those that are closed; `None`: it is not worth one yet.
pub(super) fn plan(
    mut closed: Vec<Closed>,
    progress: &Progress,
    settings: &Settings,
    now_ms: i64,
) -> Option<Vec<Closed>> {
    let too_new = |segment: &Closed| {
        segment.max_timestamp > now_ms.saturating_sub(settings.min_compaction_lag_ms)
    };
    if settings.min_compaction_lag_ms > 0
        && let Some(first) = closed.iter().position(too_new)
    {
        closed.truncate(first);
    }
    let is_dirty = |segment: &&Closed| segment.next_offset > progress.clean_until;
    let bytes = |total, segment: &Closed| total + segment.len;
    let total = closed.iter().fold(0, bytes);
    let dirty = closed.iter().filter(is_dirty).fold(0, bytes);
    let is_late = |segment: &Closed| {
        segment.max_timestamp >= 0
            && segment.max_timestamp < now_ms.saturating_sub(settings.max_compaction_lag_ms)
    };
    let is_due = dirty as f64 > total as f64 * settings.min_dirty_ratio
        || closed.iter().filter(is_dirty).any(is_late)
        || (total > 0
            && progress
                .next_horizon
                .is_some_and(|horizon| horizon < now_ms));
    is_due.then_some(closed)
}

impl Pass<'_> {
    /// Makes the pass; `replace` puts each replacement in its place. Gives what is to be remembered.
    pub(super) fn run(
        &self,
        clean_until: i64,
        mut replace: impl FnMut(Replacement) -> Result<(), Abandoned>,
    ) -> Result<Progress, Abandoned> {
        let (latest, end) = self.latest_keys(clean_until)?;
        let mut filter = Filter {
            latest: &latest,
            end,
            now_ms: self.now_ms,
            delete_retention_ms: self.settings.delete_retention_ms,
            next_horizon: None,
        };
        let within = self
            .segments
            .partition_point(|segment| segment.base_offset < end);
        for group in groups(&self.segments[..within], self.settings.segment_bytes) {
            if let Some(new) = self.write(group, &mut filter)? {
                let olds = group.to_vec();
                replace(Replacement { olds, new })?;
            }
        }
        Ok(Progress {
            clean_until: end,
            next_horizon: filter.next_horizon,
        })
    }

    /// The newest offset of each key from `clean_until` on, and the offset up to which that is known.
    fn latest_keys(&self, clean_until: i64) -> Result<(LatestKeys, i64), Abandoned> {
        let mut latest = LatestKeys::with_room_for(self.max_keys);
        let mut end = clean_until;
        for segment in &self.segments {
            if segment.next_offset <= clean_until {
                continue;
            }
            let full_at = self.each_batch(segment, |header, batch| {
                if header.next_offset() <= clean_until {
                    return Ok(None);
                }
                match note_keys(header, batch, clean_until, &mut latest) {
                    Ok(full_at) => Ok(full_at),
                    // It stays as it is, so its keys are not needed.
                    Err(_) => Ok(None),
                }
            })?;
            if let Some(full_at) = full_at {
                return Ok((latest, full_at));
            }
            end = segment.next_offset;
        }
        Ok((latest, end))
    }

    /// Writes what stays of some segments; `None`: all of them stay as they are.
    fn write(
        &self,
        group: &[Closed],
        filter: &mut Filter<'_>,
    ) -> Result<Option<Segment>, Abandoned> {
        let (Some(first), Some(last)) = (group.first(), group.last()) else {
            return Ok(None);
        };
        let path = first.path.with_extension(swap::CLEANED);
        let mut output = Output {
            new: Segment::create_at(path, first.base_offset)?,
            changed: group.len() > 1,
        };
        let written = self.write_all(group, filter, &mut output);
        let written = written.and_then(|()| Ok(output.fill(last.next_offset)?));
        let written = written.and_then(|()| Ok(output.new.file()?.sync_all()?));
        if written.is_err() || !output.changed {
            // If it cannot be removed, the next pass or start does it.
            let _ = std::fs::remove_file(output.new.path());
        }
        written?;
        output.new.close();
        Ok(output.changed.then_some(output.new))
    }

    fn write_all(
        &self,
        group: &[Closed],
        filter: &mut Filter<'_>,
        output: &mut Output,
    ) -> Result<(), Abandoned> {
        for segment in group {
            self.each_batch(segment, |header, batch| {
                if header.record_count == 0 {
                    if (self.is_last_of_producer)(header) {
                        output.push(batch, header)?;
                    } else {
                        // A placeholder, of no producer, is made anew where it is still needed.
                        output.changed |= header.is_idempotent();
                    }
                    return Ok(None::<()>);
                }
                match filter.apply(header, batch) {
                    Ok(Kept::Whole) => output.push(batch, header)?,
                    Ok(Kept::Rewritten(mut new)) => output.replace(&mut new)?,
                    Ok(Kept::Nothing) if (self.is_last_of_producer)(header) => {
                        output.replace(&mut batch::emptied(header))?;
                    }
                    Ok(Kept::Nothing) => output.changed = true,
                    Err(bad) => {
                        tracing::debug!(offset = header.base_offset, %bad, "a batch whose records cannot be read is kept whole");
                        output.push(batch, header)?;
                    }
                }
                Ok(None)
            })?;
        }
        Ok(())
    }

    /// Calls `each` for the batches of a segment, until one gives something.
    fn each_batch<T>(
        &self,
        segment: &Closed,
        mut each: impl FnMut(&Header, &mut [u8]) -> Result<Option<T>, Abandoned>,
    ) -> Result<Option<T>, Abandoned> {
        let file = File::open(&segment.path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Abandoned::Unwanted,
            _ => error.into(),
        })?;
        let mut batches = Batches::new(&file, segment.base_offset, segment.len, Depth::Checksums);
        let mut offset = segment.base_offset;
        while let Some(next) = batches.next()? {
            if (self.is_unwanted)() {
                return Err(Abandoned::Unwanted);
            }
            let header = next.map_err(|bad| Abandoned::Damaged {
                file: segment.path.clone(),
                offset,
                bad,
            })?;
            offset = header.next_offset();
            if let Some(found) = each(&header, batches.bytes())? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

/// Segments next to each other that are small enough to become one.
fn groups(segments: &[Closed], segment_bytes: u64) -> impl Iterator<Item = &[Closed]> {
    let mut left = segments;
    std::iter::from_fn(move || {
        let mut bytes = left.first()?.len;
        let more = left[1..].iter().take_while(|segment| {
            bytes += segment.len;
            bytes <= segment_bytes
        });
        let (group, rest) = left.split_at(1 + more.count());
        left = rest;
        Some(group)
    })
}

/// Notes the keys of a batch from an offset on; the offset of the first that there was no room for, if any.
fn note_keys(
    header: &Header,
    batch: &[u8],
    from: i64,
    latest: &mut LatestKeys,
) -> Result<Option<i64>, BadRecords> {
    let mut records = Records::open(header, batch)?;
    while let Some(record) = records.next()? {
        let offset = header.base_offset + record.offset_delta;
        if let Some(key) = record.key
            && offset >= from
            && !latest.note(key, offset)
        {
            return Ok(Some(offset));
        }
    }
    Ok(None)
}

/// The file that is to replace some others.
struct Output {
    new: Segment,
    /// Whether anything in it is not as it was.
    changed: bool,
}

impl Output {
    /// Writes a batch that replaces one that was larger.
    fn replace(&mut self, batch: &mut [u8]) -> io::Result<()> {
        self.changed = true;
        let header = Header::parse(batch).map_err(io::Error::other)?;
        self.push(batch, &header)
    }

    fn push(&mut self, batch: &mut [u8], header: &Header) -> io::Result<()> {
        let mut gap = header.base_offset - self.new.next_offset();
        if i32::try_from(gap).is_err() {
            self.fill(header.base_offset)?;
            gap = 0;
        }
        let skipped = gap as i32;
        batch::set_skipped(batch, skipped);
        self.new.append(batch, &Header { skipped, ..*header })
    }

    /// Keeps the place of all offsets before `end` that nothing is left of.
    fn fill(&mut self, end: i64) -> io::Result<()> {
        while self.new.next_offset() < end {
            let gap = end - self.new.next_offset();
            let count = i32::try_from(gap).unwrap_or(i32::MAX);
            let batch = batch::placeholder(self.new.next_offset(), count);
            let header = Header::parse(&batch).map_err(io::Error::other)?;
            self.new.append(&batch, &header)?;
        }
        Ok(())
    }
}
