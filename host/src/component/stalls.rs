//! How long this process stood still: stopped, suspended with its machine, or kept from its processors. A call that was under way
//! meanwhile has not had that time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a thread that sleeps may oversleep by itself.
const SLACK: Duration = Duration::from_millis(100);
/// How long the thread that notes stalls may take to do so, once it goes on.
const NOTING: Duration = Duration::from_millis(50);

/// All stalls so far. A thread that does nothing but sleep notes them.
#[derive(Default)]
pub(super) struct Stalls(AtomicU64);

impl Stalls {
    /// A sleep took so much longer than it was meant to.
    pub(super) fn note(&self, overslept: Duration) {
        if overslept > SLACK {
            let millis = u64::try_from(overslept.as_millis()).unwrap_or(u64::MAX);
            self.0.fetch_add(millis, Ordering::Relaxed);
        }
    }

    fn total(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }

    /// The work's outcome, or `None` where it has not ended in `limit`, stalls not counted. Dropped then.
    pub(super) async fn within<T>(
        &self,
        limit: Duration,
        work: impl Future<Output = T>,
    ) -> Option<T> {
        let mut work = std::pin::pin!(work);
        let mut left = limit;
        loop {
            let (began, before) = (Instant::now(), self.total());
            // Polled in place, so nothing of the work is lost at a timeout.
            if let Ok(outcome) = tokio::time::timeout(left, &mut work).await {
                return Some(outcome);
            }
            if began.elapsed() > left + SLACK {
                // A late timer is a sign of a stall, which may not be noted yet.
                if let Ok(outcome) = tokio::time::timeout(NOTING, &mut work).await {
                    return Some(outcome);
                }
            }
            left = self.total().saturating_sub(before);
            if left.is_zero() {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_takes_too_long_is_given_up() {
        let stalls = Stalls::default();
        let limit = Duration::from_secs(1);
        assert_eq!(stalls.within(limit, std::future::ready(1)).await, Some(1));
        let endless = std::future::pending::<()>();
        assert_eq!(stalls.within(limit, endless).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stall_does_not_count() {
        let stalls = Stalls::default();
        let work = async {
            tokio::time::sleep(Duration::from_millis(900)).await;
            stalls.note(Duration::from_secs(8));
            tokio::time::sleep(Duration::from_secs(8)).await;
            7
        };
        assert_eq!(stalls.within(Duration::from_secs(1), work).await, Some(7));
        stalls.note(SLACK);
        let late = tokio::time::sleep(Duration::from_secs(2));
        assert_eq!(stalls.within(Duration::from_secs(1), late).await, None);
    }
}
