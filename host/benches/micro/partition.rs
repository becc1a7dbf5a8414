//! The buffer between the consumer's thread and a lane.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use criterion::Criterion;
use futures::FutureExt;
use host::log::kafka::partition::{Partition, PartitionSource, Position};
use host::log::{BatchLimits, Source};
use host::record::Record;

use super::sample::{self, timed};

const RECORDS: u32 = 500;
const LIMITS: BatchLimits = BatchLimits {
    max_messages: RECORDS as usize,
    max_bytes: 1 << 20,
    max_time: Duration::from_secs(1),
};

/// Records in, and a batch out.
pub(crate) fn buffer(criterion: &mut Criterion) {
    let partition = Partition::new("app.posts", 3, Arc::default());
    let mut source = PartitionSource::new(partition.clone());
    let records = sample::records(i64::from(RECORDS));
    criterion.bench_function("partition/push and take", |bencher| {
        let prepare = || {
            partition.set_position(Position::Reading(Some(0)));
            records.clone()
        };
        bencher.iter_custom(|rounds| {
            timed(rounds, RECORDS, prepare, |records| {
                through(&partition, &mut source, records)
            })
        });
    });
}

fn through(
    partition: &Partition,
    source: &mut PartitionSource,
    records: Vec<Record>,
) -> Vec<Record> {
    partition.push(&mut VecDeque::from(records));
    let batch = source.next(&LIMITS).now_or_never();
    let batch = batch.expect("at hand").expect("no gap").expect("a batch");
    assert_eq!(batch.len(), RECORDS as usize);
    batch
}
