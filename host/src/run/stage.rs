//! One running stage: its group member, and a task for each lane.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use futures::FutureExt;
use futures::future::{Fuse, FusedFuture};
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::components::Ready;
use crate::capability::sql::Database;
use crate::capability::{StoreName, Stores};
use crate::component::StageComponent;
use crate::delivery::breaker::Breaker;
use crate::delivery::dead_letter::DeadLetters;
use crate::delivery::progress::LaneId;
use crate::lane::{Equipment, Policy, concurrent, ordered, transactional};
use crate::log::kafka::consumer::{GroupConsumer, StopHandle, Subscription};
use crate::log::kafka::partition::PartitionSource;
use crate::log::kafka::producer::{Patience, Producer};
use crate::log::kafka::{ClientSettings, may_read};
use crate::metrics::Metrics;
use crate::pipeline::{self, Delivery, Order};
use crate::readiness::Readiness;

/// How long a lane may take to end when its partition moves to another host.
const REVOKE_BUDGET: Duration = Duration::from_secs(20);
/// How often the log is asked whether it allows what it did not.
const ALLOWED_INTERVAL: Duration = Duration::from_secs(3);

/// A stage whose component is compiled and linked.
pub(super) struct LoadedStage {
    name: String,
    settings: ClientSettings,
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

/// Gives a stage's component its stores.
pub(super) async fn load(
    settings: &ClientSettings,
    stage: &pipeline::Stage,
    ready: Ready,
    stores: &Stores,
) -> anyhow::Result<LoadedStage> {
    let Ready { component, hash } = ready;
    let component = component.granted(stage, stores);
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
        settings: settings.clone(),
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
        let database = stores.sql.get(name)?.granted(*access).used_by(&stage.name);
        Some((StoreName::Sql(name.as_str().into()), Arc::new(database)))
    });
    let store = store.with_context(|| format!("stage {} has no SQL store", stage.name))?;
    Ok(Some(store))
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
        let lanes = shared.readiness.lanes();
        lanes.watch_calls(&self.name, self.component.unanswered());
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
        let readiness = equipment.readiness.clone();
        // Runs while the log does not allow something.
        let mut allowed = pin!(Fuse::terminated());
        loop {
            tokio::select! {
                // All are cancel-safe: what was not taken stays in its channel or set, and the question in its place.
                () = consumer.joined.cancelled(), if !is_ready => {
                    is_ready = true;
                    if allowed.is_terminated() {
                        readiness.ready(&ready);
                    }
                }
                Some(why) = consumer.forbidden.recv(), if allowed.is_terminated() => {
                    readiness.not_ready(&ready, why);
                    allowed.set(self.until_allowed(&readiness, &ready).fuse());
                }
                () = &mut allowed, if !allowed.is_terminated() => {
                    info!(stage = self.name, "it may read from the log again");
                    if is_ready {
                        readiness.ready(&ready);
                    }
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

    /// Returns once the log allows to read the stage's topics in its group; says meanwhile what it does not.
    async fn until_allowed(&self, readiness: &Readiness, ready: &str) {
        loop {
            let (settings, subscription) = (self.settings.clone(), self.subscription.clone());
            let asked = tokio::task::spawn_blocking(move || {
                may_read(&settings, &subscription.group, &subscription.topics)
            });
            match asked.await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => drop(readiness.not_ready(ready, error.to_string())),
                Err(error) => warn!(stage = self.name, "asking the log failed: {error}"),
            }
            tokio::time::sleep(ALLOWED_INTERVAL).await;
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
            // In boxes: a lane's future is as large as all that it may wait for.
            let lane = async {
                match ledger {
                    Some((store, ledger)) => {
                        let lane =
                            transactional::Lane::new(source, equipment, ledger, store, id, seed);
                        Box::pin(lane.run()).await;
                    }
                    None if equipment.policy.order != Order::Partition => {
                        let lane = concurrent::Lane::new(source, equipment, id, seed);
                        Box::pin(lane.run()).await;
                    }
                    None => {
                        let lane = ordered::Lane::new(source, equipment, id, seed);
                        Box::pin(lane.run()).await;
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
