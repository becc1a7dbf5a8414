//! Which file it is that connections have open: somebody may put another one in its place, as a restored copy, and who has
//! the one before open would write on into what nobody reads any more.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Logs of writes that are kept of databases that were replaced.
const MAX_LOGS_KEPT: usize = 100;

/// A file, whatever name it has or had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileId {
    device: u64,
    number: u64,
}

impl FileId {
    /// The file of this name, if there is one.
    pub(super) fn at(path: &Path) -> io::Result<Option<Self>> {
        match path.metadata() {
            Ok(metadata) => Ok(Some(Self {
                device: metadata.dev(),
                number: metadata.ino(),
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The name of a database's log of writes. SQLite has it beside the file itself, not beside a link to it.
pub(super) fn log_of(file: &Path) -> PathBuf {
    beside(file, "-wal")
}

/// Another file is in the database's place. The log that is beside it, if it is this one, is that of the file before: to
/// SQLite it would be the new one's. It is kept under another name, and the index of it, which SQLite makes anew, goes.
pub(super) fn put_log_aside(file: &Path, log: Option<FileId>) -> io::Result<()> {
    let name = log_of(file);
    if log.is_some() && FileId::at(&name)? == log {
        std::fs::rename(&name, free_name(&beside(file, "-wal.before"))?)?;
        match std::fs::remove_file(beside(file, "-shm")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// This name, or the first of those numbered after it that nothing has.
fn free_name(name: &Path) -> io::Result<PathBuf> {
    let numbered = (2..MAX_LOGS_KEPT).map(|n| {
        let mut numbered = name.as_os_str().to_owned();
        numbered.push(format!(".{n}"));
        PathBuf::from(numbered)
    });
    let mut names = std::iter::once(name.to_owned()).chain(numbered);
    let free = names.find(|name| !name.exists());
    free.ok_or_else(|| {
        let all = format!("{} and those numbered after it", name.display());
        io::Error::other(format!("{all} are there: move them away"))
    })
}

fn beside(file: &Path, ending: &str) -> PathBuf {
    let file = file.canonicalize().unwrap_or_else(|_| file.to_owned());
    let mut name = file.into_os_string();
    name.push(ending);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_of_a_file_that_is_gone_is_put_aside_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("db");
        let names = ["db-wal", "db-shm", "db-wal.before"].map(|name| folder.path().join(name));
        let [log, index, before] = &names;
        for name in [log, index] {
            std::fs::write(name, "old").unwrap();
        }
        let id = FileId::at(log).unwrap();
        assert!(id.is_some());
        put_log_aside(&file, None).unwrap();
        assert!(log.exists() && index.exists());
        put_log_aside(&file, id).unwrap();
        assert!(!log.exists() && !index.exists() && before.exists());
        // Reached by a link, and with one kept already.
        for name in [log, index] {
            std::fs::write(name, "old").unwrap();
        }
        let (other, link) = (tempfile::tempdir().unwrap(), "link");
        let link = other.path().join(link);
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        put_log_aside(&link, FileId::at(&log_of(&link)).unwrap()).unwrap();
        assert!(!log.exists() && folder.path().join("db-wal.before.2").exists());
        std::fs::remove_file(&file).unwrap();
        // One that came with the copy.
        std::fs::write(log, "new").unwrap();
        put_log_aside(&file, id).unwrap();
        assert!(log.exists());
        assert_eq!(FileId::at(&file).unwrap(), None);
    }
}
