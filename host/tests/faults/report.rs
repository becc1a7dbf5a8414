//! What a run was and what it found, as one table.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::time::Duration;

use crate::judge::{Anomalies, Anomaly, Repeated};
use crate::others::Others;
use crate::schedule::Kind;

/// What was done, counted.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    rounds: BTreeMap<Kind, usize>,
    deeds: BTreeMap<&'static str, usize>,
}

impl Tally {
    pub(crate) fn round(&mut self, kind: Kind) {
        *self.rounds.entry(kind).or_default() += 1;
    }

    pub(crate) fn add(&mut self, deed: &'static str) {
        *self.deeds.entry(deed).or_default() += 1;
    }

    fn rounds(&self, kind: Kind) -> usize {
        self.rounds.get(&kind).copied().unwrap_or_default()
    }
}

/// A run from its seed to its anomalies.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) seed: u64,
    pub(crate) took: Duration,
    pub(crate) messages: u64,
    /// Keys whose value in Redis could be judged.
    pub(crate) cached_keys: usize,
    /// What the second stage had to drop.
    pub(crate) repeated: Repeated,
    /// Rounds of each kind that were planned.
    pub(crate) planned: usize,
    /// What other programs have written with copied headers.
    pub(crate) others: Others,
    /// Messages of Kafka transactions.
    pub(crate) committed: usize,
    pub(crate) aborted: usize,
    /// Offsets of theirs that were removed, once processed.
    pub(crate) removed: i64,
    /// Messages that a database which went back, or an operator, had processed again.
    pub(crate) again: usize,
    pub(crate) reset: usize,
    /// Troubles that had to be said.
    pub(crate) said: usize,
    /// Rounds in which nothing was to be said.
    pub(crate) quiet: usize,
    /// Bugs that were planted in what the run has left, and those of them that the judge missed.
    pub(crate) planted: usize,
    pub(crate) missed: Vec<&'static str>,
    pub(crate) tally: Tally,
    pub(crate) found: Anomalies,
}

impl Report {
    /// Why the run is no proof; nothing where it is.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let missing = Kind::ALL
            .into_iter()
            .filter(|kind| self.tally.rounds(*kind) < self.planned);
        let mut complaints: Vec<_> = missing
            .map(|kind| format!("of {}, not all rounds happened", kind.name()))
            .collect();
        if self.cached_keys == 0 {
            complaints.push("no key of Redis could be judged".to_owned());
        }
        let missed = self.missed.iter();
        complaints.extend(missed.map(|what| format!("the judge misses {what}")));
        if !self.found.is_empty() {
            complaints.push("there are anomalies".to_owned());
        }
        complaints
    }

    fn rows(&self) -> Vec<(String, usize)> {
        let messages = usize::try_from(self.messages).unwrap_or(usize::MAX);
        let mut rows = vec![("messages".to_owned(), messages)];
        rows.push(("keys judged in Redis".to_owned(), self.cached_keys));
        rows.push(("outputs that came twice".to_owned(), self.repeated.all));
        rows.push(("and after newer ones".to_owned(), self.repeated.late));
        let removed = usize::try_from(self.removed).unwrap_or_default();
        let counts = [
            ("committed in transactions", self.committed),
            ("aborted in transactions", self.aborted),
            ("offsets of them removed", removed),
            ("messages with copied headers", self.others.copies),
            ("dead letters sent back", self.others.letters()),
            ("processed again: database", self.again),
            ("processed again: offsets", self.reset),
            ("troubles to be said", self.said),
            ("rounds without a trouble", self.quiet),
            ("planted bugs", self.planted),
            ("planted bugs found", self.planted - self.missed.len()),
        ];
        rows.extend(counts.map(|(what, count)| (what.to_owned(), count)));
        let rounds =
            Kind::ALL.map(|kind| (format!("round: {}", kind.name()), self.tally.rounds(kind)));
        rows.extend(rounds);
        rows.extend(
            self.tally
                .deeds
                .iter()
                .map(|(deed, count)| ((*deed).to_owned(), *count)),
        );
        rows.extend(Anomaly::ALL.map(|a| (format!("anomaly: {}", a.name()), self.found.count(a))));
        rows
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let verdict = match self.complaints() {
            complaints if complaints.is_empty() => "no anomaly".to_owned(),
            complaints => complaints.join("; "),
        };
        let (minutes, seconds) = (self.took.as_secs() / 60, self.took.as_secs() % 60);
        writeln!(
            f,
            "# Faults, seed {}, {minutes} min {seconds} s: {verdict}\n",
            self.seed
        )?;
        writeln!(f, "| {:<30} | {:>8} |", "what", "count")?;
        writeln!(f, "|:{:-<30}-|-{:->8}:|", "", "")?;
        for (what, count) in self.rows() {
            writeln!(f, "| {what:<30} | {count:>8} |")?;
        }
        for anomaly in Anomaly::ALL {
            for example in self.found.examples(anomaly) {
                writeln!(f, "\n- {}: {example}", anomaly.name())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(rounds: usize, cached_keys: usize) -> Report {
        let mut tally = Tally::default();
        for kind in Kind::ALL {
            (0..rounds).for_each(|_| tally.round(kind));
        }
        Report {
            seed: 1,
            took: Duration::from_secs(61),
            messages: 10,
            cached_keys,
            repeated: Repeated::default(),
            planned: 2,
            others: Others::default(),
            committed: 7,
            aborted: 3,
            removed: 5,
            again: 2,
            reset: 1,
            said: 6,
            quiet: 4,
            planted: 13,
            missed: Vec::new(),
            tally,
            found: Anomalies::default(),
        }
    }

    #[test]
    fn a_run_that_proves_nothing_is_no_success() {
        assert_eq!(report(2, 1).complaints(), Vec::<String>::new());
        assert_eq!(report(1, 1).complaints().len(), Kind::ALL.len());
        assert_eq!(
            report(2, 0).complaints(),
            ["no key of Redis could be judged"]
        );
        let mut missed = report(2, 1);
        missed.missed.push("a lost row");
        assert_eq!(missed.complaints(), ["the judge misses a lost row"]);
        let mut found = report(2, 1);
        found.found.add(Anomaly::Duplicate, || "k #1".to_owned());
        assert_eq!(found.complaints(), ["there are anomalies"]);
        let text = found.to_string();
        for words in [
            "seed 1, 1 min 1 s",
            "| anomaly: duplicate             |        1 |",
            "duplicate: k #1",
        ] {
            assert!(text.contains(words), "{words:?} is in {text}");
        }
    }
}
