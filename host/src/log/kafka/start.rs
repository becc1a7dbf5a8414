//! Where partitions are read from, and whether all that is to be read is still there.
//!
//! All runs on the consumer's thread, which reads the stage's other partitions: the log is asked, and nobody waits for what it
//! answers. A partition whose leader hangs waits alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::{Offset, TopicPartitionList};
use tracing::{debug, info, warn};

use super::super::Gap;
use super::super::committed::{Committed, known};
use super::forbidden;
use super::gaps::{outside, replaced};
use super::membership::{Context, list_of};
use super::offsets::{Bounds, GroupOffsets, Place};
use super::partition::{Partition, Position};
use super::question::{Failure, Question};
use super::topic_id::{self, TopicId, TopicIds};

/// What is said where nothing more is known of it.
const UNSAID: &str = "the group's coordinator does not say what is committed";
/// How long until the log is asked again what it did not answer, and how long in the end, after pauses that double.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How old an answer may be when the last one comes that is needed beside it.
const LONGEST_AGE: Duration = Duration::from_secs(5);
/// How many partitions' leaders are asked at one time. Those that hang make room after each try.
const ASKED_AT_ONCE: usize = 256;
/// How often it is looked for answers while they may come any moment, and when they have not come for long.
const LOOK: Duration = Duration::from_millis(2);
const LOOK_LATER: Duration = Duration::from_millis(50);
const SOON: Duration = Duration::from_millis(500);
/// How long until a partition is tried again that librdkafka has not taken for assigned yet.
const SEEK_AGAIN: Duration = Duration::from_millis(20);
/// How long librdkafka may take to seek: it asks nobody for that.
const SEEK: Duration = Duration::from_secs(3);

/// The partitions that wait to be read, and what the log was asked about them.
pub(super) struct Starts {
    consumer: Arc<BaseConsumer<Context>>,
    group: String,
    starts: BTreeMap<Place, Start>,
    /// Of which partitions.
    committed: Option<(GroupOffsets, BTreeSet<Place>)>,
    /// Of which topics.
    topics: Option<(Question<TopicIds>, BTreeSet<String>)>,
    /// It is not looked again before.
    next_look: Instant,
    /// Why the log does not say what the group has committed.
    troubles: Vec<Trouble>,
    /// Topics of which the log tells no id, and of which that was said. They are those of one stage.
    untold: BTreeSet<String>,
}

/// Why partitions are not read yet, to be said.
pub(super) enum Trouble {
    Error(KafkaError),
    Words(String),
}

/// A partition that waits to be read.
struct Start {
    partition: Arc<Partition>,
    /// Where its lane wants it read.
    wanted: Option<i64>,
    committed: Need<Option<Committed>>,
    topic: Need<Option<String>>,
    bounds: Need<(i64, i64)>,
    asked: Option<Bounds>,
}

/// What has to be known before a partition is read.
struct Need<T> {
    answer: Option<T>,
    /// When it came.
    answered: Option<Instant>,
    tries: u32,
    /// Not to be asked for again before.
    not_before: Option<Instant>,
    /// Why it is not known yet.
    why: Option<String>,
}

impl<T> Default for Need<T> {
    fn default() -> Self {
        Self {
            answer: None,
            answered: None,
            tries: 0,
            not_before: None,
            why: None,
        }
    }
}

impl<T> Need<T> {
    fn is(&mut self, answer: T, now: Instant) {
        self.answer = Some(answer);
        self.answered = Some(now);
    }

