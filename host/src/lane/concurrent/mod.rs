//! At least once, the messages of a partition side by side: those of one key in their order, or none in any.
//!
//! Up to `concurrency` messages are with the stage at one time, each with its own retries. Outputs of messages that are
//! handled are sent in the order in which those were, one flight at a time, while others are handled: so those of one key
//! reach the log in their order. The log is told the offset below which all is done.
//!
//! The futures of all messages belong to the lane's own, so that dropping it drops them.

mod queue;
#[cfg(test)]
mod tests;
mod window;

use std::collections::HashSet;
use std::{future, mem};

use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio_util::sync::CancellationToken;

use self::queue::{Message, Queue};
use self::window::Window;
use super::held::{Held, Sent};
use super::message::{End, Leave};
use super::repetition::{Repetitions, Together};
use super::{Common, Equipment, LOG_PATIENCE, MAX_AHEAD, MAX_AHEAD_BYTES, MAX_HELD_BYTES, Stopped};
use crate::delivery::progress::LaneId;
use crate::delivery::seen::Seen;
use crate::delivery::{Fault, Handler};
use crate::log::{BatchLimits, Gap, Sink, Source};
use crate::record::Record;

/// One stage on one partition.
pub struct Lane<S, K, H> {
    source: S,
    common: Common<K, H>,
}

/// Why a lane takes no more messages.
enum Closing {
    /// Those before it are finished first.
    Gap(Gap),
    /// Those being handled are finished, the others left.
    Leave(Leave),
}

impl<S: Source, K: Sink, H: Handler<()>> Lane<S, K, H> {
    /// A lane that has not begun. Its waits are jittered by `seed`.
    pub fn new(source: S, equipment: Equipment<K, H>, id: LaneId, seed: u64) -> Self {
        let common = Common::new(equipment, &source, id, seed);
        Self { source, common }
    }

    /// Delivers until the partition is to be given up. Dropping the future abandons the messages at
    /// hand: none that was not settled counts as done.
    pub async fn run(mut self) {
        if let Err(Leave::Halted(halt)) = self.deliver().await {
            self.common.halted(halt).await;
        }
    }

    async fn deliver(&mut self) -> Result<(), Leave> {
        let mut from = None;
        loop {
            let started = self.common.start(&mut self.source, from).await;
            started.map_err(Leave::Halted)?;
            match self.work().await {
                Closing::Gap(gap) => {
                    from = Some(self.common.pass(&gap).map_err(Leave::Halted)?);
                }
                Closing::Leave(leave) => return Err(leave),
            }
        }
    }

    /// Works until the lane takes no more messages, and what it has taken is through.
    async fn work(&mut self) -> Closing {
        // Cancelled also where the lane halts: retries are not waited for then either.
        let leaving = self.common.stopping.child_token();
        let common = self.common.until(leaving.clone());
        let mut work = Work::new(&common, leaving.clone());
        let mut calls = FuturesUnordered::new();
        loop {
            while calls.len() < common.policy().concurrency
                && let Some(message) = work.next()
            {
                calls.push(handle(&common, message));
            }
            work.launch();
            if calls.is_empty()
                && let Some(closing) = work.close()
            {
                return closing;
            }
            let room = work
                .room()
                .filter(|_| calls.len() < common.policy().concurrency);
            tokio::select! {
                // In one order, so that a simulation can be repeated. Records are taken only where none at hand could be
                // handled, so calls that are always ready keep nothing waiting.
                biased;
                // All are cancel-safe: the calls stay in their set and the flight in its place, and a record is either
                // taken or still to come.
                () = leaving.cancelled(), if !work.is_leaving() => work.leave(Leave::Stopped),
                landing = landing(&mut work.flight) => work.landed(landing),
                Some((message, end)) = calls.next(), if !calls.is_empty() => work.handled(message, end),
                taken = take(&mut self.source, room.as_ref()), if room.is_some() => work.take(taken),
            }
            if let Some(advance) = work.window.advance() {
                common.metrics().batch(advance.messages);
                self.source.done(advance.next_offset, None);
            }
            // A stage that never waits would keep its thread for itself.
            tokio::task::coop::consume_budget().await;
        }
    }
}

