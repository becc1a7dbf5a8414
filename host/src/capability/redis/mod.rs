//! Stub.
use super::StoreError;
use crate::pipeline::{RedisGrant, RedisStore};
use std::collections::BTreeMap;
use std::sync::Arc;
/// d
#[derive(Clone)]
pub struct Store;
impl Store {
    /// d
    pub async fn open(_settings: &RedisStore) -> Result<Self, StoreError> {
        Ok(Self)
    }
    /// d
    pub async fn get(&self, _key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(None)
    }
}
/// d
pub type RedisGrants = BTreeMap<String, (Store, RedisGrant)>;
/// d
pub struct RedisCtx;
impl RedisCtx {
    /// d
    pub fn new(_: Arc<RedisGrants>) -> Self {
        Self
    }
    /// d
    pub fn take_denied(&mut self) -> Option<String> {
        None
    }
}
/// d
pub struct RedisView<'a> {
    /// d
    pub ctx: &'a mut RedisCtx,
    /// d
    pub table: &'a mut wasmtime::component::ResourceTable,
}
/// d
pub fn add_to_linker<T: Send + 'static>(
    _: &mut wasmtime::component::Linker<T>,
    _: fn(&mut T) -> RedisView<'_>,
) -> wasmtime::Result<()> {
    Ok(())
}
