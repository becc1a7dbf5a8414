//! Emitting records to the topics of the stage's `output` list.
//!
//! A record is acknowledged by the log before the offset of the message that caused it is
//! committed, and dropped if the message fails.
//!
//! ```
//! use stagehost::{Message, Outcome, Outgoing};
//!
//! fn announce(message: Message) -> Outcome {
//!     Outgoing::new("news")
//!         .with_key("front-page")
//!         .with_json(&serde_json::json!({ "seen": message.place() }))?
//!         .with_header("content-type", "application/json")
//!         .send()?;
//!     Ok(())
//! }
//! # stagehost::stage!(announce);
//! # fn main() {}
//! ```

use serde::Serialize;

pub use crate::bindings::stage::stagehost::stage::producer::{Error, Outgoing, send};
use crate::{Fault, Header};

impl Outgoing {
    /// A record without key, value (a tombstone) and headers.
    pub fn new(topic: impl Into<String>) -> Self {
        Self {
            topic: topic.into(),
            key: None,
            value: None,
            headers: Vec::new(),
        }
    }

    /// A record with a key and a value in JSON.
    ///
    /// A value that can't be written as JSON (a map whose keys are not text, say) is rejected.
    pub fn json(
        topic: impl Into<String>,
        key: impl AsRef<[u8]>,
        value: &impl Serialize,
    ) -> Result<Self, Fault> {
        Self::new(topic).with_key(key).with_json(value)
    }

    /// With this key: records of one key keep their order.
    pub fn with_key(mut self, key: impl AsRef<[u8]>) -> Self {
        self.key = Some(key.as_ref().to_vec());
        self
    }

    /// With this value.
    pub fn with_value(mut self, value: impl Into<Vec<u8>>) -> Self {
        self.value = Some(value.into());
        self
    }

    /// With this value, in JSON.
    pub fn with_json(self, value: &impl Serialize) -> Result<Self, Fault> {
        let json = serde_json::to_vec(value)?;
        Ok(self.with_value(json))
    }

    /// With one header more. Names that begin with `stagehost-` belong to the host: they are left out.
    pub fn with_header(mut self, name: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        self.headers.push(Header::new(name, value));
        self
    }

    /// Adds the record to the outputs of this message.
    pub fn send(self) -> Result<(), Error> {
        send(&self)
    }
}
