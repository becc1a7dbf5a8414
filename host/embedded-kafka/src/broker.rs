//! Starts and stops a broker.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::config::{Config, StartError};
use crate::folder::{self, FolderLock};
use crate::node::Node;
use crate::storage::journal::Journal;
use crate::storage::topic_config::Settings;
use crate::storage::topics::Topics;
use crate::storage::writer::Writers;
use crate::{health, retention, server};

/// A running broker. It ends when this is dropped; [`Broker::shutdown`] also waits for the end.
#[derive(Debug)]
pub struct Broker {
    address: SocketAddr,
    tasks: TaskTracker,
    /// They end when the node is dropped, which the tasks hold, and hold the folder's lock until then.
    threads: Vec<JoinHandle<()>>,
    stopping: Stopping,
    trouble: watch::Receiver<Option<String>>,
    shutdown: DropGuard,
}

/// What is looked at when all has ended, and the folder, held until then.
#[derive(Debug)]
struct Stopping {
    folder: PathBuf,
    fsync: bool,
    topics: Arc<Topics>,
    lock: Arc<FolderLock>,
}

/// What [`open`] makes, which takes the disk and so a thread that may block.
struct Opened {
    listener: std::net::TcpListener,
    address: SocketAddr,
    topics: Arc<Topics>,
    journal: Journal,
    writers: Writers,
    threads: Vec<JoinHandle<()>>,
    lock: Arc<FolderLock>,
}

impl Broker {
    /// Takes the folder, reads what is in it, and listens.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let for_open = config.clone();
        let opened = tokio::task::spawn_blocking(move || open(&for_open)).await;
        let Opened {
            listener,
            address,
            topics,
            journal,
            writers,
            threads,
            lock,
        } = opened.map_err(|error| StartError::Io {
            what: "cannot open the folder".to_owned(),
            error: error.into(),
        })??;
        let listener = TcpListener::from_std(listener).map_err(|error| StartError::Io {
            what: format!("cannot listen on {address}"),
            error,
        })?;
        info!(
            %address,
            folder = %config.folder.display(),
            "the embedded Kafka broker listens: one node, for development"
        );
        let stopping = Stopping {
            folder: config.folder.clone(),
            fsync: config.fsync,
            topics: topics.clone(),
            lock,
        };
        let shutdown = CancellationToken::new();
        let node = Arc::new(Node::new(
            config,
            address,
            topics,
            journal,
            writers,
            shutdown.clone(),
        ));
        let tasks = TaskTracker::new();
        tasks.spawn(server::serve(node.clone(), listener, tasks.clone()));
        tasks.spawn(retention::run(node.clone()));
        tasks.spawn(retention::compact(node.clone()));
        let (told, trouble) = watch::channel(None);
        tasks.spawn(health::run(node.clone(), told));
        tasks.spawn(async move { node.groups.keep_time(node.shutdown.clone()).await });
        tasks.close();
        Ok(Self {
            address,
            tasks,
            threads,
            stopping,
            trouble,
            shutdown: shutdown.drop_guard(),
        })
    }

    /// Why the broker cannot write records or offsets (the disk is full, say), in a line for people; `None` while it can.
    /// Ends with the broker.
    pub fn trouble(&self) -> watch::Receiver<Option<String>> {
        self.trouble.clone()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends all connections, finishes what is being written, and gives up the folder.
    pub async fn shutdown(self) {
        let Self {
            address,
            tasks,
            threads,
            stopping,
            shutdown,
            trouble: _,
        } = self;
        drop(shutdown);
        tasks.wait().await;
        let joined = tokio::task::spawn_blocking(move || {
            let mut ended_well = true;
            for thread in threads {
                // A writer that panicked has said so already.
                ended_well &= thread.join().is_ok();
            }
            stopping.finish(ended_well);
        });
        let _ = joined.await;
        info!(%address, "the embedded Kafka broker stopped");
    }
}

impl Stopping {
    fn finish(self, ended_well: bool) {
        let Self {
            folder,
            fsync,
            topics,
            lock,
        } = self;
        if fsync
            && ended_well
            && topics.are_flushed()
            && let Err(error) = folder::set_flushed(&folder)
        {
            warn!(%error, "could not note that all is flushed; the next start takes this end for a crash");
        }
        drop(lock);
    }
}

fn open(config: &Config) -> Result<Opened, StartError> {
    if !config.listen.ip().is_loopback() {
        return Err(StartError::NotLoopback(config.listen));
    }
    let folder = &config.folder;
    let mut lock = FolderLock::take(folder)?;
    let listener = folder::bind(folder, config.listen)?;
    let address = listener
        .local_addr()
        .and_then(|address| listener.set_nonblocking(true).map(|()| address))
        .map_err(|error| StartError::Io {
            what: format!("cannot listen on {}", config.listen),
            error,
        })?;
    lock.announce(folder, address)?;
    let lock = Arc::new(lock);
    let (journal, thread) = Journal::open(folder, config.fsync, &lock)?;
    let topics = Arc::new(Topics::open(folder, &journal, Settings::defaults(config))?);
    folder::unset_flushed(folder).map_err(StartError::io("change", folder))?;
    let (writers, mut threads) =
        Writers::start(&lock).map_err(StartError::io("start the writers of", folder))?;
    threads.push(thread);
    Ok(Opened {
        listener,
        address,
        topics,
        journal,
        writers,
        threads,
        lock,
    })
}
