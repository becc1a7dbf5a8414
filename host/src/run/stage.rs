//! One running stage: its group member, and a task for each lane.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;
use tracing::info;

use crate::capability::Stores;
use crate::component::{Runtime, StageComponent};
use crate::delivery::dead_letter::DeadLetters;
use crate::lane::{Lane, Policy};
use crate::log::kafka::ClientSettings;
use crate::log::kafka::consumer::{GroupConsumer, StopHandle, Subscription};
use crate::log::kafka::partition::PartitionSource;
use crate::log::kafka::producer::Producer;
use crate::metrics::{Metrics, StageMetrics};
use crate::pipeline;

/// How long a lane may take to end when its partition moves to another host.
const REVOKE_BUDGET: Duration = Duration::from_secs(20);

/// A stage whose component is compiled and linked.
pub(super) struct LoadedStage {
    name: String,
    subscription: Subscription,
    component: Arc<StageComponent>,
    policy: Arc<Policy>,
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
    let compiler = runtime.clone();
    let compiled = tokio::task::spawn_blocking(move || compiler.compile(&bytes))
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
        subscription: Subscription {
            group: stage.group.clone(),
            topics: stage.input.clone(),
            revoke_budget: REVOKE_BUDGET,
        },
        component: Arc::new(component),
        policy: Arc::new(Policy {
            batch: stage.batch,
            retry: stage.retry,
            dead_letters: DeadLetters {
                stage: stage.name.as_str().into(),
                group: stage.group.as_str().into(),
                component: hash,
                topic: stage.dead_letter.as_deref().map(Arc::from),
            },
        }),
    })
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl LoadedStage {
    /// Joins the stage's group, with a task in `tasks` that runs its lanes until it has left it again.
    pub(super) fn start(
        self,
        settings: &ClientSettings,
        producer: Arc<Producer>,
        metrics: &Arc<Metrics>,
        tasks: &mut JoinSet<anyhow::Result<()>>,
    ) -> anyhow::Result<StopHandle> {
        let stage_metrics = metrics.stage(&self.name);
        let consumer = GroupConsumer::start(settings, self.subscription.clone(), metrics.clone())?;
        let stop = consumer.stop.clone();
        tasks.spawn(self.run_lanes(consumer, producer, stage_metrics));
        Ok(stop)
    }

    /// A lane for each assigned partition, as many as the group gives this host.
    async fn run_lanes(
        self,
        mut consumer: GroupConsumer,
        producer: Arc<Producer>,
        metrics: StageMetrics,
    ) -> anyhow::Result<()> {
        let mut lanes = JoinSet::new();
        loop {
            tokio::select! {
                // All three are cancel-safe: what was not taken stays in its channel or set.
                Some(source) = consumer.assigned.recv() => {
                    let lane = self.lane(source, producer.clone(), metrics.clone());
                    lanes.spawn(lane);
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
        producer: Arc<Producer>,
        metrics: StageMetrics,
    ) -> impl Future<Output = ()> + Send + 'static {
        let abandoned = source.abandoned();
        let lane = Lane::new(
            source,
            producer,
            self.component.clone(),
            self.policy.clone(),
            metrics,
        );
        async move {
            tokio::select! {
                () = lane.run() => {}
                // Drops the lane: what it had not settled will be delivered again.
                () = abandoned.cancelled() => {}
            }
        }
    }
}
