//! The header of a record batch (format v2): all that the broker reads of most records it keeps.

use super::records::Records;

/// Bytes of the header; the records follow.
pub(crate) const HEADER_LEN: usize = 61;

/// Bytes of the base offset and of the length, which the length does not count.
const PREFIX_LEN: usize = 12;
/// The checksum is over everything from here on.
const CHECKED_FROM: usize = 21;
/// The base offset and the leader epoch are the broker's to write; the checksum leaves them out.
const LEADER_EPOCH: std::ops::Range<usize> = 12..16;

const MAGIC: i8 = 2;
const CODEC_MASK: i16 = 0b111;
const TRANSACTIONAL: i16 = 1 << 4;
const CONTROL: i16 = 1 << 5;
/// The base timestamp is the time at which compaction may remove the tombstones of the batch, as Kafka has it.
const DELETE_HORIZON: i16 = 1 << 6;
const LAST_CODEC: i16 = 4;

/// The header of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) base_offset: i64,
    /// Offsets before the batch whose records were compacted away. On the disk it stands where a client is told the
    /// leader epoch, so that a segment says of each of its offsets what became of it.
    pub(crate) skipped: i32,
    /// Bytes of the whole batch, header included.
    pub(crate) len: usize,
    pub(crate) crc: u32,
    pub(crate) attributes: i16,
    pub(crate) last_offset_delta: i32,
    pub(crate) base_timestamp: i64,
    pub(crate) max_timestamp: i64,
    /// -1: not of an idempotent producer.
    pub(crate) producer_id: i64,
    pub(crate) producer_epoch: i16,
    pub(crate) base_sequence: i32,
    pub(crate) record_count: i32,
}

/// Why bytes are not a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadBatch {
    #[error("fewer bytes than a batch header has")]
    Short,
    #[error("a batch of format {0}, where only format 2 is known")]
    Magic(i8),
    #[error("a batch whose length is {0}")]
    Length(i32),
    #[error("a batch that counts its records wrongly")]
    Count,
    #[error("a batch whose checksum is wrong")]
    Checksum,
    #[error("a batch of offset {found} where offset {expected} belongs")]
    Offset { expected: i64, found: i64 },
}

