//! ListOffsets, OffsetCommit and OffsetFetch: where records are, and how far groups have got.

use std::collections::BTreeMap;

use kafka_protocol::ResponseError;
use kafka_protocol::messages::list_offsets_response::{
    ListOffsetsPartitionResponse, ListOffsetsTopicResponse,
};
use kafka_protocol::messages::offset_commit_request::OffsetCommitRequestPartition;
use kafka_protocol::messages::offset_commit_response::{
    OffsetCommitResponsePartition, OffsetCommitResponseTopic,
};
use kafka_protocol::messages::offset_delete_response::{
    OffsetDeleteResponsePartition, OffsetDeleteResponseTopic,
};
use kafka_protocol::messages::offset_fetch_response::{
    OffsetFetchResponsePartition, OffsetFetchResponseTopic,
};
use kafka_protocol::messages::{
    ListOffsetsRequest, ListOffsetsResponse, OffsetCommitRequest, OffsetCommitResponse,
    OffsetDeleteRequest, OffsetDeleteResponse, OffsetFetchRequest, OffsetFetchResponse, TopicName,
};

use super::{Call, code, once, text, wire};
use crate::group::Caller;
use crate::storage::journal_state::{Committed, Entry, State};

/// Timestamps that stand for the ends of a partition.
const LATEST: i64 = -1;
const EARLIEST: i64 = -2;
/// The record whose timestamp is the largest.
const NEWEST: i64 = -3;
/// The first version in which it can be asked for.
const FIRST_WITH_NEWEST: i16 = 7;
/// Offset and timestamp where no record is new enough.
const NONE: (i64, i64) = (-1, -1);

/// Bytes of the text committed with an offset, as Kafka's `offset.metadata.max.bytes`.
const MAX_METADATA: usize = 4096;

/// The offsets at the ends of partitions, or of the first record that is not older than a time.
pub(super) async fn list(call: &Call, request: ListOffsetsRequest) -> ListOffsetsResponse {
    let mut response = ListOffsetsResponse::default();
    for topic in request.topics {
        let mut answer = ListOffsetsTopicResponse::default().with_name(topic.name.clone());
        for partition in topic.partitions {
            let index = partition.partition_index;
            let found = find(call, &topic.name, index, partition.timestamp).await;
            let (offset, timestamp) = found.unwrap_or(NONE);
            let partition = ListOffsetsPartitionResponse::default()
                .with_partition_index(index)
                .with_error_code(code(&found))
                .with_offset(offset)
                .with_timestamp(timestamp);
            answer.partitions.push(partition);
        }
        response.topics.push(answer);
    }
    response
}

async fn find(
    call: &Call,
    topic: &str,
    index: i32,
    timestamp: i64,
) -> Result<(i64, i64), ResponseError> {
    let partition = call.node.topics.partition(topic, index)?;
    match timestamp {
        LATEST => Ok((partition.high_watermark(), -1)),
        EARLIEST => Ok((partition.start(), -1)),
        NEWEST if call.version >= FIRST_WITH_NEWEST => {
            let found = tokio::task::spawn_blocking(move || partition.find_newest()).await;
            found
                .unwrap_or(Err(ResponseError::UnknownServerError))
                .map(|found| found.unwrap_or(NONE))
        }
        timestamp if timestamp < 0 => Err(ResponseError::InvalidRequest),
        timestamp => {
            let found =
                tokio::task::spawn_blocking(move || partition.find_timestamp(timestamp)).await;
            found
                .unwrap_or(Err(ResponseError::UnknownServerError))
                .map(|found| found.unwrap_or(NONE))
        }
    }
}

/// Makes the offsets of a group durable.
pub(super) async fn commit(call: &Call, request: OffsetCommitRequest) -> OffsetCommitResponse {
    let group = text(request.group_id.0.clone());
    let caller = Caller {
        member: text(request.member_id),
        instance: request.group_instance_id.map(text),
        generation: request.generation_id_or_member_epoch,
    };
    let allowed = if group.is_empty() {
        Err(ResponseError::InvalidGroupId)
    } else {
        call.node.groups.may_commit(&group, &caller)
    };
    // Each partition once, however often it is named: what is kept of it has the group's name.
    let mut entries = BTreeMap::new();
    let mut topics = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let mut answer = OffsetCommitResponseTopic::default().with_name(topic.name.clone());
        for partition in topic.partitions {
            let entry = allowed.and_then(|()| entry(call, &group, &topic.name, &partition));
            answer.partitions.push(
                OffsetCommitResponsePartition::default()
                    .with_partition_index(partition.partition_index)
                    .with_error_code(code(&entry)),
            );
            let place = (topic.name.clone(), partition.partition_index);
            entries.extend(entry.ok().map(|entry| (place, entry)));
        }
        topics.push(answer);
    }
    let entries: Vec<_> = entries.into_values().collect();
    if !entries.is_empty() && call.node.journal.write(entries).await.is_err() {
        // Of the errors after which clients try again, the one for the coordinator's own log.
        let error = ResponseError::CoordinatorNotAvailable.code();
        let partitions = topics.iter_mut().flat_map(|topic| &mut topic.partitions);
        partitions
            .filter(|partition| partition.error_code == 0)
            .for_each(|partition| partition.error_code = error);
    }
    OffsetCommitResponse::default().with_topics(topics)
}

