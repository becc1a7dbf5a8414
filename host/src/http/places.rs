//! The places that a listener has, for requests and for connections. Whoever opens many connections and sends nothing, or one
//! request behind the other, must not keep others out. So requests wait for their places in the order in which they came, one a
//! connection. And where there are as many connections as there are places for requests, each new one takes that of another: of one
//! that its client holds without need or, if there is none, of the oldest, which ends with its next answer.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::Id;
use tokio::time::timeout;

use super::Limits;
use crate::metrics::{Metrics, TurnedAway};

/// How long a request waits for a place, and a new connection.
pub(super) const PLACE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a client may take over a body or an answer before its place may be given to another.
const STALLED: Duration = Duration::from_secs(1);
/// A client that we wait for a shorter time for does not count as idle: its request is on its way.
const FRESH: Duration = Duration::from_millis(50);
/// How often stalled clients are looked for while somebody waits.
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
    /// What `turn` was when the client first let us wait for the message that is under way; 0 if it did not.
    first: AtomicU64,
    /// Its request waits for a place.
    queues: AtomicBool,
    /// What `turn` was when it was asked to give way, and the news of that; 0 if it was not.
    asked: AtomicU64,
    asking: Notify,
    /// It ends with its next answer.
    ends: AtomicBool,
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
        Self {
            began,
            turn: AtomicU64::new(0),
            first: AtomicU64::new(0),
            queues: AtomicBool::new(false),
            asked: AtomicU64::new(0),
            asking: Notify::new(),
            ends: AtomicBool::new(false),
        }
    }

    /// The client is to send a request.
    pub(super) fn waits(&self) {
        if !matches!(self.turn(), Turn::Waiting(_)) {
            self.turn.store(self.now(), Ordering::Relaxed);
        }
    }

    /// The client is to send more of a body, or to take more of an answer. A little of either does not begin its turn anew.
    pub(super) fn transfers(&self) {
        if self.turn.load(Ordering::Relaxed) == 0 {
            if self.first.load(Ordering::Relaxed) == 0 {
                self.first.store(self.now() | 1, Ordering::Relaxed);
            }
            (self.turn).store(self.first.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// The client has sent or taken a little.
    pub(super) fn moved(&self) {
        if matches!(self.turn(), Turn::Transfer(_)) {
            self.turn.store(0, Ordering::Relaxed);
        }
    }

    /// We are to work: a request has come, or our part in its answer begins.
    pub(super) fn works(&self) {
        self.first.store(0, Ordering::Relaxed);
        self.turn.store(0, Ordering::Relaxed);
    }

    /// Asks the connection to give way, if its client is where it was.
    fn ask(&self, turn: u64) {
        self.asked.store(turn, Ordering::Relaxed);
        self.asking.notify_one();
    }

    fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed) != 0
    }

    /// Until it is asked to give way. Cancel-safe: the news is kept.
    pub(super) async fn asked(&self) {
        self.asking.notified().await;
    }

    /// Why the connection, which was asked, is to give way; None where its client has gone on. For the connection alone to ask, once
    /// it has read what was there to read.
    pub(super) fn gives_way(&self) -> Option<TurnedAway> {
        let asked = self.asked.swap(0, Ordering::Relaxed);
        match self.turn_of(asked) {
            _ if asked != self.turn.load(Ordering::Relaxed) => None,
            Turn::Ours => None,
            Turn::Waiting(_) => Some(TurnedAway::Idle),
            Turn::Transfer(_) => Some(TurnedAway::Stalled),
        }
    }

    /// Whether the connection is to end with this answer.
    pub(super) fn ends(&self) -> bool {
        self.ends.load(Ordering::Relaxed)
    }

    /// A client's turn that begins now, to send a request.
    fn now(&self) -> u64 {
        (millis(self.began.elapsed()) + 1) << 1
    }

    fn turn(&self) -> Turn {
        self.turn_of(self.turn.load(Ordering::Relaxed))
    }

    /// What `turn` says.
    fn turn_of(&self, turn: u64) -> Turn {
        match turn {
            _ if self.queues.load(Ordering::Relaxed) => Turn::Ours,
            0 => Turn::Ours,
            turn if turn & 1 == 0 => Turn::Waiting((turn >> 1) - 1),
            turn => Turn::Transfer((turn >> 1) - 1),
        }
    }
}

/// The places of requests.
pub(super) struct Requests {
    places: Arc<Semaphore>,
    waiting: AtomicUsize,
    /// One more waits.
    news: Notify,
    notices: Notices,
}

/// A request that waits for a place.
struct Queued<'a> {
    waiting: &'a AtomicUsize,
    place: &'a Place,
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        self.place.works();
        self.place.queues.store(false, Ordering::Relaxed);
    }
}

impl Requests {
    pub(super) fn new(listener: &'static str, metrics: Arc<Metrics>, max: usize) -> Self {
        Self {
            places: Arc::new(Semaphore::new(max)),
            waiting: AtomicUsize::new(0),
            news: Notify::new(),
            notices: Notices::new(listener, metrics, max),
        }
    }

