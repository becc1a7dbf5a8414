//! The circuit breaker: while a store is away, or does not do what it should, lanes wait for it, and no message pays for it.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::Mutex;
use tracing::{info, warn};

use super::retry::backoff;
use crate::capability::{Action, Away, StoreError, StoreName};
use crate::metrics::Metrics;
use crate::pipeline::Retry;
use crate::readiness::Readiness;

/// How a store that is away is asked for again.
const PATIENCE: Retry = Retry {
    max_attempts: u32::MAX,
    initial: Duration::from_millis(200),
    max: Duration::from_secs(5),
};
/// How long a store may take to answer that it is there.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// And after how long without an answer that is said.
const PROBE_NOTICE: Duration = Duration::from_secs(1);
/// It is said again that a store is away after so many probes.
const REMIND_EVERY: u32 = 10;
/// A message at which its store fails so often in a row may be what brings it down, or what it refuses: it counts from then on,
/// since a bad message must not hold its partition for ever.
pub const MAX_LOSSES: u32 = 8;
/// And from so many on, it is said of the store.
const SAID_LOSSES: u32 = 3;

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
    /// How often somebody who asked has seen it come back: who is dropped half-way has not.
    returns: AtomicU64,
    /// The rank of what it was asked for last.
    asked: AtomicU8,
    /// Who says that it does not do what it should, and why.
    voices: std::sync::Mutex<BTreeMap<u64, String>>,
    last_voice: AtomicU64,
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

    fn voices(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, String>> {
        self.voices.lock().unwrap_or_else(PoisonError::into_inner)
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
        let breaker = Self {
            readiness,
            metrics,
            stores,
            rng: std::sync::Mutex::new(StdRng::seed_from_u64(seed)),
        };
        for store in breaker.stores.keys() {
            breaker.set_open(store, false);
        }
        breaker
    }

    /// The condition under which `/readyz` has the store; with its kind where one of the other kind has the same name.
    pub fn condition(store: &StoreName, shares_name: bool) -> String {
        let name = store.name();
        match shares_name {
            true => format!("store {name} ({})", store.kind()),
            false => format!("store {name}"),
        }
    }

    fn shares_name(&self, store: &StoreName) -> bool {
        self.stores.contains_key(&store.namesake())
    }

    fn set_open(&self, store: &StoreName, open: bool) {
        let kind = self.shares_name(store).then(|| store.kind());
        self.metrics.set_circuit_open(store.name(), kind, open);
    }

    /// Returns once the store does what it did not do, and whether that was its own failing, for which no message pays; at once
    /// for one that it does not know. `losses` is how often in a row it failed at the same message, this time included; 0 where
    /// no message is to blame.
    ///
    /// Cancel-safe: the next one who waits asks on; if there is none, nobody waits for the store any more, and it is not
    /// said to be away.
    pub async fn until_there<F>(&self, away: &Away, losses: u32, probe: impl Fn() -> F) -> bool
    where
        F: Future<Output = Result<(), StoreError>>,
    {
        let Some(watch) = self.stores.get(&away.store) else {
            return false;
        };
        if away.action.is_ones_own() {
            // It may be this stage's alone: nobody else is to wait for it.
            return self.until_done(watch, away, losses, probe).await;
        }
        let (before, returns) = (watch.changes(), watch.returns.load(Ordering::Acquire));
        let asking = watch.asking.lock().await;
        let had_been_away = is_away(before) || watch.changes() != before;
        let rank = away.action.rank();
        let came_back = watch.returns.load(Ordering::Acquire) != returns;
        if came_back && rank <= watch.asked.load(Ordering::Acquire) {
            // Another one has asked, and seen it come back.
            return losses < MAX_LOSSES;
        }
        watch.asked.store(rank, Ordering::Release);
        let mut said = Said::new(self, watch, away);
        said.is_for_all = true;
        let was_away = self.ask(&mut said, probe).await;
        watch.set_away(false);
        if was_away {
            watch.returns.fetch_add(1, Ordering::AcqRel);
        }
        said.is_for_all = false;
        drop(asking);
        if was_away || had_been_away {
            return losses < MAX_LOSSES;
        }
        self.wait_though_it_does(&mut said, losses).await
    }

    /// The same of what one stage had done before. Where the store says that it would do it, that may not be all: rights that
    /// are looked at only when it is done, say.
    async fn until_done<F>(
        &self,
        watch: &Watch,
        away: &Away,
        losses: u32,
        probe: impl Fn() -> F,
    ) -> bool
    where
        F: Future<Output = Result<(), StoreError>>,
    {
        let mut said = Said::new(self, watch, away);
        if self.ask(&mut said, probe).await {
            return losses < MAX_LOSSES;
        }
        self.wait_though_it_does(&mut said, losses).await
    }

    async fn wait_though_it_does(&self, said: &mut Said<'_>, losses: u32) -> bool {
        let away = said.away;
        // It does so for the host, and yet it said of itself that it can't. A store at its limit does now and then.
        let is_its_own = away.is_doubtful() && (1..MAX_LOSSES).contains(&losses);
        if is_its_own {
            let wait = self.wait(losses);
            // One message alone may be why, so the store is not called sick at once.
            if losses >= SAID_LOSSES {
                said.say(&away.why);
                warn!(
                    "{}: refused {losses} times at one message while it does as much for the host, next try in \
                     {wait:.1?}: {}",
                    away.store, away.why
                );
            }
            tokio::time::sleep(wait).await;
        }
        is_its_own
    }

    /// Asks until it does; answers whether it did not at first.
    async fn ask<F>(&self, said: &mut Said<'_>, probe: impl Fn() -> F) -> bool
    where
        F: Future<Output = Result<(), StoreError>>,
    {
        let store = &said.away.store;
        let mut tries = 1;
        loop {
            let why = match said.answer(probe()).await {
                Ok(Err(StoreError::Unavailable(why))) => why,
                Err(_) => format!("no answer within {} s", PROBE_TIMEOUT.as_secs()),
                // One that refuses answers, whatever it says.
                Ok(Ok(()) | Err(StoreError::Refused(_))) => break,
            };
            let wait = self.wait(tries);
            if tries % REMIND_EVERY == 1 {
                let state = state(&said.away.action);
                warn!("{store} {state}, its lanes wait for it, next try in {wait:.1?}: {why}");
            }
            said.say(&why);
            tries = tries.saturating_add(1);
            tokio::time::sleep(wait).await;
        }
        if said.away_now {
            info!("{store} is there again");
        }
        said.away_now
    }

    fn wait(&self, tries: u32) -> Duration {
        let mut rng = self.rng.lock().unwrap_or_else(PoisonError::into_inner);
        backoff(&PATIENCE, tries, &mut *rng)
    }
}

/// What is wrong with a store that does not do this.
fn state(action: &Action) -> &'static str {
    match action {
        Action::Lock(wait) if wait.was_seen() => "keeps statements waiting for a lock",
        Action::Answer | Action::Lock(_) => "is away",
        Action::Read => "can't be read",
        Action::Write => "takes no writes",
        Action::Statement(..) | Action::Command(_) => "refuses what it did before",
    }
}

