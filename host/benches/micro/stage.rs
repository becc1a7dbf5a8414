//! A stage of a test component, bound as a host binds it, and calls of it. The benchmarks on real servers take it from here.

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use host::capability::Stores;
use host::component::{Runtime, StageComponent};
use host::delivery::{Delivery, Handler};
use host::pipeline::{Pipeline, Probe};

use super::sample;

/// Takes the time of so many calls, a message each.
pub(crate) async fn calls(stage: &StageComponent, rounds: u64, messages: u32) -> Duration {
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
pub(crate) fn stage(folder: &Path, guest: &str, instances: &str) -> StageComponent {
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
    let file = folder.join("pipeline.toml");
    std::fs::write(&file, text).expect("a pipeline file");
    let pipeline = match Pipeline::load(&file, &|_| None, Probe::NONE) {
        Ok(pipeline) => pipeline,
        Err(problems) => panic!("{problems}"),
    };
    let runtime = Runtime::new(&folder.join("cache")).expect("a runtime");
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
