//! A member of a consumer group that reads each partition from a queue of its own, and commits what is done.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use rdkafka::consumer::base_consumer::PartitionQueue;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, DefaultConsumerContext};
use rdkafka::{Offset, TopicPartitionList};

use super::{Settings, consumer_config};

/// As often as the host.
const COMMIT_INTERVAL: Duration = Duration::from_millis(250);
/// How long to wait for a partition's next message.
pub(super) const IDLE: Duration = Duration::from_millis(20);

/// One partition that is read.
pub(super) struct Lane {
    pub(super) queue: PartitionQueue<DefaultConsumerContext>,
    pub(super) done: Arc<Done>,
}

/// How far a partition is done.
#[derive(Default)]
pub(super) struct Done {
    /// The offset below which all is done; 0 where nothing is.
    pub(super) next: AtomicI64,
}

impl Done {
    pub(super) fn up_to(&self, next: i64) {
        self.next.store(next, Ordering::Release);
    }
}

/// Joins the group, hands each partition to `work` on a thread of its own, and commits what is done meanwhile. The
/// benchmarks have one member a group, whose first assignment is its last.
pub(super) fn read(
    settings: &Settings,
    work: impl Fn(Lane) + Send + Sync + 'static,
) -> anyhow::Result<()> {
    let consumer: Arc<BaseConsumer> = Arc::new(consumer_config(settings).create()?);
    consumer.subscribe(&[&settings.input])?;
    let assigned = loop {
        consumer.poll(Duration::from_millis(10));
        let assigned = consumer.assignment()?;
        if assigned.count() > 0 {
            break assigned;
        }
    };
    let work = Arc::new(work);
    let mut all = Vec::new();
    for element in assigned.elements() {
        let (topic, partition) = (element.topic(), element.partition());
        // What was fetched before the split would not come into the queue.
        let queue = consumer.split_partition_queue(topic, partition);
        let queue = queue.ok_or_else(|| anyhow::anyhow!("no queue for {topic} {partition}"))?;
        let done = Arc::new(Done::default());
        all.push((topic.to_owned(), partition, done.clone()));
        let (work, lane) = (work.clone(), Lane { queue, done });
        std::thread::spawn(move || work(lane));
    }
    let mut committed = vec![0; all.len()];
    let mut last = Instant::now();
    loop {
        consumer.poll(COMMIT_INTERVAL);
        if last.elapsed() >= COMMIT_INTERVAL {
            last = Instant::now();
            commit(&consumer, &all, &mut committed)?;
        }
    }
}

fn commit(
    consumer: &BaseConsumer,
    all: &[(String, i32, Arc<Done>)],
    committed: &mut [i64],
) -> anyhow::Result<()> {
    let mut list = TopicPartitionList::new();
    for ((topic, partition, done), before) in all.iter().zip(committed) {
        let next = done.next.load(Ordering::Acquire);
        if next > *before {
            *before = next;
            list.add_partition_offset(topic, *partition, Offset::Offset(next))?;
        }
    }
    if list.count() > 0 {
        consumer.commit(&list, CommitMode::Async)?;
    }
    Ok(())
}
