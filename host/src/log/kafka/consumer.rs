//! Reading a stage's partitions as a member of its consumer group.
//!
//! One thread a stage polls librdkafka, whatever the lanes are doing, so that the stage never leaves
//! its group. Each partition has a queue of its own in librdkafka, from which the thread takes records into the partition's
//! bounded buffer as long as there is room: to pause a partition would throw away what was fetched of it.
//! librdkafka's rebalance callback runs on the same thread: it gives a revoked partition's lane time
//! to end, commits what is settled, and only then lets go of the partition.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rdkafka::bindings::rd_kafka_message_leader_epoch;
use rdkafka::config::{ClientConfig, FromClientConfigAndContext};
use rdkafka::consumer::base_consumer::PartitionQueue;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::super::{Gap, LogError};
use super::access::Another;
use super::bootstrap::{Bootstrap, STATISTICS};
use super::gaps::{self, Passed};
use super::leaders::Leaders;
use super::leaving::leave_with_nothing;
use super::membership::{Context, State, list_of};
use super::message::owned;
use super::partition::{Bell, Partition, PartitionSource, Position, Pushed};
use super::question::Question;
use super::start::{Starts, Trouble};
use super::topic_id::{self, TopicIds};
use super::{ClientSettings, Kind, forbidden};
use crate::metrics::Metrics;
use crate::record::Record;

/// How long the thread sleeps unless it is woken; also how fast a stop is seen.
const SLEEP: Duration = Duration::from_millis(50);
/// The least that it sleeps while partitions wait to be read.
const SLEEP_STARTING: Duration = Duration::from_millis(1);
/// Records that are taken from one partition before it is the next one's turn.
const TURN: usize = 1_000;
/// How often settled offsets are committed.
const COMMIT_INTERVAL: Duration = Duration::from_millis(250);
/// How often they are committed though they were before. One of those commits may have failed, as they do while the group
/// hands partitions round, and nobody tells: librdkafka would tell a callback that rust-rdkafka does not set.
const COMMIT_AGAIN_INTERVAL: Duration = Duration::from_secs(5);
/// How long a fetch may wait for records.
const FETCH_WAIT: &str = "fetch.wait.max.ms";
const RACK: &str = "client.rack";
/// What the coordinator of KIP-848's groups says for good, and what passes all the same: a right that is given back, a member of
/// this name whose session ends, a member that was frozen for too long.
const PASSING: [RDKafkaErrorCode; 3] = [
    RDKafkaErrorCode::GroupAuthorizationFailed,
    RDKafkaErrorCode::UnreleasedInstanceId,
    RDKafkaErrorCode::InvalidRequest,
];
/// How long to wait before another client joins.
const ANEW_PAUSE: Duration = Duration::from_secs(3);
/// What is said before why partitions are not read.
const NOT_READ: &str = "partitions are not read yet: ";
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
    /// What it is not allowed to do, in words, as far as the log has said so. It never says that it is allowed again:
    /// [`super::may_read`] tells.
    pub forbidden: mpsc::Receiver<String>,
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
            // A broker answers one fetch at a time. One that asks only for partitions that have nothing new, since the
            // others' queues were full, would keep those waiting for half a second by default. The price: an idle
            // stage asks 20 times a second.
            (FETCH_WAIT, "50"),
            // Of each partition.
            ("queued.max.messages.kbytes", "2048"),
            ("queued.min.messages", "10000"),
        ];
        if !broker_assigns(settings) {
            // librdkafka refuses it elsewhere.
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
                STATISTICS,
            ],
        )
    }

    /// Joins the group.
    pub fn start(
        settings: &ClientSettings,
        subscription: Subscription,
        metrics: Arc<Metrics>,
    ) -> Result<Self, LogError> {
        let (assigned, sources) = mpsc::unbounded_channel();
        let joined = CancellationToken::new();
        let member = Member {
            settings: settings.clone(),
            subscription,
            assigned,
            joined: joined.clone(),
            metrics,
            bell: Arc::default(),
        };
        let refuse = |error| LogError::Refused(format!("cannot make a consumer: {error}"));
        let consumer = member.join().map_err(refuse)?;
        let stop = StopHandle::default();
        let (end, ended) = oneshot::channel();
        // Whoever reads it needs one.
        let (forbid, forbidden) = mpsc::channel(1);
        let thread = Poller {
            consumer: Arc::new(consumer),
            stop: stop.clone(),
            member,
            queues: Vec::new(),
            starting: false,
            reported: HashMap::new(),
            forbid,
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
            forbidden,
            ended,
        })
    }
}