    /// What has come long ago, while other answers were waited for, is asked for anew.
    fn outdate(&mut self, now: Instant) {
        let is_old = |at: Instant| now.duration_since(at) > LONGEST_AGE;
        if self.answered.is_some_and(is_old) {
            *self = Self::default();
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.answer.is_none() && self.not_before.is_none_or(|at| at <= now)
    }

    fn failed(&mut self, now: Instant, why: String) {
        self.why = Some(why);
        self.not_before = Some(now + pause(self.tries));
        self.tries = self.tries.saturating_add(1);
    }

    fn lacks(&self) -> Option<&String> {
        self.why.as_ref().filter(|_| self.answer.is_none())
    }
}

fn pause(tries: u32) -> Duration {
    let doubled = 2_u32.saturating_pow(tries);
    FIRST_PAUSE.saturating_mul(doubled).min(LONGEST_PAUSE)
}

impl Start {
    fn new(partition: Arc<Partition>, wanted: Option<i64>) -> Self {
        Self {
            partition,
            wanted,
            committed: Need::default(),
            topic: Need::default(),
            bounds: Need::default(),
            asked: None,
        }
    }

    /// Where reading begins, once all is known that has to be.
    fn decide(&self) -> Option<Result<i64, Gap>> {
        let committed = self.committed.answer.as_ref()?.as_ref();
        let topic = self.topic.answer.as_ref()?.as_deref();
        let (first, end) = self.bounds.answer?;
        let known = known(self.wanted, committed);
        let gap = known.and_then(|expected| {
            let before = self.partition.topic_id();
            let before = before.as_deref().or_else(|| committed?.topic());
            replaced(expected, before, topic).or_else(|| outside(expected, first, end))
        });
        Some(gap.map_or(Ok(known.unwrap_or(first)), Err))
    }

    /// Answers count together: the topic may be another by now, or have lost its first records.
    fn outdate(&mut self, now: Instant) {
        self.committed.outdate(now);
        self.topic.outdate(now);
        self.bounds.outdate(now);
    }

    /// Says why it is not read yet, where the log was asked and has not answered.
    fn say_why(&self) {
        let lacks = self.committed.lacks().or_else(|| self.topic.lacks());
        let lacks = lacks.or_else(|| self.bounds.lacks());
        self.partition.unread().set_start(lacks.cloned());
    }
}

impl Starts {
    pub(super) fn new(consumer: Arc<BaseConsumer<Context>>, group: String) -> Self {
        Self {
            consumer,
            group,
            starts: BTreeMap::new(),
            committed: None,
            topics: None,
            next_look: Instant::now(),
            troubles: Vec::new(),
            untold: BTreeSet::new(),
        }
    }

    /// How long there is nothing to do.
    pub(super) fn until_look(&self) -> Duration {
        self.next_look.saturating_duration_since(Instant::now())
    }

    /// What is to be said since it was last asked.
    pub(super) fn take_troubles(&mut self) -> Vec<Trouble> {
        std::mem::take(&mut self.troubles)
    }

    /// Has those partitions read that wait for it, as far as the log has answered what has to be known, and asks for the rest.
    /// Answers whether some still wait.
    ///
    /// Each is `split` from the others just before its first record may come.
    pub(super) fn look(
        &mut self,
        partitions: &[Arc<Partition>],
        split: impl FnMut(&Arc<Partition>),
    ) -> KafkaResult<bool> {
        let now = Instant::now();
        if now < self.next_look && self.are_known(partitions) {
            return Ok(true);
        }
        self.enter(partitions);
        self.hear_committed(now);
        self.hear_topics(now);
        self.hear_bounds(now);
        for start in self.starts.values_mut() {
            start.outdate(now);
            start.say_why();
        }
        self.next_look = now + LOOK_LATER;
        let all_sought = self.begin(split)?;
        self.ask(now);
        self.next_look = now
            + match self.is_soon(now) {
                true => LOOK,
                false if !all_sought => SEEK_AGAIN,
                false => LOOK_LATER,
            };
        Ok(!self.starts.is_empty())
    }

    /// Whether no partition has come to wait that did not.
    fn are_known(&self, partitions: &[Arc<Partition>]) -> bool {
        let waiting = partitions.iter().filter(|p| p.wanted().is_some()).count();
        waiting == self.starts.len()
    }

