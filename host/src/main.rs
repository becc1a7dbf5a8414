//! The command `host`.

use std::process::ExitCode;

/// A message costs some dozen small allocations, which libc's allocator takes twice as long for.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    host::cli::main()
}
