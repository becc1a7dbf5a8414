//! One run: a schedule, then a time in which nothing goes wrong any more, then the judge.

use std::sync::{Arc, Mutex};

use host::delivery::progress::Claim;
use host::metrics::Metrics;
use host::record::{Header, Outgoing};

use crate::bugs::{Bug, Planted};
use crate::cluster::Cluster;
use crate::hosts::Servers;
use crate::judge;
use crate::schedule::{Event, Move, Schedule};
use crate::topology::Kind;
use crate::world::broker::Broker;
use crate::world::database::{Copy, Database};
use crate::world::evidence::Anomaly;
use crate::world::store::Store;
use crate::world::trace::{Subject, digest};
use crate::world::{Weather, World, lock, pause};

/// How often the group looks after its members, in milliseconds.
const TICK: u64 = 200;
/// Everything that is late has arrived by then.
const LATEST: u64 = 12_000;
/// And idle lanes have looked whether their databases are the ones that they were.
const LOOKED: u64 = 50_000;
/// Databases go back at least so many milliseconds.
const AGE_OF_COPIES: u64 = 2_000;
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
}

/// Runs the schedule of a seed, with a bug if there is to be one.
pub(crate) fn run(seed: u64, bug: Option<Bug>) -> Report {
    simulate(async {
        let run = Run::begin(Schedule::of(seed), bug).await;
        run.play().await;
        run.heal().await;
        run.report()
    })
}

/// Runs a future on a clock that jumps to whatever is next.
pub(crate) fn simulate<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    let runtime = runtime.expect("a runtime without sockets needs nothing");
    runtime.block_on(future)
}

pub(crate) struct Run {
    pub(crate) schedule: Schedule,
    pub(crate) servers: Servers,
    pub(crate) cluster: Cluster,
    /// Of databases, and when they were made.
    copies: Mutex<Vec<(usize, u64, Copy)>>,
}

impl Run {
    /// A world with its hosts, who have all partitions.
    pub(crate) async fn begin(schedule: Schedule, bug: Option<Bug>) -> Self {
        let topology = schedule.topology.clone();
        let world = World::new(schedule.seed, topology, schedule.crash_at.clone());
        world.set_weather(schedule.weather);
        let planted = Planted(bug);
        let database = |_| Database::new(world.clone(), planted.lacks());
        let servers = Servers {
            broker: Broker::new(world.clone()),
            databases: (0..schedule.topology.databases).map(database).collect(),
            store: Store::new(world.clone(), planted.is(Bug::NoVersions)),
            planted,
            slots: schedule.slots,
            one_writer: schedule.one_writer,
            policies: Servers::policies(&world, schedule.on_gap, planted),
            metrics: Arc::<Metrics>::default(),
            at_least_once: Arc::default(),
            world,
        };
        let cluster = Cluster::new(servers.clone(), schedule.hosts);
        cluster.tend(true).await;
        Self {
            schedule,
            servers,
            cluster,
            copies: Mutex::default(),
        }
    }

    /// What is to happen, when it is to.
    pub(crate) async fn play(&self) {
        let world = &self.servers.world;
        for (at, event) in &self.schedule.events {
            while world.now() + TICK < *at {
                pause(TICK).await;
                self.cluster.tend(false).await;
            }
            pause(at.saturating_sub(world.now())).await;
            self.happen(event).await;
        }
    }

    async fn happen(&self, event: &Event) {
        let world = &self.servers.world;
        match event {
            Event::Input { id, key } => self.input(*id, *key),
            Event::Crash(place) => self.cluster.host(*place).crash(),
            Event::Freeze(place, time) => {
                world.evidence().disturbed_all(2);
                self.cluster.host(*place).process.freeze(*time);
            }
            Event::Move(number, how) => {
                world.evidence().moves += 1;
                if !matches!(how, Move::Asked(_)) {
                    world.evidence().disturbed_all(1);
                }
                self.cluster.relocate(*number, *how).await;
            }
            Event::ProducerFails(place, stage) => {
                world.evidence().disturbed_all(1);
                self.cluster.host(*place).producers[*stage].fail();
            }
            Event::Weather(weather, time) => {
                world.set_weather(*weather);
                let (calm, again) = (self.schedule.weather, world.clone());
                self.later(*time, move || again.set_weather(calm));
            }
            Event::Retention {
                topic,
                partition,
                part,
            } => self.remove(*topic, *partition, *part),
            Event::Copy(number) => {
                let copy = self.servers.databases[*number].copy();
                lock(&self.copies).push((*number, world.now(), copy));
            }
            Event::Restore(number, cuts) => self.restore(*number, *cuts),
            Event::DatabaseAway(..) | Event::LogAway(_) | Event::StoreAway(_) => self.outage(event),
            // Nothing that is sick costs a message an attempt.
            Event::DatabaseSick(number, sickness) => {
                self.servers.databases[*number].set_sick(*sickness);
            }
            Event::StoreSick(sickness) => self.servers.store.set_sick(*sickness),
        }
    }

    /// A database goes back, or forth, to one of its copies, under whoever uses it.
    fn restore(&self, number: usize, cuts: bool) {
        let (world, database) = (&self.servers.world, &self.servers.databases[number]);
        let copies = lock(&self.copies);
        let is_old =
            |(of, at, _): &&(usize, u64, Copy)| *of == number && at + AGE_OF_COPIES <= world.now();
        let all: Vec<_> = copies.iter().filter(is_old).collect();
        if all.is_empty() {
            return;
        }
        let (.., copy) = all[world.roll(0..=all.len() - 1)];
        if !self.is_noticeable(number, copy) {
            return;
        }
        world.evidence().went_back = true;
        for stage in 0..world.topology().stages.len() {
            world.evidence().cost(stage, 20);
        }
        match cuts {
            true => database.restore(copy.clone()),
            false => database.rewrite(copy.clone()),
        }
    }