/// Whether it is the broker that assigns partitions, as KIP-848 has it, and not one of the members.
fn broker_assigns(settings: &ClientSettings) -> bool {
    let protocol = settings.properties.get("group.protocol");
    protocol.is_some_and(|protocol| protocol == "consumer")
}

/// What it takes to join the group, again where need be.
struct Member {
    settings: ClientSettings,
    subscription: Subscription,
    assigned: mpsc::UnboundedSender<PartitionSource>,
    joined: CancellationToken,
    metrics: Arc<Metrics>,
    bell: Arc<Bell>,
}

impl Member {
    fn join(&self) -> KafkaResult<BaseConsumer<Context>> {
        let Self {
            settings,
            subscription,
            bell,
            ..
        } = self;
        let mut config = GroupConsumer::config(settings, &subscription.group);
        if let Some(id) = &subscription.instance_id {
            config.set("group.instance.id", id);
        }
        let state = State {
            partitions: HashMap::new(),
            assigned: self.assigned.clone(),
            joined: self.joined.clone(),
            metrics: self.metrics.clone(),
            group: subscription.group.clone(),
            budget: subscription.revoke_budget,
            has_parted: false,
        };
        let fetch_wait = config.get(FETCH_WAIT).and_then(|ms| ms.parse().ok());
        let fetch_wait = Duration::from_millis(fetch_wait.unwrap_or_default());
        let leaders = Leaders::new(fetch_wait, config.get(RACK).is_some());
        let context = Context::new(state, leaders, Bootstrap::new(settings), bell.clone());
        let mut consumer = BaseConsumer::from_config_and_context(&config, context)?;
        consumer.context().bootstrap.is_of(consumer.client());
        let woken = bell.clone();
        consumer.set_nonempty_callback(move || woken.ring());
        let topics: Vec<_> = subscription.topics.iter().map(String::as_str).collect();
        consumer.subscribe(&topics)?;
        Ok(consumer)
    }
}

/// Why the thread reads no more with a client.
enum End {
    Stopped,
    /// This one has failed for good, and another one may do better.
    Failed(String),
}

/// The thread.
struct Poller {
    consumer: Arc<BaseConsumer<Context>>,
    member: Member,
    stop: StopHandle,
    /// Of the partitions that are read.
    queues: Vec<Queue>,
    /// Some partition is not read yet where its lane wants it.
    starting: bool,
    reported: HashMap<String, Instant>,
    /// Where it is told what is not allowed.
    forbid: mpsc::Sender<String>,
}

/// Where librdkafka puts what it has fetched of a partition.
struct Queue {
    partition: Arc<Partition>,
    records: PartitionQueue<Context>,
    /// Of whose leader the last record was, by its epoch; -1 before there is one, and where the log tells none.
    epoch: i32,
}

/// The epoch of the leader that a record was written by.
#[allow(unsafe_code, reason = "rdkafka has no function for it")]
fn leader_epoch(message: &BorrowedMessage<'_>) -> i32 {
    // SAFETY: the message is there for as long as it is borrowed.
    unsafe { rd_kafka_message_leader_epoch(message.ptr()) }
}

impl Poller {
    fn run(mut self) -> Result<(), LogError> {
        self.member.bell.belongs_to_this_thread();
        while let End::Failed(why) = self.poll()? {
            warn!(
                group = self.group(),
                "reading from the log: {why}; joining the group anew"
            );
            if !self.join_anew() {
                break;
            }
        }
        let budget = *self.stop.budget();
        let had_any = self.give_up_all(budget);
        debug!(group = self.group(), "leaving the group");
        self.leave(had_any);
        Ok(())
    }

    /// A member that has partitions leaves when its client is dropped, and one with a name of its own does not leave.
    fn leave(self, had_any: bool) {
        let Subscription { instance_id, .. } = &self.member.subscription;
        let leaves = had_any || instance_id.is_some() || broker_assigns(&self.member.settings);
        // Theirs is the client, too.
        drop(self.queues);
        if !leaves && let Some(consumer) = Arc::into_inner(self.consumer) {
            leave_with_nothing(consumer);
        }
    }

    /// Another client takes the place of the one there is; answers whether it was not told to stop before.
    fn join_anew(&mut self) -> bool {
        self.give_up_all(self.member.subscription.revoke_budget);
        // Before the client whose they are.
        self.queues.clear();
        loop {
            let began = Instant::now();
            while began.elapsed() < ANEW_PAUSE {
                if self.stop.is_stopped() {
                    return false;
                }
                thread::park_timeout(SLEEP);
            }
            match self.member.join() {
                Ok(consumer) => {
                    self.consumer = Arc::new(consumer);
                    return true;
                }
                Err(error) => self.report(format!("cannot make a consumer: {error}")),
            }
        }
    }

