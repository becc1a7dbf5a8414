//! What stages may use: one file (or folder) a WIT interface, with one `add_to_linker` each.

pub mod logging;
pub mod producer;
pub mod redis;
pub mod sql;
mod tls;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use self::logging::{LogCtx, Place};
use crate::pipeline;
use crate::sync::lock;

/// For so long a store answers nobody before a call's time is up, or for half of that, and the call is not to blame.
const SILENCE: Duration = Duration::from_millis(250);

/// Why a store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It cannot be reached, or did not answer in time. Worth another try.
    #[error("not available: {0}")]
    Unavailable(String),
    /// It answered with an error, and would again.
    #[error("{0}")]
    Refused(String),
}

/// A store of the pipeline, as messages name it: ``SQL store `posts` ``.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StoreName {
    /// One of `[sql]`.
    Sql(Arc<str>),
    /// One of `[redis]`.
    Redis(Arc<str>),
}

impl StoreName {
    /// The name that the pipeline gives it.
    pub fn name(&self) -> &str {
        match self {
            Self::Sql(name) | Self::Redis(name) => name,
        }
    }

    /// What tells it from a store of the other kind that has the same name.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Sql(_) => "sql",
            Self::Redis(_) => "redis",
        }
    }

    /// The store of the other kind that may have the same name.
    pub fn namesake(&self) -> Self {
        match self {
            Self::Sql(name) => Self::Redis(name.clone()),
            Self::Redis(name) => Self::Sql(name.clone()),
        }
    }
}

impl fmt::Display for StoreName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sql(name) => write!(f, "SQL store `{name}`"),
            Self::Redis(name) => write!(f, "Redis store `{name}`"),
        }
    }
}

/// What a store's answer speaks of. Each kind of store has a table of its codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Concern {
    /// The store's own state, or the way to it: anybody would be answered so. Lanes wait, and no message pays.
    Store,
    /// Others that were in the way just then. The message is tried again, and that counts.
    Others,
    /// What its user may do there, or what is there to do it with. Where the same had been done before, the store is not what it
    /// was, and lanes wait; else it is what the guest asked for.
    Standing,
    /// What was asked for: it would be answered so again.
    Message,
}

/// A store that did not do what a call asked of it, which is likely why the call failed.
#[derive(Clone, Debug)]
pub struct Away {
    /// Which.
    pub store: StoreName,
    /// What it is asked for until it does it again: a store that is sick answers its ping.
    pub action: Action,
    /// In its own words, as far as it had any.
    pub why: String,
    /// Nobody is known to have had an answer from it meanwhile.
    pub was_gone: bool,
}

impl Away {
    /// One that did not answer, and nobody.
    pub fn silent(store: StoreName) -> Self {
        Self {
            store,
            action: Action::Answer,
            why: "it did not answer".to_owned(),
            was_gone: true,
        }
    }

    /// Whether there is reason to doubt that the message is to blame, though the store would do it now.
    pub fn is_doubtful(&self) -> bool {
        match &self.action {
            Action::Answer => self.was_gone,
            Action::Read | Action::Write | Action::Statement(..) | Action::Command(_) => true,
            Action::Lock(wait) => self.was_gone || wait.was_seen(),
        }
    }
}

/// A kind of thing that stores do.
#[derive(Clone, Debug)]
pub enum Action {
    /// Anything.
    Answer,
    /// To read.
    Read,
    /// To write.
    Write,
    /// A statement that a database had run before, and now refuses.
    Statement(Arc<str>, Arc<[sql::Value]>),
    /// A command that Redis had run before, and now refuses.
    Command(&'static str),
    /// To let a statement have a lock that somebody else has.
    Lock(Arc<sql::LockWait>),
}

impl Action {
    /// Whether it was refused by somebody who has the right to it, or had.
    pub fn had_been_done(&self) -> bool {
        matches!(self, Self::Statement(..) | Self::Command(_))
    }

    /// Whether that it is not done says nothing of what others ask for: nobody else is to wait for it.
    pub fn is_ones_own(&self) -> bool {
        self.had_been_done() || matches!(self, Self::Lock(_))
    }

    /// How much it takes: a store that does what has a higher rank does what has a lower one, too.
    pub(crate) fn rank(&self) -> u8 {
        match self {
            Self::Answer => 0,
            Self::Read => 1,
            Self::Write => 2,
            Self::Statement(..) | Self::Command(_) | Self::Lock(_) => 3,
        }
    }
}

/// The store that an instance waits for, so that a call whose time is up while it does is put down to the store
/// and not to the guest.
pub struct Pending {
    store: Mutex<Option<(StoreName, Instant)>>,
    /// What a statement waits for, where the store is a database.
    sight: sql::Sight,
    /// It knows which record the call is about.
    log: LogCtx,
}

impl Pending {
    /// For an instance that writes into this log.
    pub fn new(log: LogCtx) -> Self {
        Self {
            store: Mutex::default(),
            sight: sql::Sight::default(),
            log,
        }
    }

    /// Where it is noted what a statement waits for.
    pub fn sight(&self) -> &sql::Sight {
        &self.sight
    }

    /// Awaits a call to the store. A call that is dropped half-way leaves the store's name behind.
    pub async fn during<T>(&self, store: StoreName, call: impl Future<Output = T>) -> T {
        self.replace(Some((store, Instant::now())));
        let answer = call.await;
        self.replace(None);
        answer
    }

