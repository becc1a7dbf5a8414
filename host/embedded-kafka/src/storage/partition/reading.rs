//! What readers get: batches from an offset on, and offsets by time.

use std::fs::File;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use kafka_protocol::ResponseError;
use tracing::error;

use super::super::batch::{self, Header};
use super::super::cursor::{Cursor, Place};
use super::super::lock;
use super::super::segment::Segment;
use super::{Partition, State};

/// What was read.
#[derive(Debug)]
pub(crate) struct Read {
    /// Whole batches; the first may begin before the offset asked for.
    pub(crate) records: Bytes,
    pub(crate) start: i64,
    pub(crate) high_watermark: i64,
}

impl Partition {
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
}
