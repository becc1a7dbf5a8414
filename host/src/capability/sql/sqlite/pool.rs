//! Connections, each on a thread of its own, and how they are lent.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore, oneshot};
use tracing::error;

use super::super::{ACQUIRE_TIMEOUT, Error, StoreError};
use super::Newcomer;
use super::connection::{Connection, STACK_BYTES};
use super::error::error_of;
use super::file::{FileId, log_of, put_log_aside};
use super::guard::Guard;

type Work = Box<dyn FnOnce(&mut Connection) + Send>;

enum Job {
    Work(Work),
    /// Closes the connection, and then lets these go.
    End(
        Option<OwnedSemaphorePermit>,
        Option<OwnedMutexGuard<()>>,
        Option<oneshot::Sender<()>>,
    ),
}

/// A connection's thread.
struct Worker {
    jobs: Sender<Job>,
    guard: Arc<Guard>,
    /// The file that it has open.
    file: Option<FileId>,
}

impl Worker {
    async fn start(file: PathBuf) -> Result<Self, Error> {
        let (jobs, received) = channel();
        let (opened, is_open) = oneshot::channel();
        let guard = Arc::new(Guard::new());
        let its = guard.clone();
        let thread = std::thread::Builder::new()
            .name("sqlite".to_owned())
            .stack_size(STACK_BYTES);
        let started = thread.spawn(move || {
            crate::slice::shed();
            match Connection::open(&file, its) {
                Ok(connection) => {
                    if opened.send(Ok(connection.id)).is_ok() {
                        work_off(connection, &received);
                    }
                }
                Err(error) => {
                    opened.send(Err(error_of(&error))).ok();
                }
            }
        });
        started
            .map_err(|error| Error::Unavailable(format!("no thread for a connection: {error}")))?;
        let file = is_open.await.unwrap_or_else(|_| Err(thread_ended()))?;
        Ok(Self { jobs, guard, file })
    }
}

fn thread_ended() -> Error {
    Error::Unavailable("the connection's thread has ended".to_owned())
}

fn work_off(mut connection: Connection, jobs: &Receiver<Job>) {
    for job in jobs {
        match job {
            Job::Work(work) => work(&mut connection),
            Job::End(permit, writing, told) => {
                if told.is_some() {
                    connection.carry_log_over_on_close();
                }
                drop(connection);
                drop((writing, permit));
                if let Some(told) = told {
                    told.send(()).ok();
                }
                return;
            }
        }
    }
}

/// The connections of one file.
pub(super) struct Pool {
    file: PathBuf,
    /// One for each connection that may be on loan. Its thread has it until it ends, if the loan is given up.
    permits: Arc<Semaphore>,
    size: u32,
    idle: Mutex<Idle>,
    /// Where there are migrations.
    newcomer: Option<Arc<Newcomer>>,
    /// Held while they run on a file that has come.
    preparing: Arc<tokio::sync::Mutex<()>>,
}

/// Connections at rest.
#[derive(Default)]
struct Idle {
    workers: Vec<Worker>,
    /// The file that all of them have open.
    file: Option<FileId>,
    /// And its log of writes, once there is one.
    log: Option<FileId>,
    /// It has come in the place of another, and the migrations have not been run on it yet.
    is_unprepared: bool,
}

impl Pool {
    pub(super) fn new(file: PathBuf, size: u32, newcomer: Option<Newcomer>) -> Self {
        Self {
            file,
            permits: Arc::new(Semaphore::new(size as usize)),
            size,
            idle: Mutex::default(),
            newcomer: newcomer.map(Arc::new),
            preparing: Arc::default(),
        }
    }

    pub(super) async fn take(self: &Arc<Self>) -> Result<Lease, Error> {
        let permit =
            tokio::time::timeout(ACQUIRE_TIMEOUT, self.permits.clone().acquire_owned()).await;
        let permit = match permit {
            Ok(Ok(permit)) => permit,
            Ok(Err(_)) => return Err(Error::Unavailable("the database was closed".to_owned())),
            Err(_) => {
                let waited = ACQUIRE_TIMEOUT.as_secs();
                return Err(Error::Unavailable(format!(
                    "no connection became free within {waited} s"
                )));
            }
        };
        let worker = match self.at_rest()? {
            Some(worker) => worker,
            None => {
                self.prepare_newcomer().await?;
                Worker::start(self.file.clone()).await?
            }
        };
        Ok(Lease {
            pool: self.clone(),
            worker: Some(worker),
            permit: Some(permit),
            writing: None,
            is_new: true,
        })
    }