fn entry(
    call: &Call,
    group: &str,
    topic: &TopicName,
    partition: &OffsetCommitRequestPartition,
) -> Result<Entry, ResponseError> {
    call.node
        .topics
        .partition(topic, partition.partition_index)?;
    let metadata = partition.committed_metadata.clone().map(text);
    if metadata
        .as_ref()
        .is_some_and(|metadata| metadata.len() > MAX_METADATA)
    {
        return Err(ResponseError::OffsetMetadataTooLarge);
    }
    let place = (text(topic.0.clone()), partition.partition_index);
    let has_room = |state: &State| state.has_room(group, &place, metadata.as_deref());
    if !call.node.journal.look(has_room) {
        return Err(ResponseError::InvalidCommitOffsetSize);
    }
    Ok(Entry::Offset {
        group: group.to_owned(),
        topic: place.0,
        partition: place.1,
        offset: partition.committed_offset,
        metadata,
    })
}

/// Deletes offsets that a group committed, of topics that no member of it reads.
pub(super) async fn delete(call: &Call, request: OffsetDeleteRequest) -> OffsetDeleteResponse {
    let group = request.group_id.as_str();
    let described = call.node.groups.describe(group);
    let has_offsets = call
        .node
        .journal
        .look(|state| state.offsets.contains_key(group));
    if described.is_none() && !has_offsets {
        let error = ResponseError::GroupIdNotFound.code();
        return OffsetDeleteResponse::default().with_error_code(error);
    }
    let is_read = |topic: &str| {
        described
            .as_ref()
            .is_some_and(|described| described.reads(topic))
    };
    // Each partition once, however often it is named: what is kept of it has the group's name.
    let mut entries = BTreeMap::new();
    let mut topics = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let mut answer = OffsetDeleteResponseTopic::default().with_name(topic.name.clone());
        for partition in topic.partitions {
            let index = partition.partition_index;
            let found = call.node.topics.partition(&topic.name, index);
            let deleted = match found {
                Ok(_) if is_read(&topic.name) => Err(ResponseError::GroupSubscribedToTopic),
                found => found.map(|_| ()),
            };
            answer.partitions.push(
                OffsetDeleteResponsePartition::default()
                    .with_partition_index(index)
                    .with_error_code(code(&deleted)),
            );
            if deleted.is_ok() {
                let entry = Entry::OffsetDeleted {
                    group: group.to_owned(),
                    topic: text(topic.name.0.clone()),
                    partition: index,
                };
                entries.insert((topic.name.clone(), index), entry);
            }
        }
        topics.push(answer);
    }
    let response = OffsetDeleteResponse::default();
    let entries: Vec<_> = entries.into_values().collect();
    if !entries.is_empty() && call.node.journal.write(entries).await.is_err() {
        return response.with_error_code(ResponseError::CoordinatorNotAvailable.code());
    }
    response.with_topics(topics)
}

/// The offsets that a group committed: of the partitions named, or all.
pub(super) fn fetch(call: &Call, request: OffsetFetchRequest) -> OffsetFetchResponse {
    let topics = call.node.journal.look(|state| {
        let committed = state.offsets.get(request.group_id.as_str());
        let find = |topic: &str, index| {
            committed.and_then(|offsets| offsets.get(&(topic.to_owned(), index)))
        };
        if let Some(topics) = request.topics {
            let wanted = topics.into_iter().flat_map(|topic| {
                let name = topic.name;
                let indexes = topic.partition_indexes.into_iter();
                indexes.map(move |index| (name.clone(), index))
            });
            let mut topics: Vec<OffsetFetchResponseTopic> = Vec::new();
            for (name, index) in once(wanted.collect()) {
                let partition = fetched(index, find(&name, index));
                match topics.last_mut().filter(|last| last.name == name) {
                    Some(last) => last.partitions.push(partition),
                    None => topics.push(
                        OffsetFetchResponseTopic::default()
                            .with_name(name)
                            .with_partitions(vec![partition]),
                    ),
                }
            }
            return topics;
        }
        let mut topics: Vec<OffsetFetchResponseTopic> = Vec::new();
        for ((topic, index), committed) in committed.into_iter().flatten() {
            if topics.last().is_none_or(|last| last.name.as_str() != topic) {
                topics.push(
                    OffsetFetchResponseTopic::default().with_name(wire(topic.clone()).into()),
                );
            }
            if let Some(last) = topics.last_mut() {
                last.partitions.push(fetched(*index, Some(committed)));
            }
        }
        topics
    });
    OffsetFetchResponse::default().with_topics(topics)
}

fn fetched(index: i32, committed: Option<&Committed>) -> OffsetFetchResponsePartition {
    let metadata = committed
        .and_then(|committed| committed.metadata.clone())
        .unwrap_or_default();
    OffsetFetchResponsePartition::default()
        .with_partition_index(index)
        .with_committed_offset(committed.map_or(-1, |committed| committed.offset))
        .with_metadata(Some(wire(metadata)))
}
