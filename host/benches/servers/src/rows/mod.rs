//! What is measured, a file for each kind of work.

mod blog;
mod cache;
mod growth;
mod guests;
mod keys;
mod process;
mod publisher;
#[path = "../../../micro/sample.rs"]
#[expect(dead_code, reason = "the other benchmarks take more from there")]
mod sample;
mod sandbox;
#[path = "../../../micro/stage.rs"]
mod stage;
mod topics;

pub(crate) use self::topics::warm_up;
use crate::bench::Bench;
use crate::report::Row;

/// A measurement that answers one or more rows.
type Measure = fn(&Bench, &mut dyn FnMut(Row)) -> anyhow::Result<()>;

/// All of them, by the id of their rows.
pub(crate) const ALL: &[(&str, Measure)] = &[
    ("F1", topics::identity),
    ("F2", topics::json),
    ("F3", publisher::one_by_one),
    ("F4", publisher::batches),
    ("F5", cache::cache),
    ("F6", blog::routes),
    ("F7", blog::end_to_end),
    ("F8", keys::concurrency),
    ("F9", sandbox::cost),
    ("F10", process::start),
    ("F11", process::stages),
    ("F12", growth::growth),
    ("F13", blog::embedded),
    ("F14", guests::spinners),
];

/// Rounds of each comparison.
const ROUNDS: usize = 3;
const PARTITIONS: i32 = 8;

/// A post of about so many bytes, and its key.
fn post(n: u64, bytes: usize) -> (String, Vec<u8>) {
    let uid = format!("{n:016}");
    let mut value = format!("{{\"uid\":\"{uid}\",\"title\":\"Post number {n}\",\"content\":\"");
    while value.len() + 2 < bytes {
        value.push(char::from(
            b'a' + u8::try_from(value.len() % 26).unwrap_or_default(),
        ));
    }
    value.push_str("\"}");
    (uid, value.into_bytes())
}
