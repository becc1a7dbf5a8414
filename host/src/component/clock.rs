//! The time in which the host runs. A deadline counts in it: a process that was stopped, or whose machine slept or was too
//! busy to run it, has not given a call its time, and the message would pay for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// How often it ticks.
pub(super) const TICK: Duration = Duration::from_millis(5);

/// A clock that somebody ticks.
#[derive(Clone, Default)]
pub(super) struct Clock(Arc<AtomicU32>);

impl Clock {
    pub(super) fn tick(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Ticks so far; they wrap.
    pub(super) fn now(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}
