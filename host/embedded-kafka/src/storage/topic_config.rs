//! The configuration of a topic: what its creator may say, and what holds.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::config::Config;

/// The keys that a creator of a topic gave, as they were given.
pub(crate) type Overrides = BTreeMap<String, String>;

const CLEANUP_POLICY: &str = "cleanup.policy";
const DELETE_RETENTION_MS: &str = "delete.retention.ms";
const MAX_COMPACTION_LAG_MS: &str = "max.compaction.lag.ms";
const MAX_MESSAGE_BYTES: &str = "max.message.bytes";
const MESSAGE_TIMESTAMP_TYPE: &str = "message.timestamp.type";
const MIN_CLEANABLE_DIRTY_RATIO: &str = "min.cleanable.dirty.ratio";
const MIN_COMPACTION_LAG_MS: &str = "min.compaction.lag.ms";
const RETENTION_BYTES: &str = "retention.bytes";
const RETENTION_MS: &str = "retention.ms";
const SEGMENT_BYTES: &str = "segment.bytes";
const SEGMENT_MS: &str = "segment.ms";

const CREATE_TIME: &str = "CreateTime";
const COMPACT: &str = "compact";
const DELETE: &str = "delete";

/// The configuration keys of a topic that the broker knows; a topic with others is refused.
pub const TOPIC_CONFIGS: &[&str] = &KEYS;

