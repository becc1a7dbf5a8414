//! The newest offset of each key, in memory that is bounded.

use std::collections::HashMap;

use sha2::{Digest, Sha256};

/// A key is known by so much of its hash: that two had the same is less likely than a fault of the memory.
const HASH_LEN: usize = 16;

/// Newest offsets by the hash of the key.
#[derive(Debug)]
pub(super) struct LatestKeys {
    by_hash: HashMap<[u8; HASH_LEN], i64>,
    max: usize,
}

impl LatestKeys {
    pub(super) fn with_room_for(max: usize) -> Self {
        Self {
            by_hash: HashMap::new(),
            max,
        }
    }

    /// Notes where a key is; offsets rise. `false`: there is no room for one more key.
    pub(super) fn note(&mut self, key: &[u8], offset: i64) -> bool {
        let hash = hash(key);
        if self.by_hash.len() < self.max {
            self.by_hash.insert(hash, offset);
            return true;
        }
        match self.by_hash.get_mut(&hash) {
            Some(known) => *known = offset,
            None => return false,
        }
        true
    }

    /// Whether no newer record of the key is known.
    pub(super) fn is_latest(&self, key: &[u8], offset: i64) -> bool {
        self.by_hash
            .get(&hash(key))
            .is_none_or(|latest| offset >= *latest)
    }
}

fn hash(key: &[u8]) -> [u8; HASH_LEN] {
    let mut hash = [0; HASH_LEN];
    hash.copy_from_slice(&Sha256::digest(key)[..HASH_LEN]);
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_beyond_the_room_are_not_known_and_those_within_it_go_on() {
        let mut keys = LatestKeys::with_room_for(2);
        assert!(keys.note(b"a", 0) && keys.note(b"b", 1));
        assert!(!keys.note(b"c", 2));
        assert!(keys.note(b"a", 3));
        let latest = [("a", 0), ("a", 3), ("b", 1), ("c", 2)]
            .map(|(key, offset)| keys.is_latest(key.as_bytes(), offset));
        assert_eq!(latest, [false, true, true, true]);
    }
}
