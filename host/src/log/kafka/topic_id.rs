//! The ids of topics: another one of the same name has another. rdkafka has no function for it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString, c_char};
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::bindings::{
    RD_KAFKA_EVENT_DESCRIBETOPICS_RESULT, rd_kafka_AdminOptions_destroy, rd_kafka_AdminOptions_new,
    rd_kafka_AdminOptions_set_request_timeout, rd_kafka_DescribeTopics,
    rd_kafka_DescribeTopics_result_topics, rd_kafka_TopicCollection_destroy,
    rd_kafka_TopicCollection_of_topic_names, rd_kafka_TopicDescription_error,
    rd_kafka_TopicDescription_name, rd_kafka_TopicDescription_t,
    rd_kafka_TopicDescription_topic_id, rd_kafka_Uuid_base64str,
    rd_kafka_Uuid_least_significant_bits, rd_kafka_Uuid_most_significant_bits, rd_kafka_admin_op_t,
    rd_kafka_error_code, rd_kafka_event_DescribeTopics_result, rd_kafka_event_destroy,
    rd_kafka_event_error, rd_kafka_event_t, rd_kafka_event_type, rd_kafka_queue_destroy,
    rd_kafka_queue_new, rd_kafka_queue_poll, rd_kafka_queue_t,
};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::IsError;
use tracing::debug;

use super::membership::Context;

/// How long the log may take to answer.
const ASK: Duration = Duration::from_secs(3);
/// How much longer librdkafka may take to say that it did not.
const GRACE: Duration = Duration::from_secs(1);

/// Asks for the ids of topics, one question at a time. To be used on one thread.
pub(super) struct Asking {
    /// Outlives the queue.
    consumer: Arc<BaseConsumer<Context>>,
    /// Where the answer comes.
    queue: *mut rd_kafka_queue_t,
    is_asked: bool,
}

impl Asking {
    #[allow(unsafe_code, reason = "rdkafka has no function that describes topics")]
    pub(super) fn new(consumer: Arc<BaseConsumer<Context>>) -> Self {
        // SAFETY: the client is there for as long as `consumer` is held. The queue is destroyed when this is dropped.
        let queue = unsafe { rd_kafka_queue_new(consumer.client().native_ptr()) };
        Self {
            consumer,
            queue,
            is_asked: false,
        }
    }

    /// Asks, unless an answer is still to come.
    pub(super) fn ask<'a>(&mut self, topics: impl Iterator<Item = &'a str>) {
        let topics: BTreeSet<_> = topics.collect();
        // Kafka's names have no zeros.
        let names = topics.into_iter().filter_map(|t| CString::new(t).ok());
        let names: Vec<_> = names.collect();
        if !self.is_asked && !names.is_empty() {
            self.send(&names);
            self.is_asked = true;
        }
    }

    #[allow(unsafe_code, reason = "rdkafka has no function that describes topics")]
    fn send(&self, names: &[CString]) {
        let mut pointers: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
        let client = self.consumer.client().native_ptr();
        let operation = rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS;
        let mut why = [0; 1];
        // SAFETY: client and queue are there. Options and collection are made here and destroyed here: the request copies
        // what it needs of them and of the names, which end with a zero.
        unsafe {
            let options = rd_kafka_AdminOptions_new(client, operation);
            rd_kafka_AdminOptions_set_request_timeout(
                options,
                millis(ASK),
                why.as_mut_ptr(),
                why.len(),
            );
            let collection =
                rd_kafka_TopicCollection_of_topic_names(pointers.as_mut_ptr(), pointers.len());
            rd_kafka_DescribeTopics(client, collection, options, self.queue);
            rd_kafka_TopicCollection_destroy(collection);
            rd_kafka_AdminOptions_destroy(options);
        }
    }

    /// The answer, if it comes within this time: the ids of those topics of which the log tells one. One that is older than
    /// Kafka 2.8, or is not there, tells none.
    #[allow(unsafe_code, reason = "rdkafka has no function that describes topics")]
    pub(super) fn answer(&mut self, within: Duration) -> Option<BTreeMap<String, String>> {
        if !self.is_asked {
            return None;
        }
        // SAFETY: the queue is there, and an event that came out of it is destroyed once, after it was read.
        unsafe {
            let event = rd_kafka_queue_poll(self.queue, millis(within));
            if event.is_null() {
                return None;
            }
            self.is_asked = false;
            let ids = ids(event);
            rd_kafka_event_destroy(event);
            Some(ids)
        }
    }
}

impl Drop for Asking {
    #[allow(unsafe_code, reason = "rdkafka has no function that describes topics")]
    fn drop(&mut self) {
        // SAFETY: it was made by `new`, and nobody has it any more; an answer that is still to come is librdkafka's to drop.
        unsafe { rd_kafka_queue_destroy(self.queue) }
    }
}

fn millis(time: Duration) -> i32 {
    i32::try_from(time.as_millis()).unwrap_or(i32::MAX)
}

/// The ids of topics, waited for; none where the log does not answer.
pub(super) fn topic_ids<'a>(
    consumer: &Arc<BaseConsumer<Context>>,
    topics: impl Iterator<Item = &'a str>,
) -> Option<BTreeMap<String, String>> {
    let mut asking = Asking::new(consumer.clone());
    asking.ask(topics);
    asking.answer(ASK + GRACE)
}

/// # Safety
///
/// The event is one of librdkafka's that is not destroyed yet.
#[allow(unsafe_code, reason = "rdkafka has no function that describes topics")]
unsafe fn ids(event: *mut rd_kafka_event_t) -> BTreeMap<String, String> {
    // SAFETY: as the caller says. What is read out of the result lives as long as the event does, and is copied; librdkafka
    // answers as many pointers as it says.
    unsafe {
        let error = rd_kafka_event_error(event);
        if rd_kafka_event_type(event) != RD_KAFKA_EVENT_DESCRIBETOPICS_RESULT || error.is_error() {
            debug!("the log does not describe topics: {error:?}");
            return BTreeMap::new();
        }
        let result = rd_kafka_event_DescribeTopics_result(event);
        let mut count = 0;
        let topics = rd_kafka_DescribeTopics_result_topics(result, ptr::from_mut(&mut count));
        if topics.is_null() {
            return BTreeMap::new();
        }
        let topics = std::slice::from_raw_parts(topics, count);
        topics.iter().filter_map(|topic| id(*topic)).collect()
    }
}

/// # Safety
///
/// The description is one of a result that is not destroyed yet.
#[allow(unsafe_code, reason = "rdkafka has no function that describes topics")]
unsafe fn id(topic: *const rd_kafka_TopicDescription_t) -> Option<(String, String)> {
    // SAFETY: as the caller says. Names and ids end with a zero, and are copied.
    unsafe {
        let error = rd_kafka_TopicDescription_error(topic);
        if rd_kafka_error_code(error).is_error() {
            return None;
        }
        let id = rd_kafka_TopicDescription_topic_id(topic);
        let is_none = id.is_null()
            || (
                rd_kafka_Uuid_most_significant_bits(id),
                rd_kafka_Uuid_least_significant_bits(id),
            ) == (0, 0);
        if is_none {
            return None;
        }
        let name = CStr::from_ptr(rd_kafka_TopicDescription_name(topic));
        let id = CStr::from_ptr(rd_kafka_Uuid_base64str(id));
        Some((name.to_str().ok()?.to_owned(), id.to_str().ok()?.to_owned()))
    }
}
