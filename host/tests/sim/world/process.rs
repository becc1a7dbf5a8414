//! A host's process: it crashes, it stands still for a while, and a new one takes its place.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::trace::Subject;
use super::{World, lock};

/// Clones are the same process.
#[derive(Clone)]
pub(crate) struct Process(Arc<State>);

struct State {
    world: World,
    number: u32,
    dead: AtomicBool,
    killed: CancellationToken,
    frozen_until: Mutex<Option<Instant>>,
}

impl Process {
    /// Numbers are from 1, and no two processes have the same.
    pub(crate) fn new(world: World, number: u32) -> Self {
        Self(Arc::new(State {
            world,
            number,
            dead: AtomicBool::new(false),
            killed: CancellationToken::new(),
            frozen_until: Mutex::default(),
        }))
    }

    pub(crate) fn world(&self) -> &World {
        &self.0.world
    }

    pub(crate) fn number(&self) -> u32 {
        self.0.number
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.0.dead.load(Ordering::Relaxed)
    }

    /// Cancelled by the crash: all that runs in the process is to be dropped.
    pub(crate) fn killed(&self) -> &CancellationToken {
        &self.0.killed
    }

    pub(crate) fn crash(&self) {
        if !self.0.dead.swap(true, Ordering::Relaxed) {
            self.note("crash", Subject::None, [0, 0]);
            self.0.killed.cancel();
        }
    }

    pub(crate) fn freeze(&self, milliseconds: u64) {
        self.note("freeze", Subject::None, [milliseconds.cast_signed(), 0]);
        *lock(&self.0.frozen_until) = Some(Instant::now() + Duration::from_millis(milliseconds));
    }

    pub(crate) fn thaw(&self) {
        *lock(&self.0.frozen_until) = None;
    }

    /// A step at the edge of the process, where it may crash. Never returns in one that is dead.
    pub(crate) async fn point(&self, what: &'static str) {
        loop {
            if self.is_dead() {
                return std::future::pending().await;
            }
            let until = *lock(&self.0.frozen_until);
            match until {
                Some(until) if until > Instant::now() => tokio::time::sleep_until(until).await,
                _ => break,
            }
        }
        if self.world().pass_point(self) {
            self.note("crashes at", Subject::Name(what.into()), [0, 0]);
            self.crash();
            std::future::pending().await
        }
    }

    pub(crate) fn note(&self, what: &'static str, subject: Subject, numbers: [i64; 2]) {
        self.world().note(self.number(), what, subject, numbers);
    }
}
