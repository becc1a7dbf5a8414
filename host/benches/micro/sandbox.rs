//! A call through the sandbox, with its deadline, as a lane makes it.

use criterion::Criterion;

use super::stage::{calls, stage};

/// Messages of a batch call.
const BATCH: u32 = 100;

/// A call a message, on an instance that is there.
pub(crate) fn warm(criterion: &mut Criterion) {
    for guest in ["identity", "rewrite"] {
        bench(criterion, "F9 warm", guest, "warm", 1);
    }
}

/// A call a hundred messages; the time is one message's.
pub(crate) fn batch(criterion: &mut Criterion) {
    for guest in ["identity-batch", "rewrite-batch"] {
        bench(criterion, "F9 batch of 100", guest, "warm", BATCH);
    }
}

/// A new instance a message.
pub(crate) fn fresh(criterion: &mut Criterion) {
    for guest in ["identity", "rewrite"] {
        bench(criterion, "F9 fresh", guest, "fresh", 1);
    }
}

fn bench(criterion: &mut Criterion, row: &str, guest: &str, instances: &str, messages: u32) {
    // Threads, as the host has them: an instance's memory is given back to a process that has several.
    let tokio = tokio::runtime::Runtime::new().expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    let stage = stage(folder.path(), guest, instances);
    criterion.bench_function(&format!("{row}/{guest}"), |bencher| {
        bencher.iter_custom(|rounds| tokio.block_on(calls(&stage, rounds, messages)));
    });
}
