//! Whether the promises were kept, from what is left at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use host::delivery::seen::{OutputId, Seen};
use host::pipeline::{OnExhausted, Order};
use host::record::Record;

use crate::hosts::Servers;
use crate::schedule::Schedule;
use crate::topology::{Kind, Script, Topology};
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
            for record in records {
                let id = OutputId::of(record).map(|id| id.to_string());
                let repeats = id.is_some_and(|id| !known.insert(id));
                let dropped = seen.admit(record);
                if dropped && !repeats {
                    let value = id_of_record(record);
                    wrongly_dropped.push(format!(
                        "{value} in {topic} {partition} is below a newer one"
                    ));
                }
                if !repeats {
                    let id = id_of_record(record);
                    *distinct.counts.entry(id.clone()).or_default() += 1;
                    kept.push((id, record.offset));
                }
            }
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

    fn judge_transactional(&mut self, stage: usize) {
        let spec = self.topology.stages[stage].clone();
        let input = self.distinct(stage, &spec.input);
        let letters = self.distinct(stage, &spec.letters);
        let causes = self.letters(stage);
        let output = match &spec.output {
            Some(topic) => Some(self.distinct(stage, topic)),
            None => None,
        };
        let mut rows = BTreeMap::<Arc<str>, u32>::new();
        for row in self.rows.iter().filter(|row| row.stage == stage) {
            *rows.entry(row.id.clone()).or_default() += 1;
        }
        let mut expected_outputs = BTreeSet::new();
        let mut expected_letters = BTreeSet::new();
        for id in input.counts.keys() {
            let effects = rows.remove(id).unwrap_or(0);
            let given_up = letters.counts.get(id).copied().unwrap_or(0);
            expected_letters.insert(id.clone());
            match (effects, given_up) {
                (1, 0) | (0, 1) => {}
                (0, 0) if self.may_be_missing(stage, id) => {}
                (0, 0) => self.anomaly("lost-write", stage, format!("{id} has no effects")),
                (0, _) => self.anomaly(
                    "duplicate",
                    stage,
                    format!("{id} has {given_up} dead letters"),
                ),
                (_, 0) => self.anomaly("duplicate", stage, format!("{id} has {effects} rows")),
                _ => self.anomaly(
                    "duplicate",
                    stage,
                    format!("{id} has effects and a dead letter"),
                ),
            }
            self.judge_verdict(stage, id, effects > 0, causes.get(id));
            if effects == 0 {
                continue;
            }
            for name in self.topology.outputs(stage, id) {
                let name: Arc<str> = name.into();
                let refused = spec
                    .output
                    .as_ref()
                    .is_some_and(|t| self.topology.refuses(t, &name));
                let counts = match (&output, refused) {
                    (Some(output), false) => &output.counts,
                    _ => &letters.counts,
                };
                match counts.get(&name).copied().unwrap_or(0) {
                    1 => {}
                    0 => self.anomaly("lost-write", stage, format!("output {name} is not there")),
                    n => self.anomaly(
                        "duplicate",
                        stage,
                        format!("output {name} is there {n} times"),
                    ),
                }
                if refused {
                    expected_letters.insert(name);
                } else {
                    expected_outputs.insert(name);
                }
            }
        }
        let unexpected = rows.keys().filter(|id| !input.counts.contains_key(*id));
        for id in unexpected.cloned().collect::<Vec<_>>() {
            self.anomaly("unexpected-read", stage, format!("a row for {id}"));
        }
        let outputs = output.iter().flat_map(|output| output.counts.keys());
        let outputs = outputs.filter(|id| !expected_outputs.contains(*id));
        let letters = letters.counts.keys();
        let letters = letters.filter(|id| !expected_letters.contains(*id));
        for id in outputs.chain(letters).cloned().collect::<Vec<_>>() {
            self.anomaly("unexpected-read", stage, format!("{id} was produced"));
        }
        self.judge_order(stage, &input, output.as_ref());
    }

    /// Whether a message has come to what its script says. Whatever cost it deliveries may have used up its attempts.
    fn judge_verdict(&mut self, stage: usize, id: &str, effects: bool, cause: Option<&String>) {
        let max = self.topology.stages[stage].max_attempts;
        let script = self.topology.script(stage, id);
        if effects && !script.succeeds(max) {
            self.anomaly(
                "wrong-verdict",
                stage,
                format!("{id} has effects, and is {script:?}"),
            );
        }
        let Some(cause) = cause.filter(|_| !effects && script.succeeds(max)) else {
            return;
        };
        // Nobody can tell which message of a call a refused output belongs to, unless it is undone with its call.
        let spec = &self.topology.stages[stage];
        if spec.batches && spec.kind == Kind::Ordered && spec.mix.refused_outputs > 0 {
            return;
        }
        let spent = script.retries(max) + self.costs[stage];
        if cause != "retries-exhausted" || spent < max {
            let what = format!("{id} is given up on for {cause}, and is {script:?}");
            self.anomaly("wrong-verdict", stage, what);
        }
    }

    /// Rows, and the outputs of one lane in one partition, are in the order of the messages that they came of.
    fn judge_order(&mut self, stage: usize, input: &Distinct, output: Option<&Distinct>) {
        let mut highest = BTreeMap::new();
        let mut unordered = Vec::new();
        for row in self.rows.iter().filter(|row| row.stage == stage) {
            let before = highest.insert(row.partition, row.offset);
            if before.is_some_and(|before| before >= row.offset) {
                unordered.push(format!("the row for {} came late", row.id));
            }
        }
        let mut origins = BTreeMap::new();
        for (partition, records) in input.partitions.iter().enumerate() {
            for (id, offset) in records {
                // A copy of it that came later may have been the first that was there.
                if self
                    .removed
                    .contains(&(self.topology.stages[stage].input.clone(), id.clone()))
                {
                    continue;
                }
                origins.insert(id.clone(), (partition, *offset));
            }
        }
        for records in output.iter().flat_map(|output| &output.partitions) {
            let mut highest = BTreeMap::new();
            for (id, _) in records {
                let parent = id.rsplit_once('.').map_or("", |(parent, _)| parent);
                let Some((partition, offset)) = origins.get(parent) else {
                    continue;
                };
                let before = highest.insert(*partition, (*offset, id.clone()));
                if before.is_some_and(|before| before > (*offset, id.clone())) {
                    unordered.push(format!("output {id} came late"));
                }
            }
        }
        for what in unordered {
            self.anomaly("nonmonotone", stage, what);
        }
    }

    /// At least once: every message has its effects and outputs, or a dead letter.
    fn judge_ordered(&mut self, stage: usize) {
        let spec = self.topology.stages[stage].clone();
        let letters = self.letters(stage);
        let mut ids = BTreeSet::new();
        let mut present = BTreeSet::new();
        for ((topic, _), records) in &self.topics {
            let found = records.iter().map(id_of_record);
            if *topic == spec.input {
                ids.extend(found);
            } else if Some(topic) == spec.output.as_ref() {
                present.extend(found);
            }
        }
        for id in ids {
            let effects = self.effects.contains(&(stage, id.clone()));
            let given_up = letters.get(&id);
            let removed = self.may_be_missing(stage, &id);
            if !effects && given_up.is_none() && !removed {
                self.anomaly("lost-write", stage, format!("{id} has no effects"));
            }
            self.judge_verdict(stage, &id, effects, given_up);
            if given_up.is_some() || removed {
                continue;
            }
            for output in self.topology.outputs(stage, &id) {
                let output: Arc<str> = output.into();
                if !present.contains(&output) && !letters.contains_key(&output) {
                    self.anomaly("lost-write", stage, format!("output {output} is not there"));
                }
            }
        }
        self.judge_order_of_keys(stage, &letters);
    }

    /// The outputs that one key's messages first caused are in the order of the messages.
    fn judge_order_of_keys(&mut self, stage: usize, letters: &BTreeMap<Arc<str>, String>) {
        let spec = self.topology.stages[stage].clone();
        // A message that a batch call wants again is behind the outputs of its call.
        let Some(output) = spec
            .output
            .filter(|_| spec.order != Order::None && !spec.batches)
        else {
            return;
        };
        let mut origins = BTreeMap::new();
        for ((topic, partition), records) in &self.topics {
            for record in records.iter().filter(|_| *topic == spec.input) {
                let id = id_of_record(record);
                // A later copy of it may have been the first that was done.
                if !letters.contains_key(&id) && !self.may_be_missing(stage, &id) {
                    origins.entry(id).or_insert((*partition, record.offset));
                }
            }
        }
        let mut unordered = Vec::new();
        for ((topic, _), records) in &self.topics {
            let mut known = BTreeSet::new();
            let mut highest = BTreeMap::new();
            for record in records.iter().filter(|_| *topic == output) {
                let id = id_of_record(record);
                let parent = id.rsplit_once('.').map_or("", |(parent, _)| parent);
                let (Some((partition, offset)), Some(key)) = (origins.get(parent), &record.key)
                else {
                    continue;
                };
                if !known.insert(id.clone()) {
                    continue;
                }
                let before = highest.insert((*partition, key.clone()), *offset);
                if before.is_some_and(|before| before > *offset) {
                    unordered.push(format!("output {id} came late"));
                }
            }
        }
        for what in unordered {
            self.anomaly("nonmonotone", stage, what);
        }
    }

    /// A message is not delivered more often than it may.
    fn judge_calls(&mut self, stage: usize) {
        let spec = &self.topology.stages[stage];
        let (max, batches) = (spec.max_attempts, spec.batches);
        let disturbed = self.disturbances[stage];
        // Where attempts are not kept, whatever ends a lane begins them anew.
        let more = match spec.kind {
            // One that has stopped tries once more when its partition is assigned again.
            Kind::Transactional(_) if spec.on_exhausted == OnExhausted::Stop => {
                disturbed + self.moves
            }
            Kind::Transactional(_) => disturbed,
            Kind::Ordered => (disturbed + self.moves) * max,
        };
        let calls: Vec<_> = (self.calls.iter())
            .filter(|((of, ..), _)| *of == stage)
            .map(|(_, calls)| calls.clone())
            .collect();
        for calls in calls {
            let Calls {
                id,
                retries,
                highest_attempt,
            } = calls;
            let script = self.topology.script(stage, &id);
            if highest_attempt > max {
                let what = format!("{id} had attempt {highest_attempt} of {max}");
                self.anomaly("too-many-attempts", stage, what);
            }
            // A call with many messages asks again for all of them; one that took long is made again.
            let is_exact = !batches && !self.hasty;
            if is_exact && retries > script.retries(max) + more {
                let what = format!("{id} asked {retries} times for another of {max} deliveries");
                self.anomaly("too-many-attempts", stage, what);
            }
            let own = match script {
                Script::KillsConnection => max,
                _ => retries,
            };
            if highest_attempt > 1 + own + more {
                let what = format!("{id} had attempt {highest_attempt} after {own} that counted");
                self.anomaly("miscounted-attempts", stage, what);
            }
        }
    }

    /// Each key has its newest value.
    fn judge_values(&mut self) {
        let ordered = (0..self.topology.stages.len())
            .find(|stage| self.topology.stages[*stage].kind == Kind::Ordered);
        let Some(stage) = ordered else { return };
        let letters = self.letters(stage);
        let mut newest = BTreeMap::<Arc<str>, i64>::new();
        for ((topic, partition), records) in &self.topics {
            if *topic != self.topology.stages[stage].input {
                continue;
            }
            for record in records {
                let id = id_of_record(record);
                let counts = self.effects.contains(&(stage, id.clone()))
                    && !letters.contains_key(&id)
                    && !self.may_be_missing(stage, &id);
                if counts {
                    let key = record.key.as_deref().unwrap_or(b"none");
                    let key = format!("{}/{partition}", String::from_utf8_lossy(key));
                    newest.insert(key.into(), record.offset);
                }
            }
        }
        for (key, offset) in newest {
            let has = self.values.get(&key).map_or(-1, |(version, _)| *version);
            if has < offset {
                let what = format!("{key} has the value of {has}, and not of {offset}");
                self.anomaly("lost-write", stage, what);
            }
        }
    }
}
