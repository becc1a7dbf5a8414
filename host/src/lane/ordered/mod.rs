//! At least once, in the partition's order.
//!
//! Effects are durable as the stage makes them. Outputs are sent while the stage goes on, one flight at a time, so that
//! they reach the log in their order; once all below an offset is handled and acknowledged, the source is told.

mod batch;
mod flight;

use std::collections::VecDeque;
use std::mem;
use std::ops::Range;
use std::time::Duration;

use futures::FutureExt;
use tracing::debug;

use self::batch::Batch;
use self::flight::{Flight, Origin, landing};
use super::held::Held;
use super::message::{End, Leave};
use super::repetition::{Repetitions, Together};
use super::{Common, Equipment, MAX_AHEAD, MAX_AHEAD_BYTES, MAX_HELD_BYTES, Stopped, alongside};
use crate::delivery::progress::LaneId;
use crate::delivery::seen::Seen;
use crate::delivery::{Delivery, Fault, Handler, Invocation};
use crate::log::{Gap, Sink, Source};
use crate::record::{Outgoing, Record};

/// While there are messages at hand, outputs are sent after so much time in calls: many in one flight, since the log
/// charges by the request.
const FLIGHT_INTERVAL: Duration = Duration::from_millis(5);

/// One stage on one partition.
pub struct Lane<S, K, H> {
    source: S,
    common: Common<K, H>,
}

impl<S: Source, K: Sink, H: Handler<()>> Lane<S, K, H> {
    /// A lane that has not begun. Its waits are jittered by `seed`.
    pub fn new(source: S, equipment: Equipment<K, H>, id: LaneId, seed: u64) -> Self {
        let common = Common::new(equipment, &source, id, seed);
        Self { source, common }
    }

    /// Delivers until the partition is to be given up. Dropping the future abandons the batches at
    /// hand: nothing of them that was not settled counts as done.
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
            let gap = Work::new(&mut self.source, &self.common)
                .until_gap()
                .await?;
            from = Some(self.common.pass(&gap).map_err(Leave::Halted)?);
        }
    }
}

/// What the lane has in its hands.
struct Work<'a, S, K, H> {
    source: &'a mut S,
    common: &'a Common<K, H>,
    /// Since the work began: a repetition of what came before it is delivered again.
    seen: Seen,
    repetitions: Repetitions,
    /// Batches that are not settled; all but the last one are handled.
    batches: VecDeque<Batch>,
    /// The number of the first of them.
    first: u64,
    /// Records and bytes of the batches that are not settled.
    ahead: (usize, usize),
    /// What was emitted and is not sent.
    held: Held<Origin>,
    flight: Option<Flight<'a>>,
    /// Time in calls, and what that was when outputs were last sent.
    worked: Duration,
    launched: Duration,
    /// How often in a row the log did not take what was sent.
    failed: u32,
}

impl<'a, S: Source, K: Sink, H: Handler<()>> Work<'a, S, K, H> {
    fn new(source: &'a mut S, common: &'a Common<K, H>) -> Self {
        Self {
            source,
            common,
            seen: Seen::default(),
            repetitions: Repetitions::default(),
            batches: VecDeque::new(),
            first: 0,
            ahead: (0, 0),
            held: Held::default(),
            flight: None,
            worked: Duration::ZERO,
            launched: Duration::ZERO,
            failed: 0,
        }
    }

    async fn until_gap(&mut self) -> Result<Gap, Leave> {
        loop {
            let taken = match self.at_hand() {
                Some(taken) => taken,
                None => {
                    self.launch();
                    let has_room = self.has_room();
                    let limits = &self.common.policy().batch;
                    tokio::select! {
                        // In one order, so that a simulation can be repeated.
                        biased;
                        // Both are cancel-safe: the flight stays in its place, and a record is either taken or still to come.
                        () = landing(&mut self.flight) => {
                            self.landed()?;
                            continue;
                        }
                        taken = self.source.next(limits), if has_room => taken,
                    }
                }
            };
            match taken {
                Ok(Some(records)) => {
                    self.common.metrics().batch(records.len());
                    self.take(records);
                    self.handle().await?;
                }
                Ok(None) => {
                    self.settle_all().await?;
                    return Err(Leave::Stopped);
                }
                Err(gap) => {
                    self.settle_all().await?;
                    return Ok(gap);
                }
            }
        }
    }

    /// What the source has without waiting, if there is room for it.
    fn at_hand(&mut self) -> Option<Result<Option<Vec<Record>>, Gap>> {
        let limits = &self.common.policy().batch;
        // Cancel-safe: a record is either taken or still to come.
        self.has_room()
            .then(|| self.source.next(limits).now_or_never())
            .flatten()
    }

