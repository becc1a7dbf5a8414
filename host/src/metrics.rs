//! What the host counts, under the names that dashboards rely on.
//!
//! Labels come from the pipeline and from fixed sets, never from clients, so their number is bounded.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::{Method, StatusCode};
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::readiness::{LaneWait, Wait};

/// The media type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Buckets of calls, in seconds: a warm call takes microseconds, a deadline is seconds.
const INVOCATION_SECONDS: [f64; 14] = [
    0.000_01, 0.000_05, 0.000_1, 0.000_5, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0,
];
/// Buckets of whole ways, in seconds: from idle and embedded to a backlog.
const END_TO_END_SECONDS: [f64; 16] = [
    0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0,
    3600.0,
];
/// Buckets of HTTP answers, in seconds.
const HTTP_SECONDS: [f64; 13] = [
    0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0,
];
/// Buckets of batch sizes: 1, 2, 4 … 4,096 messages.
const BATCH_BUCKETS: u16 = 13;

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// All that is counted. Handles on one series each are got once and recorded on cheaply.
pub struct Metrics {
    registry: Registry,
    /// Those that have series.
    stages: Mutex<BTreeSet<Arc<str>>>,
    messages: Family<MessageLabels, Counter>,
    invocation_seconds: Histograms<StageLabels>,
    end_to_end_seconds: Histograms<StageLabels>,
    batch_messages: Histograms<StageLabels>,
    retries: Family<StageLabels, Counter>,
    dead_letters: Family<DeadLetterLabels, Counter>,
    http_requests: Family<RequestLabels, Counter>,
    http_request_seconds: Histograms<RouteLabels>,
    connections_turned_away: Family<TurnedAwayLabels, Counter>,
    lag: Family<LagLabels, Gauge>,
    circuit_open: Family<StoreLabels, Gauge>,
    log_available: Gauge,
    gap_records: Family<StageLabels, Counter>,
    lanes_stopped: Family<StageLabels, Gauge>,
    lanes_waiting: Family<WaitingLabels, Gauge>,
    dead_letters_cut: Family<StageLabels, Counter>,
    calls_repeated: Family<StageLabels, Counter>,
    rows_lost: Family<StageLabels, Counter>,
    log_lines_dropped: DroppedLines,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            stages: Mutex::default(),
            messages: Family::default(),
            invocation_seconds: Family::new_with_constructor(|| Histogram::new(INVOCATION_SECONDS)),
            end_to_end_seconds: Family::new_with_constructor(|| Histogram::new(END_TO_END_SECONDS)),
            batch_messages: Family::new_with_constructor(|| {
                Histogram::new(exponential_buckets(1.0, 2.0, BATCH_BUCKETS))
            }),
            retries: Family::default(),
            dead_letters: Family::default(),
            http_requests: Family::default(),
            http_request_seconds: Family::new_with_constructor(|| Histogram::new(HTTP_SECONDS)),
            connections_turned_away: Family::default(),
            lag: Family::default(),
            circuit_open: Family::default(),
            log_available: Gauge::default(),
            gap_records: Family::default(),
            lanes_stopped: Family::default(),
            lanes_waiting: Family::default(),
            dead_letters_cut: Family::default(),
            calls_repeated: Family::default(),
            rows_lost: Family::default(),
            log_lines_dropped: DroppedLines::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    /// Registers every family. Counters are named without `_total`, which the encoder appends.
    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "stagehost_messages",
            "Messages by how their handling ended",
            self.messages.clone(),
        );
        registry.register(
            "stagehost_invocation_seconds",
            "Time of one call of a stage",
            self.invocation_seconds.clone(),
        );
        registry.register(
            "stagehost_end_to_end_seconds",
            "Time from a record's timestamp until its effects are durable",
            self.end_to_end_seconds.clone(),
        );
        registry.register(
            "stagehost_batch_messages",
            "Messages committed together",
            self.batch_messages.clone(),
        );
        registry.register(
            "stagehost_retries",
            "Deliveries that were tried again",
            self.retries.clone(),
        );
        registry.register(
            "stagehost_dead_letters",
            "Records sent to a dead-letter topic",
            self.dead_letters.clone(),
        );
        registry.register(
            "stagehost_dead_letters_cut",
            "Changes of dead letters that the log had refused as they were",
            self.dead_letters_cut.clone(),
        );
        registry.register(
            "stagehost_http_requests",
            "HTTP requests answered",
            self.http_requests.clone(),
        );
        registry.register(
            "stagehost_http_request_seconds",
            "Time of one HTTP request",
            self.http_request_seconds.clone(),
        );
        registry.register(
            "stagehost_http_connections_turned_away",
            "Connections that were closed, or whose requests were refused, because all places were taken",
            self.connections_turned_away.clone(),
        );
        registry.register(
            "kafka_consumergroup_lag",
            "Records of a partition that its consumer group has yet to commit",
            self.lag.clone(),
        );
        registry.register(
            "stagehost_circuit_open",
            "Whether lanes wait for a store that is away",
            self.circuit_open.clone(),
        );
        registry.register(
            "stagehost_log_available",
            "Whether the log answers",
            self.log_available.clone(),
        );
        registry.register(
            "stagehost_gap_records",
            "Records that were removed from the log before they were processed",
            self.gap_records.clone(),
        );
        registry.register(
            "stagehost_lanes_stopped",
            "Partitions that need somebody to look at them",
            self.lanes_stopped.clone(),
        );
        registry.register(
            "stagehost_lanes_waiting",
            "Partitions that do not get on, by what they wait for",
            self.lanes_waiting.clone(),
        );
        registry.register(
            "stagehost_calls_repeated",
            "Calls made again on a new instance, since they trapped on one that had served others",
            self.calls_repeated.clone(),
        );
        registry.register(
            "stagehost_rows_lost",
            "Times that a lane's row of progress was an older one, another's, or gone: its database was restored or emptied",
            self.rows_lost.clone(),
        );
        registry.register(
            "stagehost_log_lines_dropped",
            "Lines that are missing in the log",
            self.log_lines_dropped.0.clone(),
        );
    }

    /// The handles of one stage. Its series are there from now on, at 0.
    pub fn stage(&self, name: &str) -> StageMetrics {
        let stage: Arc<str> = name.into();
        self.stages
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(Arc::clone(&stage));
        let labels = StageLabels {
            stage: Arc::clone(&stage),
        };
        self.log_lines_dropped.over_budget(name, 0);
        StageMetrics {
            messages: self.messages.clone(),
            done: self.messages.get_or_create_owned(&MessageLabels {
                stage: Arc::clone(&labels.stage),
                outcome: DONE,
            }),
            dead_letters: self.dead_letters.clone(),
            invocation_seconds: self.invocation_seconds.get_or_create_owned(&labels),
            end_to_end_seconds: self.end_to_end_seconds.get_or_create_owned(&labels),
            batch_messages: self.batch_messages.get_or_create_owned(&labels),
            retries: self.retries.get_or_create_owned(&labels),
            gap_records: self.gap_records.get_or_create_owned(&labels),
            calls_repeated: self.calls_repeated.get_or_create_owned(&labels),
            dead_letters_cut: self.dead_letters_cut.get_or_create_owned(&labels),
            rows_lost: self.rows_lost.get_or_create_owned(&labels),
            stage,
        }
    }

    /// One HTTP request was answered. `route` is the pattern of the route, or `none`.
    pub fn http_request(
        &self,
        route: &Arc<str>,
        method: &Method,
        status: StatusCode,
        took: Duration,
    ) {
        self.http_requests
            .get_or_create(&RequestLabels {
                route: Arc::clone(route),
                method: method_label(method),
                status: status.as_u16(),
            })
            .inc();
        self.http_request_seconds
            .get_or_create(&RouteLabels {
                route: Arc::clone(route),
            })
            .observe(took.as_secs_f64());
    }

    /// A connection of the listener `http` or `admin` was closed or refused because all places were taken.
    pub fn turned_away(&self, listener: &'static str, reason: TurnedAway) {
        self.connections_turned_away
            .get_or_create(&TurnedAwayLabels { listener, reason })
            .inc();
    }

    /// Sets how many records a group has yet to commit in a partition.
    pub fn set_lag(&self, group: &str, topic: &str, partition: i32, lag: i64) {
        self.lag
            .get_or_create(&LagLabels::new(group, topic, partition))
            .set(lag);
    }

    /// The partition is another host's now: that one tells its lag.
    pub fn remove_lag(&self, group: &str, topic: &str, partition: i32) {
        self.lag.remove(&LagLabels::new(group, topic, partition));
    }

    /// Whether lanes wait for a store that is away; with its kind where one of another kind has the same name.
    pub fn set_circuit_open(&self, store: &str, kind: Option<&str>, open: bool) {
        let kind = kind.map(|kind| ("kind", kind.into()));
        let labels = [("store", store.into())].into_iter().chain(kind);
        self.circuit_open
            .get_or_create(&labels.collect())
            .set(i64::from(open));
    }

    /// What the lanes of all stages wait for, as of now.
    pub fn set_lanes(&self, waits: &[LaneWait]) {
        let stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        for stage in stages.iter() {
            let lanes = || waits.iter().filter(|lane| lane.stage == *stage);
            for label in Wait::LABELS {
                let labels = WaitingLabels {
                    stage: Arc::clone(stage),
                    r#for: label,
                };
                let waiting = |lane: &&LaneWait| lane.wait.label() == label && !lane.is_brief();
                let waiting = lanes().filter(waiting).count();
                self.lanes_waiting
                    .get_or_create(&labels)
                    .set(waiting.cast_signed() as i64);
            }
            let stage = Arc::clone(stage);
            let stopped = lanes().filter(|lane| lane.wait.is_standstill()).count();
            self.lanes_stopped
                .get_or_create(&StageLabels { stage })
                .set(stopped.cast_signed() as i64);
        }
    }

    /// Whether the log answers.
    pub fn set_log_available(&self, available: bool) {
        self.log_available.set(i64::from(available));
    }

    /// Where lines are counted that are missing in the log.
    pub fn log_lines_dropped(&self) -> DroppedLines {
        self.log_lines_dropped.clone()
    }

    /// Everything in the text format of [`CONTENT_TYPE`].
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Lines that are missing in the log.
#[derive(Clone, Debug, Default)]
pub struct DroppedLines(Family<DroppedLabels, Counter>);

