//! Records as they travel through the host: owned bytes, untouched.

use std::sync::Arc;

/// A record header. Names may repeat; `None` is Kafka's null, which is not the same as no bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The header's name.
    pub name: String,
    /// The header's bytes.
    pub value: Option<Vec<u8>>,
}

impl Header {
    /// A header with a value.
    pub fn new(name: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self {
            name: name.into(),
            value: Some(value.into()),
        }
    }
}

/// One record read from the log, with its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The topic that it was read from.
    pub topic: Arc<str>,
    /// The partition of the topic, from 0.
    pub partition: i32,
    /// Its offset in the partition.
    pub offset: i64,
    /// Milliseconds since the Unix epoch, where the record carries a timestamp.
    pub timestamp: Option<i64>,
    /// The key, byte for byte.
    pub key: Option<Vec<u8>>,
    /// The value, byte for byte; `None` is a tombstone.
    pub value: Option<Vec<u8>>,
    /// The headers, in their order.
    pub headers: Vec<Header>,
}

impl Record {
    /// Bytes of key, value and headers together: what batches and buffers are measured by.
    pub fn size(&self) -> usize {
        payload_size(self.key.as_deref(), self.value.as_deref(), &self.headers)
    }
}

/// One record to be appended to the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// The topic to append to.
    pub topic: Arc<str>,
    /// The partition, or `None` for the key's partition (Java's murmur2, as other clients choose).
    pub partition: Option<i32>,
    /// Milliseconds since the Unix epoch, or `None` for now.
    pub timestamp: Option<i64>,
    /// The key.
    pub key: Option<Vec<u8>>,
    /// The value; `None` is a tombstone.
    pub value: Option<Vec<u8>>,
    /// The headers, in their order.
    pub headers: Vec<Header>,
}

impl Outgoing {
    /// Bytes of key, value and headers together.
    pub fn size(&self) -> usize {
        payload_size(self.key.as_deref(), self.value.as_deref(), &self.headers)
    }
}

fn payload_size(key: Option<&[u8]>, value: Option<&[u8]>, headers: &[Header]) -> usize {
    let headers: usize = headers
        .iter()
        .map(|h| h.name.len() + h.value.as_ref().map_or(0, Vec::len))
        .sum();
    key.map_or(0, <[u8]>::len) + value.map_or(0, <[u8]>::len) + headers
}
