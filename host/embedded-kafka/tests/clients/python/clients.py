"""Python's clients of Kafka on a broker: clients.py CLIENT BROKERS TOPIC.

Each creates TOPIC with two partitions, produces to it in every codec, reads it in a group in two turns, looks at what an
administrator looks at, changes the configuration, and deletes the topic. What is wrong ends the process with an error.
"""

import asyncio
import sys
import time

CODECS = ["none", "gzip", "snappy", "lz4", "zstd"]
PATIENCE_S = 30


def expected(turn):
    return sorted(f"{turn} {codec} {i} {'x' * 100}" for codec in CODECS for i in range(20))


def until(what, ask):
    end = time.monotonic() + PATIENCE_S
    while not ask():
        assert time.monotonic() < end, f"still not so: {what}"
        time.sleep(0.1)


def kafka_python(brokers, topic):
    from kafka import KafkaConsumer, KafkaProducer
    from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient, NewPartitions, NewTopic

    admin = KafkaAdminClient(bootstrap_servers=brokers)
    admin.create_topics([NewTopic(topic, num_partitions=2, replication_factor=1)])
    until("the topic is there", lambda: topic in admin.list_topics())
    for turn in range(2):
        for codec in CODECS:
            compression = None if codec == "none" else codec
            producer = KafkaProducer(bootstrap_servers=brokers, compression_type=compression, linger_ms=20, acks="all")
            sent = [
                producer.send(topic, value=f"{turn} {codec} {i} {'x' * 100}".encode(), key=b"k", partition=i % 2)
                for i in range(20)
            ]
            producer.flush()
            assert all(each.get(PATIENCE_S).offset >= 0 for each in sent)
            producer.close()
        consumer = KafkaConsumer(
            topic, bootstrap_servers=brokers, group_id=topic, auto_offset_reset="earliest", enable_auto_commit=False
        )
        seen = []
        end = time.monotonic() + PATIENCE_S
        while len(seen) < 100 and time.monotonic() < end:
            for records in consumer.poll(timeout_ms=500).values():
                seen += [record.value.decode() for record in records]
        assert sorted(seen) == expected(turn), f"{len(seen)} records"
        consumer.commit()
        if turn == 0:
            assert topic in [group["group_id"] if isinstance(group, dict) else group[0] for group in admin.list_groups()]
        consumer.close()
    resource = ConfigResource(ConfigResourceType.TOPIC, topic, {"retention.ms": "77777"})
    admin.alter_configs([resource])
    of_topic = [ConfigResource(ConfigResourceType.TOPIC, topic)]
    until("the configuration is told", lambda: "77777" in repr(admin.describe_configs(of_topic)))
    admin.create_partitions({topic: NewPartitions(3)})
    assert admin.list_group_offsets(topic)
    admin.delete_groups([topic])
    admin.delete_topics([topic])
    until("the topic is gone", lambda: topic not in admin.list_topics())


async def aiokafka_on(brokers, topic):
    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic
    from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

    admin = AIOKafkaAdminClient(bootstrap_servers=brokers)
    await admin.start()
    await admin.create_topics([NewTopic(topic, num_partitions=2, replication_factor=1)])
    for turn in range(2):
        for codec in CODECS:
            compression = None if codec == "none" else codec
            producer = AIOKafkaProducer(
                bootstrap_servers=brokers, compression_type=compression, linger_ms=20, enable_idempotence=True
            )
            await producer.start()
            await asyncio.gather(
                *[
                    producer.send_and_wait(topic, f"{turn} {codec} {i} {'x' * 100}".encode(), partition=i % 2)
                    for i in range(20)
                ]
            )
            await producer.stop()
        consumer = AIOKafkaConsumer(
            topic, bootstrap_servers=brokers, group_id=topic, auto_offset_reset="earliest", enable_auto_commit=False
        )
        await consumer.start()
        seen = []
        while len(seen) < 100:
            record = await asyncio.wait_for(consumer.getone(), PATIENCE_S)
            seen.append(record.value.decode())
        assert sorted(seen) == expected(turn)
        await consumer.commit()
        await consumer.stop()
    groups = await admin.list_consumer_groups()
    assert topic in [group[0] for group in groups], groups
    assert await admin.list_consumer_group_offsets(topic)
    await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {"retention.ms": "77777"})])
    end = time.monotonic() + PATIENCE_S
    while "77777" not in repr(await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])):
        assert time.monotonic() < end, "the configuration is not told"
        await asyncio.sleep(0.1)
    await admin.delete_topics([topic])
    await admin.close()


