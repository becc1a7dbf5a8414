//! What each lane waits for: one value, which it always has.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tokio::time::Instant;

use crate::capability::{StoreName, Unanswered};
use crate::delivery::progress::LaneId;
use crate::log::Unread;
use crate::sync::lock;

/// What lasts for less is a part of the work.
const BRIEF: Duration = Duration::from_secs(1);
/// A lane that waits for so long for an answer does not get on.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a lane waits for, the gravest first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wait {
    /// For somebody who mends what stops it.
    Stopped(String),
    /// For its row in the database, which it can't keep.
    Row(String),
    /// Until it has processed again what its database lost, though it is at work: `until …`.
    Again(String),
    /// For a store that is away or refuses; the store's own condition says why.
    Store(StoreName),
    /// For the log, to take an output for this topic.
    Log {
        /// Where the first output belongs that waits.
        topic: Arc<str>,
        /// What the log has said, if anything.
        why: Option<String>,
    },
    /// For the log, to say where an output belongs.
    Place {
        /// What it has said.
        why: String,
    },
    /// For the log, to say where its partition is to be read from, or to have it read.
    Read {
        /// What is wrong with the partition or the topic, if that is known.
        why: Option<String>,
    },
    /// For a store's answer to what the stage or the lane has asked.
    Answer(StoreName),
    /// Until a message is delivered again.
    Retry,
    /// For nothing: it is at work, or has no records.
    Nothing,
}

impl Wait {
    /// All of [`Wait::label`] that a lane may wait for.
    pub const LABELS: [&str; 5] = ["operator", "row", "store", "log", "retry"];

    /// Whether somebody has to look at the lane.
    pub fn is_standstill(&self) -> bool {
        matches!(self, Self::Stopped(_) | Self::Row(_))
    }

    /// As metrics name it.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Stopped(_) => "operator",
            Self::Row(_) | Self::Again(_) => "row",
            Self::Store(_) | Self::Answer(_) => "store",
            Self::Log { .. } | Self::Place { .. } | Self::Read { .. } => "log",
            Self::Retry => "retry",
            Self::Nothing => "nothing",
        }
    }

    /// What it waits for, in words that stay the same while it does; [`Wait::why`] may come to be known.
    pub fn what(&self) -> String {
        match self {
            Self::Stopped(why) | Self::Row(why) | Self::Again(why) => why.clone(),
            Self::Store(store) => format!("for {store}, which is away"),
            Self::Log { topic, .. } => format!("for the log to take an output for {topic}"),
            Self::Place { .. } => "for the log to say where an output belongs".to_owned(),
            Self::Read { .. } => "for the log to let it be read".to_owned(),
            Self::Answer(store) => format!("for an answer of {store}"),
            Self::Retry => "to deliver a message again".to_owned(),
            Self::Nothing => "for nothing".to_owned(),
        }
    }

    /// Why it has to, where that is known.
    pub fn why(&self) -> Option<&str> {
        match self {
            Self::Log { why, .. } | Self::Read { why } => why.as_deref(),
            Self::Place { why } => Some(why),
            _ => None,
        }
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_standstill() {
            f.write_str("waits ")?;
        }
        f.write_str(&self.what())?;
        (self.why().iter()).try_for_each(|why| write!(f, ": {why}"))
    }
}

/// What one lane waits for, as of one moment.
#[derive(Clone, Debug)]
pub struct LaneWait {
    /// The stage's name.
    pub stage: Arc<str>,
    /// The partition's topic.
    pub topic: Arc<str>,
    /// The partition, from 0.
    pub partition: i32,
    /// The gravest of what it waits for.
    pub wait: Wait,
    /// For how long.
    pub age: Duration,
}

impl LaneWait {
    /// Whether the host is not ready for it. A store that is away is a condition of its own, and a retry ends by itself.
    pub fn is_trouble(&self) -> bool {
        match self.wait {
            _ if self.wait.is_standstill() => true,
            Wait::Again(_) => true,
            Wait::Log { .. } | Wait::Place { .. } | Wait::Read { .. } | Wait::Answer(_) => {
                self.age >= PATIENCE
            }
            _ => false,
        }
    }

    /// Whether it is a part of the work so far.
    pub fn is_brief(&self) -> bool {
        self.age < BRIEF && !self.wait.is_standstill() && !matches!(self.wait, Wait::Again(_))
    }
}

impl fmt::Display for LaneWait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            stage,
            topic,
            partition,
            wait,
            age,
        } = self;
        write!(f, "stage {stage} on {topic} {partition}: {wait}")?;
        match wait {
            wait if wait.is_standstill() => Ok(()),
            Wait::Nothing => Ok(()),
            _ => write!(f, ", for {} s", age.as_secs()),
        }
    }
}

