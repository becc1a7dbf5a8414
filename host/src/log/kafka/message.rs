//! Records as librdkafka hands them over, made our own: a borrowed one would pin its whole fetch. And headers whatever bytes their
//! names have, which rdkafka's wrapper takes for text.

use std::ffi::CStr;
use std::sync::Arc;

use rdkafka::bindings::{
    rd_kafka_header_add, rd_kafka_header_get, rd_kafka_header_get_all, rd_kafka_headers_t,
};
use rdkafka::message::{BorrowedHeaders, BorrowedMessage, Message, OwnedHeaders};
use rdkafka::types::RDKafkaRespErr;
use tracing::error;

use crate::record::{Header, Record};

/// The record, byte for byte. `topic` is shared by all of its partition.
pub(super) fn owned(message: &BorrowedMessage<'_>, topic: &Arc<str>) -> Record {
    Record {
        topic: topic.clone(),
        partition: message.partition(),
        offset: message.offset(),
        timestamp: message.timestamp().to_millis(),
        key: message.key().map(<[u8]>::to_vec),
        value: message.payload().map(<[u8]>::to_vec),
        headers: headers(message),
    }
}

/// A header's name, which may be any bytes, and its value.
pub type RawHeader = (Vec<u8>, Option<Vec<u8>>);

/// The record's headers as they stand in the log.
pub(super) fn raw_headers(message: &BorrowedMessage<'_>) -> Vec<RawHeader> {
    let headers = read(message, |name, value| {
        Some((name.to_vec(), value.map(<[u8]>::to_vec)))
    });
    headers.unwrap_or_default()
}

/// Stages have header names as text.
fn headers(message: &BorrowedMessage<'_>) -> Vec<Header> {
    let headers = read(message, |name, value| {
        Some(Header {
            name: std::str::from_utf8(name).ok()?.to_owned(),
            value: value.map(<[u8]>::to_vec),
        })
    });
    headers.unwrap_or_else(|| {
        error!(
            topic = message.topic(),
            partition = message.partition(),
            offset = message.offset(),
            "a header's name is not UTF-8: the record goes on without its headers"
        );
        Vec::new()
    })
}

/// Each header as `made` makes it; `None` where one could not be made.
fn read<H>(
    message: &BorrowedMessage<'_>,
    made: impl Fn(&[u8], Option<&[u8]>) -> Option<H>,
) -> Option<Vec<H>> {
    let Some(headers) = message.headers() else {
        return Some(Vec::new());
    };
    let mut all = Vec::new();
    while let Some(found) = header(headers, all.len()) {
        if found.is_cut {
            error!(
                topic = message.topic(),
                partition = message.partition(),
                offset = message.offset(),
                "a header without a value has a NUL in its name: the name goes on as far as that"
            );
        }
        all.push(made(found.name, found.value)?);
    }
    Some(all)
}

struct Found<'a> {
    name: &'a [u8],
    value: Option<&'a [u8]>,
    /// The name goes on behind a NUL.
    is_cut: bool,
}

/// rdkafka's own wrapper panics on names that are not UTF-8, and cuts those with a NUL short.
#[allow(unsafe_code, reason = "rdkafka shows header names as text only")]
fn header(headers: &BorrowedHeaders, index: usize) -> Option<Found<'_>> {
    let native = std::ptr::from_ref(headers).cast::<rd_kafka_headers_t>();
    let (mut name, mut value, mut size) = (std::ptr::null(), std::ptr::null(), 0);
    // SAFETY: a reference to `BorrowedHeaders` is librdkafka's own pointer, and what it answers lives as long. A name ends with
    // a NUL. A header is one allocation of its name, a NUL and its value (`rdkafka_header.h`), so where it has a value, the
    // name is what stands before; a test holds that against the librdkafka that is linked.
    unsafe {
        let answer = rd_kafka_header_get_all(native, index, &mut name, &mut value, &mut size);
        if answer != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
            return None;
        }
        if value.is_null() {
            let is_cut = {
                let (mut value, mut size) = (std::ptr::null(), 0);
                let answer = rd_kafka_header_get(native, 0, name, &mut value, &mut size);
                answer != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR
            };
            return Some(Found {
                name: CStr::from_ptr(name).to_bytes(),
                value: None,
                is_cut,
            });
        }
        let length = value.cast::<u8>().offset_from(name.cast::<u8>()) - 1;
        Some(Found {
            name: std::slice::from_raw_parts(name.cast(), usize::try_from(length).ok()?),
            value: Some(std::slice::from_raw_parts(value.cast(), size)),
            is_cut: false,
        })
    }
}

/// Headers to be sent.
#[allow(unsafe_code, reason = "rdkafka takes header names as text only")]
pub(super) fn to_send(headers: &[RawHeader]) -> OwnedHeaders {
    let owned = OwnedHeaders::new_with_capacity(headers.len());
    let native = std::ptr::from_ref(owned.as_borrowed()).cast::<rd_kafka_headers_t>();
    for (name, value) in headers {
        let (value, size) = match value {
            Some(value) => (value.as_ptr(), value.len().cast_signed()),
            None => (std::ptr::null(), 0),
        };
        // SAFETY: the pointer is librdkafka's own, and as long as nobody else has `owned` it may be written through. What it is
        // given is copied. There is no error but want of memory, at which it ends the process.
        unsafe {
            let (name, length) = (name.as_ptr(), name.len().cast_signed());
            rd_kafka_header_add(native.cast_mut(), name.cast(), length, value.cast(), size);
        }
    }
    owned
}

#[cfg(test)]
mod tests {
    use rdkafka::message::Header as KafkaHeader;

    use super::*;

    #[test]
    fn names_and_values_are_read_byte_for_byte() {
        let long = "x".repeat(100_000);
        let cases: &[(&str, Option<&[u8]>)] = &[
            ("a", Some(b"1")),
            ("a", None),
            ("a", Some(b"")),
            ("", Some(b"\0")),
            ("", None),
            ("with\0NUL", Some(b"v\0v")),
            ("\0", Some(b"")),
            (&long, Some(b"v")),
        ];
        let mut headers = OwnedHeaders::new();
        for (key, value) in cases {
            headers = headers.insert(KafkaHeader { key, value: *value });
        }
        for (index, (name, value)) in cases.iter().enumerate() {
            let found = header(headers.as_borrowed(), index).unwrap();
            assert_eq!((found.name, found.value), (name.as_bytes(), *value));
            assert!(!found.is_cut, "{name:?}");
        }
        assert!(header(headers.as_borrowed(), cases.len()).is_none());
    }

    #[test]
    fn names_of_any_bytes_are_sent() {
        let headers = [
            (b"\xff\0\xfe".to_vec(), Some(b"v".to_vec())),
            (b"\xff".to_vec(), None),
            (vec![], Some(vec![])),
        ];
        let sent = to_send(&headers);
        for (index, (name, value)) in headers.iter().enumerate() {
            let found = header(sent.as_borrowed(), index).unwrap();
            assert_eq!((found.name, found.value), (&name[..], value.as_deref()));
        }
    }

    #[test]
    fn a_name_that_had_to_be_cut_is_told() {
        let headers = OwnedHeaders::new().insert(KafkaHeader {
            key: "with\0NUL",
            value: None::<&[u8]>,
        });
        let found = header(headers.as_borrowed(), 0).unwrap();
        assert_eq!((found.name, found.is_cut), (&b"with"[..], true));
    }
}
