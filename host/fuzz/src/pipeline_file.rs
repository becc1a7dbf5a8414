//! The pipeline file: an operator's, or whatever was taken for one.

use std::fs;
use std::path::Path;

use host::diagnostics::Diagnostics;
use host::pipeline::{Pipeline, Probe};

use crate::memory::within;

/// What `${SECRET}` stands for. No message shows it.
const SECRET: &str = "hunter2-correct-horse";
/// Memory for a file's values and problems.
const AT_FIRST: usize = 1 << 20;
const TIMES: usize = 1 << 10;
/// What is printed of a file's problems: fifty at most, each with the line that it is in.
const MAX_PRINTED: usize = 1 << 20;

/// A file is taken, and then is taken again and means the same; or each of its problems has a place in it, and what is
/// printed of them tells no secret.
pub(crate) fn check(bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("pipeline.toml");
    let most = AT_FIRST + TIMES * bytes.len();
    let read = within(most, || load(&path, bytes));
    match read {
        Ok(pipeline) => {
            let commented = [bytes, b"\n# and no more\n"].concat();
            let again = load(&path, &commented).expect("a comment changes nothing");
            assert_eq!(format!("{pipeline:?}"), format!("{again:?}"));
        }
        Err(diagnostics) => check_problems(bytes, &diagnostics, most),
    }
}

fn load(path: &Path, bytes: &[u8]) -> Result<Pipeline, Diagnostics> {
    fs::write(path, bytes).expect("written");
    let env = |name: &str| match name {
        "SECRET" => Some(SECRET.to_owned()),
        "PORT" => Some("9092".to_owned()),
        "EMPTY" => Some(String::new()),
        _ => None,
    };
    Pipeline::load(path, &env, Probe::NONE)
}

fn check_problems(bytes: &[u8], diagnostics: &Diagnostics, most: usize) {
    assert!(diagnostics.count() > 0, "a file is refused for a reason");
    if let Ok(text) = std::str::from_utf8(bytes) {
        for place in diagnostics.places() {
            assert!(text.get(place.clone()).is_some(), "{place:?} is no place");
        }
    }
    let printed = within(most, || diagnostics.to_string());
    assert!(printed.len() <= MAX_PRINTED, "{} bytes", printed.len());
    let written = bytes
        .windows(SECRET.len())
        .any(|part| part == SECRET.as_bytes());
    assert!(written || !printed.contains(SECRET), "{printed}");
}
