//! The configuration of a topic: what its creator may say, and what holds.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::config::Config;

/// The keys that a creator of a topic gave, as they were given.
pub(crate) type Overrides = BTreeMap<String, String>;

const CLEANUP_POLICY: &str = "cleanup.policy";
const MAX_MESSAGE_BYTES: &str = "max.message.bytes";
const RETENTION_BYTES: &str = "retention.bytes";
const RETENTION_MS: &str = "retention.ms";
const SEGMENT_BYTES: &str = "segment.bytes";

/// The configuration keys of a topic that the broker knows; a topic with others is refused.
pub const TOPIC_CONFIGS: &[&str] = &KEYS;

const KEYS: [&str; 5] = [
    CLEANUP_POLICY,
    MAX_MESSAGE_BYTES,
    RETENTION_BYTES,
    RETENTION_MS,
    SEGMENT_BYTES,
];

/// Why a topic can't have this value of one of these keys.
pub fn check_topic_config(key: &str, value: &str) -> Result<(), String> {
    let overrides = Overrides::from([(key.to_owned(), value.to_owned())]);
    let settings = Settings::defaults(&Config::new(""));
    settings.with(&overrides).map(drop)
}

/// A batch must fit into a request, and a segment into its index.
const MAX_MESSAGE_LIMIT: i64 = 64 << 20;
const MAX_SEGMENT_LIMIT: i64 = i32::MAX as i64;

/// What holds for the partitions of a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Whether records are flushed before they are acknowledged.
    pub(crate) fsync: bool,
    /// Bytes of a segment file.
    pub(crate) segment_bytes: u64,
    /// Bytes kept of a partition.
    pub(crate) retention_bytes: Option<u64>,
    /// Milliseconds for which records are kept.
    pub(crate) retention_ms: Option<i64>,
    /// Bytes of the largest batch.
    pub(crate) max_message_bytes: usize,
}

impl Settings {
    /// What holds where a topic says nothing.
    pub(crate) fn defaults(config: &Config) -> Self {
        let millis = |keep: Duration| i64::try_from(keep.as_millis()).unwrap_or(i64::MAX);
        Self {
            fsync: config.fsync,
            segment_bytes: config.segment_bytes,
            retention_bytes: config.retention_bytes,
            retention_ms: config.retention.map(millis),
            max_message_bytes: config.max_message_bytes as usize,
        }
    }

    /// What holds with the keys of a topic; the error says which key is wrong and why.
    pub(crate) fn with(&self, overrides: &Overrides) -> Result<Self, String> {
        let mut settings = self.clone();
        for (key, value) in overrides {
            let limit = |min: i64, max: i64| match value.parse::<i64>() {
                Ok(number) if (min..=max).contains(&number) => Ok(number),
                _ => Err(format!(
                    "{key} = {value:?} is not a number from {min} to {max}"
                )),
            };
            match key.as_str() {
                RETENTION_MS => {
                    settings.retention_ms = Some(limit(-1, i64::MAX)?).filter(|&keep| keep >= 0)
                }
                RETENTION_BYTES => {
                    settings.retention_bytes = u64::try_from(limit(-1, i64::MAX)?).ok()
                }
                SEGMENT_BYTES => settings.segment_bytes = limit(1, MAX_SEGMENT_LIMIT)? as u64,
                MAX_MESSAGE_BYTES => {
                    settings.max_message_bytes = limit(0, MAX_MESSAGE_LIMIT)? as usize
                }
                CLEANUP_POLICY if value == "delete" => {}
                CLEANUP_POLICY => {
                    return Err(format!(
                        "cleanup.policy = {value:?}: the embedded broker does not compact; only \"delete\" is known"
                    ));
                }
                _ => {
                    return Err(format!(
                        "the embedded broker does not know {key}; it knows {}",
                        KEYS.join(", ")
                    ));
                }
            }
        }
        Ok(settings)
    }

    /// All keys with their values, as Kafka writes them.
    pub(crate) fn describe(&self) -> [(&'static str, String); KEYS.len()] {
        let or_unlimited = |limit: Option<i64>| limit.unwrap_or(-1).to_string();
        KEYS.map(|key| {
            let value = match key {
                RETENTION_MS => or_unlimited(self.retention_ms),
                RETENTION_BYTES => or_unlimited(
                    self.retention_bytes
                        .and_then(|keep| i64::try_from(keep).ok()),
                ),
                SEGMENT_BYTES => self.segment_bytes.to_string(),
                MAX_MESSAGE_BYTES => self.max_message_bytes.to_string(),
                _ => "delete".to_owned(),
            };
            (key, value)
        })
    }

    #[cfg(test)]
    pub(crate) fn for_tests() -> Self {
        Self {
            fsync: false,
            segment_bytes: 1000,
            retention_bytes: None,
            retention_ms: None,
            max_message_bytes: 1 << 20,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_overrides_what_it_names_and_nothing_else_is_taken() {
        let base = Settings::for_tests();
        for (key, value, expected) in [
            (
                "retention.ms",
                "1000",
                Ok(Settings {
                    retention_ms: Some(1000),
                    ..base.clone()
                }),
            ),
            ("retention.ms", "-1", Ok(base.clone())),
            (
                "retention.bytes",
                "5",
                Ok(Settings {
                    retention_bytes: Some(5),
                    ..base.clone()
                }),
            ),
            (
                "segment.bytes",
                "77",
                Ok(Settings {
                    segment_bytes: 77,
                    ..base.clone()
                }),
            ),
            ("cleanup.policy", "delete", Ok(base.clone())),
            (
                "segment.bytes",
                "0",
                Err("segment.bytes = \"0\" is not a number from 1 to 2147483647"),
            ),
            ("retention.ms", "week", Err("is not a number")),
            ("cleanup.policy", "compact", Err("does not compact")),
            ("cleanup.policy", "compact,delete", Err("does not compact")),
            (
                "min.insync.replicas",
                "2",
                Err("does not know min.insync.replicas; it knows cleanup.policy, max"),
            ),
        ] {
            let got = base.with(&Overrides::from([(key.to_owned(), value.to_owned())]));
            match (&got, expected) {
                (Ok(got), Ok(expected)) => assert_eq!(*got, expected, "{key}={value}"),
                (Err(got), Err(expected)) => {
                    assert!(got.contains(expected), "{key}={value}: {got}")
                }
                _ => panic!("{key}={value}: {got:?}"),
            }
        }
    }
}