/// The lanes of a host that run.
#[derive(Debug, Default)]
pub struct Lanes {
    lanes: Mutex<Vec<Weak<Lane>>>,
    /// Calls of stages that wait for stores, by the stages' names.
    calls: Mutex<BTreeMap<Arc<str>, Arc<Unanswered>>>,
    /// What the log has against these topics, as far as it was asked.
    troubles: Mutex<BTreeMap<Arc<str>, String>>,
}

#[derive(Debug)]
struct Lane {
    stage: Arc<str>,
    id: LaneId,
    waits: Mutex<Waits>,
    unread: Unread,
}

/// There are as many as a lane has messages at one time, and few more.
#[derive(Debug, Default)]
struct Waits {
    all: Vec<(u64, Instant, Wait)>,
    last: u64,
}

impl Lanes {
    /// One more lane, until what is answered is dropped with all its clones. Who reads its partition says in `unread` why
    /// nothing comes.
    pub fn enter(&self, stage: &str, id: LaneId, unread: Unread) -> LaneStatus {
        let lane = Arc::new(Lane {
            stage: stage.into(),
            id,
            waits: Mutex::default(),
            unread,
        });
        let mut lanes = lock(&self.lanes);
        lanes.retain(|lane| lane.strong_count() > 0);
        lanes.push(Arc::downgrade(&lane));
        LaneStatus(lane)
    }

    /// Looks at the calls of a stage too.
    pub fn watch_calls(&self, stage: &str, calls: Arc<Unanswered>) {
        lock(&self.calls).insert(stage.into(), calls);
    }

    /// What the log has against a topic that lanes wait for.
    pub fn set_trouble(&self, topic: &Arc<str>, trouble: Option<String>) {
        let mut troubles = lock(&self.troubles);
        match trouble {
            Some(trouble) => drop(troubles.insert(topic.clone(), trouble)),
            None => drop(troubles.remove(topic)),
        }
    }

    /// Forgets what was said of all topics but these.
    pub fn keep_troubles(&self, topics: &BTreeSet<Arc<str>>) {
        lock(&self.troubles).retain(|topic, _| topics.contains(topic));
    }

    /// What each lane waits for now, by stage, topic and partition; those that wait for nothing included.
    pub fn waits(&self) -> Vec<LaneWait> {
        let lanes: Vec<_> = lock(&self.lanes).iter().filter_map(Weak::upgrade).collect();
        let mut waits: Vec<_> = lanes.iter().map(|lane| lane.wait()).collect();
        for (stage, calls) in &*lock(&self.calls) {
            for call in calls.calls() {
                let of_call = |lane: &&mut LaneWait| {
                    lane.stage == *stage
                        && (&lane.topic, lane.partition) == (&call.topic, call.partition)
                };
                let answer = Wait::Answer(call.store);
                if let Some(lane) = waits.iter_mut().find(of_call)
                    && (lane.wait > answer || (lane.wait == answer && lane.age < call.age))
                {
                    (lane.wait, lane.age) = (answer, call.age);
                }
            }
        }
        for lane in &mut waits {
            let trouble = match &mut lane.wait {
                Wait::Log { topic, why } => Some((&*topic, why)),
                // Who reads the partition knows better.
                Wait::Read { why } if why.is_none() => Some((&lane.topic, why)),
                _ => None,
            };
            if let Some((topic, why)) = trouble
                && let Some(trouble) = lock(&self.troubles).get(topic)
            {
                *why = Some(trouble.clone());
            }
        }
        waits.sort_by(|a, b| {
            let place = |lane: &LaneWait| (lane.stage.clone(), lane.topic.clone(), lane.partition);
            place(a).cmp(&place(b))
        });
        waits
    }
}

impl Lane {
    fn wait(&self) -> LaneWait {
        let waits = lock(&self.waits);
        let gravest = (waits.all.iter()).min_by_key(|(_, since, wait)| (wait, *since));
        let (mut wait, mut age) = match gravest {
            Some((_, since, wait)) => (wait.clone(), since.elapsed()),
            None => (Wait::Nothing, Duration::ZERO),
        };
        if wait >= (Wait::Read { why: None })
            && let Some((since, why)) = self.unread.reason()
        {
            let began = matches!(wait, Wait::Read { .. }).then_some(age);
            age = since.elapsed().max(began.unwrap_or_default());
            wait = Wait::Read { why: Some(why) };
        }
        LaneWait {
            stage: self.stage.clone(),
            topic: self.id.topic.clone(),
            partition: self.id.partition,
            wait,
            age,
        }
    }
}

/// Where a lane says what it waits for.
#[derive(Clone, Debug)]
pub struct LaneStatus(Arc<Lane>);

