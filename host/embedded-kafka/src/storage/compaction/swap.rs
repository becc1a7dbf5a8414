//! Puts a compacted segment in the place of those that it was made of, so that a crash at any step leaves one or the
//! other: it is written as `.cleaned`, renamed to `.swap` (from then on it counts), the old files go, and it gets its name.
//! A start that finds a `.cleaned` removes it; one that finds a `.swap` does the steps that are missing.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tracing::info;

use super::super::batch::BadBatch;
use super::super::segment::{self, Depth, EXTENSION, Segment, list};
use super::super::sync_folder;

/// Not whole yet, or not wanted.
pub(in crate::storage) const CLEANED: &str = "cleaned";
/// Whole; what it replaces may be there still.
const SWAP: &str = "swap";

/// A `.swap` that is not whole, which no crash can leave.
#[derive(Debug)]
pub(in crate::storage) struct BadSwap {
    pub(in crate::storage) file: PathBuf,
    pub(in crate::storage) position: u64,
    pub(in crate::storage) bad: BadBatch,
}

/// From when this returns on, `new`, which is on the disk whole, counts instead of what it was made of.
pub(in crate::storage) fn publish(new: &mut Segment) -> io::Result<()> {
    new.rename(SWAP)?;
    sync_parent(new.path())
}

/// The steps after [`publish`]. If they fail, nobody may read or write here before the next start.
pub(in crate::storage) fn finish(new: &mut Segment, olds: &[PathBuf]) -> io::Result<()> {
    remove_olds(olds)?;
    new.rename(EXTENSION)?;
    sync_parent(new.path())
}

/// Settles what a pass that did not end has left in a folder.
pub(in crate::storage) fn recover(folder: &Path) -> io::Result<Result<(), BadSwap>> {
    for (_, cleaned) in list(folder, CLEANED)? {
        fs::remove_file(cleaned)?;
    }
    for (base_offset, path) in list(folder, SWAP)? {
        let walk = Segment::walk(base_offset, path.clone(), Depth::Checksums, |_| {})?;
        let mut new = walk.segment;
        if let Some(bad) = walk.bad {
            return Ok(Err(BadSwap {
                file: path,
                position: new.len(),
                bad,
            }));
        }
        let range = base_offset..new.next_offset();
        let olds: Vec<PathBuf> = segment::Segment::list(folder)?
            .into_iter()
            .filter(|(base, _)| range.contains(base))
            .map(|(_, path)| path)
            .collect();
        info!(file = %path.display(), "went on with a compaction that was broken off");
        finish(&mut new, &olds)?;
    }
    Ok(Ok(()))
}

fn remove_olds(olds: &[PathBuf]) -> io::Result<()> {
    for old in olds {
        match fs::remove_file(old) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), sync_folder)
}
