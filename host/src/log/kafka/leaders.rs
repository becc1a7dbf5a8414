//! Whether the leaders of partitions are there, as librdkafka's statistics tell: its fetches wait without a word.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::Statistics;
use rdkafka::statistics::Broker;

use super::partition::Partition;

/// A broker that has answered nothing for so long, and the time that a fetch may wait for records on top, hangs.
const SILENT: Duration = Duration::from_secs(2);
/// Of how many brokers it is remembered why connections to them failed.
const MAX_FAILURES: usize = 1_000;
/// What librdkafka calls a connection that failed, and an error that it hands on.
const FAILED: [&str; 2] = ["FAIL", "ERROR"];

/// What is known of brokers.
pub(super) struct Leaders {
    /// Why connections failed last, by what librdkafka calls their brokers.
    failures: BTreeMap<String, String>,
    /// How long one may be silent that was asked.
    silent: Duration,
}

impl Leaders {
    /// A fetch may wait for records for so long.
    pub(super) fn new(fetch_wait: Duration) -> Self {
        Self {
            failures: BTreeMap::new(),
            silent: SILENT + fetch_wait,
        }
    }

    /// What librdkafka logs.
    pub(super) fn hear(&mut self, facility: &str, message: &str) {
        if FAILED.contains(&facility)
            && let Some((broker, why)) = failure(message)
            && (self.failures.len() < MAX_FAILURES || self.failures.contains_key(broker))
        {
            self.failures.insert(broker.to_owned(), why.to_owned());
        }
    }

    /// Why a partition that waits for records gets none of its leader, and for how long it has been so at least.
    pub(super) fn trouble(
        &self,
        statistics: &Statistics,
        partition: &Partition,
    ) -> Option<(Duration, String)> {
        if !partition.is_drained() {
            return None;
        }
        let topic = statistics.topics.get(&**partition.topic())?;
        let figures = topic.partitions.get(&partition.number())?;
        if figures.leader < 0 {
            let why = "it has no leader: none of its replicas is there".to_owned();
            return Some((Duration::ZERO, why));
        }
        // The group's coordinator is there a second time, as a logical broker.
        let with_id = |id: i32| {
            let mut brokers = statistics.brokers.values();
            brokers.find(|broker| broker.nodeid == id && broker.source != "logical")
        };
        // With `client.rack`, a follower may be read.
        let fetched_from = figures.broker;
        if fetched_from >= 0 && fetched_from != figures.leader {
            return self.trouble_of("its nearest replica", with_id(fetched_from)?);
        }
        self.trouble_of("its leader", with_id(figures.leader)?)
    }

    fn trouble_of(&self, role: &str, broker: &Broker) -> Option<(Duration, String)> {
        let Broker {
            nodeid, nodename, ..
        } = broker;
        if matches!(broker.state.as_str(), "UP" | "UPDATE") {
            // Neither has it answered for so long, nor was it asked a moment ago.
            let silent = broker.rxidle.min(broker.txidle);
            let silent = Duration::from_micros(u64::try_from(silent).unwrap_or_default());
            let hangs = broker.waitresp_cnt > 0 && silent >= self.silent;
            let why = format!("{role}, broker {nodeid} at {nodename}, does not answer");
            return hangs.then_some((silent, why));
        }
        let why = self.failures.get(&broker.name);
        let why = why.map_or_else(String::new, |why| format!(": {why}"));
        let why = format!("{role}, broker {nodeid} at {nodename}, can't be reached{why}");
        Some((Duration::ZERO, why))
    }
}

/// `[thrd:HOST:PORT/ID]: HOST:PORT/ID: why (after 0ms in state CONNECT, …)`, without figures that change.
fn failure(message: &str) -> Option<(&str, &str)> {
    let (_, said) = message.split_once("]: ")?;
    let (broker, why) = said.split_once(": ")?;
    let is_broker = broker
        .rsplit_once('/')
        .is_some_and(|(_, id)| id.parse::<i32>().is_ok());
    let why = why.split_once(" (after ").map_or(why, |(why, _)| why);
    is_broker.then_some((broker, why))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broker(state: &str, waiting: i64, silent_micros: i64) -> Broker {
        Broker {
            name: "10.0.0.2:9092/2".into(),
            nodeid: 2,
            nodename: "10.0.0.2:9092".into(),
            source: "learned".into(),
            state: state.into(),
            waitresp_cnt: waiting,
            rxidle: silent_micros,
            txidle: silent_micros,
            ..Broker::default()
        }
    }

    #[test]
    fn a_broker_that_hangs_or_refuses_is_told_from_one_that_is_not_asked() {
        let mut leaders = Leaders::new(Duration::from_millis(50));
        let refused = "[thrd:10.0.0.2:9092/2]: 10.0.0.2:9092/2: Connect to ipv4#10.0.0.2:9092 failed: Connection refused \
                       (after 0ms in state CONNECT, 5 identical error(s) suppressed)";
        leaders.hear("FAIL", refused);
        let said = |broker| {
            leaders
                .trouble_of("its leader", &broker)
                .map(|(_, why)| why)
        };
        assert_eq!(said(broker("UP", 0, 60_000_000)), None);
        assert_eq!(said(broker("UP", 1, 40_000)), None);
        let hangs = "its leader, broker 2 at 10.0.0.2:9092, does not answer";
        assert_eq!(said(broker("UP", 1, 3_000_000)).as_deref(), Some(hangs));
        let away = "its leader, broker 2 at 10.0.0.2:9092, can't be reached: Connect to ipv4#10.0.0.2:9092 failed: \
                    Connection refused";
        assert_eq!(said(broker("CONNECT", 0, -1)).as_deref(), Some(away));
    }

    #[test]
    fn only_what_is_said_of_a_broker_is_remembered() {
        for message in [
            "[thrd:main]: 1/1 brokers are down",
            "[thrd:app]: GroupCoordinator: refused",
            "nothing",
        ] {
            assert_eq!(failure(message), None, "{message}");
        }
    }
}
