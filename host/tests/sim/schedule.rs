//! What happens in a run, and when: all of it comes from one seed.

use std::collections::BTreeSet;
use std::sync::Arc;

use host::pipeline::{OnExhausted, OnGap, Order};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::topology::{Kind, Mix, Stage, Topology};
use crate::world::Weather;
use crate::world::sickness::Sickness;

/// How a partition moves to another host.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Move {
    /// The old owner gives it up first, within so many milliseconds.
    Asked(u64),
    /// The old owner learns of it so many milliseconds later.
    Late(u64),
    /// The old owner does not learn of it until the end.
    Never,
}

#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// A message for the first topic.
    Input {
        id: u32,
        key: Option<u32>,
    },
    Crash(usize),
    Freeze(usize, u64),
    Move(u64, Move),
    DatabaseAway(usize, u64),
    /// A copy of a database is made.
    Copy(usize),
    /// It goes back to one of them; whoever is connected is cut off, or not.
    Restore(usize, bool),
    LogAway(u64),
    StoreAway(u64),
    /// A database is there, and does not do what it is asked for; or does it again.
    DatabaseSick(usize, Option<Sickness>),
    StoreSick(Option<Sickness>),
    ProducerFails(usize, usize),
    Weather(Weather, u64),
    /// Retention removes this part of a partition, in per cent.
    Retention {
        topic: usize,
        partition: u64,
        part: i64,
    },
}

#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    pub(crate) seed: u64,
    pub(crate) topology: Topology,
    pub(crate) hosts: usize,
    pub(crate) slots: usize,
    /// A database takes one writer at a time.
    pub(crate) one_writer: bool,
    pub(crate) on_gap: OnGap,
    /// Milliseconds from the beginning, in order.
    pub(crate) events: Vec<(u64, Event)>,
    pub(crate) crash_at: BTreeSet<u64>,
    pub(crate) weather: Weather,
    /// Batches end by their time, and messages of theirs may be called more often.
    pub(crate) hasty: bool,
}

/// What may go wrong in one run.
#[derive(Default)]
struct Troubles {
    crashes: bool,
    crash_points: bool,
    freezes: bool,
    moves: bool,
    zombies: bool,
    databases: bool,
    log: bool,
    store: bool,
    sick_databases: bool,
    sick_store: bool,
    producers: bool,
    loss: bool,
    slow: bool,
    retention: bool,
    restores: bool,
}

impl Troubles {
    fn roll(rng: &mut StdRng) -> Self {
        let calm = rng.random_ratio(1, 20);
        let mut maybe = |numerator| !calm && rng.random_ratio(numerator, 12);
        Self {
            crashes: maybe(6),
            crash_points: maybe(8),
            freezes: maybe(3),
            moves: maybe(6),
            zombies: maybe(5),
            databases: maybe(4),
            log: maybe(4),
            store: maybe(3),
            sick_databases: maybe(4),
            sick_store: maybe(3),
            producers: maybe(3),
            loss: maybe(6),
            slow: maybe(3),
            retention: maybe(2),
            restores: maybe(2),
        }
    }
}

impl Schedule {
    pub(crate) fn of(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ 0x5eed);
        let troubles = Troubles::roll(&mut rng);
        Self::with(seed, &mut rng, &troubles)
    }

    /// One in which nothing goes wrong but messages.
    pub(crate) fn calm(seed: u64) -> Self {
        Self::with(seed, &mut StdRng::seed_from_u64(seed), &Troubles::default())
    }

    fn with(seed: u64, rng: &mut StdRng, troubles: &Troubles) -> Self {
        let hasty = rng.random_ratio(1, 6);
        let topology = topology(seed, rng, hasty);
        let hosts = rng.random_range(1..=3);
        let one_writer = hosts == 1 && rng.random_ratio(1, 2);
        let horizon = rng.random_range(2_000..=40_000);
        let mut events = inputs(rng, horizon);
        trouble(&mut events, rng, troubles, &topology, hosts, horizon);
        sicknesses(&mut events, rng, troubles, topology.databases, horizon);
        if troubles.restores {
            restores(&mut events, rng, topology.databases, horizon);
        }
        events.sort_by_key(|(at, _)| *at);
        let on_gap = match rng.random_ratio(1, 3) || troubles.restores {
            // Else, who goes on without what an emptied database had loses it, as was asked for.
            true => OnGap::Stop,
            false => OnGap::Continue,
        };
        let crash_at = match troubles.crash_points {
            true => (0..rng.random_range(1..=6))
                .map(|_| crash_point(rng))
                .collect(),
            false => BTreeSet::new(),
        };
        Self {
            seed,
            topology,
            hosts,
            slots: match one_writer {
                true => 1,
                false => rng.random_range(1..=4),
            },
            one_writer,
            on_gap,
            events,
            crash_at,
            weather: weather(rng, troubles),
            hasty,
        }
    }
}

