//! The judge is judged: small histories, each with one thing wrong, and what it must find in them.

use std::collections::HashMap;

use crate::judge::{
    Anomalies, Anomaly, Progress, Record, Repeated, Reset, Row, StageHistory, judge_cache,
    judge_letter, judge_passed, judge_progress, judge_stage, repeated, without_repeated,
};
use crate::load::{Deed, Message};
use crate::pipeline::{CACHER, FIRST};

/// Record `offset` of partition 0: key `k`, number and header `stagehost-id` as told.
fn record(offset: i64, seq: i64, id: &str) -> Record {
    Record {
        partition: 0,
        offset,
        timestamp: 1_000 + offset,
        message: Message {
            key: "k".to_owned(),
            seq,
            deed: None,
            at: None,
        },
        id: (!id.is_empty()).then(|| id.to_owned()),
        cause: None,
        words: None,
        is_copied: false,
    }
}

fn letter(seq: i64, id: &str, cause: &str) -> Record {
    Record {
        cause: Some(cause.to_owned()),
        ..record(seq, seq, id)
    }
}

fn row(seq: i64) -> Row {
    Row {
        key: "k".to_owned(),
        seq,
    }
}

/// Three messages, the third rejected as it wants: all is well.
fn good() -> StageHistory {
    let mut inputs: Vec<_> = (0..3).map(|n| record(n, n, "")).collect();
    inputs[2].message.deed = Some(Deed::Reject);
    inputs[2].message.at = Some("first".to_owned());
    StageHistory {
        stage: "first",
        inputs,
        rows: vec![row(0), row(1)],
        // The second output was produced again after a crash.
        outputs: vec![record(0, 0, "a"), record(1, 1, "b"), record(2, 1, "b")],
        letters: vec![letter(2, "c", "reject"), letter(2, "c", "reject")],
        again: HashMap::new(),
    }
}

/// Spoils a good history, and compares what is found with what must be.
#[track_caller]
fn check(spoil: impl FnOnce(&mut StageHistory), expected: &[(Anomaly, usize)]) {
    let mut history = good();
    spoil(&mut history);
    let mut found = Anomalies::default();
    judge_stage(&history, &mut found);
    assert_eq!(counts(&found), expected, "{found:#?}");
}

fn counts(found: &Anomalies) -> Vec<(Anomaly, usize)> {
    let counts = Anomaly::ALL.map(|anomaly| (anomaly, found.count(anomaly)));
    counts.into_iter().filter(|(_, count)| *count > 0).collect()
}

#[test]
fn a_good_history_has_none() {
    check(|_| {}, &[]);
}

#[test]
fn an_input_that_came_to_nothing_is_a_lost_write() {
    check(
        |h| {
            h.rows.remove(0);
            h.outputs.remove(0);
        },
        &[(Anomaly::LostWrite, 1)],
    );
    check(|h| h.letters.clear(), &[(Anomaly::LostWrite, 1)]);
}

#[test]
fn a_row_that_is_there_twice_is_a_duplicate() {
    check(
        |h| {
            h.rows.push(row(1));
            h.outputs.push(record(3, 1, "d"));
        },
        &[(Anomaly::Duplicate, 1)],
    );
}

#[test]
fn dead_letters_with_ids_of_their_own_are_duplicates() {
    check(
        |h| h.letters.push(letter(2, "d", "reject")),
        &[(Anomaly::Duplicate, 1)],
    );
    check(
        |h| h.letters.push(letter(2, "", "reject")),
        &[(Anomaly::Duplicate, 1)],
    );
}

#[test]
fn a_row_and_a_dead_letter_are_a_duplicate() {
    check(
        |h| h.letters.push(letter(1, "d", "deadline")),
        &[(Anomaly::Duplicate, 1), (Anomaly::WrongOutcome, 1)],
    );
    check(
        |h| {
            h.rows.push(row(2));
            h.outputs.push(record(3, 2, "d"));
        },
        &[(Anomaly::Duplicate, 1), (Anomaly::WrongOutcome, 1)],
    );
}

#[test]
fn an_input_that_is_there_twice_may_come_to_two_rows() {
    check(
        |h| {
            h.inputs.push(record(3, 1, ""));
            h.rows.push(row(1));
            h.outputs.push(record(3, 1, "d"));
        },
        &[],
    );
}

#[test]
fn rows_and_outputs_out_of_order_are_nonmonotonic() {
    check(|h| h.rows.swap(0, 1), &[(Anomaly::Nonmonotonic, 1)]);
    check(|h| h.outputs.swap(0, 1), &[(Anomaly::Nonmonotonic, 1)]);
    // A repeated record that comes late is dropped, and so in order.
    check(|h| h.outputs.push(record(3, 0, "a")), &[]);
    // Partitions have no order among them.
    check(
        |h| {
            h.outputs.swap(0, 1);
            h.outputs[1].partition = 1;
        },
        &[],
    );
}

