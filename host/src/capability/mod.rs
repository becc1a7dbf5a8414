//! What stages may use: one file (or folder) a WIT interface, with one `add_to_linker` each.

pub mod logging;
pub mod producer;
pub mod redis;
pub mod sql;

use std::collections::BTreeMap;

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
        let granted = |(name, _): &(&String, &sql::Database)| stage.sql.contains(name);
        let databases = self.sql.iter().filter(granted);
        sql::SqlGrants::new(
            databases
                .map(|(name, database)| (name.clone(), database.clone()))
                .collect(),
        )
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
