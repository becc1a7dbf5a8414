//! Records as librdkafka hands them over, made our own: a borrowed one would pin its whole fetch.

use std::sync::Arc;

use rdkafka::message::{BorrowedMessage, Headers, Message};
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

/// Kafka has header names in UTF-8; librdkafka's wrapper panics on others, which a record must not cause.
fn headers(message: &BorrowedMessage<'_>) -> Vec<Header> {
    let Some(headers) = message.headers() else {
        return Vec::new();
    };
    let read = || {
        headers
            .iter()
            .map(|h| Header {
                name: h.key.to_string(),
                value: h.value.map(<[u8]>::to_vec),
            })
            .collect()
    };
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)).unwrap_or_else(|_| {
        error!(
            topic = message.topic(),
            partition = message.partition(),
            offset = message.offset(),
            "a header's name is not UTF-8: the record goes on without its headers"
        );
        Vec::new()
    })
}
