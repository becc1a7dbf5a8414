//! ApiVersions, Metadata and FindCoordinator: how a client finds its way.

use std::sync::Arc;

use kafka_protocol::ResponseError;
use kafka_protocol::messages::api_versions_response::ApiVersion;
use kafka_protocol::messages::metadata_response::{
    MetadataResponseBroker, MetadataResponsePartition, MetadataResponseTopic,
};
use kafka_protocol::messages::{
    ApiVersionsRequest, ApiVersionsResponse, FindCoordinatorRequest, FindCoordinatorResponse,
    MetadataRequest, MetadataResponse, TopicName,
};
use uuid::Uuid;

use super::{BadRequest, Call, TAKEN, once, wire};
use crate::node::{NO_TRANSACTIONS, NODE_ID};
use crate::storage::topics::Topic;

/// The first version in which a client says whether a topic may be created.
const FIRST_WITH_CREATION: i16 = 4;
const GROUP_COORDINATOR: i8 = 0;
/// The first version of FindCoordinator that librdkafka does not know.
const FIRST_WITH_SHOWN_ERROR: i16 = 3;
/// The first version of Metadata in which a topic can be named by its id alone.
const FIRST_WITH_IDS: i16 = 12;

/// The versions taken; to a version of this request that is not taken, the same with an error.
pub(super) fn api_versions(call: &Call) -> Result<ApiVersionsResponse, BadRequest> {
    let keys = TAKEN.iter().map(|(key, min, max)| {
        ApiVersion::default()
            .with_api_key(*key as i16)
            .with_min_version(*min)
            .with_max_version(*max)
    });
    let response = ApiVersionsResponse::default().with_api_keys(keys.collect());
    if call.version < 0 {
        return Ok(response.with_error_code(ResponseError::UnsupportedVersion.code()));
    }
    call.decode::<ApiVersionsRequest>().map(|_| response)
}

/// The broker and its topics; topics that are missing are created if the broker and the client allow it.
pub(super) async fn metadata(call: &Call, request: MetadataRequest) -> MetadataResponse {
    let node = &call.node;
    let may_create = node.config.auto_create_topics
        && (call.version < FIRST_WITH_CREATION || request.allow_auto_topic_creation);
    let mut response = MetadataResponse::default()
        .with_brokers(vec![
            MetadataResponseBroker::default()
                .with_node_id(NODE_ID.into())
                .with_host(wire(node.address.ip().to_string()))
                .with_port(i32::from(node.address.port())),
        ])
        .with_cluster_id(Some(wire(node.cluster.clone())))
        .with_controller_id(NODE_ID.into());
    match request.topics {
        Some(topics) if !(topics.is_empty() && call.version == 0) => {
            let named = topics.into_iter().map(|topic| (topic.name, topic.topic_id));
            for (name, id) in once(named.collect()) {
                response.topics.push(match name {
                    Some(name) => named_topic(call, name, may_create).await,
                    None => topic_with_id(call, id),
                });
            }
        }
        _ => response
            .topics
            .extend(node.topics.all().iter().map(|topic| topic_metadata(topic))),
    }
    response
}

/// This node. Transactions have no coordinator: whose client shows people what it is told is told so. librdkafka, which
/// asks in a lower version, would look for one for ever; it hears of it when it asks for a producer id.
pub(super) fn find_coordinator(
    call: &Call,
    request: FindCoordinatorRequest,
) -> FindCoordinatorResponse {
    let address = call.node.address;
    if request.key_type != GROUP_COORDINATOR && call.version >= FIRST_WITH_SHOWN_ERROR {
        call.node.tell_of_transactions();
        return FindCoordinatorResponse::default()
            .with_error_code(ResponseError::UnsupportedVersion.code())
            .with_error_message(Some(wire(NO_TRANSACTIONS)))
            .with_node_id((-1).into());
    }
    FindCoordinatorResponse::default()
        .with_node_id(NODE_ID.into())
        .with_host(wire(address.ip().to_string()))
        .with_port(i32::from(address.port()))
}

async fn named_topic(call: &Call, name: TopicName, may_create: bool) -> MetadataResponseTopic {
    match describe(call, &name, may_create).await {
        Ok(topic) => topic_metadata(&topic),
        Err(error) => MetadataResponseTopic::default()
            .with_error_code(error.code())
            .with_name(Some(name)),
    }
}

fn topic_with_id(call: &Call, id: Uuid) -> MetadataResponseTopic {
    match call.node.topics.with_id(id) {
        Some(topic) => topic_metadata(&topic),
        // Only the versions in which it can be asked for have room for a topic without a name.
        None => MetadataResponseTopic::default()
            .with_error_code(ResponseError::UnknownTopicId.code())
            .with_topic_id(id)
            .with_name((call.version < FIRST_WITH_IDS).then(TopicName::default)),
    }
}

async fn describe(call: &Call, name: &str, may_create: bool) -> Result<Arc<Topic>, ResponseError> {
    let topics = &call.node.topics;
    if let Some(topic) = topics.get(name) {
        return Ok(topic);
    }
    if !may_create || call.node.shutdown.is_cancelled() {
        return Err(ResponseError::UnknownTopicOrPartition);
    }
    let partitions = call.node.config.default_partitions;
    match topics
        .create(
            &call.node.journal,
            name,
            partitions,
            Default::default(),
            false,
        )
        .await
    {
        Ok(topic) => Ok(topic),
        // Somebody else created it just now.
        Err((ResponseError::TopicAlreadyExists, _)) => {
            topics.get(name).ok_or(ResponseError::LeaderNotAvailable)
        }
        Err((error, why)) => {
            tracing::warn!(
                topic = name,
                "could not create a topic that was asked for: {why}"
            );
            Err(error)
        }
    }
}

fn topic_metadata(topic: &Topic) -> MetadataResponseTopic {
    let node = vec![NODE_ID.into()];
    let partitions = (0..topic.partitions().len()).map(|index| {
        MetadataResponsePartition::default()
            .with_partition_index(index as i32)
            .with_leader_id(NODE_ID.into())
            .with_replica_nodes(node.clone())
            .with_isr_nodes(node.clone())
    });
    MetadataResponseTopic::default()
        .with_name(Some(wire(topic.name.clone()).into()))
        .with_topic_id(topic.uuid())
        .with_partitions(partitions.collect())
}