    /// Whether more may be taken. Not while the log is away: all that is taken may be delivered again after a crash.
    fn has_room(&self) -> bool {
        let (records, bytes) = self.ahead;
        let few = records < MAX_AHEAD && bytes < MAX_AHEAD_BYTES;
        few && self.held.bytes() < MAX_HELD_BYTES && self.failed == 0
    }

    /// Takes a batch in, without what was in the lane before.
    fn take(&mut self, mut records: Vec<Record>) {
        let next_offset = records.last().map(|record| record.offset + 1);
        if Seen::concerns(&records) {
            self.drop_repetitions(&mut records);
        }
        let batch = Batch::new(records, next_offset);
        self.ahead.0 += batch.records.len();
        self.ahead.1 += batch.bytes;
        self.batches.push_back(batch);
    }

    fn drop_repetitions(&mut self, records: &mut Vec<Record>) {
        let (common, together) = (self.common, Together::of(records));
        let (seen, repetitions) = (&mut self.seen, &mut self.repetitions);
        records.retain(|record| {
            let admitted = seen.admit(record, &common.equipment.cluster);
            let is_repeated = repetitions.is_one(admitted);
            if is_repeated {
                common.metrics().messages("duplicate", 1);
            }
            !is_repeated
        });
        repetitions.looked(common.stage(), together);
    }

    /// Calls the stage with the records of the last batch.
    async fn handle(&mut self) -> Result<(), Leave> {
        let takes_batches = self.common.equipment.handler.takes_batches();
        // A batch call that failed as a whole is found by halving: `run` shrinks until the one
        // message at fault stands alone, and grows again behind the messages that were in that call.
        let (mut run, mut suspect_until) = (usize::MAX, 0);
        while let Some(batch) = self.batches.back()
            && batch.handled < batch.records.len()
        {
            let (start, spent, count) = (batch.handled, batch.spent, batch.records.len());
            if self.common.stopping.is_cancelled() {
                self.settle_all().await?;
                return Err(Leave::Stopped);
            }
            if spent >= self.common.policy().batch.max_time || self.held.bytes() >= MAX_HELD_BYTES {
                self.settle_all().await?;
            }
            if self.worked.saturating_sub(self.launched) >= FLIGHT_INTERVAL {
                self.poll_flight();
                self.landed()?;
                self.launch();
                self.poll_flight();
            }
            if start >= suspect_until {
                run = if takes_batches { count } else { 1 };
            }
            let end = count.min(start.saturating_add(run));
            if let Some(fault) = self.step(start..end).await? {
                debug!(
                    messages = end - start,
                    "a batch call failed and is halved: {}", fault.message
                );
                suspect_until = suspect_until.max(end);
                run = (end - start).div_ceil(2);
            }
        }
        Ok(())
    }

    /// One call with these records of the last batch, and the policy for those that faulted. Answers a fault where a call of
    /// several messages failed as a whole.
    async fn step(&mut self, records: Range<usize>) -> Result<Option<Fault>, Leave> {
        let invocation = self.call(records.clone()).await?;
        let outcomes = match invocation.outcomes {
            Err(fault) if records.len() > 1 => return Ok(Some(fault)),
            Err(fault) => vec![Err(fault)],
            Ok(outcomes) => outcomes,
        };
        self.hold(records.clone(), invocation.outputs);
        for (index, outcome) in records.zip(outcomes) {
            match outcome {
                // For an output of the same call that the log refused.
                _ if self.is_given_up(index) => {}
                Ok(()) => self.common.metrics().messages("done", 1),
                Err(fault) => self.redeliver(index, fault).await?,
            }
            if let Some(batch) = self.batches.back_mut() {
                batch.handled = index + 1;
            }
        }
        Ok(None)
    }

    /// One call with these records of the last batch; several for which a store was away wait for it once, and not each.
    async fn call(&mut self, records: Range<usize>) -> Result<Invocation, Leave> {
        let mut tried_again = false;
        loop {
            let invocation = self.call_once(records.clone()).await;
            if records.len() == 1 {
                return Ok(invocation);
            }
            let Some(away) = invocation.away().cloned() else {
                return Ok(invocation);
            };
            self.settle_all().await?;
            // However the batch is halved: the message that is to blame is found in time.
            let losses = self.batches.back_mut().map_or(0, |batch| {
                batch.losses += 1;
                batch.losses
            });
            // One that answers now may have been away for a moment; the second time it is the messages' fault.
            let is_its_own = self.common.until_there::<()>(&away, losses).await?;
            if !is_its_own && mem::replace(&mut tried_again, true) {
                return Ok(invocation);
            }
        }
    }

