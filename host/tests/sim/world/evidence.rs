//! What the world has seen: enough to say at any time what is durable, and what went wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use host::delivery::{Delivery, dead_letter};
use host::record::{Header, Outgoing, Record};

use crate::topology::{Kind, Topology};

/// Something that must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Anomaly {
    /// As Jepsen's checker of Kafka names it, where it has a name for it.
    pub(crate) kind: &'static str,
    pub(crate) what: String,
}

/// How a message was called for.
#[derive(Clone, Debug)]
pub(crate) struct Calls {
    pub(crate) id: Arc<str>,
    /// Calls that answered that they want another delivery, whose transaction was whole.
    pub(crate) retries: u32,
    pub(crate) highest_attempt: u32,
}

#[derive(Default)]
pub(crate) struct Evidence {
    pub(crate) anomalies: Vec<Anomaly>,
    /// Messages whose effects are durable: of a stage, by id.
    effects: BTreeSet<(usize, Arc<str>)>,
    /// What is in topics, by id.
    present: BTreeSet<(Arc<str>, Arc<str>)>,
    /// What has a dead letter of a stage, by id.
    letters: BTreeSet<(usize, Arc<str>)>,
    /// Up to which offset all was found durable.
    durable: BTreeMap<(usize, i32), usize>,
    /// Of a stage, by partition and offset.
    pub(crate) calls: BTreeMap<(usize, i32, i64), Calls>,
    /// Of each stage: what may have made a delivery that is not counted.
    pub(crate) disturbances: Vec<u32>,
    /// Of each stage: what may have cost a message an attempt, though it is not its fault.
    pub(crate) costs: Vec<u32>,
    /// Partitions that moved to another host.
    pub(crate) moves: u32,
    /// A database has gone back to a copy: what it lost is done again, and its outputs come twice.
    pub(crate) went_back: bool,
    /// Records that retention has removed.
    pub(crate) removed: BTreeSet<(Arc<str>, Arc<str>)>,
}

impl Evidence {
    pub(crate) fn new(topology: &Topology) -> Self {
        Self {
            disturbances: vec![0; topology.stages.len()],
            costs: vec![0; topology.stages.len()],
            ..Self::default()
        }
    }

    pub(crate) fn anomaly(&mut self, kind: &'static str, what: String) {
        self.anomalies.push(Anomaly { kind, what });
    }

    pub(crate) fn disturbed(&mut self, stage: usize, times: u32) {
        self.disturbances[stage] += times;
    }

    /// A connection was lost, or the like.
    pub(crate) fn cost(&mut self, stage: usize, times: u32) {
        self.costs[stage] += times;
        self.disturbed(stage, times);
    }

    pub(crate) fn disturbed_all(&mut self, times: u32) {
        for stage in &mut self.disturbances {
            *stage += times;
        }
    }

    pub(crate) fn effect(&mut self, stage: usize, id: &Arc<str>) {
        self.effects.insert((stage, id.clone()));
    }

    pub(crate) fn effects(&self) -> BTreeSet<(usize, Arc<str>)> {
        self.effects.clone()
    }

    pub(crate) fn appended(&mut self, topology: &Topology, record: &Outgoing) {
        let id = id_of(record.value.as_deref());
        let stage = topology
            .stages
            .iter()
            .position(|stage| stage.letters == record.topic);
        match stage {
            Some(stage) => {
                self.letters.insert((stage, id));
            }
            None => {
                self.check_committed(topology, &record.topic, &id);
                self.present.insert((record.topic.clone(), id));
            }
        }
    }

    /// An output gets into the log only after what it came of is committed.
    fn check_committed(&mut self, topology: &Topology, topic: &Arc<str>, id: &Arc<str>) {
        let stage = topology.stages.iter().position(|stage| {
            stage.output.as_ref() == Some(topic) && matches!(stage.kind, Kind::Transactional(_))
        });
        let Some(stage) = stage else { return };
        let parent: Arc<str> = id.rsplit_once('.').map_or("", |(parent, _)| parent).into();
        if !self.effects.contains(&(stage, parent)) {
            let stage = topology.stages[stage].name;
            let what = format!("stage {stage}: output {id} is in the log before its commit");
            self.anomaly("aborted-read", what);
        }
    }

    /// Whether all that a stage has to do for a record is durable.
    fn is_durable(&self, topology: &Topology, stage: usize, id: &Arc<str>) -> bool {
        let spec = &topology.stages[stage];
        if self.letters.contains(&(stage, id.clone()))
            || self.removed.contains(&(spec.input.clone(), id.clone()))
        {
            return true;
        }
        let output = |output: String| {
            let output: Arc<str> = output.into();
            match &spec.output {
                Some(topic) if !topology.refuses(topic, &output) => {
                    self.present.contains(&(topic.clone(), output))
                }
                _ => self.letters.contains(&(stage, output)),
            }
        };
        self.effects.contains(&(stage, id.clone()))
            && topology.outputs(stage, id).into_iter().all(output)
    }

    /// To be asked whenever an offset is given to the log, with all records of the partition.
    pub(crate) fn check_durable(
        &mut self,
        topology: &Topology,
        (stage, partition): (usize, i32),
        offset: i64,
        records: &[Arc<str>],
        told: &'static str,
    ) {
        let from = self.durable.get(&(stage, partition)).copied().unwrap_or(0);
        let upto = usize::try_from(offset).unwrap_or(0).min(records.len());
        let mut at = from;
        while at < upto && self.is_durable(topology, stage, &records[at]) {
            at += 1;
        }
        if at > from {
            self.durable.insert((stage, partition), at);
        }
        if at < upto {
            let stage = topology.stages[stage].name;
            let what = format!(
                "{told}: stage {stage}, partition {partition}: {offset} is given to the log, and {} at {at} is not \
                 durable",
                records[at]
            );
            self.anomaly("offset-ahead", what);
        }
    }

    pub(crate) fn called(&mut self, stage: usize, delivery: &Delivery<'_>, wants_again: bool) {
        let Delivery { record, attempt } = *delivery;
        let place = (stage, record.partition, record.offset);
        let calls = self.calls.entry(place).or_insert_with(|| Calls {
            id: id_of_record(record),
            retries: 0,
            highest_attempt: 0,
        });
        calls.retries += u32::from(wants_again);
        calls.highest_attempt = calls.highest_attempt.max(attempt);
    }
}

/// A record's value is its id.
pub(crate) fn id_of(value: Option<&[u8]>) -> Arc<str> {
    String::from_utf8_lossy(value.unwrap_or_default()).into()
}

pub(crate) fn id_of_record(record: &Record) -> Arc<str> {
    id_of(record.value.as_deref())
}

/// Why a dead letter was given up on.
pub(crate) fn cause(headers: &[Header]) -> Option<String> {
    let header = headers.iter().rfind(|h| h.name == dead_letter::CAUSE)?;
    Some(String::from_utf8_lossy(header.value.as_deref()?).into_owned())
}
