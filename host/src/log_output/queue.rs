//! Lines on their way to stderr. Whoever has something to say leaves it here and goes on: a pipe that nobody reads must not
//! stop the host.
//!
//! Not `tracing-appender`, which bounds lines and not bytes, and at its end prints to stdout that stderr is stalled, which is
//! often the same pipe.

use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;

use super::budget::Budgets;
use crate::metrics::DroppedLines;

/// Bytes that may wait to be written; lines beyond are dropped.
const MAX_WAITING: usize = 1 << 20;
/// Memory that is kept for the next lines.
const KEPT: usize = 64 << 10;
/// How often it is said what was dropped.
const INTERVAL: Duration = Duration::from_secs(1);

pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    metric: DroppedLines,
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    /// The thread is writing what waited before.
    writing: bool,
    /// Lines that were dropped since something was last written.
    lost: u64,
}

impl Queue {
    pub(super) fn new(metric: DroppedLines) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            metric,
        })
    }

    /// Leaves lines to be written.
    pub(super) fn push(&self, lines: &[u8]) {
        let mut state = self.state();
        if state.waiting.len() + lines.len() > MAX_WAITING {
            drop(state);
            return self.lose(1);
        }
        state.waiting.extend_from_slice(lines);
        self.changed.notify_all();
    }

    /// Waits until all is written, for so long at most.
    pub(super) fn flush(&self, patience: Duration) {
        let until = Instant::now() + patience;
        let mut state = self.state();
        while state.writing || !state.waiting.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Writes for ever, and says what was dropped.
    pub(super) fn run(&self, mut out: impl Write, budgets: &Budgets) {
        let mut lines = Vec::new();
        let mut said = Instant::now();
        loop {
            self.take(&mut lines, INTERVAL.saturating_sub(said.elapsed()));
            if !lines.is_empty() {
                self.write(&mut out, &lines);
                lines.clear();
                lines.shrink_to(KEPT);
            }
            if said.elapsed() >= INTERVAL {
                said = Instant::now();
                budgets.say();
            }
        }
    }

    /// Takes what waits; nothing, if nothing comes in time.
    fn take(&self, lines: &mut Vec<u8>, patience: Duration) {
        let nothing = |state: &mut State| state.waiting.is_empty();
        let waited = self
            .changed
            .wait_timeout_while(self.state(), patience, nothing);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        std::mem::swap(&mut state.waiting, lines);
        state.writing = !lines.is_empty();
    }

    fn write(&self, out: &mut impl Write, lines: &[u8]) {
        let written = out.write_all(lines).and_then(|()| out.flush());
        if written.is_err() {
            let count = lines.iter().filter(|byte| **byte == b'\n').count();
            self.lose(count as u64);
        }
        let lost = match written {
            Ok(()) => std::mem::take(&mut self.state().lost),
            Err(_) => 0,
        };
        // Before it is said that all is written, for then the process may end.
        if lost > 0 {
            warn!(
                lines = lost,
                "stderr was not read fast enough: {lost} lines were dropped"
            );
        }
        self.state().writing = false;
        self.changed.notify_all();
    }

    fn lose(&self, lines: u64) {
        self.state().lost += lines;
        self.metric.stalled(lines);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
