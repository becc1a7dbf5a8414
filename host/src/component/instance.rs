//! A stage that can be called: warm instances, and one call with its deadline.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::debug;
use wasmtime::{Engine, Store};

use super::fault::{Trouble, fault_of, trap, unmade};
use super::guest::{Grants, Guest};
use super::plain;
use super::runtime::{Prepared, Source};
use super::share::{self, EPOCHS_PER_LOOK, Share};
use crate::capability::logging::Place;
use crate::capability::producer::ProducerGrant;
use crate::capability::sql::Transaction;
use crate::capability::{Action, Away, Pending, StoreError, StoreName, Stores, Unanswered};
use crate::delivery::progress::Transaction as _;
use crate::delivery::{Cause, Delivery, Fault, Handler, Invocation};
use crate::pipeline::{self, Instances};
use crate::record::Header;

/// Instances of a stage that are kept while they have nothing to do.
const MAX_IDLE: usize = 256;

mod bindings {
    pub(super) mod one {
        wasmtime::component::bindgen!({
            path: "../wit",
            inline: "
                package stagehost:host-stage;
                world one { export stagehost:stage/handler@0.1.0; }
            ",
            exports: { default: async },
            ownership: Borrowing { duplicate_if_necessary: false },
        });
    }
    pub(super) mod batch {
        wasmtime::component::bindgen!({
            path: "../wit",
            inline: "
                package stagehost:host-batch-stage;
                world batch { export stagehost:stage/batch-handler@0.1.0; }
            ",
            exports: { default: async },
            ownership: Borrowing { duplicate_if_necessary: false },
            with: { "stagehost:stage/types": super::one::stagehost::stage::types },
        });
    }
}
use bindings::batch::{Batch, BatchPre};
pub(super) use bindings::one::stagehost::stage::types as wit;
use bindings::one::{One, OnePre};

/// A compiled stage with its grants.
pub struct StageComponent {
    share: Share,
    mapped: Mould,
    /// Tried first, as long as there are permits.
    pooled: Option<(Mould, Arc<Semaphore>)>,
    grants: Grants,
    deadline: Duration,
    instances: Instances,
    /// Instances at rest: at most as many as there were calls at one time, so `concurrency` a lane.
    idle: Mutex<Vec<Instance>>,
    /// By topic and partition, the offset that the next call there is made at on a new instance: the lane undoes what the one
    /// that trapped had written, and calls again.
    worn: Mutex<BTreeMap<(Arc<str>, i32), i64>>,
}

/// What instances are made of.
struct Mould {
    engine: Engine,
    world: World,
}

/// What the component exports.
enum World {
    Handler(OnePre<Guest>),
    BatchHandler(BatchPre<Guest>),
}

struct Instance {
    store: Store<Guest>,
    exports: Exports,
    /// Given back after the store has given back what it permits.
    _permit: Option<OwnedSemaphorePermit>,
}

enum Exports {
    Handler(One),
    BatchHandler(Batch),
}

impl StageComponent {
    pub(super) fn new(
        stage: &pipeline::Stage,
        source: Source,
        stores: &Stores,
    ) -> anyhow::Result<Self> {
        let pooled = match source.pooled {
            Some((prepared, room)) => Some((Mould::new(prepared)?, room)),
            None => None,
        };
        Ok(Self {
            share: source.share,
            mapped: Mould::new(source.mapped)?,
            pooled,
            grants: grants(stage, stores),
            deadline: stage.limits.deadline,
            instances: stage.instances,
            idle: Mutex::default(),
            worn: Mutex::default(),
        })
    }

    /// Its calls that wait for stores.
    pub fn unanswered(&self) -> Arc<Unanswered> {
        self.grants.unanswered.clone()
    }

    /// The same with the stores that the stage is granted, for who made it before they were there.
    pub fn granted(self, stage: &pipeline::Stage, stores: &Stores) -> Self {
        Self {
            grants: grants(stage, stores),
            // Instances that were made know the others.
            idle: Mutex::default(),
            ..self
        }
    }

    fn late(&self) -> String {
        let deadline = humantime::format_duration(self.deadline);
        format!("the call took longer than its deadline of {deadline}")
    }

    fn take_idle(&self) -> Option<Instance> {
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop()
    }

    fn keep(&self, instance: Instance) {
        if self.instances == Instances::Warm {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            if idle.len() < MAX_IDLE {
                idle.push(instance);
            }
        }
    }

