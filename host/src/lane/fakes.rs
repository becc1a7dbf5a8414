//! A log and a stage that are fakes, and a lane between them.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{Equipment, Policy, concurrent, ordered};
use crate::capability::{Away, StoreError, StoreName};
use crate::delivery::breaker::Breaker;
use crate::delivery::dead_letter::{self, DeadLetters};
use crate::delivery::progress::LaneId;
use crate::delivery::{Cause, Delivery, Fault, Handler, Invocation};
use crate::log::committed::RowMark;
use crate::log::{BatchLimits, Gap, LogError, Sink, Source, Started, Unsent};
use crate::metrics::Metrics;
use crate::pipeline::{OnExhausted, OnGap, Order, Retry};
use crate::readiness::Readiness;
use crate::record::{Outgoing, Record};

pub(super) const NOTHING: i64 = -1;
/// Longer than anything that a test waits for, but a lane that has stopped.
pub(super) const LONG: Duration = Duration::from_secs(600);

/// A partition that asks its lane to end once all is done.
struct Log {
    left: VecDeque<Result<Record, Gap>>,
    end: i64,
    done: Arc<AtomicI64>,
    taken: Arc<AtomicUsize>,
    stopping: CancellationToken,
}

impl Source for Log {
    async fn start(&mut self, _: Option<i64>) -> Result<Option<Started>, Gap> {
        Ok(Some(Started::default()))
    }

    async fn next(&mut self, limits: &BatchLimits) -> Result<Option<Vec<Record>>, Gap> {
        let mut records = Vec::new();
        while records.len() < limits.max_messages
            && let Some(Ok(_)) = self.left.front()
        {
            records.extend(self.left.pop_front().and_then(Result::ok));
        }
        self.taken.fetch_add(records.len(), Ordering::Relaxed);
        if !records.is_empty() && !self.stopping.is_cancelled() {
            return Ok(Some(records));
        }
        match self.left.pop_front() {
            Some(Err(gap)) => Err(gap),
            _ => {
                self.stopping.cancelled().await;
                Ok(None)
            }
        }
    }

    fn done(&mut self, next_offset: i64, _: Option<RowMark>) {
        let before = self.done.swap(next_offset, Ordering::Relaxed);
        assert!(before < next_offset, "{next_offset} after {before}");
        if next_offset == self.end {
            self.stopping.cancel();
        }
    }

    fn stopping(&self) -> CancellationToken {
        self.stopping.clone()
    }
}

type Refusal = Box<dyn FnMut(&Outgoing) -> Option<LogError> + Send>;

/// What was appended, and why the next might not be.
struct Appended {
    outputs: Mutex<Vec<Outgoing>>,
    refusal: Mutex<Refusal>,
    latency: Duration,
}

impl Sink for Appended {
    async fn produce(&self, records: &[Outgoing]) -> Result<(), Vec<Unsent>> {
        sleep(self.latency).await;
        let mut unsent = Vec::new();
        for (index, record) in records.iter().enumerate() {
            match (self.refusal.lock().unwrap())(record) {
                Some(error) => unsent.push(Unsent { index, error }),
                None => self.outputs.lock().unwrap().push(record.clone()),
            }
        }
        if unsent.is_empty() {
            Ok(())
        } else {
            Err(unsent)
        }
    }
}

type Work = Box<dyn Fn(&Record, u32) -> (Duration, Result<(), Fault>) + Send + Sync>;

/// Takes a while, and emits what it was given.
struct Stage {
    work: Work,
    by_key: bool,
    takes_batches: bool,
    running: Mutex<Vec<Record>>,
    peak: AtomicUsize,
    calls: AtomicUsize,
    /// How often it still answers that its store is away.
    away: AtomicUsize,
}

impl Stage {
    async fn handle(&self, record: &Record, attempt: u32) -> Result<(), Fault> {
        {
            let mut running = self.running.lock().unwrap();
            let beside = running
                .iter()
                .find(|r| r.key.is_some() && r.key == record.key);
            assert!(!self.by_key || beside.is_none(), "{beside:?}");
            running.push(record.clone());
            self.peak.fetch_max(running.len(), Ordering::Relaxed);
        }
        let (time, outcome) = match self.away.load(Ordering::Relaxed) {
            0 => (self.work)(record, attempt),
            _ => (millis(1), Err(away())),
        };
        if !time.is_zero() {
            sleep(time).await;
        }
        self.running
            .lock()
            .unwrap()
            .retain(|r| r.offset != record.offset);
        outcome
    }
}

