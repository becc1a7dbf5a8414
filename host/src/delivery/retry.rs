//! When a message is delivered again.

use std::time::Duration;

use rand::Rng;

use crate::pipeline::Retry;

/// How long to wait after the `attempt`th delivery (from 1) failed: exponential, with "full jitter"
/// over its upper half so that stages that failed together do not come back together.
pub fn backoff(policy: &Retry, attempt: u32, rng: &mut impl Rng) -> Duration {
    let doublings = attempt.saturating_sub(1).min(31);
    let ceiling = policy
        .initial
        .saturating_mul(1 << doublings)
        .min(policy.max);
    ceiling.mul_f64(rng.random_range(0.5..=1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_longest_wait() {
        let policy = Retry {
            max_attempts: 9,
            initial: Duration::from_millis(100),
            max: Duration::from_secs(1),
        };
        let mut rng = rand::rng();
        for (attempt, ceiling) in [
            (1, 100),
            (2, 200),
            (3, 400),
            (4, 800),
            (5, 1000),
            (200, 1000),
        ] {
            let wait = backoff(&policy, attempt, &mut rng).as_millis();
            assert!(
                (ceiling / 2..=ceiling).contains(&wait),
                "attempt {attempt}: {wait} ms is not within half of {ceiling} ms"
            );
        }
    }
}
