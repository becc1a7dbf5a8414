//! Components: bytes in, callable stages out. With `capability/`, the only place that names wasmtime.

mod clock;
mod fault;
mod guest;
pub mod inspect;
mod instance;
mod pool;
mod runtime;
mod share;
mod turns;

pub use instance::StageComponent;
pub use runtime::{Compiled, Runtime};

/// wasmtime has an error type of its own.
fn plain(error: wasmtime::Error) -> anyhow::Error {
    anyhow::anyhow!("{error:#}")
}
