//! A record as a line of JSON: what `host consume` prints, and `host produce --json` reads.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::{self, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::log::kafka::RawHeader;
use crate::log::kafka::tail::TailRecord;

/// A record with its place, as it is printed.
#[derive(Serialize)]
struct PlacedLine<'a> {
    topic: &'a str,
    partition: i32,
    offset: i64,
    timestamp: Option<i64>,
    key: Option<Bytes<'a>>,
    value: Option<Bytes<'a>>,
    headers: Vec<LineHeader<'a>>,
}

#[derive(Serialize)]
struct LineHeader<'a> {
    name: Bytes<'a>,
    value: Option<Bytes<'a>>,
}

/// The record's line, without an end.
pub(super) fn write(topic: &str, record: &TailRecord) -> serde_json::Result<Vec<u8>> {
    let headers = record.headers.iter().map(|(name, value)| LineHeader {
        name: Bytes(name),
        value: value.as_deref().map(Bytes),
    });
    serde_json::to_vec(&PlacedLine {
        topic,
        partition: record.partition,
        offset: record.offset,
        timestamp: record.timestamp,
        key: record.key.as_deref().map(Bytes),
        value: record.value.as_deref().map(Bytes),
        headers: headers.collect(),
    })
}

/// Text as text; anything else as `{"base64": …}`, so that no byte is lost.
struct Bytes<'a>(&'a [u8]);

impl Serialize for Bytes<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(self.0) {
            Ok(text) => serializer.serialize_str(text),
            Err(_) => serializer.collect_map([("base64", STANDARD.encode(self.0))]),
        }
    }
}

/// A record as it is read. Only `value` must be there: a tombstone is to be meant.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Line {
    #[serde(default, rename = "topic")]
    _topic: Option<IgnoredAny>,
    #[serde(default)]
    pub(super) partition: Option<i32>,
    #[serde(default, rename = "offset")]
    _offset: Option<IgnoredAny>,
    /// Milliseconds since the Unix epoch.
    #[serde(default)]
    pub(super) timestamp: Option<i64>,
    #[serde(default, deserialize_with = "bytes_or_null")]
    pub(super) key: Option<Vec<u8>>,
    #[serde(deserialize_with = "bytes_or_null")]
    pub(super) value: Option<Vec<u8>>,
    #[serde(default, deserialize_with = "headers")]
    pub(super) headers: Vec<RawHeader>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadHeader {
    name: ReadBytes,
    #[serde(deserialize_with = "bytes_or_null")]
    value: Option<Vec<u8>>,
}

/// Reads a line; or why it is no record, with the column.
pub(super) fn read(line: &[u8]) -> Result<Line, String> {
    serde_json::from_slice(line).map_err(|error| {
        let (mut why, column) = (error.to_string(), error.column());
        let place = format!(" at line {} column {column}", error.line());
        if why.ends_with(&place) {
            why.truncate(why.len() - place.len());
        }
        format!("{why} (column {column})")
    })
}

fn bytes_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<u8>>, D::Error> {
    let bytes = Option::<ReadBytes>::deserialize(deserializer)?;
    Ok(bytes.map(|ReadBytes(bytes)| bytes))
}

fn headers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<RawHeader>, D::Error> {
    let headers = Vec::<ReadHeader>::deserialize(deserializer)?;
    let header = |read: ReadHeader| (read.name.0, read.value);
    Ok(headers.into_iter().map(header).collect())
}

struct ReadBytes(Vec<u8>);

impl<'de> Deserialize<'de> for ReadBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(BytesVisitor)
    }
}

struct BytesVisitor;

impl<'de> Visitor<'de> for BytesVisitor {
    type Value = ReadBytes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, or bytes as {\"base64\": \"…\"}")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<ReadBytes, E> {
        Ok(ReadBytes(text.as_bytes().to_vec()))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<ReadBytes, E> {
        Ok(ReadBytes(text.into_bytes()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ReadBytes, A::Error> {
        let entry = map.next_entry::<String, String>()?;
        let Some((_, text)) = entry.filter(|(key, _)| key == "base64") else {
            return Err(de::Error::invalid_type(de::Unexpected::Map, &self));
        };
        if map.next_key::<IgnoredAny>()?.is_some() {
            return Err(de::Error::custom("there is more than the bytes' base64"));
        }
        let bytes = STANDARD.decode(text);
        bytes
            .map(ReadBytes)
            .map_err(|error| de::Error::custom(format!("this is not base64: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: Option<&[u8]>, value: Option<&[u8]>) -> TailRecord {
        TailRecord {
            partition: 2,
            offset: 7,
            timestamp: Some(1_700_000_000_000),
            key: key.map(<[u8]>::to_vec),
            value: value.map(<[u8]>::to_vec),
            headers: vec![],
        }
    }

    #[test]
    fn lines_keep_every_byte() {
        let headers = [
            (&b"a"[..], Some("ü".as_bytes())),
            (b"a", None),
            (b"", Some(b"")),
            (b"with\0NUL\xff", Some(b"\xfe")),
        ];
        let owned =
            |(name, value): (&[u8], Option<&[u8]>)| (name.to_vec(), value.map(<[u8]>::to_vec));
        let written = TailRecord {
            headers: headers.map(owned).to_vec(),
            ..record(Some(b"\xff\x00"), None)
        };
        let line = write("t", &written).unwrap();
        assert_eq!(
            String::from_utf8_lossy(&line),
            r#"{"topic":"t","partition":2,"offset":7,"timestamp":1700000000000,"key":{"base64":"/wA="},"value":null,"headers":[{"name":"a","value":"ü"},{"name":"a","value":null},{"name":"","value":""},{"name":{"base64":"d2l0aABOVUz/"},"value":{"base64":"/g=="}}]}"#
        );
        let line = read(&line).unwrap();
        assert_eq!(
            (line.partition, line.timestamp),
            (Some(2), written.timestamp)
        );
        assert_eq!((line.key, line.value), (written.key, written.value));
        assert_eq!(line.headers, written.headers);
    }

    #[test]
    fn what_is_null_is_not_what_is_empty() {
        let values: [Option<&[u8]>; 5] = [None, Some(b""), Some(b"null"), Some(b"\0"), Some(b"{}")];
        for value in values {
            let line = write("t", &record(value, value)).unwrap();
            let line = read(&line).unwrap();
            assert_eq!((line.key.as_deref(), line.value.as_deref()), (value, value));
        }
    }

    #[test]
    fn lines_that_are_no_records() {
        let check = |line: &str, expected: &str| {
            let why = read(line.as_bytes()).unwrap_err();
            assert_eq!(why, expected, "{line}");
        };
        check("{}", "missing field `value` (column 2)");
        check(
            r#"{"value":1}"#,
            "invalid type: integer `1`, expected a text, or bytes as {\"base64\": \"…\"} (column 10)",
        );
        check(
            r#"{"value":{"a":"b"}}"#,
            "invalid type: map, expected a text, or bytes as {\"base64\": \"…\"} (column 18)",
        );
        check(
            r#"{"value":{"base64":"?"}}"#,
            "this is not base64: Invalid symbol 63, offset 0. (column 23)",
        );
        check(
            r#"{"value":"","keys":"k"}"#,
            "unknown field `keys`, expected one of `topic`, `partition`, `offset`, `timestamp`, `key`, `value`, `headers` (column 18)",
        );
        check("value", "expected value (column 1)");
    }
}