    /// Serves one client.
    fn poll(&mut self) -> Result<End, LogError> {
        let mut committed = Instant::now();
        let mut all_committed = committed;
        let mut starts = Starts::new(self.consumer.clone(), self.group().to_owned());
        let mut topics = None;
        let mut another = None;
        while !self.stop.is_stopped() {
            let mut idle = true;
            if let Some(event) = self.consumer.clone().poll(Duration::ZERO) {
                if let Some(why) = self.take_event(event)? {
                    return Ok(End::Failed(why));
                }
                idle = false;
            }
            if self.member.bell.was_called() {
                self.let_go_of_queues();
                self.starting = true;
                idle = false;
            }
            idle &= !self.read_queues()?;
            self.start_those_that_wait(&mut starts);
            if committed.elapsed() >= COMMIT_INTERVAL {
                committed = Instant::now();
                self.pass_markers();
                let again = all_committed.elapsed() >= COMMIT_AGAIN_INTERVAL;
                if again {
                    all_committed = committed;
                    self.ask_another(&mut another);
                }
                self.context().commit_settled(&self.consumer, again);
                self.look_at_topics(&mut topics, again);
            }
            if idle {
                // Whoever rings before this is not missed: it then returns at once.
                thread::park_timeout(self.sleep(&starts));
            }
        }
        Ok(End::Stopped)
    }

    /// Asks another client, by and by, whether it can read what this one can't.
    fn ask_another(&self, asked: &mut Option<Another>) {
        if let Some(another) = asked {
            let Some(can) = another.can_read() else {
                return;
            };
            if can {
                self.context().others_can(&another.place);
            }
        }
        let stuck = self.context().stuck();
        // Each in its turn: what nobody can read hides no other.
        let last = asked.take().map(|another| another.place);
        let next = stuck.iter().find(|place| Some(*place) > last.as_ref());
        *asked = next
            .or(stuck.first())
            .and_then(|place| Another::ask(&self.member.settings, self.group(), place.clone()));
    }

    /// How long there is nothing to do, unless somebody rings.
    fn sleep(&self, starts: &Starts) -> Duration {
        if !self.starting {
            return SLEEP;
        }
        starts.until_look().clamp(SLEEP_STARTING, SLEEP)
    }

    fn group(&self) -> &str {
        &self.member.subscription.group
    }

    fn context(&self) -> &Context {
        self.consumer.context()
    }

    /// An error, or a record that came before its partition had a queue. Answers why the client has failed, if another one may do
    /// better.
    fn take_event(
        &mut self,
        event: Result<BorrowedMessage<'_>, KafkaError>,
    ) -> Result<Option<String>, LogError> {
        match event {
            Ok(message) => {
                let partition = self
                    .context()
                    .lock()
                    .partition(message.topic(), message.partition());
                if let Some(partition) = partition {
                    let record = owned(&message, partition.topic());
                    self.take_in(&partition, &mut VecDeque::from([record]), false);
                }
            }
            Err(error @ KafkaError::MessageConsumptionFatal(code)) if PASSING.contains(&code) => {
                self.report_error("", &error);
                return Ok(Some(code.to_string()));
            }
            Err(KafkaError::MessageConsumptionFatal(code)) => {
                self.give_up_all(Duration::ZERO);
                let why = format!(
                    "the consumer of group {} failed for good: {code}",
                    self.group()
                );
                return Err(LogError::Refused(why));
            }
            Err(error) => self.report_error("", &error),
        }
        Ok(None)
    }

    /// Takes from each queue as much as its partition has room for; answers whether that was anything.
    fn read_queues(&mut self) -> Result<bool, LogError> {
        let mut any = false;
        let mut records = VecDeque::new();
        let mut queues = std::mem::take(&mut self.queues);
        for queue in &mut queues {
            let partition = &queue.partition;
            let turn = partition.room().min(TURN);
            let (mut epoch, mut is_one) = (queue.epoch, queue.epoch >= 0);
            while records.len() < turn {
                match queue.records.poll(Duration::ZERO) {
                    Some(Ok(message)) => {
                        let now = leader_epoch(&message);
                        is_one &= now == std::mem::replace(&mut epoch, now);
                        records.push_back(owned(&message, partition.topic()));
                    }
                    // What ends a client comes to its own queue.
                    Some(Err(error)) => drop(self.take_event(Err(error))?),
                    None => break,
                }
            }
            any |= !records.is_empty();
            queue.epoch = epoch;
            self.take_in(partition, &mut records, is_one);
        }
        self.queues = queues;
        Ok(any)
    }

