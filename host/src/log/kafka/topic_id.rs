//! The ids of topics: another one of the same name has another. rdkafka has no function for it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString, c_char};
use std::ptr;
use std::sync::Arc;

use rdkafka::bindings::{
    RD_KAFKA_EVENT_DESCRIBETOPICS_RESULT, rd_kafka_DescribeTopics,
    rd_kafka_DescribeTopics_result_topics, rd_kafka_TopicCollection_destroy,
    rd_kafka_TopicCollection_of_topic_names, rd_kafka_TopicDescription_error,
    rd_kafka_TopicDescription_name, rd_kafka_TopicDescription_t,
    rd_kafka_TopicDescription_topic_id, rd_kafka_Uuid_base64str,
    rd_kafka_Uuid_least_significant_bits, rd_kafka_Uuid_most_significant_bits, rd_kafka_admin_op_t,
    rd_kafka_error_code, rd_kafka_event_DescribeTopics_result,
};
use rdkafka::consumer::BaseConsumer;
use rdkafka::error::{IsError, RDKafkaErrorCode};

use super::membership::Context;
use super::question::{Event, Question};

/// What the log says of a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TopicId {
    Is(String),
    /// It tells none: it is older than Kafka 2.8, or the host's user may not ask.
    Untold,
    /// Whoever was asked knows of no such topic: it was made a moment ago, or is gone.
    Missing,
}

impl TopicId {
    pub(super) fn id(&self) -> Option<&str> {
        match self {
            Self::Is(id) => Some(id),
            Self::Untold | Self::Missing => None,
        }
    }
}

pub(super) type TopicIds = BTreeMap<String, TopicId>;

/// Asks for the ids of topics, of which there is one at least.
#[allow(unsafe_code, reason = "rdkafka has no function that describes topics")]
pub(super) fn ask<'a>(
    consumer: &Arc<BaseConsumer<Context>>,
    topics: impl Iterator<Item = &'a str>,
) -> Question<TopicIds> {
    let topics: BTreeSet<_> = topics.collect();
    // Kafka's names have no zeros.
    let names = topics.into_iter().filter_map(|t| CString::new(t).ok());
    let names: Vec<_> = names.collect();
    let mut pointers: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
    let operation = rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS;
    Question::ask(consumer, operation, ids, |client, options, queue| {
        // SAFETY: client, options and queue are there. The collection is made and destroyed here: the request copies what it
        // needs of it and of the names, which end with a zero.
        unsafe {
            let collection =
                rd_kafka_TopicCollection_of_topic_names(pointers.as_mut_ptr(), pointers.len());
            rd_kafka_DescribeTopics(client, collection, options, queue);
            rd_kafka_TopicCollection_destroy(collection);
        }
    })
}

#[allow(unsafe_code, reason = "rdkafka has no function that describes topics")]
fn ids(event: &Event) -> TopicIds {
    let Some(native) = event.of_kind(RD_KAFKA_EVENT_DESCRIBETOPICS_RESULT) else {
        return TopicIds::new();
    };
    // SAFETY: what is read out of the result lives as long as the event does, and is copied; librdkafka answers as many
    // pointers as it says.
    unsafe {
        let result = rd_kafka_event_DescribeTopics_result(native);
        let mut count = 0;
        let topics = rd_kafka_DescribeTopics_result_topics(result, ptr::from_mut(&mut count));
        if topics.is_null() {
            return TopicIds::new();
        }
        let topics = std::slice::from_raw_parts(topics, count);
        topics.iter().filter_map(|topic| id(*topic)).collect()
    }
}

/// # Safety
///
/// The description is one of a result that is not destroyed yet.
#[allow(unsafe_code, reason = "rdkafka has no function that describes topics")]
unsafe fn id(topic: *const rd_kafka_TopicDescription_t) -> Option<(String, TopicId)> {
    // SAFETY: as the caller says. Names and ids end with a zero, and are copied.
    unsafe {
        let name = CStr::from_ptr(rd_kafka_TopicDescription_name(topic));
        let name = name.to_str().ok()?.to_owned();
        let error = rd_kafka_error_code(rd_kafka_TopicDescription_error(topic));
        if error.is_error() {
            let said = match RDKafkaErrorCode::from(error) {
                RDKafkaErrorCode::TopicAuthorizationFailed => TopicId::Untold,
                _ => TopicId::Missing,
            };
            return Some((name, said));
        }
        let id = rd_kafka_TopicDescription_topic_id(topic);
        let is_none = id.is_null()
            || (
                rd_kafka_Uuid_most_significant_bits(id),
                rd_kafka_Uuid_least_significant_bits(id),
            ) == (0, 0);
        if is_none {
            return Some((name, TopicId::Untold));
        }
        let id = CStr::from_ptr(rd_kafka_Uuid_base64str(id));
        Some((name, TopicId::Is(id.to_str().ok()?.to_owned())))
    }
}
