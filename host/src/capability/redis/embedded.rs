//! A store inside this process: one redb file, or memory, with Redis's answers.
//!
//! One thread writes. It takes all that waits, runs it in one transaction, makes that durable, and
//! answers; so many callers share one fsync, and none is answered before it. Reads go straight to
//! the database, on the runtime's threads for blocking work.
//!
//! After an error of the disk, redb refuses all else until it is opened again, which the writer does.

use std::fs::TryLockError;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redb::backends::InMemoryBackend;
use redb::{Database, DatabaseError, ReadableDatabase};
use tokio::sync::{mpsc, oneshot};

use super::commands::{Command, Keys};
use super::transition;
use super::{Clock, Error, HOST_PREFIX, MAX_ANSWER_BYTES, Reply, Set, StoreError};

mod keyspace;

use keyspace::{Answer, Keyspace, Operation, SWEEP_LIMIT};

/// The file in the store's folder.
const FILE: &str = "store.redb";
/// Writes that may wait; more wait for their turn.
const QUEUE: usize = 256;
/// Writes that share a transaction.
const BATCH: usize = 256;
/// How often expired entries are removed that nobody asks for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Bytes that are written to see whether something can be.
const PROBE_BYTES: usize = 4096;
/// Memory for pages of the file.
const CACHE_BYTES: usize = 64 * 1024 * 1024;

/// An embedded store.
#[derive(Clone)]
pub(super) struct Embedded {
    writer: mpsc::Sender<Message>,
    shared: Shared,
    clock: Clock,
}

/// The database as readers find it.
#[derive(Clone)]
struct Shared(Arc<Mutex<State>>);

enum State {
    Open(Arc<Database>),
    /// Until the writer has opened it again.
    Broken,
    Closed,
}

enum Message {
    Do(Operation, oneshot::Sender<Result<Answer, Error>>),
    Close(oneshot::Sender<()>),
}

/// Whether a process has the store of a folder open. Makes nothing.
pub(super) fn is_in_use(folder: &Path) -> bool {
    let file = std::fs::File::open(folder.join(FILE));
    file.is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// Opens the store of a folder, or one in memory.
pub(super) async fn open(folder: Option<&Path>, clock: Clock) -> Result<Embedded, StoreError> {
    let folder = folder.map(Path::to_owned);
    start(move || open_database(folder.as_deref()), clock).await
}

async fn start(
    open: impl Fn() -> Result<Database, StoreError> + Send + 'static,
    clock: Clock,
) -> Result<Embedded, StoreError> {
    let opened = tokio::task::spawn_blocking(move || open().map(|database| (database, open)));
    let (database, open) = opened
        .await
        .map_err(|error| StoreError::Unavailable(error.to_string()))??;
    let database = Arc::new(database);
    let shared = Shared(Arc::new(Mutex::new(State::Open(database.clone()))));
    let (sender, messages) = mpsc::channel(QUEUE);
    let writer = Writer {
        database: Some(database),
        shared: shared.clone(),
        open,
        clock: clock.clone(),
    };
    let thread = std::thread::Builder::new().name("embedded-redis".to_owned());
    // What it says has the name of the store that is being opened.
    let span = tracing::Span::current();
    thread
        .spawn(move || span.in_scope(|| writer.run(messages)))
        .map_err(|error| StoreError::Unavailable(error.to_string()))?;
    tokio::spawn(sweep(sender.downgrade()));
    Ok(Embedded {
        writer: sender,
        shared,
        clock,
    })
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn database(&self) -> Result<Arc<Database>, Error> {
        match &*self.state() {
            State::Open(database) => Ok(database.clone()),
            State::Broken => Err(Error::Unavailable(
                "the embedded store is being opened again after an error of its disk".to_owned(),
            )),
            State::Closed => Err(closed()),
        }
    }

    /// Has the writer open the database again where an error says that redb gave it up.
    fn note(&self, error: &redb::Error) {
        let mut state = self.state();
        let broken = matches!(error, redb::Error::Io(_) | redb::Error::PreviousIo);
        if broken && matches!(*state, State::Open(_)) {
            *state = State::Broken;
        }
    }
}

fn open_database(folder: Option<&Path>) -> Result<Database, StoreError> {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    let Some(folder) = folder else {
        let database = builder.create_with_backend(InMemoryBackend::new());
        let database = database.map_err(|error| StoreError::Unavailable(error.to_string()))?;
        return keyspace::create(&database)
            .map(|()| database)
            .map_err(|error| StoreError::Unavailable(error.to_string()));
    };
    let place = folder.display();
    std::fs::create_dir_all(folder)
        .map_err(|error| StoreError::Refused(format!("{place}: {error}")))?;
    let database = builder
        .create(folder.join(FILE))
        .map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => StoreError::Refused(format!(
                "{place} is in use: another host has this embedded store open; \
             stop it, or give each host a data-dir of its own"
            )),
            other => StoreError::Refused(format!("{place}: {other}")),
        })?;
    keyspace::create(&database)
        .map_err(|error| StoreError::Unavailable(format!("{place}: {error}")))?;
    Ok(database)
}