    async fn call_once(&mut self, records: Range<usize>) -> Invocation {
        let mark = self.handled();
        let records = match self.batches.back() {
            Some(batch) => &batch.records[records],
            None => &[],
        };
        let delivery = |record| Delivery { record, attempt: 1 };
        let (common, flight) = (self.common, &mut self.flight);
        let (held, failed) = (&mut self.held, self.failed);
        let any_held = !held.is_empty();
        let due = FLIGHT_INTERVAL.saturating_sub(self.worked.saturating_sub(self.launched));
        let mut settled = None;
        // What is held must not wait for a call that takes long, unless the log has not taken all that came before.
        let outputs = async {
            if let Some(aloft) = flight {
                aloft.landed().await;
                if !any_held || !aloft.is_complete() {
                    return;
                }
                settled = Some(aloft.mark);
                *flight = None;
            }
            if any_held {
                tokio::time::sleep(due).await;
                let failed = if settled.is_some() { 0 } else { failed };
                let aloft = flight.insert(Flight::new(common, mem::take(held), failed, mark));
                aloft.landed().await;
            }
        };
        let (invocation, took) = match records {
            [record] => {
                let deliveries = [delivery(record)];
                alongside(common.call(&deliveries, &()), outputs).await
            }
            many => {
                let deliveries: Vec<_> = many.iter().map(delivery).collect();
                alongside(common.call(&deliveries, &()), outputs).await
            }
        };
        if any_held && self.held.is_empty() {
            self.launched = self.worked;
        }
        if let Some(mark) = settled {
            self.failed = 0;
            self.settle(mark);
        }
        self.worked += took;
        if let Some(batch) = self.batches.back_mut() {
            batch.spent += took;
        }
        invocation
    }

    /// How far all is handled: the number of the last batch, and how many records of it.
    fn handled(&self) -> (u64, usize) {
        (
            self.last(),
            self.batches.back().map_or(0, |batch| batch.handled),
        )
    }

    /// The number of the last batch.
    fn last(&self) -> u64 {
        self.first + (self.batches.len() as u64).saturating_sub(1)
    }

    /// Outputs of these records of the last batch.
    fn hold(&mut self, records: Range<usize>, outputs: Vec<Outgoing>) {
        let origin = (self.last(), records);
        for output in outputs {
            self.held.hold(origin.clone(), output);
        }
    }

    fn is_given_up(&self, index: usize) -> bool {
        let batch = self.batches.back();
        batch.is_some_and(|batch| batch.given_up.contains(&index))
    }

    /// A record of the last batch faulted on its first delivery: again, as often as the policy
    /// has it, and then to the dead letters. What came before is settled first: it does not wait for it.
    async fn redeliver(&mut self, index: usize, fault: Fault) -> Result<(), Leave> {
        if self.common.holds_up(&fault) {
            self.settle_all().await?;
        }
        let Some(batch) = self.batches.back() else {
            return Ok(());
        };
        if batch.given_up.contains(&index) {
            return Ok(());
        }
        match self
            .common
            .deliver_again(&batch.records[index], fault)
            .await?
        {
            End::Done(outputs) => {
                self.hold(index..index + 1, outputs);
                self.common.metrics().messages("done", 1);
            }
            End::GivenUp { attempts, fault } => {
                if let Some(batch) = self.batches.back_mut() {
                    let letter = batch.give_up(self.common, index, attempts, &fault);
                    self.hold(index..index + 1, vec![letter]);
                }
            }
        }
        Ok(())
    }

    /// Has sent what is held, once what was sent before is in the log; where nothing is, all that is handled is settled.
    fn launch(&mut self) {
        if self.batches.is_empty() || self.flight.is_some() {
            return;
        }
        let mark = self.handled();
        self.launched = self.worked;
        if self.held.is_empty() {
            return self.settle(mark);
        }
        let held = mem::take(&mut self.held);
        self.flight = Some(Flight::new(self.common, held, self.failed, mark));
    }

    /// Has the flight begin, or get on, where calls that never wait give it no turn. It stays in its place.
    fn poll_flight(&mut self) {
        let _ = landing(&mut self.flight).now_or_never();
    }