    /// Whether an answer may come any moment.
    fn is_soon(&self, now: Instant) -> bool {
        let soon = |asked: Instant| now.duration_since(asked) < SOON;
        let bounds = self
            .starts
            .values()
            .filter_map(|start| start.asked.as_ref());
        (self.committed.as_ref()).is_some_and(|(question, _)| soon(question.asked()))
            || (self.topics.as_ref()).is_some_and(|(question, _)| soon(question.asked()))
            || bounds.map(Bounds::asked).any(soon)
    }

    /// Those that wait now; what is known of others, or of where they were wanted before, is forgotten.
    fn enter(&mut self, partitions: &[Arc<Partition>]) {
        let mut known = std::mem::take(&mut self.starts);
        for partition in partitions {
            let Some(wanted) = partition.wanted() else {
                continue;
            };
            let place = place(partition);
            let start = known
                .remove(&place)
                .filter(|start| Arc::ptr_eq(&start.partition, partition) && start.wanted == wanted);
            let start = start.unwrap_or_else(|| {
                // What is answered now was asked before: it may have been another host's since.
                if let Some((_, asked)) = &mut self.committed {
                    asked.remove(&place);
                }
                Start::new(partition.clone(), wanted)
            });
            self.starts.insert(place, start);
        }
    }

    fn hear_committed(&mut self, now: Instant) {
        let Some((answer, asked)) = heard(&mut self.committed, GroupOffsets::answer) else {
            return;
        };
        let mut unsaid = UNSAID.to_owned();
        let answer = match answer {
            Ok(answer) => answer,
            Err(Failure { code, why }) => {
                debug!("the log does not say what the group has committed: {why}");
                unsaid = unsaid_offsets(code);
                self.troubles.push(match code {
                    RDKafkaErrorCode::OperationTimedOut => Trouble::Words(unsaid.clone()),
                    code => Trouble::Error(KafkaError::OffsetFetch(code)),
                });
                Vec::new()
            }
        };
        let mut unreadable = BTreeMap::new();
        for (place, found) in answer {
            let start = self.starts.get_mut(&place);
            let Some(start) = start.filter(|_| asked.contains(&place)) else {
                continue;
            };
            match found {
                Ok(committed) => start.committed.is(committed, now),
                // Not the same as nothing.
                Err(code) => drop(unreadable.insert(place, unreadable_offset(code))),
            }
        }
        let first = unreadable.iter().next();
        self.troubles.extend(
            first.map(|((topic, number), why)| Trouble::Words(format!("{topic} {number}: {why}"))),
        );
        let asked = (self.starts.iter_mut()).filter(|(place, _)| asked.contains(place));
        for (place, start) in asked.filter(|(_, start)| start.committed.answer.is_none()) {
            let why = unreadable.remove(place);
            start
                .committed
                .failed(now, why.unwrap_or_else(|| unsaid.clone()));
        }
    }

    fn hear_topics(&mut self, now: Instant) {
        let Some((answer, asked)) = heard(&mut self.topics, Question::answer) else {
            return;
        };
        let is_never_told = |code| {
            use rdkafka::error::RDKafkaErrorCode as Code;
            matches!(
                code,
                Code::UnsupportedFeature | Code::UnsupportedVersion | Code::NotImplemented
            )
        };
        let said = match &answer {
            Ok(topics) => Some(topics),
            Err(failure) => {
                debug!("the log does not describe topics: {}", failure.why);
                None
            }
        };
        let is_untold = answer
            .as_ref()
            .is_err_and(|failure| is_never_told(failure.code));
        for start in self.starts.values_mut() {
            if start.topic.answer.is_some() || !asked.contains(&**start.partition.topic()) {
                continue;
            }
            let untold = is_untold.then_some(&TopicId::Untold);
            let told = said.and_then(|topics| topics.get(&**start.partition.topic()));
            match told.or(untold) {
                Some(TopicId::Is(id)) => start.topic.is(Some(id.clone()), now),
                Some(TopicId::Untold) => {
                    start.topic.is(None, now);
                    say_untold(&mut self.untold, start.partition.topic());
                }
                // Without its id, a topic that was made anew would be read from the old one's offset.
                Some(TopicId::Missing) => {
                    let why = "the log says that there is no such topic";
                    start.topic.failed(now, why.to_owned());
                }
                None => {
                    let why = "the log does not say which topic it is";
                    start.topic.failed(now, why.to_owned());
                }
            }
        }
    }

