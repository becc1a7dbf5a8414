//! Memory that the messages of a server's clients share: bodies that come in, and answers that are taken slowly.
//!
//! It is taken as bytes arrive, not as they are announced. Nobody waits for it: where it runs out, the client on whom we
//! have waited for longest gives way, and if all have just begun, the one that asks gets none. So those who hold half of
//! their bodies back can't lock others out, and there is nothing to deadlock on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Bytes of each message that need no room. Connections are bounded, so these are, too; and small messages get through,
/// whatever large ones do.
pub(super) const OWN_BYTES: usize = 16 * 1024;
/// How long a message may be under way before it may have to give way.
const GRACE: Duration = Duration::from_secs(1);

/// The room.
#[derive(Debug)]
pub(super) struct Room {
    /// What needs no room, of each message.
    own: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: usize,
    next: u64,
    /// Messages with room that are under way: their clients are to send or to take them.
    under_way: HashMap<u64, UnderWay>,
}

#[derive(Debug)]
struct UnderWay {
    began: Instant,
    /// Of the room.
    bytes: usize,
    gives_way: Arc<Notify>,
}

/// There is no room.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NoRoom;

/// The part of the room that one message has, until it is dropped.
#[derive(Debug)]
pub(crate) struct Hold {
    room: Arc<Room>,
    id: u64,
    began: Instant,
    /// Bytes of the message.
    size: usize,
    under_way: bool,
    gives_way: Arc<Notify>,
}

impl Room {
    /// Of so many bytes, beyond the `own` ones of each message.
    pub(super) fn new(bytes: usize, own: usize) -> Self {
        Self {
            own,
            state: Mutex::new(State {
                free: bytes,
                next: 0,
                under_way: HashMap::new(),
            }),
        }
    }

    /// For a message of which nothing is there yet. `gives_way` is told if its room is given to another.
    pub(super) fn hold(self: &Arc<Self>, gives_way: Arc<Notify>) -> Hold {
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        drop(state);
        Hold {
            room: Arc::clone(self),
            id,
            began: Instant::now(),
            size: 0,
            under_way: true,
            gives_way,
        }
    }

    /// Whether a message of this size needs room.
    pub(super) fn is_needed(&self, size: usize) -> bool {
        self.needs(size) > 0
    }

    /// Bytes of a message of this size that need room.
    fn needs(&self, size: usize) -> usize {
        size.saturating_sub(self.own)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hold {
    /// How large the message is.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// The message becomes as large as this.
    pub(crate) fn resize(&mut self, size: usize) -> Result<(), NoRoom> {
        let (has, needs) = (self.room.needs(self.size), self.room.needs(size));
        self.size = size;
        if has == needs {
            return Ok(());
        }
        let mut state = self.room.state();
        if self.under_way && has > 0 && !state.under_way.contains_key(&self.id) {
            // Its room is another's already.
            self.size = 0;
            return Err(NoRoom);
        }
        if needs > has && !state.take(needs - has, self.id) {
            self.size -= needs - has;
            return Err(NoRoom);
        }
        state.free += has.saturating_sub(needs);
        if self.under_way {
            let under_way = UnderWay {
                began: self.began,
                bytes: needs,
                gives_way: Arc::clone(&self.gives_way),
            };
            state.under_way.insert(self.id, under_way);
        }
        Ok(())
    }

    /// The message is there, and keeps its room from now on; unless it has lost it.
    pub(super) fn arrived(&mut self) -> Result<(), NoRoom> {
        self.under_way = false;
        let has = self.room.needs(self.size);
        if has > 0 && self.room.state().under_way.remove(&self.id).is_none() {
            self.size = 0;
            return Err(NoRoom);
        }
        Ok(())
    }

    /// Until its room is given to another. Cancel-safe: the news is kept.
    pub(super) async fn gives_way(&self) {
        self.gives_way.notified().await;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let has = self.room.needs(self.size);
        if has == 0 {
            return;
        }
        let mut state = self.room.state();
        if !self.under_way || state.under_way.remove(&self.id).is_some() {
            state.free += has;
        }
    }
}

impl State {
    /// Takes room, if need be from those that have been under way for longest; they let go of their bytes within a moment.
    fn take(&mut self, bytes: usize, asking: u64) -> bool {
        while self.free < bytes {
            let longest = self
                .under_way
                .iter()
                .filter(|(id, message)| **id != asking && message.began.elapsed() >= GRACE)
                .min_by_key(|(_, message)| message.began)
                .map(|(id, _)| *id);
            let Some(message) = longest.and_then(|id| self.under_way.remove(&id)) else {
                return false;
            };
            self.free += message.bytes;
            message.gives_way.notify_one();
        }
        self.free -= bytes;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hold(room: &Arc<Room>) -> Hold {
        room.hold(Arc::default())
    }

    fn free(room: &Room) -> usize {
        room.state().free
    }

    #[test]
    fn room_is_taken_as_a_message_grows_and_given_back() {
        let room = Arc::new(Room::new(100, 10));
        let mut one = hold(&room);
        one.resize(10).unwrap();
        assert_eq!(free(&room), 100);
        one.resize(60).unwrap();
        let mut other = hold(&room);
        assert_eq!(other.resize(61), Err(NoRoom));
        other.resize(60).unwrap();
        assert_eq!(free(&room), 0);
        other.arrived().unwrap();
        other.resize(20).unwrap();
        assert_eq!(free(&room), 40);
        drop((one, other));
        assert_eq!(free(&room), 100);
    }

    #[test]
    fn the_longest_under_way_gives_way() {
        let room = Arc::new(Room::new(100, 0));
        let long_ago = |seconds| {
            Instant::now()
                .checked_sub(Duration::from_secs(seconds))
                .unwrap()
        };
        let mut done = hold(&room);
        done.resize(20).unwrap();
        done.arrived().unwrap();
        let [mut fast, mut slow, mut new] = [hold(&room), hold(&room), hold(&room)];
        (fast.began, slow.began) = (long_ago(2), long_ago(20));
        fast.resize(40).unwrap();
        slow.resize(30).unwrap();
        new.resize(10).unwrap();
        new.resize(35).unwrap();
        assert_eq!(slow.resize(31), Err(NoRoom));
        assert_eq!(slow.arrived(), Ok(()), "it holds nothing any more");
        fast.arrived().unwrap();
        let mut late = hold(&room);
        assert_eq!(late.resize(6), Err(NoRoom), "none that gives way");
        drop((done, fast, slow, new, late));
        assert_eq!(free(&room), 100);
    }
}
