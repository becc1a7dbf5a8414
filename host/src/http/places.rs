//! The places that a listener has, for connections and for their requests. Where all are taken, a connection that its client
//! holds without need gives way to a new one: whoever opens many and sends nothing must not keep others out. Requests wait for
//! their places in the order in which they came, one a connection: whoever sends one behind the other must not, either.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::{AbortHandle, Id};
use tokio::time::timeout;

use crate::metrics::{Metrics, TurnedAway};

/// How long a request waits for a place.
const PLACE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a client may take over a body or an answer before its place may be given to another.
const STALLED: Duration = Duration::from_secs(1);
/// How often such clients are looked for while requests wait.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(100);
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

/// The places of requests.
pub(super) struct Requests {
    places: Arc<Semaphore>,
    waiting: AtomicUsize,
    /// One more waits.
    news: Notify,
    /// Whether a connection is to end with its next answer.
    is_wanted: AtomicBool,
    notices: Notices,
}

/// A request that waits for a place.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Requests {
    pub(super) fn new(listener: &'static str, metrics: Arc<Metrics>, max: usize) -> Self {
        Self {
            places: Arc::new(Semaphore::new(max)),
            waiting: AtomicUsize::new(0),
            news: Notify::new(),
            is_wanted: AtomicBool::new(false),
            notices: Notices::new(listener, metrics, max),
        }
    }

    /// A place for a request, until it is dropped. None where none came free in time.
    pub(super) async fn place(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            return Some(place);
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        self.news.notify_one();
        let place = timeout(PLACE_TIMEOUT, Arc::clone(&self.places).acquire_owned());
        let place = place.await.ok().and_then(Result::ok);
        if place.is_none() {
            self.notices.turned_away(TurnedAway::Full);
        }
        place
    }

    /// Whether any wait.
    pub(super) fn wait(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Until one more waits. Cancel-safe: the news is kept.
    pub(super) async fn news(&self) {
        self.news.notified().await;
    }

    /// Whether the connection that is being answered is to make room for others.
    pub(super) fn want_a_connection(&self) -> bool {
        self.is_wanted.load(Ordering::Relaxed) && self.is_wanted.swap(false, Ordering::Relaxed)
    }
}

/// All connections of a listener.
pub(super) struct Connections {
    requests: Arc<Requests>,
    max: usize,
    began: Instant,
    taken: HashMap<Id, Taken>,
}

struct Taken {
    place: Arc<Place>,
    task: AbortHandle,
}

impl Connections {
    pub(super) fn new(requests: Arc<Requests>, max: usize) -> Self {
        Self {
            requests,
            max,
            began: Instant::now(),
            taken: HashMap::new(),
        }
    }

    /// Tasks of connections, at most: those that were told to end may take a moment.
    pub(super) fn max_tasks(&self) -> usize {
        2 * self.max
    }

    /// The place of a new connection. None where it is to be closed at once.
    pub(super) fn admit(&mut self) -> Option<Arc<Place>> {
        if self.taken.len() >= self.max && !self.give_up_one(true) {
            self.requests.is_wanted.store(true, Ordering::Relaxed);
            self.requests.notices.turned_away(TurnedAway::Full);
            return None;
        }
        Some(Arc::new(Place::new(self.began)))
    }

    pub(super) fn insert(&mut self, place: Arc<Place>, task: AbortHandle) {
        self.taken.insert(task.id(), Taken { place, task });
    }

    pub(super) fn remove(&mut self, task: Id) {
        self.taken.remove(&task);
    }

    /// Requests wait: ends connections whose clients have stalled, as many as may be needed.
    pub(super) fn make_room(&mut self) {
        for _ in 0..self.requests.waiting.load(Ordering::Relaxed) {
            if !self.give_up_one(false) {
                return;
            }
        }
    }

    /// A new connection could not be accepted, as where file descriptors run out: frees one that nobody needs.
    pub(super) fn cannot_accept(&mut self, error: &io::Error) {
        self.requests.notices.cannot_accept(error);
        self.give_up_one(true);
    }

    /// Ends the connection on whose client we have waited for longest: for the rest of a message or, of those that may idle
    /// no longer, for a request.
    fn give_up_one(&mut self, idle_too: bool) -> bool {
        let now = millis(self.began.elapsed());
        let stalled = now.saturating_sub(millis(STALLED));
        let candidates = self.taken.iter().filter_map(|(id, taken)| {
            let (why, since) = match taken.place.turn() {
                Turn::Waiting(since) if idle_too => (TurnedAway::Idle, since),
                Turn::Transfer(since) if since <= stalled => (TurnedAway::Stalled, since),
                _ => return None,
            };
            Some((why, since, *id))
        });
        let Some((why, _, id)) = candidates.min_by_key(|(_, since, _)| *since) else {
            return false;
        };
        if let Some(taken) = self.taken.remove(&id) {
            taken.task.abort();
        }
        self.requests.notices.turned_away(why);
        true
    }
}

/// Tells that places run out: each connection that is turned away in the metrics, and now and then a line of the log.
struct Notices {
    listener: &'static str,
    metrics: Arc<Metrics>,
    requests: usize,
    said: Mutex<Said>,
}

#[derive(Default)]
struct Said {
    last: Option<Instant>,
    /// Those that were turned away since.
    unsaid: u64,
}

impl Said {
    /// Whether it is time for a line.
    fn may_say(&mut self) -> bool {
        let may = self.last.is_none_or(|last| last.elapsed() >= NOTICE_EVERY);
        if may {
            self.last = Some(Instant::now());
        }
        may
    }
}

impl Notices {
    fn new(listener: &'static str, metrics: Arc<Metrics>, requests: usize) -> Self {
        Self {
            listener,
            metrics,
            requests,
            said: Mutex::default(),
        }
    }

    fn turned_away(&self, why: TurnedAway) {
        self.metrics.turned_away(self.listener, why);
        let mut said = self.said();
        said.unsaid += 1;
        if said.may_say() {
            tracing::warn!(
                listener = self.listener,
                requests = self.requests,
                turned_away = said.unsaid,
                "all connections are taken: idle and slow ones are closed for new ones, and where there is none, new ones refused"
            );
            said.unsaid = 0;
        }
    }

    fn cannot_accept(&self, error: &io::Error) {
        if self.said().may_say() {
            tracing::warn!(listener = self.listener, %error, "cannot accept a connection");
        }
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX >> 2)
}
