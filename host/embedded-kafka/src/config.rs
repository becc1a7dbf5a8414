//! What a broker is started with, and why a start can fail.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How a broker runs. [`Config::new`] has the values for development; every field can be changed after it.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where records, topics and committed offsets are kept. Created if missing; locked while the broker runs.
    pub folder: PathBuf,
    /// A loopback address. Port 0: the last port used in this folder if it is free, else any free one.
    pub listen: SocketAddr,
    /// Whether records and offsets are flushed to the disk before they are acknowledged. Without it they survive
    /// the end of the process, but not that of the machine.
    pub fsync: bool,
    /// Size in bytes at which a partition begins a new segment file. A topic's `segment.bytes` goes before it.
    pub segment_bytes: u64,
    /// Bytes kept of a partition, to the segment; `None`: all. A topic's `retention.bytes` goes before it.
    pub retention_bytes: Option<u64>,
    /// How long records are kept, to the segment; `None`: for ever. A topic's `retention.ms` goes before it.
    pub retention: Option<Duration>,
    /// How often retention is looked after.
    pub retention_check: Duration,
    /// How often the topics that are compacted are looked after.
    pub compaction_check: Duration,
    /// Whether a topic that a client asks for, or produces to, is created with `default_partitions`.
    pub auto_create_topics: bool,
    /// Partitions of a topic whose creator did not say how many.
    pub default_partitions: i32,
    /// Largest record batch in bytes, as it is sent. A topic's `max.message.bytes` goes before it.
    pub max_message_bytes: u32,
    /// How long a group that was empty waits for more members before it hands out partitions. Each newcomer
    /// within that time adds as much again.
    pub rebalance_delay: Duration,
    /// Shortest session timeout that a group member may ask for.
    pub min_session_timeout: Duration,
    /// Connections held at once; one more is closed as soon as it is made.
    pub max_connections: usize,
}

impl Config {
    /// A broker over `folder`, on a free port of 127.0.0.1, durable, with Kafka's limits and a week of retention.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            fsync: true,
            segment_bytes: 64 << 20,
            retention_bytes: None,
            retention: Some(Duration::from_secs(7 * 24 * 60 * 60)),
            retention_check: Duration::from_secs(30),
            compaction_check: Duration::from_secs(15),
            auto_create_topics: true,
            default_partitions: 1,
            max_message_bytes: 1_048_588,
            rebalance_delay: Duration::from_millis(20),
            min_session_timeout: Duration::from_secs(6),
            max_connections: 1000,
        }
    }
}

/// Why a broker did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The address asked for can be reached from other machines.
    #[error(
        "{0} is not a loopback address: the embedded broker has no access control; listen on 127.0.0.1 or [::1], or \
         use Apache Kafka to serve other machines"
    )]
    NotLoopback(SocketAddr),
    /// Another process, or another broker of this one, works on the folder.
    #[error(
        "the folder {} is in use by another broker{}: stop that one, connect to it, or choose another folder",
        folder.display(),
        address.map(|a| format!(" (it listens on {a})")).unwrap_or_default()
    )]
    Locked {
        /// The folder.
        folder: PathBuf,
        /// Where the broker that holds it listens, if it does already.
        address: Option<SocketAddr>,
    },
    /// Somebody else listens there.
    #[error(
        "the port of {0} is in use: stop the process that listens there, or choose another port (0: any)"
    )]
    PortInUse(SocketAddr),
    /// A file in the folder is damaged where a crash could not have damaged it.
    #[error("{} is damaged at byte {position}: {what}; {mend}", file.display())]
    Corrupt {
        /// The damaged file.
        file: PathBuf,
        /// Where the damage begins, in bytes from the start of the file.
        position: u64,
        /// What was found.
        what: String,
        /// What can be done, and what it costs.
        mend: String,
    },
    /// The folder or the socket could not be used.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's answer.
        #[source]
        error: io::Error,
    },
}

impl StartError {
    /// For `map_err`: an I/O error with what was tried, and on which path.
    pub(crate) fn io(what: &str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let what = format!("cannot {what} {}", path.display());
        move |error| Self::Io { what, error }
    }
}
