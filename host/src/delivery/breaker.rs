//! The circuit breaker: while a store is away, lanes wait for it, and no message pays for it.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::Mutex;
use tracing::{info, warn};

use super::retry::backoff;
use crate::admin::Readiness;
use crate::capability::{StoreError, StoreName};
use crate::metrics::Metrics;
use crate::pipeline::Retry;

/// How a store that is away is asked for again.
const PATIENCE: Retry = Retry {
    max_attempts: u32::MAX,
    initial: Duration::from_millis(200),
    max: Duration::from_secs(5),
};
/// How long a store may take to answer that it is there.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// It is said again that a store is away after so many probes.
const REMIND_EVERY: u32 = 10;

/// One for all stages of a host: a store that is away for one is away for all.
pub struct Breaker {
    readiness: Arc<Readiness>,
    metrics: Arc<Metrics>,
    stores: BTreeMap<StoreName, Watch>,
    /// Jitters waits; seeded, so that a simulation can be repeated.
    rng: std::sync::Mutex<StdRng>,
}

#[derive(Default)]
struct Watch {
    /// Whoever holds it asks for the store; the others wait for it.
    asking: Mutex<()>,
    /// How often the store went away or came back: odd while it is away.
    changes: AtomicU64,
}

impl Watch {
    fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// To be called by who asks.
    fn set_away(&self, away: bool) {
        if is_away(self.changes()) != away {
            self.changes.fetch_add(1, Ordering::AcqRel);
        }
    }
}

fn is_away(changes: u64) -> bool {
    changes % 2 == 1
}

impl Breaker {
    /// For these stores. Its waits are jittered by `seed`.
    pub fn new(
        stores: impl IntoIterator<Item = StoreName>,
        readiness: Arc<Readiness>,
        metrics: Arc<Metrics>,
        seed: u64,
    ) -> Self {
        let stores: BTreeMap<_, _> = stores
            .into_iter()
            .map(|store| (store, Watch::default()))
            .collect();
        for store in stores.keys() {
            metrics.set_circuit_open(store.name(), false);
        }
        Self {
            readiness,
            metrics,
            stores,
            rng: std::sync::Mutex::new(StdRng::seed_from_u64(seed)),
        }
    }

    /// The condition under which `/readyz` has the store.
    pub fn condition(store: &str) -> String {
        format!("store {store}")
    }

    /// Returns once the store answers, and whether it had been away; at once for one that it does not know.
    ///
    /// Cancel-safe: the next one who waits asks on; if there is none, nobody waits for the store any more, and it is not
    /// said to be away.
    pub async fn until_there<F>(&self, store: &StoreName, probe: impl Fn() -> F) -> bool
    where
        F: Future<Output = Result<(), StoreError>>,
    {
        let Some(watch) = self.stores.get(store) else {
            return false;
        };
        let before = watch.changes();
        let _asking = watch.asking.lock().await;
        let now = watch.changes();
        if now != before && !is_away(now) {
            // Another one has asked, and seen it come back.
            return true;
        }
        let condition = Self::condition(store.name());
        let said = Said {
            breaker: self,
            watch,
            store: store.name(),
            condition: &condition,
        };
        let mut tries = 1;
        loop {
            let answer = tokio::time::timeout(PROBE_TIMEOUT, probe()).await;
            let why = match answer {
                Ok(Err(StoreError::Unavailable(why))) => why,
                Err(_) => format!("no answer within {} s", PROBE_TIMEOUT.as_secs()),
                // One that refuses answers, whatever it says.
                Ok(Ok(()) | Err(StoreError::Refused(_))) => break,
            };
            let wait = self.wait(tries);
            if tries % REMIND_EVERY == 1 {
                warn!("{store} is away, its lanes wait for it, next try in {wait:.1?}: {why}");
            }
            watch.set_away(true);
            self.readiness.not_ready(&condition, why);
            self.metrics.set_circuit_open(store.name(), true);
            tries = tries.saturating_add(1);
            tokio::time::sleep(wait).await;
        }
        if tries > 1 {
            info!("{store} is there again");
        }
        drop(said);
        tries > 1 || is_away(before)
    }