impl LaneStatus {
    /// The lane's group and partition.
    pub fn id(&self) -> &LaneId {
        &self.0.id
    }

    /// The lane waits for this until what is answered is dropped, with the lane's future at the latest. It may wait for
    /// several things at one time, where it handles messages side by side.
    pub fn begin(&self, wait: Wait) -> Waiting {
        self.begin_since(Instant::now(), wait)
    }

    /// The same of a wait that began before, and was interrupted by tries.
    pub fn begin_since(&self, since: Instant, wait: Wait) -> Waiting {
        let mut waits = lock(&self.0.waits);
        waits.last += 1;
        let number = waits.last;
        waits.all.push((number, since, wait));
        Waiting {
            lane: self.0.clone(),
            number,
        }
    }

    /// Awaits something, which the lane waits for meanwhile.
    pub async fn during<T>(&self, wait: Wait, what: impl Future<Output = T>) -> T {
        let _waiting = self.begin(wait);
        what.await
    }
}

/// That a lane waits for something.
#[derive(Debug)]
pub struct Waiting {
    lane: Arc<Lane>,
    number: u64,
}

impl Waiting {
    /// It still waits, and it is known more of what for.
    pub fn is_for(&self, wait: Wait) {
        let mut waits = lock(&self.lane.waits);
        if let Some(own) = (waits.all.iter_mut()).find(|(number, ..)| *number == self.number) {
            own.2 = wait;
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        lock(&self.lane.waits)
            .all
            .retain(|(number, ..)| *number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(lanes: &Lanes) -> LaneStatus {
        let id = LaneId {
            group: "group".into(),
            topic: "in".into(),
            partition: 3,
        };
        lanes.enter("stage", id, Unread::default())
    }

    fn said(lanes: &Lanes) -> Vec<String> {
        let waits = lanes.waits();
        let trouble = waits.iter().filter(|wait| wait.is_trouble());
        trouble.map(LaneWait::to_string).collect()
    }

    fn posts() -> StoreName {
        StoreName::Sql("posts".into())
    }

    #[tokio::test(start_paused = true)]
    async fn a_lane_that_waits_for_long_says_for_what() {
        let lanes = Lanes::default();
        let lane = enter(&lanes);
        let wait = lane.begin(Wait::Answer(posts()));
        assert_eq!(said(&lanes), Vec::<String>::new());
        tokio::time::advance(PATIENCE).await;
        let expected = "stage stage on in 3: waits for an answer of SQL store `posts`, for 5 s";
        assert_eq!(said(&lanes), [expected]);
        drop(wait);
        assert_eq!(said(&lanes), Vec::<String>::new());
    }

    #[tokio::test(start_paused = true)]
    async fn the_gravest_wait_is_the_lanes_and_ends_with_it() {
        let lanes = Lanes::default();
        let lane = enter(&lanes);
        let retry = lane.begin(Wait::Retry);
        let stopped = lane.begin(Wait::Stopped("a gap".into()));
        let store = lane.begin(Wait::Store(posts()));
        assert_eq!(said(&lanes), ["stage stage on in 3: a gap"]);
        drop(stopped);
        assert_eq!(lanes.waits()[0].wait, Wait::Store(posts()));
        drop((store, retry));
        assert_eq!(lanes.waits()[0].wait, Wait::Nothing);
        drop(lane);
        assert!(lanes.waits().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_lane_whose_partition_is_not_read_says_why() {
        let lanes = Lanes::default();
        let id = LaneId {
            group: "group".into(),
            topic: "in".into(),
            partition: 3,
        };
        let unread = Unread::default();
        let lane = lanes.enter("stage", id, unread.clone());
        let away = Some((PATIENCE, "its leader hangs".to_owned()));
        unread.set_leader(away.clone());
        let expected =
            "stage stage on in 3: waits for the log to let it be read: its leader hangs, for 5 s";
        assert_eq!(said(&lanes), [expected]);
        let store = lane.begin(Wait::Store(posts()));
        assert_eq!(lanes.waits()[0].wait, Wait::Store(posts()), "graver");
        drop(store);
        unread.set_leader(None);
        assert_eq!(lanes.waits()[0].wait, Wait::Nothing);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_known_later_is_said_of_the_same_wait() {
        let lanes = Lanes::default();
        let lane = enter(&lanes);
        let (topic, why) = (Arc::from("out"), None);
        let wait = lane.begin(Wait::Log { topic, why });
        tokio::time::advance(PATIENCE * 2).await;
        wait.is_for(Wait::Log {
            topic: "out".into(),
            why: Some("it is full".into()),
        });
        let said = said(&lanes).join("\n");
        assert!(said.ends_with("for out: it is full, for 10 s"), "{said}");
    }
}
