//! Idempotent producers of a partition: which batches were taken, so that a batch sent again is not kept twice.

use std::collections::{HashMap, VecDeque};

use kafka_protocol::ResponseError;

use super::batch::Header;

/// A client has at most this many batches in flight to a partition.
const BATCHES_KEPT: usize = 5;

/// Producers remembered for a partition; beyond it, those that were silent for longest are forgotten.
const MAX_PRODUCERS: usize = 10_000;
const FORGOTTEN_AT_ONCE: usize = MAX_PRODUCERS / 10;

/// The last batches of each producer.
#[derive(Debug, Default)]
pub(crate) struct Producers {
    by_id: HashMap<i64, Producer>,
}

/// What to do with a batch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Keep it.
    New,
    /// It is here already, from this offset.
    Repeat(i64),
    /// Answer with this error.
    Refused(ResponseError),
}

#[derive(Debug)]
struct Producer {
    epoch: i16,
    /// The sequence of the batch that comes next.
    next: i32,
    /// Where the partition ended when it was last heard of.
    heard_at: i64,
    batches: VecDeque<Taken>,
}

#[derive(Debug)]
struct Taken {
    first: i32,
    last: i32,
    base_offset: i64,
}

impl Producers {
    /// Judges a batch by its producer, epoch and sequence, as Kafka does.
    pub(crate) fn check(&self, header: &Header) -> Verdict {
        if !header.is_idempotent() {
            return Verdict::New;
        }
        if header.base_sequence < 0 || header.producer_epoch < 0 {
            return Verdict::Refused(ResponseError::InvalidRecord);
        }
        // Of an unknown producer (its records may be gone by retention) any sequence is taken.
        let Some(producer) = self.by_id.get(&header.producer_id) else {
            return Verdict::New;
        };
        if header.producer_epoch < producer.epoch {
            return Verdict::Refused(ResponseError::InvalidProducerEpoch);
        }
        if header.producer_epoch > producer.epoch {
            return in_order(header.base_sequence == 0);
        }
        let repeat = |taken: &&Taken| {
            taken.first == header.base_sequence && taken.last == header.last_sequence()
        };
        if let Some(taken) = producer.batches.iter().find(repeat) {
            return Verdict::Repeat(taken.base_offset);
        }
        in_order(header.base_sequence == producer.next)
    }

    /// Whether nothing newer is known of the producer of a batch that was kept.
    pub(crate) fn is_last(&self, header: &Header) -> bool {
        let producer = self.by_id.get(&header.producer_id);
        header.is_idempotent()
            && producer
                .and_then(|producer| producer.batches.back())
                .is_some_and(|last| last.base_offset == header.base_offset)
    }

    /// Remembers that a batch could not be written, lest the one after it be taken as the first of its producer.
    pub(crate) fn refuse(&mut self, header: &Header) {
        if header.is_idempotent() {
            self.by_id
                .entry(header.producer_id)
                .or_insert_with(|| Producer::new(header));
            self.bound();
        }
    }

    /// Remembers a batch that was kept.
    pub(crate) fn record(&mut self, header: &Header) {
        if !header.is_idempotent() {
            return;
        }
        let producer = self
            .by_id
            .entry(header.producer_id)
            .or_insert_with(|| Producer::new(header));
        if producer.epoch != header.producer_epoch {
            *producer = Producer::new(header);
        }
        producer.next = header.last_sequence().wrapping_add(1) & i32::MAX;
        producer.heard_at = header.base_offset;
        if producer.batches.len() == BATCHES_KEPT {
            producer.batches.pop_front();
        }
        let (first, last) = (header.base_sequence, header.last_sequence());
        producer.batches.push_back(Taken {
            first,
            last,
            base_offset: header.base_offset,
        });
        self.bound();
    }

    fn bound(&mut self) {
        if self.by_id.len() <= MAX_PRODUCERS {
            return;
        }
        let mut ages: Vec<(i64, i64)> = self
            .by_id
            .iter()
            .map(|(id, producer)| (producer.heard_at, *id))
            .collect();
        ages.select_nth_unstable(FORGOTTEN_AT_ONCE);
        for (_, id) in ages.into_iter().take(FORGOTTEN_AT_ONCE) {
            self.by_id.remove(&id);
        }
    }
}

