//! One message's way through an at-least-once lane: deliveries until it is done, or given up on.

use super::{Common, Halt, Stopped};
use crate::delivery::{Delivery, Fault, Handler};
use crate::pipeline::OnExhausted;
use crate::record::{Outgoing, Record};

/// How the deliveries of a message ended.
pub(super) enum End {
    /// Its outputs are to be sent.
    Done(Vec<Outgoing>),
    /// To the dead letters, after so many.
    GivenUp { attempts: u32, fault: Fault },
}

/// Why a lane leaves messages that are not done.
pub(super) enum Leave {
    Stopped,
    Halted(Halt),
}

impl From<Stopped> for Leave {
    fn from(Stopped: Stopped) -> Self {
        Self::Stopped
    }
}

impl<K, H: Handler<()>> Common<K, H> {
    /// Delivers a message as often as it takes.
    pub(super) async fn see_through(&self, record: &Record) -> Result<End, Leave> {
        match self.deliver(record, 1).await {
            Ok(outputs) => Ok(End::Done(outputs)),
            // In a box: there is a future of this kind for each message at hand, and few get there.
            Err(fault) => Box::pin(self.deliver_again(record, fault)).await,
        }
    }

    /// Delivers a message again that faulted on its first delivery, as often as the policy has it.
    pub(super) async fn deliver_again(
        &self,
        record: &Record,
        mut fault: Fault,
    ) -> Result<End, Leave> {
        let mut attempt = 1;
        let mut losses = 0;
        loop {
            losses = match &fault.away {
                Some(_) => losses + 1,
                None => 0,
            };
            let again = self.again_after(record, &mut attempt, &mut fault, losses);
            if !again.await? {
                break;
            }
            match self.deliver(record, attempt).await {
                Ok(outputs) => return Ok(End::Done(outputs)),
                Err(again) => fault = again,
            }
        }
        if fault.cause.is_tried_again() && self.policy().on_exhausted == OnExhausted::Stop {
            return Err(Leave::Halted(self.exhausted(record, attempt, &fault)));
        }
        Ok(End::GivenUp {
            attempts: attempt,
            fault,
        })
    }

    /// Whether a message that faulted on its first delivery keeps its lane from going on for a while, or for good.
    pub(super) fn holds_up(&self, fault: &Fault) -> bool {
        let policy = self.policy();
        let may_wait = policy.retry.max_attempts > 1 || policy.on_exhausted == OnExhausted::Stop;
        fault.away.is_some() || (fault.cause.is_tried_again() && may_wait)
    }

    /// Waits until the message may be delivered again after its `attempt`th delivery, and counts; answers whether
    /// it may. What was a store's fault, which was waited for, is not counted, unless it was so `losses` times in a row.
    async fn again_after(
        &self,
        record: &Record,
        attempt: &mut u32,
        fault: &mut Fault,
        losses: u32,
    ) -> Result<bool, Stopped> {
        if let Some(away) = &fault.away {
            if self.until_there::<()>(away, losses).await? {
                return Ok(true);
            }
            fault.count();
        }
        let policy = &self.policy().retry;
        if !fault.cause.is_tried_again() || *attempt >= policy.max_attempts {
            return Ok(false);
        }
        self.metrics().messages("retry", 1);
        self.metrics().retry();
        let wait = self.backoff(policy, *attempt);
        if *attempt == 1 {
            self.warn_of_retry(record, wait, fault);
        }
        self.wait_to_retry(wait).await?;
        *attempt += 1;
        Ok(true)
    }

    /// One delivery of one message.
    async fn deliver(&self, record: &Record, attempt: u32) -> Result<Vec<Outgoing>, Fault> {
        let (invocation, _) = self.call(&[Delivery { record, attempt }], &()).await;
        let mut outcomes = invocation.outcomes?.into_iter();
        outcomes.next().unwrap_or(Ok(()))?;
        Ok(invocation.outputs)
    }

    /// The dead letter of a message that is given up on.
    pub(super) fn give_up(&self, record: &Record, attempts: u32, fault: &Fault) -> Outgoing {
        let letter = self.policy().dead_letters.letter(record, attempts, fault);
        self.warn_of_giving_up(record, &letter.topic, attempts, fault);
        letter
    }
}
