//! Bugs put in on purpose, between the lanes and the world: each breaks one thing that a promise rests on, and the
//! judge must find it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use host::capability::{Action, Away, StoreError};
use host::delivery::progress::{self, Broken, Claim, Commit, CommitError, LaneId, Mode};
use host::delivery::seen::HEADER;
use host::delivery::{self, Delivery, Invocation, dead_letter, output};
use host::log::committed::{Committed, RowMark};
use host::log::{Addressed, BatchLimits, Gap, LogError, Sink as _, Started, Unsent};
use host::record::{Outgoing, Record};
use tokio_util::sync::CancellationToken;

use crate::hosts::CLUSTER;
use crate::world::client::{Client, Open};
use crate::world::database::Lacks;
use crate::world::producer::Producer;
use crate::world::source::PartitionSource;
use crate::world::stage::Stage;
use crate::world::{World, lock};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// A source tells the log of records as soon as a lane has them.
    OffsetBeforeEffects,
    /// Outputs are produced before their commit.
    ProducesBeforeCommit,
    /// Commits succeed whatever their epoch.
    NoEpochCheck,
    /// A claim answers nothing of what was seen.
    ForgetsSeen,
    /// A sink answers before the log does.
    NoAcknowledgements,
    /// A record fails for a moment, and those behind it get through.
    Gaps,
    /// A claim answers no outputs.
    ForgetsPending,
    /// A source begins where the log has its group, whatever the row says.
    TrustsLog,
    /// A commit whose answer was lost is taken for one that did not happen.
    LostIsNotDone,
    /// And for one that did.
    LostIsDone,
    /// A savepoint is not gone back to.
    KeepsFaultyEffects,
    /// A claim answers no attempts.
    ForgetsAttempts,
    /// A claim does not wait for a commit that is under way.
    ClaimsWithoutWaiting,
    /// A commit does not keep its row locked.
    NoRowLock,
    /// Commits succeed whatever the commit before them was.
    NoOrderOfCommits,
    /// An output goes to another partition when it is produced again.
    PartitionsChange,
    /// Dead letters are dropped.
    LosesLetters,
    /// The key-value store takes older values.
    NoVersions,
    /// Messages of one key run side by side.
    NoOrder,
    /// What a row holds may go anywhere.
    GrantsAll,
    /// A lane whose database went back goes on with the generation that its row has.
    GenerationsFall,
    /// A source never says that what are no records was passed.
    StaysAtMarkers,
    /// An id counts wherever it is found.
    TrustsIds,
    /// What a lane that kept no row has delivered counts for nothing once it keeps one.
    ForgetsDelivered,
    /// Where a lane has begun that has no row yet counts as if all below were delivered.
    TrustsBeginnings,
    /// What a store that is sick refuses counts as an attempt of the message.
    CountsSickness,
    /// A store that is sick is asked whether it is there, and not for what it did not do.
    PingsTheSick,
}

/// What an adapter is to break, if anything.
#[derive(Clone, Copy)]
pub(crate) struct Planted(pub(crate) Option<Bug>);

impl Planted {
    pub(crate) fn is(self, bug: Bug) -> bool {
        self.0 == Some(bug)
    }

    /// A group's commit as it is written.
    pub(crate) fn written(self, mut commit: Committed) -> Committed {
        if let Some(mark) = &mut commit.mark {
            match self.0 {
                Some(Bug::ForgetsDelivered) => mark.at_least_once = false,
                Some(Bug::TrustsBeginnings) => mark.at_least_once = mark.row.is_none(),
                _ => {}
            }
        }
        commit
    }

    /// What databases lack. Bugs that the order of commits would heal are found without it.
    pub(crate) fn lacks(self) -> Lacks {
        Lacks {
            locks: self.is(Bug::NoRowLock),
            order_of_commits: [
                Bug::NoOrderOfCommits,
                Bug::NoRowLock,
                Bug::NoEpochCheck,
                Bug::LostIsDone,
                Bug::LostIsNotDone,
                Bug::ClaimsWithoutWaiting,
            ]
            .map(Some)
            .contains(&self.0),
        }
    }
}

pub(crate) struct Source {
    pub(crate) planted: Planted,
    pub(crate) inner: PartitionSource,
}

impl host::log::Source for Source {
    async fn start(&mut self, offset: Option<i64>) -> Result<Option<Started>, Gap> {
        let offset = offset.filter(|_| !self.planted.is(Bug::TrustsLog));
        self.inner.start(offset).await
    }