impl Handler<()> for Stage {
    fn takes_batches(&self) -> bool {
        self.takes_batches
    }

    async fn call(&self, deliveries: &[Delivery<'_>], (): &()) -> Invocation {
        assert!(self.takes_batches || deliveries.len() == 1);
        self.calls.fetch_add(1, Ordering::Relaxed);
        let (mut outputs, mut outcomes) = (Vec::new(), Vec::new());
        for Delivery { record, attempt } in deliveries {
            let outcome = self.handle(record, *attempt).await;
            outputs.extend(outcome.iter().map(|()| output(record)));
            outcomes.push(outcome);
        }
        Invocation {
            outputs,
            outcomes: Ok(outcomes),
            worn: false,
            repeated: false,
        }
    }

    async fn probe(&self, _: &Away) -> Result<(), StoreError> {
        let left = self.away.load(Ordering::Relaxed);
        self.away.store(left.saturating_sub(1), Ordering::Relaxed);
        match left {
            0 => Ok(()),
            _ => Err(StoreError::Unavailable("gone".into())),
        }
    }
}

fn output(record: &Record) -> Outgoing {
    Outgoing {
        topic: Arc::from("out"),
        partition: None,
        timestamp: None,
        key: record.key.clone(),
        value: Some(record.offset.to_string().into_bytes()),
        headers: Vec::new(),
    }
}

fn record(offset: i64, key: Option<u64>) -> Record {
    Record {
        topic: Arc::from("in"),
        partition: 0,
        offset,
        timestamp: None,
        key: key.map(|key| key.to_be_bytes().to_vec()),
        value: None,
        headers: Vec::new(),
    }
}

pub(super) fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub(super) fn fault(cause: Cause) -> Fault {
    Fault::new(cause, "as told")
}

fn away() -> Fault {
    Fault {
        away: Some(Box::new(Away::silent(StoreName::Redis(Arc::from("cache"))))),
        ..fault(Cause::Retry)
    }
}

/// A lane with all that is around it.
pub(super) struct Bench {
    log: Mutex<Option<Log>>,
    sink: Arc<Appended>,
    stage: Arc<Stage>,
    policy: Arc<Policy>,
    pub(super) readiness: Arc<Readiness>,
    done: Arc<AtomicI64>,
    taken: Arc<AtomicUsize>,
    stopping: CancellationToken,
}

impl Bench {
    pub(super) fn new(
        order: Order,
        keys: impl IntoIterator<Item = Option<u64>>,
        work: impl Fn(&Record, u32) -> (Duration, Result<(), Fault>) + Send + Sync + 'static,
    ) -> Self {
        let left: VecDeque<_> = (0..).zip(keys).map(|(n, key)| Ok(record(n, key))).collect();
        let log = Log {
            end: left.len() as i64,
            left,
            done: Arc::new(AtomicI64::new(NOTHING)),
            taken: Arc::default(),
            stopping: CancellationToken::new(),
        };
        Self {
            done: log.done.clone(),
            taken: log.taken.clone(),
            stopping: log.stopping.clone(),
            log: Mutex::new(Some(log)),
            sink: Arc::new(Appended {
                outputs: Mutex::default(),
                refusal: Mutex::new(Box::new(|_| None)),
                latency: millis(3),
            }),
            stage: Arc::new(Stage {
                work: Box::new(work),
                by_key: order == Order::Key,
                takes_batches: false,
                running: Mutex::default(),
                peak: AtomicUsize::new(0),
                calls: AtomicUsize::new(0),
                away: AtomicUsize::new(0),
            }),
            policy: Arc::new(policy(order)),
            readiness: Arc::default(),
        }
    }

    pub(super) fn refuse(
        self,
        refusal: impl FnMut(&Outgoing) -> Option<LogError> + Send + 'static,
    ) -> Self {
        *self.sink.refusal.lock().unwrap() = Box::new(refusal);
        self
    }

    /// With a stage that takes all messages of a batch in one call.
    pub(super) fn in_batches(mut self) -> Self {
        let stage = Arc::get_mut(&mut self.stage).expect("not run yet");
        stage.takes_batches = true;
        self
    }

