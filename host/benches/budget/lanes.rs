//! The real lanes, over the fakes of [`world`](super::world).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use host::capability::StoreName;
use host::delivery::breaker::Breaker;
use host::delivery::dead_letter::DeadLetters;
use host::delivery::progress::LaneId;
use host::lane::{Equipment, Policy, concurrent, ordered, transactional};
use host::log::BatchLimits;
use host::metrics::Metrics;
use host::pipeline::{OnExhausted, OnGap, Order, Retry};
use host::readiness::Readiness;

use super::world::{CLUSTER, Database, Log, Sent, Stage};

const SEED: u64 = 7;
const TOPIC: &str = "app.posts";
const PARTITION: i32 = 3;

/// The kinds of lane, by the names that the budget has.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Ordered,
    ByKey,
    Transactional,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Ordered, Self::ByKey, Self::Transactional];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ordered => "ordered",
            Self::ByKey => "concurrent",
            Self::Transactional => "transactional",
        }
    }

    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// Sends so many messages through a lane, from its beginning to its end.
pub(crate) fn run(kind: Kind, messages: u64) {
    // One thread, and a clock that only waits move: each run is the same.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    let sink = Arc::<Sent>::default();
    let log = Log::new(TOPIC, PARTITION, messages);
    let lane = lane(kind, log, equipment(sink.clone(), kind));
    runtime.block_on(lane);
    assert_eq!(sink.count(), messages, "an output a message");
}

async fn lane(kind: Kind, log: Log, equipment: Equipment<Sent, Stage>) {
    match kind {
        Kind::Ordered => {
            let lane = ordered::Lane::new(log, equipment, id(), SEED);
            lane.run().await;
        }
        Kind::ByKey => {
            let lane = concurrent::Lane::new(log, equipment, id(), SEED);
            lane.run().await;
        }
        Kind::Transactional => {
            let ledger = Arc::<Database>::default();
            let store = StoreName::Sql(Arc::from("posts"));
            let lane = transactional::Lane::new(log, equipment, ledger, store, id(), SEED);
            lane.run().await;
        }
    }
}

fn id() -> LaneId {
    LaneId {
        group: Arc::from("group"),
        topic: Arc::from(TOPIC),
        partition: PARTITION,
    }
}

fn equipment(sink: Arc<Sent>, kind: Kind) -> Equipment<Sent, Stage> {
    let metrics = Arc::<Metrics>::default();
    let readiness = Arc::<Readiness>::default();
    Equipment {
        sink,
        handler: Arc::new(Stage),
        policy: Arc::new(policy(kind)),
        breaker: Arc::new(Breaker::new([], readiness.clone(), metrics.clone(), SEED)),
        readiness,
        metrics: metrics.stage("stage"),
        cluster: Arc::from(CLUSTER),
    }
}

/// As a pipeline has it that says nothing of it.
fn policy(kind: Kind) -> Policy {
    let (order, concurrency) = match kind {
        Kind::ByKey => (Order::Key, 16),
        Kind::Ordered | Kind::Transactional => (Order::Partition, 1),
    };
    Policy {
        batch: BatchLimits {
            max_messages: 500,
            max_bytes: 1 << 20,
            max_time: Duration::from_secs(1),
        },
        order,
        concurrency,
        retry: Retry {
            max_attempts: 5,
            initial: Duration::from_millis(100),
            max: Duration::from_secs(30),
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
