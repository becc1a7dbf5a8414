//! Whether the promises were kept, from what is left at the end.

mod calls;
mod ordered;
mod transactional;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use host::delivery::seen::{Admitted, OutputId, Seen};
use host::record::Record;

use crate::hosts::{CLUSTER, Servers};
use crate::schedule::Schedule;
use crate::topology::{Kind, Topology};
use crate::world::broker::Seat;
use crate::world::database::Row;
use crate::world::evidence::{Anomaly, Calls, cause, id_of_record};

/// All that is left of a run.
pub(crate) struct Outcome {
    topology: Topology,
    hasty: bool,
    /// Each partition from its first record on, whatever retention has removed.
    topics: BTreeMap<(Arc<str>, i32), Vec<Record>>,
    rows: Vec<Row>,
    values: BTreeMap<Arc<str>, (i64, Arc<str>)>,
    calls: BTreeMap<(usize, i32, i64), Calls>,
    disturbances: Vec<u32>,
    costs: Vec<u32>,
    moves: u32,
    /// A database went back: what is done again may come to something else, and its outputs come twice.
    went_back: bool,
    removed: BTreeSet<(Arc<str>, Arc<str>)>,
    effects: BTreeSet<(usize, Arc<str>)>,
    /// Stages of which a lane has stopped, and said why.
    halted: BTreeSet<usize>,
    anomalies: Vec<Anomaly>,
}

/// Judges a run; what was found while it lasted comes first.
pub(crate) fn judge(
    servers: &Servers,
    schedule: &Schedule,
    halted: BTreeSet<Seat>,
) -> Vec<Anomaly> {
    let topology = &schedule.topology;
    let mut topics = BTreeMap::new();
    for (topic, partitions) in &topology.topics {
        for number in 0..i32::try_from(*partitions).unwrap_or(0) {
            let partition = servers.broker.partition(topic, number);
            topics.insert((topic.clone(), number), partition.records);
        }
    }
    let evidence = servers.world.evidence();
    let mut outcome = Outcome {
        topology: topology.clone(),
        hasty: schedule.hasty,
        topics,
        rows: servers.databases.iter().flat_map(|d| d.rows()).collect(),
        values: servers.store.values(),
        calls: evidence.calls.clone(),
        disturbances: evidence.disturbances.clone(),
        costs: evidence.costs.clone(),
        moves: evidence.moves,
        went_back: evidence.went_back,
        removed: evidence.removed.clone(),
        effects: evidence.effects(),
        halted: halted.into_iter().map(|(stage, _)| stage).collect(),
        anomalies: evidence.anomalies.clone(),
    };
    drop(evidence);
    outcome.judge();
    outcome.anomalies
}

/// Records of a topic, without those that repeat an id.
struct Distinct {
    /// How often each message is there.
    counts: BTreeMap<Arc<str>, u32>,
    /// In each partition, in order: message and offset.
    partitions: Vec<Vec<(Arc<str>, i64)>>,
}

impl Outcome {
    fn judge(&mut self) {
        for stage in 0..self.topology.stages.len() {
            match self.topology.stages[stage].kind {
                Kind::Transactional(_) => self.judge_transactional(stage),
                Kind::Ordered => self.judge_ordered(stage),
            }
            self.judge_calls(stage);
        }
        self.judge_values();
    }

    fn anomaly(&mut self, kind: &'static str, stage: usize, what: String) {
        let what = format!("stage {}: {what}", self.topology.stages[stage].name);
        self.anomalies.push(Anomaly { kind, what });
    }

    /// What readers of a topic see who drop what repeats an id, which must be the same as what a lane drops.
    fn distinct(&mut self, stage: usize, topic: &str) -> Distinct {
        let mut distinct = Distinct {
            counts: BTreeMap::new(),
            partitions: Vec::new(),
        };
        let mut wrongly_dropped = Vec::new();
        for ((_, partition), records) in
            self.topics.iter().filter(|((name, _), _)| **name == *topic)
        {
            let mut seen = Seen::default();
            let mut known = BTreeSet::new();
            let mut kept = Vec::new();
            let mut missed = Vec::new();
            for record in records {
                let value = id_of_record(record);
                let id = OutputId::of(record, CLUSTER).map(|id| id.to_string());
                let repeats = id.is_some_and(|id| !known.insert(id));
                let dropped = seen.admit(record, CLUSTER) != Admitted::New;
                if dropped && !repeats {
                    missed.push(value.clone());
                }
                if !dropped && self.went_back {
                    // A row went back in its turn before its outputs could be written anew: they were made again.
                    missed.retain(|missed| *missed != value);
                }
                if !repeats {
                    *distinct.counts.entry(value.clone()).or_default() += 1;
                    kept.push((value, record.offset));
                }
            }
            let below = |id| format!("{id} in {topic} {partition} is below a newer one");
            wrongly_dropped.extend(missed.into_iter().map(below));
            distinct.partitions.push(kept);
        }
        for what in wrongly_dropped {
            self.anomaly("lost-write", stage, what);
        }
        distinct
    }

    /// Whether a message need not be processed: it was removed before, or its lane has stopped.
    fn may_be_missing(&self, stage: usize, id: &Arc<str>) -> bool {
        let input = &self.topology.stages[stage].input;
        self.halted.contains(&stage) || self.removed.contains(&(input.clone(), id.clone()))
    }

    fn letters(&self, stage: usize) -> BTreeMap<Arc<str>, String> {
        let topic = &self.topology.stages[stage].letters;
        let records = self.topics.iter().filter(|((name, _), _)| name == topic);
        records
            .flat_map(|(_, records)| records)
            .map(|record| {
                (
                    id_of_record(record),
                    cause(&record.headers).unwrap_or_default(),
                )
            })
            .collect()
    }
}
