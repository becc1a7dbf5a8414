//! Stagehost: a host for WebAssembly stages on a Kafka log.
//!
//! ARCHITECTURE.md has the map. The binary `host` is [`cli`] and nothing else.

pub mod admin;
pub mod capability;
pub mod cli;
pub mod component;
pub mod delivery;
pub mod diagnostics;
pub mod http;
pub mod ingress;
pub mod lane;
pub mod log;
pub mod log_output;
pub mod manifest;
pub mod metrics;
pub mod pipeline;
pub mod readiness;
pub mod record;
pub mod run;
mod slice;
mod sync;
