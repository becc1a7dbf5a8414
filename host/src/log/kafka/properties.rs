//! Whether librdkafka takes the properties, asked before any client connects.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::client::Client;
use rdkafka::config::ClientConfig;
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::types::{RDKafkaConfRes, RDKafkaType};

use super::consumer::GroupConsumer;
use super::producer::{self, Patience};
use super::{ClientSettings, QuietContext};

/// As long as the most hurried producer of a host waits: properties may contradict it.
const SHORTEST_PATIENCE: Duration = Duration::from_secs(10);

/// What is wrong with a property.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PropertyFault {
    /// There is no such property, or not in the build that this host has.
    Unknown,
    /// It can't have this value.
    Value,
}

/// Tries a property. The answer leaves out librdkafka's words, since they repeat the value.
pub(crate) fn check(name: &str, value: &str) -> Result<(), PropertyFault> {
    match ClientConfig::new().set(name, value).create_native_config() {
        Ok(_) => Ok(()),
        Err(KafkaError::ClientConfig(RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN, ..)) => {
            Err(PropertyFault::Unknown)
        }
        Err(_) => Err(PropertyFault::Value),
    }
}

/// Properties that are fine each by itself, and not together.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Conflict {
    /// The property without which the others would do, if there is one.
    pub(crate) property: Option<String>,
    /// Librdkafka's words. They may hold values.
    pub(crate) why: String,
}

/// Tries the properties with each other and with what the host sets, on clients that know no broker.
pub(crate) fn check_together(properties: &BTreeMap<String, String>) -> Result<(), Conflict> {
    let Err(error) = create_clients(properties.clone()) else {
        return Ok(());
    };
    let why = match error {
        KafkaError::ClientCreation(why) | KafkaError::ClientConfig(_, why, ..) => why,
        other => other.to_string(),
    };
    let do_without = |name: &&String| {
        let mut others = properties.clone();
        others.remove(*name);
        create_clients(others).is_ok()
    };
    // A file that is missing is no fault of "security.protocol", without which nobody would read it.
    let (named, others): (Vec<_>, Vec<_>) = properties
        .keys()
        .partition(|name| why.contains(name.as_str()));
    let property = named.into_iter().chain(others).find(do_without).cloned();
    Err(Conflict { property, why })
}

fn create_clients(properties: BTreeMap<String, String>) -> KafkaResult<()> {
    let settings = ClientSettings {
        brokers: String::new(),
        properties,
    };
    let patiences = [Patience::Gapless, Patience::Bounded(SHORTEST_PATIENCE)];
    for patience in patiences {
        let config = producer::config(&settings, patience);
        create(&config, RDKafkaType::RD_KAFKA_PRODUCER)?;
    }
    let config = GroupConsumer::config(&settings, "check");
    create(&config, RDKafkaType::RD_KAFKA_CONSUMER)
}

fn create(config: &ClientConfig, kind: RDKafkaType) -> KafkaResult<()> {
    let native = config.create_native_config()?;
    Client::new(config, native, kind, QuietContext).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_properties_of_librdkafka() {
        assert_eq!(check("linger.ms", "5"), Ok(()));
        assert_eq!(check("compression.type", "zstd"), Ok(()));
        assert_eq!(check("sasl.mechanism", "SCRAM-SHA-512"), Ok(()));
        assert_eq!(check("compression.type", "lz5"), Err(PropertyFault::Value));
        assert_eq!(check("linger.ms", "soon"), Err(PropertyFault::Value));
        assert_eq!(check("lingre.ms", "5"), Err(PropertyFault::Unknown));
        assert_eq!(check("na\0me", "va\0lue"), Err(PropertyFault::Value));
    }

    fn together(properties: &[(&str, &str)]) -> Result<(), Conflict> {
        let pair = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        check_together(&properties.iter().map(pair).collect())
    }

    #[test]
    fn tells_properties_that_do_together() {
        let good: &[&[(&str, &str)]] = &[
            &[],
            &[("linger.ms", "50"), ("max.in.flight", "1")],
            &[("queue.buffering.max.ms", "50")],
            &[
                ("session.timeout.ms", "6000"),
                ("fetch.max.bytes", "4000000"),
            ],
            &[
                ("security.protocol", "sasl_ssl"),
                ("sasl.mechanism", "SCRAM-SHA-512"),
                ("sasl.username", "me"),
                ("sasl.password", "hunter2"),
            ],
        ];
        for properties in good {
            assert_eq!(together(properties), Ok(()), "{properties:?}");
        }
    }

    #[test]
    fn names_the_property_that_does_not_fit() {
        let bad = [
            ("max.in.flight.requests.per.connection", "6"),
            ("max.in.flight", "6"),
            ("linger.ms", "20000"),
            ("queuing.strategy", "lifo"),
            ("session.timeout.ms", "3000000"),
            ("reconnect.backoff.ms", "20000"),
            ("ssl.ca.location", "/no/such/file"),
        ];
        for (name, value) in bad {
            let protocol = ("security.protocol", "ssl");
            let conflict = together(&[protocol, (name, value)]).unwrap_err();
            assert_eq!(conflict.property.as_deref(), Some(name), "{}", conflict.why);
        }
    }
}
