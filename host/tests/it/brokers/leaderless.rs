//! A broker that is gone for good, as far as the cluster knows: its partitions have no leader.

use super::Bench;
use super::cluster::Turn;

#[tokio::test(flavor = "multi_thread")]
async fn partitions_without_a_leader_hold_up_no_others_and_are_named() {
    let turn = Turn::take().await;
    let cluster = &turn.cluster;
    let (mut bench, mut counts) = Bench::on_both(cluster).await;

    cluster.leave();
    cluster.wait_leaderless(&bench.input, &[1, 3]);
    bench.pass([0, 2], &mut counts).await;
    bench.says(2, &["it has no leader"]);
    bench.pass([0, 2], &mut counts).await;

    // Nor where it is to be read from its beginning.
    bench.begin_again([0, 2], &mut counts).await;
    bench.pass([0, 2], &mut counts).await;
    bench.says(2, &["it has no leader"]);

    cluster.come_back();
    bench.goes_on(counts).await;
}
