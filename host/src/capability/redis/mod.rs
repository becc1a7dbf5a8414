//! `stagehost:stage/redis`: key-value stores, on Redis or on a store inside this process.

use super::StoreError;
use crate::pipeline::RedisStore;

/// An open store. Clones share it.
#[derive(Clone)]
pub struct Store;

impl Store {
    /// Opens the store; for a Redis server, connects to it.
    pub async fn open(_settings: &RedisStore) -> Result<Self, StoreError> {
        Ok(Self)
    }

    /// The value at a key.
    pub async fn get(&self, _key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(None)
    }
}