impl DroppedLines {
    /// Lines of a stage were more than the log takes of one; under no name, lines of none.
    pub fn over_budget(&self, stage: &str, lines: u64) {
        self.count(stage, "budget", lines);
    }

    /// Whoever reads stderr was too slow, or has stopped.
    pub fn stalled(&self, lines: u64) {
        self.count("", "stalled", lines);
    }

    fn count(&self, stage: &str, reason: &'static str, lines: u64) {
        let stage = stage.into();
        self.0
            .get_or_create(&DroppedLabels { stage, reason })
            .inc_by(lines);
    }
}

/// The outcome of most messages.
const DONE: &str = "done";

/// What one stage records on. Clones share the series.
#[derive(Clone, Debug)]
pub struct StageMetrics {
    stage: Arc<str>,
    messages: Family<MessageLabels, Counter>,
    /// Of `messages`, so that it is not looked up for each.
    done: Counter,
    dead_letters: Family<DeadLetterLabels, Counter>,
    invocation_seconds: Histogram,
    end_to_end_seconds: Histogram,
    batch_messages: Histogram,
    retries: Counter,
    gap_records: Counter,
    calls_repeated: Counter,
    dead_letters_cut: Counter,
    rows_lost: Counter,
}

impl StageMetrics {
    /// `count` messages ended so: `done`, `retry`, `reject`, `trap` ….
    pub fn messages(&self, outcome: &'static str, count: u64) {
        if outcome == DONE {
            self.done.inc_by(count);
            return;
        }
        self.messages
            .get_or_create(&MessageLabels {
                stage: Arc::clone(&self.stage),
                outcome,
            })
            .inc_by(count);
    }

