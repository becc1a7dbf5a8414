//! What is missing between what a lane has got to and what the log has: removed, made anew, or no records at all.

use std::ffi::CString;
use std::sync::Arc;

use rdkafka::Offset;
use rdkafka::bindings::rd_kafka_get_watermark_offsets;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::IsError;

use super::super::Gap;
use super::membership::Context;
use super::partition::{Partition, Position};
use super::topic_id::TopicIds;

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
        // Before it is sent to where it is read, librdkafka may have found that the log does not begin at 0; it asks again where
        // it does half a second later, and goes there.
        if partition.has_just_begun() {
            return Passed::Unknown;
        }
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

pub(super) fn outside(expected: i64, first: i64, end: i64) -> Option<Gap> {
    if expected < first {
        Some(Gap::Removed { expected, first })
    } else if expected > end {
        Some(Gap::Recreated { expected, end })
    } else {
        None
    }
}

/// The log has said what the ids of topics are: partitions that are read without theirs take it up. Answers those whose topic is
/// another one by now.
pub(super) fn take_up_ids(
    partitions: &[Arc<Partition>],
    topics: &TopicIds,
) -> Vec<(Arc<Partition>, i64, Gap)> {
    let mut gaps = Vec::new();
    for partition in partitions {
        let (Some(expected), Some(now)) = (
            partition.expected(),
            topics
                .get(&**partition.topic())
                .and_then(|topic| topic.id()),
        ) else {
            continue;
        };
        let before = partition.topic_id();
        let is_new = before.is_none();
        let before = before.or_else(|| partition.committed_topic());
        match replaced(expected, before.as_deref(), Some(now)) {
            Some(gap) => gaps.push((partition.clone(), expected, gap)),
            None if is_new => partition.set_topic_id(now),
            None => {}
        }
    }
    gaps
}

/// The topic that is there is another one than the one whose offset is known.
pub(super) fn replaced(expected: i64, before: Option<&str>, now: Option<&str>) -> Option<Gap> {
    let (before, now) = before.zip(now).filter(|(before, now)| before != now)?;
    Some(Gap::Replaced {
        expected,
        before: before.to_owned(),
        now: now.to_owned(),
    })
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
    use crate::log::committed::Committed;
    use crate::log::kafka::topic_id::TopicId;

    /// One that is read from offset 5 on, whose topic's id was not told, behind a commit with these words.
    fn untold(words: Option<&str>) -> Arc<Partition> {
        let partition = Partition::new("t", 0, Arc::default());
        partition.set_position(Position::Wanted(None));
        partition.begin(None, 5, words.map(|words| Committed::read(5, words)));
        partition
    }

    #[test]
    fn an_id_that_comes_to_be_known_later_is_taken_up_and_compared() {
        let gaps = |partition: &Arc<Partition>, ids: &TopicIds| {
            take_up_ids(std::slice::from_ref(partition), ids).len()
        };
        let told = |id: TopicId| TopicIds::from([("t".to_owned(), id)]);
        let (one, another) = (
            told(TopicId::Is("one".into())),
            told(TopicId::Is("another".into())),
        );
        let partition = untold(None);
        for ids in [told(TopicId::Untold), told(TopicId::Missing)] {
            assert_eq!(gaps(&partition, &ids), 0);
            assert_eq!(partition.topic_id(), None);
        }
        assert_eq!(gaps(&partition, &one), 0);
        assert_eq!(partition.topic_id().as_deref(), Some("one"));
        assert_eq!(gaps(&partition, &one), 0);
        assert_eq!(gaps(&partition, &another), 1);
        // What the group has committed says which topic it was.
        let partition = untold(Some("stagehost:1 offset=5 topic=one"));
        assert_eq!(gaps(&partition, &another), 1);
        assert_eq!(partition.topic_id(), None);
        assert_eq!(gaps(&partition, &one), 0);
        assert_eq!(partition.topic_id().as_deref(), Some("one"));
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
