//! A stage: what each message's script says, in a transaction or with effects that are durable at once.

use std::sync::Arc;
use std::time::Duration;

use host::capability::{Action, Away, StoreError, StoreName};
use host::delivery::{Cause, Delivery, Fault, Handler, Invocation};
use host::record::{Outgoing, Record};

use super::client::{Client, Open};
use super::database::{Denial, Row};
use super::evidence::id_of_record;
use super::network::request;
use super::pause;
use super::process::Process;
use super::sickness::Sickness;
use super::store::Store;
use super::trace::Subject;
use crate::bugs;
use crate::topology::Script;

/// How long one call may take, in milliseconds.
const DEADLINE: u64 = 2000;

pub(crate) const DATABASE: &str = "database";
pub(crate) const STORE: &str = "store";

pub(crate) struct Stage {
    pub(crate) process: Process,
    pub(crate) number: usize,
    pub(crate) store: Arc<Store>,
    /// What its transactions are of, to be asked whether it is there.
    pub(crate) client: Option<Arc<Client>>,
}

/// How one message's call ends early.
enum Trouble {
    Fault(Fault),
    /// The whole call ends, on an instance that is worn or not.
    Trap(Cause, bool),
}

impl From<Fault> for Trouble {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// What the effects of a call go to.
trait Effects: Sync {
    fn insert(&self, row: Row, record: &Record) -> impl Future<Output = Result<(), Fault>> + Send;

    /// A statement that fails, which the stage does not mind.
    fn fail(&self) -> impl Future<Output = Result<(), Fault>> + Send;

    fn kill(&self) -> impl Future<Output = Result<(), Fault>> + Send;

    /// Whether effects of a call that faults are undone.
    fn undoes(&self) -> bool;
}

impl Effects for Open {
    async fn insert(&self, row: Row, _: &Record) -> Result<(), Fault> {
        Open::insert(self, row).await.map_err(statement_fault)
    }

    async fn fail(&self) -> Result<(), Fault> {
        match Open::fail(self).await {
            Ok(()) | Err(Denial::Failed) => Ok(()),
            Err(denial) => Err(statement_fault(denial)),
        }
    }

    async fn kill(&self) -> Result<(), Fault> {
        Open::kill(self).await.map_err(statement_fault)
    }

    fn undoes(&self) -> bool {
        true
    }
}

/// The key-value store, for one stage.
struct Direct<'a>(&'a Stage);

impl Effects for Direct<'_> {
    async fn insert(&self, row: Row, record: &Record) -> Result<(), Fault> {
        let Stage { process, store, .. } = self.0;
        let key = String::from_utf8_lossy(record.key.as_deref().unwrap_or(b"none"));
        let key: Arc<str> = format!("{key}/{}", record.partition).into();
        let store = store.clone();
        let put = request(process, "put", async move {
            store.put(row.stage, key, row.offset, row.id)
        });
        match put.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(Denial::Sick(sickness))) => {
                Err(refused(sickness, StoreName::Redis(STORE.into())))
            }
            _ => Err(self.0.away()),
        }
    }

    async fn fail(&self) -> Result<(), Fault> {
        Ok(())
    }

    async fn kill(&self) -> Result<(), Fault> {
        Err(Fault::new(Cause::Retry, "killed"))
    }

    fn undoes(&self) -> bool {
        false
    }
}

