//! What librdkafka tells of its brokers and topics from time to time.

use std::collections::HashMap;
use std::fmt;

use rdkafka::statistics::{Broker, Topic};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, IgnoredAny, MapAccess, Visitor};
use tracing::debug;

/// What librdkafka calls the source of brokers that stand for others.
const LOGICAL: &str = "logical";
/// And of those that are written in the pipeline.
const CONFIGURED: &str = "configured";
/// The states of brokers that are connected.
const CONNECTED: [&str; 2] = ["UP", "UPDATE"];

/// As far as the host reads them.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Statistics {
    /// librdkafka's clock, in microseconds.
    pub(super) ts: i64,
    #[serde(default)]
    pub(super) brokers: Brokers,
    #[serde(default)]
    pub(super) topics: HashMap<String, Topic>,
}

/// Of a client that has no use for the rest.
#[derive(Deserialize)]
pub(super) struct OfBrokers {
    #[serde(default)]
    pub(super) brokers: Brokers,
}

/// The brokers that a client knows, each once.
///
/// librdkafka drops a broker that metadata do not list any more, and keeps it among the others for as long as something of it is
/// in use. One that is listed again is then there a second time under the same name, before the old one.
#[derive(Debug, Default)]
pub(super) struct Brokers(Vec<Broker>);

impl Brokers {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Broker> {
        self.0.iter()
    }

    pub(super) fn with_id(&self, id: i32) -> Option<&Broker> {
        self.iter().find(|broker| broker.nodeid == id)
    }

    /// Whether the client is connected to none, and has none left to begin with.
    pub(super) fn are_forgotten(&self) -> bool {
        !self
            .iter()
            .any(|broker| broker.source == CONFIGURED || is_connected(broker))
    }
}

impl FromIterator<Broker> for Brokers {
    /// In librdkafka's order. The group's coordinator is there a second time, as a logical broker: that one is left out.
    fn from_iter<I: IntoIterator<Item = Broker>>(listed: I) -> Self {
        let mut brokers: Vec<Broker> = Vec::new();
        for broker in listed {
            let is_known = brokers.iter().any(|known| known.name == broker.name);
            if broker.source != LOGICAL && !is_known {
                brokers.push(broker);
            }
        }
        Self(brokers)
    }
}

impl<'de> Deserialize<'de> for Brokers {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct ByName;

        impl<'de> Visitor<'de> for ByName {
            type Value = Brokers;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("brokers by their names")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Brokers, M::Error> {
                let next = || map.next_entry::<IgnoredAny, Broker>().transpose();
                let listed = std::iter::from_fn(next).map(|entry| entry.map(|(_, broker)| broker));
                listed.collect()
            }
        }

        from.deserialize_map(ByName)
    }
}

/// What librdkafka has written; says in the log where that can't be read.
pub(super) fn read<T: DeserializeOwned>(statistics: &[u8]) -> Option<T> {
    let read = serde_json::from_slice(statistics);
    read.inspect_err(|error| debug!("librdkafka's statistics can't be read: {error}"))
        .ok()
}

pub(super) fn is_connected(broker: &Broker) -> bool {
    CONNECTED.contains(&broker.state.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(brokers: &[(&str, &str, &str)]) -> Brokers {
        let listed = brokers.iter().map(|(name, source, state)| Broker {
            name: (*name).into(),
            source: (*source).into(),
            state: (*state).into(),
            ..Broker::default()
        });
        let listed = listed.map(|broker| {
            let told = serde_json::to_string(&broker).expect("JSON");
            format!("\"{}\":{told}", broker.name)
        });
        let told = format!("{{{}}}", listed.collect::<Vec<_>>().join(","));
        serde_json::from_str(&told).expect("brokers")
    }

    #[test]
    fn of_two_brokers_of_one_name_the_new_one_counts() {
        let brokers = told(&[
            ("GroupCoordinator", "logical", "DOWN"),
            ("a:9092/1", "learned", "UP"),
            ("a:9092/1", "learned", "DOWN"),
        ]);
        let known = brokers.iter().map(|b| (b.name.as_str(), b.state.as_str()));
        assert_eq!(known.collect::<Vec<_>>(), [("a:9092/1", "UP")]);
    }

    #[test]
    fn a_client_that_knows_of_nobody_to_connect_to_has_forgotten_all() {
        let bootstrap = ("a:9092/bootstrap", "configured", "TRY_CONNECT");
        let group = ("GroupCoordinator", "logical", "UP");
        for (brokers, forgotten) in [
            (vec![bootstrap], false),
            (vec![("a:9092/1", "learned", "UP"), group], false),
            (vec![("a:9092/1", "learned", "DOWN"), bootstrap], false),
            (vec![("a:9092/1", "learned", "DOWN"), group], true),
            (vec![group], true),
            (vec![], true),
        ] {
            assert_eq!(told(&brokers).are_forgotten(), forgotten, "{brokers:?}");
        }
    }
}
