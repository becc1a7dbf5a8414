//! What the log says of partitions' offsets: where they begin and end, and what a group has committed.

use std::ffi::CString;
use std::ptr;
use std::sync::{Arc, mpsc};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use rdkafka::bindings::{
    RD_KAFKA_EVENT_LISTOFFSETS_RESULT, rd_kafka_AdminOptions_set_isolation_level,
    rd_kafka_IsolationLevel_t, rd_kafka_ListOffsets, rd_kafka_ListOffsets_result_infos,
    rd_kafka_ListOffsetsResultInfo_topic_partition, rd_kafka_OffsetSpec_t, rd_kafka_admin_op_t,
    rd_kafka_event_ListOffsets_result, rd_kafka_topic_partition_list_add,
    rd_kafka_topic_partition_list_destroy, rd_kafka_topic_partition_list_new,
};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{IsError, RDKafkaErrorCode};
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::{Offset, TopicPartitionList};

use super::super::committed::Committed;
use super::membership::Context;
use super::question::{ASK, Event, Failure, Question};

/// A topic and the number of a partition.
pub(super) type Place = (String, i32);

/// A partition's first and end offset, asked for.
pub(super) struct Bounds {
    first: Question<Answer>,
    end: Question<Answer>,
    known: (Option<i64>, Option<i64>),
}

/// An offset, or why its leader tells none.
type Answer = Result<i64, RDKafkaErrorCode>;

impl Bounds {
    pub(super) fn ask(consumer: &Arc<BaseConsumer<Context>>, place: &Place) -> Self {
        let ask = |which| ask_offset(consumer, place, which);
        Self {
            first: ask(rd_kafka_OffsetSpec_t::RD_KAFKA_OFFSET_SPEC_EARLIEST),
            end: ask(rd_kafka_OffsetSpec_t::RD_KAFKA_OFFSET_SPEC_LATEST),
            known: (None, None),
        }
    }

    pub(super) fn asked(&self) -> Instant {
        self.first.asked()
    }

    /// Both, once they have come, or why they don't.
    pub(super) fn answer(&mut self) -> Option<Result<(i64, i64), Failure>> {
        let both = [
            (&self.first, &mut self.known.0),
            (&self.end, &mut self.known.1),
        ];
        for (question, known) in both {
            match question.answer() {
                Some(Ok(Ok(offset))) => *known = Some(offset),
                Some(Ok(Err(code))) => {
                    let why = code.to_string();
                    return Some(Err(Failure { code, why }));
                }
                Some(Err(failure)) => return Some(Err(failure)),
                None => {}
            }
        }
        let (first, end) = self.known;
        Some(Ok((first?, end?)))
    }
}

#[allow(
    unsafe_code,
    reason = "rdkafka has no function that asks for offsets without waiting"
)]
fn ask_offset(
    consumer: &Arc<BaseConsumer<Context>>,
    (topic, number): &Place,
    which: rd_kafka_OffsetSpec_t,
) -> Question<Answer> {
    // Kafka's names have no zeros.
    let topic = CString::new(topic.as_str()).unwrap_or_default();
    let operation = rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_LISTOFFSETS;
    Question::ask(consumer, operation, offset, |client, options, queue| {
        let committed = rd_kafka_IsolationLevel_t::RD_KAFKA_ISOLATION_LEVEL_READ_COMMITTED;
        // SAFETY: client, options and queue are there. The list is made and destroyed here, with room for its one element:
        // the request copies it. What is answered for the option is no error, for it is one of this operation's.
        unsafe {
            rd_kafka_AdminOptions_set_isolation_level(options, committed);
            let list = rd_kafka_topic_partition_list_new(1);
            let element = rd_kafka_topic_partition_list_add(list, topic.as_ptr(), *number);
            (*element).offset = which as i64;
            rd_kafka_ListOffsets(client, list, options, queue);
            rd_kafka_topic_partition_list_destroy(list);
        }
    })
}

