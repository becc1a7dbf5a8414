//! A broker that is gone for good, as far as the cluster knows: its partitions have no leader.

use super::cluster::Turn;
use super::{Bench, Counts};
use crate::support::Host;

#[tokio::test(flavor = "multi_thread")]
async fn partitions_without_a_leader_hold_up_no_others_and_are_named() {
    let turn = Turn::take().await;
    let cluster = &turn.cluster;
    let mut bench = Bench::start(cluster, &[&[1], &[2], &[1], &[2]], &[&[1]], &[]).await;
    let mut counts = Counts::new();
    for partition in 0..4 {
        bench.send(partition, 0..3).await;
        counts.insert(partition, 3);
    }
    bench.arrived(&counts);

    cluster.leave();
    cluster.wait_leaderless(&bench.input, &[1, 3]);
    bench.pass([0, 2], &mut counts).await;
    bench.says(2, &["it has no leader"]);
    bench.pass([0, 2], &mut counts).await;

    // Nor where it is to be read from its beginning.
    bench.host.signal(libc::SIGTERM);
    bench.host.wait_for_end();
    bench.host = Host::spawn(bench.host.folder(), &bench.pipeline, &[]);
    for partition in [0, 2] {
        let count = counts[&partition];
        bench.send(partition, count..count + 1).await;
        counts.insert(partition, count + 1);
    }
    let there = [0, 2].map(|partition| (partition, counts[&partition]));
    bench.arrived(&there.into());
    bench.pass([0, 2], &mut counts).await;
    bench.says(2, &["it has no leader"]);

    cluster.come_back();
    for partition in [1, 3] {
        bench.send(partition, 3..6).await;
        counts.insert(partition, 6);
    }
    bench.arrived(&counts);
    bench.host.ready();
    bench.has_no_dead_letters();
}