    /// Whether somebody knows of each lane whose row is another one in the copy: the log, which is told a quarter of a second
    /// after a commit, or else the lane, which is there all the time if nothing ends it.
    fn is_noticeable(&self, number: usize, (_, lanes): &Copy) -> bool {
        let (topology, broker) = (self.servers.world.topology(), &self.servers.broker);
        let ends = |event: &Event| matches!(event, Event::Crash(_) | Event::Move(..));
        let lasting = self.schedule.crash_at.is_empty()
            && !self.schedule.events.iter().any(|(_, event)| ends(event));
        let is_known = |stage: usize, partition: i32| {
            let lane = topology.stages[stage].lane(partition);
            let age = |row: &Claim| (row.generation, row.commits);
            let now = self.servers.databases[number].lane(&lane);
            let (now, then) = (now.as_ref().map(age), lanes.get(&lane).map(age));
            let commit = broker.group_commit((stage, partition));
            let mark = commit.and_then(|commit| commit.row());
            let mark = mark.map(|row| (row.generation, row.commits));
            let is_told = mark > then && mark.map(|mark| mark.0) >= now.map(|now| now.0);
            now == then || is_told || lasting
        };
        (topology.stages.iter().enumerate())
            .filter(|(_, stage)| stage.kind == Kind::Transactional(number))
            .all(|(at, stage)| {
                let partitions = i32::try_from(topology.partitions(&stage.input)).unwrap_or(0);
                (0..partitions).all(|partition| is_known(at, partition))
            })
    }

    fn outage(&self, event: &Event) {
        let Servers { world, .. } = &self.servers;
        match event {
            Event::DatabaseAway(number, time) => {
                for stage in 0..world.topology().stages.len() {
                    world.evidence().cost(stage, 3);
                }
                let database = self.servers.databases[*number].clone();
                database.set_up(false);
                self.later(*time, move || database.set_up(true));
            }
            Event::LogAway(time) => {
                world.evidence().disturbed_all(6);
                let broker = self.servers.broker.clone();
                broker.set_up(false);
                self.later(*time, move || broker.set_up(true));
            }
            Event::StoreAway(time) => {
                let store = self.servers.store.clone();
                store.set_up(false);
                self.later(*time, move || store.set_up(true));
            }
            _ => {}
        }
    }

    fn later(&self, time: u64, work: impl FnOnce() + Send + 'static) {
        self.servers.world.spawn(async move {
            pause(time).await;
            work();
        });
    }

    fn remove(&self, topic: usize, partition: u64, part: i64) {
        let Servers { world, broker, .. } = &self.servers;
        let (topic, partitions) = &world.topology().topics[topic];
        let number = i32::try_from(partition % *partitions as u64).unwrap_or(0);
        let (first, end) = broker.range(topic, number);
        let below = first + (end - first) * part / 100;
        broker.remove(topic, number, below);
        let subject = Subject::Place(topic.clone(), number);
        world.note(0, "removed below", subject, [below, 0]);
    }

    pub(crate) fn input(&self, id: u32, key: Option<u32>) {
        let world = &self.servers.world;
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
            headers: self.headers_of_others(),
        };
        self.servers.broker.append(0, &record);
    }

    /// Other programs copy headers: what came out of a topic goes into another with all that the host wrote beside it.
    fn headers_of_others(&self) -> Vec<Header> {
        let world = &self.servers.world;
        if !world.one_in(3) {
            return Vec::new();
        }
        let topics = &world.topology().topics;
        let (topic, partitions) = &topics[world.roll(0..=topics.len() - 1)];
        let number = world.roll(0..=partitions - 1);
        let records = (self.servers.broker)
            .partition(topic, i32::try_from(number).unwrap_or(0))
            .records;
        match records.len() {
            0 => Vec::new(),
            count => records[world.roll(0..=count - 1)].headers.clone(),
        }
    }

    /// Nothing goes wrong any more: waits until everything is processed, which must not take for ever.
    pub(crate) async fn heal(&self) {
        let Servers { world, .. } = &self.servers;
        world.note(0, "heal", Subject::None, [0, 0]);
        world.stop_crashes();
        self.servers.store.set_up(true);
        let until = match world.evidence().went_back {
            true => world.now() + LOOKED,
            false => world.now() + LATEST,
        };
        while world.now() < until + PATIENCE && !world.is_spinning() {
            // What was to end later ends in between.
            world.set_weather(Weather::FINE);
            for database in self.servers.databases.iter().filter(|d| !d.is_up()) {
                database.set_up(true);
            }
            if !self.servers.broker.is_up() {
                self.servers.broker.set_up(true);
            }
            self.cluster.tell_all().await;
            self.cluster.tend(true).await;
            pause(TICK * 5).await;
            if world.now() >= until && self.cluster.undone().is_empty() {
                return;
            }
        }
        let mut evidence = world.evidence();
        for undone in self.cluster.undone() {
            evidence.anomaly("stuck", undone);
        }
    }

    pub(crate) fn report(&self) -> Report {
        let world = &self.servers.world;
        let anomalies = match world.is_spinning() {
            true => world.evidence().anomalies.clone(),
            false => judge::judge(&self.servers, &self.schedule, self.cluster.halted()),
        };
        world.end();
        let trace = world.trace();
        Report {
            seed: self.schedule.seed,
            anomalies,
            fingerprint: trace.fingerprint(),
            tail: trace.tail(),
            points: world.points(),
            lasted: world.now(),
        }
    }
}
