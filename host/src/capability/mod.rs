//! What stages may use: one file (or folder) a WIT interface, with one `add_to_linker` each.

pub mod logging;
pub mod producer;
pub mod redis;
pub mod sql;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::pipeline;

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
}

impl fmt::Display for StoreName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sql(name) => write!(f, "SQL store `{name}`"),
            Self::Redis(name) => write!(f, "Redis store `{name}`"),
        }
    }
}

/// The store that an instance waits for, so that a call whose time is up while it does is put down to the store
/// and not to the guest.
#[derive(Default)]
pub struct Pending(Mutex<Option<StoreName>>);

impl Pending {
    /// Awaits a call to the store. A call that is dropped half-way leaves the store's name behind.
    pub async fn during<T>(&self, store: StoreName, call: impl Future<Output = T>) -> T {
        self.replace(Some(store));
        let answer = call.await;
        self.replace(None);
        answer
    }

    /// The store that was waited for since this was last asked.
    pub fn take(&self) -> Option<StoreName> {
        self.replace(None)
    }

    fn replace(&self, store: Option<StoreName>) -> Option<StoreName> {
        let mut pending = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *pending, store)
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

    use futures::FutureExt;

    use super::{Pending, StoreName};

    #[tokio::test]
    async fn only_a_call_that_is_given_up_leaves_its_store() {
        let waiting = Pending::default();
        let posts = || StoreName::Sql("posts".into());
        assert_eq!(waiting.during(posts(), ready(1)).await, 1);
        assert_eq!(waiting.take(), None);
        let given_up = waiting.during(posts(), pending::<()>());
        assert_eq!(given_up.now_or_never(), None);
        assert_eq!(waiting.take(), Some(posts()));
        assert_eq!(waiting.take(), None);
    }
}
