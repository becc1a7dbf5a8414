//! Where partitions are read from, and whether all that is to be read is still there.
//!
//! All runs on the consumer's thread, and may wait for the log for [`ASK`] at a time.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::bindings::rd_kafka_get_watermark_offsets;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{IsError, KafkaResult};
use rdkafka::{Offset, TopicPartitionList};
use tracing::debug;

use super::super::Gap;
use super::membership::{Context, list_of};
use super::partition::{Partition, Position};

/// How long the log may take for one answer. Polling stands still meanwhile, for the members of a group may be silent for
/// minutes before they are taken for dead.
const ASK: Duration = Duration::from_secs(3);

/// How long the leader of one partition may take, once they are asked one by one.
const ASK_ONE: Duration = Duration::from_millis(500);

type Place = (String, i32);

/// Has those partitions read that wait for it. Answers whether all of them are, or have a gap to tell of; librdkafka may need
/// a moment before it takes a partition for assigned.
///
/// Each is `split` from the others just before its first record may come.
pub(super) fn start(
    consumer: &BaseConsumer<Context>,
    partitions: &[Arc<Partition>],
    mut split: impl FnMut(&Arc<Partition>),
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
    let bounds = bounds(consumer, all())?;
    let mut seeks = TopicPartitionList::new();
    let mut seeking = Vec::new();
    for (partition, wanted) in waiting {
        let place = place(partition);
        // One whose leader is away does not hold up the others.
        let Some(&(first, end)) = bounds.get(&place) else {
            continue;
        };
        let known = wanted.or_else(|| committed.get(&place).copied());
        let gap = known.and_then(|expected| outside(expected, first, end));
        if let Some(gap) = gap {
            partition.set_position(Position::Gap(gap));
            continue;
        }
        let from = known.unwrap_or(first);
        seeks.add_partition_offset(partition.topic(), partition.number(), Offset::Offset(from))?;
        seeking.push((partition, place, from));
    }
    if seeking.is_empty() {
        return Ok(partitions.iter().all(|p| p.wanted().is_none()));
    }
    let sought = consumer.seek_partitions(seeks, ASK)?;
    for (partition, place, from) in seeking {
        match sought.find_partition(&place.0, place.1).map(|e| e.error()) {
            Some(Ok(())) => {
                split(partition);
                partition.set_position(Position::Reading(Some(from)));
                consumer.resume(&list_of(partition))?;
            }
            Some(Err(error)) => debug!("cannot seek yet: {error}"),
            None => {}
        }
    }
    Ok(partitions.iter().all(|p| p.wanted().is_none()))
}

/// What a partition has passed over.
pub(super) enum Passed {
    /// What compaction left out, or what are no records: markers of transactions.
    Nothing,
    /// Records.
    Gap(Gap),
    /// Only the log can tell.
    Unknown,
}

/// What a jump from the offset that was expected to the one that came has passed over.
pub(super) fn passed(
    consumer: &BaseConsumer<Context>,
    partition: &Partition,
    expected: i64,
    came: i64,
) -> Passed {
    let bounds = known_bounds(consumer, partition);
    if came < expected {
        let end = bounds.map_or(came, |(_, end)| end);
        return Passed::Gap(Gap::Recreated { expected, end });
    }
    match bounds {
        None => Passed::Unknown,
        // The first record may have gone up since this one was fetched.
        Some((first, _)) if expected < first && first <= came => {
            Passed::Gap(Gap::Removed { expected, first })
        }
        Some(_) => Passed::Nothing,
    }
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

/// The partitions' first and end offsets, as far as their leaders answer.
fn bounds<'a>(
    consumer: &BaseConsumer<Context>,
    partitions: impl Iterator<Item = &'a Partition> + Clone,
) -> KafkaResult<BTreeMap<Place, (i64, i64)>> {
    let first = offsets(consumer, partitions.clone(), Offset::Beginning);
    let end = first.and_then(|first| {
        let end = offsets(consumer, partitions.clone(), Offset::End)?;
        Ok((first, end))
    });
    if let Ok((first, end)) = end {
        let both = |(place, first)| Some((end.get(&place).copied()?, place, first));
        let both = first.into_iter().filter_map(both);
        return Ok(both
            .map(|(end, place, first)| (place, (first, end)))
            .collect());
    }
    // A single leader that is away fails the question for all, so each is asked about.
    let mut bounds = BTreeMap::new();
    let (began, mut failed) = (Instant::now(), None);
    for partition in partitions {
        if began.elapsed() > ASK {
            break;
        }
        match consumer.fetch_watermarks(partition.topic(), partition.number(), ASK_ONE) {
            Ok(both) => drop(bounds.insert(place(partition), both)),
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) if bounds.is_empty() => Err(error),
        _ => Ok(bounds),
    }
}

/// Kafka's "timestamps" of first and end are librdkafka's logical offsets.
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

/// Those that were answered; an error of one is for the next time.
fn known(list: &TopicPartitionList) -> KafkaResult<BTreeMap<Place, i64>> {
    let mut offsets = BTreeMap::new();
    for element in list.elements() {
        if let (Ok(()), Offset::Offset(offset)) = (element.error(), element.offset()) {
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