impl Stage {
    async fn deliver(&self, deliveries: &[Delivery<'_>], effects: &impl Effects) -> Invocation {
        self.process.point("call").await;
        let time = Duration::from_millis(DEADLINE);
        let invocation = match tokio::time::timeout(time, self.walk(deliveries, effects)).await {
            Ok(invocation) => invocation,
            Err(_) => failed(self.late(deliveries), false),
        };
        self.process.point("called").await;
        invocation
    }

    /// Why a call took too long: a message of it does, or else a store was waited for.
    fn late(&self, deliveries: &[Delivery<'_>]) -> Fault {
        let topology = self.process.world().topology();
        let hangs = deliveries.iter().any(|delivery| {
            let script = topology.script(self.number, &id_of_record(delivery.record));
            matches!(script, Script::Hangs { .. })
        });
        if hangs {
            Fault::new(Cause::Deadline, "too slow")
        } else {
            self.away()
        }
    }

    /// One message after the other, as a guest does it.
    async fn walk(&self, deliveries: &[Delivery<'_>], effects: &impl Effects) -> Invocation {
        let alone = deliveries.len() == 1;
        let mut outcomes = Vec::with_capacity(deliveries.len());
        let mut outputs = Vec::new();
        for delivery in deliveries {
            match self.one(delivery, effects, alone).await {
                Ok(more) => {
                    outputs.extend(more);
                    outcomes.push(Ok(()));
                }
                Err(Trouble::Fault(fault)) => outcomes.push(Err(fault)),
                Err(Trouble::Trap(cause, worn)) => {
                    return failed(Fault::new(cause, "as its script says"), worn);
                }
            }
        }
        Invocation {
            outcomes: Ok(outcomes),
            outputs,
            worn: false,
            repeated: false,
        }
    }

    async fn one(
        &self,
        delivery: &Delivery<'_>,
        effects: &impl Effects,
        alone: bool,
    ) -> Result<Vec<Outgoing>, Trouble> {
        let Delivery { record, attempt } = *delivery;
        let id = id_of_record(record);
        let topology = self.process.world().topology();
        let script = topology.script(self.number, &id);
        self.process
            .note("call", Subject::Name(id.clone()), [attempt.into(), 0]);
        let row = Row {
            stage: self.number,
            id: id.clone(),
            partition: record.partition,
            offset: record.offset,
            poison: script == Script::RefusedCommit && effects.undoes(),
        };
        self.process
            .world()
            .evidence()
            .called(self.number, delivery, false);
        self.check_attempt(delivery, &id);
        let faults = self.fault(script, attempt, effects.undoes());
        if let Some((wrote, trouble)) = faults {
            // In a call of many, a stage leaves out what it rejects.
            let stays = alone || !matches!(script, Script::Reject { .. });
            if wrote && stays && effects.undoes() {
                effects.insert(row, record).await?;
            }
            if let Script::Hangs { .. } = script {
                pause(DEADLINE + 10).await;
            }
            return Err(trouble);
        }
        self.prepare(script, effects).await?;
        effects.insert(row, record).await?;
        Ok(self.outputs(record, &id))
    }

    /// What the row says of failed deliveries is not forgotten.
    fn check_attempt(&self, delivery: &Delivery<'_>, id: &str) {
        let Delivery { record, attempt } = *delivery;
        let Some(client) = &self.client else { return };
        let world = self.process.world();
        let lane = world.topology().stages[self.number].lane(record.partition);
        let who = self.process.number();
        let failed = client.database().failed(who, &lane, record.offset);
        if let Some(failed) = failed.filter(|failed| attempt <= *failed) {
            let what = format!("{id} has attempt {attempt}, and {failed} have failed");
            world.evidence().anomaly("forgotten-attempts", what);
        }
    }

    /// How a message's call is to end, and whether it has written by then; `None` where it is to be done.
    fn fault(&self, script: Script, attempt: u32, undone: bool) -> Option<(bool, Trouble)> {
        let world = self.process.world();
        let fault = |cause| Trouble::Fault(Fault::new(cause, "as its script says"));
        match script {
            Script::Reject { wrote } => Some((wrote, fault(Cause::Reject))),
            Script::Trap { wrote } => {
                let worn = wrote && undone && world.one_in(3);
                Some((wrote, Trouble::Trap(Cause::Trap, worn)))
            }
            Script::Hangs { wrote } => Some((wrote, Trouble::Trap(Cause::Deadline, false))),
            Script::Worn if undone && world.one_in(2) => {
                Some((true, Trouble::Trap(Cause::Trap, true)))
            }
            Script::Retry { until, wrote } if attempt < until => Some((wrote, fault(Cause::Retry))),
            _ => None,
        }
    }

    /// What a message's script does before it writes its row.
    async fn prepare(&self, script: Script, effects: &impl Effects) -> Result<(), Fault> {
        let world = self.process.world();
        match script {
            Script::CaughtFailure => effects.fail().await?,
            Script::KillsConnection => effects.kill().await?,
            Script::Slow => pause(world.roll(1..=150)).await,
            Script::NeedsStore => {
                let store = self.store.clone();
                let got = async move { store.does(&Action::Read) };
                let asked = request(&self.process, "get", got).await;
                if !matches!(asked, Ok(true)) {
                    return Err(self.away());
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn away(&self) -> Fault {
        self.process.world().evidence().cost(self.number, 1);
        Fault {
            away: Some(Box::new(Away::silent(StoreName::Redis(STORE.into())))),
            ..Fault::new(Cause::Retry, "the store is away")
        }
    }

    fn outputs(&self, record: &Record, id: &str) -> Vec<Outgoing> {
        let topology = self.process.world().topology();
        let Some(topic) = &topology.stages[self.number].output else {
            return Vec::new();
        };
        let output = |id: String| Outgoing {
            topic: topic.clone(),
            partition: None,
            timestamp: None,
            key: record.key.clone(),
            value: Some(id.into_bytes()),
            headers: Vec::new(),
        };
        let ids = topology.outputs(self.number, id);
        ids.into_iter().map(output).collect()
    }

    async fn ask(&self, away: &Away) -> Result<(), StoreError> {
        match (&away.store, &self.client) {
            (StoreName::Sql(_), Some(client)) => client.probe(&away.action).await,
            _ => {
                let (store, action) = (self.store.clone(), away.action.clone());
                let asked = request(&self.process, "probe", async move { store.does(&action) });
                match asked.await {
                    Ok(true) => Ok(()),
                    _ => Err(StoreError::Unavailable("no answer".into())),
                }
            }
        }
    }

    /// What a call has come to is known: counts those that want another delivery.
    fn count(&self, deliveries: &[Delivery<'_>], invocation: &Invocation) {
        let Ok(outcomes) = &invocation.outcomes else {
            return;
        };
        let mut evidence = self.process.world().evidence();
        for (delivery, outcome) in deliveries.iter().zip(outcomes) {
            if matches!(outcome, Err(fault) if fault.cause == Cause::Retry && fault.away.is_none())
            {
                evidence.called(self.number, delivery, true);
            }
        }
    }
}

impl Handler<bugs::Transaction> for Stage {
    fn takes_batches(&self) -> bool {
        self.process.world().topology().stages[self.number].batches
    }

    async fn call(
        &self,
        deliveries: &[Delivery<'_>],
        transaction: &bugs::Transaction,
    ) -> Invocation {
        let invocation = self.deliver(deliveries, transaction.inner()).await;
        if host::delivery::progress::Transaction::broken(transaction).is_none() {
            self.count(deliveries, &invocation);
        }
        invocation
    }

    async fn probe(&self, away: &Away) -> Result<(), StoreError> {
        self.ask(away).await
    }
}

impl Handler<()> for Stage {
    fn takes_batches(&self) -> bool {
        self.process.world().topology().stages[self.number].batches
    }

    async fn call(&self, deliveries: &[Delivery<'_>], (): &()) -> Invocation {
        let mut invocation = self.deliver(deliveries, &Direct(self)).await;
        self.count(deliveries, &invocation);
        if matches!(&invocation.outcomes, Ok(outcomes) if matches!(outcomes[..], [Err(_)])) {
            invocation.outputs.clear();
        }
        invocation
    }

    async fn probe(&self, away: &Away) -> Result<(), StoreError> {
        self.ask(away).await
    }
}

fn statement_fault(denial: Denial) -> Fault {
    if let Denial::Sick(sickness) = denial {
        return refused(sickness, StoreName::Sql(DATABASE.into()));
    }
    Fault::new(Cause::Retry, format!("a statement: {denial:?}"))
}

/// No message is to pay for it.
fn refused(sickness: Sickness, store: StoreName) -> Fault {
    Fault {
        away: Some(Box::new(sickness.away(store))),
        ..Fault::new(Cause::Retry, "the store is sick")
    }
}

fn failed(fault: Fault, worn: bool) -> Invocation {
    Invocation {
        outcomes: Err(fault),
        outputs: Vec::new(),
        worn,
        repeated: false,
    }
}