/// What is said of a store while somebody asks for it; taken back when that one is done, or is dropped.
struct Said<'a> {
    breaker: &'a Breaker,
    watch: &'a Watch,
    away: &'a Away,
    condition: String,
    voice: u64,
    away_now: bool,
    /// Whether the store is away to all who ask for it, and this is the one that asks it.
    is_for_all: bool,
}

impl<'a> Said<'a> {
    fn new(breaker: &'a Breaker, watch: &'a Watch, away: &'a Away) -> Self {
        Self {
            breaker,
            watch,
            away,
            condition: Breaker::condition(&away.store, breaker.shares_name(&away.store)),
            voice: watch.last_voice.fetch_add(1, Ordering::Relaxed),
            away_now: false,
            is_for_all: false,
        }
    }

    /// The store does not do what it should.
    fn say(&mut self, why: &str) {
        self.away_now = true;
        if self.is_for_all {
            self.watch.set_away(true);
        }
        self.watch.voices().insert(self.voice, why.to_owned());
        self.breaker.readiness.not_ready(&self.condition, why);
        self.breaker.set_open(&self.away.store, true);
    }

    /// What the probe answers in its time. That it takes long is said before.
    async fn answer<T>(
        &mut self,
        probe: impl Future<Output = T>,
    ) -> Result<T, tokio::time::error::Elapsed> {
        let probe = tokio::time::timeout(PROBE_TIMEOUT, probe);
        tokio::pin!(probe);
        match tokio::time::timeout(PROBE_NOTICE, &mut probe).await {
            Ok(answer) => answer,
            Err(_) => {
                let notice = PROBE_NOTICE.as_secs();
                self.say(&format!("no answer within {notice} s"));
                probe.await
            }
        }
    }
}

