//! Reads batches of one segment, and checks each before anybody is told of it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use kafka_protocol::ResponseError;
use tracing::error;

use super::batch::{self, BadBatch, HEADER_LEN, Header};
use super::segment::IndexEntry;

/// A segment file, read up to the high watermark.
pub(crate) struct Cursor<'a> {
    partition: &'a str,
    file: Arc<File>,
    /// Bytes of the segment that may be read.
    limit: u64,
    high_watermark: i64,
}

/// A batch and where it begins in the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) header: Header,
    position: u64,
}

impl<'a> Cursor<'a> {
    /// `limit`: bytes of the file that may be read; `partition`: its name, for messages.
    pub(crate) fn new(
        partition: &'a str,
        file: Arc<File>,
        limit: u64,
        high_watermark: i64,
    ) -> Self {
        Self {
            partition,
            file,
            limit,
            high_watermark,
        }
    }

    /// The first batch from `entry` on that is `wanted`, if it is in this segment and below the high watermark.
    pub(crate) fn find(
        &self,
        entry: IndexEntry,
        wanted: impl Fn(&Header) -> bool,
    ) -> Result<Option<Place>, ResponseError> {
        self.find_from((entry.position, entry.offset), wanted)
    }

    fn find_from(
        &self,
        (mut position, mut offset): (u64, i64),
        wanted: impl Fn(&Header) -> bool,
    ) -> Result<Option<Place>, ResponseError> {
        while offset < self.high_watermark && position < self.limit {
            let mut bytes = [0; HEADER_LEN];
            self.read(position, &mut bytes)?;
            let header = self
                .header(&bytes, position, offset)
                .map_err(|bad| self.damaged(position, bad))?;
            if wanted(&header) {
                return Ok(Some(Place { header, position }));
            }
            position += header.len as u64;
            offset = header.next_offset();
        }
        Ok(None)
    }

    /// Of the batches from `entry` on that are `wanted`, the first of those with the largest timestamp.
    pub(crate) fn newest(
        &self,
        entry: IndexEntry,
        wanted: impl Fn(&Header) -> bool,
    ) -> Result<Option<Place>, ResponseError> {
        let mut newest: Option<Place> = None;
        let mut from = (entry.position, entry.offset);
        while let Some(place) = self.find_from(from, |header| {
            let known = newest.map_or(-1, |place| place.header.max_timestamp);
            wanted(header) && header.record_count > 0 && header.max_timestamp > known
        })? {
            let header = &place.header;
            from = (place.position + header.len as u64, header.next_offset());
            newest = Some(place);
        }
        Ok(newest)
    }

    /// Whole batches from `first` on, up to `max_bytes`; with `at_least_one`, the first however large it is.
    pub(crate) fn batches_from(
        &self,
        first: Place,
        max_bytes: usize,
        at_least_one: bool,
    ) -> Result<Bytes, ResponseError> {
        if first.header.len > max_bytes && !at_least_one {
            return Ok(Bytes::new());
        }
        let left = usize::try_from(self.limit - first.position).unwrap_or(usize::MAX);
        let mut buffer = vec![0; left.min(max_bytes.max(first.header.len))];
        self.read(first.position, &mut buffer)?;
        let (mut end, mut expected) = (0, first.header.first_offset());
        while expected < self.high_watermark && buffer.len() - end >= HEADER_LEN {
            let position = first.position + end as u64;
            match self.header(&buffer[end..], position, expected) {
                Ok(header) if header.len > buffer.len() - end => break,
                Ok(header) if header.verify(&buffer[end..]).is_ok() => {
                    batch::unstamp(&mut buffer[end..]);
                    end += header.len;
                    expected = header.next_offset();
                }
                // What is before the damage is good. Who reads on from there is told.
                Ok(_) | Err(_) if end > 0 => break,
                Ok(_) => return Err(self.damaged(position, BadBatch::Checksum)),
                Err(bad) => return Err(self.damaged(position, bad)),
            }
        }
        buffer.truncate(end);
        Ok(Bytes::from(buffer))
    }

    fn header(&self, bytes: &[u8], position: u64, expected: i64) -> Result<Header, BadBatch> {
        let header = Header::parse(bytes)?;
        if header.first_offset() != expected {
            return Err(BadBatch::Offset {
                expected,
                found: header.first_offset(),
            });
        }
        if header.len as u64 > self.limit - position {
            Err(BadBatch::Short)
        } else {
            Ok(header)
        }
    }

    fn read(&self, position: u64, into: &mut [u8]) -> Result<(), ResponseError> {
        self.file.read_exact_at(into, position).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.damaged(position, BadBatch::Short),
            _ => {
                error!(partition = self.partition, position, %error, "could not read a segment");
                ResponseError::KafkaStorageError
            }
        })
    }

    fn damaged(&self, position: u64, bad: BadBatch) -> ResponseError {
        error!(
            partition = self.partition,
            position, "a segment is damaged: {bad}; its records are not handed out from here on"
        );
        ResponseError::CorruptMessage
    }
}
