//! What a member of a group does where the group gives it partitions or takes them away, and what it commits.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::bootstrap::Bootstrap;
use super::leaders::Leaders;
use super::log_line;
use super::partition::{Bell, Commit, Partition, PartitionSource};
use super::statistics::{Statistics, read};
use crate::metrics::Metrics;
use crate::sync::lock;

/// How long an abandoned lane may take to be gone.
const ABANDON_WAIT: Duration = Duration::from_secs(5);
/// How long the last commit may be refused since the group is about to hand partitions round.
const LAST_COMMIT: Duration = Duration::from_secs(5);
const LAST_COMMIT_INTERVAL: Duration = Duration::from_millis(50);

/// What librdkafka's callbacks work on; all run on the poller's thread.
pub(super) struct Context {
    state: Mutex<State>,
    leaders: Mutex<Leaders>,
    pub(super) bootstrap: Bootstrap,
    /// A poll ends with the first callback, and there may be more to be called: each rings.
    bell: Arc<Bell>,
}

pub(super) struct State {
    pub(super) partitions: HashMap<(String, i32), Arc<Partition>>,
    pub(super) assigned: mpsc::UnboundedSender<PartitionSource>,
    pub(super) joined: CancellationToken,
    pub(super) metrics: Arc<Metrics>,
    pub(super) group: String,
    pub(super) budget: Duration,
    /// Whether the client is about to be dropped: it may be given partitions until it is, of which nobody would take care.
    pub(super) has_parted: bool,
}

impl State {
    pub(super) fn partition(&self, topic: &str, partition: i32) -> Option<Arc<Partition>> {
        self.partitions
            .values()
            .find(|p| p.number() == partition && **p.topic() == *topic)
            .cloned()
    }
}

impl Context {
    pub(super) fn new(
        state: State,
        leaders: Leaders,
        bootstrap: Bootstrap,
        bell: Arc<Bell>,
    ) -> Self {
        let state = Mutex::new(state);
        let leaders = Mutex::new(leaders);
        Self {
            state,
            leaders,
            bootstrap,
            bell,
        }
    }

    /// The partitions that this client can't read, and another one might.
    pub(super) fn stuck(&self) -> Vec<(String, i32)> {
        lock(&self.leaders).stuck()
    }

    pub(super) fn others_can(&self, place: &(String, i32)) {
        lock(&self.leaders).others_can(place);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn assign(&self, list: &TopicPartitionList) {
        let mut state = self.lock();
        if state.has_parted {
            return;
        }
        state.joined.cancel();
        if list.count() > 0 {
            info!(group = state.group, "assigned {}", names(list));
        }
        for mut element in list.elements() {
            // `start` says where each is read. Without an offset librdkafka asks what is committed, and never reads what it is not
            // told of, though it may be later; with the log's end it asks for that, again and again, and may go there long after it
            // was sent elsewhere. For this one it asks nobody.
            let _ = element.set_offset(Offset::Offset(0));
            let (topic, number) = (element.topic(), element.partition());
            let partition = Partition::new(topic, number, self.bell.clone());
            state
                .partitions
                .insert((topic.to_string(), number), partition.clone());
            // The receiver is gone only when the stage is going down.
            let _ = state.assigned.send(PartitionSource::new(partition));
        }
    }

    fn revoke(&self, consumer: &BaseConsumer<Self>, list: &TopicPartitionList) {
        let (revoked, budget) = {
            let mut state = self.lock();
            let revoked: Vec<_> = list
                .elements()
                .iter()
                .filter_map(|e| {
                    state
                        .partitions
                        .remove(&(e.topic().to_string(), e.partition()))
                })
                .collect();
            (revoked, state.budget)
        };
        if revoked.is_empty() {
            return;
        }
        if consumer.assignment_lost() {
            // Others own them by now: what was not committed is theirs.
            warn!(
                "lost {} partition(s): the group gave them to others, or forgot this member",
                revoked.len()
            );
            end_lanes(&revoked, Duration::ZERO);
            self.forget(&revoked);
        } else {
            self.part(consumer, &revoked, budget);
        }
    }

    /// Ends the lanes, commits what they settled, and forgets them.
    pub(super) fn part(
        &self,
        consumer: &BaseConsumer<Self>,
        parting: &[Arc<Partition>],
        budget: Duration,
    ) {
        let end = Instant::now() + budget;
        end_lanes(parting, budget);
        let left = end.saturating_duration_since(Instant::now());
        commit_last(consumer, parting, left.min(LAST_COMMIT));
        self.forget(parting);
    }

    fn forget(&self, gone: &[Arc<Partition>]) {
        let state = self.lock();
        let mut list = TopicPartitionList::new();
        for partition in gone {
            list.add_partition(partition.topic(), partition.number());
        }
        if !gone.is_empty() {
            info!(group = state.group, "released {}", names(&list));
        }
        for partition in gone {
            state
                .metrics
                .remove_lag(&state.group, partition.topic(), partition.number());
        }
    }

    pub(super) fn commit_settled(&self, consumer: &BaseConsumer<Self>, again: bool) {
        let all: Vec<_> = self.lock().partitions.values().cloned().collect();
        if again {
            commit_again(&all);
        }
        if let Err(error) = commit(consumer, &all, CommitMode::Async) {
            warn!("offsets were not committed, and will be again: {error}");
            commit_again(&all);
        }
    }
}

/// Asks the lanes to end and waits for them; those that have not when the budget is spent are abandoned.
fn end_lanes(partitions: &[Arc<Partition>], budget: Duration) {
    for partition in partitions {
        partition.stop();
    }
    let deadline = Instant::now() + budget;
    for partition in partitions {
        if partition.wait_ended(deadline.saturating_duration_since(Instant::now())) {
            continue;
        }
        warn!(
            topic = &**partition.topic(),
            partition = partition.number(),
            "its lane was cut off in the middle of a call; what it had not settled will be delivered again"
        );
        partition.abandon();
        if !partition.wait_ended(ABANDON_WAIT) {
            error!(
                topic = &**partition.topic(),
                partition = partition.number(),
                "the lane does not end"
            );
        }
    }
}

/// What is not committed here is delivered again. A member that takes part in a rebalance is refused in between: it has joined and
/// commits as one of the generation before, or its leader has not assigned yet. librdkafka goes on with that meanwhile, and the
/// partitions are this member's until it gives them up.
fn commit_last(
    consumer: &BaseConsumer<Context>,
    partitions: &[Arc<Partition>],
    patience: Duration,
) {
    let deadline = Instant::now() + patience;
    loop {
        commit_again(partitions);
        let Err(error) = commit(consumer, partitions, CommitMode::Sync) else {
            return;
        };
        let may_pass = is_of_rebalance(&error) && !consumer.assignment_lost();
        if !may_pass || Instant::now() >= deadline {
            warn!("offsets were not committed, their records may be delivered again: {error}");
            return;
        }
        thread::sleep(LAST_COMMIT_INTERVAL);
    }
}

fn is_of_rebalance(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(
            RDKafkaErrorCode::RebalanceInProgress
                | RDKafkaErrorCode::IllegalGeneration
                | RDKafkaErrorCode::StaleMemberEpoch
        )
    )
}

