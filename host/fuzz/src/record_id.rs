//! The header `stagehost-id`: any client of the log can write one.

use std::sync::Arc;

use host::delivery::seen::{Admitted, HEADER, OutputId, Seen};
use host::record::{Header, Record};

use crate::memory::within;

/// What is remembered of one record.
const MOST: usize = 64 << 10;

/// The cluster that the records are read in.
const HERE: &str = "here";
/// Of the lane that others' headers must not touch.
const OTHER: &str = "other/t/0/1/1/1";

/// What reads as an id is written so that it reads the same; a record that was taken in comes twice when it comes again;
/// one that was sent elsewhere is none; and nobody's header makes the lane forget what it has seen of another.
pub(crate) fn check(bytes: &[u8]) {
    check_on_record(bytes);
    // As an id has it that was sent here, and one that was sent elsewhere.
    check_on_record(&[&b"@here/t/0/"[..], bytes].concat());
    let elsewhere = record(&[&b"@there/t/0/"[..], bytes].concat());
    let id = OutputId::of(&elsewhere, HERE);
    // A group may be called so, in an id of an earlier version; one with where it was sent names three more.
    assert!(id.is_none_or(|id| id.lane.matches('/').count() < 5));
}

fn check_on_record(bytes: &[u8]) {
    let other = record(OTHER.as_bytes());
    let mut seen = Seen::default();
    let mut is_new = |record: &Record| seen.admit(record, HERE) == Admitted::New;
    assert!(is_new(&other));

    let one = record(bytes);
    let most = MOST + bytes.len();
    let id = within(most, || OutputId::of(&one, HERE));
    let new = within(most, || is_new(&one));
    let Some(id) = id else {
        assert!(new, "a record without an id is never a repeated one");
        return;
    };
    let written = id.to_string();
    let of = |id: &str| OutputId::of(&record(id.as_bytes()), HERE);
    assert_eq!(of(&written), Some(id.clone()));
    assert!(!is_new(&one), "it was taken in");
    assert!(id.source().is_some(), "an id names a lane");
    let letter = id.of_its_letter("t", 0);
    assert_ne!(
        letter.lane, id.lane,
        "a letter is as if another lane sent it"
    );
    assert!(of(&letter.to_string()).is_none_or(|read| read == letter));
    if id.lane != "other/t/0" {
        assert!(!is_new(&other), "the other lane is remembered");
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
