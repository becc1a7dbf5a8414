//! Compaction on files: what stays, and what a crash at each step leaves.

use std::fs;
use std::path::Path;

use super::super::batch::tests::keyed;
use super::super::compaction::{Abandoned, MAX_KEYS, Pass, Replacement, swap};
use super::super::records::{Records, tests::content};
use super::super::segment::{Batches, Depth};
use super::*;

/// Key, and value or `None` for a tombstone.
type Given<'a> = (&'a str, Option<&'a str>);
/// Offset, time, and the bytes of key, value and headers.
type Found = (i64, i64, Vec<u8>);

const HOUR: i64 = 3_600_000;
const NOW: i64 = 1_700_000_000_000;

/// Each batch begins a segment of its own, but for those that are compacted.
fn compacted() -> Settings {
    Settings {
        fsync: true,
        segment_bytes: 150,
        compacts: true,
        deletes: false,
        min_dirty_ratio: 0.0,
        delete_retention_ms: HOUR,
        ..Settings::for_tests()
    }
}

fn open(folder: &Path, settings: &Settings) -> Partition {
    let folder = folder.join("t/0");
    Partition::open("t/0".to_owned(), folder, 0, settings.clone(), false).unwrap()
}

fn append(partition: &Partition, batch: &[u8]) -> Result<Appended, ResponseError> {
    let appended = partition.append(batch, &Header::check(batch).unwrap());
    partition.sync().unwrap();
    appended
}

