//! A stage's share of the processor.
//!
//! Most calls are over within microseconds and run where their lane does. One that computes for longer than a slice would
//! keep that thread from everybody else, and a few of them all threads, the I/O driver with them. So from then on it is
//! run in turns with those of other stages, on threads that the runtime replaces meanwhile. A stage whose calls did so lately
//! begins its next ones there. One that rests now and then, just before its slice is over, is found by samples.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::{block_in_place, coop};
use tokio::time::timeout;
use wasmtime::UpdateDeadline;

use super::clock::{Clock, TICK};
use super::turns::{StageId, Turns};
use crate::slice::LongSlice;

/// Processor time that a guest may take before others get their turn.
const SLICE: Duration = Duration::from_millis(4);
/// Epochs between two looks at it.
pub(super) const EPOCHS_PER_LOOK: u64 = 1;
/// For a slice that one of its calls used up, a stage's calls begin in turns for so long.
const PENALTY: Duration = SLICE.saturating_mul(5);
/// A poll that took so much of the processor is one of a stage that computes for long, though it may be over before its slice is.
const LONG_POLL: Duration = Duration::from_millis(1);
/// Or so much for each message of its call, up to a slice: of many in a row, each called alone, one costs as much.
const LONG_MESSAGE: Duration = Duration::from_micros(10);
/// So much longer than its processor time a guest's time is where the system ran somebody else meanwhile.
const CROWDED: Duration = Duration::from_micros(500);
/// After that, so many looks at guests in turns are pauses.
const PAUSES: u32 = 100;
/// How long one is, at least.
const PAUSE: Duration = Duration::from_micros(50);
/// However many they were.
const MAX_PENALTY: Duration = Duration::from_secs(1);

/// A stage's share.
pub(super) struct Share {
    clock: Clock,
    turns: Arc<Turns>,
    stage: StageId,
    /// The tick until which its calls begin in turns.
    in_turns_until: AtomicU32,
    /// Whether its next poll is timed: a tick came in one, and the more of the processor they take, the more often one does.
    is_sampled: AtomicBool,
}

/// What a guest has used of its slice, in the poll that is going on on this thread.
#[derive(Clone, Copy, Default)]
struct Used {
    is_in_turn: bool,
    /// The thread's processor time at the poll's first tick.
    since: Option<Duration>,
    /// That of the last look, and when it was.
    last: Option<(Duration, Instant)>,
    all: bool,
}

/// Processor time from which on a poll of a call with so many messages is a long one.
fn long_poll(messages: usize) -> Duration {
    let messages = u32::try_from(messages).unwrap_or(u32::MAX);
    let of_messages = LONG_MESSAGE.saturating_mul(messages);
    of_messages.clamp(LONG_POLL, SLICE)
}

thread_local! {
    static USED: Cell<Used> = const { Cell::new(Used { is_in_turn: false, since: None, last: None, all: false }) };
    /// The tick at which a task gave way on this thread last.
    static GAVE_WAY: Cell<u32> = const { Cell::new(0) };
}

/// How many looks at guests in turns are pauses still.
static PAUSES_LEFT: AtomicU32 = AtomicU32::new(0);

/// What an instance's epoch callback answers: the guest goes on until its slice is used up. Processor time, since a thread
/// that the system did not run has used nothing.
pub(super) fn look() -> UpdateDeadline {
    let (used, now) = (USED.get(), thread_time());
    let since = used.since.unwrap_or(now);
    let all = now.saturating_sub(since) >= SLICE;
    if used.is_in_turn {
        let_others_run(used.last, now);
    }
    USED.set(Used {
        since: Some(since),
        last: used.is_in_turn.then(|| (thread_time(), Instant::now())),
        all,
        ..used
    });
    match all {
        true => UpdateDeadline::Yield(EPOCHS_PER_LOOK),
        false => UpdateDeadline::Continue(EPOCHS_PER_LOOK),
    }
}

