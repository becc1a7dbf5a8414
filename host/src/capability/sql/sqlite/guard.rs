//! What SQLite asks about while it prepares and runs a statement: whether it may go on, and who sent it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::super::SqlAccess;

/// Shared by a connection's thread, by what SQLite calls on it, and by whoever waits for it.
pub(super) struct Guard {
    /// What `ends` counts from.
    start: Instant,
    /// Nanoseconds.
    ends: AtomicU64,
    /// Nobody waits any more.
    is_given_up: AtomicBool,
    /// The transaction has written as much as a guest's may.
    is_full: AtomicBool,
    sender: Mutex<Sender>,
}

/// Whose statement it is.
#[derive(Default)]
pub(super) struct Sender {
    /// A guest's; the host's own is not asked.
    pub(super) access: Option<SqlAccess>,
    /// Whether it is running, and only prepared again because tables have changed.
    pub(super) is_running: bool,
    /// What is prepared may call JSON functions; and it does.
    pub(super) uses_json: bool,
    /// Why it was refused.
    pub(super) refusal: Option<String>,
}

impl Guard {
    pub(super) fn new() -> Self {
        Self {
            start: Instant::now(),
            ends: AtomicU64::new(u64::MAX),
            is_given_up: AtomicBool::new(false),
            is_full: AtomicBool::new(false),
            sender: Mutex::default(),
        }
    }

    /// Gives what comes next its time.
    pub(super) fn renew(&self, time: Duration) {
        let ends = (self.start.elapsed() + time).as_nanos();
        let ends = u64::try_from(ends).unwrap_or(u64::MAX);
        self.ends.store(ends, Ordering::Relaxed);
    }

    pub(super) fn give_up(&self) {
        self.is_given_up.store(true, Ordering::Relaxed);
    }

    /// Notes whether a transaction has written too much; answers the same.
    pub(super) fn note_full(&self, is_full: bool) -> bool {
        self.is_full.store(is_full, Ordering::Relaxed);
        is_full
    }

    /// Whether it is a guest's statement that runs.
    pub(super) fn is_guests(&self) -> bool {
        self.with_sender(|sender| sender.access.is_some())
    }

    pub(super) fn is_full(&self) -> bool {
        self.is_full.load(Ordering::Relaxed)
    }

    pub(super) fn is_over(&self) -> bool {
        self.is_given_up.load(Ordering::Relaxed)
            || self.start.elapsed().as_nanos() >= u128::from(self.ends.load(Ordering::Relaxed))
    }

    /// What comes next is prepared for a guest that may do so much.
    pub(super) fn begin_to_prepare(&self, access: SqlAccess) {
        self.with_sender(|sender| {
            *sender = Sender {
                access: Some(access),
                ..Sender::default()
            };
        });
    }

    pub(super) fn with_sender<T>(&self, work: impl FnOnce(&mut Sender) -> T) -> T {
        work(&mut self.sender.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