    /// To be changed before the run.
    pub(super) fn policy(&mut self) -> &mut Policy {
        Arc::get_mut(&mut self.policy).expect("not run yet")
    }

    /// The lane's end. To be called once.
    pub(super) async fn run(&self) {
        let metrics = Arc::<Metrics>::default();
        let store = StoreName::Redis(Arc::from("cache"));
        let equipment = Equipment {
            sink: self.sink.clone(),
            handler: self.stage.clone(),
            policy: self.policy.clone(),
            breaker: Arc::new(Breaker::new(
                [store],
                self.readiness.clone(),
                metrics.clone(),
                7,
            )),
            readiness: self.readiness.clone(),
            metrics: metrics.stage("stage"),
            cluster: Arc::from("here"),
        };
        let log = self.log.lock().unwrap().take();
        let log = log.expect("the first run");
        let ended = match self.policy.order {
            Order::Partition => {
                let lane = ordered::Lane::new(log, equipment, id(), 7);
                timeout(LONG, lane.run()).await
            }
            Order::Key | Order::None => {
                let lane = concurrent::Lane::new(log, equipment, id(), 7);
                timeout(LONG, lane.run()).await
            }
        };
        ended.expect("the lane has ended");
    }

    /// Runs beside the lane, and at its end asks it to stop.
    pub(super) async fn run_beside(&self, look: impl Future<Output = ()>) {
        let stopping = self.stopping.clone();
        let look = async {
            look.await;
            stopping.cancel();
        };
        tokio::join!(self.run(), look);
    }

    /// The offset that the log was told.
    pub(super) fn done(&self) -> i64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Messages that the lane has taken.
    pub(super) fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// Messages that the stage had at one time at most.
    pub(super) fn peak(&self) -> usize {
        self.stage.peak.load(Ordering::Relaxed)
    }

    pub(super) fn calls(&self) -> usize {
        self.stage.calls.load(Ordering::Relaxed)
    }

    /// The store answers so many more times that it is away.
    pub(super) fn take_store_away(&self, times: usize) {
        self.stage.away.store(times, Ordering::Relaxed);
    }

    /// Before the message of this offset.
    pub(super) fn insert_gap(&self, at: usize, gap: Gap) {
        let mut log = self.log.lock().unwrap();
        let log = log.as_mut().expect("not run yet");
        log.left.insert(at, Err(gap));
    }

    /// Offsets of what was emitted, in the order of the log.
    pub(super) fn emitted(&self) -> Vec<i64> {
        let outputs = self.sink.outputs.lock().unwrap();
        let emitted = outputs.iter().filter(|output| &*output.topic == "out");
        emitted.map(|o| number(o.value.as_deref())).collect()
    }

    pub(super) fn dead(&self) -> Vec<i64> {
        let outputs = self.sink.outputs.lock().unwrap();
        let offset = |o: &Outgoing| {
            let header = o.headers.iter().find(|h| h.name == "__dlq.errors.offset");
            number(header.and_then(|h| h.value.as_deref()))
        };
        outputs
            .iter()
            .filter(|o| dead_letter::is_one(o))
            .map(offset)
            .collect()
    }
}

fn policy(order: Order) -> Policy {
    Policy {
        batch: BatchLimits {
            max_messages: 500,
            max_bytes: 1 << 20,
            max_time: Duration::from_secs(1),
        },
        order,
        concurrency: 8,
        retry: Retry {
            max_attempts: 3,
            initial: Duration::from_secs(10),
            max: Duration::from_secs(60),
        },
        on_exhausted: OnExhausted::DeadLetter,
        on_gap: OnGap::Stop,
        outputs: BTreeSet::from([Arc::from("out")]),
        dead_letters: DeadLetters {
            stage: Arc::from("stage"),
            group: Arc::from("group"),
            component: Arc::from("00"),
            topic: None,
        },
    }
}

fn number(text: Option<&[u8]>) -> i64 {
    let text = text.and_then(|text| std::str::from_utf8(text).ok());
    text.and_then(|text| text.parse().ok()).expect("a number")
}

pub(super) fn random(offset: i64) -> Duration {
    millis(StdRng::seed_from_u64(offset.unsigned_abs()).random_range(0..=5))
}

fn id() -> LaneId {
    LaneId {
        group: "group".into(),
        topic: "in".into(),
        partition: 0,
    }
}