async fn handle<K, H: Handler<()>>(
    common: &Common<K, H>,
    message: Message,
) -> (Message, Result<End, Leave>) {
    let end = common.see_through(&message.record).await;
    (message, end)
}

type Taken = Result<Option<Vec<Record>>, Gap>;

async fn take(source: &mut impl Source, room: Option<&BatchLimits>) -> Taken {
    match room {
        Some(limits) => source.next(limits).await,
        None => future::pending().await,
    }
}

/// What the lane has in its hands.
struct Work<'a, K, H> {
    common: &'a Common<K, H>,
    leaving: CancellationToken,
    /// Since the work began: a repetition of what came before it is delivered again.
    seen: Seen,
    repetitions: Repetitions,
    queue: Queue,
    window: Window,
    /// Bytes of the messages that are not done.
    bytes: usize,
    parcel: Parcel,
    flight: Option<BoxFuture<'a, Landing>>,
    /// Bytes of the outputs in flight.
    aloft: usize,
    /// How often in a row the log did not take what was sent.
    failed: u32,
    closing: Option<Closing>,
}

/// Messages that are handled, and their outputs, by the messages' tickets, that are not sent.
#[derive(Default)]
struct Parcel {
    messages: Vec<Message>,
    outputs: Held<u64>,
}

/// Messages whose outputs were sent, and what came of it.
type Landing = Result<(Vec<Message>, Sent<u64>), Stopped>;

/// Polls the flight where it is, so that it goes on at the next call.
async fn landing(flight: &mut Option<BoxFuture<'_, Landing>>) -> Landing {
    match flight {
        Some(aloft) => {
            let landing = aloft.await;
            *flight = None;
            landing
        }
        None => future::pending().await,
    }
}

impl<'a, K: Sink, H: Handler<()>> Work<'a, K, H> {
    fn new(common: &'a Common<K, H>, leaving: CancellationToken) -> Self {
        Self {
            common,
            leaving,
            seen: Seen::default(),
            repetitions: Repetitions::default(),
            queue: Queue::new(common.policy().order),
            window: Window::default(),
            bytes: 0,
            parcel: Parcel::default(),
            flight: None,
            aloft: 0,
            failed: 0,
            closing: None,
        }
    }

    /// How much may be taken, if any.
    fn room(&self) -> Option<BatchLimits> {
        let messages = MAX_AHEAD.saturating_sub(self.window.len());
        let bytes = MAX_AHEAD_BYTES.saturating_sub(self.bytes);
        let has_room = messages > 0 && bytes > 0;
        let wanted = self.closing.is_none() && !self.queue.is_ready();
        let batch = self.common.policy().batch;
        (wanted && has_room).then(|| BatchLimits {
            max_messages: batch.max_messages.min(messages),
            max_bytes: batch.max_bytes.min(bytes),
            ..batch
        })
    }

    fn take(&mut self, taken: Taken) {
        match taken {
            Ok(Some(records)) => {
                let together = Together::of(&records);
                for record in records {
                    let ticket = self.window.open(record.offset);
                    let admitted = self.seen.admit(&record, &self.common.equipment.cluster);
                    if self.repetitions.is_one(admitted) {
                        self.window.done(ticket);
                        self.common.metrics().messages("duplicate", 1);
                    } else {
                        self.bytes += record.size();
                        self.queue.push(record, ticket);
                    }
                }
                self.repetitions.looked(self.common.stage(), together);
            }
            Ok(None) => self.leave(Leave::Stopped),
            Err(gap) => self.closing = Some(Closing::Gap(gap)),
        }
    }

