//! Questions to the log whose answers come by and by. Nobody waits for them, so a broker that hangs holds up nobody but those
//! who need its answer.

use std::ffi::CStr;
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::bindings::{
    rd_kafka_AdminOptions_destroy, rd_kafka_AdminOptions_new,
    rd_kafka_AdminOptions_set_request_timeout, rd_kafka_AdminOptions_t, rd_kafka_admin_op_t,
    rd_kafka_event_destroy, rd_kafka_event_error, rd_kafka_event_error_string, rd_kafka_event_t,
    rd_kafka_event_type, rd_kafka_queue_destroy, rd_kafka_queue_new, rd_kafka_queue_poll,
    rd_kafka_queue_t, rd_kafka_t,
};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{IsError, RDKafkaErrorCode};

use super::membership::Context;

/// How long the log may take to answer; after that the answer is that it did not.
pub(super) const ASK: Duration = Duration::from_secs(3);

/// Why there is no answer.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) code: RDKafkaErrorCode,
    /// librdkafka's words.
    pub(super) why: String,
}

/// A question that was asked. It and its answer are of one thread.
pub(super) struct Question<T> {
    /// Outlives the queue.
    _consumer: Arc<BaseConsumer<Context>>,
    /// Where the answer comes.
    queue: *mut rd_kafka_queue_t,
    asked: Instant,
    read: fn(&Event) -> T,
}

impl<T> Question<T> {
    /// Asks with `send`, which gets the client, options of `operation` and the queue for the answer; `read` understands it.
    #[allow(
        unsafe_code,
        reason = "rdkafka has no function for most questions that does not wait"
    )]
    pub(super) fn ask(
        consumer: &Arc<BaseConsumer<Context>>,
        operation: rd_kafka_admin_op_t,
        read: fn(&Event) -> T,
        send: impl FnOnce(*mut rd_kafka_t, *mut rd_kafka_AdminOptions_t, *mut rd_kafka_queue_t),
    ) -> Self {
        let client = consumer.client().native_ptr();
        let timeout = i32::try_from(ASK.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: the client is there for as long as `consumer` is held. The queue is destroyed when this is dropped; options
        // are made and destroyed here, for a request copies what it needs of them.
        let queue = unsafe {
            let queue = rd_kafka_queue_new(client);
            let options = rd_kafka_AdminOptions_new(client, operation);
            rd_kafka_AdminOptions_set_request_timeout(options, timeout, ptr::null_mut(), 0);
            send(client, options, queue);
            rd_kafka_AdminOptions_destroy(options);
            queue
        };
        Self {
            _consumer: consumer.clone(),
            queue,
            asked: Instant::now(),
            read,
        }
    }

    /// When it was asked.
    pub(super) fn asked(&self) -> Instant {
        self.asked
    }

    /// The answer, once it has come. It comes once.
    #[allow(unsafe_code, reason = "as `ask`")]
    pub(super) fn answer(&self) -> Option<Result<T, Failure>> {
        // SAFETY: the queue is there, and an event that came out of it is destroyed once, by whom it is given to.
        let event = unsafe { rd_kafka_queue_poll(self.queue, 0) };
        if event.is_null() {
            return None;
        }
        let event = Event(event);
        Some(match event.failure() {
            Some(failure) => Err(failure),
            None => Ok((self.read)(&event)),
        })
    }
}

impl<T> Drop for Question<T> {
    #[allow(unsafe_code, reason = "as `ask`")]
    fn drop(&mut self) {
        // SAFETY: it was made by `ask`, and nobody has it any more; an answer that is still to come is librdkafka's to drop.
        unsafe { rd_kafka_queue_destroy(self.queue) }
    }
}

/// An answer as librdkafka gives it.
pub(super) struct Event(*mut rd_kafka_event_t);

impl Event {
    /// What it is of, if it is of this kind; lives as long as the event.
    #[allow(unsafe_code, reason = "as `Question::ask`")]
    pub(super) fn of_kind(&self, kind: i32) -> Option<*mut rd_kafka_event_t> {
        // SAFETY: the event is not destroyed before this is dropped.
        (unsafe { rd_kafka_event_type(self.0) } == kind).then_some(self.0)
    }

    #[allow(unsafe_code, reason = "as `Question::ask`")]
    fn failure(&self) -> Option<Failure> {
        // SAFETY: as above; the words end with a zero, and are copied.
        unsafe {
            let error = rd_kafka_event_error(self.0);
            if !error.is_error() {
                return None;
            }
            let words = rd_kafka_event_error_string(self.0);
            let code = RDKafkaErrorCode::from(error);
            let why = if words.is_null() {
                code.to_string()
            } else {
                CStr::from_ptr(words).to_string_lossy().into_owned()
            };
            Some(Failure { code, why })
        }
    }
}

impl Drop for Event {
    #[allow(unsafe_code, reason = "as `Question::ask`")]
    fn drop(&mut self) {
        // SAFETY: it came out of a queue, and is destroyed nowhere else.
        unsafe { rd_kafka_event_destroy(self.0) }
    }
}
