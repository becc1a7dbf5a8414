//! Which host has which partition, through crashes and moves.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use crate::hosts::{Host, Servers};
use crate::schedule::Move;
use crate::world::broker::Seat;
use crate::world::{lock, pause};

/// How long a group may wait before it takes a member for dead, in milliseconds.
const SESSION: u64 = 8_000;

/// What a lane says that does again what its database has lost.
const AGAIN: &str = "waits until ";
/// And one that goes on by itself.
const WAITS: &str = "waits ";
const TRIES_AGAIN: &str = "its row in stagehost_progress can't be kept";

/// The group of all stages. Clones are the same.
#[derive(Clone)]
pub(crate) struct Cluster(Arc<State>);

struct State {
    servers: Servers,
    places: Mutex<Vec<Place>>,
    numbers: Mutex<u32>,
}

/// Where one process follows another.
struct Place {
    host: Arc<Host>,
    /// After a crash: when the next process is there.
    restart_at: Option<u64>,
}

impl Cluster {
    pub(crate) fn new(servers: Servers, hosts: usize) -> Self {
        let cluster = Self(Arc::new(State {
            servers,
            places: Mutex::default(),
            numbers: Mutex::new(0),
        }));
        for _ in 0..hosts {
            let host = cluster.boot();
            lock(&cluster.0.places).push(Place {
                host,
                restart_at: None,
            });
        }
        cluster
    }

    fn boot(&self) -> Arc<Host> {
        let number = {
            let mut numbers = lock(&self.0.numbers);
            *numbers += 1;
            *numbers
        };
        let host = Host::boot(&self.0.servers, number);
        let (dying, world) = (host.clone(), self.0.servers.world.clone());
        tokio::spawn(async move {
            dying.process.killed().cancelled().await;
            world.evidence().disturbed_all(1);
            for producer in &dying.producers {
                producer.lose();
            }
        });
        host
    }

    pub(crate) fn host(&self, place: usize) -> Arc<Host> {
        lock(&self.0.places)[place].host.clone()
    }

    pub(crate) fn hosts(&self) -> Vec<Arc<Host>> {
        lock(&self.0.places)
            .iter()
            .map(|place| place.host.clone())
            .collect()
    }

    fn seats(&self) -> Vec<Seat> {
        let topology = self.0.servers.world.topology();
        let stages = topology.stages.iter().enumerate();
        stages
            .flat_map(|(number, stage)| {
                let partitions = i32::try_from(topology.partitions(&stage.input)).unwrap_or(0);
                (0..partitions).map(move |partition| (number, partition))
            })
            .collect()
    }

    /// Puts new processes where others crashed, and gives partitions away that nobody has. `hurry` waits for nothing.
    pub(crate) async fn tend(&self, hurry: bool) {
        let world = &self.0.servers.world;
        let now = world.now();
        let mut dead = BTreeMap::new();
        let places = lock(&self.0.places).len();
        for number in 0..places {
            let is_due = {
                let mut places = lock(&self.0.places);
                let place = &mut places[number];
                if !place.host.process.is_dead() {
                    continue;
                }
                let at = *place
                    .restart_at
                    .get_or_insert_with(|| now + world.roll(0..=SESSION));
                dead.insert(place.host.process.number(), at);
                hurry || at <= now
            };
            if is_due {
                let host = self.boot();
                lock(&self.0.places)[number] = Place {
                    host,
                    restart_at: None,
                };
            }
        }
        let alive: Vec<_> = self.hosts();
        for seat in self.seats() {
            let owner = self.0.servers.broker.owner(seat);
            let is_there = alive
                .iter()
                .any(|host| Some(host.process.number()) == owner && !host.process.is_dead());
            // Until its session is over, a dead member keeps what it has.
            let waits = owner.is_some_and(|owner| dead.get(&owner).is_some_and(|at| *at > now));
            if !is_there && (hurry || !waits) {
                self.give(seat, None).await;
            }
        }
    }

