//! The places that a listener has for connections. Where all are taken, a connection that its client holds without need
//! gives way to a new one: whoever opens many and sends nothing must not keep others out.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::{AbortHandle, Id};

use crate::metrics::{Metrics, TurnedAway};

/// Connections beyond those served, that are told so.
const MAX_REFUSED: usize = 64;
/// How long a client may take over a body or an answer before its place may be given to another.
const STALLED: Duration = Duration::from_secs(1);
/// How often the log says that places run out.
const NOTICE_EVERY: Duration = Duration::from_secs(10);

/// Of one connection: whose turn it is, and since when. Updated by the connection, read where a place is needed.
#[derive(Debug)]
pub(super) struct Place {
    /// When the listener began, from which times count.
    began: Instant,
    /// 0 while it is our turn; else the milliseconds after `began`, and in the lowest bit whether a message is under way.
    turn: AtomicU64,
}

/// What a client has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Ours,
    /// To send the head of a request.
    Waiting(u64),
    /// To send its body, or to take the answer.
    Transfer(u64),
}

impl Place {
    fn new(began: Instant) -> Self {
        let place = Self {
            began,
            turn: AtomicU64::new(0),
        };
        place.waits();
        place
    }

    /// The client is to send a request.
    pub(super) fn waits(&self) {
        if !matches!(self.turn(), Turn::Waiting(_)) {
            self.set(0);
        }
    }

    /// The client is to send more of a body, or to take more of an answer. A little of either does not begin its turn anew.
    pub(super) fn transfers(&self) {
        if self.turn() == Turn::Ours {
            self.set(1);
        }
    }

    /// We are to answer.
    pub(super) fn works(&self) {
        self.turn.store(0, Ordering::Relaxed);
    }

    fn set(&self, kind: u64) {
        let now = millis(self.began.elapsed());
        self.turn.store((now + 1) << 1 | kind, Ordering::Relaxed);
    }

    fn turn(&self) -> Turn {
        match self.turn.load(Ordering::Relaxed) {
            0 => Turn::Ours,
            turn if turn & 1 == 0 => Turn::Waiting(turn >> 1),
            turn => Turn::Transfer(turn >> 1),
        }
    }
}

/// What becomes of a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    Serve,
    /// Told that there are too many.
    Refuse,
    Close,
}

/// All connections of a listener.
pub(super) struct Places {
    listener: &'static str,
    metrics: Arc<Metrics>,
    max: usize,
    began: Instant,
    taken: HashMap<Id, Taken>,
    /// Of `taken`, those that are served.
    served: usize,
    said: Option<Instant>,
    /// Those that were turned away since it was said.
    unsaid: u64,
}

struct Taken {
    place: Arc<Place>,
    served: bool,
    task: AbortHandle,
}

impl Places {
    pub(super) fn new(listener: &'static str, metrics: Arc<Metrics>, max: usize) -> Self {
        Self {
            listener,
            metrics,
            max,
            began: Instant::now(),
            taken: HashMap::new(),
            served: 0,
            said: None,
            unsaid: 0,
        }
    }

    /// Tasks of connections, at most: those that were told to end may take a moment.
    pub(super) fn max_tasks(&self) -> usize {
        2 * (self.max + MAX_REFUSED)
    }

    pub(super) fn place(&self) -> Arc<Place> {
        Arc::new(Place::new(self.began))
    }

    pub(super) fn insert(&mut self, place: Arc<Place>, served: bool, task: AbortHandle) {
        self.served += usize::from(served);
        let taken = Taken {
            place,
            served,
            task,
        };
        self.taken.insert(taken.task.id(), taken);
    }

    pub(super) fn remove(&mut self, task: Id) {
        if let Some(taken) = self.taken.remove(&task) {
            self.served -= usize::from(taken.served);
        }
    }

    /// Makes room for a new connection, if there is none.
    pub(super) fn admit(&mut self) -> Admission {
        if self.served < self.max || self.give_up_one(true) {
            return Admission::Serve;
        }
        self.turned_away(TurnedAway::Full);
        if self.taken.len() - self.served < MAX_REFUSED || self.give_up_one(false) {
            return Admission::Refuse;
        }
        Admission::Close
    }

    /// A new connection could not be accepted, as where file descriptors run out: frees one that nobody needs.
    pub(super) fn cannot_accept(&mut self, error: &io::Error) {
        if self.may_say() {
            tracing::warn!(listener = self.listener, %error, "cannot accept a connection");
        }
        self.give_up_one(true);
    }

    /// Ends the connection on whose client we have waited for longest: for a request, or for the rest of a message.
    fn give_up_one(&mut self, served: bool) -> bool {
        let now = millis(self.began.elapsed());
        let stalled = now.saturating_sub(millis(STALLED));
        let of_kind = self.taken.iter().filter(|(_, t)| t.served == served);
        let candidates = of_kind.filter_map(|(id, taken)| match taken.place.turn() {
            Turn::Ours => None,
            Turn::Waiting(since) => Some((TurnedAway::Idle, since, *id)),
            Turn::Transfer(since) if since > stalled => None,
            Turn::Transfer(since) => Some((TurnedAway::Stalled, since, *id)),
        });
        let Some((why, _, id)) = candidates.min_by_key(|(_, since, _)| *since) else {
            return false;
        };
        if let Some(taken) = self.taken.get(&id) {
            taken.task.abort();
        }
        self.remove(id);
        self.turned_away(why);
        true
    }

    fn turned_away(&mut self, why: TurnedAway) {
        self.metrics.turned_away(self.listener, why);
        self.unsaid += 1;
        if self.may_say() {
            tracing::warn!(
                listener = self.listener,
                connections = self.max,
                turned_away = self.unsaid,
                "all connections are taken: idle and slow ones are closed for new ones, and where there is none, new ones refused"
            );
            self.unsaid = 0;
        }
    }

    fn may_say(&mut self) -> bool {
        let may = self.said.is_none_or(|said| said.elapsed() >= NOTICE_EVERY);
        if may {
            self.said = Some(Instant::now());
        }
        may
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX >> 2)
}
