//! Whether librdkafka knows a property, asked before any client is made.

use rdkafka::config::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaConfRes;

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
}
