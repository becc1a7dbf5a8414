//! DescribeConfigs: what holds for a topic, and for the broker.

use std::collections::HashSet;

use kafka_protocol::ResponseError;
use kafka_protocol::messages::describe_configs_request::DescribeConfigsResource;
use kafka_protocol::messages::describe_configs_response::{
    DescribeConfigsResourceResult, DescribeConfigsResult,
};
use kafka_protocol::messages::{DescribeConfigsRequest, DescribeConfigsResponse};

use super::{Call, wire};
use crate::node::NODE_ID;
use crate::storage::topics::Refused;

const TOPIC: i8 = 2;
const BROKER: i8 = 4;

/// Where a value is from, as the protocol counts.
const FROM_TOPIC: i8 = 1;
const FROM_BROKER: i8 = 4;
const FROM_DEFAULT: i8 = 5;

/// Key, value, and where the value is from.
type Value = (&'static str, String, i8);

pub(super) fn describe(call: &Call, request: DescribeConfigsRequest) -> DescribeConfigsResponse {
    let describe = |resource: DescribeConfigsResource| {
        let result = DescribeConfigsResult::default()
            .with_resource_type(resource.resource_type)
            .with_resource_name(resource.resource_name.clone());
        let values = match values(call, &resource) {
            Ok(values) => values,
            Err((error, why)) => {
                return result
                    .with_error_code(error.code())
                    .with_error_message(Some(wire(why)));
            }
        };
        let wanted = |key: &str| match &resource.configuration_keys {
            Some(keys) => keys.iter().any(|wanted| wanted.as_str() == key),
            None => true,
        };
        let configs =
            values
                .into_iter()
                .filter(|(key, ..)| wanted(key))
                .map(|(key, value, source)| {
                    DescribeConfigsResourceResult::default()
                        .with_name(wire(key))
                        .with_value(Some(wire(value)))
                        .with_config_source(source)
                        .with_read_only(resource.resource_type == BROKER)
                });
        result.with_configs(configs.collect())
    };
    let mut seen = HashSet::new();
    let once = request
        .resources
        .into_iter()
        .filter(|each| seen.insert((each.resource_type, each.resource_name.clone())));
    DescribeConfigsResponse::default().with_results(once.map(describe).collect())
}

fn values(call: &Call, resource: &DescribeConfigsResource) -> Result<Vec<Value>, Refused> {
    let name = resource.resource_name.as_str();
    match resource.resource_type {
        TOPIC => {
            let topic = call.node.topics.get(name).ok_or_else(|| {
                (
                    ResponseError::UnknownTopicOrPartition,
                    "This server does not host this topic-partition.".to_owned(),
                )
            })?;
            let source = |key| {
                if topic.config.contains_key(key) {
                    FROM_TOPIC
                } else {
                    FROM_DEFAULT
                }
            };
            Ok(topic
                .settings
                .describe()
                .into_iter()
                .map(|(key, value)| (key, value, source(key)))
                .collect())
        }
        BROKER if name.is_empty() || name == NODE_ID.to_string() => Ok(broker(call)),
        BROKER => Err((
            ResponseError::InvalidRequest,
            format!("the only broker is {NODE_ID}"),
        )),
        other => Err((
            ResponseError::InvalidRequest,
            format!("resources of type {other} have no configuration here"),
        )),
    }
}

/// The broker's settings under the names that Kafka has for them.
fn broker(call: &Call) -> Vec<Value> {
    let config = &call.node.config;
    let mut values = vec![
        (
            "auto.create.topics.enable",
            config.auto_create_topics.to_string(),
            FROM_BROKER,
        ),
        (
            "num.partitions",
            config.default_partitions.to_string(),
            FROM_BROKER,
        ),
        ("default.replication.factor", "1".to_owned(), FROM_BROKER),
    ];
    for (key, value) in call.node.topics.defaults().describe() {
        let key = match key {
            "cleanup.policy" => "log.cleanup.policy",
            "max.message.bytes" => "message.max.bytes",
            "retention.bytes" => "log.retention.bytes",
            "retention.ms" => "log.retention.ms",
            "segment.bytes" => "log.segment.bytes",
            other => other,
        };
        values.push((key, value, FROM_BROKER));
    }
    values
}
