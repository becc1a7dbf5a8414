//! stub
use super::super::StoreError;
use super::Database;
use crate::delivery::progress::{Broken, Claim, Commit, CommitError, LaneId, Ledger, Mode};

/// stub
#[derive(Clone)]
pub struct Transaction;

impl crate::delivery::progress::Transaction for Transaction {
    fn statements(&self) -> u64 {
        0
    }
    fn broken(&self) -> Option<Broken> {
        None
    }
    async fn savepoint(&self) -> Result<(), StoreError> {
        Ok(())
    }
    async fn rollback_to_savepoint(&self) -> Result<(), StoreError> {
        Ok(())
    }
    async fn commit(self, _: Commit<'_>) -> Result<(), CommitError> {
        Ok(())
    }
    async fn rollback(self) {}
}

impl Ledger for Database {
    type Transaction = Transaction;
    async fn claim(&self, _: &LaneId) -> Result<Claim, StoreError> {
        Err(StoreError::Refused("stub".into()))
    }
    async fn reclaim(&self, _: &LaneId, _: i64) -> Result<Option<Claim>, StoreError> {
        Ok(None)
    }
    async fn begin(&self, _: Mode) -> Result<Transaction, StoreError> {
        Ok(Transaction)
    }
    async fn save(&self, _: Commit<'_>) -> Result<(), CommitError> {
        Ok(())
    }
}
