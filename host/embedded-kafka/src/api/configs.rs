//! DescribeConfigs: what holds for a topic, and for the broker. AlterConfigs and IncrementalAlterConfigs: what is to hold
//! for a topic.

use std::collections::HashSet;

use bytes::{BufMut, Bytes};
use kafka_protocol::ResponseError;
use kafka_protocol::messages::alter_configs_request::AlterableConfig;
use kafka_protocol::messages::alter_configs_response::AlterConfigsResourceResponse;
use kafka_protocol::messages::describe_configs_request::DescribeConfigsResource;
use kafka_protocol::messages::describe_configs_response::{
    DescribeConfigsResourceResult, DescribeConfigsResult,
};
use kafka_protocol::messages::{
    AlterConfigsRequest, AlterConfigsResponse, DescribeConfigsRequest, DescribeConfigsResponse,
    IncrementalAlterConfigsRequest, IncrementalAlterConfigsResponse,
    incremental_alter_configs_request as incremental_request,
    incremental_alter_configs_response as incremental_response,
};

use super::admin::until_shutdown;
use super::{BadRequest, Call, text, wire};
use crate::node::NODE_ID;
use crate::storage::topic_config::{Overrides, is_list};
use crate::storage::topics::{Refused, Topic};

const TOPIC: i8 = 2;
const BROKER: i8 = 4;

/// Where a value is from, as the protocol counts.
const FROM_TOPIC: i8 = 1;
const FROM_BROKER: i8 = 4;
const FROM_DEFAULT: i8 = 5;

/// What may be done to a key, as the protocol counts.
const SET: i8 = 0;
const DELETE: i8 = 1;
const APPEND: i8 = 2;
const SUBTRACT: i8 = 3;

