//! The journal: topics, committed offsets and identifiers, one line of JSON for each change.
//!
//! A line is `<crc32c of the JSON, 8 hex digits> <JSON>\n`. One thread writes; changes that wait while it flushes are
//! flushed together, next. When most lines are outdated, the file is replaced by one that has only those that count.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use tokio::sync::{mpsc, oneshot};
use tracing::{error, warn};
use uuid::Uuid;

use super::journal_state::{Entry, State};
use super::recovery::set_end_aside;
use super::{lock as hold, sync_folder};
use crate::config::StartError;
use crate::folder::{self, FolderLock};

const NAME: &str = "journal";
const NEW_NAME: &str = "journal.new";

/// Changes waiting for the thread; who brings more waits.
const QUEUE: usize = 1024;
/// Changes flushed together at most.
const MAX_GROUP: usize = 1024;

/// Below this size in bytes the file is not replaced.
const COMPACT_FROM: u64 = 1 << 20;
/// The file is replaced when it is this many times as large as after the last time.
const COMPACT_FACTOR: u64 = 4;

/// Hex digits of the checksum and a space.
const CHECKSUM_LEN: usize = 9;

/// The change could not be made durable, and was not made. The reason is in the log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NotWritten;

/// Takes changes; the thread ends when this is dropped and all that was brought is written.
#[derive(Debug)]
pub(crate) struct Journal {
    state: Arc<Mutex<State>>,
    queue: mpsc::Sender<Change>,
    trouble: Trouble,
}

/// Why the last change could not be written, if it could not.
type Trouble = Arc<Mutex<Option<String>>>;

#[derive(Debug)]
struct Change {
    entries: Vec<Entry>,
    done: oneshot::Sender<Result<(), NotWritten>>,
}

impl Journal {
    /// Reads the journal of a folder, or begins one, and starts its thread, which holds the folder until it ends.
    pub(crate) fn open(
        folder: &Path,
        fsync: bool,
        lock: &Arc<FolderLock>,
    ) -> Result<(Self, thread::JoinHandle<()>), StartError> {
        let path = folder.join(NAME);
        let mut state = read(&path, folder::is_flushed(folder))?;
        if state.cluster.is_empty() {
            refuse_orphans(folder, &path)?;
            state.cluster = Uuid::new_v4().to_string();
            state.next_producer_id = 1;
        }
        let state = Arc::new(Mutex::new(state));
        let trouble = Trouble::default();
        let mut file = Writer {
            folder: folder.to_owned(),
            fsync,
            state: state.clone(),
            file: None,
            len: 0,
            floor: 0,
            trouble: trouble.clone(),
        };
        file.compact().map_err(StartError::io("write", &path))?;
        let (queue, changes) = mpsc::channel(QUEUE);
        let lock = lock.clone();
        let thread = thread::Builder::new()
            .name("kafka-journal".to_owned())
            .spawn(move || {
                file.run(changes);
                drop(lock);
            })
            .map_err(StartError::io("start a thread for", &path))?;
        let journal = Self {
            state,
            queue,
            trouble,
        };
        Ok((journal, thread))
    }

    /// Why the last change could not be written, if it could not.
    pub(crate) fn trouble(&self) -> Option<String> {
        hold(&self.trouble).clone()
    }

    /// Looks at the state; `look` must not wait.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&hold(&self.state))
    }

    /// Makes changes, all or (if the disk refuses) none. They are durable, and in the state, when this answers.
    pub(crate) async fn write(&self, entries: Vec<Entry>) -> Result<(), NotWritten> {
        let (done, answer) = oneshot::channel();
        self.queue
            .send(Change { entries, done })
            .await
            .map_err(|_| NotWritten)?;
        answer.await.map_err(|_| NotWritten)?
    }

    /// [`Self::write`] for a thread that may block.
    pub(crate) fn write_blocking(&self, entries: Vec<Entry>) -> Result<(), NotWritten> {
        let (done, answer) = oneshot::channel();
        self.queue
            .blocking_send(Change { entries, done })
            .map_err(|_| NotWritten)?;
        answer.blocking_recv().map_err(|_| NotWritten)?
    }
}

