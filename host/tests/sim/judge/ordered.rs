//! At least once: what a stage makes of its messages whose effects are durable at once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use host::pipeline::Order;

use super::Outcome;
use crate::topology::Kind;
use crate::world::evidence::id_of_record;

impl Outcome {
    /// Every message has its effects and outputs, or a dead letter.
    pub(super) fn judge_ordered(&mut self, stage: usize) {
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

    /// Each key has its newest value. What comes again need not be taken.
    pub(super) fn judge_values(&mut self) {
        let ordered = (0..self.topology.stages.len())
            .find(|stage| self.topology.stages[*stage].kind == Kind::Ordered);
        let Some(stage) = ordered else { return };
        let letters = self.letters(stage);
        let mut newest = BTreeMap::<Arc<str>, i64>::new();
        for ((topic, partition), records) in &self.topics {
            if *topic != self.topology.stages[stage].input {
                continue;
            }
            let mut known = BTreeSet::new();
            for record in records {
                let id = id_of_record(record);
                let counts = known.insert(id.clone())
                    && self.effects.contains(&(stage, id.clone()))
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
