//! CreateTopics, DeleteTopics, CreatePartitions and DeleteRecords.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use kafka_protocol::ResponseError;
use kafka_protocol::messages::create_partitions_response::CreatePartitionsTopicResult;
use kafka_protocol::messages::create_topics_request::CreatableTopic;
use kafka_protocol::messages::create_topics_response::{
    CreatableTopicConfigs, CreatableTopicResult,
};
use kafka_protocol::messages::delete_records_response::{
    DeleteRecordsPartitionResult, DeleteRecordsTopicResult,
};
use kafka_protocol::messages::delete_topics_response::DeletableTopicResult;
use kafka_protocol::messages::describe_log_dirs_request::DescribableLogDirTopic;
use kafka_protocol::messages::describe_log_dirs_response::{
    DescribeLogDirsPartition, DescribeLogDirsResult, DescribeLogDirsTopic,
};
use kafka_protocol::messages::{
    CreatePartitionsRequest, CreatePartitionsResponse, CreateTopicsRequest, CreateTopicsResponse,
    DeleteRecordsRequest, DeleteRecordsResponse, DeleteTopicsRequest, DeleteTopicsResponse,
    DescribeLogDirsRequest, DescribeLogDirsResponse, TopicName,
};

use uuid::Uuid;

use super::configs::of_topic;
use super::{Call, code, text, wire};
use crate::node::NODE_ID;
use crate::storage::topic_config::Overrides;
use crate::storage::topics::{Refused, Topic};

/// What a client sends for "as the broker has it".
const DEFAULT: i32 = -1;
/// The first versions of CreateTopics that tell the settings of the new topic, and its id.
const FIRST_WITH_SETTINGS: i16 = 5;
const FIRST_WITH_ID: i16 = 7;
/// The first versions of DeleteTopics that tell why not, and that can name a topic by its id.
const FIRST_DELETION_WITH_REASON: i16 = 5;
const FIRST_DELETION_WITH_ID: i16 = 6;

pub(super) async fn create_topics(
    call: &Call,
    request: CreateTopicsRequest,
) -> CreateTopicsResponse {
    let mut response = CreateTopicsResponse::default();
    let mut seen = HashSet::new();
    for topic in until_shutdown(call, request.topics) {
        let created = if seen.insert(topic.name.clone()) {
            create(call, &topic, request.validate_only).await
        } else {
            Err((
                ResponseError::InvalidRequest,
                format!("the request names {} twice", topic.name.as_str()),
            ))
        };
        let result = CreatableTopicResult::default().with_name(topic.name);
        response.topics.push(match created {
            Ok(created) => created_result(call, result, &created),
            Err((error, why)) => result
                .with_error_code(error.code())
                .with_error_message(Some(wire(why))),
        });
    }
    response
}

/// What the client is told of a topic that was created, as far as its version can say.
fn created_result(
    call: &Call,
    mut result: CreatableTopicResult,
    topic: &Topic,
) -> CreatableTopicResult {
    if call.version >= FIRST_WITH_ID {
        result.topic_id = topic.uuid();
    }
    if call.version < FIRST_WITH_SETTINGS {
        return result;
    }
    let config = |(key, value, source)| {
        CreatableTopicConfigs::default()
            .with_name(wire(key))
            .with_value(Some(wire(value)))
            .with_config_source(source)
    };
    result
        .with_num_partitions(topic.partitions().len() as i32)
        .with_replication_factor(1)
        .with_configs(Some(of_topic(topic).into_iter().map(config).collect()))
}

async fn create(
    call: &Call,
    topic: &CreatableTopic,
    only_check: bool,
) -> Result<Arc<Topic>, Refused> {
    let partitions = partition_count(call, topic)?;
    let mut config = Overrides::new();
    for entry in &topic.configs {
        let name = text(entry.name.clone());
        let Some(value) = entry.value.clone() else {
            return Err((ResponseError::InvalidConfig, format!("{name} has no value")));
        };
        config.insert(name, text(value));
    }
    let created = call.node.topics.create(
        &call.node.journal,
        &topic.name,
        partitions,
        config,
        only_check,
    );
    created.await
}

/// How many partitions a topic is to have; on one node they all lie there.
fn partition_count(call: &Call, topic: &CreatableTopic) -> Result<i32, Refused> {
    let here =
        |assigned: &[kafka_protocol::messages::BrokerId]| assigned.iter().all(|id| *id == NODE_ID);
    if !topic.assignments.is_empty() {
        let mut indexes: Vec<i32> = topic
            .assignments
            .iter()
            .map(|each| each.partition_index)
            .collect();
        indexes.sort_unstable();
        let in_order = indexes
            .iter()
            .zip(0..)
            .all(|(index, expected)| *index == expected);
        let one = |ids: &[kafka_protocol::messages::BrokerId]| ids.len() == 1 && here(ids);
        return if in_order && topic.assignments.iter().all(|each| one(&each.broker_ids)) {
            Ok(indexes.len() as i32)
        } else {
            let why = format!("partitions are numbered from 0, and the only broker is {NODE_ID}");
            Err((ResponseError::InvalidReplicaAssignment, why))
        };
    }
    match i32::from(topic.replication_factor) {
        1 | DEFAULT => {}
        factor => {
            let why = format!(
                "the embedded broker is one node: a replication factor of {factor} cannot be; ask for 1"
            );
            return Err((ResponseError::InvalidReplicationFactor, why));
        }
    }
    Ok(if topic.num_partitions == DEFAULT {
        call.node.config.default_partitions
    } else {
        topic.num_partitions
    })
}