    /// One call took so long.
    pub fn invocation(&self, took: Duration) {
        self.invocation_seconds.observe(took.as_secs_f64());
    }

    /// So long after its record's timestamp, a message's effects became durable.
    pub fn end_to_end(&self, took: Duration) {
        self.end_to_end_seconds.observe(took.as_secs_f64());
    }

    /// A batch of so many messages was committed.
    pub fn batch(&self, messages: usize) {
        self.batch_messages.observe(messages as f64);
    }

    /// So many records were removed from the log before the stage had them.
    pub fn gap(&self, records: u64) {
        self.gap_records.inc_by(records);
    }

    /// A message is tried again.
    pub fn retry(&self) {
        self.retries.inc();
    }

    /// A call was made again on a new instance.
    pub fn call_repeated(&self) {
        self.calls_repeated.inc();
    }

    /// A lane's row was an older one, another's, or gone.
    pub fn row_lost(&self) {
        self.rows_lost.inc();
    }

    /// A dead letter was changed, since the log had refused it.
    pub fn dead_letter_cut(&self) {
        self.dead_letters_cut.inc();
    }

    /// A record goes to the dead-letter topic. `cause` is what its header `stagehost-cause` says.
    pub fn dead_letter(&self, cause: &'static str) {
        self.dead_letters
            .get_or_create(&DeadLetterLabels {
                stage: Arc::clone(&self.stage),
                cause,
            })
            .inc();
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabels {
    stage: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WaitingLabels {
    stage: Arc<str>,
    r#for: &'static str,
}

/// Its name, and its kind where that is told.
type StoreLabels = Vec<(&'static str, Arc<str>)>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MessageLabels {
    stage: Arc<str>,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DroppedLabels {
    stage: Arc<str>,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeadLetterLabels {
    stage: Arc<str>,
    cause: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: Arc<str>,
    method: &'static str,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    route: Arc<str>,
}

/// Why a connection was closed or refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TurnedAway {
    /// It idled, and a new one needed its place.
    Idle,
    /// Its client was slow with a body or an answer, and a new one needed its place.
    Stalled,
    /// It was the new one, and there was no place.
    Full,
}

impl EncodeLabelValue for TurnedAway {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        let word = match self {
            Self::Idle => "idle",
            Self::Stalled => "stalled",
            Self::Full => "full",
        };
        EncodeLabelValue::encode(&word, encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TurnedAwayLabels {
    listener: &'static str,
    reason: TurnedAway,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LagLabels {
    consumergroup: String,
    topic: String,
    partition: i32,
}

impl LagLabels {
    fn new(group: &str, topic: &str, partition: i32) -> Self {
        Self {
            consumergroup: group.to_owned(),
            topic: topic.to_owned(),
            partition,
        }
    }
}

/// Clients may send any word as a method, so those unknown share a label.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, line: &str) {
        assert!(
            text.lines().any(|l| l == line),
            "no line {line:?} in\n{text}"
        );
    }

    #[test]
    fn names_are_those_that_dashboards_rely_on() {
        let metrics = Metrics::default();
        let stage = metrics.stage("publisher");
        stage.messages("done", 3);
        stage.invocation(Duration::from_millis(2));
        stage.end_to_end(Duration::from_millis(20));
        stage.batch(3);
        stage.retry();
        stage.dead_letter("retries-exhausted");
        let route: Arc<str> = "/post/{slug}".into();
        metrics.http_request(
            &route,
            &Method::GET,
            StatusCode::OK,
            Duration::from_millis(1),
        );
        let none: Arc<str> = "none".into();
        let made_up = Method::from_bytes(b"BREW").unwrap();
        metrics.http_request(
            &none,
            &made_up,
            StatusCode::NOT_FOUND,
            Duration::from_millis(1),
        );
        metrics.turned_away("admin", TurnedAway::Idle);
        metrics.set_lag("service.publisher", "app.newPosts", 7, 12);
        metrics.set_lag("service.publisher", "app.newPosts", 8, 1);
        metrics.remove_lag("service.publisher", "app.newPosts", 8);
        metrics.set_circuit_open("posts", None, true);
        metrics.set_log_available(true);
        stage.gap(7);
        let stopped = LaneWait {
            stage: "publisher".into(),
            topic: "app.newPosts".into(),
            partition: 7,
            wait: Wait::Stopped("a gap".into()),
            age: Duration::ZERO,
        };
        metrics.set_lanes(&[stopped]);
        stage.dead_letter_cut();
        stage.call_repeated();
        stage.row_lost();
        metrics.log_lines_dropped().over_budget("publisher", 12_345);

        let text = metrics.encode().unwrap();
        for line in [
            r#"stagehost_messages_total{stage="publisher",outcome="done"} 3"#,
            r#"stagehost_invocation_seconds_count{stage="publisher"} 1"#,
            r#"stagehost_invocation_seconds_bucket{le="0.005",stage="publisher"} 1"#,
            r#"stagehost_end_to_end_seconds_count{stage="publisher"} 1"#,
            r#"stagehost_batch_messages_sum{stage="publisher"} 3.0"#,
            r#"stagehost_retries_total{stage="publisher"} 1"#,
            r#"stagehost_dead_letters_total{stage="publisher",cause="retries-exhausted"} 1"#,
            r#"stagehost_http_requests_total{route="/post/{slug}",method="GET",status="200"} 1"#,
            r#"stagehost_http_requests_total{route="none",method="other",status="404"} 1"#,
            r#"stagehost_http_request_seconds_count{route="/post/{slug}"} 1"#,
            r#"stagehost_http_connections_turned_away_total{listener="admin",reason="idle"} 1"#,
            r#"kafka_consumergroup_lag{consumergroup="service.publisher",topic="app.newPosts",partition="7"} 12"#,
            r#"stagehost_circuit_open{store="posts"} 1"#,
            "stagehost_log_available 1",
            r#"stagehost_gap_records_total{stage="publisher"} 7"#,
            r#"stagehost_lanes_stopped{stage="publisher"} 1"#,
            r#"stagehost_lanes_waiting{stage="publisher",for="operator"} 1"#,
            r#"stagehost_lanes_waiting{stage="publisher",for="store"} 0"#,
            r#"stagehost_dead_letters_cut_total{stage="publisher"} 1"#,
            r#"stagehost_calls_repeated_total{stage="publisher"} 1"#,
            r#"stagehost_rows_lost_total{stage="publisher"} 1"#,
            r#"stagehost_log_lines_dropped_total{stage="publisher",reason="budget"} 12345"#,
        ] {
            check(&text, line);
        }
        assert!(!text.contains(r#"partition="8""#), "{text}");
    }
}