const KEYS: [&str; 11] = [
    CLEANUP_POLICY,
    DELETE_RETENTION_MS,
    MAX_COMPACTION_LAG_MS,
    MAX_MESSAGE_BYTES,
    MESSAGE_TIMESTAMP_TYPE,
    MIN_CLEANABLE_DIRTY_RATIO,
    MIN_COMPACTION_LAG_MS,
    RETENTION_BYTES,
    RETENTION_MS,
    SEGMENT_BYTES,
    SEGMENT_MS,
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

/// Bytes of a value: it is kept as it was given, and a number may begin with any many zeros.
const MAX_VALUE_BYTES: usize = 256;

/// Kafka's defaults.
const DAY_MS: i64 = 24 * 60 * 60 * 1000;
const WEEK_MS: i64 = 7 * DAY_MS;
const HALF: f64 = 0.5;

/// What holds for the partitions of a topic.
#[derive(Clone, Debug, PartialEq)]
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
    /// Whether of each key the newest record stays.
    pub(crate) compacts: bool,
    /// Whether retention removes records.
    pub(crate) deletes: bool,
    /// Milliseconds for which compaction keeps a tombstone that it found.
    pub(crate) delete_retention_ms: i64,
    /// Part of the bytes that must be new before they are compacted.
    pub(crate) min_dirty_ratio: f64,
    /// Milliseconds for which a record is not compacted.
    pub(crate) min_compaction_lag_ms: i64,
    /// Milliseconds after which a record is compacted in any case.
    pub(crate) max_compaction_lag_ms: i64,
    /// Milliseconds after which a new segment begins.
    pub(crate) segment_ms: i64,
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
            ..Self::kafkas()
        }
    }

    /// Kafka's defaults of what no field of [`Config`] says.
    fn kafkas() -> Self {
        Self {
            fsync: true,
            segment_bytes: 0,
            retention_bytes: None,
            retention_ms: None,
            max_message_bytes: 0,
            compacts: false,
            deletes: true,
            delete_retention_ms: DAY_MS,
            min_dirty_ratio: HALF,
            min_compaction_lag_ms: 0,
            max_compaction_lag_ms: i64::MAX,
            segment_ms: WEEK_MS,
        }
    }

    /// What holds with the keys of a topic; the error says which key is wrong and why.
    pub(crate) fn with(&self, overrides: &Overrides) -> Result<Self, String> {
        let mut settings = self.clone();
        for (key, value) in overrides {
            if key.len().max(value.len()) > MAX_VALUE_BYTES {
                return Err(format!(
                    "a key or a value has more than {MAX_VALUE_BYTES} bytes"
                ));
            }
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
                CLEANUP_POLICY => settings.set_policy(value)?,
                DELETE_RETENTION_MS => settings.delete_retention_ms = limit(0, i64::MAX)?,
                MIN_COMPACTION_LAG_MS => settings.min_compaction_lag_ms = limit(0, i64::MAX)?,
                MAX_COMPACTION_LAG_MS => settings.max_compaction_lag_ms = limit(1, i64::MAX)?,
                SEGMENT_MS => settings.segment_ms = limit(1, i64::MAX)?,
                MIN_CLEANABLE_DIRTY_RATIO => settings.min_dirty_ratio = ratio(key, value)?,
                MESSAGE_TIMESTAMP_TYPE if value == CREATE_TIME => {}
                MESSAGE_TIMESTAMP_TYPE => {
                    return Err(format!(
                        "{key} = {value:?}: the embedded broker leaves timestamps as they are: only {CREATE_TIME:?} is known"
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

    /// Milliseconds after which a new segment begins: only what is closed can be compacted.
    pub(crate) fn max_segment_ms(&self) -> i64 {
        if self.compacts {
            self.segment_ms.min(self.max_compaction_lag_ms)
        } else {
            self.segment_ms
        }
    }

    fn set_policy(&mut self, value: &str) -> Result<(), String> {
        (self.compacts, self.deletes) = (false, false);
        for policy in value.split(',').map(str::trim) {
            match policy {
                COMPACT => self.compacts = true,
                DELETE => self.deletes = true,
                _ => {
                    return Err(format!(
                        "{CLEANUP_POLICY} = {value:?} is neither \"compact\" nor \"delete\" nor both"
                    ));
                }
            }
        }
        Ok(())
    }

    fn policy(&self) -> String {
        let compact = self.compacts.then_some(COMPACT);
        let delete = self.deletes.then_some(DELETE);
        let policies: Vec<_> = compact.into_iter().chain(delete).collect();
        policies.join(",")
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
                DELETE_RETENTION_MS => self.delete_retention_ms.to_string(),
                MIN_COMPACTION_LAG_MS => self.min_compaction_lag_ms.to_string(),
                MAX_COMPACTION_LAG_MS => self.max_compaction_lag_ms.to_string(),
                SEGMENT_MS => self.segment_ms.to_string(),
                MIN_CLEANABLE_DIRTY_RATIO => self.min_dirty_ratio.to_string(),
                MESSAGE_TIMESTAMP_TYPE => CREATE_TIME.to_owned(),
                _ => self.policy(),
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
            ..Self::kafkas()
        }
    }
}

/// Whether the value of a key is a list.
pub(crate) fn is_list(key: &str) -> bool {
    key == CLEANUP_POLICY
}

fn ratio(key: &str, value: &str) -> Result<f64, String> {
    match value.parse::<f64>() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
        _ => Err(format!("{key} = {value:?} is not a number from 0 to 1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_of_a_value_is_bounded() {
        let base = Settings::for_tests();
        for (zeros, is_taken) in [(200, true), (10_000, false)] {
            let value = "0".repeat(zeros) + "1";
            for (key, value) in [(RETENTION_MS, value.clone()), (&*value, "1".to_owned())] {
                let overrides = Overrides::from([(key.to_owned(), value)]);
                let with = base.with(&overrides);
                assert_eq!(with.is_ok(), is_taken && key == RETENTION_MS);
                let why = with.err().unwrap_or_default();
                assert!(why.len() < 1_000, "an answer is bounded too");
            }
        }
    }

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
            (
                "cleanup.policy",
                "compact",
                Ok(Settings {
                    compacts: true,
                    deletes: false,
                    ..base.clone()
                }),
            ),
            (
                "cleanup.policy",
                "delete, compact",
                Ok(Settings {
                    compacts: true,
                    ..base.clone()
                }),
            ),
            ("cleanup.policy", "", Err("is neither")),
            ("cleanup.policy", "shred", Err("is neither")),
            ("min.cleanable.dirty.ratio", "1.1", Err("from 0 to 1")),
            ("message.timestamp.type", "CreateTime", Ok(base.clone())),
            (
                "message.timestamp.type",
                "LogAppendTime",
                Err("leaves timestamps"),
            ),
            (
                "min.insync.replicas",
                "2",
                Err("does not know min.insync.replicas; it knows cleanup.policy, del"),
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
