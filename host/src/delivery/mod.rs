//! The parts of the delivery loop that have rules of their own.

pub mod breaker;
pub mod dead_letter;
pub mod output;
pub mod progress;
pub mod retry;
pub mod seen;

use std::future::Future;

use crate::capability::{Away, StoreError};
use crate::record::{Outgoing, Record};

/// Bytes of a fault's words; what is longer is cut. They go into the log, the dead letter and what the host says of itself.
const MAX_WORDS: usize = 8 << 10;

/// A record on its way into a stage.
#[derive(Clone, Copy, Debug)]
pub struct Delivery<'a> {
    /// The record.
    pub record: &'a Record,
    /// 1 on the first delivery, one more on every retry.
    pub attempt: u32,
}

/// Why a message could not be processed.
#[derive(Clone, Debug)]
pub struct Fault {
    /// What kind of fault.
    pub cause: Cause,
    /// In words: the guest's own, or the host's.
    pub message: String,
    /// A store that did not do what the call asked of it, which is likely why it failed.
    pub away: Option<Box<Away>>,
}

impl Fault {
    /// A fault with its words, of which a guest may have made any number.
    pub fn new(cause: Cause, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > MAX_WORDS {
            message.truncate(message.floor_char_boundary(MAX_WORDS));
            message.push('…');
            message.shrink_to_fit();
        }
        Self {
            cause,
            message,
            away: None,
        }
    }

    /// The store does what it did not do: the fault counts, and the message may fare better the next time; unless it asked for
    /// what it may not, which only itself is refused.
    pub fn count(&mut self) {
        match self.away.take() {
            Some(away) if away.action.had_been_done() => self.cause = Cause::Denied,
            _ if self.cause.is_tried_again() => {}
            _ => self.cause = Cause::Retry,
        }
    }
}

/// The kinds of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// The guest asks for another delivery.
    Retry,
    /// A store took longer than it had, the call's deadline or a statement's time, and may be faster the next time.
    Slow,
    /// The host could not make an instance: it is out of memory, say, which is not the message's fault.
    Resources,
    /// The guest gives up on the message.
    Reject,
    /// The guest trapped.
    Trap,
    /// The call took longer than its deadline.
    Deadline,
    /// The guest asked for more memory than its limit, and trapped.
    Memory,
    /// The guest's stack was full.
    Stack,
    /// The guest ended itself as a process does, with whatever exit code.
    Exit,
    /// The guest met another limit of its sandbox, of table elements or handles, and trapped.
    Limit,
    /// A call lacked a grant, and the guest faulted after it.
    Denied,
}

impl Cause {
    /// Whether the message is delivered again before it is given up on.
    pub fn is_tried_again(self) -> bool {
        matches!(self, Self::Retry | Self::Slow | Self::Resources)
    }

    /// Whether what earlier calls left in an instance may be why.
    pub fn may_be_of_use(self) -> bool {
        matches!(
            self,
            Self::Trap | Self::Memory | Self::Stack | Self::Exit | Self::Limit
        )
    }

    /// As it stands in `stagehost-cause` and in metrics once the message is given up on.
    pub fn label(self) -> &'static str {
        match self {
            Self::Retry => "retries-exhausted",
            Self::Reject => "reject",
            Self::Trap => "trap",
            Self::Deadline | Self::Slow => "deadline",
            Self::Memory => "memory",
            Self::Stack => "stack",
            Self::Exit => "exit",
            Self::Limit => "limit",
            Self::Resources => "resources",
            Self::Denied => "denied",
        }
    }
}

/// What came of one call into a stage.
#[derive(Debug)]
pub struct Invocation {
    /// One outcome a delivery, in order; or why the whole call failed, when nobody knows about any of them.
    pub outcomes: Result<Vec<Result<(), Fault>>, Fault>,
    /// What the guest emitted; empty when the call failed or a single message faulted.
    pub outputs: Vec<Outgoing>,
    /// The call failed on an instance that had served others before, and what they left in it may be why.
    pub worn: bool,
    /// The call was made on a new instance after it had trapped on one that had served others before.
    pub repeated: bool,
}

impl Invocation {
    /// The store that failed all of the call's deliveries, if it is one and the same.
    pub fn away(&self) -> Option<&Away> {
        let outcomes = match &self.outcomes {
            Ok(outcomes) => outcomes,
            Err(fault) => return fault.away.as_deref(),
        };
        fn away(outcome: &Result<(), Fault>) -> Option<&Away> {
            outcome.as_ref().err()?.away.as_deref()
        }
        let first = outcomes.first().and_then(away)?;
        let is_same = |away: &Away| away.store == first.store;
        let all = outcomes.iter().all(|o| away(o).is_some_and(is_same));
        all.then_some(first)
    }
}

/// A stage as its lanes call it. `T` is what the effects of a call belong to: a transaction, or nothing.
pub trait Handler<T>: Send + Sync {
    /// How many deliveries one call takes: one, or any number.
    fn takes_batches(&self) -> bool;

    /// Calls the stage. Dropping the future stops the guest.
    fn call(
        &self,
        deliveries: &[Delivery<'_>],
        transaction: &T,
    ) -> impl Future<Output = Invocation> + Send;

    /// Asks a store of the stage for the kind of thing that it did not do, without an effect, to see whether it does.
    fn probe(&self, away: &Away) -> impl Future<Output = Result<(), StoreError>> + Send;
}
