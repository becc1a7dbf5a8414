//! Runs that are written down, for what random ones do not do.

use std::sync::Arc;

use host::delivery::output;
use host::delivery::progress::LaneId;
use host::record::Outgoing;

use crate::bugs::Bug;
use crate::hosts::FOREIGN;
use crate::run::{Run, simulate};
use crate::schedule::Schedule;
use crate::topology::Kind;
use crate::world::database::Database;
use crate::world::lock;
use crate::world::pause;

/// Virtual milliseconds in which a lane has begun, and ended up where it can't go on.
const SETTLED: u64 = 60_000;

/// The lane of the first stage, which is transactional, on its first partition; and its database.
fn first_lane(run: &Run) -> (LaneId, Arc<Database>) {
    let stage = &run.schedule.topology.stages[0];
    let Kind::Transactional(database) = stage.kind else {
        panic!("the first stage is transactional");
    };
    (stage.lane(0), run.servers.databases[database].clone())
}

fn reasons(run: &Run) -> Vec<String> {
    let hosts = run.cluster.hosts();
    let reasons = hosts.iter().flat_map(|host| host.readiness.reasons());
    reasons.collect()
}

/// What somebody else wrote into a row, or what a stage was granted once, goes nowhere and is not lost.
#[test]
fn a_lane_holds_outputs_that_it_is_not_granted() {
    for seed in 1..=20 {
        let sent = simulate(hold(seed, None));
        assert_eq!(sent, 0, "seed {seed}");
    }
    let sent = simulate(hold(1, Some(Bug::GrantsAll)));
    assert!(sent > 0, "a lane that may send anything was not noticed");
}

/// How many records came into the topic that is not granted.
async fn hold(seed: u64, bug: Option<Bug>) -> i64 {
    let run = Run::begin(Schedule::calm(seed), bug).await;
    run.play().await;
    let (lane, database) = first_lane(&run);
    run.heal().await;
    for host in run.cluster.hosts() {
        host.crash();
    }
    let output = Outgoing {
        topic: FOREIGN.into(),
        partition: Some(0),
        timestamp: None,
        key: None,
        value: Some(b"x".to_vec()),
        headers: Vec::new(),
    };
    let pending = output::encode(&[output]).expect("encoded");
    database.tamper(&lane, |row| row.checkpoint.pending = pending.clone());
    let before = run.servers.broker.range(FOREIGN, 0).1;
    run.cluster.tend(true).await;
    pause(SETTLED).await;
    if bug.is_none() {
        let said = reasons(&run);
        let names = |reason: &&String| reason.contains(FOREIGN);
        assert_eq!(
            said.iter().filter(names).count(),
            1,
            "seed {seed}: {said:?}"
        );
        let row = database.lane(&lane).expect("a row");
        assert_eq!(row.checkpoint.pending, pending, "seed {seed}: it is kept");
    }
    let sent = run.servers.broker.range(FOREIGN, 0).1 - before;
    run.servers.world.end();
    sent
}

/// Somebody takes a lane's row over and over: the lane says so, and does not spin.
#[test]
fn a_lane_that_cannot_keep_its_row_says_so() {
    for seed in 1..=20 {
        simulate(steal(seed));
    }
}

async fn steal(seed: u64) {
    let run = Run::begin(Schedule::calm(seed), None).await;
    let (lane, database) = first_lane(&run);
    let thief = database.clone();
    let stolen = lane.clone();
    let thieving = tokio::spawn(async move {
        loop {
            pause(1).await;
            thief.tamper(&stolen, |row| row.epoch += 1_000);
        }
    });
    run.play().await;
    pause(SETTLED * 10).await;
    let epoch = database.lane(&lane).map_or(0, |row| row.epoch % 1_000);
    if reasons(&run).is_empty() {
        // Nothing of this lane was to be committed.
        assert!(epoch <= 2, "seed {seed}: claimed {epoch} times in silence");
    }
    assert!(
        epoch < 150,
        "seed {seed}: claimed {epoch} times in ten minutes"
    );
    thieving.abort();
    // It gets its row back, and does its work.
    run.heal().await;
    pause(SETTLED).await;
    assert_eq!(reasons(&run), Vec::<String>::new(), "seed {seed}");
    run.servers.world.end();
}

/// A topic that was deleted and made anew has other records at the offsets that its lanes know.
#[test]
fn a_lane_stops_where_its_topic_was_made_anew() {
    for seed in 1..=50 {
        simulate(recreate(seed));
    }
}

async fn recreate(seed: u64) {
    let run = Run::begin(Schedule::calm(seed), None).await;
    run.play().await;
    run.heal().await;
    let topology = run.schedule.topology.clone();
    let Kind::Transactional(database) = topology.stages[0].kind else {
        panic!("the first stage is transactional");
    };
    let input = &topology.stages[0].input;
    let began: Vec<i32> = (0..i32::try_from(topology.partitions(input)).expect("a few"))
        .filter(|partition| {
            let row = run.servers.databases[database].lane(&topology.stages[0].lane(*partition));
            row.is_some_and(|row| row.checkpoint.next_offset.is_some_and(|next| next > 0))
        })
        .collect();
    run.servers.broker.recreate(input);
    for host in run.cluster.hosts() {
        host.crash();
    }
    run.cluster.tend(true).await;
    pause(60_000).await;
    let halted = run.cluster.halted();
    for partition in began {
        assert!(
            halted.contains(&(0, partition)),
            "seed {seed}: {halted:?}, and not {input} {partition}"
        );
    }
    // A lane that has stopped is given up like any other.
    for host in run.cluster.hosts() {
        let seats: Vec<_> = lock(&host.lanes).keys().copied().collect();
        for seat in seats {
            let before = run.servers.world.now();
            host.end_lane(seat, 5_000).await;
            assert!(
                run.servers.world.now() - before < 5_000,
                "seed {seed}: {seat:?}"
            );
        }
        assert_eq!(host.readiness.reasons(), Vec::<String>::new());
    }
    run.servers.world.end();
}
