//! The one real client: Kafka, or what speaks its protocol, through rdkafka.
//!
//! librdkafka is not believed for ever: its statistics tell when it has forgotten all brokers (`bootstrap`), and where a partition
//! is not read for long, another client is asked whether it can (`access`). That is said, and nothing done by itself: a log that
//! went back to an older copy has new records below what was read. A partition is never given a logical offset to begin at: what
//! was asked for may be answered long after it was sent elsewhere.

mod access;
mod bootstrap;
pub mod consumer;
mod gaps;
mod leaders;
mod leaving;
mod membership;
mod message;
mod offsets;
pub mod partition;
mod partitioner;
mod polled;
pub mod producer;
pub(crate) mod properties;
mod question;
mod start;
mod statistics;
pub mod tail;
mod topic_id;
pub mod topics;

pub(crate) use self::access::{may_read, not_there};

use std::collections::BTreeMap;

use rdkafka::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use tracing::{debug, error, info, warn};

pub use self::message::RawHeader;
use super::LogError;

/// How often clients ask who leads the partitions, in milliseconds.
const METADATA_REFRESH_MS: &str = "5000";

/// How to reach the log.
#[derive(Clone, Debug)]
pub struct ClientSettings {
    /// `host:port[,host:port…]`.
    pub brokers: String,
    /// librdkafka properties that the pipeline passes through.
    pub properties: BTreeMap<String, String>,
}

/// Properties that hold for one kind of client alone; librdkafka warns when the other is given them.
const PRODUCER_ONLY: &[&str] = &[
    "batch.num.messages",
    "batch.size",
    "compression.codec",
    "compression.level",
    "compression.type",
    "delivery.timeout.ms",
    "linger.ms",
    "message.send.max.retries",
    "message.timeout.ms",
    "partitioner",
    "queue.buffering.max.kbytes",
    "queue.buffering.max.messages",
    "queue.buffering.max.ms",
    "request.timeout.ms",
    "retries",
    "sticky.partitioning.linger.ms",
];
const CONSUMER_ONLY: &[&str] = &[
    "auto.offset.reset",
    "check.crcs",
    "client.rack",
    "group.instance.id",
    "group.protocol",
    "group.remote.assignor",
    "heartbeat.interval.ms",
    "max.partition.fetch.bytes",
    "max.poll.interval.ms",
    "partition.assignment.strategy",
    "queued.max.messages.kbytes",
    "queued.min.messages",
    "session.timeout.ms",
];

/// Whether a property is for some other kind of client than the one that is made.
fn is_for(kind: Kind, property: &str) -> bool {
    let consumer = CONSUMER_ONLY.contains(&property) || property.starts_with("fetch.");
    let producer = PRODUCER_ONLY.contains(&property);
    match kind {
        Kind::Consumer => !producer,
        Kind::Producer => !consumer,
        Kind::Admin => !producer && !consumer,
    }
}

/// The kinds of client that the host makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Consumer,
    Producer,
    Admin,
}

impl ClientSettings {
    /// A client's configuration: `defaults`, then what the pipeline sets, then `fixed`, which the
    /// host's promises rest on.
    pub(super) fn client_config(
        &self,
        kind: Kind,
        defaults: &[(&str, &str)],
        fixed: &[(&str, &str)],
    ) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("client.id", "stagehost");
        // After a broker's restart librdkafka may take a partition for leaderless until it looks again, and by default
        // that is in five minutes: nothing gets into the partition for so long.
        config.set("topic.metadata.refresh.interval.ms", METADATA_REFRESH_MS);
        // librdkafka waits half of it, or 11 ms if that is more, between two connections, of which a client that starts
        // needs several. After a loss it doubles each time.
        config.set("reconnect.backoff.ms", "20");
        for (name, value) in defaults {
            config.set(*name, *value);
        }
        for (name, value) in &self.properties {
            if is_for(kind, name) {
                config.set(name, value);
            }
        }
        for (name, value) in fixed {
            config.set(*name, *value);
        }
        config.set("bootstrap.servers", &self.brokers);
        config.set_log_level(RDKafkaLogLevel::Info);
        config
    }
}