fn filled(folder: &Path, settings: &Settings, batches: &[&[Given<'_>]], codec: i16) -> Partition {
    let partition = open(folder, settings);
    for records in batches {
        append(&partition, &keyed(records, codec, NOW, None)).unwrap();
    }
    partition
}

fn compact(partition: &Partition, now: i64) {
    partition.compact(now, &|| false);
}

/// All records, as a client reads them.
fn records(partition: &Partition) -> Vec<Found> {
    let mut found = Vec::new();
    let mut offset = partition.start();
    while offset < partition.high_watermark() {
        let read = partition.read(offset, 1000, true).unwrap().records;
        assert!(!read.is_empty(), "stands still at {offset}");
        let mut rest = &read[..];
        while !rest.is_empty() {
            let header = Header::parse(rest).unwrap();
            assert_eq!(rest[12..16], [0; 4], "the leader epoch");
            header.verify(rest).unwrap();
            let mut records = Records::open(&header, rest).unwrap();
            while let Some(record) = records.next().unwrap() {
                let of = (
                    header.base_offset + record.offset_delta,
                    header.base_timestamp + record.timestamp_delta,
                    content(&record).to_vec(),
                );
                if of.0 >= offset {
                    found.push(of);
                }
            }
            offset = offset.max(header.next_offset());
            rest = &rest[header.len..];
        }
    }
    found
}

fn offsets(partition: &Partition) -> Vec<i64> {
    records(partition)
        .into_iter()
        .map(|(offset, ..)| offset)
        .collect()
}

/// Names of the files of a partition.
fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder.join("t/0"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

const BATCHES: &[&[Given<'_>]] = &[
    &[("a", Some("1")), ("b", Some("1")), ("a", Some("2"))],
    &[("c", Some("1")), ("c", Some("2"))],
    &[("b", Some("2")), ("d", Some("1"))],
    &[("a", Some("3"))],
    &[("c", Some("3")), ("c", Some("4"))],
];

#[test]
fn of_each_key_the_newest_record_stays_with_its_offset_in_every_codec() {
    for codec in 0..=4 {
        let folder = tempfile::tempdir().unwrap();
        let partition = filled(folder.path(), &compacted(), BATCHES, codec);
        let before = records(&partition);
        assert_eq!(before.len(), 10);
        compact(&partition, NOW);
        // Of `c` both the closed and the open segment have the newest that each knows.
        let expected = [4, 5, 6, 7, 8, 9];
        let stay: Vec<Found> = before
            .into_iter()
            .filter(|(offset, ..)| expected.contains(offset))
            .collect();
        assert_eq!(records(&partition), stay, "codec {codec}");
        drop(partition);
        let partition = open(folder.path(), &compacted());
        assert_eq!(records(&partition), stay, "codec {codec}, after a restart");
        assert_eq!((partition.start(), partition.high_watermark()), (0, 10));
        // Who asks for an offset that is gone gets what comes next.
        let read = partition.read(0, 1, true).unwrap().records;
        assert_eq!(Header::parse(&read).unwrap().base_offset, 3);
        assert_eq!(partition.find_timestamp(NOW), Ok(Some((4, NOW))));
        compact(&partition, NOW);
        assert_eq!(records(&partition), stay, "codec {codec}, a second pass");
    }
}

#[test]
fn tombstones_stay_for_their_time_and_then_go() {
    let folder = tempfile::tempdir().unwrap();
    let batches: &[&[Given<'_>]] = &[
        &[("a", Some("1")), ("b", Some("1"))],
        &[("a", None), ("c", Some("1"))],
        &[("open", Some("1"))],
    ];
    let partition = filled(folder.path(), &compacted(), batches, 3);
    let times = |partition: &Partition| -> Vec<(i64, i64)> {
        let found = records(partition).into_iter();
        found.map(|(offset, time, _)| (offset, time)).collect()
    };
    compact(&partition, NOW);
    let kept = [(1, NOW), (2, NOW), (3, NOW), (4, NOW)];
    assert_eq!(times(&partition), kept, "the tombstone is there");
    compact(&partition, NOW + HOUR);
    assert_eq!(times(&partition), kept, "it is not due");
    drop(partition);
    let partition = open(folder.path(), &compacted());
    compact(&partition, NOW + HOUR);
    assert_eq!(
        times(&partition),
        kept,
        "a restart does not change its time"
    );
    compact(&partition, NOW + HOUR + 1);
    assert_eq!(times(&partition), [(1, NOW), (3, NOW), (4, NOW)]);
}

#[test]
fn records_without_a_key_are_refused_and_old_ones_go() {
    let folder = tempfile::tempdir().unwrap();
    let before = Settings {
        compacts: false,
        ..compacted()
    };
    let partition = open(folder.path(), &before);
    // A record without a key, as a batch by hand: its key has the length -1.
    let mut keyless = keyed(&[("", Some("1"))], 0, NOW, None);
    let at = keyless.len() - (1 + 1 + 1 + 5);
    assert_eq!(keyless[at], 0);
    keyless[at] = 1;
    super::super::batch::tests::seal(&mut keyless);
    append(&partition, &keyless).unwrap();
    partition.set_settings(compacted());
    assert_eq!(
        append(&partition, &keyless),
        Err(ResponseError::InvalidRecord)
    );
    for value in ["1", "2"] {
        append(&partition, &keyed(&[("a", Some(value))], 0, NOW, None)).unwrap();
    }
    partition.set_settings(Settings {
        segment_bytes: 1,
        ..compacted()
    });
    append(&partition, &keyed(&[("a", Some("3"))], 0, NOW, None)).unwrap();
    compact(&partition, NOW);
    assert_eq!(offsets(&partition), [2, 3]);
}

#[test]
fn small_segments_become_one_and_their_number_stays_small() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings {
        segment_bytes: 600,
        ..compacted()
    };
    let partition = open(folder.path(), &settings);
    for round in 0..20 {
        for value in 0..20 {
            let value = format!("{round} {value}");
            append(&partition, &keyed(&[("a", Some(&value))], 0, NOW, None)).unwrap();
        }
        compact(&partition, NOW);
    }
    assert!(files(folder.path()).len() < 6, "{:?}", files(folder.path()));
    assert_eq!(partition.high_watermark(), 400);
    let offsets = offsets(&partition);
    assert!(
        offsets.len() < 20 && offsets.ends_with(&[398, 399]),
        "{offsets:?}"
    );
}

#[test]
fn a_pass_without_room_for_all_keys_goes_on_where_it_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let partition = filled(folder.path(), &compacted(), BATCHES, 0);
    let settings = compacted();
    let pass = |max_keys| Pass {
        segments: lock(&partition.log).closed(),
        settings: &settings,
        now_ms: NOW,
        is_unwanted: &|| false,
        max_keys,
        is_last_of_producer: &|_| false,
    };
    let first = pass(2)
        .run(0, |replacement| partition.replace(replacement))
        .unwrap();
    assert_eq!(first.clean_until, 3, "the third key had no room");
    assert_eq!(offsets(&partition), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
    let second = pass(2)
        .run(3, |replacement| partition.replace(replacement))
        .unwrap();
    assert_eq!(second.clean_until, 6);
    assert_eq!(offsets(&partition), [2, 4, 5, 6, 7, 8, 9]);
    let third = pass(2)
        .run(6, |replacement| partition.replace(replacement))
        .unwrap();
    assert_eq!(third.clean_until, 8);
    assert_eq!(offsets(&partition), [4, 5, 6, 7, 8, 9]);
}

#[test]
fn what_a_producer_sent_last_is_known_though_its_records_are_gone() {
    let folder = tempfile::tempdir().unwrap();
    let partition = open(folder.path(), &compacted());
    let batch =
        |value, producer| keyed(&[("a", Some(value)), ("b", Some(value))], 0, NOW, producer);
    append(&partition, &batch("0", Some((7, 0, 0)))).unwrap();
    let last = batch("1", Some((7, 0, 2)));
    append(&partition, &last).unwrap();
    for value in ["2", "3"] {
        append(&partition, &batch(value, None)).unwrap();
    }
    compact(&partition, NOW);
    assert_eq!(offsets(&partition), [4, 5, 6, 7]);
    drop(partition);
    let partition = open(folder.path(), &compacted());
    assert_eq!(append(&partition, &last), Ok(Appended { base_offset: 2 }));
    let ahead = batch("4", Some((7, 0, 6)));
    assert_eq!(
        append(&partition, &ahead),
        Err(ResponseError::OutOfOrderSequenceNumber)
    );
}

#[test]
fn a_reader_gets_past_a_place_where_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings {
        delete_retention_ms: 0,
        ..compacted()
    };
    let batches: &[&[Given<'_>]] = &[
        &[("a", Some("1"))],
        &[("a", None), ("b", None)],
        &[("c", Some("1"))],
    ];
    let partition = filled(folder.path(), &settings, batches, 0);
    compact(&partition, NOW);
    compact(&partition, NOW + 1);
    assert_eq!(offsets(&partition), [3]);
    for offset in 0..3 {
        let read = partition.read(offset, 1, true).unwrap().records;
        assert_eq!(
            Header::parse(&read).unwrap().base_offset,
            3,
            "from {offset}"
        );
    }
}

/// After each step of the swap, as the process or the machine could end there.
#[test]
fn a_crash_at_each_step_leaves_all_that_is_to_stay() {
    let stay = [4, 5, 6, 7, 8, 9];
    for step in 0..=6 {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            // The closed segments become two.
            segment_bytes: 150,
            ..compacted()
        };
        let partition = filled(folder.path(), &settings, BATCHES, 0);
        partition.set_settings(Settings {
            segment_bytes: 1000,
            ..settings.clone()
        });
        let of = partition.settings();
        let pass = Pass {
            segments: lock(&partition.log).closed(),
            settings: &of,
            now_ms: NOW,
            is_unwanted: &|| false,
            max_keys: MAX_KEYS,
            is_last_of_producer: &|_| false,
        };
        let _ = pass.run(0, |Replacement { olds, mut new }| {
            let paths: Vec<PathBuf> = olds.into_iter().map(|old| old.path).collect();
            assert!(paths.len() > 1);
            let (first, rest) = paths.split_at(1);
            match step {
                0 => fs::write(new.path(), &fs::read(new.path())?[..70])?,
                1 => {}
                2 => swap::publish(&mut new)?,
                3 => {
                    swap::publish(&mut new)?;
                    fs::remove_file(&first[0])?;
                }
                4 => {
                    swap::publish(&mut new)?;
                    rest.iter().try_for_each(fs::remove_file)?;
                }
                5 => {
                    swap::publish(&mut new)?;
                    paths.iter().try_for_each(fs::remove_file)?;
                }
                _ => {
                    swap::publish(&mut new)?;
                    swap::finish(&mut new, &paths)?;
                }
            }
            Err(Abandoned::Unwanted)
        });
        drop(partition);
        for round in 0..2 {
            let partition = open(folder.path(), &settings);
            let found = offsets(&partition);
            assert!(
                stay.iter().all(|offset| found.contains(offset)),
                "step {step}: {found:?}"
            );
            assert_eq!(
                found.len() == 10,
                step < 2,
                "step {step}, round {round}: {found:?}"
            );
            assert_eq!(partition.high_watermark(), 10, "step {step}");
            assert!(
                files(folder.path())
                    .iter()
                    .all(|name| name.ends_with(".log"))
            );
        }
    }
}

#[test]
fn damage_stops_a_pass_and_nothing_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let partition = filled(folder.path(), &compacted(), BATCHES, 0);
    let path = lock(&partition.log).closed()[1].path.clone();
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, &bytes).unwrap();
    let before = files(folder.path());
    compact(&partition, NOW);
    assert_eq!(files(folder.path()), before);
    assert_eq!(fs::read(&path).unwrap(), bytes);
    assert!(lock(&partition.compaction).is_stuck);
}

/// What is on the disk says of each offset what became of it.
#[test]
fn files_have_no_hole() {
    let folder = tempfile::tempdir().unwrap();
    let partition = filled(folder.path(), &compacted(), BATCHES, 1);
    compact(&partition, NOW);
    for closed in lock(&partition.log).closed() {
        let file = fs::File::open(&closed.path).unwrap();
        let mut batches = Batches::new(&file, closed.base_offset, closed.len, Depth::Checksums);
        let mut end = closed.base_offset;
        while let Some(header) = batches.next().unwrap() {
            let header = header.unwrap();
            assert_eq!(header.first_offset(), end);
            end = header.next_offset();
        }
        assert_eq!(end, closed.next_offset);
    }
}