/// Key, value, and where the value is from.
pub(super) type Value = (&'static str, String, i8);

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

/// [`describe`] in its first version, which the codec does not have.
pub(super) fn describe_v0(call: &Call) -> Result<Bytes, BadRequest> {
    // The next version also says whether synonyms are wanted.
    let described = describe(call, call.decode_next(&[0])?);
    let mut body = Vec::new();
    body.put_i32(described.throttle_time_ms);
    body.put_i32(described.results.len() as i32);
    for result in described.results {
        body.put_i16(result.error_code);
        put_text(&mut body, result.error_message.as_deref());
        body.put_i8(result.resource_type);
        put_text(&mut body, Some(&result.resource_name));
        body.put_i32(result.configs.len() as i32);
        for config in result.configs {
            put_text(&mut body, Some(&config.name));
            put_text(&mut body, config.value.as_deref());
            body.put_u8(config.read_only.into());
            body.put_u8((config.config_source == FROM_DEFAULT).into());
            body.put_u8(config.is_sensitive.into());
        }
    }
    Ok(call.framed(&body))
}

fn put_text(body: &mut Vec<u8>, text: Option<&str>) {
    let Some(text) = text else {
        return body.put_i16(-1);
    };
    let text = &text.as_bytes()[..text.len().min(i16::MAX as usize)];
    body.put_i16(text.len() as i16);
    body.put_slice(text);
}

/// Replaces the configuration of topics.
pub(super) async fn alter(call: &Call, request: AlterConfigsRequest) -> AlterConfigsResponse {
    let mut response = AlterConfigsResponse::default();
    for resource in until_shutdown(call, request.resources) {
        let configs = resource.configs;
        let change = |_: &Overrides| {
            let with_value = |config: AlterableConfig| match config.value {
                Some(value) => Ok((text(config.name), text(value))),
                None => Err(format!("{} has no value", config.name.as_str())),
            };
            configs.into_iter().map(with_value).collect()
        };
        let (kind, name) = (resource.resource_type, resource.resource_name);
        let altered = configure(call, kind, &name, change, request.validate_only).await;
        let result = AlterConfigsResourceResponse::default()
            .with_resource_type(kind)
            .with_resource_name(name);
        response.responses.push(match altered {
            Ok(()) => result,
            Err((error, why)) => result
                .with_error_code(error.code())
                .with_error_message(Some(wire(why))),
        });
    }
    response
}

/// Changes single keys of the configuration of topics.
pub(super) async fn alter_incrementally(
    call: &Call,
    request: IncrementalAlterConfigsRequest,
) -> IncrementalAlterConfigsResponse {
    let mut response = IncrementalAlterConfigsResponse::default();
    for resource in until_shutdown(call, request.resources) {
        let configs = resource.configs;
        let change = |old: &Overrides| {
            let mut overrides = old.clone();
            configs
                .into_iter()
                .try_for_each(|config| apply(&mut overrides, config))
                .map(|()| overrides)
        };
        let (kind, name) = (resource.resource_type, resource.resource_name);
        let altered = configure(call, kind, &name, change, request.validate_only).await;
        let result = incremental_response::AlterConfigsResourceResponse::default()
            .with_resource_type(kind)
            .with_resource_name(name);
        response.responses.push(match altered {
            Ok(()) => result,
            Err((error, why)) => result
                .with_error_code(error.code())
                .with_error_message(Some(wire(why))),
        });
    }
    response
}

async fn configure(
    call: &Call,
    kind: i8,
    name: &str,
    change: impl FnOnce(&Overrides) -> Result<Overrides, String> + Send,
    only_check: bool,
) -> Result<(), Refused> {
    if kind != TOPIC {
        let why = "the embedded broker takes configuration for topics only; its own is what it was started with";
        return Err((ResponseError::InvalidRequest, why.to_owned()));
    }
    let node = &call.node;
    node.topics
        .configure(&node.journal, name, change, only_check)
        .await
}

/// One change of one key.
fn apply(
    overrides: &mut Overrides,
    config: incremental_request::AlterableConfig,
) -> Result<(), String> {
    let key = text(config.name);
    let value = config.value.map(text);
    let list = |of: &Overrides| -> Vec<String> {
        let list = of.get(&key).map_or("", String::as_str).split(',');
        let items = list.map(str::trim).filter(|item| !item.is_empty());
        items.map(str::to_owned).collect()
    };
    match (config.config_operation, value) {
        (DELETE, _) => drop(overrides.remove(&key)),
        (SET, Some(value)) => drop(overrides.insert(key, value)),
        (APPEND | SUBTRACT, _) if !is_list(&key) => {
            return Err(format!("{key} is not a list: it can be set or deleted"));
        }
        (APPEND, Some(value)) => {
            let mut items = list(overrides);
            if items.is_empty() {
                // What holds without a word is what is added to.
                items.push("delete".to_owned());
            }
            if !items.contains(&value) {
                items.push(value);
            }
            overrides.insert(key, items.join(","));
        }
        (SUBTRACT, Some(value)) => {
            let mut items = list(overrides);
            items.retain(|item| *item != value);
            overrides.insert(key, items.join(","));
        }
        (SET | APPEND | SUBTRACT, None) => return Err(format!("{key} has no value")),
        (other, _) => return Err(format!("{other} is not an operation on a configuration")),
    }
    Ok(())
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
            Ok(of_topic(&topic))
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

/// What holds for a topic.
pub(super) fn of_topic(topic: &Topic) -> Vec<Value> {
    let source = |key| {
        if topic.config.contains_key(key) {
            FROM_TOPIC
        } else {
            FROM_DEFAULT
        }
    };
    let described = topic.settings.describe().into_iter();
    described
        .map(|(key, value)| (key, value, source(key)))
        .collect()
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
            "delete.retention.ms" => "log.cleaner.delete.retention.ms",
            "max.compaction.lag.ms" => "log.cleaner.max.compaction.lag.ms",
            "message.timestamp.type" => "log.message.timestamp.type",
            "min.cleanable.dirty.ratio" => "log.cleaner.min.cleanable.ratio",
            "min.compaction.lag.ms" => "log.cleaner.min.compaction.lag.ms",
            "segment.ms" => "log.roll.ms",
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