impl Producer {
    /// Nothing of it was kept yet.
    fn new(header: &Header) -> Self {
        Self {
            epoch: header.producer_epoch,
            next: header.base_sequence,
            heard_at: header.base_offset,
            batches: VecDeque::with_capacity(BATCHES_KEPT),
        }
    }
}

fn in_order(yes: bool) -> Verdict {
    if yes {
        Verdict::New
    } else {
        Verdict::Refused(ResponseError::OutOfOrderSequenceNumber)
    }
}

#[cfg(test)]
mod tests {
    use super::super::batch::tests::batch;
    use super::*;

    fn header(id: i64, epoch: i16, sequence: i32, count: i32, base_offset: i64) -> Header {
        let mut header = Header::check(&batch(count, 0, Some((id, epoch, sequence)))).unwrap();
        header.base_offset = base_offset;
        header
    }

    #[test]
    fn judges_as_kafka_does() {
        let mut producers = Producers::default();
        for i in 0..7 {
            let batch = header(1, 3, i * 2, 2, i64::from(i) * 2);
            assert_eq!(producers.check(&batch), Verdict::New);
            producers.record(&batch);
        }
        let out_of_order = Verdict::Refused(ResponseError::OutOfOrderSequenceNumber);
        for (batch, verdict) in [
            (header(1, 3, 12, 2, 0), Verdict::Repeat(12)),
            (header(1, 3, 4, 2, 0), Verdict::Repeat(4)),
            (
                header(1, 3, 2, 2, 0),
                Verdict::Refused(ResponseError::OutOfOrderSequenceNumber),
            ),
            (
                header(1, 3, 12, 1, 0),
                Verdict::Refused(ResponseError::OutOfOrderSequenceNumber),
            ),
            (header(1, 3, 14, 1, 0), Verdict::New),
            (
                header(1, 3, 15, 1, 0),
                Verdict::Refused(ResponseError::OutOfOrderSequenceNumber),
            ),
            (
                header(1, 2, 14, 1, 0),
                Verdict::Refused(ResponseError::InvalidProducerEpoch),
            ),
            (header(1, 4, 0, 1, 0), Verdict::New),
            (header(1, 4, 14, 1, 0), out_of_order),
            (header(2, 0, 77, 1, 0), Verdict::New),
        ] {
            assert_eq!(producers.check(&batch), verdict, "{batch:?}");
        }
    }

    #[test]
    fn what_follows_a_batch_that_failed_is_not_taken_before_it() {
        let mut producers = Producers::default();
        let (first, second) = (header(1, 0, 7, 2, 0), header(1, 0, 9, 2, 0));
        assert_eq!(producers.check(&first), Verdict::New);
        producers.refuse(&first);
        assert_eq!(
            producers.check(&second),
            Verdict::Refused(ResponseError::OutOfOrderSequenceNumber)
        );
        assert_eq!(producers.check(&first), Verdict::New);
        producers.record(&first);
        assert_eq!(producers.check(&second), Verdict::New);
        producers.refuse(&second);
        assert_eq!(producers.check(&second), Verdict::New);
    }

    #[test]
    fn a_sequence_goes_on_from_zero_after_the_largest() {
        let mut producers = Producers::default();
        producers.record(&header(1, 0, i32::MAX - 1, 2, 0));
        assert_eq!(producers.check(&header(1, 0, 0, 1, 0)), Verdict::New);
    }

    #[test]
    fn the_number_of_producers_is_bounded() {
        let mut producers = Producers::default();
        for id in 0..=MAX_PRODUCERS as i64 {
            producers.record(&header(id, 0, 0, 1, id));
        }
        assert!(producers.by_id.len() <= MAX_PRODUCERS);
        assert!(producers.by_id.contains_key(&(MAX_PRODUCERS as i64)));
        assert!(!producers.by_id.contains_key(&0));
    }
}
