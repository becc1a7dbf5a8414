//! What stays of a batch.

use super::super::batch::{self, Header};
use super::super::codec::Encoder;
use super::super::records::{BadRecords, Record, Records};
use super::keys::LatestKeys;

/// Decides about records.
pub(super) struct Filter<'a> {
    pub(super) latest: &'a LatestKeys,
    /// Up to here the newest offsets are known; what is behind stays.
    pub(super) end: i64,
    pub(super) now_ms: i64,
    /// How long a tombstone stays after the pass that found it: who reads from the start must have the time to see it.
    pub(super) delete_retention_ms: i64,
    /// When the first of the tombstones that were kept may go.
    pub(super) next_horizon: Option<i64>,
}

/// What stays of a batch.
pub(super) enum Kept {
    Whole,
    /// The batch that takes its place.
    Rewritten(Vec<u8>),
    Nothing,
}

/// What is known of a batch after its records were seen once.
#[derive(Default)]
struct Seen {
    stays: Vec<bool>,
    max_timestamp: Option<i64>,
    has_tombstone: bool,
}

impl Filter<'_> {
    pub(super) fn apply(&mut self, header: &Header, batch: &[u8]) -> Result<Kept, BadRecords> {
        let seen = self.look(header, batch)?;
        let staying = seen.stays.iter().filter(|stays| **stays).count();
        if staying == 0 {
            return Ok(Kept::Nothing);
        }
        let begins_horizon = seen.has_tombstone && header.delete_horizon().is_none();
        let horizon = match header.delete_horizon() {
            Some(horizon) => horizon,
            None => self.now_ms.saturating_add(self.delete_retention_ms),
        };
        if seen.has_tombstone {
            self.next_horizon = Some(self.next_horizon.map_or(horizon, |next| next.min(horizon)));
        }
        if staying == seen.stays.len() && !begins_horizon {
            return Ok(Kept::Whole);
        }
        let mut new = Header {
            record_count: staying as i32,
            max_timestamp: seen.max_timestamp.unwrap_or(header.max_timestamp),
            ..*header
        };
        if begins_horizon {
            new = new.with_delete_horizon(horizon);
        }
        rewrite(header, &new, batch, &seen.stays).map(Kept::Rewritten)
    }

    fn look(&self, header: &Header, batch: &[u8]) -> Result<Seen, BadRecords> {
        let mut seen = Seen::default();
        let mut records = Records::open(header, batch)?;
        while let Some(record) = records.next()? {
            let stays = self.stays(header, &record);
            if stays {
                let timestamp = header.base_timestamp.saturating_add(record.timestamp_delta);
                seen.max_timestamp = seen.max_timestamp.max(Some(timestamp));
                let offset = header.base_offset + record.offset_delta;
                seen.has_tombstone |= !record.has_value && offset < self.end;
            }
            seen.stays.push(stays);
        }
        Ok(seen)
    }

    fn stays(&self, header: &Header, record: &Record<'_>) -> bool {
        let offset = header.base_offset + record.offset_delta;
        if offset >= self.end {
            return true;
        }
        let Some(key) = record.key else {
            // From before the topic was compacted: nothing could ever replace it.
            return false;
        };
        let is_expired = !record.has_value
            && header
                .delete_horizon()
                .is_some_and(|horizon| horizon < self.now_ms);
        !is_expired && self.latest.is_latest(key, offset)
    }
}

/// The records that stay, in the codec that they had.
fn rewrite(
    old: &Header,
    new: &Header,
    batch: &[u8],
    stays: &[bool],
) -> Result<Vec<u8>, BadRecords> {
    let mut records = Records::open(old, batch)?;
    let mut encoder = Encoder::new(old.codec())?;
    let moved = old.base_timestamp.wrapping_sub(new.base_timestamp);
    for stays in stays {
        if let (Some(record), true) = (records.next()?, *stays) {
            record.write(record.timestamp_delta.wrapping_add(moved), &mut encoder)?;
        }
    }
    Ok(batch::assemble(new, &encoder.finish()?))
}
