//! Stub.
use super::StoreError;
use crate::pipeline::SqlStore;
use std::collections::BTreeMap;
use std::sync::Arc;
/// d
#[derive(Clone)]
pub struct Database;
impl Database {
    /// d
    pub async fn open(_settings: &SqlStore) -> Result<Self, StoreError> {
        Ok(Self)
    }
    /// d
    pub async fn close(&self) {}
}
/// d
pub type SqlGrants = BTreeMap<String, Database>;
/// d
pub struct SqlCtx;
impl SqlCtx {
    /// d
    pub fn new(_: Arc<SqlGrants>) -> Self {
        Self
    }
    /// d
    pub fn take_denied(&mut self) -> Option<String> {
        None
    }
}
/// d
pub struct SqlView<'a> {
    /// d
    pub ctx: &'a mut SqlCtx,
    /// d
    pub table: &'a mut wasmtime::component::ResourceTable,
}
/// d
pub fn add_to_linker<T: Send + 'static>(
    _: &mut wasmtime::component::Linker<T>,
    _: fn(&mut T) -> SqlView<'_>,
) -> wasmtime::Result<()> {
    Ok(())
}
