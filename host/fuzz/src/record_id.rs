//! The header `stagehost-id`: any client of the log can write one.

use std::sync::Arc;

use host::delivery::seen::{HEADER, OutputId, Seen};
use host::record::{Header, Record};

use crate::memory::within;

/// What is remembered of one record.
const MOST: usize = 64 << 10;

/// What reads as an id is written so that it reads the same; a record that was taken in comes twice when it comes again;
/// and nobody's header makes the lane forget what it has seen of another.
pub(crate) fn check(bytes: &[u8]) {
    let other = record(b"other/t/0/1/1/1");
    let mut seen = Seen::default();
    assert!(!seen.admit(&other));

    let one = record(bytes);
    let most = MOST + bytes.len();
    let id = within(most, || OutputId::of(&one));
    let repeated = within(most, || seen.admit(&one));
    let Some(id) = id else {
        assert!(!repeated, "a record without an id is never a repeated one");
        return;
    };
    let written = id.to_string();
    assert_eq!(OutputId::of(&record(written.as_bytes())), Some(id.clone()));
    assert!(seen.admit(&one), "it was taken in");
    assert!(id.source().is_some(), "an id names a lane");
    let letter = id.of_its_letter();
    assert_ne!(
        letter.lane, id.lane,
        "a letter is as if another lane sent it"
    );
    assert!(OutputId::of(&record(letter.to_string().as_bytes())).is_none_or(|read| read == letter));
    if id.lane != "other/t/0" {
        assert!(seen.admit(&other), "the other lane is remembered");
    }
}

fn record(id: &[u8]) -> Record {
    Record {
        topic: Arc::from("t"),
        partition: 0,
        offset: 7,
        timestamp: None,
        key: None,
        value: None,
        headers: vec![Header::new(HEADER, id)],
    }
}
