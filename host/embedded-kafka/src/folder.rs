//! The folder of a broker: held by one process, and where that process listens.
//!
//! `lock` is locked while a broker runs and then holds its address; `port` is the port to take again; `flushed` is there
//! while no broker runs and the last one ended with all that it had acknowledged on the disk.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use crate::config::StartError;
use crate::storage::{create_folder, sync_folder};

const LOCK: &str = "lock";
const PORT: &str = "port";
const FLUSHED: &str = "flushed";

/// [`running`] holds the lock for a moment to see whether it is free, so a broker that starts asks more than once.
const LOCK_ATTEMPTS: u32 = 5;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// An address and its port take less than this many bytes.
const MAX_ADDRESS_BYTES: u64 = 64;

/// Where the process that holds the lock of this folder listens, if one does.
pub fn running(folder: &Path) -> Option<SocketAddr> {
    let file = File::open(folder.join(LOCK)).ok()?;
    match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => read_address(&file),
        Ok(()) | Err(TryLockError::Error(_)) => None,
    }
}

/// The lock of a folder; given up when it is dropped.
#[derive(Debug)]
pub(crate) struct FolderLock {
    file: File,
}

impl FolderLock {
    /// Creates the folder if need be, and takes it.
    pub(crate) fn take(folder: &Path) -> Result<Self, StartError> {
        create_folder(folder).map_err(StartError::io("create the folder", folder))?;
        let path = folder.join(LOCK);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(StartError::io("open", &path))?;
        for attempt in 1.. {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::Error(error)) => {
                    return Err(StartError::io("lock", &path)(error));
                }
                Err(TryLockError::WouldBlock) if attempt < LOCK_ATTEMPTS => {
                    std::thread::sleep(LOCK_PAUSE)
                }
                Err(TryLockError::WouldBlock) => {
                    let address = read_address(&file);
                    return Err(StartError::Locked {
                        folder: folder.to_owned(),
                        address,
                    });
                }
            }
        }
        // What the last holder wrote is not where this one listens.
        file.set_len(0).map_err(StartError::io("write", &path))?;
        Ok(Self { file })
    }

    /// Says where this process listens, and which port to take again.
    pub(crate) fn announce(
        &mut self,
        folder: &Path,
        address: SocketAddr,
    ) -> Result<(), StartError> {
        let path = folder.join(LOCK);
        self.file
            .rewind()
            .and_then(|()| writeln!(self.file, "{address}"))
            .map_err(StartError::io("write", &path))?;
        let path = folder.join(PORT);
        fs::write(&path, format!("{}\n", address.port())).map_err(StartError::io("write", &path))
    }
}

/// Whether the last broker said that all was on the disk. If so, what is bad is not from a crash.
pub(crate) fn is_flushed(folder: &Path) -> bool {
    folder.join(FLUSHED).exists()
}

/// Says that all is on the disk and nothing more will be written; the lock is held.
pub(crate) fn set_flushed(folder: &Path) -> io::Result<()> {
    fs::write(folder.join(FLUSHED), "")?;
    sync_folder(folder)
}

/// Takes [`set_flushed`] back, before the first write that may be torn.
pub(crate) fn unset_flushed(folder: &Path) -> io::Result<()> {
    match fs::remove_file(folder.join(FLUSHED)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => sync_folder(folder),
    }
}

/// Binds the address; for port 0 the port of the last time in this folder, if it is free.
pub(crate) fn bind(folder: &Path, listen: SocketAddr) -> Result<TcpListener, StartError> {
    if !listen.ip().is_loopback() {
        return Err(StartError::NotLoopback(listen));
    }
    let last = fs::read_to_string(folder.join(PORT))
        .ok()
        .and_then(|text| text.trim().parse().ok());
    if let (0, Some(port)) = (listen.port(), last)
        && let Ok(listener) = TcpListener::bind(SocketAddr::new(listen.ip(), port))
    {
        return Ok(listener);
    }
    TcpListener::bind(listen).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => StartError::PortInUse(listen),
        _ => StartError::Io {
            what: format!("cannot listen on {listen}"),
            error,
        },
    })
}

fn read_address(file: &File) -> Option<SocketAddr> {
    let mut text = String::new();
    let mut file = file;
    file.rewind().ok()?;
    file.take(MAX_ADDRESS_BYTES)
        .read_to_string(&mut text)
        .ok()?;
    text.trim().parse().ok()
}
