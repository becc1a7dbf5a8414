//! Turns of guests that compute for long: stage by stage, so that one with many such calls keeps none from the others.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use rayon::{ThreadPool, ThreadPoolBuilder};
use tokio::sync::oneshot;
use tracing::debug;

/// The system runs these threads where no other thread wants a processor, or a small part of the time.
const NICE: i32 = 10;
/// Bytes of such a thread's stack: a guest's calls have stacks of their own.
const STACK: usize = 2 << 20;

/// Who takes turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StageId(u64);

/// Turns, as many at one time as there are processors.
pub(super) struct Turns {
    threads: ThreadPool,
    stages: AtomicU64,
    queue: Mutex<Queue>,
}

/// Calls that wait, by their stages; the next stage first. There are at most as many as there are calls.
struct Queue {
    free: usize,
    stages: VecDeque<(StageId, VecDeque<oneshot::Sender<Turn>>)>,
}

/// A turn, until it is dropped.
pub(super) struct Turn(Option<Arc<Turns>>);

impl Turns {
    pub(super) fn new() -> anyhow::Result<Arc<Self>> {
        let free = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = ThreadPoolBuilder::new()
            .num_threads(free)
            .stack_size(STACK)
            .thread_name(|n| format!("guests-{n}"))
            .start_handler(|_| step_back())
            .build()
            .context("cannot start the threads for guests that compute for long")?;
        Ok(Arc::new(Self {
            threads,
            stages: AtomicU64::default(),
            queue: Mutex::new(Queue {
                free,
                stages: VecDeque::new(),
            }),
        }))
    }

    /// One more stage.
    pub(super) fn stage(&self) -> StageId {
        StageId(self.stages.fetch_add(1, Ordering::Relaxed))
    }

    /// Does something on one of the threads, and waits for it.
    pub(super) fn apart<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.threads.install(work)
    }

    /// Waits for a turn. Cancel-safe: one that was given and not taken is the next one's.
    pub(super) async fn take(self: &Arc<Self>, stage: StageId) -> Turn {
        let waiting = {
            let mut queue = self.queue();
            if queue.free > 0 {
                queue.free -= 1;
                return Turn(Some(self.clone()));
            }
            let (sender, waiting) = oneshot::channel();
            queue.add(stage, sender);
            waiting
        };
        // The sender is dropped only with the turns themselves.
        waiting.await.unwrap_or(Turn(None))
    }

    fn give_back(self: Arc<Self>) {
        let next = {
            let mut queue = self.queue();
            match queue.next() {
                Some(next) => next,
                None => {
                    queue.free += 1;
                    return;
                }
            }
        };
        // One that waits no more drops it here, and gives it to the one after.
        let _ = next.send(Turn(Some(self)));
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn add(&mut self, stage: StageId, call: oneshot::Sender<Turn>) {
        match self.stages.iter_mut().find(|(id, _)| *id == stage) {
            Some((_, calls)) => calls.push_back(call),
            None => self.stages.push_back((stage, VecDeque::from([call]))),
        }
    }

    /// The first call of the first stage that still waits; the stage's next one comes after those of all others.
    fn next(&mut self) -> Option<oneshot::Sender<Turn>> {
        while let Some((stage, mut calls)) = self.stages.pop_front() {
            calls.retain(|call| !call.is_closed());
            let next = calls.pop_front();
            if !calls.is_empty() {
                self.stages.push_back((stage, calls));
            }
            if next.is_some() {
                return next;
            }
        }
        None
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(turns) = self.0.take() {
            turns.give_back();
        }
    }
}

fn step_back() {
    // Of this thread alone, as Linux has it. Where it is not allowed, they are threads like others.
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        debug!("the threads of guests that compute for long keep their priority: {error}");
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    /// Has calls of two stages wait, gives all turns back one by one, and answers whose calls got them.
    #[tokio::test]
    async fn stages_take_turns_however_many_calls_they_have() {
        let turns = Turns::new().expect("threads");
        let (greedy, modest) = (turns.stage(), turns.stage());
        let mut held = Vec::new();
        while let Some(turn) = turns.take(greedy).now_or_never() {
            held.push(turn);
            if turns.queue().free == 0 {
                break;
            }
        }
        let mut waiting = Vec::new();
        for stage in [greedy, greedy, greedy, modest] {
            let turns = turns.clone();
            let mut call = Box::pin(async move { turns.take(stage).await });
            assert!(futures::poll!(call.as_mut()).is_pending());
            waiting.push((stage, call));
        }
        // One that is given up takes no turn.
        drop(waiting.remove(1));
        let mut order = Vec::new();
        while !waiting.is_empty() {
            held.pop();
            for n in (0..waiting.len()).rev() {
                if let Some(turn) = waiting[n].1.as_mut().now_or_never() {
                    order.push(waiting.remove(n).0);
                    held.push(turn);
                }
            }
        }
        assert_eq!(order, [greedy, modest, greedy]);
        held.clear();
        assert!(turns.queue().free > 0);
    }
}