impl Header {
    /// Reads the header at the start of `bytes`, which may end with it.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, BadBatch> {
        let Some(bytes) = bytes.first_chunk::<HEADER_LEN>() else {
            return Err(BadBatch::Short);
        };
        let magic = bytes[16] as i8;
        if magic != MAGIC {
            return Err(BadBatch::Magic(magic));
        }
        let length = i32::from_be_bytes(field(bytes, 8));
        let len = usize::try_from(length).unwrap_or(0) + PREFIX_LEN;
        if len < HEADER_LEN {
            return Err(BadBatch::Length(length));
        }
        let header = Self {
            base_offset: i64::from_be_bytes(field(bytes, 0)),
            skipped: i32::from_be_bytes(field(bytes, LEADER_EPOCH.start)).max(0),
            len,
            crc: u32::from_be_bytes(field(bytes, 17)),
            attributes: i16::from_be_bytes(field(bytes, 21)),
            last_offset_delta: i32::from_be_bytes(field(bytes, 23)),
            base_timestamp: i64::from_be_bytes(field(bytes, 27)),
            max_timestamp: i64::from_be_bytes(field(bytes, 35)),
            producer_id: i64::from_be_bytes(field(bytes, 43)),
            producer_epoch: i16::from_be_bytes(field(bytes, 51)),
            base_sequence: i32::from_be_bytes(field(bytes, 53)),
            record_count: i32::from_be_bytes(field(bytes, 57)),
        };
        // Fewer records than offsets, or none, are left by compaction.
        let counted = header.last_offset_delta >= 0
            && header.record_count >= 0
            && i64::from(header.record_count) <= i64::from(header.last_offset_delta) + 1;
        if counted
            && header
                .base_offset
                .checked_add(i64::from(header.last_offset_delta) + 1)
                .is_some()
        {
            Ok(header)
        } else {
            Err(BadBatch::Count)
        }
    }

    /// Reads the header and checks the whole of `batch`, which is exactly one batch as a producer makes it.
    pub(crate) fn check(batch: &[u8]) -> Result<Self, BadBatch> {
        let header = Self::parse(batch)?;
        if header.len != batch.len() {
            return Err(BadBatch::Length((header.len - PREFIX_LEN) as i32));
        }
        if !header.is_whole() {
            return Err(BadBatch::Count);
        }
        header.verify(batch)?;
        Ok(header)
    }

    /// Compares the checksum; `batch` holds the whole batch.
    pub(crate) fn verify(&self, batch: &[u8]) -> Result<(), BadBatch> {
        let checked = batch.get(CHECKED_FROM..self.len).ok_or(BadBatch::Short)?;
        if crc32c::crc32c(checked) == self.crc {
            Ok(())
        } else {
            Err(BadBatch::Checksum)
        }
    }

    /// The offset after that of the batch before this one.
    pub(crate) fn first_offset(&self) -> i64 {
        self.base_offset - i64::from(self.skipped)
    }

    /// Whether each offset of the batch has its record.
    fn is_whole(&self) -> bool {
        self.record_count - 1 == self.last_offset_delta
    }

    /// When the tombstones of the batch may go, if a compaction said so.
    pub(crate) fn delete_horizon(&self) -> Option<i64> {
        (self.attributes & DELETE_HORIZON != 0).then_some(self.base_timestamp)
    }

    pub(crate) fn codec(&self) -> i16 {
        self.attributes & CODEC_MASK
    }

    /// The offset after the last record.
    pub(crate) fn next_offset(&self) -> i64 {
        self.base_offset + i64::from(self.last_offset_delta) + 1
    }

    /// The sequence of the last record; sequences go on from 0 after the largest `i32`.
    pub(crate) fn last_sequence(&self) -> i32 {
        self.base_sequence.wrapping_add(self.last_offset_delta) & i32::MAX
    }

    pub(crate) fn is_idempotent(&self) -> bool {
        self.producer_id >= 0
    }

    /// Whether the batch asks for what this broker does not do: transactions, control records, unknown codecs.
    pub(crate) fn is_unsupported(&self) -> bool {
        self.attributes & (TRANSACTIONAL | CONTROL | DELETE_HORIZON) != 0
            || self.attributes & CODEC_MASK > LAST_CODEC
    }
}

/// Copies a batch into `into` with the offset that the broker gave it.
pub(crate) fn stamp(batch: &[u8], base_offset: i64, into: &mut Vec<u8>) {
    into.clear();
    into.extend_from_slice(batch);
    into[..8].copy_from_slice(&base_offset.to_be_bytes());
    into[LEADER_EPOCH].fill(0);
}

/// Takes out what only the disk is told, before a batch goes to a client.
pub(crate) fn unstamp(batch: &mut [u8]) {
    batch[LEADER_EPOCH].fill(0);
}

/// Says on the disk how many offsets before the batch are gone.
pub(crate) fn set_skipped(batch: &mut [u8], skipped: i32) {
    batch[LEADER_EPOCH].copy_from_slice(&skipped.to_be_bytes());
}

/// A batch with these records, which are compressed as `header` says; its length and checksum are found here.
pub(crate) fn assemble(header: &Header, records: &[u8]) -> Vec<u8> {
    let mut batch = vec![0; HEADER_LEN];
    batch.extend_from_slice(records);
    let len = (batch.len() - PREFIX_LEN) as i32;
    batch[..8].copy_from_slice(&header.base_offset.to_be_bytes());
    batch[8..12].copy_from_slice(&len.to_be_bytes());
    batch[16] = MAGIC as u8;
    batch[21..23].copy_from_slice(&header.attributes.to_be_bytes());
    batch[23..27].copy_from_slice(&header.last_offset_delta.to_be_bytes());
    batch[27..35].copy_from_slice(&header.base_timestamp.to_be_bytes());
    batch[35..43].copy_from_slice(&header.max_timestamp.to_be_bytes());
    batch[43..51].copy_from_slice(&header.producer_id.to_be_bytes());
    batch[51..53].copy_from_slice(&header.producer_epoch.to_be_bytes());
    batch[53..57].copy_from_slice(&header.base_sequence.to_be_bytes());
    batch[57..61].copy_from_slice(&header.record_count.to_be_bytes());
    let crc = crc32c::crc32c(&batch[CHECKED_FROM..]);
    batch[17..21].copy_from_slice(&crc.to_be_bytes());
    batch
}

