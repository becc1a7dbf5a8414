//! The log as the rest of the host needs it. Small traits, so that lanes can be run over a
//! simulated log; [`kafka`] is the one real client, and the only module that names rdkafka.

pub mod committed;
pub mod kafka;

use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use self::committed::{Committed, RowMark};
use crate::record::{Outgoing, Record};
use crate::sync::lock;

/// How much a lane takes at a time.
#[derive(Clone, Copy, Debug)]
pub struct BatchLimits {
    /// Messages in a batch at most.
    pub max_messages: usize,
    /// Bytes in a batch at most; a single larger record still makes a batch of its own.
    pub max_bytes: usize,
    /// A batch that has lasted this long is committed as far as it got.
    pub max_time: Duration,
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
    /// The log says that the record is none for its topic. One that is compacted says so of a record without a key.
    #[error("the log does not take the record: {0}")]
    Invalid(String),
    /// The record's topic does not have its partition: it was made anew with fewer.
    #[error("the topic does not have the record's partition: {0}")]
    NoPartition(String),
    /// The record's timestamp is further from now than its topic takes.
    #[error("the log does not take the record's timestamp: {0}")]
    InvalidTime(String),
    /// The record is larger than the log takes.
    #[error("the record is too large: {0}")]
    TooLarge(String),
}

impl LogError {
    /// Whether it is about the record, and would be the same the next time.
    pub fn is_refusal(&self) -> bool {
        !matches!(self, Self::Unavailable(_))
    }
}

/// Records that are not in the log, though the lane has not had them yet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Gap {
    /// Retention removed them.
    #[error(
        "the records from offset {expected} up to {first} were removed before they were processed"
    )]
    Removed {
        /// The offset to go on at.
        expected: i64,
        /// The partition's first record.
        first: i64,
    },
    /// The partition ends before: its topic was deleted and made anew, or lost what was acknowledged.
    #[error(
        "offset {expected} is to be read next, but the partition ends at {end}: its topic was deleted and made anew"
    )]
    Recreated {
        /// The offset to go on at.
        expected: i64,
        /// The partition's end.
        end: i64,
    },
    /// The group's offset is of another topic of this name.
    #[error(
        "offset {expected} is to be read next, of a topic whose id was {before}, and now it is {now}: it was deleted and made anew"
    )]
    Replaced {
        /// The offset to go on at.
        expected: i64,
        /// The topic's id when the offset was committed.
        before: String,
        /// The id of the topic that is there.
        now: String,
    },
}

/// Reading begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Started {
    /// What the group has committed in the partition.
    pub committed: Option<Committed>,
    /// The topic's id, where the log tells it.
    pub topic: Option<String>,
}

/// Why nothing comes of a partition, where who reads it knows. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Unread(Arc<Mutex<Reasons>>);

#[derive(Debug, Default)]
struct Reasons {
    /// Its leader is away.
    leader: Option<(Instant, String)>,
    /// What has to be known before it is read is not.
    start: Option<(Instant, String)>,
}

impl Unread {
    /// The reason, and since when.
    pub fn reason(&self) -> Option<(Instant, String)> {
        let Reasons { leader, start } = &*lock(&self.0);
        let (since, why) = leader.as_ref().or(start.as_ref())?;
        let earliest = start
            .as_ref()
            .map_or(*since, |(start, _)| *start.min(since));
        Some((earliest, why.clone()))
    }

    /// Its leader has been away for so long by now, or it is there.
    pub fn set_leader(&self, trouble: Option<(Duration, String)>) {
        let at = |lasts| Instant::now().checked_sub(lasts);
        let trouble = trouble.map(|(lasts, why)| (at(lasts).unwrap_or_else(Instant::now), why));
        keep(&mut lock(&self.0).leader, trouble);
    }

    /// What keeps it from being read, before it is.
    pub fn set_start(&self, why: Option<String>) {
        let trouble = why.map(|why| (Instant::now(), why));
        keep(&mut lock(&self.0).start, trouble);
    }
}

/// A reason that was there before has lasted since then, whatever is known of it by now.
fn keep(known: &mut Option<(Instant, String)>, now: Option<(Instant, String)>) {
    let before = known.as_ref().map(|(since, _)| *since);
    *known = now.map(|(since, why)| (before.map_or(since, |before| before.min(since)), why));
}

/// One assigned partition, as its lane reads it.
pub trait Source: Send {
    /// Has the records from `offset` on read, or where it is `None` from the group's committed offset on, and
    /// where there is none from the first. To be called before `next`,
    /// and again to go elsewhere, as after a gap. Returns when the log has said that there is no gap; `None` when
    /// the partition is to be given up.
    fn start(
        &mut self,
        offset: Option<i64>,
    ) -> impl Future<Output = Result<Option<Started>, Gap>> + Send;

    /// The next consecutive records, at least one; `None` once the partition is to be given up.
    ///
    /// Cancel-safe: a record is either returned or still to come.
    fn next(
        &mut self,
        limits: &BatchLimits,
    ) -> impl Future<Output = Result<Option<Vec<Record>>, Gap>> + Send;

    /// All records below `next_offset` are done, their effects durable: it may be committed, and beside it what a
    /// transactional lane's row says.
    fn done(&mut self, next_offset: i64, row: Option<RowMark>);

    /// The offset up to which no more records are to come, where the lane has taken all: behind markers of transactions and
    /// what was aborted.
    fn passed(&self) -> Option<i64> {
        None
    }

    /// The topic's id, once the log has told it: it may not when reading begins.
    fn topic_id(&self) -> Option<String> {
        None
    }

    /// Where it is said why nothing comes.
    fn unread(&self) -> Unread {
        Unread::default()
    }

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
    ///
    /// Of the records of one caller to one partition, a prefix is appended at any time: where one was not
    /// taken, nor were those after it, unless the log refused it for what it is.
    fn produce(&self, records: &[Outgoing])
    -> impl Future<Output = Result<(), Vec<Unsent>>> + Send;
}

/// A sink that can tell where a record will go.
pub trait Addressed: Sink {
    /// The partition of its topic that a record belongs into: the one that it has, its key's, or any.
    fn partition_of(&self, record: &Outgoing)
    -> impl Future<Output = Result<i32, LogError>> + Send;
}
