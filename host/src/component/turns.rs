//! Turns of guests that compute for long: stage by stage, so that one with many such calls keeps none from the others. A task
//! runs one call at a time, so it has one turn at most, however many calls it has: another would be nobody's.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;
use tokio::task::{self, Id};

/// Who takes turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StageId(u64);

/// Turns, as many at one time as there are processors, but for one, which is left to everybody else. Threads of low priority for all
/// of them would leave no processor idle, and stand in the way of others all the same: who is not run may hold a lock.
pub(super) struct Turns {
    stages: AtomicU64,
    queue: Mutex<Queue>,
}

/// Calls that wait, by their stages; the next stage first. There are at most as many as there are calls.
struct Queue {
    all: usize,
    free: usize,
    stages: VecDeque<(StageId, VecDeque<Waiting>)>,
    /// Tasks that have a turn.
    busy: HashSet<Id>,
}

/// A call that waits for a turn.
struct Waiting {
    task: Option<Id>,
    turn: oneshot::Sender<Turn>,
}

/// A turn, until it is dropped.
pub(super) struct Turn {
    turns: Arc<Turns>,
    task: Option<Id>,
}

impl Turns {
    pub(super) fn new() -> Arc<Self> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let all = processors.saturating_sub(1).max(1);
        Arc::new(Self {
            stages: AtomicU64::default(),
            queue: Mutex::new(Queue {
                all,
                free: all,
                stages: VecDeque::new(),
                busy: HashSet::new(),
            }),
        })
    }

    /// Whether anybody has one.
    pub(super) fn are_taken(&self) -> bool {
        let queue = self.queue();
        queue.free < queue.all
    }

    /// One more stage.
    pub(super) fn stage(&self) -> StageId {
        StageId(self.stages.fetch_add(1, Ordering::Relaxed))
    }

    /// Waits for a turn. Cancel-safe: one that was given and not taken is the next one's.
    pub(super) async fn take(self: &Arc<Self>, stage: StageId) -> Option<Turn> {
        let (turn, waiting) = oneshot::channel();
        let task = task::try_id();
        self.queue().add(stage, Waiting { task, turn });
        self.hand_out();
        // The sender is dropped only with the turns themselves.
        waiting.await.ok()
    }

    /// Gives what is free to those that wait.
    fn hand_out(self: &Arc<Self>) {
        loop {
            let Some(Waiting { task, turn }) = self.queue().next() else {
                return;
            };
            let turns = self.clone();
            // One that waits no more drops it here, which hands it out again.
            let _ = turn.send(Turn { turns, task });
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn add(&mut self, stage: StageId, call: Waiting) {
        match self.stages.iter_mut().find(|(id, _)| *id == stage) {
            Some((_, calls)) => calls.push_back(call),
            None => self.stages.push_back((stage, VecDeque::from([call]))),
        }
    }

    /// If a turn is free: the first call that still waits and may have it, of the first stage that has one. The stage's next one
    /// comes after those of all others.
    fn next(&mut self) -> Option<Waiting> {
        if self.free == 0 {
            return None;
        }
        for _ in 0..self.stages.len() {
            let (stage, mut calls) = self.stages.pop_front()?;
            calls.retain(|call| !call.turn.is_closed());
            let may = |call: &Waiting| call.task.is_none_or(|task| !self.busy.contains(&task));
            let at = calls.iter().position(may);
            let next = at.and_then(|at| calls.remove(at));
            if !calls.is_empty() {
                self.stages.push_back((stage, calls));
            }
            if let Some(next) = next {
                self.free -= 1;
                self.busy.extend(next.task);
                return Some(next);
            }
        }
        None
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        {
            let mut queue = self.turns.queue();
            queue.free += 1;
            if let Some(task) = self.task {
                queue.busy.remove(&task);
            }
        }
        self.turns.hand_out();
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use futures::FutureExt;

    use super::*;

    type Call = Pin<Box<dyn Future<Output = Option<Turn>> + Send>>;

    /// Takes all turns that there are.
    fn take_all(turns: &Arc<Turns>) -> Vec<Turn> {
        let stage = turns.stage();
        let all = turns.queue().free;
        let take = |_| turns.take(stage).now_or_never().flatten();
        (0..all).map(|n| take(n).expect("a turn")).collect()
    }

    async fn wait(turns: &Arc<Turns>, stage: StageId) -> Call {
        let turns = turns.clone();
        let mut call: Call = Box::pin(async move { turns.take(stage).await });
        assert!(futures::poll!(call.as_mut()).is_pending());
        call
    }

    #[tokio::test]
    async fn stages_take_turns_however_many_calls_they_have() {
        let turns = Turns::new();
        let (greedy, modest) = (turns.stage(), turns.stage());
        let mut held = take_all(&turns);
        assert!(turns.are_taken());
        let mut waiting = Vec::new();
        for stage in [greedy, greedy, greedy, modest] {
            waiting.push((stage, wait(&turns, stage).await));
        }
        // One that is given up takes no turn.
        drop(waiting.remove(1));
        let mut order = Vec::new();
        while !waiting.is_empty() {
            held.pop();
            for n in (0..waiting.len()).rev() {
                if let Some(turn) = waiting[n].1.as_mut().now_or_never() {
                    order.push(waiting.remove(n).0);
                    held.extend(turn);
                }
            }
        }
        assert_eq!(order, [greedy, modest, greedy]);
        held.clear();
        assert!(!turns.are_taken() && turns.queue().stages.is_empty());
    }

    /// Calls of a concurrent lane are polled by one task: while one of them runs, a turn of another would lie idle.
    #[tokio::test]
    async fn a_task_has_one_turn_at_a_time() {
        let turns = Turns::new();
        let all = turns.queue().free;
        let mine = turns.clone();
        let task = tokio::spawn(async move {
            let stage = mine.stage();
            let first = mine.take(stage).await;
            let second = wait(&mine, stage).await;
            let free = mine.queue().free;
            drop(first);
            let second = second.await;
            (free, mine.queue().free, second.is_some())
        });
        let seen = task.await.expect("no panic");
        assert_eq!(seen, (all - 1, all - 1, true));
        assert_eq!(turns.queue().free, all);
        assert!(turns.queue().busy.is_empty());
    }
}