/// A batch without records: it keeps the place of `count` offsets from `base_offset` on.
pub(crate) fn placeholder(base_offset: i64, count: i32) -> Vec<u8> {
    let header = Header {
        base_offset,
        skipped: 0,
        len: HEADER_LEN,
        crc: 0,
        attributes: 0,
        last_offset_delta: count - 1,
        base_timestamp: -1,
        max_timestamp: -1,
        producer_id: -1,
        producer_epoch: -1,
        base_sequence: -1,
        record_count: 0,
    };
    assemble(&header, &[])
}

/// What is left of a batch when all its records are gone: what its producer sent last.
pub(crate) fn emptied(header: &Header) -> Vec<u8> {
    let header = Header {
        attributes: 0,
        base_timestamp: -1,
        max_timestamp: -1,
        record_count: 0,
        ..*header
    };
    assemble(&header, &[])
}

impl Header {
    /// With the base timestamp as the time when its tombstones may go.
    pub(crate) fn with_delete_horizon(self, horizon: i64) -> Self {
        Self {
            attributes: self.attributes | DELETE_HORIZON,
            base_timestamp: horizon,
            ..self
        }
    }
}

/// Offset and timestamp of the first record of a batch that is not older than `timestamp`. Where the records cannot be
/// read, for nobody has looked into them before, it is the start of the batch, which is never too late.
pub(crate) fn find_timestamp(header: &Header, batch: &[u8], timestamp: i64) -> (i64, i64) {
    let start = (header.base_offset, header.base_timestamp);
    if header.is_whole() && header.delete_horizon().is_none() && header.base_timestamp >= timestamp
    {
        return start;
    }
    first_record(header, batch, |of| of >= timestamp).unwrap_or(start)
}

/// Offset and timestamp of the first of the newest records of a batch.
pub(crate) fn find_newest(header: &Header, batch: &[u8]) -> (i64, i64) {
    let newest = header.max_timestamp;
    first_record(header, batch, |of| of >= newest).unwrap_or((header.base_offset, newest))
}

fn first_record(
    header: &Header,
    batch: &[u8],
    is_wanted: impl Fn(i64) -> bool,
) -> Option<(i64, i64)> {
    let mut records = Records::open(header, batch).ok()?;
    while let Some(record) = records.next().ok()? {
        let timestamp = header.base_timestamp.saturating_add(record.timestamp_delta);
        if is_wanted(timestamp) {
            return Some((header.base_offset + record.offset_delta, timestamp));
        }
    }
    None
}

