//! All that a run has left: what went into each stage, and what came of it.

use crate::bench::Bench;
use crate::books::Written;
use crate::charged::Charged;
use crate::judge::{
    self, Anomalies, MessageId, Progress, Record, Repeated, Reset, Row, StageHistory, judge_cache,
    judge_letter, judge_passed, judge_progress, judge_stage, without_repeated,
};
use crate::load::Message;
use crate::pipeline::{BOOKED, CACHER, FIRST, PASSED, PASSER, SECOND, Stage};
use crate::reader;
use crate::restore::Again;

/// What the judge looks at.
#[derive(Clone, Debug)]
pub(crate) struct Histories {
    pub(crate) first: StageHistory,
    pub(crate) second: StageHistory,
    pub(crate) booked: StageHistory,
    pub(crate) passed: Vec<Record>,
    /// Dead letters of stages that should have none.
    pub(crate) cacher_letters: Vec<Record>,
    pub(crate) passer_letters: Vec<Record>,
    pub(crate) written: Written,
    pub(crate) resets: Vec<Reset>,
    /// Rows of the second stage that were the last before its lanes' own were emptied.
    pub(crate) emptied: Vec<Row>,
    /// Messages that were in a topic made anew before somebody was to read it.
    pub(crate) anew: Vec<MessageId>,
    /// Messages that waited for a store that was sick, each with the name of its stage: of the first one and of the cacher.
    pub(crate) waited: Vec<(&'static str, MessageId)>,
}

impl Histories {
    pub(crate) fn read(bench: &Bench, again: &Again, written: Written, resets: Vec<Reset>) -> Self {
        let topic = |name| reader::topic(&bench.addresses.brokers, name);
        let (runtime, url) = (bench.runtime.handle(), &bench.addresses.effects);
        let history = |stage: &Stage, inputs: Vec<Record>| StageHistory {
            stage: stage.name,
            inputs,
            rows: reader::rows(runtime, url, stage.name),
            outputs: stage.output.map(topic).unwrap_or_default(),
            letters: topic(stage.letters),
            again: again.get(stage.name).cloned().unwrap_or_default(),
        };
        // Retention has taken the books, so they are what was written.
        let mut booked = history(&BOOKED, written.committed.iter().map(as_record).collect());
        let is_known = |message: &Message| !written.doubtful.contains(&message.id());
        booked.rows.retain(|row| {
            let id = (row.key.clone(), row.seq);
            !written.doubtful.contains(&id)
        });
        booked.outputs.retain(|output| is_known(&output.message));
        booked.letters.retain(|letter| is_known(&letter.message));
        let mut passed = topic(PASSED);
        passed.retain(|output| is_known(&output.message));
        let mut resets = resets;
        for reset in &mut resets {
            reset.again.retain(|id| !written.doubtful.contains(id));
        }
        Self {
            first: history(&FIRST, topic(FIRST.input)),
            second: history(&SECOND, topic(SECOND.input)),
            booked,
            passed,
            cacher_letters: topic(CACHER.letters),
            passer_letters: topic(PASSER.letters),
            written,
            resets,
            emptied: Vec::new(),
            anew: Vec::new(),
            waited: Vec::new(),
        }
    }

    /// Finds the messages at which lanes waited while stores were sick.
    pub(crate) fn have_waited(&mut self, charged: &[Charged]) {
        let at = |p: &Progress| {
            let (stage, inputs) = match p.group {
                group if group == FIRST.group => (FIRST.name, &self.first.inputs),
                group if group == CACHER.group => (CACHER.name, &self.second.inputs),
                _ => return None,
            };
            let is_there = |r: &&Record| (r.partition, r.offset) == (p.partition, p.committed);
            let record = inputs.iter().find(is_there)?;
            Some((stage, record.message.id()))
        };
        let all = charged.iter().flat_map(|charged| &charged.waited);
        self.waited = all.filter_map(at).collect();
    }

    /// Messages in the chain's first topic.
    pub(crate) fn loaded(&self) -> usize {
        without_repeated(&self.first.inputs).len()
    }

    /// Judges what became of the messages.
    pub(crate) fn judge(&self, found: &mut Anomalies) {
        for history in [&self.first, &self.second, &self.booked] {
            judge_stage(history, found);
        }
        judge_passed(&self.written.committed, &self.passed, &self.resets, found);
        for (stage, letters) in [
            (&CACHER, &self.cacher_letters),
            (&PASSER, &self.passer_letters),
        ] {
            for letter in letters {
                judge_letter(stage, letter, found);
            }
        }
    }

    /// Judges groups and cache. Answers how many keys of Redis could be judged, and what the second stage had to drop.
    pub(crate) fn judge_rest(
        &self,
        bench: &Bench,
        progress: &[Progress],
        flushed_at: i64,
        found: &mut Anomalies,
    ) -> (usize, Repeated) {
        judge_progress(progress, found);
        let cache = reader::cache(&bench.addresses.redis);
        let middle = &self.second.inputs;
        let cached_keys = judge_cache(middle, &cache, flushed_at, found);
        (cached_keys, judge::repeated(middle))
    }
}

fn as_record(message: &Message) -> Record {
    Record {
        partition: 0,
        offset: 0,
        timestamp: 0,
        message: message.clone(),
        id: None,
        cause: None,
        words: None,
        is_copied: false,
    }
}