/// Early ones are as likely as late ones: a run has some thousands.
fn crash_point(rng: &mut StdRng) -> u64 {
    let magnitude: f64 = rng.random_range(2.0..=8.5);
    magnitude.exp() as u64
}

fn weather(rng: &mut StdRng, troubles: &Troubles) -> Weather {
    Weather {
        slow: match troubles.slow {
            true => rng.random_range(10..=600),
            false => rng.random_range(0..=8),
        },
        lost: match troubles.loss {
            true => rng.random_range(1..=40),
            false => 0,
        },
        late: rng.random_range(10..=10_000),
    }
}

fn topology(seed: u64, rng: &mut StdRng, hasty: bool) -> Topology {
    let topic = |name: &str| -> Arc<str> { name.into() };
    let databases = rng.random_range(1..=2);
    let has_reader_of_letters = rng.random_ratio(1, 3);
    let mut stage = |name, kind, input: &str, output: Option<&str>| Stage {
        name,
        kind,
        input: topic(input),
        output: output.map(topic),
        letters: topic(&format!("{name}.dlq")),
        batches: rng.random_ratio(1, 3),
        order: [Order::Partition, Order::Key, Order::None][rng.random_range(0..3)],
        max_attempts: rng.random_range(1..=4),
        on_exhausted: match rng.random_ratio(1, 16) {
            true => OnExhausted::Stop,
            false => OnExhausted::DeadLetter,
        },
        max_messages: rng.random_range(1..=12),
        max_time: match hasty {
            true => rng.random_range(5..=100),
            false => 60_000,
        },
        mix: mix(rng, kind),
    };
    let last = databases - 1;
    let mut stages = vec![
        stage("a", Kind::Transactional(0), "in", Some("middle")),
        stage("b", Kind::Transactional(last), "middle", Some("out")),
        stage("c", Kind::Ordered, "middle", Some("side")),
    ];
    if has_reader_of_letters {
        stages.push(stage("d", Kind::Transactional(0), "a.dlq", None));
    }
    let mut names: Vec<Arc<str>> = vec![topic("in"), topic("middle"), topic("out"), topic("side")];
    names.extend(stages.iter().map(|stage| stage.letters.clone()));
    let topics = names
        .into_iter()
        .map(|name| (name, rng.random_range(1..=3)))
        .collect();
    Topology {
        seed,
        stages,
        topics,
        databases,
    }
}

/// Mostly fine messages, and few kinds of trouble at a time.
fn mix(rng: &mut StdRng, kind: Kind) -> Mix {
    let mut share = || match rng.random_ratio(1, 3) {
        true => rng.random_range(2..=15),
        false => 0,
    };
    let mut in_transactions = || match kind {
        Kind::Transactional(_) => share() / 2,
        Kind::Ordered => 0,
    };
    let (refused_commits, kills) = (in_transactions(), in_transactions());
    Mix {
        rejects: share(),
        traps: share(),
        retries: share(),
        failures: share(),
        refused_commits,
        kills,
        slow: share(),
        refused_outputs: share() / 2,
        needs_store: share(),
    }
}

fn inputs(rng: &mut StdRng, horizon: u64) -> Vec<(u64, Event)> {
    let count = rng.random_range(4..=28);
    let at_once = rng.random_ratio(1, 3);
    let keys = rng.random_range(1..=6);
    let mut times: Vec<u64> = (0..count)
        .map(|_| match at_once {
            true => 0,
            false => rng.random_range(0..=horizon),
        })
        .collect();
    times.sort_unstable();
    let mut key = || rng.random_ratio(4, 5).then(|| rng.random_range(0..keys));
    (1..)
        .zip(times)
        .map(|(id, at)| (at, Event::Input { id, key: key() }))
        .collect()
}

