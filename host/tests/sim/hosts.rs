//! Hosts, and the group that gives them partitions: they join, crash, are told late that a partition is not theirs any
//! more, or never.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use host::capability::StoreName;
use host::delivery::breaker::Breaker;
use host::delivery::dead_letter::DeadLetters;
use host::lane::{Equipment, Policy, concurrent, ordered, transactional};
use host::log::BatchLimits;
use host::metrics::Metrics;
use host::pipeline::{OnGap, Order, Retry};
use host::readiness::Readiness;
use tokio::sync::Semaphore;

use crate::bugs::{self, Bug, Planted};
use crate::topology::{self, Kind};
use crate::world::broker::{Broker, Seat};
use crate::world::client::Client;
use crate::world::database::Database;
use crate::world::process::Process;
use crate::world::producer::Producer;
use crate::world::source::{PartitionSource, Slot};
use crate::world::stage::{DATABASE, STORE, Stage};
use crate::world::store::Store;
use crate::world::{World, pause};

/// How often settled offsets are committed, in milliseconds.
const COMMIT_INTERVAL: u64 = 250;

/// Messages of a partition that a stage has side by side, where it may.
const CONCURRENCY: usize = 4;

/// Which cluster the log is.
pub(crate) const CLUSTER: &str = "here";

/// A topic that the first stage is not granted.
pub(crate) const FOREIGN: &str = "side";

/// What all hosts share: the servers.
#[derive(Clone)]
pub(crate) struct Servers {
    pub(crate) world: World,
    pub(crate) broker: Arc<Broker>,
    pub(crate) databases: Vec<Arc<Database>>,
    pub(crate) store: Arc<Store>,
    pub(crate) planted: Planted,
    /// Transactions that one host has at a time, in one database.
    pub(crate) slots: usize,
    /// And whatever else writes waits for its turn too.
    pub(crate) one_writer: bool,
    pub(crate) policies: Vec<Arc<Policy>>,
    pub(crate) metrics: Arc<Metrics>,
    /// Transactional stages that hosts which start from now on deliver to at least once.
    pub(crate) at_least_once: Arc<Mutex<BTreeSet<usize>>>,
}

impl Servers {
    pub(crate) fn policies(world: &World, on_gap: OnGap, planted: Planted) -> Vec<Arc<Policy>> {
        let stages = world.topology().stages.iter();
        stages
            .map(|stage| Arc::new(policy(stage, on_gap, planted)))
            .collect()
    }
}

fn policy(stage: &topology::Stage, on_gap: OnGap, planted: Planted) -> Policy {
    Policy {
        batch: BatchLimits {
            max_messages: stage.max_messages,
            max_bytes: 1 << 20,
            max_time: Duration::from_millis(stage.max_time),
        },
        retry: Retry {
            max_attempts: stage.max_attempts,
            initial: Duration::from_millis(20),
            max: Duration::from_secs(1),
        },
        order: match stage.order {
            Order::Key if planted.is(Bug::NoOrder) => Order::None,
            order => order,
        },
        concurrency: CONCURRENCY,
        on_exhausted: stage.on_exhausted,
        on_gap,
        outputs: match planted.is(Bug::GrantsAll) {
            true => BTreeSet::from([FOREIGN.into()]),
            false => stage.output.iter().cloned().collect(),
        },
        dead_letters: DeadLetters {
            stage: stage.name.into(),
            group: stage.group(),
            component: "sha".into(),
            topic: Some(stage.letters.clone()),
        },
    }
}

/// What the lanes of one stage have, and the database that keeps their progress if they are transactional.
type Equipped = (
    Equipment<bugs::Sink, bugs::Handler>,
    Option<Arc<bugs::Ledger>>,
);

/// One host's process, with its lanes.
pub(crate) struct Host {
    pub(crate) process: Process,
    servers: Servers,
    pub(crate) readiness: Arc<Readiness>,
    equipment: Vec<Equipped>,
    /// Stages that it delivers to at least once, though they have a database.
    at_least_once: BTreeSet<usize>,
    pub(crate) producers: Vec<Arc<Producer>>,
    pub(crate) lanes: Mutex<BTreeMap<Seat, Arc<Slot>>>,
}

impl Host {
    pub(crate) fn boot(servers: &Servers, number: u32) -> Arc<Self> {
        let world = &servers.world;
        let process = Process::new(world.clone(), number);
        let readiness = Arc::<Readiness>::default();
        let stores = [
            StoreName::Sql(DATABASE.into()),
            StoreName::Redis(STORE.into()),
        ];
        let slots: Vec<_> = servers
            .databases
            .iter()
            .map(|_| Arc::new(Semaphore::new(servers.slots)))
            .collect();
        let seed = world.seed_of_another();
        let breaker = Breaker::new(stores, readiness.clone(), servers.metrics.clone(), seed);
        let breaker = Arc::new(breaker);
        let mut producers = Vec::new();
        let mut equipment = Vec::new();
        for (number, stage) in world.topology().stages.iter().enumerate() {
            let producer = Producer::new(process.clone(), servers.broker.clone());
            let client = match stage.kind {
                Kind::Transactional(database) => Some(Arc::new(Client::new(
                    process.clone(),
                    servers.databases[database].clone(),
                    number,
                    slots[database].clone(),
                    servers.one_writer,
                ))),
                Kind::Ordered => None,
            };
            let ledger = client.clone().map(|inner| {
                Arc::new(bugs::Ledger {
                    planted: servers.planted,
                    inner,
                    sink: producer.clone(),
                    tried: Arc::default(),
                })
            });
            let handler = bugs::Handler {
                planted: servers.planted,
                inner: Stage {
                    process: process.clone(),
                    number,
                    store: servers.store.clone(),
                    client,
                },
            };
            let sink = bugs::Sink {
                planted: servers.planted,
                world: world.clone(),
                inner: producer.clone(),
            };
            producers.push(producer);
            let equipped = Equipment {
                sink: Arc::new(sink),
                handler: Arc::new(handler),
                policy: servers.policies[number].clone(),
                breaker: breaker.clone(),
                readiness: readiness.clone(),
                metrics: servers.metrics.stage(stage.name),
                cluster: CLUSTER.into(),
            };
            equipment.push((equipped, ledger));
        }
        process.note("boot", crate::world::trace::Subject::None, [0, 0]);
        Arc::new(Self {
            process,
            servers: servers.clone(),
            readiness,
            equipment,
            at_least_once: crate::world::lock(&servers.at_least_once).clone(),
            producers,
            lanes: Mutex::default(),
        })
    }

