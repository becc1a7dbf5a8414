//! What a statement that runs waits for, as far as somebody has looked: once it is given up, nobody can tell any more.

use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::sync::lock;

/// Locks that others have, and that a statement waits for.
#[derive(Debug)]
pub struct LockWait {
    /// Who runs the statement, as the database names its sessions.
    pub(super) process: i32,
    held: Mutex<Vec<HeldLock>>,
    was_seen: AtomicBool,
}

/// A lock of somebody who is no host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HeldLock {
    /// Which lock, and whose: both are gone when it is.
    pub(super) key: String,
    /// Who has which lock since when, and how it ends.
    pub(super) words: String,
}

impl LockWait {
    pub(super) fn of(process: i32) -> Self {
        Self {
            process,
            held: Mutex::default(),
            was_seen: AtomicBool::new(false),
        }
    }

    /// Whether it has waited for a lock, as far as that is known; else it may have been slow.
    pub fn was_seen(&self) -> bool {
        self.was_seen.load(Ordering::Relaxed)
    }

    /// The database said so.
    pub(super) fn set_seen(&self) {
        self.was_seen.store(true, Ordering::Relaxed);
    }

    pub(super) fn held(&self) -> Vec<HeldLock> {
        lock(&self.held).clone()
    }

    pub(super) fn set_held(&self, held: Vec<HeldLock>) {
        if !held.is_empty() {
            self.set_seen();
        }
        *lock(&self.held) = held;
    }

    /// What it waits for, where it is known to wait for anybody.
    pub fn words(&self) -> Option<String> {
        let who = self.who()?;
        Some(format!(
            "statements wait for a lock that another session has: {who}"
        ))
    }

    /// Who has what it waits for.
    pub(super) fn who(&self) -> Option<String> {
        let held = lock(&self.held);
        let words: Vec<_> = held.iter().map(|held| held.words.as_str()).collect();
        (!words.is_empty()).then(|| words.join("; "))
    }
}

/// Where the wait of a statement is noted while it runs: who has given up on it finds it here.
#[derive(Debug, Default)]
pub struct Sight(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    wait: Option<Arc<LockWait>>,
    heard: Heard,
    was_looked_at: bool,
}

/// What is known of a statement that was given up.
#[derive(Debug)]
pub struct GivenUp {
    /// For which lock it may have waited, where locks are looked at.
    pub wait: Option<Arc<LockWait>>,
    /// For how long nobody is known to have had an answer.
    pub silence: Duration,
    /// Whether a look at locks was begun.
    pub was_looked_at: bool,
}

/// What the database has answered to anybody while the statement waits.
#[derive(Clone, Copy, Debug, Default)]
enum Heard {
    #[default]
    Nothing,
    /// Nothing since it was asked then.
    Asked(Instant),
    /// All that it was asked for.
    All,
}

impl Sight {
    pub(super) fn begin(&self, process: i32) -> Arc<LockWait> {
        let wait = Arc::new(LockWait::of(process));
        *lock(&self.0) = Seen {
            wait: Some(wait.clone()),
            ..Seen::default()
        };
        wait
    }

    /// The database is asked for something else. What it was asked for before may be unanswered still.
    pub(super) fn asked(&self) {
        let mut seen = lock(&self.0);
        seen.was_looked_at = true;
        if matches!(seen.heard, Heard::All) {
            seen.heard = Heard::Asked(Instant::now());
        }
    }

    /// It answers, be it because it is in this process.
    pub fn heard(&self) {
        lock(&self.0).heard = Heard::All;
    }

    /// The statement has its answer.
    pub fn end(&self) {
        *lock(&self.0) = Seen::default();
    }

    /// Of the statement that was given up last, which has waited since then.
    pub fn take(&self, since: Instant) -> GivenUp {
        let Seen {
            wait,
            heard,
            was_looked_at,
        } = mem::take(&mut *lock(&self.0));
        let silence = match heard {
            Heard::Nothing => since.elapsed(),
            Heard::Asked(at) => at.elapsed(),
            Heard::All => Duration::ZERO,
        };
        GivenUp {
            wait,
            silence,
            was_looked_at,
        }
    }
}
