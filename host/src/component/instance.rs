//! A stage that can be called: warm instances, and one call with its deadline.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::debug;
use wasmtime::{Engine, Store};

use super::guest::{Grants, Guest};
use super::plain;
use super::runtime::{Prepared, Source};
use super::share::{self, Share, TICKS_PER_LOOK};
use crate::capability::logging::Place;
use crate::capability::producer::ProducerGrant;
use crate::capability::sql::Transaction;
use crate::capability::{Pending, StoreError, StoreName, Stores};
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
use bindings::one::stagehost::stage::types as wit;
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
            Some((prepared, room)) => Some((Mould::new(stage, prepared)?, room)),
            None => None,
        };
        let grants = Grants {
            stage: Arc::from(stage.name.as_str()),
            producer: Arc::new(ProducerGrant::new(&stage.output, stage.limits.max_output)),
            sql: Arc::new(stores.sql_grants(stage)),
            redis: Arc::new(stores.redis_grants(stage)),
            config: Arc::new(stage.config.clone().into_iter().collect()),
            memory: stage.limits.memory,
        };
        Ok(Self {
            share: source.share,
            mapped: Mould::new(stage, source.mapped)?,
            pooled,
            grants,
            deadline: stage.limits.deadline,
            instances: stage.instances,
            idle: Mutex::default(),
        })
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

    async fn instantiate(&self) -> wasmtime::Result<Instance> {
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
        store.set_epoch_deadline(TICKS_PER_LOOK);
        store.epoch_deadline_callback(|_| Ok(share::look()));
        let exports = match &mould.world {
            World::Handler(pre) => Exports::Handler(pre.instantiate_async(&mut store).await?),
            World::BatchHandler(pre) => {
                Exports::BatchHandler(pre.instantiate_async(&mut store).await?)
            }
        };
        Ok(Instance {
            store,
            exports,
            _permit: permit,
        })
    }

    /// Makes a first instance, so that a component that cannot be instantiated is found at start.
    pub async fn warm_up(&self) -> anyhow::Result<()> {
        let instance = self
            .share
            .within(self.deadline, self.instantiate())
            .await
            .with_context(|| self.late())?
            .map_err(plain)
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
        let waits = Waits::default();
        let call = self.invoke(deliveries, transaction, &waits);
        if let Some(invocation) = self.share.within(self.deadline, call).await {
            return invocation;
        }
        // A store that does not answer is no fault of the guest's, and may answer the next time.
        failed(match waits.store() {
            Some(store) => Fault {
                away: Some(store.clone()),
                ..Fault::new(
                    Cause::Retry,
                    format!("{store} did not answer; {}", self.late()),
                )
            },
            None => Fault::new(Cause::Deadline, self.late()),
        })
    }

    /// One call, without its deadline. What an instance was left with by earlier calls (memory that it
    /// leaked, say) must not cost this message, so a call that failed on a used one is made again on a new one; where
    /// it has written in a transaction, by the lane, which can undo that.
    async fn invoke(
        &self,
        deliveries: &[Delivery<'_>],
        transaction: Option<&Transaction>,
        waits: &Waits,
    ) -> Invocation {
        if let Some(instance) = self.take_idle() {
            waits.of(&instance);
            let before = transaction.map(|t| t.statements());
            let mut invocation = self.call_on(instance, deliveries, transaction).await;
            match &invocation.outcomes {
                Err(fault) if matches!(fault.cause, Cause::Trap | Cause::Memory) => {
                    if transaction.map(|t| t.statements()) != before {
                        invocation.worn = true;
                        return invocation;
                    }
                    debug!("once more on a new instance: {}", fault.message);
                }
                _ => return invocation,
            }
        }
        match self.instantiate().await {
            Ok(instance) => {
                waits.of(&instance);
                self.call_on(instance, deliveries, transaction).await
            }
            // It could at start, so the host is short of something, which is not the message's fault.
            Err(error) => failed(Fault::new(
                Cause::Retry,
                format!("the component could not be instantiated: {}", words(&error)),
            )),
        }
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
        let outputs = guest.producer.take_outputs();
        let denied = guest.take_denied();
        let away = guest.take_away();
        match called {
            Ok(outcomes) => {
                self.keep(instance);
                // In a larger call nobody can tell which message a denial belongs to.
                let denied = denied.filter(|_| deliveries.len() == 1);
                answered(outcomes, outputs, denied, away)
            }
            Err(error) => {
                let words = [words(&error), guest.log.take_last_words()];
                let words = words.join(": ").trim_end_matches(": ").to_owned();
                let fault = trap(words, guest.limiter.refused_memory, denied);
                failed(Fault { away, ..fault })
            }
        }
    }

    async fn ping(&self, store: &StoreName) -> Result<(), StoreError> {
        match store {
            StoreName::Sql(name) => self.grants.sql.ping(name).await,
            StoreName::Redis(name) => self.grants.redis.ping(name).await,
        }
    }
}

