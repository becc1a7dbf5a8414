//! One of the targets under libFuzzer, which is `main`: `FUZZ_TARGET` names it. See `scripts/fuzz`.

#![no_main]

use std::sync::LazyLock;

use fuzz::Target;
use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    Target::named(&name).expect("FUZZ_TARGET names a target")
});

fuzz_target!(|bytes: &[u8]| (TARGET.check)(bytes));
