//! `stagehost:stage/redis`: key-value stores, on Redis or on a store inside this process, with the same answers.
//!
//! `guest` is what components call, [`Store`] what the host holds. Two kinds of store do the work:
//! `remote`, a Redis server, and `embedded`, one file or memory. What commands exist, how they
//! find their keys and how many arguments they take is one table for both, [`commands`].

mod answers;
pub mod commands;
mod connection;
mod embedded;
mod guest;
mod remote;
mod rights;
mod transition;

use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::Semaphore;

pub use guest::bindings::{Condition, Error, Reply, SetOptions};
pub use guest::{RedisCtx, RedisGrants, RedisView, add_to_linker};

use super::{Action, Concern, StoreError};
use crate::pipeline::{RedisStore, RedisUrl};
use commands::Command;

/// Bytes of a key.
pub const MAX_KEY_BYTES: usize = 16 * 1024;
/// Bytes of a value that is set, or of an argument.
pub const MAX_VALUE_BYTES: usize = 8 * 1024 * 1024;
/// Keys or arguments of one call.
pub const MAX_KEYS: usize = 1_000;
/// Bytes of all that one call sends.
pub const MAX_REQUEST_BYTES: usize = 64 * 1024 * 1024;
/// Bytes of one answer.
pub const MAX_ANSWER_BYTES: usize = 16 * 1024 * 1024;
/// Fields of a hash or members of a set that one answer has.
pub const MAX_ANSWER_ITEMS: usize = 100_000;
/// A value that the host reads for an HTTP client, and that is not larger, takes no room among the large ones.
const SMALL_VALUE_BYTES: usize = 256 * 1024;
/// Larger ones that there are at one time, each from when it is asked for until its client has it.
const MAX_LARGE_VALUES: usize = 16;
/// Milliseconds that a key may live: what can be added to any time without an overflow.
const MAX_TTL: u64 = 1 << 62;
/// What is said before Redis's words where it refuses what it did before.
const WAS_DONE: &str = "it refuses what it did before: ";
/// What a key ends with that the host asks for to see whether it could be read or written.
const PROBE_SUFFIX: &str = "stagehost-probe";
/// What keys of the host begin with; no stage may use them.
pub(crate) const HOST_PREFIX: &str = "stagehost:";

/// Whether a process has the embedded store of a folder open. Makes nothing.
pub fn is_in_use(folder: &Path) -> bool {
    embedded::is_in_use(folder)
}

/// Milliseconds since the Unix epoch. The embedded store asks it for what has expired.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// The computer's clock.
pub fn system_clock() -> Clock {
    Arc::new(|| {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        since.map_or(0, |since| since.as_millis() as u64)
    })
}

/// Why [`Store::open`] would refuse the URL of a Redis server, without any of it.
pub fn check_url(url: &str) -> Result<(), String> {
    remote::check_url(url)
}

/// An open store. Clones share it.
#[derive(Clone)]
pub struct Store {
    kind: Kind,
    large: Arc<Semaphore>,
}

#[derive(Clone)]
enum Kind {
    Remote(remote::Remote),
    Embedded(embedded::Embedded),
}

impl Store {
    /// Opens the store; for a Redis server, connects to it.
    pub async fn open(settings: &RedisStore) -> Result<Self, StoreError> {
        Self::connect(&settings.url, system_clock()).await
    }

    /// As [`Store::open`], with a clock for the embedded kinds.
    pub async fn connect(url: &RedisUrl, clock: Clock) -> Result<Self, StoreError> {
        let kind = match url {
            RedisUrl::Remote(url) => Kind::Remote(remote::open(url).await?),
            RedisUrl::Embedded(folder) => {
                Kind::Embedded(embedded::open(Some(folder.as_ref() as &Path), clock).await?)
            }
            RedisUrl::Memory => Kind::Embedded(embedded::open(None, clock).await?),
        };
        let large = Arc::new(Semaphore::new(MAX_LARGE_VALUES));
        Ok(Self { kind, large })
    }

    /// The same store as somebody is granted it: what it has done is remembered for each, since its user may have rights to the
    /// keys of one and not of another.
    #[must_use]
    pub fn granted(&self) -> Self {
        let kind = match &self.kind {
            Kind::Remote(store) => Kind::Remote(store.granted()),
            Kind::Embedded(store) => Kind::Embedded(store.clone()),
        };
        let large = self.large.clone();
        Self { kind, large }
    }

    /// Whether it is in this process.
    fn is_embedded(&self) -> bool {
        matches!(self.kind, Kind::Embedded(_))
    }

    /// Sees whether the store answers.
    pub async fn ping(&self) -> Result<(), StoreError> {
        let answer = match &self.kind {
            Kind::Remote(store) => store.ping().await,
            Kind::Embedded(store) => store.ping().await,
        };
        answer.map_err(StoreError::from)
    }

    /// Sees whether the store does what it did not do: at keys that begin so, or where it had done it before. Nothing changes.
    pub async fn probe(&self, prefix: &str, action: &Action) -> Result<(), StoreError> {
        let key = format!("{prefix}{PROBE_SUFFIX}").into_bytes();
        let answer = match (&self.kind, action) {
            (_, Action::Answer | Action::Lock(_)) | (Kind::Embedded(_), Action::Read) => {
                return self.ping().await;
            }
            (Kind::Embedded(store), _) => store.probe_write().await,
            (Kind::Remote(store), Action::Read) => store.probe_read(&key).await,
            (Kind::Remote(store), Action::Command(name)) => store.probe_call(name).await,
            (Kind::Remote(store), Action::Write | Action::Statement(..)) => {
                store.probe_write(&key).await
            }
        };
        answer.map_err(StoreError::from)
    }