    fn hear_bounds(&mut self, now: Instant) {
        for start in self.starts.values_mut() {
            match start.asked.as_mut().and_then(Bounds::answer) {
                Some(Ok(bounds)) => start.bounds.is(bounds, now),
                Some(Err(Failure { why, .. })) => {
                    let why = format!("its leader does not say where it begins and ends: {why}");
                    start.bounds.failed(now, why);
                }
                None => continue,
            }
            start.asked = None;
        }
    }

    /// Asks for what is not known, each thing after its pause.
    fn ask(&mut self, now: Instant) {
        if self.committed.is_none() {
            let due = |(place, start): (&Place, &Start)| {
                start.committed.is_due(now).then(|| place.clone())
            };
            let places: Vec<_> = self.starts.iter().filter_map(due).collect();
            if !places.is_empty() {
                let question = GroupOffsets::ask(&self.consumer, &places);
                self.committed = Some((question, places.into_iter().collect()));
            }
        }
        if self.topics.is_none() {
            let due = self.starts.values().filter(|s| s.topic.is_due(now));
            let topics: BTreeSet<_> = due.map(|s| s.partition.topic().to_string()).collect();
            if !topics.is_empty() {
                let question = topic_id::ask(&self.consumer, topics.iter().map(String::as_str));
                self.topics = Some((question, topics));
            }
        }
        let asked = self.starts.values().filter(|s| s.asked.is_some()).count();
        let room = ASKED_AT_ONCE.saturating_sub(asked);
        let due = (self.starts.iter_mut())
            .filter(|(_, start)| start.asked.is_none() && start.bounds.is_due(now));
        for (place, start) in due.take(room) {
            start.asked = Some(Bounds::ask(&self.consumer, place));
        }
    }