impl Embedded {
    pub(super) async fn ping(&self) -> Result<(), Error> {
        self.read(|_, _| Ok(())).await
    }

    /// Writes something of the host's own, which is gone soon.
    pub(super) async fn probe_write(&self) -> Result<(), Error> {
        let key = format!("{HOST_PREFIX}probe").into_bytes();
        let probe = Set {
            entries: vec![(key, vec![0; PROBE_BYTES])],
            ttl: Some(1),
            ..Set::default()
        };
        self.set(probe).await.map(drop)
    }

    /// Waits for the writes that were begun, and closes the file.
    pub(super) async fn close(&self) {
        *self.shared.state() = State::Closed;
        let (closed, wait) = oneshot::channel();
        if self.writer.send(Message::Close(closed)).await.is_ok() {
            // An error says that the writer is gone, which is what is waited for.
            let _ = wait.await;
        }
    }

    pub(super) async fn get(&self, key: &[u8], most: usize) -> Result<Option<Vec<u8>>, Error> {
        let key = key.to_vec();
        self.read(move |entries, now| {
            if entries.value_size(&key)? > most {
                return Ok(Err(Error::TooLarge(most as u64)));
            }
            let entry = entries.entry(&key, now)?;
            Ok(transition::get(entry).map_err(Error::Server))
        })
        .await?
    }

    pub(super) async fn get_many(&self, keys: &[Vec<u8>]) -> Result<Vec<Option<Vec<u8>>>, Error> {
        let keys = keys.to_vec();
        self.read(move |entries, now| {
            let mut bytes = 0;
            let mut values = Vec::with_capacity(keys.len());
            for key in &keys {
                // As MGET does, which finds nothing at a key of another type.
                let value = transition::get(entries.entry(key, now)?).ok().flatten();
                bytes += value.as_ref().map_or(0, Vec::len);
                if bytes > MAX_ANSWER_BYTES {
                    return Ok(Err(Error::TooLarge(MAX_ANSWER_BYTES as u64)));
                }
                values.push(value);
            }
            Ok(Ok(values))
        })
        .await?
    }

    pub(super) async fn set(&self, set: Set) -> Result<Vec<bool>, Error> {
        match self.write(Operation::Set(set)).await? {
            Answer::Written(written) => Ok(written),
            other => Err(mismatch(&other)),
        }
    }

    pub(super) async fn delete(&self, keys: Vec<Vec<u8>>) -> Result<u64, Error> {
        match self.write(Operation::Delete(keys)).await? {
            Answer::Deleted(count) => Ok(count),
            other => Err(mismatch(&other)),
        }
    }

    pub(super) async fn execute(
        &self,
        command: &'static Command,
        arguments: Vec<Vec<u8>>,
    ) -> Result<Reply, Error> {
        if command.writes {
            return match self.write(Operation::Execute(command, arguments)).await? {
                Answer::Reply(reply) => Ok(reply),
                other => Err(mismatch(&other)),
            };
        }
        self.read(move |entries, now| {
            if command.keys == Keys::All {
                let mut there = 0;
                for key in &arguments {
                    there += i64::from(entries.entry(key, now)?.is_some());
                }
                return Ok(Ok(Reply::Int(there)));
            }
            let (key, arguments) = keyspace::split(&arguments);
            let outcome = transition::run(command, entries.entry(key, now)?, arguments, now);
            Ok(outcome.map(|(reply, _)| reply).map_err(Error::Server))
        })
        .await?
    }

    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&keyspace::Entries, u64) -> Result<T, redb::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let database = self.shared.database()?;
        let now = (self.clock)();
        let reading = tokio::task::spawn_blocking(move || {
            let transaction = database.begin_read()?;
            work(&keyspace::Entries::open(&transaction)?, now)
        });
        let answer = reading.await.map_err(|_| closed())?;
        answer.map_err(|error| {
            self.shared.note(&error);
            unavailable(&error)
        })
    }

    async fn write(&self, operation: Operation) -> Result<Answer, Error> {
        let (answer, wait) = oneshot::channel();
        let sent = self.writer.send(Message::Do(operation, answer)).await;
        sent.map_err(|_| closed())?;
        wait.await.map_err(|_| closed())?
    }
}

