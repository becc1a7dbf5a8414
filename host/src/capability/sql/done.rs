//! Statements that a database has run for a stage: what it refuses of them later, it is not what it was.

use std::collections::{HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::sync::lock;

/// Texts of one stage that are remembered of those that were run once on a connection, and of those that were run again: a stage
/// that makes its texts up fills the former with them, and does not lose the others for it. Of each, what was noted first is
/// forgotten first.
const MAX_TEXTS: usize = 2_000;

/// Runs of a text on one connection that are noted; from then on, it costs a look.
const NOTED_RUNS: u64 = 2;

/// The texts of one stage's statements, by hash.
#[derive(Debug)]
pub(super) struct Done {
    /// Tells the stage from others that run the same statement on the same connection.
    stage: u64,
    texts: Mutex<Texts>,
}

#[derive(Debug, Default)]
struct Texts {
    once: Recent,
    again: Recent,
}

/// What is known with a prepared statement of the runs that were noted of it.
#[derive(Debug)]
pub(super) struct Noted {
    /// The hash of its text.
    text: u64,
    /// For which stage, and how many.
    runs: AtomicU64,
}

impl Noted {
    pub(super) fn new(text: &str) -> Self {
        Self {
            text: hash(text),
            runs: AtomicU64::new(0),
        }
    }
}

impl Done {
    pub(super) fn new() -> Self {
        static STAGES: AtomicU64 = AtomicU64::new(1);
        Self {
            stage: STAGES.fetch_add(1, Ordering::Relaxed),
            texts: Mutex::default(),
        }
    }

    /// A prepared statement has run.
    pub(super) fn note(&self, statement: &Noted) {
        let noted = statement.runs.load(Ordering::Relaxed);
        let (stage, runs) = (noted / (NOTED_RUNS + 1), noted % (NOTED_RUNS + 1));
        let runs = if stage == self.stage { runs } else { 0 };
        if runs == NOTED_RUNS {
            return;
        }
        lock(&self.texts).add(statement.text, runs > 0);
        let noted = self.stage * (NOTED_RUNS + 1) + runs + 1;
        statement.runs.store(noted, Ordering::Relaxed);
    }

    /// The same of one that somebody else keeps prepared.
    pub(super) fn note_text(&self, text: &str) {
        let hash = hash(text);
        let mut texts = lock(&self.texts);
        if !texts.again.contains(hash) {
            let again = texts.once.contains(hash);
            texts.add(hash, again);
        }
    }

    pub(super) fn contains(&self, text: &str) -> bool {
        let hash = hash(text);
        let texts = lock(&self.texts);
        texts.again.contains(hash) || texts.once.contains(hash)
    }
}

impl Texts {
    fn add(&mut self, hash: u64, again: bool) {
        match again || self.again.contains(hash) {
            true => self.again.add(hash),
            false => self.once.add(hash),
        }
    }
}

/// The newest of what was added.
#[derive(Debug, Default)]
struct Recent {
    known: HashSet<u64>,
    order: VecDeque<u64>,
}

impl Recent {
    fn contains(&self, hash: u64) -> bool {
        self.known.contains(&hash)
    }

    fn add(&mut self, hash: u64) {
        if !self.known.insert(hash) {
            self.order.retain(|known| *known != hash);
        }
        self.order.push_back(hash);
        if self.order.len() > MAX_TEXTS
            && let Some(first) = self.order.pop_front()
        {
            self.known.remove(&first);
        }
    }
}

fn hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_a_stage_makes_up_push_out_neither_its_others_nor_another_stages() {
        let (makes_up, other) = (Done::new(), Done::new());
        let shared = Noted::new("shared");
        makes_up.note(&shared);
        makes_up.note(&shared);
        other.note(&shared);
        for n in 0..MAX_TEXTS * 2 {
            makes_up.note(&Noted::new(&n.to_string()));
        }
        assert!(makes_up.contains("shared") && other.contains("shared"));
        assert!(makes_up.contains(&(MAX_TEXTS * 2 - 1).to_string()));
        assert!(!makes_up.contains("0") && !other.contains("1"));
        assert!(!makes_up.contains(&(MAX_TEXTS - 1).to_string()));
        let texts = lock(&makes_up.texts);
        assert_eq!(texts.once.order.len(), MAX_TEXTS);
        assert_eq!(texts.once.known.len(), MAX_TEXTS);
    }

    #[test]
    fn texts_that_are_noted_by_themselves_are_kept_as_those_of_prepared_statements_are() {
        let done = Done::new();
        for _ in 0..3 {
            done.note_text("often");
        }
        for n in 0..MAX_TEXTS * 2 {
            done.note_text(&n.to_string());
        }
        assert!(done.contains("often") && done.contains(&(MAX_TEXTS * 2 - 1).to_string()));
        assert!(!done.contains("0"));
    }
}
