//! A call through the sandbox, with its deadline, as a lane makes it.

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use criterion::Criterion;
use host::capability::Stores;
use host::component::{Runtime, StageComponent};
use host::delivery::{Delivery, Handler};
use host::pipeline::{Pipeline, Probe};
use tempfile::TempDir;

use super::sample;

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
    let stage = stage(&folder, guest, instances);
    criterion.bench_function(&format!("{row}/{guest}"), |bencher| {
        bencher.iter_custom(|rounds| tokio.block_on(calls(&stage, rounds, messages)));
    });
}

/// Takes the time of so many calls, a message each.
async fn calls(stage: &StageComponent, rounds: u64, messages: u32) -> Duration {
    let records = sample::records(i64::from(messages));
    let deliveries: Vec<_> = records
        .iter()
        .map(|record| Delivery { record, attempt: 1 })
        .collect();
    let invocation = stage.call(&deliveries, &()).await;
    assert_eq!(invocation.outputs.len(), records.len(), "{invocation:?}");
    let since = Instant::now();
    for _ in 0..rounds {
        black_box(stage.call(&deliveries, &()).await);
    }
    since.elapsed() / messages
}

/// A stage as a pipeline has it. Nothing connects to its broker.
fn stage(folder: &TempDir, guest: &str, instances: &str) -> StageComponent {
    let component = component(guest);
    let text = format!(
        r#"
        name = "bench"
        [kafka]
        brokers = "127.0.0.1:9092"
        [stages.bench]
        component = "{}"
        input = ["app.posts"]
        group = "bench"
        output = ["bench.out"]
        instances = "{instances}"
        config = {{ output = "bench.out" }}
        "#,
        component.display()
    );
    let file = folder.path().join("pipeline.toml");
    std::fs::write(&file, text).expect("a pipeline file");
    let pipeline = match Pipeline::load(&file, &|_| None, Probe::NONE) {
        Ok(pipeline) => pipeline,
        Err(problems) => panic!("{problems}"),
    };
    let runtime = Runtime::new(&folder.path().join("cache")).expect("a runtime");
    let bytes = std::fs::read(&component).expect("a component");
    let [stage] = pipeline.stages() else {
        panic!("one stage");
    };
    let compiled = runtime
        .compile(&bytes, stage.instances())
        .expect("compiled");
    runtime
        .bind(stage, &compiled, &Stores::default())
        .expect("linked")
}

fn component(guest: &str) -> PathBuf {
    let stages = std::env::var("STAGES_DIR").map_or_else(
        |_| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/stages"),
        PathBuf::from,
    );
    let file = stages.join(format!("test-{guest}.wasm"));
    assert!(
        file.exists(),
        "{} is missing: `make stages` builds it",
        file.display()
    );
    file
}