pub(super) async fn delete_topics(
    call: &Call,
    request: DeleteTopicsRequest,
) -> DeleteTopicsResponse {
    let mut response = DeleteTopicsResponse::default();
    let names = request.topic_names.into_iter();
    let named = names.map(|name| (Some(name), Uuid::nil()));
    let by_id = request.topics.into_iter();
    let all = named.chain(by_id.map(|topic| (topic.name, topic.topic_id)));
    for (name, id) in until_shutdown(call, all.collect()) {
        let topics = &call.node.topics;
        let name = match name {
            Some(name) => Ok(name),
            None => topics
                .with_id(id)
                .map(|topic| TopicName(wire(topic.name.clone())))
                .ok_or(ResponseError::UnknownTopicId),
        };
        let deleted = match &name {
            Ok(name) => topics.delete(&call.node.journal, name).await,
            Err(error) => Err((
                *error,
                "This server does not host this topic ID.".to_owned(),
            )),
        };
        let mut result = DeletableTopicResult::default().with_name(name.ok());
        if call.version >= FIRST_DELETION_WITH_ID {
            result.topic_id = id;
        }
        response.responses.push(match deleted {
            Ok(()) => result,
            Err((error, why)) if call.version >= FIRST_DELETION_WITH_REASON => result
                .with_error_code(error.code())
                .with_error_message(Some(wire(why))),
            Err((error, _)) => result.with_error_code(error.code()),
        });
    }
    response
}

pub(super) async fn create_partitions(
    call: &Call,
    request: CreatePartitionsRequest,
) -> CreatePartitionsResponse {
    let mut response = CreatePartitionsResponse::default();
    for topic in until_shutdown(call, request.topics) {
        let grown = call
            .node
            .topics
            .grow(
                &call.node.journal,
                &topic.name,
                topic.count,
                request.validate_only,
            )
            .await;
        let result = CreatePartitionsTopicResult::default().with_name(topic.name);
        response.results.push(match grown {
            Ok(()) => result,
            Err((error, why)) => result
                .with_error_code(error.code())
                .with_error_message(Some(wire(why))),
        });
    }
    response
}

pub(super) async fn delete_records(
    call: &Call,
    request: DeleteRecordsRequest,
) -> DeleteRecordsResponse {
    let mut response = DeleteRecordsResponse::default();
    for topic in request.topics {
        let mut result = DeleteRecordsTopicResult::default().with_name(topic.name.clone());
        for partition in until_shutdown(call, topic.partitions) {
            let index = partition.partition_index;
            let start = call
                .node
                .topics
                .delete_before(&call.node.journal, &topic.name, index, partition.offset)
                .await;
            result.partitions.push(
                DeleteRecordsPartitionResult::default()
                    .with_partition_index(index)
                    .with_error_code(code(&start))
                    .with_low_watermark(start.unwrap_or(-1)),
            );
        }
        response.topics.push(result);
    }
    response
}

/// The only folder for records, with what each partition takes of it.
pub(super) fn describe_log_dirs(
    call: &Call,
    request: DescribeLogDirsRequest,
) -> DescribeLogDirsResponse {
    let wanted = request.topics.map(|topics| {
        let of_topic = |topic: DescribableLogDirTopic| {
            let indexes: HashSet<_> = topic.partitions.into_iter().collect();
            (topic.topic, indexes)
        };
        topics.into_iter().map(of_topic).collect::<HashMap<_, _>>()
    });
    let mut described = Vec::new();
    for topic in call.node.topics.all() {
        let name = TopicName(wire(topic.name.clone()));
        let indexes = match &wanted {
            Some(wanted) => match wanted.get(&name) {
                Some(indexes) => Some(indexes),
                None => continue,
            },
            None => None,
        };
        let partitions = topic
            .partitions()
            .iter()
            .zip(0..)
            .filter(|(_, index)| indexes.is_none_or(|indexes| indexes.contains(index)))
            .map(|(partition, index)| {
                DescribeLogDirsPartition::default()
                    .with_partition_index(index)
                    .with_partition_size(i64::try_from(partition.bytes()).unwrap_or(i64::MAX))
            });
        let topic = DescribeLogDirsTopic::default()
            .with_name(name)
            .with_partitions(partitions.collect());
        described.push(topic);
    }
    let folder = call.node.config.folder.to_string_lossy().into_owned();
    let result = DescribeLogDirsResult::default()
        .with_log_dir(wire(folder))
        .with_topics(described);
    DescribeLogDirsResponse::default().with_results(vec![result])
}

/// The parts of a request, up to the shutdown of the node: these requests are worked on to their end though nobody
/// waits for the answer, and a shutdown waits for them.
pub(super) fn until_shutdown<T>(call: &Call, parts: Vec<T>) -> impl Iterator<Item = T> {
    parts
        .into_iter()
        .take_while(|_| !call.node.shutdown.is_cancelled())
}
