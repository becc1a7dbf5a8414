//! The log as the rest of the host needs it. Small traits, so that lanes can be run over a
//! simulated log; [`kafka`] is the one real client, and the only module that names rdkafka.

pub mod kafka;

use std::future::Future;

use tokio_util::sync::CancellationToken;

use crate::record::{Outgoing, Record};

/// How much a lane takes at a time.
#[derive(Clone, Copy, Debug)]
pub struct BatchLimits {
    /// Messages in a batch at most.
    pub max_messages: usize,
    /// Bytes in a batch at most; a single larger record still makes a batch of its own.
    pub max_bytes: usize,
    /// A batch that has lasted this long is committed as far as it got.
    pub max_time: std::time::Duration,
}

/// Why the log did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The log cannot be reached, or did not answer in time. Worth another try.
    #[error("the log is not available: {0}")]
    Unavailable(String),
    /// The log refused the record or the request, and would refuse it again.
    #[error("the log refused: {0}")]
    Refused(String),
    /// The record is larger than the log takes.
    #[error("the record is too large: {0}")]
    TooLarge(String),
}

/// One assigned partition, as its lane reads it.
pub trait Source: Send {
    /// The next consecutive records, at least one; `None` once the partition is to be given up.
    ///
    /// Cancel-safe: a record is either returned or still to come.
    fn next(&mut self, limits: &BatchLimits) -> impl Future<Output = Option<Vec<Record>>> + Send;

    /// All records below `next_offset` are done, their effects durable: it may be committed.
    fn done(&mut self, next_offset: i64);

    /// Cancelled when the partition is to be given up: finish the message at hand and end.
    fn stopping(&self) -> CancellationToken;
}

/// An output that the log did not take.
#[derive(Debug)]
pub struct Unsent {
    /// Its index among the records that were to be produced.
    pub index: usize,
    /// Why.
    pub error: LogError,
}

/// Where outputs go.
pub trait Sink: Send + Sync {
    /// Appends the records, those of one partition in their order, and returns once every one is
    /// acknowledged by all in-sync replicas, or has failed. On an error, the records that are not named in it
    /// were appended.
    fn produce(&self, records: &[Outgoing])
    -> impl Future<Output = Result<(), Vec<Unsent>>> + Send;
}
