//! Topics: made, filled, and looked at afterwards.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use futures::executor::block_on;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::Message;
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Offset, TopicPartitionList};

/// How long one answer of the log may take.
const ASK: Duration = Duration::from_secs(30);
/// How long a topic may take to be filled or to be deleted.
const LONG: Duration = Duration::from_secs(300);

/// What both sides configure their clients with.
pub(crate) fn config(brokers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    config
}

/// The Kafka that the benchmarks run on.
pub(crate) struct Log {
    pub(crate) brokers: String,
    admin: AdminClient<DefaultClientContext>,
    reader: BaseConsumer,
}

/// How long the records of a topic took to be appended, by the broker's clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Appended {
    pub(crate) records: u64,
    /// From the first to the last.
    pub(crate) time: Duration,
}

impl Log {
    pub(crate) fn new(brokers: &str) -> anyhow::Result<Self> {
        let mut reading = config(brokers);
        reading.set("group.id", "bench.reader");
        reading.set("enable.auto.commit", "false");
        reading.set("enable.partition.eof", "false");
        Ok(Self {
            brokers: brokers.to_owned(),
            admin: config(brokers).create()?,
            reader: reading.create()?,
        })
    }

    /// As [`Self::create`], without what was in it.
    pub(crate) fn make_anew(&self, topic: &str, partitions: i32) -> anyhow::Result<()> {
        let is_there = || -> anyhow::Result<bool> {
            let metadata = self.reader.fetch_metadata(None, ASK)?;
            Ok(metadata.topics().iter().any(|known| known.name() == topic))
        };
        if is_there()? {
            self.delete(&[topic])?;
        }
        let deadline = Instant::now() + ASK;
        while is_there()? && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
        self.create(topic, partitions)
    }

    /// A topic whose records the broker stamps with its own clock.
    pub(crate) fn create(&self, name: &str, partitions: i32) -> anyhow::Result<()> {
        let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1))
            .set("message.timestamp.type", "LogAppendTime");
        let answers = block_on(self.admin.create_topics([&topic], &AdminOptions::new()))?;
        for answer in answers {
            if let Err((topic, code)) = answer {
                bail!("cannot create {topic}: {code}");
            }
        }
        // Its leaders are known a moment later.
        let deadline = Instant::now() + ASK;
        while Instant::now() < deadline {
            match self.ends(name) {
                Ok(ends) if ends.len() == usize::try_from(partitions)? => return Ok(()),
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        bail!("{name} has no leaders");
    }

    pub(crate) fn delete(&self, topics: &[&str]) -> anyhow::Result<()> {
        let answers = block_on(self.admin.delete_topics(topics, &AdminOptions::new()))?;
        for answer in answers {
            if let Err((topic, code)) = answer {
                bail!("cannot delete {topic}: {code}");
            }
        }
        Ok(())
    }

    /// Appends so many records, each with its number's key and value.
    pub(crate) fn fill(
        &self,
        topic: &str,
        count: u64,
        record: impl Fn(u64) -> (String, Vec<u8>),
    ) -> anyhow::Result<()> {
        let mut config = config(&self.brokers);
        config.set("linger.ms", "20");
        config.set("partitioner", "murmur2_random");
        config.set("queue.buffering.max.messages", "200000");
        let producer: ThreadedProducer<DefaultProducerContext> = config.create()?;
        for n in 0..count {
            let (key, value) = record(n);
            let mut sending = BaseRecord::to(topic).key(&key).payload(&value);
            while let Err((error, back)) = producer.send(sending) {
                if error.rdkafka_error_code() != Some(RDKafkaErrorCode::QueueFull) {
                    return Err(error).context("cannot fill a topic");
                }
                std::thread::sleep(Duration::from_millis(2));
                sending = back;
            }
        }
        producer.flush(LONG)?;
        let there: u64 = self.ends(topic)?.iter().sum();
        ensure!(there == count, "{topic} has {there} of {count} records");
        Ok(())
    }

    /// Each partition's number of records: none was ever removed.
    pub(crate) fn ends(&self, topic: &str) -> anyhow::Result<Vec<u64>> {
        let metadata = self.reader.fetch_metadata(Some(topic), ASK)?;
        let found = metadata.topics().iter().find(|t| t.name() == topic);
        let partitions = found.map_or(0, |topic| topic.partitions().len());
        let end = |partition| -> Result<u64, KafkaError> {
            let (_, end) = self.reader.fetch_watermarks(topic, partition, ASK)?;
            Ok(u64::try_from(end).unwrap_or_default())
        };
        let ends: Result<_, _> = (0..i32::try_from(partitions)?).map(end).collect();
        Ok(ends?)
    }

    /// How many records a topic has behind these ends.
    pub(crate) fn behind(&self, topic: &str, before: &[u64]) -> anyhow::Result<u64> {
        let ends = self.ends(topic)?;
        Ok(ends.iter().sum::<u64>().saturating_sub(before.iter().sum()))
    }

    /// When the records of a topic were appended that are behind these ends.
    pub(crate) fn appended(&self, topic: &str, before: &[u64]) -> anyhow::Result<Appended> {
        let ends = self.ends(topic)?;
        let (mut firsts, mut lasts, mut records) = (HashMap::new(), HashMap::new(), 0);
        for ((partition, end), before) in (0..).zip(ends).zip(before) {
            if end > *before {
                firsts.insert(partition, i64::try_from(*before)?);
                lasts.insert(partition, i64::try_from(end - 1)?);
                records += end - before;
            }
        }
        let first = self.timestamps(topic, firsts)?.into_iter().min();
        let last = self.timestamps(topic, lasts)?.into_iter().max();
        let time = last.unwrap_or(0).saturating_sub(first.unwrap_or(0));
        Ok(Appended {
            records,
            time: Duration::from_millis(u64::try_from(time).unwrap_or(0)),
        })
    }

    /// Of one record in each of these partitions, by their offsets: milliseconds by the broker's clock, in no order.
    fn timestamps(&self, topic: &str, mut wanted: HashMap<i32, i64>) -> anyhow::Result<Vec<i64>> {
        let mut list = TopicPartitionList::new();
        for (partition, offset) in &wanted {
            list.add_partition_offset(topic, *partition, Offset::Offset(*offset))?;
        }
        self.reader.assign(&list)?;
        // A partition that was paused stays so when it is assigned again.
        self.reader.resume(&list)?;
        let mut times = Vec::with_capacity(wanted.len());
        let deadline = Instant::now() + ASK;
        while !wanted.is_empty() {
            ensure!(
                Instant::now() < deadline,
                "{topic}: {wanted:?} did not come"
            );
            let message = self.reader.poll(Duration::from_secs(1)).transpose()?;
            // One of the assignment before may still come, and those behind the one that is wanted.
            if let Some(message) = message
                && message.topic() == topic
                && wanted.get(&message.partition()) == Some(&message.offset())
            {
                wanted.remove(&message.partition());
                times.push(message.timestamp().to_millis().context("a timestamp")?);
                let mut done = TopicPartitionList::new();
                done.add_partition(topic, message.partition());
                self.reader.pause(&done)?;
            }
        }
        // The topic may be gone soon.
        self.reader.unassign()?;
        Ok(times)
    }
}