    /// What the log has not taken is to be sent again, before what was handled since. Nothing, as long as it is in flight.
    fn landed(&mut self) -> Result<(), Stopped> {
        let Some(mut flight) = self.flight.take() else {
            return Ok(());
        };
        let Some(landing) = flight.take_landing() else {
            self.flight = Some(flight);
            return Ok(());
        };
        let sent = landing?;
        if sent.is_complete() {
            self.failed = 0;
            self.settle(flight.mark);
            return Ok(());
        }
        let mut again = sent.again;
        self.failed = if again.is_empty() {
            0
        } else {
            self.failed.saturating_add(1)
        };
        for ((number, records), fault) in sent.refused {
            self.give_up_call(number, &records, &fault, &mut again);
        }
        again.append(&mut self.held);
        self.held = again;
        Ok(())
    }

    /// The log refused an output of the call, and nobody can tell whose it was.
    fn give_up_call(
        &mut self,
        number: u64,
        records: &Range<usize>,
        fault: &Fault,
        letters: &mut Held<Origin>,
    ) {
        let at = usize::try_from(number - self.first).unwrap_or(usize::MAX);
        let Some(batch) = self.batches.get_mut(at) else {
            return;
        };
        for index in records.clone() {
            if !batch.given_up.contains(&index) {
                let letter = batch.give_up(self.common, index, 1, fault);
                letters.hold((number, index..index + 1), letter);
            }
        }
    }

    /// Waits until all that is handled is settled.
    async fn settle_all(&mut self) -> Result<(), Stopped> {
        loop {
            self.launch();
            if self.flight.is_none() {
                break;
            }
            landing(&mut self.flight).await;
            self.landed()?;
        }
        if let Some(batch) = self.batches.back_mut() {
            batch.spent = Duration::ZERO;
        }
        Ok(())
    }

    /// All effects and outputs up to the mark are durable.
    fn settle(&mut self, (number, handled): (u64, usize)) {
        let mut next_offset = None;
        while let Some(batch) = self.batches.front_mut() {
            let is_whole = self.first < number || handled == batch.records.len();
            let until = if is_whole {
                batch.records.len()
            } else {
                handled
            };
            // The source was told.
            if !is_whole && until == batch.settled {
                break;
            }
            self.common
                .measure(batch.records[batch.settled..until].iter());
            batch.settled = until;
            next_offset = batch.settled_below().or(next_offset);
            if !is_whole {
                break;
            }
            self.ahead.0 -= batch.records.len();
            self.ahead.1 -= batch.bytes;
            self.batches.pop_front();
            self.first += 1;
            if self.first > number {
                break;
            }
        }
        if let Some(next_offset) = next_offset {
            self.source.done(next_offset, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use crate::lane::fakes::{Bench, NOTHING, millis};
    use crate::pipeline::Order;

    #[tokio::test(start_paused = true)]
    async fn outputs_of_a_slow_batch_do_not_wait_for_its_end() {
        let bench = Bench::new(Order::Partition, [None; 100], |_, _| (millis(4), Ok(())));
        let look = async {
            sleep(millis(7)).await;
            assert_eq!(bench.done(), NOTHING);
            sleep(millis(50)).await;
            assert!(bench.emitted().len() > 5, "{:?}", bench.emitted());
            assert!(bench.done() > 5);
            sleep(millis(500)).await;
        };
        bench.run_beside(look).await;
        assert_eq!(bench.emitted(), Vec::from_iter(0..100));
        assert_eq!(bench.done(), 100);
    }

    #[tokio::test(start_paused = true)]
    async fn no_output_waits_for_a_call_that_takes_long() {
        // Those of three are held when it begins; of eight, some are on their way.
        for (quick, time) in [(2, 0), (7, 1)] {
            let slow = quick as i64;
            let bench = Bench::new(Order::Partition, vec![None; quick + 1], move |r, _| {
                (millis(if r.offset == slow { 300 } else { time }), Ok(()))
            });
            let look = async {
                sleep(millis(100)).await;
                let emitted = Vec::from_iter(0..slow);
                assert_eq!(bench.emitted(), emitted, "the last is with the stage");
                sleep(millis(500)).await;
            };
            bench.run_beside(look).await;
            assert_eq!(bench.done(), slow + 1);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_waits_once_for_a_store_that_is_away() {
        let bench = Bench::new(Order::Partition, [None; 100], |_, _| (millis(0), Ok(())));
        let bench = bench.in_batches();
        bench.take_store_away(3);
        bench.run().await;
        assert_eq!(bench.calls(), 2, "the batch, and the batch again");
        assert_eq!(bench.emitted(), Vec::from_iter(0..100));
        assert!(bench.dead().is_empty());
    }
}
