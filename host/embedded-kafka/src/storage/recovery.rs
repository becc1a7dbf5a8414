//! Reads the segments of a partition at the start, and settles what a crash left of them.
//!
//! What was not flushed when the machine went away may be missing, cut short, or full of zeros with good batches after
//! it. Nothing of that was acknowledged, but it may also be damage to what was: so it is kept beside the segment.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use tracing::warn;

use super::batch::BadBatch;
use super::compaction::swap::{self, BadSwap};
use super::producers::Producers;
use super::segment::{Depth, Segment, Walk};
use super::sync_folder;
use super::topic_config::Settings;
use crate::config::StartError;

/// What was set aside of a file is named like it, with this at the end, and a number from the second time on.
const TORN: &str = "torn";
/// Files of one name that are set aside; who has as many looks after them first.
const MAX_TORN: usize = 1000;

/// What is in the folder of a partition.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    /// The last one is open, to be written to.
    pub(crate) segments: VecDeque<Segment>,
    pub(crate) next_offset: i64,
    pub(crate) producers: Producers,
}

/// Reads all segments. `intact`: nothing that is bad can be from a crash; `name`: of the partition, for messages.
pub(crate) fn recover(
    name: &str,
    folder: &Path,
    settings: &Settings,
    intact: bool,
) -> Result<Recovered, StartError> {
    swap::recover(folder)
        .map_err(StartError::io("finish a compaction in", folder))?
        .map_err(|bad| damaged_swap(name, bad))?;
    let files = Segment::list(folder).map_err(StartError::io("read", folder))?;
    // After it there are at most segments without records, which nothing was written after.
    let last = last_with_records(&files).map_err(StartError::io("read", folder))?;
    let mut found = Recovered::default();
    let mut is_cut = false;
    for (i, (base_offset, path)) in files.into_iter().enumerate() {
        if i > 0 && is_leftover(&path, base_offset, &found, is_cut) {
            fs::remove_file(&path).map_err(StartError::io("remove", &path))?;
            continue;
        }
        if is_cut {
            let aside = set_file_aside(&path).map_err(StartError::io("rename", &path))?;
            warn!(partition = name, file = %path.display(), aside = %aside.display(), "records after a torn write were set aside");
            continue;
        }
        if i > 0 && base_offset != found.next_offset {
            return Err(missing(name, path, base_offset, found.next_offset));
        }
        let depth = if i >= last {
            Depth::Checksums
        } else {
            Depth::Headers
        };
        let walk = Segment::walk(base_offset, path.clone(), depth, |header| {
            found.producers.record(header)
        })
        .map_err(StartError::io("read", &path))?;
        if let Some(reason) = walk.bad {
            let may_be_torn = !intact && (i >= last || !settings.fsync);
            settle(name, &walk, reason, i >= last, may_be_torn)?;
            is_cut = true;
        }
        let segment = walk.segment;
        // Readers see it from now on, so it must not go away with the machine.
        if settings.fsync && (i >= last || !intact) {
            segment
                .file()
                .and_then(|file| file.sync_all())
                .map_err(StartError::io("flush", &path))?;
        }
        found.next_offset = segment.next_offset();
        if let Some(before) = found.segments.back_mut() {
            before.close();
        }
        found.segments.push_back(segment);
    }
    if settings.fsync {
        sync_folder(folder).map_err(StartError::io("flush", folder))?;
    }
    Ok(found)
}

/// Copies the end of a file from `position` on to a file beside it, which is durable when this returns.
pub(crate) fn set_end_aside(path: &Path, position: u64) -> io::Result<PathBuf> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(position))?;
    let (aside, mut copy) = create_aside(path)?;
    io::copy(&mut file.by_ref(), &mut copy)?;
    copy.sync_all()?;
    path.parent().map_or(Ok(()), sync_folder)?;
    Ok(aside)
}

fn set_file_aside(path: &Path) -> io::Result<PathBuf> {
    let (aside, _) = create_aside(path)?;
    fs::rename(path, &aside)?;
    Ok(aside)
}

fn create_aside(path: &Path) -> io::Result<(PathBuf, File)> {
    for i in 1..=MAX_TORN {
        let mut aside = path.as_os_str().to_owned();
        aside.push(match i {
            1 => format!(".{TORN}"),
            i => format!(".{TORN}-{i}"),
        });
        match OpenOptions::new().write(true).create_new(true).open(&aside) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            created => return Ok((aside.into(), created?)),
        }
    }
    Err(io::Error::other(format!(
        "there are {MAX_TORN} files beside it already"
    )))
}

fn last_with_records(files: &[(i64, PathBuf)]) -> io::Result<usize> {
    for (i, (_, path)) in files.iter().enumerate().rev() {
        if fs::metadata(path)?.len() > 0 {
            return Ok(i);
        }
    }
    Ok(0)
}

/// Whether a file is what a failed beginning of a segment left: it is empty, and the offsets went on elsewhere.
fn is_leftover(path: &Path, base_offset: i64, found: &Recovered, is_cut: bool) -> bool {
    (is_cut || base_offset < found.next_offset)
        && fs::metadata(path).is_ok_and(|metadata| metadata.len() == 0)
}

fn damaged_swap(name: &str, bad: BadSwap) -> StartError {
    StartError::Corrupt {
        file: bad.file,
        position: bad.position,
        what: format!("{} in what was compacted of {name}", bad.bad),
        mend: "put back a good copy of the file, or remove it if the segments that it replaces are still there"
            .to_owned(),
    }
}

fn missing(name: &str, file: PathBuf, base_offset: i64, next_offset: i64) -> StartError {
    StartError::Corrupt {
        file,
        position: 0,
        what: format!(
            "it begins with offset {base_offset} of {name}, the file before it ends at {next_offset}"
        ),
        mend: "put back the segment file that is missing, or move the partition's folder away"
            .to_owned(),
    }
}

/// Cuts a write that was not finished, and sets aside what else a crash may have left. Damage to what was flushed is
/// not to be mended without being asked.
fn settle(
    name: &str,
    walk: &Walk,
    reason: BadBatch,
    is_last: bool,
    may_be_torn: bool,
) -> Result<(), StartError> {
    let segment = &walk.segment;
    let path = segment.path();
    let follows = walk
        .good_batch_follows()
        .map_err(StartError::io("read", path))?;
    if !may_be_torn && (follows || !is_last) {
        return Err(StartError::Corrupt {
            file: path.to_owned(),
            position: segment.len(),
            what: format!("{reason} in {name}"),
            mend: format!(
                "put back a good copy of the file, or give up the records from offset {} on by moving away the later \
                 files of this folder and running `truncate -s {} {}`",
                segment.next_offset(),
                segment.len(),
                path.display()
            ),
        });
    }
    let bytes = walk.file_len - segment.len();
    if follows || !is_last {
        let aside =
            set_end_aside(path, segment.len()).map_err(StartError::io("copy the end of", path))?;
        warn!(
            partition = name,
            file = %path.display(),
            aside = %aside.display(),
            bytes,
            offset = segment.next_offset(),
            "the end of a segment is torn: it was set aside, and the partition goes on before it"
        );
    } else {
        warn!(
            partition = name,
            file = %path.display(),
            bytes,
            offset = segment.next_offset(),
            "cut the end of a write that was not finished"
        );
    }
    segment.cut().map_err(StartError::io("cut", path))
}