/// What the writer's thread has.
struct Writer<O> {
    /// None while it is broken.
    database: Option<Arc<Database>>,
    shared: Shared,
    open: O,
    clock: Clock,
}

impl<O: Fn() -> Result<Database, StoreError>> Writer<O> {
    /// Writes until it is told to close or nobody is left to ask for anything.
    fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        while let Some(first) = messages.blocking_recv() {
            let mut operations = Vec::new();
            let mut waiting = Vec::new();
            let mut closing = None;
            let mut next = Some(first);
            while let Some(message) = next {
                match message {
                    Message::Do(operation, answer) => {
                        operations.push(operation);
                        waiting.push(answer);
                    }
                    Message::Close(closed) => {
                        closing = Some(closed);
                        break;
                    }
                }
                next = (operations.len() < BATCH)
                    .then(|| messages.try_recv().ok())
                    .flatten();
            }
            if !operations.is_empty() {
                answer_all(self.write(operations), waiting);
            }
            if let Some(closed) = closing {
                drop(self);
                // Nobody may be waiting any more.
                let _ = closed.send(());
                return;
            }
        }
    }

    fn write(&mut self, operations: Vec<Operation>) -> Result<Vec<Result<Answer, Error>>, Error> {
        let database = self.database()?;
        write(&database, operations, (self.clock)()).map_err(|error| {
            self.shared.note(&error);
            unavailable(&error)
        })
    }

    /// The database, opened again where it is broken. That fails while a reader has the old one; the next write tries
    /// once more, at the latest the next sweep.
    fn database(&mut self) -> Result<Arc<Database>, Error> {
        if matches!(*self.shared.state(), State::Broken) {
            self.database = None;
        }
        if let Some(database) = &self.database {
            return Ok(database.clone());
        }
        let opened = (self.open)().map_err(|error| Error::Unavailable(error.to_string()))?;
        let opened = Arc::new(opened);
        self.database = Some(opened.clone());
        let mut state = self.shared.state();
        if matches!(*state, State::Broken) {
            *state = State::Open(opened.clone());
        }
        Ok(opened)
    }
}

/// Runs the operations in one transaction, durable when this returns.
fn write(
    database: &Database,
    operations: Vec<Operation>,
    now: u64,
) -> Result<Vec<Result<Answer, Error>>, redb::Error> {
    let transaction = database.begin_write()?;
    let mut answers = Vec::with_capacity(operations.len());
    let changed = {
        let mut keyspace = Keyspace::open(&transaction, now)?;
        for operation in operations {
            answers.push(keyspace.apply(operation)?);
        }
        keyspace.is_changed()
    };
    if changed {
        transaction.commit()?;
    } else {
        transaction.abort()?;
    }
    Ok(answers)
}

fn answer_all(
    outcome: Result<Vec<Result<Answer, Error>>, Error>,
    waiting: Vec<oneshot::Sender<Result<Answer, Error>>>,
) {
    match outcome {
        Ok(answers) => {
            for (answer, waiting) in answers.into_iter().zip(waiting) {
                // A caller may have given up.
                let _ = waiting.send(answer);
            }
        }
        Err(error) => {
            tracing::error!(%error, "the embedded key-value store could not write");
            for waiting in waiting {
                let _ = waiting.send(Err(error.clone()));
            }
        }
    }
}

/// Asks for expired entries to be removed, for as long as the store is open.
async fn sweep(writer: mpsc::WeakSender<Message>) {
    loop {
        tokio::time::sleep(SWEEP_INTERVAL).await;
        if sweep_all(&writer).await.is_none() {
            return;
        }
    }
}

