//! Redis stores that the pipeline grants to the stage by name, each with a key prefix.
//!
//! Keys are written whole, as they stand in Redis; one that does not begin with the granted prefix
//! is denied.
//!
//! ```
//! use std::time::Duration;
//! use stagehost::redis::{Connection, SetOptions};
//! use stagehost::{Fault, Message};
//!
//! fn remember(message: &Message, id: &str) -> Result<(), Fault> {
//!     let cache = Connection::open("cache")?;
//!     cache.increment("seen:count", 1)?;
//!     // A replay of an older record can't undo a newer one:
//!     let options = SetOptions::default()
//!         .with_version(message.offset)
//!         .with_ttl(Duration::from_secs(3600));
//!     cache.set(&format!("seen:{id}"), b"yes", Some(options))?;
//!     Ok(())
//! }
//! ```

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Fault;
pub use crate::bindings::stage::stagehost::stage::redis::{
    Condition, Connection, Error, Reply, SetOptions,
};

impl Connection {
    /// The key's value as text; one that is not UTF-8 is rejected.
    pub fn get_text(&self, key: &str) -> Result<Option<String>, Fault> {
        self.get(key)?
            .map(String::from_utf8)
            .transpose()
            .map_err(|e| Fault::Reject(format!("redis: the value of {key} is not UTF-8: {e}")))
    }

    /// The key's value as JSON of type `T`; one that is not is rejected.
    pub fn get_json<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, Fault> {
        self.get(key)?
            .map(|value| serde_json::from_slice(&value))
            .transpose()
            .map_err(|e| {
                Fault::Reject(format!(
                    "redis: the value of {key} is not the JSON expected: {e}"
                ))
            })
    }

    /// Sets the key to text, whatever it held.
    pub fn set_text(&self, key: &str, value: &str) -> Result<(), Error> {
        self.set(key, value.as_bytes(), None).map(drop)
    }

    /// Sets the key to JSON, whatever it held.
    pub fn set_json(&self, key: &str, value: &impl Serialize) -> Result<(), Fault> {
        Ok(self.set(key, &serde_json::to_vec(value)?, None).map(drop)?)
    }
}

/// A set that replaces the value and its time to live.
impl Default for SetOptions {
    fn default() -> Self {
        Self {
            ttl: None,
            condition: None,
            version: None,
        }
    }
}

impl SetOptions {
    /// With this time to live, in whole milliseconds and at least one.
    pub fn with_ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1));
        self
    }

    /// Only if the condition holds.
    pub fn with_condition(mut self, condition: Condition) -> Self {
        self.condition = Some(condition);
        self
    }

    /// Only if the stored version is older; the offset of the message, where one partition writes
    /// the key.
    pub fn with_version(mut self, version: u64) -> Self {
        self.version = Some(version);
        self
    }
}