    /// Gives a partition to a host that is alive, if there is one beside `not`.
    async fn give(&self, seat: Seat, not: Option<u32>) -> bool {
        let hosts = self.hosts();
        let alive: Vec<_> = hosts
            .iter()
            .filter(|host| !host.process.is_dead() && Some(host.process.number()) != not)
            .collect();
        if alive.is_empty() {
            return false;
        }
        let world = &self.0.servers.world;
        let host = alive[world.roll(0..=alive.len() - 1)];
        self.0
            .servers
            .broker
            .set_owner(seat, Some(host.process.number()));
        // One that it was not told to have lost.
        host.lose_lane(seat).await;
        host.start_lane(seat);
        true
    }

    /// Moves a partition from the host that has it.
    pub(crate) async fn relocate(&self, number: u64, how: Move) {
        let seats = self.seats();
        let index = usize::try_from(number % seats.len() as u64).unwrap_or(0);
        let seat = seats[index];
        let broker = &self.0.servers.broker;
        let Some(owner) = broker.owner(seat) else {
            return;
        };
        let hosts = self.hosts();
        let Some(old) = hosts.iter().find(|h| h.process.number() == owner).cloned() else {
            return;
        };
        let cluster = self.clone();
        match how {
            Move::Asked(budget) => {
                tokio::spawn(async move {
                    old.end_lane(seat, budget).await;
                    let is_still = cluster.0.servers.broker.owner(seat) == Some(owner);
                    if is_still && !cluster.give(seat, Some(owner)).await {
                        // There is none beside it, so it has it again.
                        cluster.give(seat, None).await;
                    }
                });
            }
            Move::Late(delay) => {
                if self.give(seat, Some(owner)).await {
                    tokio::spawn(async move {
                        pause(delay).await;
                        if cluster.0.servers.broker.owner(seat) != Some(owner) {
                            old.lose_lane(seat).await;
                        }
                    });
                }
            }
            Move::Never => {
                self.give(seat, Some(owner)).await;
            }
        }
    }

    /// All hosts learn what is theirs.
    pub(crate) async fn tell_all(&self) {
        for host in self.hosts() {
            host.process.thaw();
            let seats: Vec<_> = lock(&host.lanes).keys().copied().collect();
            for seat in seats {
                let owner = self.0.servers.broker.owner(seat);
                if owner != Some(host.process.number()) {
                    host.lose_lane(seat).await;
                }
            }
        }
    }

    /// The seats whose group has not got to the end, though no lane of them says that it has stopped. In words.
    pub(crate) fn undone(&self) -> Vec<String> {
        let servers = &self.0.servers;
        let topology = servers.world.topology();
        let halted = self.halted();
        let again = self.says(|said| said.starts_with(AGAIN));
        let mut undone = Vec::new();
        for seat in self.seats() {
            let stage = &topology.stages[seat.0];
            let (first, end) = servers.broker.range(&stage.input, seat.1);
            // What was removed need not be processed.
            let committed = servers.broker.committed(seat).unwrap_or(first).max(first);
            if (committed != end || again.contains(&seat)) && !halted.contains(&seat) {
                undone.push(format!(
                    "stage {} on {} {}: {committed} of {end}",
                    stage.name, stage.input, seat.1
                ));
            }
        }
        undone
    }

    /// The seats whose lanes say that they have stopped.
    pub(crate) fn halted(&self) -> BTreeSet<Seat> {
        self.says(|said| !said.starts_with(WAITS) && !said.starts_with(TRIES_AGAIN))
    }

    /// The seats of which readiness says something like it.
    fn says(&self, like: impl Fn(&str) -> bool) -> BTreeSet<Seat> {
        let topology = self.0.servers.world.topology();
        let hosts = self.hosts();
        let reasons: Vec<_> = (hosts.iter())
            .filter(|host| !host.process.is_dead())
            .flat_map(|host| host.readiness.reasons())
            .collect();
        let says = |seat: &Seat| {
            let stage = &topology.stages[seat.0];
            let condition = format!("stage {} on {} {}: ", stage.name, stage.input, seat.1);
            let mut own = reasons
                .iter()
                .filter_map(|reason| reason.strip_prefix(&condition));
            own.any(&like)
        };
        self.seats().into_iter().filter(says).collect()
    }
}
