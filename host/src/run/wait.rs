//! Waiting for what is away, and knowing whether the log is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::capability::StoreError;
use crate::delivery::retry::backoff;
use crate::log::kafka::producer::Producer;
use crate::log::kafka::topics::Admin;
use crate::log::{LogError, Sink, Unsent};
use crate::metrics::Metrics;
use crate::pipeline::Retry;
use crate::readiness::Readiness;
use crate::record::Outgoing;
use crate::sync::lock;

/// The condition that the log can be reached.
pub(super) const LOG: &str = "log";
/// How what is away is asked for again.
const PATIENCE: Retry = Retry {
    max_attempts: u32::MAX,
    initial: Duration::from_millis(500),
    max: Duration::from_secs(5),
};
/// How often the log is asked whether it is there.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);
/// How long it is said of a topic that posts to it were not acknowledged. Nobody may post while it is: who routes requests may
/// heed it.
const UNACKNOWLEDGED_LASTS: Duration = Duration::from_secs(10);
/// A post that nobody waits for any longer, and that had no answer after this, was not acknowledged.
const UNACKNOWLEDGED_AFTER: Duration = Duration::from_secs(5);
/// How often it is said that the log is still away.
const REMIND_INTERVAL: Duration = Duration::from_secs(30);

/// The condition that a stage is a member of its group.
pub(super) fn stage(name: &str) -> String {
    format!("stage {name}")
}

/// An error that says whether waiting may help.
pub(super) trait Availability: Display {
    fn is_unavailable(&self) -> bool;
}

impl Availability for LogError {
    fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}

impl Availability for StoreError {
    fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}

/// How a start waits.
pub(super) struct Waiting<'a> {
    pub(super) readiness: &'a Arc<Readiness>,
    pub(super) shutdown: &'a CancellationToken,
}

impl Waiting<'_> {
    /// Tries until it succeeds, or fails for good. `None` when told to shut down meanwhile.
    pub(super) async fn until_available<T, E, F>(
        &self,
        condition: &str,
        what: &str,
        mut attempt: impl FnMut() -> F,
    ) -> anyhow::Result<Option<T>>
    where
        E: Availability,
        F: Future<Output = Result<T, E>>,
    {
        let mut tries = 1;
        loop {
            let result = tokio::select! {
                result = attempt() => result,
                // An attempt that is dropped half way has no effect that a start would not repeat.
                () = self.shutdown.cancelled() => return Ok(None),
            };
            let error = match result {
                Ok(value) => {
                    self.readiness.ready(condition);
                    if tries > 1 {
                        info!("{what} is there");
                    }
                    return Ok(Some(value));
                }
                Err(error) if !error.is_unavailable() => return Err(anyhow!("{what}: {error}")),
                Err(error) => error,
            };
            let wait = backoff(&PATIENCE, tries, &mut rand::rng());
            warn!("waiting for {what}, next try in {wait:.1?}: {error}");
            self.readiness.not_ready(condition, error.to_string());
            tries = tries.saturating_add(1);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.shutdown.cancelled() => return Ok(None),
            }
        }
    }
}

/// Asks the log every few seconds whether it is there.
pub(super) struct LogWatch {
    there: Arc<AtomicBool>,
    unacknowledged: Arc<Unacknowledged>,
    task: AbortHandle,
}

impl LogWatch {
    pub(super) fn start(
        admin: Admin,
        brokers: String,
        (topics, written): (BTreeSet<String>, BTreeSet<String>),
        readiness: Arc<Readiness>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let there = Arc::new(AtomicBool::new(true));
        let unacknowledged = Arc::<Unacknowledged>::default();
        metrics.set_log_available(true);
        let says = Says {
            brokers,
            topics,
            written,
            readiness,
            metrics,
            there: there.clone(),
            unacknowledged: unacknowledged.clone(),
        };
        let task = tokio::spawn(watch(admin, says)).abort_handle();
        Self {
            there,
            unacknowledged,
            task,
        }
    }

    pub(super) fn stop(&self) {
        self.task.abort();
    }
}

impl Drop for LogWatch {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Where it is said whether the log is there.
struct Says {
    brokers: String,
    /// Those of the pipeline.
    topics: BTreeSet<String>,
    /// Those of them that the host writes to.
    written: BTreeSet<String>,
    readiness: Arc<Readiness>,
    metrics: Arc<Metrics>,
    there: Arc<AtomicBool>,
    unacknowledged: Arc<Unacknowledged>,
}

impl Says {
    fn there(&self) {
        self.unacknowledged.forget();
        self.there.store(true, Ordering::Relaxed);
        self.metrics.set_log_available(true);
        self.readiness.ready(LOG);
    }

