//! Reading a stage's partitions as a member of its consumer group.
//!
//! One thread a stage polls librdkafka, whatever the lanes are doing, so that the stage never leaves
//! its group. Each partition has a queue of its own in librdkafka, from which the thread takes records into the partition's
//! bounded buffer as long as there is room: to pause a partition would throw away what was fetched of it.
//! librdkafka's rebalance callback runs on the same thread: it gives a revoked partition's lane time
//! to end, commits what is settled, and only then lets go of the partition.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::base_consumer::PartitionQueue;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::statistics::Statistics;
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::super::LogError;
use super::message::owned;
use super::partition::{Bell, Partition, PartitionSource, Position, Pushed};
use super::start::{self, Passed};
use super::{ClientSettings, Kind, log_line};
use crate::metrics::Metrics;
use crate::record::Record;

/// How long the thread sleeps unless it is woken; also how fast a stop is seen.
const SLEEP: Duration = Duration::from_millis(50);
/// The least that it sleeps while partitions wait to be read.
const SLEEP_STARTING: Duration = Duration::from_millis(2);
/// Records that are taken from one partition before it is the next one's turn.
const TURN: usize = 1_000;
/// How often settled offsets are committed.
const COMMIT_INTERVAL: Duration = Duration::from_millis(250);
/// How often they are committed though they were before. One of those commits may have failed, as they do while the group
/// hands partitions round, and nobody tells: librdkafka would tell a callback that rust-rdkafka does not set.
const COMMIT_AGAIN_INTERVAL: Duration = Duration::from_secs(5);
/// How often librdkafka reports how far the partitions reach, in milliseconds.
const STATISTICS_MS: &str = "2000";
/// How long an abandoned lane may take to be gone.
const ABANDON_WAIT: Duration = Duration::from_secs(5);
/// How long until the log is asked again where partitions are to be read from, after it did not answer.
const START_RETRY: Duration = Duration::from_secs(1);
/// The same where librdkafka has not taken a partition for assigned yet.
const START_AGAIN: Duration = Duration::from_millis(20);
/// The same error is reported once in this time.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// What a group member reads, and how it parts with it.
#[derive(Clone, Debug)]
pub struct Subscription {
    /// The consumer group.
    pub group: String,
    /// The topics.
    pub topics: Vec<String>,
    /// The member's name, under which it has its partitions again after a restart that is shorter than its session.
    pub instance_id: Option<String>,
    /// How long a lane may take to end when its partition is revoked.
    pub revoke_budget: Duration,
}

/// A running member of a consumer group.
pub struct GroupConsumer {
    /// Ends it.
    pub stop: StopHandle,
    /// Cancelled once the group has given it partitions for the first time, or none where it has too few.
    pub joined: CancellationToken,
    /// Each partition that it is assigned, as a source; dropping the source says that its lane has ended.
    pub assigned: mpsc::UnboundedReceiver<PartitionSource>,
    /// Resolves when the member has left the group; an error says why it did so by itself.
    pub ended: oneshot::Receiver<Result<(), LogError>>,
}

/// Asks a member of a group to stop.
#[derive(Clone, Default)]
pub struct StopHandle(Arc<Control>);

#[derive(Default)]
struct Control {
    stop: AtomicBool,
    /// How long the lanes may take to end at a stop.
    budget: Mutex<Duration>,
}

impl StopHandle {
    /// The member's lanes get `budget` to end, what they settled is committed, and it leaves the group.
    pub fn stop(&self, budget: Duration) {
        *self.budget() = budget;
        self.0.stop.store(true, Ordering::Release);
    }

    fn is_stopped(&self) -> bool {
        self.0.stop.load(Ordering::Acquire)
    }

