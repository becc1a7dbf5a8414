//! The lanes' real code in a simulated world, under thousands of random schedules of crashes, losses and moves.
//!
//! `SIM_SEED=x` runs one schedule and prints its trace; `SIM_SCHEDULES=n` or `SIM_MINUTES=n` run more of them, from
//! `SIM_FIRST=x` on. The same seed gives the same run. `world/` is what the lanes see, `schedule.rs` what happens to
//! them, `judge/` what must be so at the end, `bugs.rs` what it must find.

mod bugs;
mod cluster;
mod hosts;
mod judge;
mod run;
mod schedule;
mod scripted;
mod topology;
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bugs::Bug;
use run::{Report, run};
use world::lock;

/// Schedules that run where nobody asks for more.
const SCHEDULES: u64 = 3_000;
/// Threads that run them.
const THREADS: usize = 2;
/// Schedules within which a bug must be found.
const WITHIN: u64 = 600;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

fn fail(report: &Report) -> ! {
    let anomalies: Vec<_> = (report.anomalies.iter().take(12))
        .map(|anomaly| format!("{}: {}", anomaly.kind, anomaly.what))
        .collect();
    panic!(
        "{}\n\nSIM_SEED={}: {} anomalies after {} ms and {} steps:\n{}",
        report.tail.join("\n"),
        report.seed,
        report.anomalies.len(),
        report.lasted,
        report.points,
        anomalies.join("\n")
    );
}

#[test]
fn promises_hold_under_random_schedules() {
    if let Some(seed) = number("SIM_SEED") {
        let report = run(seed, None);
        println!("{}\n{:?}", report.tail.join("\n"), report.fingerprint);
        if !report.anomalies.is_empty() {
            fail(&report);
        }
        return;
    }
    let first = number("SIM_FIRST").unwrap_or(1);
    let minutes = number("SIM_MINUTES").map(|minutes| Duration::from_secs(60 * minutes));
    let schedules = number("SIM_SCHEDULES").unwrap_or(SCHEDULES);
    let began = Instant::now();
    let ran = AtomicU64::new(0);
    let worst = Mutex::new(None::<Report>);
    let work = || {
        loop {
            let number = ran.fetch_add(1, Ordering::Relaxed);
            let enough = minutes.map_or(number >= schedules, |time| began.elapsed() >= time);
            if enough || lock(&worst).is_some() {
                ran.fetch_sub(1, Ordering::Relaxed);
                return;
            }
            let report = run(first + number, None);
            if !report.anomalies.is_empty() {
                *lock(&worst) = Some(report);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(work);
        }
    });
    let ran = ran.into_inner();
    let a_minute = ran as f64 / began.elapsed().as_secs_f64() * 60.0;
    println!("{ran} schedules, {a_minute:.0} a minute");
    if let Some(report) = lock(&worst).take() {
        fail(&report);
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in 1..=40 {
        let (one, two) = (run(seed, None), run(seed, None));
        assert_eq!(one.tail, two.tail, "seed {seed}");
        assert_eq!(one.fingerprint, two.fingerprint, "seed {seed}");
    }
    let (one, two) = (run(1, None), run(2, None));
    assert_ne!(one.fingerprint, two.fingerprint);
}

/// Runs schedules with a bug until the judge finds it, where it finds nothing without.
fn find(bug: Bug) {
    for seed in 1..=WITHIN {
        let report = run(seed, Some(bug));
        let Some(anomaly) = report.anomalies.first() else {
            continue;
        };
        if run(seed, None).anomalies.is_empty() {
            let (kind, what) = (anomaly.kind, &anomaly.what);
            println!("{bug:?}: found in schedule {seed}: {kind}: {what}");
            return;
        }
    }
    panic!("{bug:?} was not found in {WITHIN} schedules");
}

macro_rules! find {
    ($($name:ident: $bug:ident,)*) => {
        $(
            #[test]
            fn $name() {
                find(Bug::$bug);
            }
        )*
    };
}

mod finds {
    use super::*;

    find! {
        an_offset_before_its_effects: OffsetBeforeEffects,
        outputs_before_their_commit: ProducesBeforeCommit,
        commits_without_an_epoch: NoEpochCheck,
        forgotten_seen: ForgetsSeen,
        outputs_that_are_not_awaited: NoAcknowledgements,
        gaps_of_a_producer: Gaps,
        forgotten_pending: ForgetsPending,
        trust_in_the_log: TrustsLog,
        lost_answers_taken_for_no: LostIsNotDone,
        lost_answers_taken_for_yes: LostIsDone,
        kept_effects_of_faults: KeepsFaultyEffects,
        forgotten_attempts: ForgetsAttempts,
        claims_that_do_not_wait: ClaimsWithoutWaiting,
        rows_that_are_not_locked: NoRowLock,
        commits_without_an_order: NoOrderOfCommits,
        partitions_that_change: PartitionsChange,
        lost_dead_letters: LosesLetters,
        values_without_versions: NoVersions,
        keys_without_order: NoOrder,
        ids_that_count_anywhere: TrustsIds,
        attempts_that_a_sick_store_costs: CountsSickness,
        sick_stores_that_are_only_pinged: PingsTheSick,
    }
}