/// Stores that are sick for a while. Some are so for longer than one is believed that says that it would do what it refuses.
fn sicknesses(
    events: &mut Vec<(u64, Event)>,
    rng: &mut StdRng,
    troubles: &Troubles,
    databases: usize,
    horizon: u64,
) {
    let mut some = |make: &dyn Fn(usize, Option<Sickness>) -> Event| {
        for _ in 0..rng.random_range(1..=2) {
            let number = rng.random_range(0..databases);
            let sickness = match rng.random_ratio(1, 2) {
                true => Sickness::TakesNoWrites,
                false => Sickness::Refuses,
            };
            let begins = rng.random_range(0..=horizon);
            let lasts = match rng.random_ratio(1, 3) {
                true => rng.random_range(1..=60_000),
                false => rng.random_range(1..=4_000),
            };
            events.push((begins, make(number, Some(sickness))));
            events.push((begins + lasts, make(number, None)));
        }
    };
    if troubles.sick_databases {
        some(&Event::DatabaseSick);
    }
    if troubles.sick_store {
        some(&|_, sickness| Event::StoreSick(sickness));
    }
}

/// Databases that go back.
fn restores(events: &mut Vec<(u64, Event)>, rng: &mut StdRng, databases: usize, horizon: u64) {
    for _ in 0..rng.random_range(1..=3) {
        let number = rng.random_range(0..databases);
        let copied = rng.random_range(horizon / 8..=horizon);
        let restored = copied + rng.random_range(2_000..=2_000 + horizon);
        events.push((copied, Event::Copy(number)));
        events.push((restored, Event::Restore(number, rng.random_ratio(1, 2))));
    }
}

fn trouble(
    events: &mut Vec<(u64, Event)>,
    rng: &mut StdRng,
    troubles: &Troubles,
    topology: &Topology,
    hosts: usize,
    horizon: u64,
) {
    let lasting = |rng: &mut StdRng| match rng.random_ratio(1, 4) {
        true => rng.random_range(1..=20_000),
        false => rng.random_range(1..=2_000),
    };
    let mut some = |on: bool, most: u32, make: &mut dyn FnMut(&mut StdRng) -> Event| {
        let count = if on { rng.random_range(1..=most) } else { 0 };
        for _ in 0..count {
            let at = rng.random_range(0..=horizon);
            events.push((at, make(rng)));
        }
    };
    let stages = topology.stages.len();
    some(troubles.crashes, 4, &mut |rng| {
        Event::Crash(rng.random_range(0..hosts))
    });
    some(troubles.freezes, 3, &mut |rng| {
        Event::Freeze(rng.random_range(0..hosts), lasting(rng))
    });
    some(troubles.moves, 6, &mut |rng| {
        let budget = lasting(rng);
        Event::Move(rng.random(), Move::Asked(budget))
    });
    some(troubles.zombies, 5, &mut |rng| {
        let how = match rng.random_ratio(1, 3) {
            true => Move::Never,
            false => Move::Late(lasting(rng)),
        };
        Event::Move(rng.random(), how)
    });
    some(troubles.databases, 3, &mut |rng| {
        Event::DatabaseAway(rng.random_range(0..topology.databases), lasting(rng))
    });
    some(troubles.log, 3, &mut |rng| Event::LogAway(lasting(rng)));
    some(troubles.store, 2, &mut |rng| Event::StoreAway(lasting(rng)));
    some(troubles.producers, 4, &mut |rng| {
        Event::ProducerFails(rng.random_range(0..hosts), rng.random_range(0..stages))
    });
    some(troubles.loss, 2, &mut |rng| {
        let weather = Weather {
            slow: rng.random_range(0..=20),
            lost: rng.random_range(50..=250),
            late: rng.random_range(10..=10_000),
        };
        Event::Weather(weather, rng.random_range(1..=1_000))
    });
    some(troubles.retention, 2, &mut |rng| Event::Retention {
        topic: rng.random_range(0..2),
        partition: rng.random(),
        part: rng.random_range(10..=100),
    });
}
