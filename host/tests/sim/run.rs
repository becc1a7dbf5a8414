//! One run: a schedule, then a time in which nothing goes wrong any more, then the judge.

use std::sync::Arc;
use std::time::{Duration, Instant};

use host::metrics::Metrics;
use host::record::Outgoing;

use crate::bugs::{Bug, Planted};
use crate::cluster::Cluster;
use crate::hosts::Servers;
use crate::judge;
use crate::schedule::{Event, Move, Schedule};
use crate::world::broker::Broker;
use crate::world::database::Database;
use crate::world::evidence::Anomaly;
use crate::world::store::Store;
use crate::world::trace::{Subject, digest};
use crate::world::{Weather, World, pause};

/// How often the group looks after its members, in milliseconds.
const TICK: u64 = 200;
/// Everything that is late has arrived by then.
const LATEST: u64 = 12_000;
/// How long it may take until all is processed once nothing goes wrong any more.
const PATIENCE: u64 = 600_000;

/// What a run has come to.
pub(crate) struct Report {
    pub(crate) seed: u64,
    pub(crate) anomalies: Vec<Anomaly>,
    pub(crate) fingerprint: (u64, u64),
    pub(crate) tail: Vec<String>,
    pub(crate) points: u64,
    /// Virtual milliseconds.
    pub(crate) lasted: u64,
    pub(crate) took: Duration,
}

pub(crate) fn run(seed: u64, bug: Option<Bug>) -> Report {
    run_schedule(Schedule::of(seed), bug)
}

pub(crate) fn run_schedule(schedule: Schedule, bug: Option<Bug>) -> Report {
    let began = Instant::now();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without sockets needs nothing");
    let mut report = runtime.block_on(play(schedule, bug));
    report.took = began.elapsed();
    report
}

async fn play(schedule: Schedule, bug: Option<Bug>) -> Report {
    let world = World::new(
        schedule.seed,
        schedule.topology.clone(),
        schedule.crash_at.clone(),
    );
    world.set_weather(schedule.weather);
    let servers = servers(&world, &schedule, bug);
    let cluster = Cluster::new(servers.clone(), schedule.hosts);
    cluster.tend(true).await;
    for (at, event) in &schedule.events {
        while world.now() + TICK < *at {
            pause(TICK).await;
            cluster.tend(false).await;
        }
        pause(at.saturating_sub(world.now())).await;
        happen(&servers, &cluster, schedule.weather, event).await;
    }
    let is_drained = heal(&world, &servers, &cluster).await;
    if !is_drained {
        let mut evidence = world.evidence();
        for undone in cluster.undone() {
            evidence.anomaly("stuck", undone);
        }
    }
    let anomalies = match world.is_spinning() {
        true => world.evidence().anomalies.clone(),
        false => judge::judge(&servers, &schedule, cluster.halted()),
    };
    world.end();
    let (fingerprint, tail) = {
        let trace = world.trace();
        (trace.fingerprint(), trace.tail())
    };
    Report {
        seed: schedule.seed,
        anomalies,
        fingerprint,
        tail,
        points: world.points(),
        lasted: world.now(),
        took: Duration::ZERO,
    }
}

fn servers(world: &World, schedule: &Schedule, bug: Option<Bug>) -> Servers {
    let planted = Planted(bug);
    let database = |_| Database::new(world.clone(), planted.is(Bug::NoRowLock));
    Servers {
        world: world.clone(),
        broker: Broker::new(world.clone()),
        databases: (0..schedule.topology.databases).map(database).collect(),
        store: Store::new(world.clone(), planted.is(Bug::NoVersions)),
        planted,
        slots: schedule.slots,
        one_writer: schedule.one_writer,
        policies: Servers::policies(world, schedule.on_gap),
        metrics: Arc::<Metrics>::default(),
    }
}

async fn happen(servers: &Servers, cluster: &Cluster, calm: Weather, event: &Event) {
    let Servers { world, broker, .. } = servers;
    match event {
        Event::Input { id, key } => input(servers, *id, *key),
        Event::Crash(place) => cluster.host(*place).crash(),
        Event::Freeze(place, time) => {
            world.evidence().disturbed_all(2);
            cluster.host(*place).process.freeze(*time);
        }
        Event::Move(number, how) => {
            world.evidence().moves += 1;
            if !matches!(how, Move::Asked(_)) {
                world.evidence().disturbed_all(1);
            }
            cluster.relocate(*number, *how).await;
        }
        Event::DatabaseAway(number, time) => {
            for stage in 0..world.topology().stages.len() {
                world.evidence().cost(stage, 3);
            }
            let database = servers.databases[*number].clone();
            database.set_up(false);
            let time = *time;
            world.spawn(async move {
                pause(time).await;
                database.set_up(true);
            });
        }
        Event::LogAway(time) => {
            world.evidence().disturbed_all(6);
            broker.set_up(false);
            let (broker, time) = (broker.clone(), *time);
            world.spawn(async move {
                pause(time).await;
                broker.set_up(true);
            });
        }
        Event::StoreAway(time) => {
            servers.store.set_up(false);
            let (store, time) = (servers.store.clone(), *time);
            world.spawn(async move {
                pause(time).await;
                store.set_up(true);
            });
        }
        Event::ProducerFails(place, stage) => {
            world.evidence().disturbed_all(1);
            cluster.host(*place).producers[*stage].fail();
        }
        Event::Weather(weather, time) => {
            world.set_weather(*weather);
            let (world, time) = (world.clone(), *time);
            servers.world.spawn(async move {
                pause(time).await;
                world.set_weather(calm);
            });
        }
        Event::Retention {
            topic,
            partition,
            part,
        } => {
            let (topic, partitions) = &world.topology().topics[*topic];
            let number = i32::try_from(partition % *partitions as u64).unwrap_or(0);
            let (first, end) = broker.range(topic, number);
            let below = first + (end - first) * part / 100;
            broker.remove(topic, number, below);
            let subject = Subject::Place(topic.clone(), number);
            world.note(0, "removed below", subject, [below, 0]);
        }
    }
}

fn input(servers: &Servers, id: u32, key: Option<u32>) {
    let world = &servers.world;
    let (topic, partitions) = &world.topology().topics[0];
    let key = key.map(|key| format!("k{key}"));
    let chosen = key.clone().unwrap_or_else(|| id.to_string());
    let partition = digest(1, &[&chosen]) % *partitions as u64;
    let record = Outgoing {
        topic: topic.clone(),
        partition: i32::try_from(partition).ok(),
        timestamp: None,
        key: key.map(String::into_bytes),
        value: Some(id.to_string().into_bytes()),
        headers: Vec::new(),
    };
    servers.broker.append(0, &record);
}

/// Nothing goes wrong any more. Answers whether everything gets processed.
async fn heal(world: &World, servers: &Servers, cluster: &Cluster) -> bool {
    world.note(0, "heal", Subject::None, [0, 0]);
    world.stop_crashes();
    // Weather that was to last may come back once, before what is late has arrived.
    world.set_weather(Weather::FINE);
    let until = world.now() + LATEST;
    let give_up = until + PATIENCE;
    servers.store.set_up(true);
    while world.now() < give_up && !world.is_spinning() {
        world.set_weather(Weather::FINE);
        for database in servers.databases.iter().filter(|d| !d.is_up()) {
            database.set_up(true);
        }
        if !servers.broker.is_up() {
            servers.broker.set_up(true);
        }
        cluster.tell_all().await;
        cluster.tend(true).await;
        pause(TICK * 5).await;
        if world.now() >= until && cluster.is_drained() {
            return true;
        }
    }
    false
}
