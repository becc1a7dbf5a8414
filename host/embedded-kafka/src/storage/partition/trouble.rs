//! Writes that fail, for want of room above all.

use std::io;
use std::sync::atomic::Ordering;

use super::super::lock;
use super::{Partition, State};

/// Why the last write failed.
#[derive(Debug)]
pub(super) struct Trouble {
    why: String,
    /// Bytes that there was no room for.
    len: u64,
}

impl Partition {
    /// Why records cannot be written, if the last could not: looks whether the same could be now. Writes what it takes
    /// back at once; what a crash leaves of it is cut as the end of any other write.
    pub(crate) fn trouble(&self) -> Option<String> {
        if !self.has_trouble.load(Ordering::Relaxed) {
            return None;
        }
        let len = lock(&self.trouble).as_ref()?.len;
        let log = &mut *lock(&self.log);
        match log.state {
            State::Deleted => return None,
            State::Offline => {}
            State::Online => {
                let tried = self.prepare(log, len, &self.settings()).and_then(|()| {
                    log.segments
                        .back_mut()
                        .map_or(Ok(()), |active| active.try_room(len))
                });
                match tried {
                    Ok(()) => self.clear_trouble(),
                    Err(error) => drop(self.set_trouble(&error, len)),
                }
            }
        }
        lock(&self.trouble)
            .as_ref()
            .map(|trouble| trouble.why.clone())
    }

    /// Whether it is news.
    pub(super) fn set_trouble(&self, error: &io::Error, len: u64) -> bool {
        let why = error.to_string();
        let mut trouble = lock(&self.trouble);
        self.has_trouble.store(true, Ordering::Relaxed);
        let before = trouble.replace(Trouble {
            why: why.clone(),
            len,
        });
        before.is_none_or(|before| before.why != why)
    }

    pub(super) fn clear_trouble(&self) {
        *lock(&self.trouble) = None;
        self.has_trouble.store(false, Ordering::Relaxed);
    }
}
