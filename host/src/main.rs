//! The command `host`.

use std::process::ExitCode;

/// A message costs many small allocations, in which libc's allocator was a good part of a busy host's time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    host::cli::main()
}
