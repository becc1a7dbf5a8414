//! What the log says of partitions' offsets: where they begin and end, and what a group has committed.

use std::ffi::{CStr, CString};
use std::ptr;
use std::sync::Arc;
use std::time::Instant;

use rdkafka::bindings::{
    RD_KAFKA_EVENT_LISTCONSUMERGROUPOFFSETS_RESULT, RD_KAFKA_EVENT_LISTOFFSETS_RESULT,
    rd_kafka_AdminOptions_set_isolation_level, rd_kafka_AdminOptions_set_require_stable_offsets,
    rd_kafka_IsolationLevel_t, rd_kafka_ListConsumerGroupOffsets,
    rd_kafka_ListConsumerGroupOffsets_destroy, rd_kafka_ListConsumerGroupOffsets_new,
    rd_kafka_ListConsumerGroupOffsets_result_groups, rd_kafka_ListOffsets,
    rd_kafka_ListOffsets_result_infos, rd_kafka_ListOffsetsResultInfo_topic_partition,
    rd_kafka_OffsetSpec_t, rd_kafka_admin_op_t, rd_kafka_event_ListConsumerGroupOffsets_result,
    rd_kafka_event_ListOffsets_result, rd_kafka_group_result_error,
    rd_kafka_group_result_partitions, rd_kafka_topic_partition_list_add,
    rd_kafka_topic_partition_list_destroy, rd_kafka_topic_partition_list_new,
    rd_kafka_topic_partition_list_t, rd_kafka_topic_partition_t,
};
use rdkafka::consumer::BaseConsumer;
use rdkafka::error::{IsError, RDKafkaErrorCode};

use super::super::committed::Committed;
use super::membership::Context;
use super::question::{Event, Failure, Question};

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

/// Asks what a group has committed in these partitions, of which there is one at least.
#[allow(unsafe_code, reason = "as `ask_offset`")]
pub(super) fn ask_committed(
    consumer: &Arc<BaseConsumer<Context>>,
    group: &str,
    places: &[Place],
) -> Question<Vec<(Place, GroupOffset)>> {
    // Neither groups nor topics have names with zeros.
    let group = CString::new(group).unwrap_or_default();
    let operation = rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_LISTCONSUMERGROUPOFFSETS;
    Question::ask(consumer, operation, committed, |client, options, queue| {
        let count = i32::try_from(places.len()).unwrap_or_default();
        // SAFETY: client, options and queue are there. List and request are made and destroyed here: librdkafka copies both,
        // and what is in them. What is answered for the option is no error, for it is one of this operation's.
        unsafe {
            rd_kafka_AdminOptions_set_require_stable_offsets(options, 1);
            let list = rd_kafka_topic_partition_list_new(count);
            for (topic, number) in places {
                let topic = CString::new(topic.as_str()).unwrap_or_default();
                rd_kafka_topic_partition_list_add(list, topic.as_ptr(), *number);
            }
            let mut request = rd_kafka_ListConsumerGroupOffsets_new(group.as_ptr(), list);
            let requests = ptr::from_mut(&mut request);
            rd_kafka_ListConsumerGroupOffsets(client, requests, 1, options, queue);
            rd_kafka_ListConsumerGroupOffsets_destroy(request);
            rd_kafka_topic_partition_list_destroy(list);
        }
    })
}

#[allow(unsafe_code, reason = "as `ask_offset`")]
fn committed(event: &Event) -> Vec<(Place, GroupOffset)> {
    let Some(native) = event.of_kind(RD_KAFKA_EVENT_LISTCONSUMERGROUPOFFSETS_RESULT) else {
        return Vec::new();
    };
    // SAFETY: what is read out of the result lives as long as the event does; librdkafka answers as many pointers as it says.
    unsafe {
        let result = rd_kafka_event_ListConsumerGroupOffsets_result(native);
        let mut count = 0;
        let groups =
            rd_kafka_ListConsumerGroupOffsets_result_groups(result, ptr::from_mut(&mut count));
        if groups.is_null() || count == 0 {
            return Vec::new();
        }
        if !rd_kafka_group_result_error(*groups).is_null() {
            return Vec::new();
        }
        let list = rd_kafka_group_result_partitions(*groups);
        elements(list)
            .iter()
            .map(|element| group_offset(element))
            .collect()
    }
}

/// # Safety
///
/// The list is one of librdkafka's that lives as long as what is answered is used, or null.
#[allow(unsafe_code, reason = "as `ask_offset`")]
unsafe fn elements<'a>(
    list: *const rd_kafka_topic_partition_list_t,
) -> &'a [rd_kafka_topic_partition_t] {
    // SAFETY: as the caller says; it has as many elements as it says.
    unsafe {
        if list.is_null() || (*list).elems.is_null() {
            return &[];
        }
        let count = usize::try_from((*list).cnt).unwrap_or_default();
        std::slice::from_raw_parts((*list).elems, count)
    }
}

/// # Safety
///
/// The element is one of a list of librdkafka's.
#[allow(unsafe_code, reason = "as `ask_offset`")]
unsafe fn group_offset(element: &rd_kafka_topic_partition_t) -> (Place, GroupOffset) {
    // SAFETY: as the caller says. The name ends with a zero, and the metadata has as many bytes as it says; both are copied.
    let (topic, words) = unsafe {
        let topic = CStr::from_ptr(element.topic).to_string_lossy().into_owned();
        let words = if element.metadata.is_null() {
            String::new()
        } else {
            let bytes =
                std::slice::from_raw_parts(element.metadata.cast::<u8>(), element.metadata_size);
            // What is not UTF-8 is nobody's of ours.
            String::from_utf8_lossy(bytes).into_owned()
        };
        (topic, words)
    };
    let found = if element.err.is_error() {
        Err(element.err.into())
    } else {
        Ok((element.offset >= 0).then(|| Committed::read(element.offset, &words)))
    };
    ((topic, element.partition), found)
}