    /// Finishes what was begun, and lets go of the server or the file.
    pub async fn close(&self) {
        match &self.kind {
            Kind::Remote(_) => {}
            Kind::Embedded(store) => store.close().await,
        }
    }

    /// The value at a key, for a client. However many ask, few large ones are read at one time; what becomes of them then is
    /// seen to by whoever sends them.
    pub async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let key = key.as_bytes();
        let small = self.fetch_up_to(key, SMALL_VALUE_BYTES).await;
        let value = match small {
            Err(Error::TooLarge(_)) => {
                // It is never closed.
                let _reading = self.large.acquire().await.ok();
                self.fetch(key).await
            }
            small => small,
        };
        value.map_err(StoreError::from)
    }

    /// The value at a key.
    pub async fn fetch(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        self.fetch_up_to(key, MAX_ANSWER_BYTES).await
    }

    async fn fetch_up_to(&self, key: &[u8], most: usize) -> Result<Option<Vec<u8>>, Error> {
        match &self.kind {
            Kind::Remote(store) => store.get(key, most).await,
            Kind::Embedded(store) => store.get(key, most).await,
        }
    }

    /// The keys' values, in the order of the keys; none where a key has something else than a value.
    pub async fn fetch_many(&self, keys: &[Vec<u8>]) -> Result<Vec<Option<Vec<u8>>>, Error> {
        match &self.kind {
            Kind::Remote(store) => store.get_many(keys).await,
            Kind::Embedded(store) => store.get_many(keys).await,
        }
    }

    /// Sets all entries, each as the options say, in one step, and answers which of them were written.
    pub async fn set(&self, set: Set) -> Result<Vec<bool>, Error> {
        const INVALID_TTL: &str = "ERR invalid expire time in 'set' command";
        if set.ttl.is_some_and(|ttl| ttl == 0 || ttl > MAX_TTL) {
            return Err(Error::Server(INVALID_TTL.to_owned()));
        }
        match &self.kind {
            Kind::Remote(store) => store.set(set).await,
            Kind::Embedded(store) => store.set(set).await,
        }
    }

    /// Deletes keys and their versions, and answers how many of the keys were there.
    pub async fn delete(&self, keys: Vec<Vec<u8>>) -> Result<u64, Error> {
        match &self.kind {
            Kind::Remote(store) => store.delete(keys).await,
            Kind::Embedded(store) => store.delete(keys).await,
        }
    }

    /// Adds to the whole number at a key, and answers the sum.
    pub async fn increment(&self, key: Vec<u8>, delta: i64) -> Result<i64, Error> {
        let arguments = vec![key, delta.to_string().into_bytes()];
        match self.execute(&commands::INCRBY, arguments).await? {
            Reply::Int(sum) => Ok(sum),
            other => Err(Error::Server(format!("INCRBY answered {other:?}"))),
        }
    }

    /// Runs a command of the table. Commands know nothing of versions.
    pub async fn execute(
        &self,
        command: &'static Command,
        arguments: Vec<Vec<u8>>,
    ) -> Result<Reply, Error> {
        command.check(&arguments)?;
        if command.name == "MGET" {
            let values = self.fetch_many(&arguments).await?;
            let items = values.into_iter().map(Option::unwrap_or_default);
            return Ok(Reply::Items(items.collect()));
        }
        let reply = match &self.kind {
            Kind::Remote(store) => store.execute(command, arguments).await?,
            Kind::Embedded(store) => store.execute(command, arguments).await?,
        };
        check_answer(match &reply {
            Reply::Data(data) => data.len(),
            Reply::Items(items) => items.iter().map(Vec::len).sum(),
            _ => 0,
        })?;
        Ok(reply)
    }
}

/// What to set, and how.
#[derive(Clone, Debug, Default)]
pub struct Set {
    /// Keys and their values.
    pub entries: Vec<(Vec<u8>, Vec<u8>)>,
    /// Milliseconds to live, at least 1.
    pub ttl: Option<u64>,
    /// Write only what is there, or is not.
    pub condition: Option<Condition>,
    /// Write only what has an older version, or none.
    pub version: Option<u64>,
}

impl From<Error> for StoreError {
    fn from(error: Error) -> Self {
        match error {
            Error::Unavailable(why) => Self::Unavailable(why),
            Error::Server(why) | Error::Denied(why) => Self::Refused(why),
            Error::TooLarge(limit) => Self::Refused(format!("larger than {limit} bytes")),
        }
    }
}

fn check_answer(bytes: usize) -> Result<(), Error> {
    if bytes > MAX_ANSWER_BYTES {
        return Err(Error::TooLarge(MAX_ANSWER_BYTES as u64));
    }
    Ok(())
}

/// Where the version of a key is kept. The braces keep both in one slot of a Redis cluster.
fn version_key(key: &[u8]) -> Vec<u8> {
    [b"stagehost:version:{", key, b"}"].concat()
}
