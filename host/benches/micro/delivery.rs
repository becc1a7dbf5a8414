//! What a lane does with its outputs and with what it has seen.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use criterion::Criterion;
use host::delivery::dead_letter::DeadLetters;
use host::delivery::output::{decode, encode};
use host::delivery::seen::Seen;
use host::delivery::{Cause, Fault};

use super::sample::{self, CLUSTER, timed};

/// Outputs of a commit.
const OUTPUTS: u32 = 500;
/// Lanes upstream.
const LANES: i64 = 100;

/// Outputs as the progress row holds them.
pub(crate) fn outputs(criterion: &mut Criterion) {
    let records = sample::records(i64::from(OUTPUTS));
    let outputs: Vec<_> = records.iter().map(sample::output).collect();
    let encoded = encode(&outputs).expect("encoded");
    criterion.bench_function("outputs/encode", |bencher| {
        bencher.iter_custom(|rounds| timed(rounds, OUTPUTS, || (), |()| encode(&outputs)));
    });
    criterion.bench_function("outputs/decode", |bencher| {
        bencher.iter_custom(|rounds| timed(rounds, OUTPUTS, || (), |()| decode(&encoded)));
    });
}

/// Records of many lanes upstream, in turn.
pub(crate) fn seen(criterion: &mut Criterion) {
    let mut records = sample::records(LANES);
    for (lane, record) in records.iter_mut().enumerate() {
        record.headers[0].value = Some(format!("group/topic/{lane}/0/1/0").into_bytes());
    }
    let mut seen = Seen::default();
    criterion.bench_function("seen/admit", |bencher| {
        bencher.iter_custom(|rounds| {
            let next = records.iter().cycle().take(rounds as usize);
            let since = Instant::now();
            for record in next {
                black_box(seen.admit(black_box(record), CLUSTER));
            }
            since.elapsed()
        });
    });
}

/// A message that is given up on.
pub(crate) fn dead_letter(criterion: &mut Criterion) {
    let letters = DeadLetters {
        stage: Arc::from("publisher"),
        group: Arc::from("service.publisher"),
        component: Arc::from("0".repeat(64)),
        topic: None,
    };
    let record = sample::record(1);
    let fault = Fault::new(Cause::Reject, "app.posts/3@1: not the JSON expected");
    criterion.bench_function("dead letter", |bencher| {
        bencher.iter(|| letters.letter(black_box(&record), 1, &fault));
    });
}