def confluent(brokers, topic):
    from confluent_kafka import Consumer, OFFSET_INVALID, Producer, TopicCollection, TopicPartition
    from confluent_kafka import ConsumerGroupState
    from confluent_kafka.admin import (
        AdminClient,
        AlterConfigOpType,
        ConfigEntry,
        ConfigResource,
        NewTopic,
        OffsetSpec,
        ResourceType,
    )

    base = {"bootstrap.servers": brokers}
    admin = AdminClient(base)
    admin.create_topics([NewTopic(topic, 2, 1, config={"cleanup.policy": "compact,delete"})])[topic].result(PATIENCE_S)
    until("the topic is there", lambda: topic in admin.list_topics().topics)
    described = admin.describe_topics(TopicCollection([topic]))[topic].result(PATIENCE_S)
    assert str(described.topic_id) not in ("", "AAAAAAAAAAAAAAAAAAAAAA"), described.topic_id
    for turn in range(2):
        for codec in CODECS:
            producer = Producer({**base, "compression.type": codec, "linger.ms": 20, "enable.idempotence": True})
            failed = []
            for i in range(20):
                value = f"{turn} {codec} {i} {'x' * 100}"
                producer.produce(
                    topic, value, f"{turn} {i}", partition=i % 2, on_delivery=lambda error, _: error and failed.append(error)
                )
            assert producer.flush(PATIENCE_S) == 0 and not failed, failed
        consumer = Consumer(
            {**base, "group.id": topic, "auto.offset.reset": "earliest", "enable.auto.commit": False}
        )
        consumer.subscribe([topic])
        seen = []
        end = time.monotonic() + PATIENCE_S
        while len(seen) < 100 and time.monotonic() < end:
            record = consumer.poll(0.5)
            if record is not None:
                assert record.error() is None, record.error()
                seen.append(record.value().decode())
        assert sorted(seen) == expected(turn), f"{len(seen)} records"
        consumer.commit(asynchronous=False)
        listed = admin.list_consumer_groups(states={ConsumerGroupState.STABLE}).result(PATIENCE_S)
        assert topic in [group.group_id for group in listed.valid]
        consumer.close()
    resource = ConfigResource(ResourceType.TOPIC, topic)
    resource.add_incremental_config(ConfigEntry("retention.ms", "77777", incremental_operation=AlterConfigOpType.SET))
    admin.incremental_alter_configs([resource])[resource].result(PATIENCE_S)

    def retention():
        described = admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic)])
        return next(iter(described.values())).result(PATIENCE_S)["retention.ms"].value

    until("the configuration is told", lambda: retention() == "77777")
    partition = TopicPartition(topic, 0)
    newest = admin.list_offsets({partition: OffsetSpec.max_timestamp()})[partition].result(PATIENCE_S)
    assert newest.offset >= 0 and newest.timestamp > 0, newest
    admin.delete_records([TopicPartition(topic, 0, 5)])
    admin.delete_consumer_groups([topic])[topic].result(PATIENCE_S)
    admin.delete_topics([topic])[topic].result(PATIENCE_S)


def main():
    client, brokers, topic = sys.argv[1:]
    if client == "kafka-python":
        kafka_python(brokers, topic)
    elif client == "aiokafka":
        asyncio.run(aiokafka_on(brokers, topic))
    else:
        confluent(brokers, topic)


main()
