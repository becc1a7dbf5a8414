//! How much of the log a stage may fill. A guest writes what it likes, and one poison message can have the host say
//! something at each of a million deliveries.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tracing::callsite::Identifier;
use tracing::{Metadata, warn};

use crate::metrics::DroppedLines;
use crate::sync::lock;

/// Lines of one source that the log takes: so many at once, and so many a second.
const BURST_LINES: f64 = 2_000.0;
const LINES_PER_SECOND: f64 = 200.0;
/// Their bytes, as they are written.
const BURST_BYTES: f64 = (1 << 20) as f64;
const BYTES_PER_SECOND: f64 = (128 << 10) as f64;
/// Sources that are told apart. There are as many as stages and places in the code that say something of them.
const MAX_SOURCES: usize = 100_000;

/// What guests write to.
pub(super) const GUEST: &str = "guest";

/// One for the process: a budget for what each stage's guests write, and one for each thing that the host says of a stage,
/// so that a guest which writes too much hides nothing that the host has to say of it.
pub(super) struct Budgets {
    sources: Mutex<HashMap<Source, HashMap<String, Budget>>>,
    /// Lines by stage that were dropped and not yet said to be; under no name those that are of no stage.
    unsaid: Mutex<BTreeMap<String, u64>>,
    metric: DroppedLines,
}

#[derive(PartialEq, Eq, Hash)]
enum Source {
    Guests,
    Host(Identifier),
}

/// A token bucket of lines and one of bytes.
struct Budget {
    lines: f64,
    bytes: f64,
    since: Instant,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self {
            lines: BURST_LINES,
            bytes: BURST_BYTES,
            since: now,
        }
    }

    /// How long a line is shows once it is made: the last one may overdraw.
    fn admits(&mut self, now: Instant) -> bool {
        let seconds = now.saturating_duration_since(self.since).as_secs_f64();
        self.since = now;
        self.lines = (self.lines + seconds * LINES_PER_SECOND).min(BURST_LINES);
        self.bytes = (self.bytes + seconds * BYTES_PER_SECOND).min(BURST_BYTES);
        let admits = self.lines >= 1.0 && self.bytes > 0.0;
        if admits {
            self.lines -= 1.0;
        }
        admits
    }
}

impl Budgets {
    pub(super) fn new(metric: DroppedLines) -> Arc<Self> {
        Arc::new(Self {
            sources: Mutex::default(),
            unsaid: Mutex::default(),
            metric,
        })
    }

    /// Whether a line may be written; one that may not is counted.
    pub(super) fn admits(&self, metadata: &Metadata<'_>, stage: &str) -> bool {
        let now = Instant::now();
        let admits = self.with(metadata, stage, |budget| budget.admits(now));
        if !admits {
            self.dropped(stage, 1);
        }
        admits
    }

    /// An admitted line has so many bytes.
    pub(super) fn charge(&self, metadata: &Metadata<'_>, stage: &str, bytes: usize) {
        self.with(metadata, stage, |budget| budget.bytes -= bytes as f64);
    }

    /// Lines of a stage were dropped, which will be said.
    pub(super) fn dropped(&self, stage: &str, lines: u64) {
        self.metric.over_budget(stage, lines);
        let mut unsaid = lock(&self.unsaid);
        match unsaid.get_mut(stage) {
            Some(count) => *count += lines,
            None => _ = unsaid.insert(stage.to_owned(), lines),
        }
    }

    /// Says what was dropped since this was last called, in a line for each stage.
    pub(super) fn say(&self) {
        let unsaid = std::mem::take(&mut *lock(&self.unsaid));
        for (stage, lines) in unsaid {
            if stage.is_empty() {
                warn!(
                    lines,
                    "too much to say: {lines} lines of the host were dropped"
                );
            } else {
                warn!(
                    stage,
                    lines, "too much to say: {lines} lines of the stage were dropped"
                );
            }
        }
    }

    fn with<T>(
        &self,
        metadata: &Metadata<'_>,
        stage: &str,
        work: impl FnOnce(&mut Budget) -> T,
    ) -> T {
        let mut sources = lock(&self.sources);
        let source = match metadata.target() {
            GUEST => Source::Guests,
            _ => Source::Host(metadata.callsite()),
        };
        let full = sources.len() >= MAX_SOURCES;
        let stages = sources.entry(source).or_default();
        if let Some(budget) = stages.get_mut(stage) {
            return work(budget);
        }
        // Those beyond share one.
        let full = full || stages.len() >= MAX_SOURCES;
        let name = if full { "" } else { stage };
        let budget = stages.entry(name.to_owned());
        work(budget.or_insert_with(|| Budget::new(Instant::now())))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_budget_is_a_burst_and_then_a_rate() {
        let begin = Instant::now();
        let mut budget = Budget::new(begin);
        let count = |budget: &mut Budget, at| (0..10_000).filter(|_| budget.admits(at)).count();
        assert_eq!(count(&mut budget, begin), BURST_LINES as usize);
        let later = begin + Duration::from_secs(1);
        assert_eq!(count(&mut budget, later), LINES_PER_SECOND as usize);
        let much_later = later + Duration::from_secs(3600);
        assert_eq!(count(&mut budget, much_later), BURST_LINES as usize);
    }

    #[test]
    fn long_lines_use_it_up_sooner() {
        let begin = Instant::now();
        let mut budget = Budget::new(begin);
        let mut lines = 0;
        while budget.admits(begin) {
            budget.bytes -= 8192.0;
            lines += 1;
        }
        assert_eq!(lines, 128);
    }
}