    /// Takes records into a partition, which are of one leader with those before, or may not be.
    fn take_in(
        &mut self,
        partition: &Arc<Partition>,
        records: &mut VecDeque<Record>,
        are_of_one_leader: bool,
    ) {
        while let Pushed::Jump(expected) = partition.push(records)
            && let Some(came) = records.front().map(|record| record.offset)
        {
            // What librdkafka has just handed on it may fetch again, where a rebalance pauses it between the two. While one leader
            // leads a topic, no other record can have come to its offset.
            let is_known = partition.topic_id().is_some();
            if are_of_one_leader && is_known && came + 1 == expected {
                records.pop_front();
                continue;
            }
            let reading = Position::Reading(Some(expected));
            match gaps::passed(&self.consumer, partition, expected, came) {
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

    fn read(&self) -> Vec<Arc<Partition>> {
        let queues = self.queues.iter();
        queues.map(|queue| queue.partition.clone()).collect()
    }

    /// Markers of transactions, and what was aborted, come to nobody: partitions that are read pass them.
    fn pass_markers(&self) {
        self.tell(gaps::pass_markers(&self.consumer, &self.read()));
    }

    /// Looks from time to time whether the topics are still the same.
    fn look_at_topics(&self, asked: &mut Option<Question<TopicIds>>, again: bool) {
        if again && asked.is_none() {
            let read = self.read();
            let topics = read.iter().map(|partition| &**partition.topic());
            *asked = (!read.is_empty()).then(|| topic_id::ask(&self.consumer, topics));
        }
        if let Some(answer) = asked.as_ref().and_then(Question::answer) {
            *asked = None;
            if let Ok(ids) = answer {
                self.tell(gaps::take_up_ids(&self.read(), &ids));
            }
        }
    }

    /// Tells lanes what is missing where they are read.
    fn tell(&self, gaps: Vec<(Arc<Partition>, i64, Gap)>) {
        for (partition, expected, gap) in gaps {
            let reading = Position::Reading(Some(expected));
            if partition.replace_position(&reading, Position::Gap(gap)) {
                self.hold(&partition);
            }
        }
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
            let bell = self.member.bell.clone();
            records.set_nonempty_callback(move || bell.ring());
            let partition = partition.clone();
            self.queues.push(Queue {
                partition,
                records,
                epoch: -1,
            });
        }
    }

    /// Pauses a partition until its lane has said where it goes on.
    fn hold(&self, partition: &Partition) {
        if let Err(error) = self.consumer.pause(&list_of(partition)) {
            debug!("cannot pause: {error}");
        }
    }

    /// Has partitions read where their lanes want it, as far as the log has said what has to be known before. Waits for nobody.
    fn start_those_that_wait(&mut self, starts: &mut Starts) {
        if !self.starting {
            return;
        }
        let all: Vec<_> = self.context().lock().partitions.values().cloned().collect();
        match starts.look(&all, |partition| self.split(partition)) {
            Ok(some_wait) => self.starting = some_wait,
            Err(error) => self.report_error(NOT_READ, &error),
        }
        for trouble in starts.take_troubles() {
            match trouble {
                Trouble::Error(error) => self.report_error(NOT_READ, &error),
                Trouble::Words(why) => self.report(why),
            }
        }
    }

    /// Answers whether there were any.
    fn give_up_all(&self, budget: Duration) -> bool {
        let all: Vec<_> = {
            let mut state = self.context().lock();
            state.has_parted = true;
            state.partitions.drain().map(|(_, p)| p).collect()
        };
        self.context().part(&self.consumer, &all, budget);
        !all.is_empty()
    }

    /// An error of librdkafka's, and what it means where the log does not allow something.
    fn report_error(&mut self, what: &str, error: &KafkaError) {
        let text = match error.rdkafka_error_code().and_then(forbidden) {
            Some(lacks) => {
                let text = format!("{what}{lacks}: {error}; the group is `{}`", self.group());
                // One that waits to be read says enough.
                let _ = self.forbid.try_send(text.clone());
                text
            }
            None => format!("{what}{error}"),
        };
        self.report(text);
    }

    /// librdkafka repeats an error while it lasts.
    fn report(&mut self, text: String) {
        let now = Instant::now();
        let known = self.reported.get(&text);
        if known.is_some_and(|at| now.duration_since(*at) < REPORT_INTERVAL) {
            return;
        }
        self.reported
            .retain(|_, at| now.duration_since(*at) < REPORT_INTERVAL);
        warn!(group = self.group(), "reading from the log: {text}");
        self.reported.insert(text, now);
    }
}