impl Drop for Said<'_> {
    fn drop(&mut self) {
        if self.is_for_all {
            self.watch.set_away(false);
        }
        // Held, so that nobody says something else meanwhile.
        let mut voices = self.watch.voices();
        voices.remove(&self.voice);
        match voices.values().next() {
            Some(why) => drop(self.breaker.readiness.not_ready(&self.condition, why)),
            None => {
                self.breaker.readiness.ready(&self.condition);
                self.breaker.set_open(&self.away.store, false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn breaker(readiness: &Arc<Readiness>) -> (Breaker, Away) {
        let store = StoreName::Sql(Arc::from("posts"));
        let breaker = Breaker::new([store.clone()], readiness.clone(), Arc::default(), 1);
        let away = Away {
            was_gone: false,
            ..Away::silent(store)
        };
        (breaker, away)
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
            let waiting = breaker.until_there(&store, 1, probe);
            tokio::pin!(waiting);
            assert!(futures::poll!(&mut waiting).is_pending());
            assert_eq!(readiness.reasons(), ["store posts: gone"]);
            assert!(waiting.await, "it was away");
        }
        assert_eq!(readiness.reasons(), Vec::<String>::new());
        assert!(!breaker.until_there(&store, 1, probe).await, "it is there");
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_nobody_waits_for_is_not_said_to_be_away() {
        let readiness = Arc::<Readiness>::default();
        let (breaker, store) = breaker(&readiness);
        let probe = || async { Err(StoreError::Unavailable("gone".into())) };
        {
            let waiting = breaker.until_there(&store, 1, probe);
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
        let wait = || breaker.until_there(&store, 1, probe);
        {
            let first = wait();
            tokio::pin!(first);
            assert!(futures::poll!(&mut first).is_pending());
            let others = futures::future::join_all((0..9).map(|_| wait()));
            let (first, others) = tokio::join!(first, others);
            assert!(first && others.iter().all(|was_away| *was_away));
        }
        assert_eq!(asked.load(Ordering::Relaxed), 4, "one asks for all");
        asked.store(2, Ordering::Relaxed);
        let other = wait();
        tokio::pin!(other);
        {
            let given_up = wait();
            tokio::pin!(given_up);
            assert!(futures::poll!(&mut given_up).is_pending());
            assert!(futures::poll!(&mut other).is_pending());
        }
        assert!(other.await, "another one goes on with it");
        assert_eq!(asked.load(Ordering::Relaxed), 4, "and asks");
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
        assert!(breaker.until_there(&store, 1, probe).await);
        assert!(!breaker.until_there(&store, 1, probe).await);
    }

    /// A store at its limit refuses now and then. A message that it alone refuses holds its partition for a while only.
    #[tokio::test(start_paused = true)]
    async fn what_it_refuses_while_it_does_as_much_for_the_host_counts_after_a_while() {
        let readiness = Arc::<Readiness>::default();
        let (breaker, mut away) = breaker(&readiness);
        away.action = Action::Write;
        away.why = "OOM".to_owned();
        let probe = || async { Ok(()) };
        for losses in 1..MAX_LOSSES {
            let waiting = breaker.until_there(&away, losses, probe);
            tokio::pin!(waiting);
            assert!(futures::poll!(&mut waiting).is_pending());
            let said = match losses < SAID_LOSSES {
                true => vec![],
                false => vec!["store posts: OOM"],
            };
            assert_eq!(readiness.reasons(), said, "{losses} times");
            assert!(waiting.await, "{losses} times");
            assert!(readiness.reasons().is_empty());
        }
        assert!(!breaker.until_there(&away, MAX_LOSSES, probe).await);
        let no_message = breaker.until_there(&away, 0, probe).await;
        assert!(!no_message, "nobody waits where no message is to blame");
        let command = Away {
            action: Action::Command("SET"),
            ..away.clone()
        };
        let silent = Away::silent(away.store);
        for doubtful in [command, silent] {
            assert!(breaker.until_there(&doubtful, 1, probe).await);
            assert!(!breaker.until_there(&doubtful, MAX_LOSSES, probe).await);
        }
    }

    /// What one stage had done before, and may not do any more, holds nobody else.
    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_right_of_its_own_keeps_nobody_waiting() {
        let readiness = Arc::<Readiness>::default();
        let (breaker, away) = breaker(&readiness);
        let refused = Away {
            action: Action::Command("SET"),
            ..away.clone()
        };
        let never = || async { Err(StoreError::Unavailable("NOPERM".into())) };
        let waiting = breaker.until_there(&refused, 1, never);
        {
            tokio::pin!(waiting);
            assert!(futures::poll!(&mut waiting).is_pending());
            assert!(!breaker.until_there(&away, 1, || async { Ok(()) }).await);
            assert_eq!(
                readiness.reasons(),
                ["store posts: NOPERM"],
                "it still waits"
            );
        }
        assert_eq!(readiness.reasons(), Vec::<String>::new());
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_brings_its_store_down_counts_after_a_while() {
        let (breaker, away) = breaker(&Arc::default());
        for (losses, is_its_own) in [
            (0, true),
            (1, true),
            (MAX_LOSSES - 1, true),
            (MAX_LOSSES, false),
        ] {
            let asked = AtomicU32::new(0);
            let probe = || async {
                match asked.fetch_add(1, Ordering::Relaxed) {
                    0 => Err(StoreError::Unavailable("gone".into())),
                    _ => Ok(()),
                }
            };
            let waited = breaker.until_there(&away, losses, probe).await;
            assert_eq!(waited, is_its_own, "{losses} times");
        }
    }

    /// Who waits to write does not take it for an answer that another one can read again.
    #[tokio::test(start_paused = true)]
    async fn what_takes_more_is_asked_for_by_itself() {
        let (breaker, away) = breaker(&Arc::default());
        let reading = Away {
            action: Action::Read,
            ..away.clone()
        };
        let writing = Away {
            action: Action::Write,
            ..away
        };
        let (reads, writes) = (AtomicU32::new(0), AtomicU32::new(0));
        let twice = |asked: &AtomicU32| match asked.fetch_add(1, Ordering::Relaxed) {
            0 => Err(StoreError::Unavailable("gone".into())),
            _ => Ok(()),
        };
        let read = breaker.until_there(&reading, 1, || async { twice(&reads) });
        let write = breaker.until_there(&writing, 1, || async { twice(&writes) });
        let both = tokio::join!(read, write);
        assert_eq!(both, (true, true));
        assert_eq!(writes.load(Ordering::Relaxed), 2, "it was asked for itself");
    }

    #[tokio::test(start_paused = true)]
    async fn stores_of_one_name_are_told_apart() {
        let (readiness, metrics) = (Arc::<Readiness>::default(), Arc::<Metrics>::default());
        let sql = StoreName::Sql("posts".into());
        let (redis, alone) = (sql.namesake(), StoreName::Redis("cache".into()));
        let stores = [sql.clone(), redis.clone(), alone.clone()];
        let breaker = Breaker::new(stores, readiness.clone(), metrics.clone(), 1);
        let gone = || async { Err(StoreError::Unavailable("gone".into())) };
        let (redis, alone) = (Away::silent(redis), Away::silent(alone));
        let waits = [&redis, &alone].map(|away| breaker.until_there(away, 1, gone));
        let mut all = Box::pin(futures::future::join_all(waits));
        assert!(futures::poll!(&mut all).is_pending());
        assert_eq!(
            readiness.reasons(),
            ["store cache: gone", "store posts (redis): gone"]
        );
        let text = metrics.encode().expect("metrics");
        for line in [
            r#"stagehost_circuit_open{store="cache"} 1"#,
            r#"stagehost_circuit_open{store="posts",kind="redis"} 1"#,
            r#"stagehost_circuit_open{store="posts",kind="sql"} 0"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_takes_long_is_said() {
        let readiness = Arc::<Readiness>::default();
        let (breaker, away) = breaker(&readiness);
        let probe = || async {
            tokio::time::sleep(PROBE_NOTICE * 2).await;
            Ok(())
        };
        let waiting = breaker.until_there(&away, 1, probe);
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        tokio::time::advance(PROBE_NOTICE + Duration::from_millis(1)).await;
        assert!(futures::poll!(&mut waiting).is_pending());
        assert_eq!(readiness.reasons(), ["store posts: no answer within 1 s"]);
        assert!(waiting.await);
        assert!(readiness.reasons().is_empty());
    }
}