    fn budget(&self) -> MutexGuard<'_, Duration> {
        self.0.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GroupConsumer {
    /// A member's configuration.
    pub(super) fn config(settings: &ClientSettings, group: &str) -> ClientConfig {
        let mut defaults = vec![
            // librdkafka waits a whole second by default before it fetches again into a queue that was full.
            ("fetch.queue.backoff.ms", "10"),
            // Of each partition.
            ("queued.max.messages.kbytes", "2048"),
            ("queued.min.messages", "10000"),
        ];
        // With KIP-848's protocol the broker assigns, and librdkafka refuses the property.
        let protocol = settings.properties.get("group.protocol");
        if protocol.map(String::as_str) != Some("consumer") {
            defaults.push(("partition.assignment.strategy", "cooperative-sticky"));
        }
        settings.client_config(
            Kind::Consumer,
            &defaults,
            &[
                ("group.id", group),
                ("enable.auto.commit", "false"),
                ("enable.auto.offset.store", "false"),
                // Where a lane begins is found out by `start`. A partition that is read out of its range goes on at
                // its first record, which shows what is missing.
                ("auto.offset.reset", "earliest"),
                ("statistics.interval.ms", STATISTICS_MS),
            ],
        )
    }

    /// Joins the group.
    pub fn start(
        settings: &ClientSettings,
        subscription: Subscription,
        metrics: Arc<Metrics>,
    ) -> Result<Self, LogError> {
        let mut config = Self::config(settings, &subscription.group);
        if let Some(id) = &subscription.instance_id {
            config.set("group.instance.id", id);
        }
        let (assigned, sources) = mpsc::unbounded_channel();
        let bell = Arc::<Bell>::default();
        let joined = CancellationToken::new();
        let context = Context(Mutex::new(State {
            partitions: HashMap::new(),
            assigned,
            joined: joined.clone(),
            bell: bell.clone(),
            metrics,
            group: subscription.group.clone(),
            budget: subscription.revoke_budget,
        }));
        let refuse = |error| LogError::Refused(format!("cannot make a consumer: {error}"));
        let mut consumer =
            BaseConsumer::from_config_and_context(&config, context).map_err(refuse)?;
        let woken = bell.clone();
        consumer.set_nonempty_callback(move || woken.ring());
        let topics: Vec<_> = subscription.topics.iter().map(String::as_str).collect();
        consumer.subscribe(&topics).map_err(refuse)?;
        let stop = StopHandle::default();
        let (end, ended) = oneshot::channel();
        let thread = Poller {
            consumer: Arc::new(consumer),
            stop: stop.clone(),
            group: subscription.group,
            bell,
            queues: Vec::new(),
            starting: false,
            start_after: Instant::now(),
            reported: HashMap::new(),
        };
        std::thread::Builder::new()
            .name("consumer".into())
            .spawn(move || {
                // Nobody waits for the answer when the host is going down hard.
                let _ = end.send(thread.run());
            })
            .map_err(|error| LogError::Unavailable(format!("cannot start a thread: {error}")))?;
        Ok(Self {
            stop,
            joined,
            assigned: sources,
            ended,
        })
    }
}

/// The thread.
struct Poller {
    consumer: Arc<BaseConsumer<Context>>,
    stop: StopHandle,
    group: String,
    bell: Arc<Bell>,
    /// Of the partitions that are read.
    queues: Vec<Queue>,
    /// Some partition is not read yet where its lane wants it.
    starting: bool,
    /// Not to be tried again before.
    start_after: Instant,
    reported: HashMap<String, Instant>,
}

/// Where librdkafka puts what it has fetched of a partition.
struct Queue {
    partition: Arc<Partition>,
    records: PartitionQueue<Context>,
}

impl Poller {
    fn run(mut self) -> Result<(), LogError> {
        self.bell.belongs_to_this_thread();
        let mut committed = Instant::now();
        let mut all_committed = committed;
        while !self.stop.is_stopped() {
            let mut idle = true;
            if let Some(event) = self.consumer.clone().poll(Duration::ZERO) {
                self.take_event(event)?;
                idle = false;
            }
            if self.bell.was_called() {
                self.let_go_of_queues();
                self.starting = true;
                idle = false;
            }
            idle &= !self.read_queues()?;
            self.start_those_that_wait();
            if committed.elapsed() >= COMMIT_INTERVAL {
                committed = Instant::now();
                let again = all_committed.elapsed() >= COMMIT_AGAIN_INTERVAL;
                if again {
                    all_committed = committed;
                }
                self.context().commit_settled(&self.consumer, again);
            }
            if idle {
                // Whoever rings before this is not missed: it then returns at once.
                thread::park_timeout(self.sleep());
            }
        }
        let budget = *self.stop.budget();
        self.give_up_all(budget);
        debug!(group = self.group, "leaving the group");
        Ok(())
    }

