//! The header of a record batch (format v2): all that the broker reads of the records it keeps.

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
const LAST_CODEC: i16 = 4;

/// The header of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) base_offset: i64,
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
        let counted =
            header.record_count > 0 && header.record_count - 1 == header.last_offset_delta;
        if counted
            && header
                .base_offset
                .checked_add(i64::from(header.record_count))
                .is_some()
        {
            Ok(header)
        } else {
            Err(BadBatch::Count)
        }
    }

    /// Reads the header and checks the whole of `batch`, which is exactly one batch.
    pub(crate) fn check(batch: &[u8]) -> Result<Self, BadBatch> {
        let header = Self::parse(batch)?;
        if header.len != batch.len() {
            return Err(BadBatch::Length((header.len - PREFIX_LEN) as i32));
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
        self.attributes & (TRANSACTIONAL | CONTROL) != 0
            || self.attributes & CODEC_MASK > LAST_CODEC
    }

    pub(crate) fn is_compressed(&self) -> bool {
        self.attributes & CODEC_MASK != 0
    }
}

/// Copies a batch into `into` with the offset that the broker gave it.
pub(crate) fn stamp(batch: &[u8], base_offset: i64, into: &mut Vec<u8>) {
    into.clear();
    into.extend_from_slice(batch);
    into[..8].copy_from_slice(&base_offset.to_be_bytes());
    into[LEADER_EPOCH].fill(0);
}

/// Offset and timestamp of the first record of a batch that is not older than `timestamp`.
///
/// The records of a compressed batch stay opaque: then the answer is the start of the batch, which is never too late.
pub(crate) fn find_timestamp(header: &Header, batch: &[u8], timestamp: i64) -> (i64, i64) {
    let start = (header.base_offset, header.base_timestamp);
    if header.is_compressed() || header.base_timestamp >= timestamp {
        return start;
    }
    let mut records = batch.get(HEADER_LEN..header.len).unwrap_or_default();
    for _ in 0..header.record_count {
        let Some((offset_delta, timestamp_delta)) = next_record(&mut records) else {
            break;
        };
        let found = header.base_timestamp.saturating_add(timestamp_delta);
        if !(0..=i64::from(header.last_offset_delta)).contains(&offset_delta) {
            // Nobody has looked into the records before: these are none.
            break;
        }
        if found >= timestamp {
            return (header.base_offset + offset_delta, found);
        }
    }
    start
}

/// Offset delta and timestamp delta of the record at the start of `records`, which then begins with the next one.
fn next_record(records: &mut &[u8]) -> Option<(i64, i64)> {
    let len = usize::try_from(varint(records)?).ok()?;
    let (mut record, rest) = records.split_at_checked(len)?;
    *records = rest;
    record = record.get(1..)?; // attributes
    let timestamp_delta = varint(&mut record)?;
    let offset_delta = varint(&mut record)?;
    Some((offset_delta, timestamp_delta))
}

/// A zigzag varint.
fn varint(bytes: &mut &[u8]) -> Option<i64> {
    const MAX_VARINT_BYTES: usize = 10;
    let mut value = 0u64;
    for i in 0..MAX_VARINT_BYTES {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << (7 * i);
        if byte < 0x80 {
            return Some((value >> 1) as i64 ^ -((value & 1) as i64));
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