    /// The idle instances, which are as old as one that failed of its age.
    fn take_all_idle(&self) -> Vec<Instance> {
        std::mem::take(&mut *self.idle.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The call trapped on a used instance after it had written.
    fn wants_new(&self, first: &Delivery<'_>) {
        let record = first.record;
        let mut worn = self.worn.lock().unwrap_or_else(PoisonError::into_inner);
        worn.insert((record.topic.clone(), record.partition), record.offset);
    }

    /// Whether the call that begins is made again after that.
    fn take_wants_new(&self, deliveries: &[Delivery<'_>]) -> bool {
        let mut worn = self.worn.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Delivery { record, .. }) = deliveries.first().filter(|_| !worn.is_empty()) else {
            return false;
        };
        let place = (record.topic.clone(), record.partition);
        let again = worn.get(&place) == Some(&record.offset);
        if again {
            worn.remove(&place);
        }
        again
    }

    /// A new instance; or the guest's fault, or the host's, which it could be made at start.
    async fn instantiate(&self, state: &CallState) -> Result<Instance, (wasmtime::Error, Fault)> {
        let pooled = self.pooled.as_ref().and_then(|(mould, room)| {
            let permit = room.clone().try_acquire_owned().ok()?;
            Some((mould, permit))
        });
        let (mould, permit) = match pooled {
            Some((mould, permit)) => (mould, Some(permit)),
            None => (&self.mapped, None),
        };
        let mut store = Store::new(&mould.engine, Guest::new(&self.grants));
        store.limiter(|guest| &mut guest.limiter);
        store.set_epoch_deadline(EPOCHS_PER_LOOK);
        store.epoch_deadline_callback(|_| Ok(share::look()));
        state.waits_of(&store);
        let exports = match &mould.world {
            World::Handler(pre) => (pre.instantiate_async(&mut store).await).map(Exports::Handler),
            World::BatchHandler(pre) => {
                (pre.instantiate_async(&mut store).await).map(Exports::BatchHandler)
            }
        };
        match exports {
            Ok(exports) => Ok(Instance {
                store,
                exports,
                _permit: permit,
            }),
            Err(error) => {
                let fault = unmade(&error, store.data_mut());
                Err((error, fault))
            }
        }
    }

    /// Makes a first instance, so that a component that cannot be instantiated is found at start.
    pub async fn warm_up(&self) -> anyhow::Result<()> {
        let instance = self
            .share
            .within(self.deadline, 0, self.instantiate(&CallState::default()))
            .await
            .with_context(|| self.late())?
            .map_err(|(error, _)| plain(error))
            .context("the component cannot be instantiated")?;
        self.keep(instance);
        Ok(())
    }

    /// One call, with its deadline.
    async fn deliver(
        &self,
        deliveries: &[Delivery<'_>],
        transaction: Option<&Transaction>,
    ) -> Invocation {
        // On expiry the future is dropped, and with it the instance: wasmtime unwinds its stack.
        let state = CallState::default();
        let call = self.invoke(deliveries, transaction, &state);
        let called = self
            .share
            .within(self.deadline, deliveries.len(), call)
            .await;
        let invocation = called.unwrap_or_else(|| {
            // A store that does not answer is no fault of the guest's, and may answer the next time.
            failed(match state.away(self.deadline) {
                Some(away) => {
                    let because = match &away.action {
                        Action::Lock(wait) => wait.words(),
                        _ => None,
                    };
                    let because = because.map_or(String::new(), |why| format!(": {why}"));
                    let late = self.late();
                    let words = format!("{} did not answer{because}; {late}", away.store);
                    Fault {
                        away: Some(Box::new(away)),
                        ..Fault::new(Cause::Slow, words)
                    }
                }
                None => Fault::new(Cause::Deadline, self.late()),
            })
        });
        Invocation {
            repeated: state.repeated.load(Ordering::Relaxed),
            ..invocation
        }
    }

    /// One call, without its deadline. What an instance was left with by earlier calls (memory that it
    /// leaked, say) must not cost this message, so a call that failed on a used one is made again, once, on a new one;
    /// where it has written in a transaction, by the lane, which can undo that. It is not counted as an attempt: it is no
    /// other delivery, and is made where the policy allows one only.
    async fn invoke(
        &self,
        deliveries: &[Delivery<'_>],
        transaction: Option<&Transaction>,
        state: &CallState,
    ) -> Invocation {
        // What is seldom done is in a box: a call's future is moved with all that it may come to.
        let again = transaction.is_some() && self.take_wants_new(deliveries);
        if again {
            return Box::pin(self.call_on_new(deliveries, transaction, state)).await;
        }
        let idle = self.take_idle();
        let is_used = idle.is_some();
        let instance = match idle {
            Some(instance) => instance,
            None => match Box::pin(self.instantiate(state)).await {
                Ok(instance) => instance,
                Err((_, fault)) => return failed(fault),
            },
        };
        state.waits_of(&instance.store);
        let before = transaction.map(|t| t.statements());
        let mut invocation = self.call_on(instance, deliveries, transaction).await;
        let (fault, first) = match (&invocation.outcomes, deliveries.first()) {
            (Err(fault), Some(first)) if is_used && fault.cause.may_be_of_use() => (fault, first),
            _ => return invocation,
        };
        if transaction.map(|t| t.statements()) != before {
            self.wants_new(first);
            invocation.worn = true;
            return invocation;
        }
        debug!("once more on a new instance: {}", fault.message);
        Box::pin(self.call_on_new(deliveries, transaction, state)).await
    }

    /// The call again, on a new instance. Where that helps, it was the instance's age, and those that have served as long are
    /// let go: each would cost a message a call, and its batch a transaction. Where it does not, they are kept, for it was the
    /// message.
    async fn call_on_new(
        &self,
        deliveries: &[Delivery<'_>],
        transaction: Option<&Transaction>,
        state: &CallState,
    ) -> Invocation {
        state.repeated.store(true, Ordering::Relaxed);
        let instance = match self.instantiate(state).await {
            Ok(instance) => instance,
            Err((_, fault)) => return failed(fault),
        };
        let used = self.take_all_idle();
        let invocation = self.call_on(instance, deliveries, transaction).await;
        if invocation.outcomes.is_err() {
            used.into_iter().for_each(|instance| self.keep(instance));
        }
        invocation
    }

    /// One call on an instance, which is dropped if the call fails.
    async fn call_on(
        &self,
        mut instance: Instance,
        deliveries: &[Delivery<'_>],
        transaction: Option<&Transaction>,
    ) -> Invocation {
        let guest = instance.store.data_mut();
        guest.sql.set_transaction(transaction.cloned());
        let called = instance.call(deliveries).await;
        let guest = instance.store.data_mut();
        guest.sql.set_transaction(None);
        guest.log.end_call();
        let outputs = guest.producer.take_outputs();
        match called {
            Ok(outcomes) => {
                // In a larger call nobody can tell which message a denial, or a slow statement, belongs to.
                let single = deliveries.len() == 1;
                let trouble = Trouble {
                    denied: guest.take_denied().filter(|_| single),
                    slow: guest.take_slow() && single,
                    away: guest.take_away(),
                };
                self.keep(instance);
                answered(outcomes, outputs, &trouble)
            }
            Err(error) => failed(trap(&error, guest)),
        }
    }

    async fn ask(&self, Away { store, action, .. }: &Away) -> Result<(), StoreError> {
        match store {
            StoreName::Sql(name) => self.grants.sql.probe(name, action).await,
            StoreName::Redis(name) => self.grants.redis.probe(name, action).await,
        }
    }
}

fn grants(stage: &pipeline::Stage, stores: &Stores) -> Grants {
    Grants {
        stage: Arc::from(stage.name.as_str()),
        producer: Arc::new(ProducerGrant::new(&stage.output, stage.limits.max_output)),
        sql: Arc::new(stores.sql_grants(stage)),
        redis: Arc::new(stores.redis_grants(stage)),
        config: Arc::new(stage.config.clone().into_iter().collect()),
        unanswered: Arc::default(),
        memory: stage.limits.memory,
    }
}

impl Mould {
    fn new(prepared: Prepared) -> anyhow::Result<Self> {
        let Prepared { engine, pre } = prepared;
        let no_handler = match OnePre::new(pre.clone()) {
            Ok(one) => {
                let world = World::Handler(one);
                return Ok(Self { engine, world });
            }
            Err(error) => plain(error),
        };
        match BatchPre::new(pre) {
            Ok(batch) => {
                let world = World::BatchHandler(batch);
                Ok(Self { engine, world })
            }
            // What is wrong is told of the one that it has.
            Err(_) if !no_handler.to_string().contains("no exported instance") => Err(no_handler),
            Err(error) => Err(plain(error)),
        }
    }
}

/// What is known of a call that goes on; it outlives the call's future, and the instance with it.
#[derive(Default)]
struct CallState {
    /// What the instance waits for.
    pending: Mutex<Option<Arc<Pending>>>,
    /// The call is made again on a new instance.
    repeated: AtomicBool,
}

impl CallState {
    fn waits_of(&self, store: &Store<Guest>) {
        let pending = store.data().pending.clone();
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner) = Some(pending);
    }

    fn away(&self, time: Duration) -> Option<Away> {
        let pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.as_ref()?.take(time)
    }
}

/// Effects in SQL stores are durable statement by statement.
impl Handler<()> for StageComponent {
    fn takes_batches(&self) -> bool {
        matches!(self.mapped.world, World::BatchHandler(_))
    }

    async fn call(&self, deliveries: &[Delivery<'_>], (): &()) -> Invocation {
        self.deliver(deliveries, None).await
    }

    async fn probe(&self, away: &Away) -> Result<(), StoreError> {
        self.ask(away).await
    }
}

/// Effects in the stage's SQL store belong to the transaction.
impl Handler<Transaction> for StageComponent {
    fn takes_batches(&self) -> bool {
        matches!(self.mapped.world, World::BatchHandler(_))
    }

    async fn call(&self, deliveries: &[Delivery<'_>], transaction: &Transaction) -> Invocation {
        self.deliver(deliveries, Some(transaction)).await
    }

    async fn probe(&self, away: &Away) -> Result<(), StoreError> {
        self.ask(away).await
    }
}

impl Instance {
    async fn call(
        &mut self,
        deliveries: &[Delivery<'_>],
    ) -> wasmtime::Result<Vec<Result<(), wit::Fault>>> {
        let Some(first) = deliveries.first() else {
            return Ok(Vec::new());
        };
        self.store.data().log.set_place(Place {
            topic: first.record.topic.clone(),
            partition: first.record.partition,
            offset: first.record.offset,
        });
        self.store.data_mut().limiter.forget_refusals();
        self.store.set_epoch_deadline(EPOCHS_PER_LOOK);
        match &self.exports {
            Exports::Handler(exports) => {
                let headers = headers(first);
                let message = message(first, &headers);
                let handler = exports.stagehost_stage_handler();
                let answer = handler.call_handle(&mut self.store, message).await?;
                Ok(vec![answer])
            }
            Exports::BatchHandler(exports) => {
                let headers: Vec<_> = deliveries.iter().map(headers).collect();
                let messages = deliveries.iter().zip(&headers);
                let messages: Vec<_> = messages.map(|(d, headers)| message(d, headers)).collect();
                let handler = exports.stagehost_stage_batch_handler();
                let answers = handler.call_handle(&mut self.store, &messages).await?;
                if answers.len() != deliveries.len() {
                    wasmtime::bail!(
                        "answered {} outcomes for {} messages",
                        answers.len(),
                        deliveries.len()
                    );
                }
                Ok(answers)
            }
        }
    }
}

fn headers<'a>(delivery: &Delivery<'a>) -> Vec<wit::Header<'a>> {
    let headers = delivery.record.headers.iter();
    let header = |header: &'a Header| wit::Header {
        name: &header.name,
        value: header.value.as_deref(),
    };
    headers.map(header).collect()
}

/// The record as it goes into the guest's memory: borrowed, so that it is copied once.
fn message<'a>(delivery: &Delivery<'a>, headers: &'a [wit::Header<'a>]) -> wit::Message<'a> {
    let record = delivery.record;
    wit::Message {
        topic: &record.topic,
        partition: u32::try_from(record.partition).unwrap_or_default(),
        offset: u64::try_from(record.offset).unwrap_or_default(),
        timestamp: record.timestamp.and_then(|t| u64::try_from(t).ok()),
        key: record.key.as_deref(),
        value: record.value.as_deref(),
        headers,
        attempt: delivery.attempt,
    }
}

fn answered(
    outcomes: Vec<Result<(), wit::Fault>>,
    outputs: Vec<crate::record::Outgoing>,
    trouble: &Trouble,
) -> Invocation {
    let fault = |fault| Fault {
        away: trouble.away.clone(),
        ..fault_of(fault, trouble)
    };
    let outcomes: Vec<_> = outcomes
        .into_iter()
        .map(|outcome| outcome.map_err(fault))
        .collect();
    let dropped = matches!(outcomes.as_slice(), [Err(_)]);
    Invocation {
        outputs: if dropped { Vec::new() } else { outputs },
        outcomes: Ok(outcomes),
        worn: false,
        repeated: false,
    }
}

fn failed(fault: Fault) -> Invocation {
    Invocation {
        outcomes: Err(fault),
        outputs: Vec::new(),
        worn: false,
        repeated: false,
    }
}
