//! The time in which the host runs. A deadline counts in it: a process that was stopped, or whose machine slept or was too
//! busy to run it, has not given a call its time, and the message would pay for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::Poll;
use std::time::Duration;

use tokio::time::timeout;

/// How often it ticks.
pub(super) const TICK: Duration = Duration::from_millis(10);

/// A clock that somebody ticks.
#[derive(Clone, Default)]
pub(super) struct Clock(Arc<AtomicU32>);

impl Clock {
    pub(super) fn tick(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// The call's answer; `None`, and the call dropped, when it has had its time.
    pub(super) async fn within<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = T>,
    ) -> Option<T> {
        let mut call = std::pin::pin!(call);
        // Most calls wait for nothing, and need no timer; and many of them in a row are no reason to keep the thread.
        tokio::task::coop::consume_budget().await;
        if let Poll::Ready(answer) = futures::poll!(call.as_mut()) {
            return Some(answer);
        }
        let since = self.0.load(Ordering::Relaxed);
        let mut wait = limit;
        while !wait.is_zero() {
            if let Ok(answer) = timeout(wait, call.as_mut()).await {
                return Some(answer);
            }
            let ticks = self.0.load(Ordering::Relaxed).wrapping_sub(since);
            wait = limit.saturating_sub(TICK.saturating_mul(ticks));
        }
        None
    }
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
        let answer = clock.within(LIMIT, tokio::time::sleep(call)).await;
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