    /// A place for the request of a connection, until it is dropped. None where none came free in time.
    pub(super) async fn place(&self, of: &Place) -> Option<OwnedSemaphorePermit> {
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            return Some(place);
        }
        let _queued = self.queue(of);
        let place = timeout(PLACE_TIMEOUT, Arc::clone(&self.places).acquire_owned());
        let place = place.await.ok().and_then(Result::ok);
        if place.is_none() {
            self.notices.turned_away(TurnedAway::Full);
        }
        place
    }

    fn queue<'a>(&'a self, place: &'a Place) -> Queued<'a> {
        place.queues.store(true, Ordering::Relaxed);
        self.waiting.fetch_add(1, Ordering::Relaxed);
        self.news.notify_one();
        let waiting = &self.waiting;
        Queued { waiting, place }
    }

    /// Whether any wait.
    pub(super) fn wait(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// A connection was closed for another one, or for its request.
    pub(super) fn turned_away(&self, why: TurnedAway) {
        self.notices.turned_away(why);
    }

    /// Until one more waits. Cancel-safe: the news is kept.
    pub(super) async fn news(&self) {
        self.news.notified().await;
    }
}

/// All connections of a listener.
pub(super) struct Connections {
    requests: Arc<Requests>,
    /// As many as there are places for requests: above, each new one takes the place of another.
    enough: usize,
    max: usize,
    began: Instant,
    taken: HashMap<Id, Taken>,
    /// Connections so far.
    count: u64,
}

struct Taken {
    place: Arc<Place>,
    /// Which one it is.
    number: u64,
}

impl Connections {
    pub(super) fn new(requests: Arc<Requests>, limits: &Limits) -> Self {
        Self {
            requests,
            enough: limits.requests,
            max: limits.connections,
            began: Instant::now(),
            taken: HashMap::new(),
            count: 0,
        }
    }

    /// Tasks of connections, at most: those that were told to end may take a moment.
    pub(super) fn max_tasks(&self) -> usize {
        2 * self.max
    }

    /// There is a new connection: another one is to make room for it, where there are enough.
    pub(super) fn make_way(&self) {
        if self.taken.len() >= self.enough && !self.ask_one(true) {
            self.let_the_oldest_end();
        }
    }

    /// A new connection still waits. Who was asked may have gone on, and who is to end may take its time.
    pub(super) fn make_way_again(&self) {
        self.ask_one(true);
        self.let_the_oldest_end();
    }

    /// The place of a new connection, once there is room for it.
    pub(super) fn admit(&self) -> Option<Arc<Place>> {
        let has_room = self.taken.len() < self.max;
        has_room.then(|| Arc::new(Place::new(self.began)))
    }

    /// A new connection is closed, as there was no room for it for so long.
    pub(super) fn refuse(&self) {
        self.requests.notices.turned_away(TurnedAway::Full);
    }

    /// Has a connection end with its next answer.
    fn let_the_oldest_end(&self) {
        let going_on = self.taken.values().filter(|taken| !taken.place.ends());
        if let Some(oldest) = going_on.min_by_key(|taken| taken.number) {
            oldest.place.ends.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn insert(&mut self, place: Arc<Place>, task: Id) {
        self.count += 1;
        let number = self.count;
        self.taken.insert(task, Taken { place, number });
    }

    pub(super) fn remove(&mut self, task: Id) {
        self.taken.remove(&task);
    }

    /// Requests wait: connections whose clients have stalled are to end, as many as may be needed.
    pub(super) fn make_room(&self) {
        for _ in 0..self.requests.waiting.load(Ordering::Relaxed) {
            if !self.ask_one(false) {
                return;
            }
        }
    }

    /// A new connection could not be accepted, as where file descriptors run out: one that nobody needs is to end.
    pub(super) fn cannot_accept(&self, error: &io::Error) {
        self.requests.notices.cannot_accept(error);
        self.ask_one(true);
    }

    /// Asks the connection to give way on whose client we have waited for longest: for the rest of a message or, if it may be an
    /// idle one, for a request. It knows best whether its client has gone on; answers whether there is one.
    fn ask_one(&self, idle_too: bool) -> bool {
        let now = millis(self.began.elapsed());
        let before = |time| now.saturating_sub(millis(time));
        let (stalled, idle) = (before(STALLED), before(FRESH));
        let not_asked = self.taken.values().filter(|taken| !taken.place.is_asked());
        let candidates = not_asked.filter_map(|taken| {
            // Looked at once: what is judged is what it is asked for.
            let turn = taken.place.turn.load(Ordering::Relaxed);
            let since = match taken.place.turn_of(turn) {
                Turn::Waiting(since) if idle_too && since <= idle => since,
                Turn::Transfer(since) if since <= stalled => since,
                _ => return None,
            };
            Some((since, turn, &taken.place))
        });
        let oldest = candidates.min_by_key(|(since, ..)| *since);
        if let Some((_, turn, place)) = oldest {
            place.ask(turn);
        }
        oldest.is_some()
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
                "all places are taken: idle and slow connections are closed for new ones, and where there is none, new ones refused"
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
