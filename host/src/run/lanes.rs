//! Says in the log which lanes wait, and asks the log why it takes no outputs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::log::kafka::topics::Admin;
use crate::readiness::{LaneWait, Readiness, Wait};

/// How often the lanes are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is said that lanes still wait for the same.
const REMIND_INTERVAL: Duration = Duration::from_secs(60);
/// How often the log is asked what it has against a topic.
const ASK_INTERVAL: Duration = Duration::from_secs(5);

/// Looks at the lanes until it is dropped.
pub(super) struct LanesWatch(AbortHandle);

impl LanesWatch {
    /// For these stages.
    pub(super) fn start(admin: Admin, readiness: Arc<Readiness>) -> Self {
        let look = Look {
            admin,
            readiness,
            said: BTreeMap::new(),
            asked: BTreeMap::new(),
        };
        Self(tokio::spawn(look.run()).abort_handle())
    }
}

impl Drop for LanesWatch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A stage, and what lanes of it wait for, in words.
type Subject = (Arc<str>, String);

/// What was said of it.
struct Said {
    at: Instant,
    age: Duration,
    why: Option<String>,
}

struct Look {
    admin: Admin,
    readiness: Arc<Readiness>,
    said: BTreeMap<Subject, Said>,
    /// When the log was asked about these topics.
    asked: BTreeMap<Arc<str>, Instant>,
}

impl Look {
    async fn run(mut self) {
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            self.ask_the_log().await;
            let waits = self.readiness.lanes().waits();
            self.say(&waits);
        }
    }

    /// One line for all lanes of a stage that wait for the same. What stops a lane, or its row, that lane says itself, and of
    /// stores that are away the breaker speaks.
    fn say(&mut self, waits: &[LaneWait]) {
        let mut subjects: BTreeMap<Subject, Vec<&LaneWait>> = BTreeMap::new();
        let of_others = |lane: &&LaneWait| lane.is_trouble() && !lane.wait.is_standstill();
        for lane in waits.iter().filter(of_others) {
            let subject = (lane.stage.clone(), lane.wait.what());
            subjects.entry(subject).or_default().push(lane);
        }
        self.said.retain(|subject, said| {
            let lasts = subjects.contains_key(subject);
            if !lasts {
                let (stage, what) = subject;
                let lasted = said.age + said.at.elapsed();
                info!(
                    stage = &**stage,
                    "no longer waiting {what}, after {lasted:.0?}"
                );
            }
            lasts
        });
        for (subject, lanes) in subjects {
            let age = lanes.iter().map(|lane| lane.age).max().unwrap_or_default();
            // Each broker that is away, and each topic's trouble, once.
            let whys: BTreeSet<_> = lanes.iter().filter_map(|lane| lane.wait.why()).collect();
            let whys: Vec<_> = whys.into_iter().collect();
            let why = (!whys.is_empty()).then(|| whys.join("; "));
            let is_known = |said: &Said| {
                // What is known since of why is news, now and then.
                let lasts = if said.why == why {
                    REMIND_INTERVAL
                } else {
                    ASK_INTERVAL
                };
                said.at.elapsed() < lasts
            };
            if self.said.get(&subject).is_some_and(is_known) {
                continue;
            }
            let (stage, what) = &subject;
            let because = why.iter().map(|why| format!(": {why}")).collect::<String>();
            let partitions: Vec<_> = (lanes.iter())
                .map(|lane| format!("{} {}", lane.topic, lane.partition))
                .collect();
            warn!(
                stage = &**stage,
                partitions = partitions.join(", "),
                "waits {what}, for {age:.0?}{because}"
            );
            let at = Instant::now();
            self.said.insert(subject, Said { at, age, why });
        }
    }

    /// librdkafka tries for ever, and does not tell why it has to.
    async fn ask_the_log(&mut self) {
        let waits = self.readiness.lanes().waits();
        let topics: BTreeSet<_> = (waits.iter())
            .filter(|lane| lane.is_trouble())
            .filter_map(|lane| match &lane.wait {
                Wait::Log { topic, .. } => Some(topic.clone()),
                Wait::Read { .. } => Some(lane.topic.clone()),
                _ => None,
            })
            .collect();
        self.asked.retain(|topic, _| topics.contains(topic));
        let lanes = self.readiness.lanes();
        lanes.keep_troubles(&topics);
        for topic in topics {
            let asked = self.asked.get(&topic);
            if asked.is_some_and(|at| at.elapsed() < ASK_INTERVAL) {
                continue;
            }
            // One that does not answer at all is said to be away by who watches it.
            let trouble = self.admin.trouble_of(&topic).await.ok().flatten();
            lanes.set_trouble(&topic, trouble);
            self.asked.insert(topic, Instant::now());
        }
    }
}