    /// The store that was waited for since this was last asked, and what is known of why it did not answer a call that had so
    /// much time.
    pub fn take(&self, time: Duration) -> Option<Away> {
        let (store, since) = self.replace(None)?;
        let given_up = self.sight.take(since);
        let silent = Away {
            was_gone: given_up.silence >= SILENCE.min(time / 2),
            ..Away::silent(store)
        };
        // Where locks were looked at and nobody had an answer, there is nothing to say of one.
        let may_be_locked = |wait: &Arc<sql::LockWait>| {
            wait.was_seen() || !(silent.was_gone && given_up.was_looked_at)
        };
        let Some(wait) = given_up.wait.filter(may_be_locked) else {
            return Some(silent);
        };
        Some(Away {
            why: wait.words().unwrap_or(silent.why),
            action: Action::Lock(wait),
            ..silent
        })
    }

    fn replace(&self, store: Option<(StoreName, Instant)>) -> Option<(StoreName, Instant)> {
        std::mem::replace(&mut *lock(&self.store), store)
    }

    fn call(&self) -> Option<UnansweredCall> {
        let (store, since) = lock(&self.store).clone()?;
        let Place {
            topic, partition, ..
        } = self.log.place()?;
        Some(UnansweredCall {
            topic,
            partition,
            store,
            age: since.elapsed(),
        })
    }
}

/// A call of a stage that waits for a store.
#[derive(Clone, Debug)]
pub struct UnansweredCall {
    /// The topic of the record that it is about.
    pub topic: Arc<str>,
    /// And its partition.
    pub partition: i32,
    /// What it waits for.
    pub store: StoreName,
    /// For how long.
    pub age: Duration,
}

/// What the instances of a stage wait for.
#[derive(Default)]
pub struct Unanswered(Mutex<Vec<Weak<Pending>>>);

impl fmt::Debug for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unanswered").finish_non_exhaustive()
    }
}

impl Unanswered {
    /// For one more instance.
    pub fn pending(&self, log: &LogCtx) -> Arc<Pending> {
        let pending = Arc::new(Pending::new(log.clone()));
        let mut all = lock(&self.0);
        // Only where it would grow, so that an instance costs little however many there are.
        if all.len() == all.capacity() {
            all.retain(|pending| pending.strong_count() > 0);
        }
        all.push(Arc::downgrade(&pending));
        pending
    }

    /// Calls that wait for a store.
    pub fn calls(&self) -> Vec<UnansweredCall> {
        let all: Vec<_> = lock(&self.0).iter().filter_map(Weak::upgrade).collect();
        all.iter().filter_map(|pending| pending.call()).collect()
    }
}

/// All stores of a pipeline, open, by their names.
#[derive(Clone, Default)]
pub struct Stores {
    /// `[sql]`.
    pub sql: BTreeMap<String, sql::Database>,
    /// `[redis]`.
    pub redis: BTreeMap<String, redis::Store>,
}

impl Stores {
    /// The databases that a stage may use.
    pub fn sql_grants(&self, stage: &pipeline::Stage) -> sql::SqlGrants {
        let granted = stage.sql.iter().filter_map(|(name, access)| {
            let database = self.sql.get(name)?.granted(*access).used_by(&stage.name);
            Some((name.clone(), database))
        });
        sql::SqlGrants::new(granted.collect())
    }

    /// The key-value stores that a stage may use, each with what it may do there.
    pub fn redis_grants(&self, stage: &pipeline::Stage) -> redis::RedisGrants {
        let granted = stage.redis.iter().filter_map(|(name, grant)| {
            let store = self.redis.get(name)?;
            Some((name.clone(), (store.clone(), grant.clone())))
        });
        redis::RedisGrants::new(granted.collect())
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::time::Duration;

    use futures::FutureExt;

    use super::logging::{LogCtx, Place};
    use super::{StoreName, Unanswered};

    #[tokio::test]
    async fn only_a_call_that_is_given_up_leaves_its_store() {
        let waiting = Unanswered::default().pending(&LogCtx::new("stage".into()));
        let posts = || StoreName::Sql("posts".into());
        assert_eq!(waiting.during(posts(), ready(1)).await, 1);
        assert!(waiting.take(Duration::ZERO).is_none());
        let given_up = waiting.during(posts(), pending::<()>());
        assert_eq!(given_up.now_or_never(), None);
        assert_eq!(
            waiting.take(Duration::ZERO).map(|away| away.store),
            Some(posts())
        );
        assert!(waiting.take(Duration::ZERO).is_none());
    }

    #[tokio::test]
    async fn a_call_that_waits_is_known_by_its_record() {
        let (all, log) = (Unanswered::default(), LogCtx::new("stage".into()));
        let waiting = all.pending(&log);
        log.set_place(Place {
            topic: "in".into(),
            partition: 3,
            offset: 7,
        });
        assert!(all.calls().is_empty());
        let mut call = Box::pin(waiting.during(StoreName::Redis("cache".into()), pending::<()>()));
        assert_eq!(call.as_mut().now_or_never(), None);
        let calls = all.calls();
        assert_eq!((&*calls[0].topic, calls[0].partition), ("in", 3));
        drop(call);
        drop(waiting);
        assert!(all.calls().is_empty());
    }
}
