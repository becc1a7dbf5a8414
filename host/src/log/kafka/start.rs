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
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::{Offset, TopicPartitionList};
use tracing::{debug, info};

use super::super::Gap;
use super::super::committed::Committed;
use super::membership::{Context, list_of};
use super::partition::{Partition, Position};
use super::topic_id::topic_ids;

/// How long the log may take for one answer. Polling stands still meanwhile, for the members of a group may be silent for
/// minutes before they are taken for dead.
const ASK: Duration = Duration::from_secs(3);

/// How long the leader of one partition may take, once they are asked one by one.
const ASK_ONE: Duration = Duration::from_millis(500);

/// How often the log is asked for the ids of topics, and how long to wait in between.
const ID_TRIES: u32 = 4;
const ID_WAIT: Duration = Duration::from_millis(100);

type Place = (String, i32);

/// How far it is with the partitions that are to be read.
pub(super) enum Begun {
    /// All are, or have a gap to tell of.
    All,
    /// librdkafka needs a moment before it takes a partition for assigned, or a leader is away.
    NotYet,
    /// The log did not tell what the group has committed in some partition: why, in words.
    Unreadable(String),
}

/// Has those partitions read that wait for it.
///
/// Each is `split` from the others just before its first record may come.
pub(super) fn start(
    consumer: &Arc<BaseConsumer<Context>>,
    partitions: &[Arc<Partition>],
    mut split: impl FnMut(&Arc<Partition>),
) -> KafkaResult<Begun> {
    let waiting: Vec<_> = partitions
        .iter()
        .filter_map(|partition| Some((partition, partition.wanted()?)))
        .collect();
    if waiting.is_empty() {
        return Ok(Begun::All);
    }
    let all = || waiting.iter().map(|(partition, _)| &***partition);
    let (mut committed, unreadable) = committed(consumer, all())?;
    let bounds = bounds(consumer, all())?;
    let topics = known_topic_ids(consumer, all());
    let mut seeks = TopicPartitionList::new();
    let mut seeking = Vec::new();
    for (partition, wanted) in waiting {
        let place = place(partition);
        // One whose leader is away does not hold up the others.
        let Some(&(first, end)) = bounds.get(&place) else {
            continue;
        };
        let Some(committed) = committed.remove(&place) else {
            continue;
        };
        let topic = topics.get(&place.0).map(String::as_str);
        let known = known(wanted, committed.as_ref());
        let gap = known.and_then(|expected| {
            let before = partition.topic_id();
            let before = before.as_deref();
            let before = before.or_else(|| committed.as_ref()?.topic());
            replaced(expected, before, topic).or_else(|| outside(expected, first, end))
        });
        if let Some(gap) = gap {
            partition.set_position(Position::Gap(gap));
            continue;
        }
        if let Some(topic) = topic {
            partition.set_topic_id(topic);
        }
        let from = known.unwrap_or(first);
        seeks.add_partition_offset(partition.topic(), partition.number(), Offset::Offset(from))?;
        seeking.push((partition, place, from, committed));
    }
    if !seeking.is_empty() {
        let sought = consumer.seek_partitions(seeks, ASK)?;
        let mut begun = Vec::new();
        for (partition, place, from, committed) in seeking {
            match sought.find_partition(&place.0, place.1).map(|e| e.error()) {
                Some(Ok(())) => {
                    split(partition);
                    partition.begin(from, committed);
                    consumer.resume(&list_of(partition))?;
                    begun.push((place, from));
                }
                Some(Err(error)) => debug!("cannot seek yet: {error}"),
                None => {}
            }
        }
        say_where(&consumer.context().lock().group, begun);
    }
    if let Some(why) = unreadable {
        Ok(Begun::Unreadable(why))
    } else if partitions.iter().all(|p| p.wanted().is_none()) {
        Ok(Begun::All)
    } else {
        Ok(Begun::NotYet)
    }
}

/// Where to go on: where the lane says, and else where the group has got to. The group may know of markers behind the lane's
/// offset, and that there is nothing else up to its own.
fn known(wanted: Option<i64>, committed: Option<&Committed>) -> Option<i64> {
    let Some(wanted) = wanted else {
        return committed.map(|committed| committed.offset);
    };
    let row = committed.and_then(Committed::row);
    let passed = committed.filter(|_| row.is_some_and(|row| row.next_offset == wanted));
    Some(passed.map_or(wanted, |committed| committed.offset.max(wanted)))
}

/// `reading what was assigned: topic 0 from offset 5, 1 from offset 7`.
fn say_where(group: &str, begun: Vec<(Place, i64)>) {
    let mut topics = BTreeMap::<String, Vec<(i32, i64)>>::new();
    for ((topic, number), from) in begun {
        topics.entry(topic).or_default().push((number, from));
    }
    let topics = topics.into_iter().map(|(topic, mut partitions)| {
        partitions.sort_unstable();
        let partitions = partitions.iter();
        let partitions: Vec<_> = partitions
            .map(|(number, from)| format!("{number} from offset {from}"))
            .collect();
        format!("{topic} {}", partitions.join(", "))
    });
    let topics: Vec<_> = topics.collect();
    if !topics.is_empty() {
        info!(group, "reading what was assigned: {}", topics.join("; "));
    }
}

