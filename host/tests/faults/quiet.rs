//! What no host may say where nothing is amiss: that a group is behind which has worked off all, that a row was lost though no
//! database went back, or that a record was repeated where none was.

use std::time::{Duration, Instant};

use crate::judge::{Anomalies, Anomaly};
use crate::pipeline::{BOOKED, BOOKS_PARTITIONS, FIRST, PASSER, Stage};
use crate::said::{Counted, ROWS_LOST, Speaker, Words, metrics};

/// How long a host may take to say that a group is not behind any more.
const LAG_WITHIN: Duration = Duration::from_secs(30);
const ASK_INTERVAL: Duration = Duration::from_millis(200);
/// What goes into these stages repeats nothing: ids there are copied from elsewhere, or none.
const UNREPEATED: [&Stage; 3] = [&FIRST, &BOOKED, &PASSER];
/// Those whose load can be paused, so that they get to its end.
const PAUSED: [&Stage; 2] = [&BOOKED, &PASSER];

/// What was said though it is not so, a line each.
#[derive(Clone, Debug)]
pub(crate) struct Quiet {
    pub(crate) after: &'static str,
    pub(crate) behind: Vec<String>,
    pub(crate) counted: Vec<String>,
}

/// Nothing may be said that is not so.
pub(crate) fn judge_quiet(quiet: &Quiet, found: &mut Anomalies) {
    for said in quiet.behind.iter().chain(&quiet.counted) {
        let after = quiet.after;
        found.add(Anomaly::Missaid, || format!("after {after}: {said}"));
    }
}

/// Waits until the hosts say that the books are worked off; what they say else, where they do not in their time.
pub(crate) fn until_not_behind(speakers: impl Fn() -> Vec<Speaker>) -> Vec<String> {
    let deadline = Instant::now() + LAG_WITHIN;
    loop {
        let all: Vec<_> = speakers().iter().map(metrics).collect();
        let behind: Vec<_> = PAUSED
            .iter()
            .flat_map(|stage| behind(&all, stage))
            .collect();
        if behind.is_empty() || Instant::now() >= deadline {
            return behind;
        }
        std::thread::sleep(ASK_INTERVAL);
    }
}

/// The partitions of which no host says that the group has committed all, or one says that it has not.
fn behind(metrics: &[String], stage: &Stage) -> Vec<String> {
    let of = |partition: usize| {
        let Stage { group, input, .. } = stage;
        let series = format!(
            "kafka_consumergroup_lag{{consumergroup=\"{group}\",topic=\"{input}\",partition=\"{partition}\"}} "
        );
        let lines = metrics.iter().flat_map(|metrics| metrics.lines());
        let said: Vec<_> = lines
            .filter_map(|line| line.strip_prefix(&series))
            .collect();
        let is_well = !said.is_empty() && said.iter().all(|lag| *lag == "0");
        (!is_well).then(|| format!("{series}{said:?}"))
    };
    (0..BOOKS_PARTITIONS).filter_map(of).collect()
}

/// What hosts have counted since that did not happen. Whether a row was lost is known where no database went back of late.
pub(crate) fn miscounted(
    since: &Counted,
    speakers: &[Speaker],
    rows_are_kept: bool,
) -> Vec<String> {
    let repeated = UNREPEATED.map(|stage| {
        let name = stage.name;
        format!("stagehost_messages_total{{stage=\"{name}\",outcome=\"duplicate\"}}")
    });
    let mut wrong: Vec<&str> = repeated.iter().map(String::as_str).collect();
    wrong.extend(rows_are_kept.then_some(ROWS_LOST));
    let grown = speakers.iter().flat_map(|speaker| {
        let grown = since.grown(speaker, &metrics(speaker)).into_iter();
        grown.map(|line| format!("{}: {line}", speaker.name))
    });
    grown.filter(|line| Words::is_in(&wrong, line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_that_is_behind_or_of_which_nobody_speaks_is_told() {
        let line = |partition: usize, lag: i64| {
            format!(
                "kafka_consumergroup_lag{{consumergroup=\"{}\",topic=\"{}\",partition=\"{partition}\"}} {lag}\n",
                BOOKED.group, BOOKED.input
            )
        };
        let all: String = (0..BOOKS_PARTITIONS).map(|n| line(n, 0)).collect();
        let some: String = (1..BOOKS_PARTITIONS).map(|n| line(n, 0)).collect();
        for (metrics, expected) in [
            (vec![all.clone()], 0),
            (vec![some.clone(), line(0, 0)], 0),
            (vec![some.clone(), line(0, 4)], 1),
            (vec![all, line(0, -1)], 1),
            (vec![some], 1),
            (vec![], BOOKS_PARTITIONS),
        ] {
            assert_eq!(behind(&metrics, &BOOKED).len(), expected, "{metrics:?}");
        }
    }

    /// Planted: a host that says of each what is not so.
    #[test]
    fn what_is_said_though_it_is_not_so_is_an_anomaly() {
        let said = || vec!["said".to_owned()];
        for (behind, counted, expected) in [
            (vec![], vec![], 0),
            (said(), vec![], 1),
            (vec![], said(), 1),
            (said(), said(), 2),
        ] {
            let after = "books removed";
            let quiet = Quiet {
                after,
                behind,
                counted,
            };
            let mut found = Anomalies::default();
            judge_quiet(&quiet, &mut found);
            assert_eq!(found.count(Anomaly::Missaid), expected, "{quiet:?}");
        }
    }
}