#[allow(unsafe_code, reason = "as `ask_offset`")]
fn offset(event: &Event) -> Answer {
    let none = Err(RDKafkaErrorCode::OperationTimedOut);
    let Some(native) = event.of_kind(RD_KAFKA_EVENT_LISTOFFSETS_RESULT) else {
        return none;
    };
    // SAFETY: what is read out of the result lives as long as the event does; librdkafka answers as many pointers as it says.
    unsafe {
        let result = rd_kafka_event_ListOffsets_result(native);
        let mut count = 0;
        let infos = rd_kafka_ListOffsets_result_infos(result, ptr::from_mut(&mut count));
        if infos.is_null() || count == 0 {
            return none;
        }
        let element = rd_kafka_ListOffsetsResultInfo_topic_partition(*infos);
        let (error, offset) = ((*element).err, (*element).offset);
        if error.is_error() {
            return Err(error.into());
        }
        // A leader that did not answer in time.
        if offset < 0 { none } else { Ok(offset) }
    }
}

/// What a group has committed in a partition: nothing, or an offset; or why the log does not say.
pub(super) type GroupOffset = Result<Option<Committed>, RDKafkaErrorCode>;

/// What a group has committed in some partitions, of which there is one at least. A thread asks: librdkafka's question that does
/// not wait goes on asking a coordinator that is the group's no more, as long as that one is up, and aborts the process when brokers
/// go away meanwhile (an assertion, which the fault suite found).
pub(super) struct GroupOffsets {
    asked: Instant,
    answer: mpsc::Receiver<Result<Vec<(Place, GroupOffset)>, Failure>>,
    thread: Option<JoinHandle<()>>,
}

impl GroupOffsets {
    pub(super) fn ask(consumer: &Arc<BaseConsumer<Context>>, places: &[Place]) -> Self {
        let (tell, answer) = mpsc::channel();
        let mut list = TopicPartitionList::new();
        for (topic, number) in places {
            list.add_partition(topic, *number);
        }
        let consumer = consumer.clone();
        let ask = move || {
            let answer = committed(&consumer, list);
            // Whoever waits for the answer must not find the consumer in use when it has come.
            drop(consumer);
            let _ = tell.send(answer);
        };
        let thread = Builder::new().name("committed".into()).spawn(ask);
        Self {
            asked: Instant::now(),
            answer,
            thread: thread.ok(),
        }
    }

    pub(super) fn asked(&self) -> Instant {
        self.asked
    }

    /// The answer, once it has come. It comes once.
    pub(super) fn answer(&self) -> Option<Result<Vec<(Place, GroupOffset)>, Failure>> {
        match self.answer.try_recv() {
            Ok(answer) => Some(answer),
            Err(mpsc::TryRecvError::Empty) => None,
            Err(mpsc::TryRecvError::Disconnected) => Some(Err(Failure {
                code: RDKafkaErrorCode::Fail,
                why: "no thread could ask".to_owned(),
            })),
        }
    }
}

impl Drop for GroupOffsets {
    /// Waits for the thread, [`ASK`] at most: the consumer is not to outlive whoever ends it.
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn committed(
    consumer: &BaseConsumer<Context>,
    list: TopicPartitionList,
) -> Result<Vec<(Place, GroupOffset)>, Failure> {
    let list = consumer.committed_offsets(list, ASK);
    let list = list.map_err(|error| Failure {
        code: error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail),
        why: error.to_string(),
    })?;
    let found = |element: &TopicPartitionListElem<'_>| match (element.error(), element.offset()) {
        (Err(error), _) => Err(error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail)),
        (Ok(()), Offset::Offset(offset)) => Ok(Some(Committed::read(offset, &words(element)))),
        (Ok(()), _) => Ok(None),
    };
    let elements = list.elements();
    let of = |element: &TopicPartitionListElem<'_>| {
        let place = (element.topic().to_owned(), element.partition());
        (place, found(element))
    };
    Ok(elements.iter().map(of).collect())
}

/// What stands beside an offset. librdkafka's wrapper panics on what is not UTF-8; that is nobody's of ours.
fn words(element: &TopicPartitionListElem<'_>) -> String {
    let read = || element.metadata().to_owned();
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)).unwrap_or_default()
}
