//! The parts of the delivery loop that have rules of their own.

pub mod breaker;
pub mod dead_letter;
pub mod output;
pub mod progress;
pub mod retry;
pub mod seen;

use std::future::Future;

use crate::capability::{StoreError, StoreName};
use crate::record::{Outgoing, Record};

/// A record on its way into a stage.
#[derive(Clone, Copy, Debug)]
pub struct Delivery<'a> {
    /// The record.
    pub record: &'a Record,
    /// 1 on the first delivery, one more on every retry.
    pub attempt: u32,
}

/// Why a message could not be processed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What kind of fault.
    pub cause: Cause,
    /// In words: the guest's own, or the host's.
    pub message: String,
    /// A store that was not available during the call, which is likely why it failed.
    pub away: Option<StoreName>,
}

impl Fault {
    /// A fault with its words.
    pub fn new(cause: Cause, message: impl Into<String>) -> Self {
        Self {
            cause,
            message: message.into(),
            away: None,
        }
    }
}

/// The kinds of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// The guest asks for another delivery. The only cause that is tried again.
    Retry,
    /// The guest gives up on the message.
    Reject,
    /// The guest trapped.
    Trap,
    /// The call took longer than its deadline.
    Deadline,
    /// The guest asked for more memory than its limit, and trapped.
    Memory,
    /// A call lacked a grant, and the guest faulted after it.
    Denied,
}

impl Cause {
    /// As it stands in `stagehost-cause` and in metrics once the message is given up on.
    pub fn label(self) -> &'static str {
        match self {
            Self::Retry => "retries-exhausted",
            Self::Reject => "reject",
            Self::Trap => "trap",
            Self::Deadline => "deadline",
            Self::Memory => "memory",
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
}

impl Invocation {
    /// The store that was not available for any of the call's deliveries, if it is one and the same.
    pub fn away(&self) -> Option<&StoreName> {
        let outcomes = match &self.outcomes {
            Ok(outcomes) => outcomes,
            Err(fault) => return fault.away.as_ref(),
        };
        fn away(outcome: &Result<(), Fault>) -> Option<&StoreName> {
            outcome.as_ref().err()?.away.as_ref()
        }
        let first = outcomes.first().and_then(away)?;
        let all = outcomes.iter().all(|outcome| away(outcome) == Some(first));
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

    /// Asks a store of the stage for nothing, to see that it answers.
    fn probe(&self, store: &StoreName) -> impl Future<Output = Result<(), StoreError>> + Send;
}
