//! What a run was and what it found, as one table.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::time::Duration;

use crate::judge::{Anomalies, Anomaly, Repeated};
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
        writeln!(f, "| {:<28} | {:>8} |", "what", "count")?;
        writeln!(f, "|:{:-<28}-|-{:->8}:|", "", "")?;
        for (what, count) in self.rows() {
            writeln!(f, "| {what:<28} | {count:>8} |")?;
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
        let mut found = report(2, 1);
        found.found.add(Anomaly::Duplicate, || "k #1".to_owned());
        assert_eq!(found.complaints(), ["there are anomalies"]);
        let text = found.to_string();
        for words in [
            "seed 1, 1 min 1 s",
            "| anomaly: duplicate           |        1 |",
            "duplicate: k #1",
        ] {
            assert!(text.contains(words), "{words:?} is in {text}");
        }
    }
}
