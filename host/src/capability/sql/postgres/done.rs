//! Statements that a database has run for this host: what it refuses of them later, it is not what it was.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Texts that are remembered. Of more, the rest is taken for new.
const MAX_TEXTS: usize = 10_000;

/// Their texts, by hash.
#[derive(Default)]
pub(super) struct Done(Mutex<HashSet<u64>>);

impl Done {
    pub(super) fn add(&self, hash: u64) {
        let mut hashes = self.hashes();
        if hashes.len() < MAX_TEXTS {
            hashes.insert(hash);
        }
    }

    pub(super) fn contains(&self, text: &str) -> bool {
        self.hashes().contains(&hash(text))
    }

    fn hashes(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}