/// By itself a system lets whoever waits for this processor wait until its own tick, four milliseconds on many. To yield is
/// not enough where they are of another group of processes, so a guest that was not alone lately pauses.
fn let_others_run(last: Option<(Duration, Instant)>, now: Duration) {
    let was_crowded = last
        .is_some_and(|(used, at)| at.elapsed().saturating_sub(now.saturating_sub(used)) >= CROWDED);
    if was_crowded {
        PAUSES_LEFT.store(PAUSES, Ordering::Relaxed);
    }
    let left = PAUSES_LEFT.load(Ordering::Relaxed);
    match left.checked_sub(1) {
        Some(left) => {
            PAUSES_LEFT.store(left, Ordering::Relaxed);
            std::thread::sleep(PAUSE);
        }
        None => std::thread::yield_now(),
    }
}

/// The processor time of this thread.
fn thread_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

impl Share {
    pub(super) fn new(clock: Clock, turns: Arc<Turns>) -> Self {
        Self {
            in_turns_until: AtomicU32::new(clock.now()),
            is_sampled: AtomicBool::new(false),
            clock,
            stage: turns.stage(),
            turns,
        }
    }

    /// The answer of a call with so many messages; `None`, and the call dropped, when it has had its time.
    pub(super) async fn within<T>(
        &self,
        limit: Duration,
        messages: usize,
        call: impl Future<Output = T>,
    ) -> Option<T> {
        let mut call = pin!(call);
        // Most calls wait for nothing, and need no timer.
        self.give_way().await;
        if !self.is_in_turns() {
            let first = poll_fn(|cx| Poll::Ready(self.poll(messages, call.as_mut(), cx))).await;
            if let Poll::Ready(answer) = first {
                return Some(answer);
            }
        }
        let since = self.clock.now();
        let mut call = pin!(self.run(messages, call));
        let mut wait = limit;
        while !wait.is_zero() {
            if let Ok(answer) = timeout(wait, call.as_mut()).await {
                return Some(answer);
            }
            let ticks = self.clock.now().wrapping_sub(since);
            wait = limit.saturating_sub(TICK.saturating_mul(ticks));
        }
        None
    }

    /// Runs a call, in turns where it must. Dropping it drops a turn with it.
    async fn run<T>(&self, messages: usize, mut call: Pin<&mut impl Future<Output = T>>) -> T {
        loop {
            self.give_way().await;
            let polled = match self.is_in_turns() {
                true => {
                    let _turn = self.turns.take(self.stage).await;
                    poll_fn(|cx| Poll::Ready(self.poll_apart(messages, call.as_mut(), cx))).await
                }
                false => poll_fn(|cx| Poll::Ready(self.poll(messages, call.as_mut(), cx))).await,
            };
            if let Poll::Ready(answer) = polled {
                return answer;
            }
            until_woken().await;
        }
    }

    /// Many calls in a row are no reason to keep the thread, neither by their number nor by their time: at the first of each tick
    /// the task, with all calls that it polls, lets others run.
    async fn give_way(&self) {
        let now = self.clock.now();
        if GAVE_WAY.replace(now) != now {
            use_up_budget();
        }
        coop::consume_budget().await;
    }

    fn poll<T>(
        &self,
        messages: usize,
        call: Pin<&mut impl Future<Output = T>>,
        cx: &mut Context<'_>,
    ) -> Poll<T> {
        self.poll_as(Used::default(), messages, call, cx)
    }

    fn poll_as<T>(
        &self,
        used: Used,
        messages: usize,
        call: Pin<&mut impl Future<Output = T>>,
        cx: &mut Context<'_>,
    ) -> Poll<T> {
        USED.set(used);
        let timed = match self.is_sampled.load(Ordering::Relaxed) {
            true => self.begin_sample(),
            false => None,
        };
        let polled = call.poll(cx);
        if timed.is_some() || USED.get().since.is_some() {
            self.account(timed, messages);
        }
        polled
    }

