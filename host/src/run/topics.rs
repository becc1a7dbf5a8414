//! The topics that a pipeline needs: those it declares, and those of its dead letters.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::bail;
use tracing::{info, warn};

use super::wait::{LOG, Waiting};
use crate::delivery::dead_letter::default_topic;
use crate::diagnostics::nearest;
use crate::log::LogError;
use crate::log::kafka::topics::Admin;
use crate::log::kafka::{ClientSettings, not_there};
use crate::pipeline::{Action, Brokers, Pipeline, Stage, Topic};

/// Bytes of a dead letter, in topics that the host creates for them: a record's headers grow when it becomes one.
const MAX_DEAD_LETTER: &str = "16777216";

/// Waits for the log, creates what is missing, and checks the rest. `None` when told to shut down meanwhile.
pub(super) async fn prepare(
    pipeline: &Pipeline,
    admin: &Admin,
    waiting: &Waiting<'_>,
    settings: &ClientSettings,
) -> anyhow::Result<Option<()>> {
    let wanted = wanted(pipeline);
    let brokers = &settings.brokers;
    info!("connecting to the log at {brokers}");
    let what = format!("the log at {brokers}");
    let look = || look(pipeline, &wanted, admin, settings);
    let Some((there, not_there)) = waiting.until_available(LOG, &what, look).await? else {
        return Ok(None);
    };
    // Nothing is created for a pipeline that can't run.
    if !not_there.is_empty() {
        let mut missing = missing(pipeline, &wanted, &there);
        missing.retain(|one| not_there.contains(one.topic));
        let said: Vec<_> = missing.iter().map(Missing::is_not_there).collect();
        bail!(said.join("\n"));
    }
    let create = || admin.create_missing(&wanted, there.clone());
    let created = waiting.until_available(LOG, &what, create).await?;
    Ok(created.map(drop))
}

/// A topic that a stage reads or writes, and that is neither there nor will be created.
struct Missing<'a> {
    stage: &'a str,
    topic: &'a str,
    /// What it may be a slip of.
    near: Option<&'a str>,
}

fn missing<'a>(
    pipeline: &'a Pipeline,
    wanted: &'a BTreeMap<String, Topic>,
    there: &'a BTreeMap<String, usize>,
) -> Vec<Missing<'a>> {
    let is_missing = |topic: &String| !there.contains_key(topic) && !wanted.contains_key(topic);
    let missing = used(pipeline).filter(|(_, topic)| is_missing(topic));
    let missing = missing.map(|(stage, topic)| {
        let names = there.keys().chain(wanted.keys()).map(String::as_str);
        let near = nearest(topic, names);
        Missing { stage, topic, near }
    });
    missing.collect()
}

impl Missing<'_> {
    fn is_not_there(&self) -> String {
        let Self { stage, topic, near } = self;
        let near = near.map_or(String::new(), |near| {
            format!("did you mean `{near}`? Else ")
        });
        format!(
            "topic `{topic}` of stage `{stage}` does not exist: {near}declare it as [topics.\"{topic}\"] to have it created"
        )
    }

    fn is_not_to_be_seen(&self) -> String {
        let Self { stage, topic, near } = self;
        let near = near.map_or(String::new(), |near| format!(", or did you mean `{near}`?"));
        format!(
            "the host's Kafka user lacks DESCRIBE on topic `{topic}` of stage `{stage}`, and so can't see whether it is there: \
             grant it{near}"
        )
    }
}

/// How many partitions each topic of the log has, and which of those that are missing are not there. Where that is none of them,
/// the host's user may not see them: that is an operator's to mend, and the start waits for it.
async fn look(
    pipeline: &Pipeline,
    wanted: &BTreeMap<String, Topic>,
    admin: &Admin,
    settings: &ClientSettings,
) -> Result<(BTreeMap<String, usize>, BTreeSet<String>), LogError> {
    let there = admin.partitions().await?;
    let missing = missing(pipeline, wanted, &there);
    if missing.is_empty() {
        return Ok((there, BTreeSet::new()));
    }
    let settings = settings.clone();
    let names = missing.iter().map(|one| one.topic.to_owned()).collect();
    let asked = tokio::task::spawn_blocking(move || not_there(&settings, &names)).await;
    let not_there = asked.map_err(|error| LogError::Unavailable(error.to_string()))??;
    if not_there.is_empty() {
        let said: Vec<_> = missing.iter().map(Missing::is_not_to_be_seen).collect();
        return Err(LogError::Unavailable(said.join("; ")));
    }
    drop(missing);
    Ok((there, not_there))
}

/// All that the pipeline's stages and routes use.
pub(super) fn all(pipeline: &Pipeline) -> BTreeSet<String> {
    let letters = pipeline.stages.iter().flat_map(dead_letters);
    let of_stages = used(pipeline).map(|(_, topic)| topic.clone());
    let declared = pipeline.topics.keys().cloned();
    declared.chain(of_stages).chain(letters).collect()
}

/// Those that its stages and routes write to.
pub(super) fn written(pipeline: &Pipeline) -> BTreeSet<String> {
    let letters = pipeline.stages.iter().flat_map(dead_letters);
    let outputs = pipeline.stages.iter().flat_map(|stage| &stage.output);
    let routes = pipeline.http.iter().flat_map(|http| &http.routes);
    let posted = routes.filter_map(|route| match &route.action {
        Action::Produce { topic, .. } => Some(topic),
        Action::Read { .. } => None,
    });
    letters.chain(outputs.chain(posted).cloned()).collect()
}

fn wanted(pipeline: &Pipeline) -> BTreeMap<String, Topic> {
    let mut wanted = pipeline.topics.clone();
    // Nothing may be lost for want of a topic for dead letters.
    for name in pipeline.stages.iter().flat_map(dead_letters) {
        wanted.entry(name).or_insert_with(|| Topic {
            partitions: None,
            replication: None,
            config: BTreeMap::from([("max.message.bytes".into(), MAX_DEAD_LETTER.into())]),
        });
    }
    if let Brokers::Embedded { .. } = pipeline.kafka.brokers {
        for (name, topic) in &mut wanted {
            fit_embedded(name, topic);
        }
    }
    wanted
}

/// A pipeline for a cluster runs on the embedded broker too: what one node for development cannot do is left out.
fn fit_embedded(name: &str, topic: &mut Topic) {
    topic.replication = None;
    topic.config.retain(|key, value| {
        let known = embedded_kafka::TOPIC_CONFIGS.contains(&key.as_str());
        let kept = known && (key != "message.timestamp.type" || value == "CreateTime");
        if !kept {
            warn!("topic {name}: the embedded broker leaves out `{key}` = `{value}`");
        }
        kept
    });
}

fn dead_letters(stage: &Stage) -> Vec<String> {
    match &stage.dead_letter {
        Some(topic) => vec![topic.clone()],
        None => stage.input.iter().map(|t| default_topic(t)).collect(),
    }
}

/// Each stage's name with each of its topics.
fn used(pipeline: &Pipeline) -> impl Iterator<Item = (&str, &String)> {
    pipeline.stages.iter().flat_map(|stage| {
        let topics = stage.input.iter().chain(&stage.output);
        topics.map(|topic| (stage.name.as_str(), topic))
    })
}
