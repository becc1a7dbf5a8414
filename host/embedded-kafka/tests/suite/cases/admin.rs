//! Topics, partitions, records and configuration, as an administrator handles them.

use rdkafka::admin::{
    AdminOptions, ConfigSource, NewPartitions, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::{Offset, TopicPartitionList};

use crate::cluster::{Cluster, PATIENCE, eventually, unique};

pub(crate) fn topics_are_created_and_deleted(cluster: &Cluster) {
    let topic = cluster.topic(3);
    cluster.produce(&topic, 2, &["old"]);
    let create = NewTopic::new(&topic, 3, TopicReplication::Fixed(1));
    assert_eq!(
        create_one(cluster, &create),
        Err(RDKafkaErrorCode::TopicAlreadyExists)
    );
    assert_eq!(delete_one(cluster, &topic), Ok(()));
    let consumer: BaseConsumer = cluster
        .config_with(&[("allow.auto.create.topics", "false")])
        .create()
        .expect("a consumer");
    eventually("the topic is gone", || {
        let metadata = consumer.fetch_metadata(None, PATIENCE).expect("metadata");
        metadata.topics().iter().all(|other| other.name() != topic)
    });
    assert_eq!(
        delete_one(cluster, &topic),
        Err(RDKafkaErrorCode::UnknownTopicOrPartition)
    );
    // One of the same name is another topic.
    let again = NewTopic::new(&topic, 1, TopicReplication::Fixed(1));
    assert_eq!(create_one(cluster, &again), Ok(()));
    cluster.produce(&topic, 0, &["new"]);
    assert_eq!(cluster.values(&topic, 0, 1), ["new"]);
}

pub(crate) fn bad_topics_are_refused(cluster: &Cluster) {
    let name = unique("bad");
    let topic = |name, partitions| NewTopic::new(name, partitions, TopicReplication::Fixed(1));
    let long = "x".repeat(250);
    for (topic, expected) in [
        (topic("no spaces", 1), RDKafkaErrorCode::InvalidTopic),
        (topic("..", 1), RDKafkaErrorCode::InvalidTopic),
        (topic("a/../../b", 1), RDKafkaErrorCode::InvalidTopic),
        (topic(&long, 1), RDKafkaErrorCode::InvalidTopic),
        (topic(&name, 0), RDKafkaErrorCode::InvalidPartitions),
        (
            NewTopic::new(&name, 1, TopicReplication::Fixed(2)),
            RDKafkaErrorCode::InvalidReplicationFactor,
        ),
        (
            topic(&name, 1).set("no.such.key", "1"),
            RDKafkaErrorCode::InvalidConfig,
        ),
        (
            topic(&name, 1).set("retention.ms", "soon"),
            RDKafkaErrorCode::InvalidConfig,
        ),
        (
            topic(&name, 1).set("cleanup.policy", "shred"),
            RDKafkaErrorCode::InvalidConfig,
        ),
    ] {
        assert_eq!(create_one(cluster, &topic), Err(expected), "{topic:?}");
    }
    let checked = AdminOptions::new().validate_only(true);
    let valid = topic(&name, 1);
    let answer = cluster
        .block_on(cluster.admin().create_topics(&[valid], &checked))
        .expect("an answer");
    assert_eq!(answer, [Ok(name.clone())]);
    assert_eq!(
        delete_one(cluster, &name),
        Err(RDKafkaErrorCode::UnknownTopicOrPartition),
        "only checked"
    );
}

pub(crate) fn partitions_are_added(cluster: &Cluster) {
    let topic = cluster.topic(2);
    cluster.produce(&topic, 1, &["before"]);
    let grow = |count| {
        let wanted = [NewPartitions::new(&topic, count)];
        let answer = cluster.block_on(
            cluster
                .admin()
                .create_partitions(&wanted, &AdminOptions::new()),
        );
        answer
            .expect("an answer")
            .remove(0)
            .map(|_| ())
            .map_err(|(_, code)| code)
    };
    assert_eq!(grow(2), Err(RDKafkaErrorCode::InvalidPartitions));
    assert_eq!(grow(1), Err(RDKafkaErrorCode::InvalidPartitions));
    assert_eq!(grow(5), Ok(()));
    let consumer: BaseConsumer = cluster.config().create().expect("a consumer");
    eventually("there are five", || {
        let metadata = consumer
            .fetch_metadata(Some(&topic), PATIENCE)
            .expect("metadata");
        metadata.topics()[0].partitions().len() == 5
    });
    cluster.produce(&topic, 4, &["after"]);
    assert_eq!(cluster.values(&topic, 1, 1), ["before"]);
    assert_eq!(cluster.values(&topic, 4, 1), ["after"]);
}

pub(crate) fn records_are_deleted(cluster: &Cluster) {
    let topic = cluster.topic(1);
    cluster.produce(&topic, 0, &["a", "b", "c", "d"]);
    let delete = |offset| {
        let mut offsets = TopicPartitionList::new();
        offsets
            .add_partition_offset(&topic, 0, offset)
            .expect("an offset");
        let answer = cluster.block_on(
            cluster
                .admin()
                .delete_records(&offsets, &AdminOptions::new()),
        );
        let answer = answer.expect("an answer");
        let element = &answer.elements()[0];
        element
            .error()
            .map(|()| element.offset())
            .map_err(|error| error.rdkafka_error_code())
    };
    let watermarks = || {
        let consumer: BaseConsumer = cluster.config().create().expect("a consumer");
        consumer
            .fetch_watermarks(&topic, 0, PATIENCE)
            .expect("watermarks")
    };
    assert_eq!(delete(Offset::Offset(3)), Ok(Offset::Offset(3)));
    assert_eq!(watermarks(), (3, 4));
    assert_eq!(cluster.values(&topic, 0, 1), ["d"]);
    assert_eq!(
        delete(Offset::Offset(9)),
        Err(Some(RDKafkaErrorCode::OffsetOutOfRange))
    );
    assert_eq!(
        delete(Offset::Offset(1)),
        Ok(Offset::Offset(3)),
        "it does not come back"
    );
    assert_eq!(delete(Offset::End), Ok(Offset::Offset(4)));
    assert_eq!(watermarks(), (4, 4));
    cluster.produce(&topic, 0, &["e"]);
    assert_eq!(cluster.read(&topic, 0, 1)[0].offset, 4);
}

pub(crate) fn configuration_is_described(cluster: &Cluster) {
    let topic = cluster.topic_with(
        1,
        &[("retention.ms", "123456"), ("segment.bytes", "2097152")],
    );
    let describe = |topic: &str| {
        let wanted = [ResourceSpecifier::Topic(topic)];
        let answer = cluster.block_on(
            cluster
                .admin()
                .describe_configs(&wanted, &AdminOptions::new()),
        );
        answer.expect("an answer").remove(0)
    };
    let described = describe(&topic).expect("a configuration");
    for (key, expected, source) in [
        ("retention.ms", "123456", ConfigSource::DynamicTopic),
        ("segment.bytes", "2097152", ConfigSource::DynamicTopic),
        ("cleanup.policy", "delete", ConfigSource::Default),
        ("max.message.bytes", "1048588", ConfigSource::Default),
        ("retention.bytes", "-1", ConfigSource::Default),
    ] {
        let entry = described.get(key).expect(key);
        assert_eq!(
            (entry.value.as_deref(), &entry.source),
            (Some(expected), &source),
            "{key}"
        );
    }
    // The client library does not hand on the error, but there is nothing in it.
    let unknown = describe("no-such-topic").expect("a configuration");
    assert_eq!(unknown.entries, []);
}

fn create_one(cluster: &Cluster, topic: &NewTopic<'_>) -> Result<(), RDKafkaErrorCode> {
    let answer = cluster
        .block_on(cluster.admin().create_topics([topic], &AdminOptions::new()))
        .expect("an answer");
    answer
        .into_iter()
        .next()
        .expect("a result")
        .map(|_| ())
        .map_err(|(_, code)| code)
}

fn delete_one(cluster: &Cluster, topic: &str) -> Result<(), RDKafkaErrorCode> {
    let answer = cluster
        .block_on(
            cluster
                .admin()
                .delete_topics(&[topic], &AdminOptions::new()),
        )
        .expect("an answer");
    answer
        .into_iter()
        .next()
        .expect("a result")
        .map(|_| ())
        .map_err(|(_, code)| code)
}
