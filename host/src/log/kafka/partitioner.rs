//! Which partition a record belongs into, as Java's clients and librdkafka's `murmur2_random` choose.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the number of a topic's partitions is taken for granted, as librdkafka takes it.
const KNOWN_FOR: Duration = Duration::from_secs(300);
/// The seed of Kafka's `DefaultPartitioner`.
const SEED: u32 = 0x9747_b28c;

/// How many partitions a topic has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Count {
    Fresh(i32),
    /// It may have more by now.
    Old(i32),
}

/// Chooses partitions; knows how many the topics have for a while.
#[derive(Default)]
pub(super) struct Partitioner {
    /// Topics are those that the pipeline names, so few.
    counts: Mutex<HashMap<String, (i32, Instant)>>,
    /// Records without a key take turns.
    keyless: AtomicU32,
}

impl Partitioner {
    pub(super) fn count(&self, topic: &str) -> Option<Count> {
        let counts = self.counts();
        let (count, since) = counts.get(topic)?;
        Some(if since.elapsed() < KNOWN_FOR {
            Count::Fresh(*count)
        } else {
            Count::Old(*count)
        })
    }

    pub(super) fn learn(&self, topic: &str, count: i32) {
        self.counts()
            .insert(topic.to_owned(), (count, Instant::now()));
    }

    /// The topic may have fewer by now.
    pub(super) fn forget(&self, topic: &str) {
        self.counts().remove(topic);
    }

    /// One of `count` partitions.
    pub(super) fn choose(&self, key: Option<&[u8]>, count: i32) -> i32 {
        let hash = match key {
            Some(key) => murmur2::murmur2(key, SEED),
            None => self.keyless.fetch_add(1, Ordering::Relaxed),
        };
        // Java's hash is signed, and its sign is cut off.
        let positive = i32::try_from(hash & 0x7fff_ffff).unwrap_or_default();
        positive % count.max(1)
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<String, (i32, Instant)>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The figures are those of Kafka's own `UtilsTest.testMurmur2`.
    #[test]
    fn hashes_as_kafka_does() {
        for (key, hash) in [
            ("21", -973_932_308_i32),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
        ] {
            let seen = murmur2::murmur2(key.as_bytes(), SEED);
            assert_eq!(seen, hash.cast_unsigned(), "{key}");
        }
    }

    #[test]
    fn chooses_within_the_partitions() {
        let partitioner = Partitioner::default();
        let keyless: Vec<_> = (0..4).map(|_| partitioner.choose(None, 3)).collect();
        assert_eq!(keyless, [0, 1, 2, 0]);
        let keyed = partitioner.choose(Some(b"foobar"), 8);
        assert_eq!(keyed, (-790_332_482 & 0x7fff_ffff) % 8);
        assert_eq!(partitioner.count("t"), None);
        partitioner.learn("t", 8);
        assert_eq!(partitioner.count("t"), Some(Count::Fresh(8)));
        partitioner.forget("t");
        assert_eq!(partitioner.count("t"), None);
    }
}