/// The file, and the thread's work.
struct Writer {
    folder: PathBuf,
    fsync: bool,
    state: Arc<Mutex<State>>,
    /// `None` after an error: the file may hold a change that was refused, and is replaced before the next one.
    file: Option<File>,
    len: u64,
    /// Bytes of the file after it was last replaced.
    floor: u64,
    trouble: Trouble,
}

impl Writer {
    fn run(mut self, mut changes: mpsc::Receiver<Change>) {
        let mut group = Vec::with_capacity(MAX_GROUP);
        while changes.blocking_recv_many(&mut group, MAX_GROUP) > 0 {
            let written = self.append(&group);
            let trouble = written.as_ref().err().map(io::Error::to_string);
            let before = std::mem::replace(&mut *hold(&self.trouble), trouble);
            let answer = written.map_err(|error| {
                // Clients try again and again: what is the same as before is not said again.
                if before.is_none_or(|before| before != error.to_string()) {
                    error!(file = %self.folder.join(NAME).display(), %error, "could not write; the change is refused");
                }
                NotWritten
            });
            for Change { entries, done } in group.drain(..) {
                if answer.is_ok() {
                    let mut state = hold(&self.state);
                    entries.into_iter().for_each(|entry| state.apply(entry));
                }
                // Nobody listens any more when the client went away.
                let _ = done.send(answer);
            }
            if self.len > COMPACT_FROM.max(self.floor * COMPACT_FACTOR)
                && let Err(error) = self.compact()
            {
                warn!(%error, "could not shorten the journal");
                self.floor = self.len;
            }
        }
    }

    fn append(&mut self, group: &[Change]) -> io::Result<()> {
        let mut lines = Vec::new();
        for entry in group.iter().flat_map(|change| &change.entries) {
            push_line(&mut lines, entry)?;
        }
        if self.file.is_none() {
            self.compact()?;
        }
        if lines.is_empty() {
            return Ok(());
        }
        let written = self.write(&lines);
        if written.is_err() {
            // What was refused must not be there after a restart, whatever of it reached the disk.
            self.file = None;
            if let Err(error) = self.compact() {
                error!(%error, "could not replace the journal; until it can be, all changes are refused");
            }
        }
        written
    }

    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        let file = self
            .file
            .as_ref()
            .ok_or_else(|| io::Error::other("the journal is not open"))?;
        file.write_all_at(lines, self.len)?;
        if self.fsync {
            file.sync_data()?;
        }
        self.len += lines.len() as u64;
        Ok(())
    }

    /// Replaces the file by one with only the lines that count.
    fn compact(&mut self) -> io::Result<()> {
        let mut lines = Vec::new();
        for entry in hold(&self.state).entries() {
            push_line(&mut lines, &entry)?;
        }
        let new = self.folder.join(NEW_NAME);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&new)?;
        file.write_all(&lines)?;
        file.sync_all()?;
        // From here on the old file may be gone. The new one is used when it is sure to be there after a crash.
        self.file = None;
        fs::rename(&new, self.folder.join(NAME))?;
        sync_folder(&self.folder)?;
        self.file = Some(file);
        self.len = lines.len() as u64;
        self.floor = self.len;
        Ok(())
    }
}

fn push_line(lines: &mut Vec<u8>, entry: &Entry) -> io::Result<()> {
    let json = serde_json::to_vec(entry)?;
    write!(lines, "{:08x} ", crc32c::crc32c(&json))?;
    lines.extend_from_slice(&json);
    lines.push(b'\n');
    Ok(())
}

