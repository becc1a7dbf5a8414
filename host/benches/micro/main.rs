//! What the hot path costs, piece by piece and in nanoseconds a message: `cargo bench --package host --bench micro`.
//!
//! The stages that are called are those of `make stages`.

mod delivery;
mod partition;
mod sample;
mod sandbox;
mod stage;

use criterion::{criterion_group, criterion_main};

criterion_group!(
    benches,
    sandbox::warm,
    sandbox::batch,
    sandbox::fresh,
    delivery::outputs,
    delivery::seen,
    delivery::dead_letter,
    partition::buffer,
);
criterion_main!(benches);
