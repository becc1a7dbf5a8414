//! A stage's share of the processor.
//!
//! Most calls are over within microseconds and run where their lane does. One that computes for longer than a slice would
//! keep that thread from everybody else, and a few of them all threads, the I/O driver with them. So from then on it is
//! run in turns with those of other stages, on threads that the runtime replaces meanwhile. A stage whose calls did so lately
//! begins its next ones there.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::{block_in_place, coop};
use tokio::time::timeout;
use wasmtime::UpdateDeadline;

use super::clock::{Clock, TICK};
use super::turns::{StageId, Turns};

/// Processor time that a guest may take before others get their turn.
const SLICE: Duration = Duration::from_millis(4);
/// Epochs between two looks at it.
pub(super) const EPOCHS_PER_LOOK: u64 = 1;
/// For a slice that one of its calls used up, a stage's calls begin in turns for so long.
const PENALTY: Duration = SLICE.saturating_mul(5);
/// However many they were.
const MAX_PENALTY: Duration = Duration::from_secs(1);

/// A stage's share.
pub(super) struct Share {
    clock: Clock,
    turns: Arc<Turns>,
    stage: StageId,
    /// The tick until which its calls begin in turns.
    in_turns_until: AtomicU32,
}

/// What a guest has used of its slice, in the poll that is going on on this thread.
#[derive(Clone, Copy, Default)]
struct Used {
    /// The thread's processor time at the poll's first tick.
    since: Option<Duration>,
    all: bool,
}

thread_local! {
    static USED: Cell<Used> = const { Cell::new(Used { since: None, all: false }) };
}

/// What an instance's epoch callback answers: the guest goes on until its slice is used up. Processor time, since a thread
/// that the system did not run has used nothing. Threads that wait for this processor run first: by itself a system lets them
/// wait until its own tick, four milliseconds on many.
pub(super) fn look() -> UpdateDeadline {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    let now = Duration::try_from(now).unwrap_or_default();
    let used = USED.get();
    let since = used.since.unwrap_or(now);
    let all = now.saturating_sub(since) >= SLICE;
    USED.set(Used {
        since: Some(since),
        all,
    });
    match all {
        true => UpdateDeadline::Yield(EPOCHS_PER_LOOK),
        false => {
            std::thread::yield_now();
            UpdateDeadline::Continue(EPOCHS_PER_LOOK)
        }
    }
}

impl Share {
    pub(super) fn new(clock: Clock, turns: Arc<Turns>) -> Self {
        Self {
            in_turns_until: AtomicU32::new(clock.now()),
            clock,
            stage: turns.stage(),
            turns,
        }
    }

    /// The call's answer; `None`, and the call dropped, when it has had its time.
    pub(super) async fn within<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = T>,
    ) -> Option<T> {
        let mut call = pin!(call);
        // Most calls wait for nothing, and need no timer; and many of them in a row are no reason to keep the thread.
        coop::consume_budget().await;
        if !self.is_in_turns() {
            let first = poll_fn(|cx| Poll::Ready(self.poll(call.as_mut(), cx))).await;
            if let Poll::Ready(answer) = first {
                return Some(answer);
            }
        }
        let since = self.clock.now();
        let mut call = pin!(self.run(call));
        let mut wait = limit;
        while !wait.is_zero() {
            if let Ok(answer) = timeout(wait, call.as_mut()).await {
                return Some(answer);
            }
            let ticks = self.clock.now().wrapping_sub(since);
            wait = limit.saturating_sub(TICK.saturating_mul(ticks));
        }
        None
    }

    /// Runs a call, in turns where it must. Dropping it drops a turn with it.
    async fn run<T>(&self, mut call: Pin<&mut impl Future<Output = T>>) -> T {
        loop {
            let polled = match self.is_in_turns() {
                true => {
                    let _turn = self.turns.take(self.stage).await;
                    poll_fn(|cx| Poll::Ready(self.poll_apart(call.as_mut(), cx))).await
                }
                false => poll_fn(|cx| Poll::Ready(self.poll(call.as_mut(), cx))).await,
            };
            if let Poll::Ready(answer) = polled {
                return answer;
            }
            until_woken().await;
        }
    }

    fn poll<T>(&self, call: Pin<&mut impl Future<Output = T>>, cx: &mut Context<'_>) -> Poll<T> {
        USED.set(Used::default());
        let polled = call.poll(cx);
        if USED.get().all {
            self.penalize();
        }
        polled
    }

    /// The runtime gives what else this thread had to do to another one.
    fn poll_apart<T>(
        &self,
        call: Pin<&mut impl Future<Output = T>>,
        cx: &mut Context<'_>,
    ) -> Poll<T> {
        // A runtime of one thread, as tests have it, has none to give it to.
        match Handle::current().runtime_flavor() {
            RuntimeFlavor::CurrentThread => self.poll(call, cx),
            _ => block_in_place(|| self.poll(call, cx)),
        }
    }

    fn is_in_turns(&self) -> bool {
        self.left(self.clock.now()) > 0
    }

    /// Ticks until calls do not begin in turns any more. Ticks wrap, so what is further off than it may be is long over.
    fn left(&self, now: u32) -> u32 {
        let until = self.in_turns_until.load(Ordering::Relaxed);
        let left = until.wrapping_sub(now);
        if left <= ticks(MAX_PENALTY) { left } else { 0 }
    }

    fn penalize(&self) {
        let now = self.clock.now();
        let left = (self.left(now) + ticks(PENALTY)).min(ticks(MAX_PENALTY));
        (self.in_turns_until).store(now.wrapping_add(left), Ordering::Relaxed);
    }
}

const fn ticks(time: Duration) -> u32 {
    (time.as_millis() / TICK.as_millis()) as u32
}

/// Lets the task rest until somebody wakes it, as the call that was just polled has arranged.
async fn until_woken() {
    let mut rested = false;
    poll_fn(|_| match std::mem::replace(&mut rested, true) {
        true => Poll::Ready(()),
        false => Poll::Pending,
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(100);

    /// What a call of some length comes to when the clock ticks once in so much time.
    async fn check(tick: Duration, call: Duration, expected: Option<()>) {
        let clock = Clock::default();
        let ticking = clock.clone();
        let ticker = tokio::spawn(async move {
            loop {
                tokio::time::sleep(tick).await;
                ticking.tick();
            }
        });
        let answer = Share::new(clock, Turns::new())
            .within(LIMIT, tokio::time::sleep(call))
            .await;
        assert_eq!(answer, expected, "{call:?}, a tick in {tick:?}");
        ticker.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_has_its_time_and_no_more() {
        check(TICK, LIMIT / 2, Some(())).await;
        check(TICK, LIMIT * 2, None).await;
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_the_host_did_not_run_does_not_count() {
        check(TICK * 10, LIMIT * 5, Some(())).await;
        check(TICK * 10, LIMIT * 20, None).await;
    }
}
