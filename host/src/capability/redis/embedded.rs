//! A store inside this process: one redb file, or memory, with Redis's answers.
//!
//! One thread writes. It takes all that waits, runs it in one transaction, makes that durable, and
//! answers; so many callers share one fsync, and none is answered before it. Reads go straight to
//! the database, on the runtime's threads for blocking work.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use redb::backends::InMemoryBackend;
use redb::{Database, DatabaseError, ReadableDatabase};
use tokio::sync::{mpsc, oneshot};

use super::commands::{Command, Keys};
use super::transition;
use super::{Clock, Error, MAX_ANSWER_BYTES, Reply, Set, StoreError};

mod keyspace;

use keyspace::{Answer, Keyspace, Operation};

/// The file in the store's folder.
const FILE: &str = "store.redb";
/// Writes that may wait; more wait for their turn.
const QUEUE: usize = 256;
/// Writes that share a transaction.
const BATCH: usize = 256;
/// How often expired entries are removed that nobody asks for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Memory for pages of the file.
const CACHE_BYTES: usize = 64 * 1024 * 1024;

/// An embedded store.
#[derive(Clone)]
pub(super) struct Embedded {
    writer: mpsc::Sender<Message>,
    /// None once it is closed.
    database: Arc<Mutex<Option<Arc<Database>>>>,
    clock: Clock,
}

enum Message {
    Do(Operation, oneshot::Sender<Result<Answer, Error>>),
    Close(oneshot::Sender<()>),
}

/// Opens the store of a folder, or one in memory.
pub(super) async fn open(folder: Option<&Path>, clock: Clock) -> Result<Embedded, StoreError> {
    let folder = folder.map(Path::to_owned);
    let opened = tokio::task::spawn_blocking(move || open_database(folder.as_deref()));
    let database = opened
        .await
        .map_err(|error| StoreError::Unavailable(error.to_string()))??;
    let database = Arc::new(database);
    let (writer, messages) = mpsc::channel(QUEUE);
    let thread = std::thread::Builder::new().name("embedded-redis".to_owned());
    thread
        .spawn({
            let (database, clock) = (database.clone(), clock.clone());
            move || write_all(database, messages, &clock)
        })
        .map_err(|error| StoreError::Unavailable(error.to_string()))?;
    tokio::spawn(sweep(writer.downgrade()));
    Ok(Embedded {
        writer,
        database: Arc::new(Mutex::new(Some(database))),
        clock,
    })
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

    /// Waits for the writes that were begun, and closes the file.
    pub(super) async fn close(&self) {
        let database = self.database.lock();
        drop(database.unwrap_or_else(PoisonError::into_inner).take());
        let (closed, wait) = oneshot::channel();
        if self.writer.send(Message::Close(closed)).await.is_ok() {
            // An error says that the writer is gone, which is what is waited for.
            let _ = wait.await;
        }
    }

    pub(super) async fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        let key = key.to_vec();
        self.read(move |entries, now| {
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
        let database = self.database().ok_or_else(closed)?;
        let now = (self.clock)();
        let reading = tokio::task::spawn_blocking(move || {
            let transaction = database.begin_read()?;
            work(&keyspace::Entries::open(&transaction)?, now)
        });
        let answer = reading.await.map_err(|_| closed())?;
        answer.map_err(|error| unavailable(&error))
    }

    fn database(&self) -> Option<Arc<Database>> {
        let database = self.database.lock();
        database.unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn write(&self, operation: Operation) -> Result<Answer, Error> {
        let (answer, wait) = oneshot::channel();
        let sent = self.writer.send(Message::Do(operation, answer)).await;
        sent.map_err(|_| closed())?;
        wait.await.map_err(|_| closed())?
    }
}

/// The writer's thread, until it is told to close or nobody is left to ask for anything.
fn write_all(database: Arc<Database>, mut messages: mpsc::Receiver<Message>, clock: &Clock) {
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
        let outcome = write(&database, operations, clock());
        answer_all(outcome, waiting);
        if let Some(closed) = closing {
            drop(database);
            // Nobody may be waiting any more.
            let _ = closed.send(());
            return;
        }
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
    outcome: Result<Vec<Result<Answer, Error>>, redb::Error>,
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
                let _ = waiting.send(Err(unavailable(&error)));
            }
        }
    }
}

/// Asks for expired entries to be removed, for as long as the store is open.
async fn sweep(writer: mpsc::WeakSender<Message>) {
    loop {
        tokio::time::sleep(SWEEP_INTERVAL).await;
        let Some(writer) = writer.upgrade() else {
            return;
        };
        let (answer, wait) = oneshot::channel();
        if writer
            .send(Message::Do(Operation::Sweep, answer))
            .await
            .is_err()
        {
            return;
        }
        drop(writer);
        // What went wrong has been logged.
        let _ = wait.await;
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