    fn wait(&self, tries: u32) -> Duration {
        let mut rng = self.rng.lock().unwrap_or_else(PoisonError::into_inner);
        backoff(&PATIENCE, tries, &mut *rng)
    }
}

/// What is said of a store while somebody asks for it; taken back when that one is done, or is dropped.
struct Said<'a> {
    breaker: &'a Breaker,
    watch: &'a Watch,
    store: &'a str,
    condition: &'a str,
}

impl Drop for Said<'_> {
    fn drop(&mut self) {
        self.watch.set_away(false);
        self.breaker.readiness.ready(self.condition);
        self.breaker.metrics.set_circuit_open(self.store, false);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn breaker(readiness: &Arc<Readiness>) -> (Breaker, StoreName) {
        let store = StoreName::Sql(Arc::from("posts"));
        let breaker = Breaker::new([store.clone()], readiness.clone(), Arc::default(), 1);
        (breaker, store)
    }

    #[tokio::test(start_paused = true)]
    async fn waits_for_a_store_that_is_away_and_says_so() {
        let readiness = Arc::<Readiness>::default();
        let (breaker, store) = breaker(&readiness);
        let asked = AtomicU32::new(0);
        let probe = || async {
            match asked.fetch_add(1, Ordering::Relaxed) {
                0..3 => Err(StoreError::Unavailable("gone".into())),
                _ => Ok(()),
            }
        };
        {
            let waiting = breaker.until_there(&store, probe);
            tokio::pin!(waiting);
            assert!(futures::poll!(&mut waiting).is_pending());
            assert_eq!(readiness.reasons(), ["store posts: gone"]);
            assert!(waiting.await, "it was away");
        }
        assert_eq!(readiness.reasons(), Vec::<String>::new());
        assert!(!breaker.until_there(&store, probe).await, "it is there");
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_nobody_waits_for_is_not_said_to_be_away() {
        let readiness = Arc::<Readiness>::default();
        let (breaker, store) = breaker(&readiness);
        let probe = || async { Err(StoreError::Unavailable("gone".into())) };
        {
            let waiting = breaker.until_there(&store, probe);
            tokio::pin!(waiting);
            assert!(futures::poll!(&mut waiting).is_pending());
            assert_eq!(readiness.reasons(), ["store posts: gone"]);
        }
        assert_eq!(readiness.reasons(), Vec::<String>::new());
    }

    #[tokio::test(start_paused = true)]
    async fn it_had_been_away_for_all_who_waited() {
        let (breaker, store) = breaker(&Arc::default());
        let asked = AtomicU32::new(0);
        let probe = || async {
            match asked.fetch_add(1, Ordering::Relaxed) {
                0..3 => Err(StoreError::Unavailable("gone".into())),
                _ => Ok(()),
            }
        };
        let wait = || breaker.until_there(&store, probe);
        {
            let first = wait();
            tokio::pin!(first);
            assert!(futures::poll!(&mut first).is_pending());
            let others = futures::future::join_all((0..9).map(|_| wait()));
            let (first, others) = tokio::join!(first, others);
            assert!(first && others.iter().all(|was_away| *was_away));
        }
        assert_eq!(asked.load(Ordering::Relaxed), 4, "one asks for all");
        {
            asked.store(2, Ordering::Relaxed);
            let given_up = wait();
            tokio::pin!(given_up);
            assert!(futures::poll!(&mut given_up).is_pending());
        }
        assert!(wait().await, "another one goes on with it");
        assert!(!wait().await);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_does_not_answer_is_away_and_one_that_refuses_is_not() {
        let readiness = Arc::<Readiness>::default();
        let (breaker, store) = breaker(&readiness);
        let asked = AtomicU32::new(0);
        let probe = || async {
            if asked.fetch_add(1, Ordering::Relaxed) == 0 {
                std::future::pending::<()>().await;
            }
            Err(StoreError::Refused("no such table".into()))
        };
        assert!(breaker.until_there(&store, probe).await);
        assert!(!breaker.until_there(&store, probe).await);
    }
}