impl Mould {
    fn new(stage: &pipeline::Stage, prepared: Prepared) -> anyhow::Result<Self> {
        let Prepared { engine, pre } = prepared;
        let world = match OnePre::new(pre.clone()) {
            Ok(one) => World::Handler(one),
            Err(_) => World::BatchHandler(
                BatchPre::new(pre)
                    .map_err(plain)
                    .with_context(|| {
                        format!(
                            "{} exports neither stagehost:stage/handler nor stagehost:stage/batch-handler",
                            stage.component.display()
                        )
                    })?,
            ),
        };
        Ok(Self { engine, world })
    }
}

/// What the instance of a call waits for; it outlives the call's future, and the instance with it.
#[derive(Default)]
struct Waits(Mutex<Option<Arc<Pending>>>);

impl Waits {
    fn of(&self, instance: &Instance) {
        let pending = instance.store.data().pending.clone();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(pending);
    }

    fn store(&self) -> Option<StoreName> {
        let pending = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pending.as_ref()?.take()
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

    async fn probe(&self, store: &StoreName) -> Result<(), StoreError> {
        self.ping(store).await
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

    async fn probe(&self, store: &StoreName) -> Result<(), StoreError> {
        self.ping(store).await
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
        self.store.data_mut().limiter.refused_memory = false;
        self.store.set_epoch_deadline(TICKS_PER_LOOK);
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
    denied: Option<String>,
    away: Option<StoreName>,
) -> Invocation {
    let fault = |fault| Fault {
        away: away.clone(),
        ..fault_of(fault, denied.as_deref())
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
    }
}

/// A fault after a denied call is put down to the denial: trying again would be denied again.
fn fault_of(fault: wit::Fault, denied: Option<&str>) -> Fault {
    let (cause, message) = match fault {
        wit::Fault::Retry(why) => (Cause::Retry, why),
        wit::Fault::Reject(why) => (Cause::Reject, why),
    };
    match denied {
        Some(denied) => Fault::new(
            Cause::Denied,
            format!("{denied}; the stage said: {message}"),
        ),
        None => Fault::new(cause, message),
    }
}

fn trap(words: String, refused_memory: bool, denied: Option<String>) -> Fault {
    match denied {
        _ if refused_memory => Fault::new(
            Cause::Memory,
            format!("the stage's memory limit is reached: {words}"),
        ),
        Some(denied) => Fault::new(Cause::Denied, format!("{denied}; then: {words}")),
        None => Fault::new(Cause::Trap, words),
    }
}

fn failed(fault: Fault) -> Invocation {
    Invocation {
        outcomes: Err(fault),
        outputs: Vec::new(),
        worn: false,
    }
}

/// What went wrong, without the wasm backtrace that the error's own words begin with; that is for debugging.
fn words(error: &wasmtime::Error) -> String {
    debug!("a call failed: {error:?}");
    error.root_cause().to_string()
}