    async fn next(&mut self, limits: &BatchLimits) -> Result<Option<Vec<Record>>, Gap> {
        let mut records = self.inner.next(limits).await?;
        if self.planted.is(Bug::TrustsIds) {
            records.iter_mut().flatten().for_each(address_anew);
        }
        let last = records.as_ref().and_then(|records| records.last());
        if let Some(last) = last.filter(|_| self.planted.is(Bug::OffsetBeforeEffects)) {
            self.inner.done(last.offset + 1, None);
        }
        Ok(records)
    }

    fn done(&mut self, next_offset: i64, row: Option<RowMark>) {
        self.inner.done(next_offset, row);
    }

    fn passed(&self) -> Option<i64> {
        let passed = self.inner.passed();
        passed.filter(|_| !self.planted.is(Bug::StaysAtMarkers))
    }

    fn stopping(&self) -> CancellationToken {
        self.inner.stopping()
    }
}

/// As if its id had been sent to where it is found.
fn address_anew(record: &mut Record) {
    let (topic, partition) = (record.topic.clone(), record.partition);
    for header in record.headers.iter_mut().filter(|h| h.name == HEADER) {
        let id = String::from_utf8_lossy(header.value.as_deref().unwrap_or_default()).into_owned();
        if let Some(lane) = id.strip_prefix('@').and_then(|id| id.splitn(4, '/').nth(3)) {
            let here = format!("@{CLUSTER}/{topic}/{partition}/{lane}");
            header.value = Some(here.into_bytes());
        }
    }
}

pub(crate) struct Sink {
    pub(crate) planted: Planted,
    pub(crate) world: World,
    pub(crate) inner: Arc<Producer>,
}

impl Sink {
    /// Which of the records are sent late: a first one of a partition that others follow.
    fn gap(&self, records: &[Outgoing]) -> Option<usize> {
        (0..records.len()).find(|index| {
            let place = |record: &Outgoing| (record.topic.clone(), record.partition);
            let behind = &records[index + 1..];
            let mine = place(&records[*index]);
            behind.iter().any(|record| place(record) == mine) && self.world.one_in(2)
        })
    }

    async fn with_gap(&self, records: &[Outgoing], index: usize) -> Result<(), Vec<Unsent>> {
        let mut others = records.to_vec();
        let late = others.remove(index);
        // The world's records are not refused where this is planted.
        let _ = self.inner.produce(&others).await;
        self.inner.produce(&[late]).await
    }
}

impl host::log::Sink for Sink {
    async fn produce(&self, records: &[Outgoing]) -> Result<(), Vec<Unsent>> {
        match self.planted.0 {
            Some(Bug::NoAcknowledgements) => {
                let (inner, records) = (self.inner.clone(), records.to_vec());
                self.world.spawn(async move {
                    let _ = inner.produce(&records).await;
                });
                Ok(())
            }
            Some(Bug::Gaps) => match self.gap(records) {
                Some(index) => self.with_gap(records, index).await,
                None => self.inner.produce(records).await,
            },
            Some(Bug::PartitionsChange) => {
                let mut records = records.to_vec();
                for record in &mut records {
                    record.partition = None;
                }
                self.inner.produce(&records).await
            }
            Some(Bug::LosesLetters) => {
                let mut records = records.to_vec();
                records.retain(|record| !dead_letter::is_one(record));
                if records.is_empty() {
                    return Ok(());
                }
                self.inner.produce(&records).await
            }
            _ => self.inner.produce(records).await,
        }
    }
}

impl Addressed for Sink {
    async fn partition_of(&self, record: &Outgoing) -> Result<i32, LogError> {
        self.inner.partition_of(record).await
    }
}

pub(crate) struct Handler {
    pub(crate) planted: Planted,
    pub(crate) inner: Stage,
}