#[test]
fn a_row_without_its_output_is_an_output_missing() {
    check(
        |h| drop(h.outputs.remove(0)),
        &[(Anomaly::OutputMissing, 1)],
    );
}

#[test]
fn an_output_with_another_id_is_an_output_duplicate() {
    check(
        |h| h.outputs.push(record(3, 1, "d")),
        &[(Anomaly::OutputDuplicate, 1)],
    );
    check(
        |h| h.outputs.push(record(3, 1, "")),
        &[(Anomaly::OutputDuplicate, 1)],
    );
}

#[test]
fn what_nothing_caused_is_a_phantom() {
    check(|h| h.rows.push(row(9)), &[(Anomaly::Phantom, 1)]);
    check(
        |h| h.outputs.push(record(3, 9, "d")),
        &[(Anomaly::Phantom, 1)],
    );
    check(
        |h| h.letters.push(letter(9, "d", "reject")),
        &[(Anomaly::Phantom, 1)],
    );
    // An output of a batch that was rolled back.
    check(
        |h| h.outputs.push(record(3, 2, "d")),
        &[(Anomaly::Phantom, 1)],
    );
}

#[test]
fn another_end_than_the_message_wants_is_a_wrong_outcome() {
    check(
        |h| {
            h.letters.clear();
            h.rows.push(row(2));
            h.outputs.push(record(3, 2, "d"));
        },
        &[(Anomaly::WrongOutcome, 1)],
    );
    check(
        |h| {
            for letter in &mut h.letters {
                letter.cause = Some("trap".to_owned());
            }
        },
        &[(Anomaly::WrongOutcome, 1)],
    );
    check(
        |h| {
            h.rows.remove(0);
            h.outputs.remove(0);
            h.letters.push(letter(0, "d", "retries-exhausted"));
        },
        &[(Anomaly::WrongOutcome, 1)],
    );
}

#[test]
fn a_letter_that_nobody_wanted_is_a_wrong_outcome() {
    let mut wanted = letter(0, "", "reject");
    (wanted.message.deed, wanted.message.at) = (Some(Deed::Reject), Some("first".to_owned()));
    let mut another = wanted.clone();
    another.cause = Some("denied".to_owned());
    for (stage, letter, expected) in [
        (&FIRST, &wanted, 0),
        (&CACHER, &wanted, 1),
        (&FIRST, &another, 1),
        (&FIRST, &letter(0, "", "reject"), 1),
    ] {
        let mut found = Anomalies::default();
        judge_letter(stage, letter, &mut found);
        assert_eq!(found.count(Anomaly::WrongOutcome), expected, "{letter:?}");
    }
}

/// What went into the stage a second time, as a dead letter that is sent back does: its row is the last.
#[test]
fn what_comes_again_in_the_input_is_written_in_its_order() {
    let again = |h: &mut StageHistory| {
        h.inputs.push(record(3, 0, ""));
        h.rows.push(row(0));
        h.outputs.push(record(3, 0, "d"));
    };
    check(again, &[]);
    check(
        |h| {
            again(h);
            h.rows.swap(1, 2);
        },
        &[(Anomaly::Nonmonotonic, 1)],
    );
    check(
        |h| {
            again(h);
            h.outputs.pop();
        },
        &[(Anomaly::OutputMissing, 1)],
    );
}

#[test]
fn an_output_of_another_program_is_none_of_the_stage() {
    let copied = |seq| Record {
        is_copied: true,
        ..record(3, seq, "")
    };
    check(|h| h.outputs.push(copied(1)), &[]);
    check(
        |h| {
            h.outputs.remove(0);
            h.outputs.push(copied(0));
        },
        &[(Anomaly::OutputMissing, 1)],
    );
}