/// The ids of the partitions' topics. A topic that was made a moment ago may not be known to the broker that is asked: without its
/// id, one that is made anew later would not be noticed.
fn known_topic_ids<'a>(
    consumer: &Arc<BaseConsumer<Context>>,
    partitions: impl Iterator<Item = &'a Partition> + Clone,
) -> BTreeMap<String, String> {
    let topics = || partitions.clone().map(|partition| &**partition.topic());
    let mut known = BTreeMap::new();
    for tries in 1..=ID_TRIES {
        // One that does not answer in its time is not asked again here: the stage's other partitions wait meanwhile.
        let Some(ids) = topic_ids(consumer, topics()) else {
            break;
        };
        known = ids;
        if topics().all(|topic| known.contains_key(topic)) {
            break;
        }
        if tries < ID_TRIES {
            std::thread::sleep(ID_WAIT);
        }
    }
    known
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

/// Lets partitions pass what are no records, as far as librdkafka's thread has handed it on: all that was before is in their
/// buffers by now. Answers those that have passed over records.
pub(super) fn pass_markers(
    consumer: &BaseConsumer<Context>,
    partitions: &[Arc<Partition>],
) -> Vec<(Arc<Partition>, i64, Gap)> {
    let Ok(positions) = consumer.position() else {
        return Vec::new();
    };
    let mut gaps = Vec::new();
    for partition in partitions {
        let found = positions.find_partition(partition.topic(), partition.number());
        let (Some(expected), Some(Offset::Offset(at))) =
            (partition.expected(), found.map(|element| element.offset()))
        else {
            continue;
        };
        if at <= expected {
            continue;
        }
        match passed(consumer, partition, expected, at) {
            Passed::Nothing => {
                let reading = Position::Reading(Some(expected));
                partition.replace_position(&reading, Position::Reading(Some(at)));
            }
            Passed::Gap(gap) => gaps.push((partition.clone(), expected, gap)),
            // The next time it can tell.
            Passed::Unknown => {}
        }
    }
    gaps
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

/// Partitions that are read, and whose topic is another one by now.
pub(super) fn replaced_meanwhile(
    partitions: &[Arc<Partition>],
    topics: &BTreeMap<String, String>,
) -> Vec<(Arc<Partition>, i64, Gap)> {
    let gap = |partition: &Arc<Partition>| {
        let expected = partition.expected()?;
        let now = topics.get(&**partition.topic())?;
        let gap = replaced(expected, partition.topic_id().as_deref(), Some(now))?;
        Some((partition.clone(), expected, gap))
    };
    partitions.iter().filter_map(gap).collect()
}

/// The topic that is there is another one than the one whose offset is known.
fn replaced(expected: i64, before: Option<&str>, now: Option<&str>) -> Option<Gap> {
    let (before, now) = before.zip(now).filter(|(before, now)| before != now)?;
    Some(Gap::Replaced {
        expected,
        before: before.to_owned(),
        now: now.to_owned(),
    })
}

fn place(partition: &Partition) -> Place {
    (partition.topic().to_string(), partition.number())
}

type Commits = BTreeMap<Place, Option<Committed>>;

/// What the group has committed in each partition, `None` where it is nothing. One of which the log does not say it is left
/// out, for that is not the same as nothing; and why, of the first.
fn committed<'a>(
    consumer: &BaseConsumer<Context>,
    partitions: impl Iterator<Item = &'a Partition>,
) -> KafkaResult<(Commits, Option<String>)> {
    let mut list = TopicPartitionList::new();
    for partition in partitions {
        list.add_partition(partition.topic(), partition.number());
    }
    let list = consumer.committed_offsets(list, ASK)?;
    let (mut committed, mut unreadable) = (BTreeMap::new(), None);
    for element in list.elements() {
        let (topic, partition) = (element.topic().to_owned(), element.partition());
        let found = match (element.error(), element.offset()) {
            (Err(error), _) => {
                let place = format!("{topic} {partition}");
                unreadable.get_or_insert_with(|| {
                    format!("the group's committed offset in {place} can't be read: {error}")
                });
                continue;
            }
            (Ok(()), Offset::Offset(offset)) => Some(Committed::read(offset, &words(&element))),
            (Ok(()), _) => None,
        };
        committed.insert((topic, partition), found);
    }
    Ok((committed, unreadable))
}

/// What stands beside an offset. librdkafka's wrapper panics on what is not UTF-8; that is nobody's of ours.
fn words(element: &TopicPartitionListElem<'_>) -> String {
    let read = || element.metadata().to_owned();
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)).unwrap_or_default()
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
    answered(&consumer.offsets_for_times(list, ASK)?)
}

/// Those that were answered; an error of one is for the next time.
fn answered(list: &TopicPartitionList) -> KafkaResult<BTreeMap<Place, i64>> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::committed::{Mark, RowMark};

    #[test]
    fn a_lane_goes_on_behind_markers_that_its_group_has_passed() {
        let committed = |offset, next_offset| {
            let row = RowMark {
                next_offset,
                ..RowMark::default()
            };
            let mark = Mark {
                topic: None,
                row: Some(row),
            };
            Some(Committed {
                offset,
                mark: Some(mark),
            })
        };
        let set = Some(Committed {
            offset: 9,
            mark: None,
        });
        for (wanted, committed, expected) in [
            (None, None, None),
            (None, committed(7, 5), Some(7)),
            (Some(5), None, Some(5)),
            (Some(5), committed(7, 5), Some(7)),
            // The row has gone on since.
            (Some(6), committed(7, 5), Some(6)),
            (Some(8), committed(7, 7), Some(8)),
            // Somebody has set it.
            (Some(5), set, Some(5)),
        ] {
            assert_eq!(known(wanted, committed.as_ref()), expected, "{wanted:?}");
        }
    }

    #[test]
    fn another_topic_of_the_same_name_is_told_where_both_ids_are_known() {
        let gap = Gap::Replaced {
            expected: 5,
            before: "one".into(),
            now: "another".into(),
        };
        assert_eq!(replaced(5, Some("one"), Some("another")), Some(gap));
        for (before, now) in [
            (Some("one"), Some("one")),
            (None, Some("one")),
            (Some("one"), None),
        ] {
            assert_eq!(replaced(5, before, now), None);
        }
    }
}