    /// How long there is nothing to do, unless somebody rings.
    fn sleep(&self) -> Duration {
        if !self.starting {
            return SLEEP;
        }
        let until_start = self.start_after.saturating_duration_since(Instant::now());
        until_start.clamp(SLEEP_STARTING, SLEEP)
    }

    fn context(&self) -> &Context {
        self.consumer.context()
    }

    /// An error, or a record that came before its partition had a queue.
    fn take_event(
        &mut self,
        event: Result<BorrowedMessage<'_>, KafkaError>,
    ) -> Result<(), LogError> {
        match event {
            Ok(message) => {
                let partition = self
                    .context()
                    .lock()
                    .partition(message.topic(), message.partition());
                if let Some(partition) = partition {
                    let record = owned(&message, partition.topic());
                    self.take_in(&partition, &mut VecDeque::from([record]));
                }
            }
            Err(KafkaError::MessageConsumptionFatal(code)) => {
                self.give_up_all(Duration::ZERO);
                let why = format!(
                    "the consumer of group {} failed for good: {code}",
                    self.group
                );
                return Err(LogError::Refused(why));
            }
            Err(error) => self.report(&error),
        }
        Ok(())
    }

    /// Takes from each queue as much as its partition has room for; answers whether that was anything.
    fn read_queues(&mut self) -> Result<bool, LogError> {
        let mut any = false;
        let mut records = VecDeque::new();
        let queues = std::mem::take(&mut self.queues);
        for queue in &queues {
            let partition = &queue.partition;
            let turn = partition.room().min(TURN);
            while records.len() < turn {
                match queue.records.poll(Duration::ZERO) {
                    Some(Ok(message)) => records.push_back(owned(&message, partition.topic())),
                    Some(Err(error)) => self.take_event(Err(error))?,
                    None => break,
                }
            }
            any |= !records.is_empty();
            self.take_in(partition, &mut records);
        }
        self.queues = queues;
        Ok(any)
    }

    fn take_in(&mut self, partition: &Arc<Partition>, records: &mut VecDeque<Record>) {
        while let Pushed::Jump(expected) = partition.push(records)
            && let Some(came) = records.front().map(|record| record.offset)
        {
            let reading = Position::Reading(Some(expected));
            match start::passed(&self.consumer, partition, expected, came) {
                Passed::Nothing => {
                    // The lane may have gone elsewhere meanwhile: then these records are not wanted any more.
                    if partition.replace_position(&reading, Position::Reading(Some(came))) {
                        continue;
                    }
                }
                Passed::Gap(gap) => {
                    partition.replace_position(&reading, Position::Gap(gap));
                    self.hold(partition);
                }
                Passed::Unknown => {
                    partition.replace_position(&reading, Position::Wanted(Some(expected)));
                    self.hold(partition);
                    self.starting = true;
                }
            }
            break;
        }
        records.clear();
    }

    /// Drops the queues of partitions that were given up. To drop one whose partition is read would strand it.
    fn let_go_of_queues(&mut self) {
        let state = self.consumer.context().lock();
        self.queues.retain(|queue| {
            let partition = &queue.partition;
            let owned = state.partition(partition.topic(), partition.number());
            owned.is_some_and(|owned| Arc::ptr_eq(&owned, partition))
        });
    }

    /// Gives a partition that is about to be read a queue of its own. Not before librdkafka has begun with it: it would
    /// then put all into the common one again.
    fn split(&mut self, partition: &Arc<Partition>) {
        if self
            .queues
            .iter()
            .any(|queue| Arc::ptr_eq(&queue.partition, partition))
        {
            return;
        }
        let queue = self
            .consumer
            .split_partition_queue(partition.topic(), partition.number());
        if let Some(mut records) = queue {
            let bell = self.bell.clone();
            records.set_nonempty_callback(move || bell.ring());
            let partition = partition.clone();
            self.queues.push(Queue { partition, records });
        }
    }

    /// Pauses a partition until its lane has said where it goes on.
    fn hold(&self, partition: &Partition) {
        if let Err(error) = self.consumer.pause(&list_of(partition)) {
            debug!("cannot pause: {error}");
        }
    }