    /// A connection to the file that is there, if one is at rest. Where that is another one than it was, those to the one before
    /// are closed.
    fn at_rest(&self) -> Result<Option<Worker>, Error> {
        let place = self.file.display();
        let unavailable = |error| Error::Unavailable(format!("{place}: {error}"));
        let now = FileId::at(&self.file).map_err(unavailable)?;
        let mut idle = self.idle();
        if idle.file.is_some() && idle.file != now {
            if now.is_none() {
                return Err(Error::Unavailable(format!(
                    "{place} is gone: bring it back, or start the host again, which makes a new one"
                )));
            }
            put_log_aside(&self.file, idle.log).map_err(unavailable)?;
            *idle = Idle {
                is_unprepared: true,
                ..Idle::default()
            };
            error!(
                "{place} is another file than it was: somebody has put it in the place of the one that the host had open. It is \
                 the one that counts from now on; what stood in the -wal of the one before is in {place}-wal.before"
            );
        }
        idle.file = now;
        Ok(idle.workers.pop())
    }

    /// Runs the migrations on a file that has come in the place of another: without them, statements would be refused that are in
    /// order. They go on where nobody waits for them any more.
    async fn prepare_newcomer(self: &Arc<Self>) -> Result<(), Error> {
        let Some(newcomer) = &self.newcomer else {
            return Ok(());
        };
        if !self.idle().is_unprepared {
            return Ok(());
        }
        let (pool, newcomer) = (self.clone(), newcomer.clone());
        let prepared = async {
            let turn = self.preparing.clone().lock_owned().await;
            let runtime = tokio::runtime::Handle::current();
            let run = tokio::task::spawn_blocking(move || {
                let _turn = turn;
                runtime.block_on(pool.prepare(&newcomer))
            });
            let ran = run.await;
            ran.unwrap_or_else(|error| Err(StoreError::Unavailable(error.to_string())))
        };
        let place = self.file.display();
        let waited = tokio::time::timeout(ACQUIRE_TIMEOUT, prepared).await;
        let prepared = waited.map_err(|_| {
            Error::Unavailable(format!(
                "{place} is another file than it was, and its migrations are running"
            ))
        })?;
        prepared.map_err(|error| {
            Error::Unavailable(format!(
                "{place} is another file than it was, and its migrations can't be run: {error}"
            ))
        })
    }

    /// Unless somebody else has done so.
    async fn prepare(&self, newcomer: &Newcomer) -> Result<(), StoreError> {
        let file = {
            let idle = self.idle();
            if !idle.is_unprepared {
                return Ok(());
            }
            idle.file
        };
        newcomer.prepare().await?;
        let mut idle = self.idle();
        // There may be yet another one by now.
        if idle.file == file {
            idle.is_unprepared = false;
        }
        Ok(())
    }

    /// A connection is at rest, if its file is the one that is there.
    fn put_to_rest(&self, worker: Worker) {
        let mut idle = self.idle();
        if worker.file != idle.file {
            return;
        }
        // It may have been made anew while nobody had it open.
        if idle.log.is_none() || idle.workers.is_empty() {
            idle.log = FileId::at(&log_of(&self.file)).ok().flatten();
        }
        idle.workers.push(worker);
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for what is on loan, and closes all.
    pub(super) async fn close(&self) {
        // It is closed already, if this fails.
        let all = self.permits.acquire_many(self.size).await;
        self.permits.close();
        drop(all);
        let idle = std::mem::take(&mut *self.idle());
        for worker in idle.workers {
            let (told, ended) = oneshot::channel();
            if worker.jobs.send(Job::End(None, None, Some(told))).is_ok() {
                ended.await.ok();
            }
        }
    }
}

/// A connection on loan. It goes back when [`Lease::give_back`] says that it is at rest, and is closed otherwise: a call
/// that was given up leaves a statement running, which must not reach the next user. SQLite sees then that nobody waits, and
/// the place in the pool and the turn to write are free again once it has ended.
pub(super) struct Lease {
    pool: Arc<Pool>,
    worker: Option<Worker>,
    permit: Option<OwnedSemaphorePermit>,
    /// The turn to write.
    pub(super) writing: Option<OwnedMutexGuard<()>>,
    /// Nothing was done yet.
    is_new: bool,
}

impl Lease {
    /// Has the connection's thread do something.
    pub(super) async fn run<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Connection) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let (done, is_done) = oneshot::channel();
        let worker = self.worker.as_ref().ok_or_else(thread_ended)?;
        let is_new = std::mem::take(&mut self.is_new);
        let job = Job::Work(Box::new(move |connection| {
            if is_new {
                connection.count_anew();
            }
            done.send(work(connection)).ok();
        }));
        worker.jobs.send(job).map_err(|_| thread_ended())?;
        is_done.await.map_err(|_| thread_ended())
    }

    /// Gives the connection back, which is at rest.
    pub(super) fn give_back(mut self) {
        self.writing = None;
        if let Some(worker) = self.worker.take() {
            self.pool.put_to_rest(worker);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.guard.give_up();
            let end = Job::End(self.permit.take(), self.writing.take(), None);
            worker.jobs.send(end).ok();
        }
    }
}