    /// The thread's processor time, unless another poll is the one that is timed.
    #[cold]
    fn begin_sample(&self) -> Option<Duration> {
        self.is_sampled
            .swap(false, Ordering::Relaxed)
            .then(thread_time)
    }

    /// After a poll that a tick came in, or that was timed.
    #[cold]
    fn account(&self, timed: Option<Duration>, messages: usize) {
        let used = USED.get();
        let took = timed.map(|since| thread_time().saturating_sub(since));
        let is_long = took.is_some_and(|took| took >= long_poll(messages));
        if used.all || is_long {
            self.penalize();
        }
        if used.since.is_some() {
            self.is_sampled.store(true, Ordering::Relaxed);
        }
    }

    /// The runtime gives what else this thread had to do to another one.
    fn poll_apart<T>(
        &self,
        messages: usize,
        call: Pin<&mut impl Future<Output = T>>,
        cx: &mut Context<'_>,
    ) -> Poll<T> {
        let used = Used {
            is_in_turn: true,
            ..Used::default()
        };
        // A runtime of one thread, as tests have it, has none to give it to.
        match Handle::current().runtime_flavor() {
            RuntimeFlavor::CurrentThread => self.poll_as(used, messages, call, cx),
            _ => block_in_place(|| {
                let _slice = LongSlice::begin();
                self.poll_as(used, messages, call, cx)
            }),
        }
    }

    fn is_in_turns(&self) -> bool {
        self.left(self.clock.now()) > 0
    }

    /// Ticks until calls do not begin in turns any more. Ticks wrap, so what is further off than it may be is long over.
    fn left(&self, now: u32) -> u32 {
        let until = self.in_turns_until.load(Ordering::Relaxed);
        let left = until.wrapping_sub(now);
        if left <= ticks(MAX_PENALTY) { left } else { 0 }
    }

    fn penalize(&self) {
        let now = self.clock.now();
        let left = (self.left(now) + ticks(PENALTY)).min(ticks(MAX_PENALTY));
        (self.in_turns_until).store(now.wrapping_add(left), Ordering::Relaxed);
    }
}

const fn ticks(time: Duration) -> u32 {
    (time.as_millis() / TICK.as_millis()) as u32
}

/// What a task has of tokio's budget: whatever it awaits next that counts against it waits until others were run, the I/O driver
/// among them. Bounded by the budget, and a task outside the runtime, which has none, is let go on.
fn use_up_budget() {
    const BUDGET: usize = 128;
    let waker = std::task::Waker::noop();
    let mut cx = Context::from_waker(waker);
    for _ in 0..BUDGET {
        match coop::poll_proceed(&mut cx) {
            Poll::Ready(unit) => unit.made_progress(),
            Poll::Pending => return,
        }
    }
}

/// Lets the task rest until somebody wakes it, as the call that was just polled has arranged.
async fn until_woken() {
    let mut rested = false;
    poll_fn(|_| match std::mem::replace(&mut rested, true) {
        true => Poll::Ready(()),
        false => Poll::Pending,
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(100);

    /// What a call of some length comes to when the clock ticks once in so much time.
    async fn check(tick: Duration, call: Duration, expected: Option<()>) {
        let clock = Clock::default();
        let ticking = clock.clone();
        let ticker = tokio::spawn(async move {
            loop {
                tokio::time::sleep(tick).await;
                ticking.tick();
            }
        });
        let answer = Share::new(clock, Turns::new())
            .within(LIMIT, 1, tokio::time::sleep(call))
            .await;
        assert_eq!(answer, expected, "{call:?}, a tick in {tick:?}");
        ticker.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_has_its_time_and_no_more() {
        check(TICK, LIMIT / 2, Some(())).await;
        check(TICK, LIMIT * 2, None).await;
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_the_host_did_not_run_does_not_count() {
        check(TICK * 10, LIMIT * 5, Some(())).await;
        check(TICK * 10, LIMIT * 20, None).await;
    }
}