/// The database went back: what was processed since has one row still, and may have outputs and letters twice.
#[test]
fn what_is_processed_again_leaves_one_row() {
    let again = |h: &mut StageHistory| {
        h.again = (0..3).map(|seq| (("k".to_owned(), seq), 1)).collect();
        let id = |generation: i64, seq: i64| format!("@c/out/0/g/in/0/{generation}/{seq}/0");
        h.outputs = (0..4).map(|n| record(n, n % 2, &id(n / 2, n))).collect();
        h.letters = vec![letter(2, "c", "reject"), letter(2, "d", "reject")];
    };
    check(again, &[]);
    type Spoil = fn(&mut StageHistory);
    let spoils: [(Spoil, Vec<(Anomaly, usize)>); 6] = [
        (
            |h| drop(h.rows.pop()),
            // Nobody knows any more of what its outputs are.
            vec![(Anomaly::LostWrite, 1), (Anomaly::Phantom, 1)],
        ),
        (|h| h.rows.push(row(1)), vec![(Anomaly::Duplicate, 1)]),
        (
            |h| h.outputs.push(record(4, 1, "e")),
            vec![(Anomaly::OutputDuplicate, 1)],
        ),
        (
            |h| h.letters.push(letter(2, "e", "reject")),
            vec![(Anomaly::Duplicate, 1)],
        ),
        (|h| h.letters.clear(), vec![(Anomaly::LostWrite, 1)]),
        (|h| h.outputs.swap(0, 1), vec![(Anomaly::Nonmonotonic, 1)]),
    ];
    for (spoil, expected) in spoils {
        check(
            |h| {
                again(h);
                spoil(h);
            },
            &expected,
        );
    }
}

#[test]
fn what_is_passed_on_is_all_that_was_committed_and_what_was_reset_again() {
    let inputs: Vec<_> = (0..3).map(|n| record(n, n, "").message).collect();
    let reset = Reset {
        again: vec![("k".to_owned(), 1), ("k".to_owned(), 2)],
        outputs_from: HashMap::from([(0, 3)]),
    };
    let good = [0, 1, 2, 1, 2];
    for (seqs, expected) in [
        (&good[..], vec![]),
        (&[1, 2, 1, 1, 2], vec![(Anomaly::LostWrite, 1)]),
        (&[0, 1, 2, 9, 1, 2], vec![(Anomaly::Phantom, 1)]),
        (&[0, 1, 2, 2], vec![(Anomaly::Unheeded, 1)]),
        (&[0, 1, 2], vec![(Anomaly::Unheeded, 2)]),
    ] {
        let outputs: Vec<_> = (0..)
            .zip(seqs)
            .map(|(n, seq)| record(n, *seq, ""))
            .collect();
        let mut found = Anomalies::default();
        judge_passed(&inputs, &outputs, std::slice::from_ref(&reset), &mut found);
        assert_eq!(counts(&found), expected, "{seqs:?}");
    }
}

#[test]
fn an_older_value_in_redis_is_a_stale_cache() {
    let inputs = [record(0, 0, ""), record(1, 1, ""), record(2, 1, "")];
    let check = |cached: Option<i64>, flushed_at, judged, expected: &[(Anomaly, usize)]| {
        let cache: HashMap<_, _> = cached
            .map(|seq| ("k".to_owned(), seq))
            .into_iter()
            .collect();
        let mut found = Anomalies::default();
        assert_eq!(judge_cache(&inputs, &cache, flushed_at, &mut found), judged);
        assert_eq!(counts(&found), expected);
    };
    check(Some(1), 0, 1, &[]);
    check(Some(0), 0, 1, &[(Anomaly::StaleCache, 1)]);
    check(None, 0, 1, &[(Anomaly::StaleCache, 1)]);
    // Number 1 came at 1001, and may have been cached before this flush.
    check(None, 1_001, 0, &[]);
}

#[test]
fn an_offset_before_the_end_is_uncommitted() {
    let progress = |committed| Progress {
        group: "g",
        partition: 0,
        committed,
        end: 7,
    };
    let mut found = Anomalies::default();
    judge_progress(&[progress(7), progress(6)], &mut found);
    assert_eq!(counts(&found), [(Anomaly::Uncommitted, 1)]);
}

#[test]
fn of_a_repeated_id_the_first_counts() {
    let records = [
        record(0, 0, "a"),
        record(1, 1, ""),
        record(2, 1, ""),
        record(3, 0, "a"),
    ];
    let offsets: Vec<_> = without_repeated(&records)
        .iter()
        .map(|r| r.offset)
        .collect();
    assert_eq!(offsets, [0, 1, 2]);
}

#[test]
fn repeated_records_are_counted() {
    let records = [
        record(0, 0, "a"),
        record(1, 1, "b"),
        record(2, 1, "b"),
        record(3, 0, "a"),
        record(4, 0, ""),
    ];
    assert_eq!(repeated(&records), Repeated { all: 2, late: 1 });
}

#[test]
fn five_examples_are_kept() {
    let mut found = Anomalies::default();
    for n in 0..9 {
        found.add(Anomaly::Stalled, || n.to_string());
    }
    assert_eq!(found.count(Anomaly::Stalled), 9);
    assert_eq!(found.examples(Anomaly::Stalled), ["0", "1", "2", "3", "4"]);
}
