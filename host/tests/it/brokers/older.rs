//! A log that goes back to an older copy of itself while a host runs: its leaders' epochs go back too, and librdkafka holds on to
//! those that it knows.

use std::time::Duration;

use super::cluster::Broker;
use super::{DELIVERIES, output, pipeline, stage};
use crate::support::{Host, Log, get, unique};

/// Each start of a broker raises the epochs.
const STARTS: usize = 2;
/// The host asks every five seconds who leads.
const KNOWN: Duration = Duration::from_secs(7);

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_went_back_to_an_older_copy_under_a_host_is_said_with_the_mend() {
    let mut broker = tokio::task::block_in_place(|| Broker::alone(None));
    let brokers = broker.address();
    let input = unique("in");
    let stages = DELIVERIES.map(|delivery| stage(&input, delivery)).concat();
    let pipeline = pipeline(&brokers, &input, &stages);
    let mut host = Host::start(&pipeline);
    let log = Log::new(&brokers);
    log.produce(&input, &[(None, "0"), (None, "1")]).await;
    let outputs = DELIVERIES.map(|delivery| output(&input, delivery));
    for output in &outputs {
        log.read_at_least(output, 2);
        log.wait_committed(output, &input);
    }

    broker.end();
    broker.save();
    for _ in 0..STARTS {
        broker.run();
        host.ready();
        tokio::time::sleep(KNOWN).await;
        broker.end();
    }
    broker.restore();
    broker.run();
    for delivery in DELIVERIES {
        let stage = format!("stage {delivery} on {input} 0: waits for the log to let it be read");
        let mend = "another client can read it, and this one may hold on to what was before: restart this host";
        host.wait_for(mend, || {
            let (status, said) = get(&host.address("admin"), "/readyz");
            let mut lines = said.lines();
            let is_said = lines.any(|line| line.contains(&stage) && line.contains(mend));
            (status == 503 && is_said).then_some(())
        });
    }
    // The mend.
    host.signal(libc::SIGTERM);
    host.wait_for_end();
    host = Host::spawn(host.folder(), &pipeline, &[]);
    log.produce(&input, &[(None, "2")]).await;
    for output in &outputs {
        let passed = log.read_at_least(output, 3).into_iter();
        let passed: Vec<_> = passed.filter_map(|seen| seen.value).collect();
        assert_eq!(passed, ["0", "1", "2"], "{output}");
    }
    host.ready();
}
