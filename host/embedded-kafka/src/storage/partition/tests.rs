use std::fs::OpenOptions;

use super::super::batch::tests::batch;
use super::*;

const COUNT: i32 = 2;
const PAYLOAD: usize = 100;

fn durable() -> Settings {
    Settings {
        fsync: true,
        ..Settings::for_tests()
    }
}

fn open(folder: &Path, settings: &Settings, intact: bool) -> Result<Partition, StartError> {
    let folder = folder.join("t/0");
    Partition::open("t/0".to_owned(), folder, 0, settings.clone(), intact)
}

fn append(partition: &Partition) -> Result<i64, ResponseError> {
    let bytes = batch(COUNT, PAYLOAD, None);
    let header = Header::check(&bytes).unwrap();
    partition
        .append(&bytes, &header)
        .map(|appended| appended.base_offset)
}

/// Batches `0..count`, each flushed.
fn filled(folder: &Path, settings: &Settings, count: i64) -> Partition {
    let partition = open(folder, settings, false).unwrap();
    for i in 0..count {
        assert_eq!(append(&partition), Ok(i * i64::from(COUNT)));
        partition.sync().unwrap();
    }
    partition
}

/// File names and sizes, in order.
fn files(folder: &Path) -> Vec<(String, u64)> {
    let mut files: Vec<_> = fs::read_dir(folder.join("t/0"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            (
                entry.file_name().into_string().unwrap(),
                entry.metadata().unwrap().len(),
            )
        })
        .collect();
    files.sort();
    files
}

fn name(base_offset: i64) -> String {
    format!("{base_offset:020}.log")
}

fn batch_len() -> u64 {
    batch(COUNT, PAYLOAD, None).len() as u64
}

/// `/dev/null` takes all that is written, and refuses to flush it.
#[test]
fn a_flush_that_fails_as_a_segment_rolls_refuses_what_came_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings {
        segment_bytes: batch_len() * 2,
        ..durable()
    };
    let partition = filled(folder.path(), &settings, 1);
    let write_to = |path: &Path| {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        let log = &mut *lock(&partition.log);
        log.segments.back_mut().unwrap().replace_file(file);
    };
    write_to(Path::new("/dev/null"));
    assert_eq!(append(&partition), Ok(2), "it is written, not flushed");
    assert_eq!(append(&partition), Err(ResponseError::KafkaStorageError));
    // The next flush succeeds: Linux reports a loss once.
    write_to(&folder.path().join("t/0").join(name(0)));
    assert_eq!(partition.sync(), Err(ResponseError::KafkaStorageError));
    assert_eq!(partition.high_watermark(), 2);
    assert!(!partition.is_flushed());
}

#[test]
fn a_roll_that_failed_is_not_in_the_way_of_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    drop(filled(folder.path(), &durable(), 3));
    // Left behind by a roll at 2, after which smaller batches fitted into the old segment.
    fs::write(folder.path().join("t/0").join(name(2)), "").unwrap();
    let partition = open(folder.path(), &durable(), true).unwrap();
    assert_eq!(files(folder.path()), [(name(0), 3 * batch_len())]);
    assert_eq!(append(&partition), Ok(6));
    assert_eq!(files(folder.path()), [(name(0), 4 * batch_len())]);
}

#[test]
fn an_empty_segment_keeps_the_next_offset() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings {
        retention_ms: Some(1),
        ..durable()
    };
    filled(folder.path(), &settings, 3).retain(1000).unwrap();
    assert_eq!(files(folder.path()), [(name(6), 0)]);
    let partition = open(folder.path(), &settings, true).unwrap();
    assert_eq!((partition.start(), append(&partition)), (6, Ok(6)));
}

#[test]
fn a_segment_whose_file_cannot_be_removed_is_tried_again() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings {
        segment_bytes: 1,
        retention_ms: Some(1),
        ..durable()
    };
    let partition = filled(folder.path(), &settings, 3);
    let path = folder.path().join("t/0").join(name(0));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    partition.retain(1000).unwrap_err();
    fs::remove_dir(&path).unwrap();
    partition.retain(1000).unwrap();
    assert_eq!(files(folder.path()), [(name(6), 0)]);
}

/// Zeros where a batch was, and good batches after it.
#[test]
fn what_a_crash_tore_is_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    drop(filled(folder.path(), &durable(), 4));
    let path = folder.path().join("t/0").join(name(0));
    let mut bytes = fs::read(&path).unwrap();
    let len = batch_len() as usize;
    bytes[len..2 * len].fill(0);
    let refused =
        |error| matches!(error, StartError::Corrupt { position, .. } if position == batch_len());
    for (round, torn) in ["torn", "torn-2"].into_iter().enumerate() {
        fs::write(&path, &bytes).unwrap();
        assert!(refused(open(folder.path(), &durable(), true).unwrap_err()));
        let partition = open(folder.path(), &durable(), false).unwrap();
        assert_eq!(partition.high_watermark(), 2);
        let aside = path.with_extension(format!("log.{torn}"));
        assert_eq!(fs::read(aside).unwrap(), bytes[len..], "round {round}");
        assert_eq!(append(&partition), Ok(2));
    }
}

#[test]
fn without_flushes_any_segment_may_be_torn() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings {
        segment_bytes: batch_len() * 2,
        ..Settings::for_tests()
    };
    drop(filled(folder.path(), &settings, 6));
    let path = folder.path().join("t/0").join(name(4));
    let len = batch_len();
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(len + 70)
        .unwrap();
    assert!(matches!(
        open(folder.path(), &durable(), false).unwrap_err(),
        StartError::Corrupt { .. }
    ));
    let partition = open(folder.path(), &settings, false).unwrap();
    assert_eq!(append(&partition), Ok(6));
    let expected = [
        (name(0), 2 * len),
        (name(4), 2 * len),
        (format!("{}.torn", name(4)), 70),
        (format!("{}.torn", name(8)), 2 * len),
    ];
    assert_eq!(files(folder.path()), expected);
}