    /// Has partitions read where their lanes want it. May wait for the log, within the bounds of `start`.
    fn start_those_that_wait(&mut self) {
        if !self.starting || Instant::now() < self.start_after {
            return;
        }
        let all: Vec<_> = self.context().lock().partitions.values().cloned().collect();
        let consumer = self.consumer.clone();
        match start::start(&consumer, &all, |partition| self.split(partition)) {
            Ok(all_started) => {
                self.starting = !all_started;
                self.start_after = Instant::now() + START_AGAIN;
            }
            Err(error) => {
                debug!("partitions are not read yet: {error}");
                self.start_after = Instant::now() + START_RETRY;
            }
        }
    }

    fn give_up_all(&self, budget: Duration) {
        let all: Vec<_> = self
            .context()
            .lock()
            .partitions
            .drain()
            .map(|(_, p)| p)
            .collect();
        self.context().part(&self.consumer, &all, budget);
    }

    /// librdkafka repeats an error while it lasts.
    fn report(&mut self, error: &KafkaError) {
        let text = error.to_string();
        let now = Instant::now();
        let known = self.reported.get(&text);
        if known.is_some_and(|at| now.duration_since(*at) < REPORT_INTERVAL) {
            return;
        }
        self.reported
            .retain(|_, at| now.duration_since(*at) < REPORT_INTERVAL);
        warn!(group = self.group, "reading from the log: {text}");
        self.reported.insert(text, now);
    }
}

/// What librdkafka's callbacks work on; all run on the poller's thread.
pub(super) struct Context(Mutex<State>);

struct State {
    partitions: HashMap<(String, i32), Arc<Partition>>,
    assigned: mpsc::UnboundedSender<PartitionSource>,
    joined: CancellationToken,
    bell: Arc<Bell>,
    metrics: Arc<Metrics>,
    group: String,
    budget: Duration,
}

impl State {
    fn partition(&self, topic: &str, partition: i32) -> Option<Arc<Partition>> {
        self.partitions
            .values()
            .find(|p| p.number() == partition && **p.topic() == *topic)
            .cloned()
    }
}

impl Context {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn assign(&self, list: &TopicPartitionList) {
        let mut state = self.lock();
        state.joined.cancel();
        if list.count() > 0 {
            info!(group = state.group, "assigned {}", names(list));
        }
        for element in list.elements() {
            let (topic, number) = (element.topic(), element.partition());
            let partition = Partition::new(topic, number, state.bell.clone());
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
    fn part(&self, consumer: &BaseConsumer<Self>, parting: &[Arc<Partition>], budget: Duration) {
        end_lanes(parting, budget);
        commit_again(parting);
        commit(consumer, parting, CommitMode::Sync);
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

    fn commit_settled(&self, consumer: &BaseConsumer<Self>, again: bool) {
        let all: Vec<_> = self.lock().partitions.values().cloned().collect();
        if again {
            commit_again(&all);
        }
        commit(consumer, &all, CommitMode::Async);
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

fn commit(consumer: &BaseConsumer<Context>, partitions: &[Arc<Partition>], mode: CommitMode) {
    let mut list = TopicPartitionList::new();
    for partition in partitions {
        if let Some(offset) = partition.take_uncommitted() {
            // Fails only for offsets that are none.
            let _ = list.add_partition_offset(
                partition.topic(),
                partition.number(),
                Offset::Offset(offset),
            );
        }
    }
    if list.count() == 0 {
        return;
    }
    if let Err(error) = consumer.commit(&list, mode) {
        warn!("offsets were not committed, their records may be delivered again: {error}");
        commit_again(partitions);
    }
}

fn commit_again(partitions: &[Arc<Partition>]) {
    for partition in partitions {
        partition.commit_again();
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_line(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        debug!(target: "librdkafka", "consumer: {error}: {reason}");
    }

    fn stats(&self, statistics: Statistics) {
        let state = self.lock();
        for partition in state.partitions.values() {
            let figures = statistics
                .topics
                .get(&**partition.topic())
                .and_then(|topic| topic.partitions.get(&partition.number()))
                .filter(|p| p.hi_offset >= 0);
            let Some(figures) = figures else { continue };
            let from = partition
                .settled()
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
        self.lock().bell.call();
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