fn commit(
    consumer: &BaseConsumer<Context>,
    partitions: &[Arc<Partition>],
    mode: CommitMode,
) -> KafkaResult<()> {
    let mut list = TopicPartitionList::new();
    for partition in partitions {
        if let Some(Commit { offset, words }) = partition.take_uncommitted() {
            let mut element = list.add_partition(partition.topic(), partition.number());
            // Fails only for offsets that are none.
            let _ = element.set_offset(Offset::Offset(offset));
            element.set_metadata(words);
        }
    }
    match list.count() {
        0 => Ok(()),
        _ => consumer.commit(&list, mode),
    }
}

fn commit_again(partitions: &[Arc<Partition>]) {
    for partition in partitions {
        partition.commit_again();
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.bell.ring();
        lock(&self.leaders).hear(facility, message);
        log_line(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.bell.ring();
        debug!(target: "librdkafka", "consumer: {error}: {reason}");
    }

    fn stats_raw(&self, statistics: &[u8]) {
        self.bell.ring();
        let Some(statistics) = read::<Statistics>(statistics) else {
            return;
        };
        self.bootstrap.remind(&statistics.brokers);
        let state = self.lock();
        let mut leaders = lock(&self.leaders);
        leaders.hear_answers(&statistics);
        leaders.keep(|place| state.partitions.contains_key(place));
        for partition in state.partitions.values() {
            let trouble = leaders.trouble(&statistics, partition);
            partition.unread().set_leader(trouble);
            let figures = statistics
                .topics
                .get(&**partition.topic())
                .and_then(|topic| topic.partitions.get(&partition.number()))
                .filter(|p| p.hi_offset >= 0);
            let Some(figures) = figures else { continue };
            let from = partition
                .settled()
                .or_else(|| partition.committed_offset())
                .unwrap_or_else(|| figures.committed_offset.max(figures.lo_offset));
            let lag = (figures.hi_offset - from).max(0);
            state
                .metrics
                .set_lag(&state.group, partition.topic(), partition.number(), lag);
        }
    }
}

impl ConsumerContext for Context {
    fn pre_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        match rebalance {
            Rebalance::Assign(list) => self.assign(list),
            Rebalance::Revoke(list) => self.revoke(consumer, list),
            Rebalance::Error(error) => warn!("rebalance: {error}"),
        }
    }

    /// Until its lane has said where it is to be read.
    fn post_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        self.bell.call();
        if let Rebalance::Assign(list) = rebalance
            && let Err(error) = consumer.pause(list)
        {
            debug!("cannot pause: {error}");
        }
    }
}

/// `topic 0 1 2, other 5`.
fn names(list: &TopicPartitionList) -> String {
    let mut topics = BTreeMap::<String, Vec<i32>>::new();
    for element in list.elements() {
        let numbers = topics.entry(element.topic().to_string()).or_default();
        numbers.push(element.partition());
    }
    let topics = topics.into_iter().map(|(topic, mut numbers)| {
        numbers.sort_unstable();
        let numbers: Vec<_> = numbers.iter().map(i32::to_string).collect();
        format!("{topic} {}", numbers.join(" "))
    });
    topics.collect::<Vec<_>>().join(", ")
}

pub(super) fn list_of(partition: &Partition) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    list.add_partition(partition.topic(), partition.number());
    list
}
