//! The records of a batch, one after the other. Only who must know keys or times looks at them.

use std::io::{self, BufReader, Read};

use super::batch::{HEADER_LEN, Header};
use super::codec::{self, Encoder, MAX_UNCOMPRESSED};

const MAX_VARINT_BYTES: usize = 10;
const READ_BUFFER: usize = 8 << 10;

/// Why records cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadRecords {
    #[error("they cannot be decompressed: {0}")]
    Codec(#[from] io::Error),
    #[error("one of them is malformed")]
    Malformed,
}

/// Reads the records of a batch.
pub(crate) struct Records<'a> {
    source: BufReader<Box<dyn Read + 'a>>,
    /// Records that are still to come, as the header says.
    left: i32,
    last_offset_delta: i64,
    bytes: Vec<u8>,
}

/// A record.
pub(crate) struct Record<'a> {
    attributes: u8,
    pub(crate) timestamp_delta: i64,
    /// Within its batch.
    pub(crate) offset_delta: i64,
    pub(crate) key: Option<&'a [u8]>,
    /// Without a value, it is a tombstone of its key.
    pub(crate) has_value: bool,
    /// Key, value and headers, as they are.
    content: &'a [u8],
}

impl<'a> Records<'a> {
    /// `batch`: the whole batch.
    pub(crate) fn open(header: &Header, batch: &'a [u8]) -> Result<Self, BadRecords> {
        let bytes = batch
            .get(HEADER_LEN..header.len)
            .ok_or(BadRecords::Malformed)?;
        let source = codec::decoder(header.codec(), bytes)?;
        Ok(Self {
            source: BufReader::with_capacity(READ_BUFFER, source),
            left: header.record_count,
            last_offset_delta: i64::from(header.last_offset_delta),
            bytes: Vec::new(),
        })
    }

    /// The next record.
    pub(crate) fn next(&mut self) -> Result<Option<Record<'_>>, BadRecords> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        let len = self
            .read_varint()
            .and_then(|len| u64::try_from(len).ok())
            .filter(|len| *len <= MAX_UNCOMPRESSED)
            .ok_or(BadRecords::Malformed)?;
        self.bytes.clear();
        let read = (&mut self.source).take(len).read_to_end(&mut self.bytes)?;
        if read as u64 != len {
            return Err(BadRecords::Malformed);
        }
        let record = Record::parse(&self.bytes).ok_or(BadRecords::Malformed)?;
        if (0..=self.last_offset_delta).contains(&record.offset_delta) {
            Ok(Some(record))
        } else {
            Err(BadRecords::Malformed)
        }
    }

    fn read_varint(&mut self) -> Option<i64> {
        let mut bytes = [0; MAX_VARINT_BYTES];
        for i in 0..MAX_VARINT_BYTES {
            self.source.read_exact(&mut bytes[i..=i]).ok()?;
            if bytes[i] < 0x80 {
                return varint(&mut &bytes[..=i]);
            }
        }
        None
    }
}

impl<'a> Record<'a> {
    fn parse(mut bytes: &'a [u8]) -> Option<Self> {
        let bytes = &mut bytes;
        let (&attributes, rest) = bytes.split_first()?;
        *bytes = rest;
        let timestamp_delta = varint(bytes)?;
        let offset_delta = varint(bytes)?;
        let content = *bytes;
        let key = blob(bytes)?;
        let has_value = blob(bytes)?.is_some();
        Some(Self {
            attributes,
            timestamp_delta,
            offset_delta,
            key,
            has_value,
            content,
        })
    }

    /// Writes the record, with a time counted from another base.
    pub(crate) fn write(&self, timestamp_delta: i64, into: &mut Encoder) -> io::Result<()> {
        let mut start = vec![self.attributes];
        push_varint(&mut start, timestamp_delta);
        push_varint(&mut start, self.offset_delta);
        let mut len = Vec::with_capacity(MAX_VARINT_BYTES);
        push_varint(&mut len, (start.len() + self.content.len()) as i64);
        into.write(&len)?;
        into.write(&start)?;
        into.write(self.content)
    }
}

/// Whether all records of a batch have a key.
pub(crate) fn have_keys(header: &Header, batch: &[u8]) -> Result<bool, BadRecords> {
    let mut records = Records::open(header, batch)?;
    while let Some(record) = records.next()? {
        if record.key.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Bytes behind their length, where -1 stands for null.
fn blob<'a>(bytes: &mut &'a [u8]) -> Option<Option<&'a [u8]>> {
    let len = varint(bytes)?;
    if len == -1 {
        return Some(None);
    }
    let (blob, rest) = bytes.split_at_checked(usize::try_from(len).ok()?)?;
    *bytes = rest;
    Some(Some(blob))
}

/// A zigzag varint.
fn varint(bytes: &mut &[u8]) -> Option<i64> {
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

fn push_varint(into: &mut Vec<u8>, value: i64) {
    let mut value = (value << 1 ^ value >> 63) as u64;
    while value >= 0x80 {
        into.push(value as u8 | 0x80);
        value >>= 7;
    }
    into.push(value as u8);
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::super::batch::{assemble, placeholder};
    use super::*;

    /// Records with a header each, in the codec.
    pub(crate) fn encoded(records: &[(&str, Option<&str>)], codec: i16) -> Vec<u8> {
        let mut encoder = Encoder::new(codec).unwrap();
        for ((key, value), offset_delta) in records.iter().zip(0..) {
            let mut content = Vec::new();
            push_varint(&mut content, key.len() as i64);
            content.extend_from_slice(key.as_bytes());
            push_varint(&mut content, value.map_or(-1, |value| value.len() as i64));
            content.extend_from_slice(value.unwrap_or_default().as_bytes());
            content.extend([2, 2, b'h', 2, b'1']);
            let record = Record {
                attributes: 0,
                timestamp_delta: 0,
                offset_delta,
                key: Some(key.as_bytes()),
                has_value: value.is_some(),
                content: &content,
            };
            record.write(0, &mut encoder).unwrap();
        }
        encoder.finish().unwrap()
    }

    /// The content of a record: key, value and headers.
    pub(crate) fn content<'a>(record: &'a Record<'_>) -> &'a [u8] {
        record.content
    }

    proptest! {
        /// Whatever is in a batch, in whatever codec: it is read or refused.
        #[test]
        fn any_bytes_are_read_without_harm(
            codec in 0i16..5,
            count in 0i32..20,
            start in prop::sample::select(vec![&b""[..], b"\x82SNAPPY\0\0\0\0\x01\0\0\0\x01", b"\x1f\x8b\x08\0\0\0\0\0\0\xff", b"\x04\x22\x4d\x18", b"\x28\xb5\x2f\xfd"]),
            bytes in prop::collection::vec(prop_oneof![Just(0u8), Just(2), Just(255), any::<u8>()], 0..200),
        ) {
            let header = Header::parse(&placeholder(7, 20)).unwrap();
            let header = Header { attributes: codec, record_count: count, ..header };
            let batch = assemble(&header, &[start, &bytes].concat());
            let header = Header::parse(&batch).unwrap();
            if let Ok(mut records) = Records::open(&header, &batch) {
                while let Ok(Some(record)) = records.next() {
                    prop_assert!((0..20).contains(&record.offset_delta));
                }
            }
        }

        #[test]
        fn varints_are_read_as_they_were_written(value: i64) {
            let mut bytes = Vec::new();
            push_varint(&mut bytes, value);
            prop_assert_eq!(varint(&mut &bytes[..]), Some(value));
        }
    }
}
