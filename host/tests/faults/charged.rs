//! What a store that is sick costs: nothing. Lanes that need it wait, and no attempt is counted against their messages.

use std::time::Duration;

use crate::bench::Bench;
use crate::judge::{Anomalies, Anomaly, Progress};
use crate::pipeline::{BOOKED, CACHER, FIRST, SECOND, Stage};
use crate::reader::Lag;
use crate::said::{Counted, Speaker, Words, metrics};
use crate::schedule::Kind;

/// After so long, what was under way when the store became sick has ended.
const SETTLED: Duration = Duration::from_secs(1);
const ATTEMPTS: &str = "stagehost_retries_total";
const LETTERS: &str = "stagehost_dead_letters_total";

/// What the hosts have counted while a store was sick.
#[derive(Clone, Debug)]
pub(crate) struct Charged {
    deed: &'static str,
    /// The stages that need the store.
    stages: &'static [&'static Stage],
    before: Counted,
    /// What each host says of its metrics when it is over.
    after: Vec<(Speaker, String)>,
    /// Where the lanes waited then that were behind: at the first message that is not done.
    pub(crate) waited: Vec<Progress>,
}

/// Those that get on with no message while a store of this kind of trouble is sick.
fn stages(kind: Kind) -> &'static [&'static Stage] {
    match kind {
        Kind::SickPostgres | Kind::RefusePostgres => &[&FIRST, &SECOND, &BOOKED],
        Kind::SickRedis | Kind::RefuseRedis => &[&CACHER],
        _ => &[],
    }
}

impl Charged {
    /// Looks on for so long; nothing of what is no store.
    pub(crate) fn watch(
        kind: Kind,
        deed: &'static str,
        bench: &Bench,
        lag: &Lag,
        hold: Duration,
    ) -> Option<Self> {
        let stages = stages(kind);
        if stages.is_empty() {
            std::thread::sleep(hold);
            return None;
        }
        std::thread::sleep(SETTLED);
        let before = Counted::by(&bench.hosts.speakers());
        std::thread::sleep(hold);
        let needs = |group: &str| stages.iter().any(|stage| stage.group == group);
        let mut waited = lag.progress().unwrap_or_default();
        waited.retain(|p| needs(p.group) && p.committed < p.end);
        let after = bench.hosts.speakers().into_iter().map(|speaker| {
            let metrics = metrics(&speaker);
            (speaker, metrics)
        });
        Some(Self {
            deed,
            stages,
            before,
            after: after.collect(),
            waited,
        })
    }

    /// The series that may not go up.
    fn series(&self) -> Vec<String> {
        let of = |stage: &&Stage| {
            let name = stage.name;
            [ATTEMPTS, LETTERS].map(|counter| format!("{counter}{{stage=\"{name}\""))
        };
        self.stages.iter().flat_map(of).collect()
    }

    /// Planted: a host that counts one attempt.
    pub(crate) fn count_one(&mut self) {
        let series = format!("{ATTEMPTS}{{stage=\"{}\"}}", self.stages[0].name);
        if let Some((speaker, metrics)) = self.after.first_mut() {
            let one_more = self.before.of(speaker, &series) + 1.0;
            metrics.push_str(&format!("\n{series} {one_more}"));
        }
    }
}

/// No attempt may be counted, and no message given up on.
pub(crate) fn judge_charged(charged: &Charged, found: &mut Anomalies) {
    let (deed, series) = (charged.deed, charged.series());
    let series: Vec<_> = series.iter().map(String::as_str).collect();
    for (speaker, metrics) in &charged.after {
        let mut grown = charged.before.grown(speaker, metrics);
        grown.retain(|line| Words::is_in(&series, line));
        for line in grown {
            let name = &speaker.name;
            found.add(Anomaly::Charged, || format!("{deed}: {name}: {line}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    const METRICS: &str = "stagehost_retries_total{stage=\"cacher\"} 2
stagehost_retries_total{stage=\"first\"} 5
stagehost_dead_letters_total{stage=\"cacher\",cause=\"retries-exhausted\"} 1
stagehost_messages_total{stage=\"cacher\",outcome=\"done\"} 7
";

    fn charged(before: &str, after: &str) -> Charged {
        let speaker = Speaker {
            name: "host-1".to_owned(),
            admin: String::new(),
            log: PathBuf::new(),
        };
        Charged {
            deed: "redis full",
            stages: stages(Kind::SickRedis),
            before: Counted::in_metrics(&speaker, before),
            after: vec![(speaker, after.to_owned())],
            waited: Vec::new(),
        }
    }

    /// Planted: a host that counts an attempt of a stage that needs the store, or gives up on a message of it.
    #[test]
    fn an_attempt_that_is_counted_while_a_store_is_sick_is_an_anomaly() {
        let found = |charged: &Charged| {
            let mut found = Anomalies::default();
            judge_charged(charged, &mut found);
            found.count(Anomaly::Charged)
        };
        for (before, after, expected) in [
            ("cacher\"} 2", "cacher\"} 3", 1),
            ("exhausted\"} 1", "exhausted\"} 2", 1),
            // A stage that does not need it, and gets on.
            ("first\"} 5", "first\"} 6", 0),
            ("done\"} 7", "done\"} 8", 0),
        ] {
            assert!(METRICS.contains(before));
            let charged = charged(METRICS, &METRICS.replace(before, after));
            assert_eq!(found(&charged), expected, "{charged:?}");
        }
        let mut charged = charged(METRICS, METRICS);
        assert_eq!(found(&charged), 0);
        charged.count_one();
        assert_eq!(found(&charged), 1);
    }
}
