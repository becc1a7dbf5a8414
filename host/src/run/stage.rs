//! One running stage: its group member, and a task for each lane.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;
use tracing::info;

use crate::admin::Readiness;
use crate::capability::sql::Database;
use crate::capability::{StoreName, Stores};
use crate::component::{Runtime, StageComponent};
use crate::delivery::breaker::Breaker;
use crate::delivery::dead_letter::DeadLetters;
use crate::delivery::progress::LaneId;
use crate::lane::{Equipment, Policy, concurrent, ordered, transactional};
use crate::log::kafka::ClientSettings;
use crate::log::kafka::consumer::{GroupConsumer, StopHandle, Subscription};
use crate::log::kafka::partition::PartitionSource;
use crate::log::kafka::producer::{Patience, Producer};
use crate::metrics::Metrics;
use crate::pipeline::{self, Delivery, Order};

/// How long a lane may take to end when its partition moves to another host.
const REVOKE_BUDGET: Duration = Duration::from_secs(20);

/// A stage whose component is compiled and linked.
pub(super) struct LoadedStage {
    name: String,
    subscription: Subscription,
    component: Arc<StageComponent>,
    policy: Arc<Policy>,
    /// The database that keeps the progress of its lanes, if they are transactional.
    ledger: Option<(StoreName, Arc<Database>)>,
}

/// What the stages of a host share.
pub(super) struct Shared {
    pub(super) settings: ClientSettings,
    pub(super) breaker: Arc<Breaker>,
    pub(super) readiness: Arc<Readiness>,
    pub(super) metrics: Arc<Metrics>,
    /// Which cluster the log is.
    pub(super) cluster: Arc<str>,
}

/// Reads and compiles a stage's component.
pub(super) async fn load(
    stage: &pipeline::Stage,
    runtime: &Arc<Runtime>,
    stores: &Stores,
) -> anyhow::Result<LoadedStage> {
    let bytes = tokio::fs::read(&stage.component)
        .await
        .with_context(|| format!("cannot read {}", stage.component.display()))?;
    let hash: Arc<str> = hex(&Sha256::digest(&bytes)).into();
    let (compiler, instances) = (runtime.clone(), stage.instances);
    let compiled = tokio::task::spawn_blocking(move || compiler.compile(&bytes, instances))
        .await
        .context("compiling failed")?
        .with_context(|| format!("{} does not compile", stage.component.display()))?;
    let component = runtime
        .bind(stage, &compiled, stores)
        .with_context(|| format!("{} cannot be linked", stage.component.display()))?;
    component
        .warm_up()
        .await
        .with_context(|| format!("stage {}", stage.name))?;
    info!(
        stage = stage.name,
        sha256 = &hash[..12],
        "loaded {}",
        stage.component.display()
    );
    Ok(LoadedStage {
        name: stage.name.clone(),
        ledger: ledger(stage, stores)?,
        subscription: Subscription {
            group: stage.group.clone(),
            topics: stage.input.clone(),
            instance_id: stage.instance_id.clone(),
            revoke_budget: REVOKE_BUDGET,
        },
        component: Arc::new(component),
        policy: Arc::new(Policy {
            batch: stage.batch,
            order: stage.order,
            concurrency: stage.concurrency,
            retry: stage.retry,
            on_exhausted: stage.on_exhausted,
            on_gap: stage.on_gap,
            outputs: stage.output.iter().map(|t| t.as_str().into()).collect(),
            dead_letters: DeadLetters {
                stage: stage.name.as_str().into(),
                group: stage.group.as_str().into(),
                component: hash,
                topic: stage.dead_letter.as_deref().map(Arc::from),
            },
        }),
    })
}

fn ledger(
    stage: &pipeline::Stage,
    stores: &Stores,
) -> anyhow::Result<Option<(StoreName, Arc<Database>)>> {
    if stage.delivery != Delivery::Transactional {
        return Ok(None);
    }
    let store = stage.sql.first_key_value().and_then(|(name, access)| {
        let database = stores.sql.get(name)?.granted(*access);
        Some((StoreName::Sql(name.as_str().into()), Arc::new(database)))
    });
    let store = store.with_context(|| format!("stage {} has no SQL store", stage.name))?;
    Ok(Some(store))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl LoadedStage {
    /// Joins the stage's group, with a task in `tasks` that runs its lanes until it has left it again. The condition
    /// `ready` holds once the group has given it its share of the partitions.
    pub(super) fn start(
        self,
        shared: &Shared,
        ready: String,
        tasks: &mut JoinSet<anyhow::Result<()>>,
    ) -> anyhow::Result<StopHandle> {
        // Of its own: what the log refuses of one stage's outputs stops those of no other stage.
        let producer = Arc::new(Producer::new(&shared.settings, Patience::Gapless)?);
        let equipment = Equipment {
            sink: producer,
            handler: self.component.clone(),
            policy: self.policy.clone(),
            breaker: shared.breaker.clone(),
            readiness: shared.readiness.clone(),
            metrics: shared.metrics.stage(&self.name),
            cluster: shared.cluster.clone(),
        };
        let subscription = self.subscription.clone();
        let consumer =
            GroupConsumer::start(&shared.settings, subscription, shared.metrics.clone())?;
        let stop = consumer.stop.clone();
        tasks.spawn(self.run_lanes(consumer, equipment, ready));
        Ok(stop)
    }

    /// A lane for each assigned partition, as many as the group gives this host.
    async fn run_lanes(
        self,
        mut consumer: GroupConsumer,
        equipment: Equipment<Producer, StageComponent>,
        ready: String,
    ) -> anyhow::Result<()> {
        let mut lanes = JoinSet::new();
        let mut is_ready = false;
        loop {
            tokio::select! {
                // All are cancel-safe: what was not taken stays in its channel or set.
                () = consumer.joined.cancelled(), if !is_ready => {
                    equipment.readiness.ready(&ready);
                    is_ready = true;
                }
                Some(source) = consumer.assigned.recv() => {
                    lanes.spawn(self.lane(source, equipment.clone()));
                }
                Some(ended) = lanes.join_next() => {
                    ended.map_err(|error| anyhow!("a lane of stage {} failed: {error}", self.name))?;
                }
                ended = &mut consumer.ended => {
                    let ended = ended.map_err(|_| anyhow!("the consumer's thread of stage {} failed", self.name))?;
                    return ended.with_context(|| format!("stage {}", self.name));
                }
            }
        }
    }

    fn lane(
        &self,
        source: PartitionSource,
        equipment: Equipment<Producer, StageComponent>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let abandoned = source.abandoned();
        let id = LaneId {
            group: self.subscription.group.as_str().into(),
            topic: source.topic(),
            partition: source.number(),
        };
        let ledger = self.ledger.clone();
        let seed = rand::random();
        async move {
            let lane = async {
                match ledger {
                    Some((store, ledger)) => {
                        let lane =
                            transactional::Lane::new(source, equipment, ledger, store, id, seed);
                        lane.run().await;
                    }
                    None if equipment.policy.order != Order::Partition => {
                        let lane = concurrent::Lane::new(source, equipment, seed);
                        lane.run(&id.topic, id.partition).await;
                    }
                    None => {
                        let lane = ordered::Lane::new(source, equipment, seed);
                        lane.run(&id.topic, id.partition).await;
                    }
                }
            };
            tokio::select! {
                () = lane => {}
                // Drops the lane: what it had not settled will be delivered again.
                () = abandoned.cancelled() => {}
            }
        }
    }
}
