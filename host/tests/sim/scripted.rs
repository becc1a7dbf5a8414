//! Runs that are written down, for what random ones do not do.

use crate::run::{Run, simulate};
use crate::schedule::Schedule;
use crate::topology::Kind;
use crate::world::lock;
use crate::world::pause;

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
