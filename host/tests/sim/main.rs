//! The lanes' real code in a simulated world, under thousands of random schedules of crashes, losses and moves.
//!
//! `SIM_SEED=x` runs one schedule and prints the end of its trace; `SIM_SCHEDULES=n` and `SIM_MINUTES=n` run more of
//! them. The same seed gives the same run.

mod bugs;
mod cluster;
mod hosts;
mod judge;
mod run;
mod schedule;
mod topology;
mod world;

use std::time::{Duration, Instant};

use bugs::Bug;
use run::{Report, run};

/// Schedules that run where nobody asks for more.
const SCHEDULES: u64 = 2_000;
/// Schedules within which a bug must be found.
const WITHIN: u64 = 400;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

fn failed(report: &Report) -> ! {
    let tail = report.tail.join("\n");
    let anomalies: Vec<_> = (report.anomalies.iter().take(12))
        .map(|anomaly| format!("{}: {}", anomaly.kind, anomaly.what))
        .collect();
    panic!(
        "{tail}\n\nSIM_SEED={}: {} anomalies after {} ms, {} points:\n{}",
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
        println!("{}", report.tail.join("\n"));
        if !report.anomalies.is_empty() {
            failed(&report);
        }
        return;
    }
    let minutes = number("SIM_MINUTES").map(|minutes| Duration::from_secs(60 * minutes));
    let schedules = number("SIM_SCHEDULES").unwrap_or(SCHEDULES);
    let first = number("SIM_FIRST").unwrap_or(1);
    let began = Instant::now();
    let mut ran = 0;
    let mut bad = Vec::new();
    for seed in first.. {
        let enough = match minutes {
            Some(time) => began.elapsed() >= time,
            None => ran >= schedules,
        };
        if enough {
            break;
        }
        let report = run(seed, None);
        ran += 1;
        if !report.anomalies.is_empty() {
            bad.push(report);
            if bad.len() > 20 {
                break;
            }
        }
    }
    let a_minute = ran as f64 / began.elapsed().as_secs_f64() * 60.0;
    println!("{ran} schedules, {a_minute:.0} a minute");
    for report in &bad {
        println!(
            "seed {}: {:?}",
            report.seed,
            report.anomalies.iter().take(3).collect::<Vec<_>>()
        );
    }
    if let Some(report) = bad.first() {
        failed(report);
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in 1..=20 {
        let (one, two) = (run(seed, None), run(seed, None));
        assert_eq!(one.tail, two.tail, "seed {seed}");
        assert_eq!(one.fingerprint, two.fingerprint, "seed {seed}");
    }
}

/// Runs schedules with a bug until the judge finds it, where it finds nothing without.
fn finds(bug: Bug) {
    for seed in 1..=WITHIN {
        let report = run(seed, Some(bug));
        let Some(anomaly) = report.anomalies.first() else {
            continue;
        };
        if run(seed, None).anomalies.is_empty() {
            println!(
                "{bug:?}: found in schedule {seed}: {}: {}",
                anomaly.kind, anomaly.what
            );
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
                finds(Bug::$bug);
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
        partitions_that_change: PartitionsChange,
        lost_dead_letters: LosesLetters,
        values_without_versions: NoVersions,
    }
}