/// What all entries of the file amount to, without a torn end. `intact`: the end cannot be torn in its middle.
fn read(path: &Path, intact: bool) -> Result<State, StartError> {
    let mut state = State::default();
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(state),
        Err(error) => return Err(StartError::io("read", path)(error)),
    };
    let mut position = 0;
    while position < bytes.len() {
        let rest = &bytes[position..];
        let line = rest
            .split_inclusive(|&byte| byte == b'\n')
            .next()
            .unwrap_or(rest);
        match parse_line(line) {
            Ok(entry) => state.apply(entry),
            // The end of the process tears the last line only, so no good one follows.
            Err(_) if !good_line_follows(&rest[line.len()..]) => {
                warn!(file = %path.display(), bytes = rest.len(), "cut the end of a write that was not finished");
                break;
            }
            // That of the machine tears what was not flushed; damage to what was looks the same, so it is kept.
            Err(what) if !intact => {
                let aside = set_end_aside(path, position as u64)
                    .map_err(StartError::io("copy the end of", path))?;
                warn!(
                    file = %path.display(),
                    aside = %aside.display(),
                    bytes = rest.len(),
                    "the end of the journal is torn ({what}): it was set aside, and the changes in it are gone"
                );
                break;
            }
            Err(what) => {
                return Err(StartError::Corrupt {
                    file: path.to_owned(),
                    position: position as u64,
                    what,
                    mend: "put back a good copy of the file, or remove the damaged line and give up the change it \
                           made (a topic or a committed offset)"
                        .to_owned(),
                });
            }
        }
        position += line.len();
    }
    Ok(state)
}

fn good_line_follows(rest: &[u8]) -> bool {
    rest.split_inclusive(|&byte| byte == b'\n')
        .any(|line| parse_line(line).is_ok())
}

fn parse_line(line: &[u8]) -> Result<Entry, String> {
    let line = line.strip_suffix(b"\n").ok_or("a line without an end")?;
    let (checksum, json) = line
        .split_at_checked(CHECKSUM_LEN)
        .ok_or("a line without a checksum")?;
    let checksum = std::str::from_utf8(checksum)
        .ok()
        .and_then(|hex| u32::from_str_radix(hex.trim_end(), 16).ok());
    if checksum != Some(crc32c::crc32c(json)) {
        return Err("a line whose checksum is wrong".to_owned());
    }
    serde_json::from_slice(json).map_err(|error| format!("a line that is not an entry: {error}"))
}