    /// The next message to be handled, unless too many outputs are held.
    fn next(&mut self) -> Option<Message> {
        if self.aloft + self.parcel.outputs.bytes() >= MAX_HELD_BYTES {
            return None;
        }
        self.queue.next()
    }

    fn handled(&mut self, mut message: Message, end: Result<End, Leave>) {
        let outputs = match end {
            Ok(End::Done(outputs)) => outputs,
            Ok(End::GivenUp { attempts, fault }) => {
                vec![give_up(self.common, &mut message, attempts, &fault)]
            }
            Err(leave) => return self.leave(leave),
        };
        self.queue.release(&message);
        if outputs.is_empty() {
            return self.settle(&message);
        }
        for output in outputs {
            self.parcel.outputs.hold(message.ticket, output);
        }
        self.parcel.messages.push(message);
    }

    /// Has the outputs of what is handled sent, once those before are in the log.
    fn launch(&mut self) {
        if self.flight.is_some() || self.parcel.messages.is_empty() {
            return;
        }
        let Parcel { messages, outputs } = mem::take(&mut self.parcel);
        let common = self.common;
        let wait = (self.failed > 0).then(|| common.backoff(&LOG_PATIENCE, self.failed));
        self.aloft = outputs.bytes();
        let flight = async move {
            if let Some(wait) = wait {
                outputs.wait(common, wait).await?;
            }
            Ok((messages, outputs.send(common).await))
        };
        self.flight = Some(flight.boxed());
    }

    /// Settles what the log has. The rest is sent again, before what was handled since.
    fn landed(&mut self, landing: Landing) {
        self.aloft = 0;
        let Ok((mut messages, sent)) = landing else {
            // The log is away, and the lane leaves.
            return;
        };
        if sent.is_complete() {
            self.failed = 0;
            return messages.iter().for_each(|message| self.settle(message));
        }
        let mut outputs = sent.again;
        self.failed = if outputs.is_empty() {
            0
        } else {
            self.failed.saturating_add(1)
        };
        for (ticket, fault) in sent.refused {
            let message = messages.iter_mut().find(|m| m.ticket == ticket);
            if let Some(message) = message.filter(|m| !m.given_up) {
                outputs.hold(ticket, give_up(self.common, message, 1, &fault));
            }
        }
        let open: HashSet<u64> = outputs.origins().copied().collect();
        let (mut messages, settled): (Vec<_>, Vec<_>) =
            (messages.into_iter()).partition(|message| open.contains(&message.ticket));
        settled.iter().for_each(|message| self.settle(message));
        messages.append(&mut self.parcel.messages);
        outputs.append(&mut self.parcel.outputs);
        self.parcel = Parcel { messages, outputs };
    }

    /// All that the message caused is durable.
    fn settle(&mut self, message: &Message) {
        self.bytes -= message.bytes;
        self.window.done(message.ticket);
        self.common.measure(std::iter::once(&message.record));
        if !message.given_up {
            self.common.metrics().messages("done", 1);
        }
    }

    /// Leaves what is not being handled.
    fn leave(&mut self, leave: Leave) {
        self.queue.clear();
        self.leaving.cancel();
        if !self.is_leaving() {
            self.closing = Some(Closing::Leave(leave));
        }
    }

    fn is_leaving(&self) -> bool {
        matches!(self.closing, Some(Closing::Leave(_)))
    }

    /// Why no more messages are taken, once all are through that are not with the stage.
    fn close(&mut self) -> Option<Closing> {
        let through = self.flight.is_none() && !self.queue.is_ready();
        self.closing.take_if(|_| through)
    }
}

fn give_up<K, H: Handler<()>>(
    common: &Common<K, H>,
    message: &mut Message,
    attempts: u32,
    fault: &Fault,
) -> crate::record::Outgoing {
    message.given_up = true;
    common.give_up(&message.record, attempts, fault)
}
