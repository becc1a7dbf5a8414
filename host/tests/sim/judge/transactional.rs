//! Exactly once: what a stage makes of its messages in transactions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Distinct, Outcome};
use crate::topology::Stage;

/// What there is of a stage's work, and what of it was looked for.
struct Work {
    input: Distinct,
    output: Option<Distinct>,
    letters: Distinct,
    causes: BTreeMap<Arc<str>, String>,
    /// How many rows each message has.
    rows: BTreeMap<Arc<str>, u32>,
    expected_outputs: BTreeSet<Arc<str>>,
    expected_letters: BTreeSet<Arc<str>>,
}

impl Outcome {
    pub(super) fn judge_transactional(&mut self, stage: usize) {
        let spec = self.topology.stages[stage].clone();
        let mut work = self.work(stage, &spec);
        let ids: Vec<_> = work.input.counts.keys().cloned().collect();
        for id in ids {
            let effects = work.rows.remove(&id).unwrap_or(0);
            work.expected_letters.insert(id.clone());
            self.judge_message(stage, &work, &id, effects);
            if effects > 0 {
                self.judge_outputs(stage, &spec, &mut work, &id);
            }
        }
        self.judge_rest(stage, &work);
        self.judge_order(stage, &work);
    }

    fn work(&mut self, stage: usize, spec: &Stage) -> Work {
        let mut rows = BTreeMap::<Arc<str>, u32>::new();
        for row in self.rows.iter().filter(|row| row.stage == stage) {
            *rows.entry(row.id.clone()).or_default() += 1;
        }
        Work {
            input: self.distinct(stage, &spec.input),
            output: (spec.output.as_ref()).map(|topic| self.distinct(stage, topic)),
            letters: self.distinct(stage, &spec.letters),
            causes: self.letters(stage),
            rows,
            expected_outputs: BTreeSet::new(),
            expected_letters: BTreeSet::new(),
        }
    }

    /// A message has one row or one dead letter.
    fn judge_message(&mut self, stage: usize, work: &Work, id: &Arc<str>, effects: u32) {
        let given_up = work.letters.counts.get(id).copied().unwrap_or(0);
        // Of a stage whose database went back, messages come twice to who reads them, as new ones.
        let copies = work.input.counts.get(id).copied().unwrap_or(1);
        let (kind, what) = match (effects, given_up) {
            (1.., _) if self.went_back && effects > copies => (
                "duplicate",
                format!("{id} came {copies} times, and has {effects} rows"),
            ),
            _ if self.went_back
                && (effects + given_up >= copies || self.may_be_missing(stage, id)) =>
            {
                ("", String::new())
            }
            _ if self.went_back => (
                "lost-write",
                format!("{id} came {copies} times, and has {effects} rows"),
            ),
            (1, 0) | (0, 1) => ("", String::new()),
            (0, 0) if self.may_be_missing(stage, id) => ("", String::new()),
            (0, 0) => ("lost-write", format!("{id} has no effects")),
            (0, _) => ("duplicate", format!("{id} has {given_up} dead letters")),
            (_, 0) => ("duplicate", format!("{id} has {effects} rows")),
            _ => ("duplicate", format!("{id} has effects and a dead letter")),
        };
        if !kind.is_empty() {
            self.anomaly(kind, stage, what);
        }
        self.judge_verdict(stage, id, effects > 0, work.causes.get(id));
    }

    /// Each output of a message is there once, in its topic or among the dead letters.
    fn judge_outputs(&mut self, stage: usize, spec: &Stage, work: &mut Work, id: &str) {
        for name in self.topology.outputs(stage, id) {
            let name: Arc<str> = name.into();
            let refused =
                (spec.output.as_ref()).is_some_and(|topic| self.topology.refuses(topic, &name));
            let counts = match &work.output {
                Some(output) if !refused => &output.counts,
                _ => &work.letters.counts,
            };
            match counts.get(&name).copied().unwrap_or(0) {
                1 => {}
                2.. if self.went_back => {}
                0 => self.anomaly("lost-write", stage, format!("output {name} is not there")),
                n => {
                    let what = format!("output {name} is there {n} times");
                    self.anomaly("duplicate", stage, what);
                }
            }
            if refused {
                work.expected_letters.insert(name);
            } else {
                work.expected_outputs.insert(name);
            }
        }
    }

    /// Nothing is there that nobody asked for.
    fn judge_rest(&mut self, stage: usize, work: &Work) {
        for id in work.rows.keys() {
            self.anomaly("unexpected-read", stage, format!("a row for {id}"));
        }
        if self.went_back {
            return;
        }
        let outputs = work.output.iter().flat_map(|output| output.counts.keys());
        let outputs = outputs.filter(|id| !work.expected_outputs.contains(*id));
        let letters = work.letters.counts.keys();
        let letters = letters.filter(|id| !work.expected_letters.contains(*id));
        for id in outputs.chain(letters) {
            self.anomaly("unexpected-read", stage, format!("{id} was produced"));
        }
    }

    /// Rows, and the outputs of one lane in one partition, are in the order of the messages that they came of.
    fn judge_order(&mut self, stage: usize, work: &Work) {
        let mut highest = BTreeMap::new();
        let mut unordered = Vec::new();
        for row in self.rows.iter().filter(|row| row.stage == stage) {
            let before = highest.insert(row.partition, row.offset);
            if before.is_some_and(|before| before >= row.offset) {
                unordered.push(format!("the row for {} came late", row.id));
            }
        }
        let mut origins = BTreeMap::new();
        for (partition, records) in work.input.partitions.iter().enumerate() {
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
        // What comes twice is behind what came of later messages.
        let outputs = work.output.iter().filter(|_| !self.went_back);
        for records in outputs.flat_map(|output| &output.partitions) {
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
}