impl<T: Sync> delivery::Handler<T> for Handler
where
    Stage: delivery::Handler<T>,
{
    fn takes_batches(&self) -> bool {
        delivery::Handler::<T>::takes_batches(&self.inner)
    }

    async fn call(&self, deliveries: &[Delivery<'_>], transaction: &T) -> Invocation {
        let mut invocation = delivery::Handler::call(&self.inner, deliveries, transaction).await;
        if self.planted.is(Bug::CountsSickness) {
            match &mut invocation.outcomes {
                Ok(outcomes) => (outcomes.iter_mut())
                    .filter_map(|outcome| outcome.as_mut().err())
                    .for_each(blame_message),
                Err(fault) => blame_message(fault),
            }
        }
        invocation
    }

    async fn probe(&self, away: &Away) -> Result<(), StoreError> {
        let mut away = away.clone();
        if self.planted.is(Bug::PingsTheSick) {
            away.action = Action::Answer;
        }
        delivery::Handler::<T>::probe(&self.inner, &away).await
    }
}

/// As if a store that is there could not be why it failed.
fn blame_message(fault: &mut delivery::Fault) {
    fault.away = fault.away.take().filter(|away| away.was_gone);
}

pub(crate) struct Ledger {
    pub(crate) planted: Planted,
    pub(crate) inner: Arc<Client>,
    pub(crate) sink: Arc<Producer>,
    /// The number of the last commit that was tried, of each lane.
    pub(crate) tried: Arc<Mutex<BTreeMap<LaneId, i64>>>,
}

impl Ledger {
    fn spoil(&self, lane: &LaneId, claim: &mut Claim) {
        let tried = lock(&self.tried).get(lane).copied();
        match (self.planted.0, tried) {
            (Some(Bug::ForgetsSeen), _) => claim.checkpoint.seen.clear(),
            (Some(Bug::ForgetsPending), _) => claim.checkpoint.pending.clear(),
            (Some(Bug::ForgetsAttempts), _) => claim.checkpoint.attempts = 0,
            (Some(Bug::LostIsDone), Some(tried)) => claim.commits = tried,
            (Some(Bug::LostIsNotDone), Some(tried)) => claim.commits = tried - 1,
            _ => {}
        }
    }
}

impl progress::Ledger for Ledger {
    type Transaction = Transaction;

    async fn claim(&self, lane: &LaneId) -> Result<Claim, StoreError> {
        let before = self.inner.database().lane(lane);
        let mut claim = self.inner.claim(lane).await?;
        if let Some(before) = before.filter(|_| self.planted.is(Bug::ClaimsWithoutWaiting)) {
            claim.checkpoint = before.checkpoint;
            claim.commits = before.commits;
        }
        lock(&self.tried).remove(lane);
        self.spoil(lane, &mut claim);
        Ok(claim)
    }

    async fn reclaim(&self, lane: &LaneId, epoch: i64) -> Result<Option<Claim>, StoreError> {
        let mut claim = self.inner.reclaim(lane, epoch).await?;
        if let Some(claim) = &mut claim {
            self.spoil(lane, claim);
        }
        Ok(claim)
    }

    async fn look(&self, lane: &LaneId) -> Result<Option<Claim>, StoreError> {
        self.inner.look(lane).await
    }

    async fn raise(
        &self,
        lane: &LaneId,
        epoch: i64,
        generation: i64,
    ) -> Result<Option<Claim>, StoreError> {
        match self.planted.is(Bug::GenerationsFall) {
            true => Ok(self.inner.database().lane(lane)),
            false => self.inner.raise(lane, epoch, generation).await,
        }
    }

    async fn begin(&self, mode: Mode) -> Result<Transaction, StoreError> {
        Ok(Transaction {
            planted: self.planted,
            inner: self.inner.begin(mode).await?,
            client: self.inner.clone(),
            sink: self.sink.clone(),
            tried: self.tried.clone(),
        })
    }

    async fn save(&self, commit: Commit<'_>) -> Result<(), CommitError> {
        let commit = with_epoch(self.planted, &self.inner, commit);
        self.inner.save(commit).await
    }
}

pub(crate) struct Transaction {
    planted: Planted,
    inner: Open,
    client: Arc<Client>,
    sink: Arc<Producer>,
    tried: Arc<Mutex<BTreeMap<LaneId, i64>>>,
}

impl Transaction {
    pub(crate) fn inner(&self) -> &Open {
        &self.inner
    }
}

impl progress::Transaction for Transaction {
    fn statements(&self) -> u64 {
        self.inner.statements()
    }

    fn broken(&self) -> Option<Broken> {
        self.inner.broken()
    }

    async fn savepoint(&self) -> Result<(), StoreError> {
        self.inner.savepoint().await
    }

    async fn rollback_to_savepoint(&self) -> Result<(), StoreError> {
        if self.planted.is(Bug::KeepsFaultyEffects) {
            return Ok(());
        }
        self.inner.rollback_to_savepoint().await
    }

    async fn commit(self, commit: Commit<'_>) -> Result<(), CommitError> {
        lock(&self.tried).insert(commit.lane.clone(), commit.commits);
        if self.planted.is(Bug::ProducesBeforeCommit)
            && let Ok(outputs) = output::decode(&commit.checkpoint.pending)
            && !outputs.is_empty()
        {
            let _ = self.sink.produce(&outputs).await;
        }
        let commit = with_epoch(self.planted, &self.client, commit);
        self.inner.commit(commit).await
    }

    async fn rollback(self) {
        self.inner.rollback().await;
    }
}

fn with_epoch<'a>(planted: Planted, client: &Client, commit: Commit<'a>) -> Commit<'a> {
    let row = client.database().lane(commit.lane);
    match row.filter(|_| planted.is(Bug::NoEpochCheck)) {
        Some(row) => Commit {
            epoch: row.epoch,
            ..commit
        },
        None => commit,
    }
}
