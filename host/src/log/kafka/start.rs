//! Where partitions are read from, and whether all that is to be read is still there.
//!
//! All runs on the consumer's thread, and may wait for the log for [`ASK`] at a time.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::bindings::rd_kafka_get_watermark_offsets;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{IsError, KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::{Offset, TopicPartitionList};
use tracing::debug;

use super::super::Gap;
use super::consumer::{Context, list_of};
use super::partition::{Partition, Position};

/// How long the log may take for one answer. Polling stands still meanwhile, for the members of a group may be silent for
/// minutes before they are taken for dead.
const ASK: Duration = Duration::from_secs(3);

/// Where a partition begins whose group has not committed yet: `auto.offset.reset` of the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reset {
    Beginning,
    End,
}

impl Reset {
    pub(super) fn of(properties: &BTreeMap<String, String>) -> Self {
        match properties.get("auto.offset.reset").map(String::as_str) {
            Some("latest" | "largest" | "end") => Self::End,
            _ => Self::Beginning,
        }
    }
}

type Place = (String, i32);

/// Has those partitions read that wait for it. Answers whether all of them are, or have a gap to tell of; librdkafka may need
/// a moment before it takes a partition for assigned.
pub(super) fn start(
    consumer: &BaseConsumer<Context>,
    partitions: &[Arc<Partition>],
    reset: Reset,
) -> KafkaResult<bool> {
    let waiting: Vec<_> = partitions
        .iter()
        .filter_map(|partition| Some((partition, partition.wanted()?)))
        .collect();
    if waiting.is_empty() {
        return Ok(true);
    }
    let unknown = waiting.iter().filter(|(_, offset)| offset.is_none());
    let committed = committed(consumer, unknown.map(|(partition, _)| &***partition))?;
    let all = || waiting.iter().map(|(partition, _)| &***partition);
    let first = offsets(consumer, all(), Offset::Beginning)?;
    let end = offsets(consumer, all(), Offset::End)?;
    let mut seeks = TopicPartitionList::new();
    let mut seeking = Vec::new();
    for (partition, wanted) in waiting {
        let place = place(partition);
        let (Some(&first), Some(&end)) = (first.get(&place), end.get(&place)) else {
            continue;
        };
        let known = wanted.or_else(|| committed.get(&place).copied());
        let gap = known.and_then(|expected| outside(expected, first, end));
        if let Some(gap) = gap {
            partition.set_position(Position::Gap(gap));
            continue;
        }
        let from = known.unwrap_or(match reset {
            Reset::Beginning => first,
            Reset::End => end,
        });
        seeks.add_partition_offset(partition.topic(), partition.number(), Offset::Offset(from))?;
        seeking.push((partition, place, from));
    }
    if seeking.is_empty() {
        return Ok(partitions.iter().all(|p| p.wanted().is_none()));
    }
    let sought = match consumer.seek_partitions(seeks, ASK) {
        Ok(sought) => sought,
        // It says so where none of them is known to be assigned yet.
        Err(error) if is_early(&error) => return Ok(false),
        Err(error) => return Err(error),
    };
    for (partition, place, from) in seeking {
        match sought.find_partition(&place.0, place.1).map(|e| e.error()) {
            Some(Ok(())) => {
                partition.set_position(Position::Reading(Some(from)));
                consumer.resume(&list_of(partition))?;
            }
            Some(Err(error)) => debug!("cannot seek yet: {error}"),
            None => {}
        }
    }
    Ok(partitions.iter().all(|p| p.wanted().is_none()))
}

fn is_early(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(
            RDKafkaErrorCode::State
                | RDKafkaErrorCode::PreviousInProgress
                | RDKafkaErrorCode::UnknownPartition
        )
    )
}

/// What a jump from the offset that was expected to the one that came has passed over, if it is more than what
/// compaction leaves out.
pub(super) fn gap(
    consumer: &BaseConsumer<Context>,
    partition: &Partition,
    expected: i64,
    came: i64,
) -> Option<Gap> {
    let (first, end) = known_bounds(consumer, partition)?;
    if came < expected {
        return Some(Gap::Recreated { expected, end });
    }
    // The first record may have gone up since this one was fetched.
    (expected < first && first <= came).then_some(Gap::Removed { expected, first })
}

fn outside(expected: i64, first: i64, end: i64) -> Option<Gap> {
    if expected < first {
        Some(Gap::Removed { expected, first })
    } else if expected > end {
        Some(Gap::Recreated { expected, end })
    } else {
        None
    }
}

fn place(partition: &Partition) -> Place {
    (partition.topic().to_string(), partition.number())
}

fn committed<'a>(
    consumer: &BaseConsumer<Context>,
    partitions: impl Iterator<Item = &'a Partition>,
) -> KafkaResult<BTreeMap<Place, i64>> {
    let mut list = TopicPartitionList::new();
    for partition in partitions {
        list.add_partition(partition.topic(), partition.number());
    }
    if list.count() == 0 {
        return Ok(BTreeMap::new());
    }
    known(&consumer.committed_offsets(list, ASK)?)
}

/// The partitions' first or end offsets. Kafka's "timestamps" of those are librdkafka's logical offsets.
fn offsets<'a>(
    consumer: &BaseConsumer<Context>,
    partitions: impl Iterator<Item = &'a Partition>,
    which: Offset,
) -> KafkaResult<BTreeMap<Place, i64>> {
    let mut list = TopicPartitionList::new();
    for partition in partitions {
        list.add_partition_offset(partition.topic(), partition.number(), which)?;
    }
    known(&consumer.offsets_for_times(list, ASK)?)
}

fn known(list: &TopicPartitionList) -> KafkaResult<BTreeMap<Place, i64>> {
    let mut offsets = BTreeMap::new();
    for element in list.elements() {
        element.error()?;
        if let Offset::Offset(offset) = element.offset() {
            offsets.insert((element.topic().to_owned(), element.partition()), offset);
        }
    }
    Ok(offsets)
}

/// The partition's first and end offset as of the last fetch.
#[allow(
    unsafe_code,
    reason = "rdkafka has no safe function that answers without asking the broker"
)]
fn known_bounds(consumer: &BaseConsumer<Context>, partition: &Partition) -> Option<(i64, i64)> {
    let topic = CString::new(&**partition.topic()).ok()?;
    let (mut first, mut end) = (-1, -1);
    // SAFETY: the client outlives the call, the topic's name ends with a zero and is only read, and both offsets are
    // ours to be written.
    let error = unsafe {
        rd_kafka_get_watermark_offsets(
            consumer.client().native_ptr(),
            topic.as_ptr(),
            partition.number(),
            &mut first,
            &mut end,
        )
    };
    (!error.is_error() && first >= 0).then_some((first, end))
}
