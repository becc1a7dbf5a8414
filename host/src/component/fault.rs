//! Why a call failed: what the engine, the sandbox and the guest itself say of it, as a cause that people know.

use std::collections::BTreeSet;

use tracing::debug;
use wasmtime::component::ResourceTableError;
use wasmtime::{FrameInfo, Trap, WasmBacktrace};
use wasmtime_wasi::I32Exit;

use super::guest::Guest;
use super::instance::wit;
use crate::capability::Away;
use crate::delivery::{Cause, Fault};

/// What happened in a call that the guest has answered.
pub(super) struct Trouble {
    pub(super) denied: Option<String>,
    /// A statement was out of time.
    pub(super) slow: bool,
    pub(super) away: Option<Box<Away>>,
}

/// A fault after a denied call is put down to the denial: trying again would be denied again.
pub(super) fn fault_of(fault: wit::Fault, trouble: &Trouble) -> Fault {
    let (cause, message) = match fault {
        wit::Fault::Retry(why) if trouble.slow => (Cause::Slow, why),
        wit::Fault::Retry(why) => (Cause::Retry, why),
        wit::Fault::Reject(why) => (Cause::Reject, why),
    };
    match &trouble.denied {
        Some(denied) => Fault::new(
            Cause::Denied,
            format!("{denied}; the stage said: {message}"),
        ),
        None => Fault::new(cause, message),
    }
}

/// Why a call did not return. A cause that the error itself names comes first, then what had been refused before.
pub(super) fn trap(error: &wasmtime::Error, guest: &mut Guest) -> Fault {
    let words = [words(error), guest.log.take_last_words()].join(": ");
    let words = words.trim_end_matches(": ");
    let denied = guest.take_denied();
    let handles = matches!(error.downcast_ref(), Some(ResourceTableError::Full));
    let (cause, message) = if is_stack_full(error) {
        (Cause::Stack, format!("the stage's stack is full: {words}"))
    } else if guest.limiter.refused_memory {
        (
            Cause::Memory,
            format!("the stage's memory limit is reached: {words}"),
        )
    } else if handles || guest.limiter.refused_table {
        (
            Cause::Limit,
            format!("a limit of the stage's sandbox is reached: {words}"),
        )
    } else if let Some(denied) = denied {
        (Cause::Denied, format!("{denied}; then: {words}"))
    } else if guest.take_slow() {
        (Cause::Slow, words.to_owned())
    } else if let Some(I32Exit(code)) = error.downcast_ref() {
        (
            Cause::Exit,
            format!("the stage ended itself with exit code {code}: {words}"),
        )
    } else {
        (Cause::Trap, words.to_owned())
    };
    Fault {
        away: guest.take_away(),
        ..Fault::new(cause, message)
    }
}

/// Of WebAssembly's own stack the engine says so. Of that in the guest's memory, where most compilers have it before all else,
/// nobody does: deep in calls of few functions, the guest's address wraps around below its memory's first byte.
fn is_stack_full(error: &wasmtime::Error) -> bool {
    const DEEP: usize = 16;
    const AROUND_ZERO: std::ops::Range<u64> = (1 << 32) - (16 << 20)..(1 << 32) + (16 << 20);
    match error.downcast_ref() {
        Some(Trap::StackOverflow) => return true,
        Some(Trap::MemoryOutOfBounds) => {}
        _ => return false,
    }
    let frames = error.downcast_ref().map_or(&[][..], WasmBacktrace::frames);
    let functions: BTreeSet<_> = frames.iter().map(FrameInfo::func_index).collect();
    let is_recursive = frames.len() >= DEEP && functions.len() <= frames.len() / 2;
    // Not every instruction's fault has an address.
    let mut addresses = error.chain().filter_map(|cause| {
        let text = cause.to_string();
        let rest = text.strip_prefix("memory fault at wasm address 0x")?;
        u64::from_str_radix(rest.split(' ').next()?, 16).ok()
    });
    is_recursive && addresses.all(|address| AROUND_ZERO.contains(&address))
}

/// Why there is no instance. It could be made at start; what did not fail in its own code is the host's shortage, of memory
/// say, which is not the message's fault.
pub(super) fn unmade(error: &wasmtime::Error, guest: &mut Guest) -> Fault {
    let in_its_code = error.is::<WasmBacktrace>() || error.is::<Trap>() || error.is::<I32Exit>();
    guest.log.end_call();
    let Fault {
        cause,
        message,
        away,
    } = trap(error, guest);
    let cause = if in_its_code { cause } else { Cause::Resources };
    Fault {
        away,
        ..Fault::new(
            cause,
            format!("the component could not be instantiated: {message}"),
        )
    }
}

/// What went wrong, without the wasm backtrace that the error's own words begin with; that is for debugging.
fn words(error: &wasmtime::Error) -> String {
    debug!("a call failed: {error:?}");
    error.root_cause().to_string()
}
