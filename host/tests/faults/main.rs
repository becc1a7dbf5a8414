//! Several hosts on one pipeline, on real servers, while all of them are broken again and again:
//! every message must have its effect exactly once.
//!
//! `make test` runs the short form, `make test-faults MINUTES=20` the long one. `FAULTS_MINUTES` is
//! about how long it breaks things, and `FAULTS_SEED` repeats the schedule of a run (but not the
//! threads of its processes). `HOST_BINARY` is another host than the one that was built for the
//! tests. The servers are the suite's own: `KAFKA_JARS` is what `scripts/kafka-jars` prints.

mod anew;
mod bench;
mod books;
mod charged;
mod conductor;
mod emptied;
mod history;
mod hosts;
mod judge;
mod judge_tests;
mod load;
mod offsets;
mod others;
mod pipeline;
mod plants;
mod process;
mod proxy;
mod quiet;
mod reader;
mod report;
mod restore;
mod rounds;
mod said;
mod schedule;
mod servers;
mod sick;

use std::fmt::Debug;
use std::path::Path;
use std::str::FromStr;

/// Enough for both ways of every kind of fault.
const SHORT_CYCLES: usize = 2;
/// How long one round of every kind takes, about, on two cores.
const CYCLE_SECONDS: usize = 190;

/// Prints a line at once: a run takes its time, and the harness keeps what is printed otherwise.
macro_rules! say {
    ($($words:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "faults: {}", format_args!($($words)*));
    }};
}
pub(crate) use say;

#[test]
fn every_message_has_its_effect_once_whatever_breaks() {
    let minutes: Option<usize> = variable("FAULTS_MINUTES");
    let seed: u64 = variable("FAULTS_SEED").unwrap_or_else(rand::random);
    let long = minutes.map(|minutes| (minutes * 60).div_ceil(CYCLE_SECONDS).max(1));
    let cycles = long.unwrap_or(SHORT_CYCLES);
    say!("FAULTS_SEED={seed}, {cycles} rounds of every kind");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let logs = target.join("faults");
    let _ = std::fs::remove_dir_all(&logs);
    std::fs::create_dir_all(&logs).expect("a folder for logs");
    let report = conductor::run(seed, cycles, &logs);
    say!("\n{report}");
    if minutes.is_some() {
        let file = target.with_file_name("faults-report.md");
        std::fs::write(&file, report.to_string()).expect("the report is written");
        say!("the report is in {}", file.display());
    }
    let complaints = report.complaints().join("; ");
    assert!(
        complaints.is_empty(),
        "{complaints}; the logs are in {}",
        logs.display()
    );
}

/// A number from the environment, where it is set.
fn variable<T: FromStr<Err: Debug>>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|e| panic!("{name} is {text:?}: {e:?}")))
}