/// Until none is left that has expired. `None` once the store is closed.
async fn sweep_all(writer: &mpsc::WeakSender<Message>) -> Option<()> {
    loop {
        let writer = writer.upgrade()?;
        let (answer, wait) = oneshot::channel();
        let sent = writer.send(Message::Do(Operation::Sweep, answer)).await;
        drop(writer);
        sent.ok()?;
        match wait.await {
            Ok(Ok(Answer::Swept(count))) if count == SWEEP_LIMIT => {}
            // What went wrong has been logged.
            _ => return Some(()),
        }
    }
}

fn closed() -> Error {
    Error::Unavailable("the embedded store is closed".to_owned())
}

fn unavailable(error: &redb::Error) -> Error {
    Error::Unavailable(format!("the embedded store: {error}"))
}

fn mismatch(answer: &Answer) -> Error {
    Error::Server(format!("the embedded store answered {answer:?}"))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use redb::backends::FileBackend;
    use redb::{ReadableTableMetadata, StorageBackend, TableDefinition};

    use super::*;
    use crate::capability::redis::system_clock;

    /// A disk that fails once it is told to.
    #[derive(Debug)]
    struct Disk {
        file: FileBackend,
        fails: Arc<AtomicBool>,
    }

    impl Disk {
        fn check(&self) -> io::Result<()> {
            match self.fails.swap(false, Ordering::SeqCst) {
                true => Err(io::Error::other("no space left on device")),
                false => Ok(()),
            }
        }
    }

    impl StorageBackend for Disk {
        fn len(&self) -> io::Result<u64> {
            self.file.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.file.read(offset, out)
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.file.set_len(len)
        }

        fn sync_data(&self) -> io::Result<()> {
            self.check()?;
            self.file.sync_data()
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.file.write(offset, data)
        }
    }

    fn set(key: &str, ttl: Option<u64>) -> Set {
        Set {
            entries: vec![(key.into(), b"value".to_vec())],
            ttl,
            ..Set::default()
        }
    }

    #[tokio::test]
    async fn an_error_of_the_disk_passes() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let path = file.path().to_owned();
        let fails = Arc::new(AtomicBool::new(false));
        let disk_fails = fails.clone();
        let open = move || {
            let file = File::options().read(true).write(true).open(&path);
            let disk = Disk {
                file: FileBackend::new(file.expect("the file")).expect("a backend"),
                fails: disk_fails.clone(),
            };
            let database = Database::builder().create_with_backend(disk);
            let database = database.map_err(|error| StoreError::Refused(error.to_string()))?;
            keyspace::create(&database).expect("its tables");
            Ok(database)
        };
        let store = start(open, system_clock()).await.expect("a new store");
        assert_eq!(store.set(set("a", None)).await, Ok(vec![true]));
        fails.store(true, Ordering::SeqCst);
        let failed = store.set(set("b", None)).await;
        assert!(matches!(failed, Err(Error::Unavailable(_))), "{failed:?}");
        assert_eq!(store.set(set("c", None)).await, Ok(vec![true]));
        // Whether what failed was written is open, as it is where a server does not answer.
        for key in ["a", "c"] {
            let value = store.get(key.as_bytes(), 9).await;
            assert_eq!(value, Ok(Some(b"value".to_vec())), "{key}");
        }
        store.close().await;
        assert_eq!(store.get(b"a", 9).await, Err(closed()));
    }

    #[tokio::test]
    async fn what_has_expired_is_removed_at_once_however_much_it_is() {
        const ENTRIES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("entries");
        let time = Arc::new(AtomicU64::new(0));
        let clock = time.clone();
        let clock: Clock = Arc::new(move || clock.load(Ordering::SeqCst));
        let store = open(None, clock).await.expect("a new store");
        let mut expiring = set("", Some(1));
        let keys = (0..3 * SWEEP_LIMIT).map(|n| (n.to_string().into_bytes(), Vec::new()));
        expiring.entries = keys.collect();
        store.set(expiring).await.expect("a store that works");
        time.store(2, Ordering::SeqCst);
        assert!(sweep_all(&store.writer.downgrade()).await.is_some());
        let database = store.shared.database().expect("an open store");
        let transaction = database.begin_read().expect("a transaction");
        let entries = transaction.open_table(ENTRIES).expect("the table");
        assert_eq!(entries.len().expect("a length"), 0);
    }
}
