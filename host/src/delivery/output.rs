//! Outputs as a transactional lane keeps them with its progress until the log has them.

use std::sync::Arc;

use serde::{Deserialize, Serialize, Serializer};

use super::seen::Seen;
use crate::record::{Header, Outgoing};

/// The first byte of what is encoded here: how the rest is read.
const FORMAT: u8 = 1;

/// What a row holds was not written by a host that this one understands.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// A newer host wrote it.
    #[error(
        "it has the format {0}, and this host reads {FORMAT}: run the newer version of the host"
    )]
    Format(u8),
    /// It is damaged.
    #[error("it is damaged: {0}")]
    Damaged(#[from] postcard::Error),
    /// It goes on where it should end.
    #[error("it is damaged: {0} bytes follow its end")]
    Longer(usize),
}

#[derive(Serialize, Deserialize)]
struct Stored<'a> {
    #[serde(borrow)]
    topic: &'a str,
    partition: Option<i32>,
    timestamp: Option<i64>,
    #[serde(borrow)]
    key: Option<Bytes<'a>>,
    #[serde(borrow)]
    value: Option<Bytes<'a>>,
    #[serde(borrow)]
    headers: Vec<(&'a str, Option<Bytes<'a>>)>,
}

/// Written in one go. Serde writes a slice byte by byte; postcard has both as their length and the bytes.
#[derive(Clone, Copy, Deserialize)]
struct Bytes<'a>(#[serde(borrow)] &'a [u8]);

impl Serialize for Bytes<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}

/// Encodes outputs, none as no bytes.
pub fn encode(outputs: &[Outgoing]) -> Result<Vec<u8>, Unreadable> {
    if outputs.is_empty() {
        return Ok(Vec::new());
    }
    let stored: Vec<_> = outputs.iter().map(stored).collect();
    to_bytes(&stored)
}

/// Reads what [`encode`] wrote.
pub fn decode(bytes: &[u8]) -> Result<Vec<Outgoing>, Unreadable> {
    let stored: Vec<Stored<'_>> = match body(bytes)? {
        Some(body) => whole(body)?,
        None => Vec::new(),
    };
    Ok(stored.into_iter().map(outgoing).collect())
}

/// Encodes what was seen.
pub fn encode_seen(seen: &Seen) -> Result<Vec<u8>, Unreadable> {
    to_bytes(seen)
}

/// Reads what [`encode_seen`] wrote; no bytes are nothing seen.
pub fn decode_seen(bytes: &[u8]) -> Result<Seen, Unreadable> {
    match body(bytes)? {
        Some(body) => whole(body),
        None => Ok(Seen::default()),
    }
}

fn to_bytes(value: &impl Serialize) -> Result<Vec<u8>, Unreadable> {
    Ok(postcard::to_extend(value, vec![FORMAT])?)
}

/// A value that takes all of the bytes.
fn whole<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Unreadable> {
    match postcard::take_from_bytes(body)? {
        (value, []) => Ok(value),
        (_, rest) => Err(Unreadable::Longer(rest.len())),
    }
}

fn body(bytes: &[u8]) -> Result<Option<&[u8]>, Unreadable> {
    match bytes.split_first() {
        None => Ok(None),
        Some((&FORMAT, body)) => Ok(Some(body)),
        Some((&format, _)) => Err(Unreadable::Format(format)),
    }
}

fn stored(output: &Outgoing) -> Stored<'_> {
    Stored {
        topic: &output.topic,
        partition: output.partition,
        timestamp: output.timestamp,
        key: output.key.as_deref().map(Bytes),
        value: output.value.as_deref().map(Bytes),
        headers: output
            .headers
            .iter()
            .map(|h| (h.name.as_str(), h.value.as_deref().map(Bytes)))
            .collect(),
    }
}

fn outgoing(stored: Stored<'_>) -> Outgoing {
    Outgoing {
        topic: Arc::from(stored.topic),
        partition: stored.partition,
        timestamp: stored.timestamp,
        key: stored.key.map(|key| key.0.to_vec()),
        value: stored.value.map(|value| value.0.to_vec()),
        headers: stored
            .headers
            .into_iter()
            .map(|(name, value)| Header {
                name: name.to_owned(),
                value: value.map(|value| value.0.to_vec()),
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_read_as_they_were_written() {
        let full = Outgoing {
            topic: Arc::from("t"),
            partition: Some(3),
            timestamp: Some(1),
            key: Some(vec![0, 255]),
            value: Some(vec![7; 1000]),
            headers: vec![
                Header::new("a", "b"),
                Header {
                    name: "null".into(),
                    value: None,
                },
            ],
        };
        let tombstone = Outgoing {
            partition: None,
            timestamp: None,
            key: None,
            value: None,
            headers: Vec::new(),
            ..full.clone()
        };
        let outputs = vec![full, tombstone];
        let bytes = encode(&outputs).expect("encoded");
        assert_eq!(decode(&bytes).expect("decoded"), outputs);
        assert_eq!(encode(&[]).expect("encoded"), Vec::<u8>::new());
        assert_eq!(decode(&[]).expect("decoded"), Vec::<Outgoing>::new());
    }

    /// Rows that are there were written so.
    #[test]
    fn outputs_are_written_as_ever() {
        let output = Outgoing {
            topic: Arc::from("t"),
            partition: Some(1),
            timestamp: None,
            key: Some(b"k".to_vec()),
            value: None,
            headers: vec![Header::new("h", "v")],
        };
        let bytes = encode(&[output]).expect("encoded");
        assert_eq!(
            bytes,
            b"\x01\x01\x01t\x01\x02\x00\x01\x01k\x00\x01\x01h\x01\x01v"
        );
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        assert!(matches!(decode(&[9, 1]), Err(Unreadable::Format(9))));
        assert!(matches!(
            decode(&[FORMAT, 200]),
            Err(Unreadable::Damaged(_))
        ));
        assert!(matches!(
            decode(&[FORMAT, 0, 7]),
            Err(Unreadable::Longer(1))
        ));
        let seen = encode_seen(&Seen::default()).expect("encoded");
        assert_eq!(decode_seen(&seen).expect("decoded"), Seen::default());
    }
}