/// Without a journal the records of a folder belong to no topic: it would be wrong to begin as if there were none.
fn refuse_orphans(folder: &Path, path: &Path) -> Result<(), StartError> {
    let topics = folder.join(super::topics::FOLDER);
    match fs::read_dir(&topics).map(|mut entries| entries.next().is_some()) {
        Ok(true) => Err(StartError::Corrupt {
            file: path.to_owned(),
            position: 0,
            what: format!("it names no cluster, but {} has records", topics.display()),
            mend: "put back the journal, or move the records away".to_owned(),
        }),
        Ok(false) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offset(offset: i64) -> Entry {
        let (group, topic) = ("g".to_owned(), "t".to_owned());
        Entry::Offset {
            group,
            topic,
            partition: 0,
            offset,
            metadata: Some("m\n\"".to_owned()),
        }
    }

    fn topic() -> Entry {
        Entry::Topic {
            name: "t".to_owned(),
            id: "i".to_owned(),
            partitions: 3,
            config: Default::default(),
        }
    }

    #[tokio::test]
    async fn what_was_written_is_there_again_and_the_file_stays_small() {
        let folder = tempfile::tempdir().unwrap();
        let lock = Arc::new(FolderLock::take(folder.path()).unwrap());
        let (journal, thread) = Journal::open(folder.path(), false, &lock).unwrap();
        journal.write(vec![topic()]).await.unwrap();
        for i in 0..2_000 {
            journal
                .write((0..20).map(|j| offset(i * 20 + j)).collect())
                .await
                .unwrap();
        }
        let before = journal.look(State::clone);
        drop(journal);
        thread.join().unwrap();
        assert!(fs::metadata(folder.path().join(NAME)).unwrap().len() < 2 * COMPACT_FROM);
        let (journal, _) = Journal::open(folder.path(), false, &lock).unwrap();
        assert_eq!(journal.look(State::clone), before);
        assert_eq!(before.offsets["g"][&("t".to_owned(), 0)].offset, 39_999);
    }

    /// `/dev/null` takes all that is written, and refuses to flush it.
    #[test]
    fn a_refused_change_is_not_there_after_a_restart_and_the_next_one_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(NAME);
        let mut writer = Writer {
            folder: folder.path().to_owned(),
            fsync: true,
            state: Arc::default(),
            file: None,
            len: 0,
            floor: 0,
            trouble: Trouble::default(),
        };
        let change = |entry| {
            let (done, _) = oneshot::channel();
            [Change {
                entries: vec![entry],
                done,
            }]
        };
        writer.append(&change(topic())).unwrap();
        hold(&writer.state).apply(topic());
        // Of the refused change, all reaches the disk.
        let mut lines = fs::read(&path).unwrap();
        push_line(&mut lines, &offset(1)).unwrap();
        fs::write(&path, lines).unwrap();
        writer.file = Some(OpenOptions::new().write(true).open("/dev/null").unwrap());
        writer.append(&change(offset(1))).unwrap_err();
        assert_eq!(read(&path, true).unwrap(), *hold(&writer.state));
        writer.append(&change(offset(2))).unwrap();
        let committed = &read(&path, true).unwrap().offsets["g"][&("t".to_owned(), 0)];
        assert_eq!(committed.offset, 2);
    }

    /// `/dev/full` has no room for anything.
    #[tokio::test]
    async fn a_full_disk_is_told_until_there_is_room() {
        let folder = tempfile::tempdir().unwrap();
        let trouble = Trouble::default();
        let writer = Writer {
            folder: folder.path().to_owned(),
            fsync: true,
            state: Arc::default(),
            file: Some(OpenOptions::new().write(true).open("/dev/full").unwrap()),
            len: 0,
            floor: 0,
            trouble: trouble.clone(),
        };
        let (queue, changes) = mpsc::channel(1);
        let journal = Journal {
            state: writer.state.clone(),
            queue,
            trouble,
        };
        let thread = thread::spawn(move || writer.run(changes));
        journal.write(vec![topic()]).await.unwrap_err();
        let why = journal.trouble().unwrap();
        assert!(why.contains("No space left"), "{why}");
        // The file that was refused to is replaced; with nothing to write that is found out too.
        journal.write(Vec::new()).await.unwrap();
        assert_eq!(journal.trouble(), None);
        drop(journal);
        thread.join().unwrap();
    }

    #[tokio::test]
    async fn a_torn_end_is_cut_at_every_byte_and_damage_before_it_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let lock = Arc::new(FolderLock::take(folder.path()).unwrap());
        let path = folder.path().join(NAME);
        let (journal, thread) = Journal::open(folder.path(), false, &lock).unwrap();
        journal.write(vec![topic(), offset(1)]).await.unwrap();
        drop(journal);
        thread.join().unwrap();
        let good = fs::read(&path).unwrap();
        let mut torn = good.clone();
        push_line(&mut torn, &offset(2)).unwrap();
        for len in good.len()..torn.len() {
            fs::write(&path, &torn[..len]).unwrap();
            let state = read(&path, true).unwrap();
            assert_eq!(
                state.offsets["g"][&("t".to_owned(), 0)].offset,
                1,
                "cut to {len}"
            );
        }
        let mut damaged = torn;
        damaged[20] ^= 1;
        fs::write(&path, &damaged).unwrap();
        assert!(matches!(
            read(&path, true),
            Err(StartError::Corrupt { position: 0, .. })
        ));
        // After a crash the same may be what was not flushed.
        damaged[20] ^= 1;
        damaged[good.len() - 20] ^= 1;
        push_line(&mut damaged, &offset(3)).unwrap();
        fs::write(&path, &damaged).unwrap();
        let state = read(&path, false).unwrap();
        assert!(state.topics.contains_key("t") && state.offsets.is_empty());
        let aside = fs::read(folder.path().join("journal.torn")).unwrap();
        assert!(damaged.ends_with(&aside) && !aside.is_empty());
    }
}
