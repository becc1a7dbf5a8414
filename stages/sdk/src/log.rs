//! Messages for the host's log, which adds stage, topic, partition and offset.
//!
//! ```
//! # use stagehost::{Message, log};
//! fn note(message: &Message) {
//!     log::info("a new post");
//!     log::warn(format_args!("attempt {}", message.attempt));
//! }
//! ```

use std::fmt::Display;

use crate::bindings::stage::wasi::logging::logging::{Level, log};

/// Of use only while looking for a fault step by step.
pub fn trace(message: impl Display) {
    write(Level::Trace, &message);
}

/// Of use while developing.
pub fn debug(message: impl Display) {
    write(Level::Debug, &message);
}

/// What happened, as expected.
pub fn info(message: impl Display) {
    write(Level::Info, &message);
}

/// Something is off, and the work goes on.
pub fn warn(message: impl Display) {
    write(Level::Warn, &message);
}

/// Something failed.
pub fn error(message: impl Display) {
    write(Level::Error, &message);
}

fn write(level: Level, message: &dyn Display) {
    log(level, "", &message.to_string());
}
