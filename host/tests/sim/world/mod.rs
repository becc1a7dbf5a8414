//! What lanes run in here: a log, databases, a key-value store and the network between, on a clock that jumps.
//!
//! One thread, one seeded dice, no clock but tokio's: the same seed gives the same run. Nothing here knows what a lane
//! does; what it sees of the lanes are calls of the host's own traits.

pub(crate) mod broker;
pub(crate) mod client;
pub(crate) mod database;
pub(crate) mod evidence;
pub(crate) mod network;
pub(crate) mod process;
pub(crate) mod producer;
pub(crate) mod sickness;
pub(crate) mod source;
pub(crate) mod stage;
pub(crate) mod store;
pub(crate) mod trace;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::Instant;

use self::evidence::Evidence;
use self::process::Process;
use self::trace::{Subject, Trace};
use crate::topology::Topology;

/// A run that takes more steps than this goes round in circles.
const MAX_POINTS: u64 = 150_000;

/// Events of the trace that are kept, where nobody asks for more.
const TRACE: usize = 400;

/// How things go between processes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weather {
    /// The longest way, in milliseconds; many are shorter.
    pub(crate) slow: u64,
    /// Of a thousand requests to a store, those that never arrive, those whose answer doesn't, and those that
    /// arrive when nobody waits for them any more: so many each.
    pub(crate) lost: u32,
    /// How late what is late arrives, in milliseconds at most.
    pub(crate) late: u64,
}

impl Weather {
    pub(crate) const FINE: Self = Self {
        slow: 2,
        lost: 0,
        late: 50,
    };
}

/// Everything that a run has in common. Clones are the same world.
#[derive(Clone)]
pub(crate) struct World(Arc<Shared>);

struct Shared {
    begun: Instant,
    topology: Topology,
    dice: Mutex<StdRng>,
    trace: Mutex<Trace>,
    weather: Mutex<Weather>,
    points: Mutex<Points>,
    evidence: Mutex<Evidence>,
    over: AtomicBool,
}

/// The moments at which a process may crash: before and after each step that it takes outside of itself.
struct Points {
    passed: u64,
    crash_at: BTreeSet<u64>,
}

impl World {
    pub(crate) fn new(seed: u64, topology: Topology, crash_at: BTreeSet<u64>) -> Self {
        Self(Arc::new(Shared {
            begun: Instant::now(),
            evidence: Mutex::new(Evidence::new(&topology)),
            topology,
            dice: Mutex::new(StdRng::seed_from_u64(seed)),
            trace: Mutex::new(Trace::new(kept())),
            weather: Mutex::new(Weather::FINE),
            points: Mutex::new(Points {
                passed: 0,
                crash_at,
            }),
            over: AtomicBool::new(false),
        }))
    }

    pub(crate) fn topology(&self) -> &Topology {
        &self.0.topology
    }

    /// Milliseconds since the beginning.
    pub(crate) fn now(&self) -> u64 {
        u64::try_from(self.0.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(crate) fn roll<T: rand::distr::uniform::SampleUniform + PartialOrd>(
        &self,
        range: std::ops::RangeInclusive<T>,
    ) -> T {
        lock(&self.0.dice).random_range(range)
    }

    pub(crate) fn one_in(&self, n: u32) -> bool {
        self.roll(1..=n) == 1
    }

    pub(crate) fn seed_of_another(&self) -> u64 {
        lock(&self.0.dice).random()
    }

    pub(crate) fn weather(&self) -> Weather {
        *lock(&self.0.weather)
    }

    pub(crate) fn set_weather(&self, weather: Weather) {
        *lock(&self.0.weather) = weather;
    }

    /// One way through the network.
    pub(crate) async fn travel(&self) {
        let longest = self.weather().slow;
        // Most ways take no time: what matters is who is first.
        if longest > 0 && self.one_in(2) {
            let time = self.roll(0..=longest);
            pause(time).await;
        }
    }

    pub(crate) fn note(&self, who: u32, what: &'static str, subject: Subject, numbers: [i64; 2]) {
        lock(&self.0.trace).note(self.now(), who, what, subject, numbers);
    }

    pub(crate) fn trace(&self) -> MutexGuard<'_, Trace> {
        lock(&self.0.trace)
    }

    pub(crate) fn evidence(&self) -> MutexGuard<'_, Evidence> {
        lock(&self.0.evidence)
    }

    /// Whether the process is to crash here.
    fn pass_point(&self, process: &Process) -> bool {
        let mut points = lock(&self.0.points);
        points.passed += 1;
        let crash = points.crash_at.contains(&points.passed);
        let spins = points.passed > MAX_POINTS;
        drop(points);
        if spins {
            self.evidence()
                .anomaly("spinning", format!("{MAX_POINTS} steps, and no end"));
            // All processes end here, and with them the run.
            process.crash();
        }
        crash
    }

    pub(crate) fn points(&self) -> u64 {
        lock(&self.0.points).passed
    }

    pub(crate) fn is_spinning(&self) -> bool {
        self.points() > MAX_POINTS
    }

    /// No process crashes at a point any more.
    pub(crate) fn stop_crashes(&self) {
        lock(&self.0.points).crash_at.clear();
    }

    /// A task of the world's own, which outlives the processes.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        // What is dropped at the end of a run has nothing to do any more.
        if !self.0.over.load(Ordering::Relaxed) {
            tokio::spawn(task);
        }
    }

    pub(crate) fn end(&self) {
        self.0.over.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.0.over.load(Ordering::Relaxed)
    }
}

fn kept() -> usize {
    crate::number("SIM_TRACE").map_or(TRACE, |kept| kept.try_into().unwrap_or(usize::MAX))
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) async fn pause(milliseconds: u64) {
    if milliseconds > 0 {
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
    }
}