    /// Has those read of which all is known. Answers whether librdkafka has taken up all of them.
    fn begin(&mut self, mut split: impl FnMut(&Arc<Partition>)) -> KafkaResult<bool> {
        let mut seeks = TopicPartitionList::new();
        let mut seeking = Vec::new();
        for (place, start) in &self.starts {
            match start.decide() {
                None => {}
                Some(Err(gap)) => {
                    start.partition.set_position(Position::Gap(gap));
                    start.partition.unread().set_start(None);
                }
                Some(Ok(from)) => {
                    seeks.add_partition_offset(&place.0, place.1, Offset::Offset(from))?;
                    seeking.push((place.clone(), from));
                }
            }
        }
        let mut all_sought = true;
        let mut begun = Vec::new();
        if !seeking.is_empty() {
            let sought = self.consumer.seek_partitions(seeks, SEEK)?;
            for (place, from) in seeking {
                let found = sought.find_partition(&place.0, place.1);
                let found = found.map(|element| element.error());
                if !matches!(found, Some(Ok(()))) {
                    debug!("cannot seek yet: {found:?}");
                    all_sought = false;
                    continue;
                }
                let Some(start) = self.starts.remove(&place) else {
                    continue;
                };
                let partition = &start.partition;
                if let Some(Some(id)) = &start.topic.answer {
                    partition.set_topic_id(id);
                }
                split(partition);
                partition.begin(start.wanted, from, start.committed.answer.flatten());
                self.consumer.resume(&list_of(partition))?;
                begun.push((place, from));
            }
        }
        self.starts
            .retain(|_, start| start.partition.wanted().is_some());
        say_where(&self.group, begun);
        Ok(all_sought)
    }
}

/// Why the log does not say what the group has committed in a partition.
fn unreadable_offset(code: RDKafkaErrorCode) -> String {
    format!(
        "the group's committed offset can't be read: {}",
        cause(code)
    )
}

/// Why it does not say so of any. librdkafka asks on and on where the coordinator says that what is committed is not certain yet.
fn unsaid_offsets(code: RDKafkaErrorCode) -> String {
    match code {
        RDKafkaErrorCode::OperationTimedOut => format!(
            "{UNSAID}: it does not answer, or a transaction of another program that commits offsets for this group is open (end \
             it, or wait until its transaction.timeout.ms is over)"
        ),
        _ => format!("{UNSAID}: {}", cause(code)),
    }
}

/// librdkafka's words, behind what the host's user lacks, if that is it.
fn cause(code: RDKafkaErrorCode) -> String {
    let lacks = forbidden(code).map_or(String::new(), |lacks| format!("{lacks}: "));
    format!("{lacks}{code}")
}

/// Says once of a topic what is not known without its id.
fn say_untold(untold: &mut BTreeSet<String>, topic: &str) {
    if untold.insert(topic.to_owned()) {
        warn!(
            topic,
            "the log does not tell the topic's id (it is older than Kafka 2.8, or the host's Kafka user lacks DESCRIBE): were it \
             deleted and made anew, that would be noticed only where it is shorter than what was read of it"
        );
    }
}

/// The answer to a question, if it has come, and what it was about.
fn heard<Q, A, About>(
    asked: &mut Option<(Q, BTreeSet<About>)>,
    answer: fn(&Q) -> Option<A>,
) -> Option<(A, BTreeSet<About>)> {
    let answer = answer(&asked.as_ref()?.0)?;
    let (_, about) = asked.take()?;
    Some((answer, about))
}

fn place(partition: &Partition) -> Place {
    (partition.topic().to_string(), partition.number())
}

/// `reading what was assigned: topic 0 from offset 5, 1 from offset 7`.
fn say_where(group: &str, begun: Vec<(Place, i64)>) {
    let mut topics = BTreeMap::<String, Vec<(i32, i64)>>::new();
    for ((topic, number), from) in begun {
        topics.entry(topic).or_default().push((number, from));
    }
    let topics = topics.into_iter().map(|(topic, mut partitions)| {
        partitions.sort_unstable();
        let partitions = partitions.iter();
        let partitions: Vec<_> = partitions
            .map(|(number, from)| format!("{number} from offset {from}"))
            .collect();
        format!("{topic} {}", partitions.join(", "))
    });
    let topics: Vec<_> = topics.collect();
    if !topics.is_empty() {
        info!(group, "reading what was assigned: {}", topics.join("; "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_that_can_not_be_read_are_said_with_who_can_mend_it() {
        use RDKafkaErrorCode as Code;
        let lacks = "the host's Kafka user lacks";
        for (said, words) in [
            (unreadable_offset(Code::TopicAuthorizationFailed), lacks),
            (
                unreadable_offset(Code::UnknownTopicOrPartition),
                "read: Unknown",
            ),
            (unsaid_offsets(Code::GroupAuthorizationFailed), lacks),
            (
                unsaid_offsets(Code::OperationTimedOut),
                "a transaction of another program",
            ),
            (unsaid_offsets(Code::NotCoordinator), "committed: NotCoord"),
        ] {
            assert!(said.contains(words), "{said}");
        }
    }

    #[test]
    fn pauses_grow_and_end() {
        let pauses: Vec<_> = [0, 1, 2, 40].map(|tries| pause(tries).as_millis()).into();
        assert_eq!(pauses, [100, 200, 400, 10_000]);
    }
}