/// What librdkafka warns of and it or the host deals with: lost connections, of which the host says once that
/// the log is away, a coordinator that is not ready yet, and commits, which the host makes again.
const HANDLED: &[&str] = &[
    "COMMITFAIL",
    "ERROR",
    "FAIL",
    "GETPID",
    "REQTMOUT",
    "SESSTMOUT",
];

/// Sends what librdkafka has to say into the host's log.
fn log_line(level: RDKafkaLogLevel, facility: &str, message: &str) {
    // That it calls experimental what the host's promise rests on, and that it stops where it would break it, is no news to
    // whoever runs a pipeline: the host deals with it.
    let of_gaps = message.contains(producer::GAPLESS) || message.contains("gap-less guarantee");
    if of_gaps {
        debug!(target: "librdkafka", "{facility}: {message}");
        return;
    }
    match level {
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
            error!(target: "librdkafka", "{facility}: {message}");
        }
        RDKafkaLogLevel::Error | RDKafkaLogLevel::Warning if HANDLED.contains(&facility) => {
            debug!(target: "librdkafka", "{facility}: {message}");
        }
        RDKafkaLogLevel::Error | RDKafkaLogLevel::Warning => {
            warn!(target: "librdkafka", "{facility}: {message}");
        }
        RDKafkaLogLevel::Notice => info!(target: "librdkafka", "{facility}: {message}"),
        RDKafkaLogLevel::Info | RDKafkaLogLevel::Debug => {
            debug!(target: "librdkafka", "{facility}: {message}");
        }
    }
}

/// A client without callbacks of its own.
struct QuietContext;

impl ConsumerContext for QuietContext {}

impl ClientContext for QuietContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_line(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        debug!(target: "librdkafka", "{error}: {reason}");
    }
}

/// What the host's user lacks, where Kafka's authorizer refused it. That is for an operator to mend, and no record's fault:
/// whoever meets it waits.
fn forbidden(code: RDKafkaErrorCode) -> Option<&'static str> {
    use RDKafkaErrorCode as Code;
    match code {
        Code::TopicAuthorizationFailed => Some(
            "the host's Kafka user lacks a permission on the topic: grant it READ on inputs, WRITE on outputs and \
             dead letters, and DESCRIBE on all",
        ),
        Code::GroupAuthorizationFailed => {
            Some("the host's Kafka user lacks READ on the consumer group: grant it")
        }
        Code::ClusterAuthorizationFailed => Some(
            "the host's Kafka user lacks IDEMPOTENT_WRITE on the cluster: grant it, or WRITE on any topic",
        ),
        _ => None,
    }
}

/// What an error of librdkafka means to a lane.
fn log_error(error: &KafkaError) -> LogError {
    use RDKafkaErrorCode as Code;
    let code = error.rdkafka_error_code();
    if let Some(lacks) = code.and_then(forbidden) {
        return LogError::Unavailable(format!("{lacks}: {error}"));
    }
    let words = error.to_string();
    match code {
        // A batch may be larger than a segment of its topic where no record is: they are sent again one by one.
        Some(Code::MessageSizeTooLarge | Code::MessageBatchTooLarge) => LogError::TooLarge(words),
        Some(Code::InvalidTimestamp) => LogError::InvalidTime(words),
        Some(Code::InvalidRecord) => LogError::Invalid(words),
        Some(Code::UnknownPartition) => LogError::NoPartition(words),
        Some(
            Code::InvalidMessage
            | Code::InvalidMessageSize
            | Code::InvalidTopic
            | Code::PolicyViolation
            | Code::UnsupportedForMessageFormat,
        ) => LogError::Refused(words),
        _ => LogError::Unavailable(words),
    }
}