    pub(crate) fn crash(&self) {
        self.process.crash();
    }

    /// Starts a lane on a partition, and the thread that commits its offsets.
    pub(crate) fn start_lane(self: &Arc<Self>, seat: Seat) {
        let slot = Slot::new(seat);
        crate::world::lock(&self.lanes).insert(seat, slot.clone());
        self.note_seat("assigned", seat);
        let source = bugs::Source {
            planted: self.servers.planted,
            inner: PartitionSource::new(
                self.process.clone(),
                self.servers.broker.clone(),
                slot.clone(),
            ),
        };
        let (equipment, ledger) = self.equipment[seat.0].clone();
        let ledger = ledger.filter(|_| !self.at_least_once.contains(&seat.0));
        let id = self.servers.world.topology().stages[seat.0].lane(seat.1);
        let seed = self.servers.world.seed_of_another();
        let lane = async move {
            match ledger {
                Some(ledger) => {
                    let store = StoreName::Sql(DATABASE.into());
                    let lane = transactional::Lane::new(source, equipment, ledger, store, id, seed);
                    Box::pin(lane.run()).await;
                }
                None if equipment.policy.order != Order::Partition => {
                    let lane = concurrent::Lane::new(source, equipment, id, seed);
                    Box::pin(lane.run()).await;
                }
                None => {
                    let lane = ordered::Lane::new(source, equipment, id, seed);
                    Box::pin(lane.run()).await;
                }
            }
        };
        let (killed, ours) = (self.process.killed().clone(), slot.clone());
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = killed.cancelled() => {}
                () = ours.abandoned.cancelled() => {}
                () = lane => {}
            }
        });
        tokio::spawn(self.clone().commit_offsets(slot));
    }

    async fn commit_offsets(self: Arc<Self>, slot: Arc<Slot>) {
        let work = async {
            loop {
                tokio::select! {
                    biased;
                    () = slot.ended.cancelled() => return,
                    () = slot.dirty.notified() => {}
                }
                pause(COMMIT_INTERVAL).await;
                self.process.point("commit offset").await;
                self.servers.broker.until_up().await;
                if slot.ended.is_cancelled() {
                    return;
                }
                self.commit_settled(&slot);
            }
        };
        tokio::select! {
            biased;
            () = self.process.killed().cancelled() => {}
            () = work => {}
        }
    }

    fn commit_settled(&self, slot: &Slot) {
        let Some(commit) = slot.uncommitted().filter(|_| !self.process.is_dead()) else {
            return;
        };
        let (broker, offset) = (&self.servers.broker, commit.offset);
        let commit = self.servers.planted.written(commit);
        if broker.commit(self.process.number(), slot.seat, commit) {
            slot.committed(offset);
        }
    }

    /// Ends a lane of a partition that is asked back: after the budget its future is dropped. Then, its offsets are committed.
    pub(crate) async fn end_lane(&self, seat: Seat, budget: u64) {
        self.end(seat, budget, false).await;
    }

    /// Ends a lane of a partition that another has already.
    pub(crate) async fn lose_lane(&self, seat: Seat) {
        self.end(seat, 0, true).await;
    }

    async fn end(&self, seat: Seat, budget: u64, is_lost: bool) {
        let slot = crate::world::lock(&self.lanes).remove(&seat);
        let Some(slot) = slot else { return };
        self.note_seat("to be given up", seat);
        slot.stopping.cancel();
        let time = Duration::from_millis(budget);
        let ended = async {
            tokio::select! {
                biased;
                () = slot.ended.cancelled() => {}
                () = self.process.killed().cancelled() => {}
            }
        };
        if tokio::time::timeout(time, ended).await.is_err() {
            self.note_seat("abandoned", seat);
            self.servers.world.evidence().disturbed(seat.0, 1);
            slot.abandoned.cancel();
            tokio::select! {
                biased;
                () = slot.ended.cancelled() => {}
                () = self.process.killed().cancelled() => {}
            }
        }
        if !is_lost && self.servers.broker.is_up() {
            self.commit_settled(&slot);
        }
        self.note_seat("given up", seat);
    }

    fn note_seat(&self, what: &'static str, seat: Seat) {
        let stage = &self.servers.world.topology().stages[seat.0];
        let subject = crate::world::trace::Subject::Place(stage.input.clone(), seat.1);
        self.process
            .note(what, subject, [seat.0.try_into().unwrap_or(0), 0]);
    }
}