    /// The log answers, and says this of the pipeline's topics.
    fn topics(&self, troubles: &BTreeMap<String, String>) {
        let unacknowledged = self.unacknowledged.lately();
        for topic in &self.topics {
            let condition = format!("topic {topic}");
            let trouble = troubles
                .get(topic)
                .or_else(|| unacknowledged.get(topic.as_str()));
            match trouble {
                Some(why) => {
                    if self.readiness.not_ready(&condition, why) {
                        warn!(topic, "lanes and posts wait for it: {why}");
                    }
                }
                None => {
                    if self.readiness.ready(&condition) {
                        info!(topic, "it is there again");
                    }
                }
            }
        }
    }

    fn away(&self, why: String) {
        self.there.store(false, Ordering::Relaxed);
        self.metrics.set_log_available(false);
        self.readiness.not_ready(LOG, why);
    }
}

async fn watch(admin: Admin, says: Says) {
    let brokers = &says.brokers;
    let mut away_since: Option<Instant> = None;
    let mut said = Instant::now();
    loop {
        tokio::time::sleep(WATCH_INTERVAL).await;
        match (
            admin.troubles(&says.topics, &says.written).await,
            away_since,
        ) {
            (Ok(troubles), since) => {
                if let Some(since) = since {
                    info!("the log at {brokers} is back after {:.0?}", since.elapsed());
                    says.there();
                }
                away_since = None;
                says.topics(&troubles);
            }
            (Err(error), since) => {
                if since.is_none() || said.elapsed() >= REMIND_INTERVAL {
                    warn!("the log at {brokers} is away; lanes wait for it: {error}");
                    said = Instant::now();
                }
                says.away(error.to_string());
                away_since = since.or_else(|| Some(Instant::now()));
            }
        }
    }
}

/// Topics to which posts were not acknowledged lately, though the log was there. No lane may wait for them: one that writes what
/// it read says itself what it waits for.
#[derive(Default)]
struct Unacknowledged(Mutex<Notes>);

struct Notes {
    /// When the log was there again: posts of before failed for its absence.
    since: Instant,
    topics: BTreeMap<Arc<str>, (Instant, String)>,
}

impl Default for Notes {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            topics: BTreeMap::new(),
        }
    }
}

impl Unacknowledged {
    /// Of a post that was begun then.
    fn note(&self, begun: Instant, topic: &Arc<str>, why: &dyn Display) {
        let mut notes = lock(&self.0);
        if begun >= notes.since {
            let why = format!("posts are not acknowledged: {why}");
            notes.topics.insert(topic.clone(), (Instant::now(), why));
        }
    }

    /// Why, by topic.
    fn lately(&self) -> BTreeMap<Arc<str>, String> {
        let topics = &mut lock(&self.0).topics;
        topics.retain(|_, (since, _)| since.elapsed() < UNACKNOWLEDGED_LASTS);
        let why = |(topic, (_, why)): (&Arc<str>, &(Instant, String))| (topic.clone(), why.clone());
        topics.iter().map(why).collect()
    }

    fn forget(&self) {
        *lock(&self.0) = Notes::default();
    }
}

/// A post on its way. It is dropped without an answer where its client, or the ingress, waits no longer.
struct Post<'a> {
    begun: Instant,
    records: &'a [Outgoing],
    unacknowledged: &'a Unacknowledged,
    is_answered: bool,
}

impl Post<'_> {
    fn answered(mut self, answer: &Result<(), Vec<Unsent>>) {
        self.is_answered = true;
        for Unsent { index, error } in answer.as_ref().err().into_iter().flatten() {
            if error.is_unavailable()
                && let Some(record) = self.records.get(*index)
            {
                self.unacknowledged.note(self.begun, &record.topic, error);
            }
        }
    }
}

impl Drop for Post<'_> {
    fn drop(&mut self) {
        if self.is_answered || self.begun.elapsed() < UNACKNOWLEDGED_AFTER {
            return;
        }
        let why = format!("no answer within {UNACKNOWLEDGED_AFTER:?}");
        for record in self.records {
            self.unacknowledged.note(self.begun, &record.topic, &why);
        }
    }
}

/// A producer that says at once that the log is away while that is known, so that HTTP clients need not wait for it.
pub(super) struct GatedSink {
    producer: Producer,
    there: Arc<AtomicBool>,
    unacknowledged: Arc<Unacknowledged>,
}

impl GatedSink {
    pub(super) fn new(producer: Producer, watch: &LogWatch) -> Self {
        Self {
            producer,
            there: watch.there.clone(),
            unacknowledged: watch.unacknowledged.clone(),
        }
    }
}

impl Sink for GatedSink {
    async fn produce(&self, records: &[Outgoing]) -> Result<(), Vec<Unsent>> {
        if self.there.load(Ordering::Relaxed) {
            let post = Post {
                begun: Instant::now(),
                records,
                unacknowledged: &self.unacknowledged,
                is_answered: false,
            };
            let produced = self.producer.produce(records).await;
            post.answered(&produced);
            return produced;
        }
        let away = |index| Unsent {
            index,
            error: LogError::Unavailable("it is away".into()),
        };
        Err((0..records.len()).map(away).collect())
    }
}