fn field<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A batch of `count` records of `size` bytes that are not records, which is all the same to the broker.
    pub(crate) fn batch(count: i32, size: usize, producer: Option<(i64, i16, i32)>) -> Vec<u8> {
        let (id, epoch, sequence) = producer.unwrap_or((-1, -1, -1));
        let mut bytes = vec![0u8; HEADER_LEN];
        bytes.resize(HEADER_LEN + size, 7);
        let len = (bytes.len() - PREFIX_LEN) as i32;
        bytes[8..12].copy_from_slice(&len.to_be_bytes());
        bytes[16] = 2;
        bytes[23..27].copy_from_slice(&(count - 1).to_be_bytes());
        bytes[43..51].copy_from_slice(&id.to_be_bytes());
        bytes[51..53].copy_from_slice(&epoch.to_be_bytes());
        bytes[53..57].copy_from_slice(&sequence.to_be_bytes());
        bytes[57..61].copy_from_slice(&count.to_be_bytes());
        seal(&mut bytes);
        bytes
    }

    /// A batch of records with these keys and values, all of the time `timestamp`.
    pub(crate) fn keyed(
        records: &[(&str, Option<&str>)],
        codec: i16,
        timestamp: i64,
        producer: Option<(i64, i16, i32)>,
    ) -> Vec<u8> {
        let count = records.len() as i32;
        let (producer_id, producer_epoch, base_sequence) = producer.unwrap_or((-1, -1, -1));
        let header = Header {
            base_offset: 0,
            skipped: 0,
            len: 0,
            crc: 0,
            attributes: codec,
            last_offset_delta: count - 1,
            base_timestamp: timestamp,
            max_timestamp: timestamp,
            producer_id,
            producer_epoch,
            base_sequence,
            record_count: count,
        };
        assemble(
            &header,
            &super::super::records::tests::encoded(records, codec),
        )
    }

    /// Gives a batch the checksum of its content.
    pub(crate) fn seal(bytes: &mut [u8]) {
        let crc = crc32c::crc32c(&bytes[CHECKED_FROM..]);
        bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    }

    #[test]
    fn every_single_damaged_byte_is_seen() {
        let good = batch(3, 40, Some((5, 0, 9)));
        let header = Header::check(&good).unwrap();
        assert_eq!(
            (header.next_offset(), header.last_sequence(), header.len),
            (3, 11, 101)
        );
        // The offset and the leader epoch are not covered by the checksum.
        for at in (8..12).chain(16..good.len()) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            assert!(Header::check(&bad).is_err(), "byte {at}");
        }
        for len in 0..good.len() {
            assert!(Header::check(&good[..len]).is_err(), "cut to {len}");
        }
    }

    #[test]
    fn sequences_wrap_to_zero() {
        let header = Header::check(&batch(3, 0, Some((1, 0, i32::MAX)))).unwrap();
        assert_eq!(header.last_sequence(), 1);
    }

    #[test]
    fn the_first_record_that_is_not_older_is_found_inside_a_batch() {
        // Two records: length, attributes, timestamp delta, offset delta, empty key, empty value, no headers.
        let mut bytes = batch(2, 0, None);
        bytes.extend_from_slice(&[12, 0, 0, 0, 0, 0, 0]);
        bytes.extend_from_slice(&[12, 0, 20, 2, 0, 0, 0]);
        let len = (bytes.len() - PREFIX_LEN) as i32;
        bytes[8..12].copy_from_slice(&len.to_be_bytes());
        seal(&mut bytes);
        let header = Header::check(&bytes).unwrap();
        assert_eq!(find_timestamp(&header, &bytes, 0), (0, 0));
        assert_eq!(find_timestamp(&header, &bytes, 1), (1, 10));
        assert_eq!(find_timestamp(&header, &bytes, 10), (1, 10));
        assert_eq!(
            find_timestamp(&header, &bytes[..70], 10),
            (0, 0),
            "cut short"
        );
    }

    #[test]
    fn a_record_that_says_it_lies_outside_of_its_batch_is_not_believed() {
        // An offset delta of i64::MAX, of -1, and of 2 where the last is 1; in zigzag.
        for delta in [[&[0xfe][..], &[0xff; 8], &[1]].concat(), vec![1], vec![4]] {
            let record = [&[0, 20][..], &delta, &[0, 0, 0]].concat();
            let mut bytes = batch(2, 0, None);
            bytes.push(2 * record.len() as u8);
            bytes.extend(record);
            let len = (bytes.len() - PREFIX_LEN) as i32;
            bytes[8..12].copy_from_slice(&len.to_be_bytes());
            bytes[..8].copy_from_slice(&5i64.to_be_bytes());
            seal(&mut bytes);
            let header = Header::check(&bytes).unwrap();
            assert_eq!(find_timestamp(&header, &bytes, 10), (5, 0), "{delta:?}");
        }
    }
}
