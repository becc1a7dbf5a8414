//! The lanes' rows are gone from their database, or another database is in its place: all lanes stop and say what mends it,
//! and that is then done.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::bench::Bench;
use crate::conductor::Run;
use crate::judge::{Anomaly, Progress};
use crate::offsets;
use crate::pipeline::{FIRST, MIDDLE, SECOND, TRANSACTIONAL, TRANSACTIONAL_LANES};
use crate::reader;
use crate::restore::{self, Offsets};
use crate::said::{ALL_SAID_WITHIN, Listening, Speaker, Words};
use crate::schedule::Round;

/// How long it may take until each lane's offset is told by its row, and what was repeated is passed.
const SETTLED_WITHIN: Duration = Duration::from_secs(120);
/// When a host that was frozen has sent what it had to send.
const THAWED: Duration = Duration::from_secs(2);
const ASK_INTERVAL: Duration = Duration::from_millis(200);
/// Rows that were written last before a mend, of which the judge is judged.
const LAST: usize = 20;

impl Run {
    /// The lanes' rows are gone, and what came of the messages is still there: all go on where their groups are set to.
    pub(crate) fn empty(&mut self, round: &Round) {
        if !self.are_settled() {
            return;
        }
        let deed = match round.rough {
            true => "rows emptied, hosts running",
            false => "rows emptied, hosts stopped",
        };
        self.tally.add(deed);
        let listening = self.under(round, |bench| {
            let effects = &bench.addresses.effects;
            bench.sql(effects, "DELETE FROM stagehost_progress");
        });
        self.must_say(&listening, deed, &Words::EMPTIED);
        let to = self.positions_said(&listening, deed);
        let rows = self.while_stopped(|bench| {
            for stage in TRANSACTIONAL {
                offsets::set(bench, stage, &of_group(&to, stage.group));
            }
            let (runtime, url) = (bench.runtime.handle(), &bench.addresses.effects);
            reader::rows(runtime, url, SECOND.name)
        });
        self.emptied.extend(rows.into_iter().rev().take(LAST));
        self.changed_database = Some(Instant::now());
    }

    /// Another database has none of the rows, and none of what came of the messages: the one that was there is brought back.
    pub(crate) fn replace(&mut self, round: &Round) {
        if !self.are_settled() {
            return;
        }
        let deed = match round.rough {
            true => "database replaced, hosts running",
            false => "database replaced, hosts stopped",
        };
        self.tally.add(deed);
        let listening = self.under(round, restore::replace);
        self.must_say(&listening, deed, &Words::EMPTIED);
        self.while_stopped(restore::bring_back);
        self.changed_database = Some(Instant::now());
    }

    /// Does something under hosts that run, or before they start; answers what hears them from then on.
    pub(crate) fn under(&mut self, round: &Round, work: impl FnOnce(&Bench)) -> Listening {
        let listening = Listening::begin(&self.bench.hosts.speakers());
        match round.rough {
            true => work(&self.bench),
            false => self.while_stopped(work),
        }
        listening
    }

    /// Waits until what the log knows of each lane is its row's and as far as that was, for a host that was killed has not told it;
    /// and until the second stage has behind it what was repeated by earlier faults: that it was there is in its rows.
    pub(crate) fn are_settled(&mut self) -> bool {
        if self.bench.hosts.thaw_all() {
            std::thread::sleep(THAWED);
        }
        let ends = reader::bounds(&self.bench.addresses.brokers, MIDDLE);
        let rows = restore::offsets(&self.bench);
        let is_behind = |p: &Progress| {
            let row = rows.get(&(p.group.to_owned(), p.partition));
            row.is_some_and(|row| p.committed < *row)
        };
        let are_committed = || (self.lag.progress()).is_ok_and(|all| !all.iter().any(is_behind));
        let is_passed = |rows: &Offsets| {
            let at = |partition: i32| rows.get(&(SECOND.group.to_owned(), partition));
            ends.iter()
                .all(|(partition, (_, end))| at(*partition).is_some_and(|at| at >= end))
        };
        let deadline = Instant::now() + SETTLED_WITHIN;
        while Instant::now() < deadline {
            let is_passed = is_passed(&restore::offsets(&self.bench));
            if is_passed && are_committed() && offsets::are_told(&self.bench) {
                return true;
            }
            std::thread::sleep(ASK_INTERVAL);
        }
        let what = "not all lanes have a row and its words beside their group's offset";
        self.found.add(Anomaly::Stalled, || what.to_owned());
        false
    }

    /// Where the lanes say that their groups are to be set; each has to.
    fn positions_said(&mut self, listening: &Listening, deed: &str) -> Offsets {
        let deadline = Instant::now() + ALL_SAID_WITHIN;
        loop {
            let said = positions(listening, &self.bench.hosts.speakers());
            if said.len() == TRANSACTIONAL_LANES {
                return said;
            }
            if Instant::now() >= deadline {
                let (count, all) = (said.len(), TRANSACTIONAL_LANES);
                self.found.add(Anomaly::Unsaid, || {
                    format!("{deed}: {count} of {all} lanes say where to go on")
                });
                return said;
            }
            std::thread::sleep(ASK_INTERVAL);
        }
    }
}

/// The mends in the logs: `kafka-consumer-groups --group 'g' --topic t:3 --reset-offsets --to-offset 41 --execute`.
fn positions(listening: &Listening, speakers: &[Speaker]) -> Offsets {
    let mut all = Offsets::new();
    for speaker in speakers {
        for (lane, offset) in listening.log(speaker).lines().filter_map(position) {
            let said = all.entry(lane).or_insert(offset);
            *said = offset.max(*said);
        }
    }
    all
}

fn position(line: &str) -> Option<((String, i32), i64)> {
    let (_, mend) = line.split_once("kafka-consumer-groups --group '")?;
    let (group, mend) = mend.split_once("' --topic ")?;
    let (place, mend) = mend.split_once(" --reset-offsets --to-offset ")?;
    let (_, partition) = place.rsplit_once(':')?;
    let (offset, _) = mend.split_once(" --execute")?;
    let lane = (group.to_owned(), partition.parse().ok()?);
    Some((lane, offset.parse().ok()?))
}

fn of_group(all: &Offsets, group: &str) -> BTreeMap<i32, i64> {
    let of = all.iter().filter(|((of, _), _)| of == group);
    of.map(|((_, partition), offset)| (*partition, *offset))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mend_is_read_where_it_is_said() {
        let line = "2026-11-30T10:00:00Z ERROR stopped: SQL store `effects` has no row in stagehost_progress for faults.first, \
            faults.input 3, …; or, stopped, say where to go on: kafka-consumer-groups --group 'faults.first' --topic \
            faults.input:3 --reset-offsets --to-offset 41 --execute stage=first";
        let lane = (FIRST.group.to_owned(), 3);
        assert_eq!(position(line), Some((lane.clone(), 41)));
        assert_eq!(position("ERROR stopped: something else"), None);
        let all = Offsets::from([(lane, 41), ((SECOND.group.to_owned(), 3), 7)]);
        assert_eq!(of_group(&all, FIRST.group), BTreeMap::from([(3, 41)]));
    }
}
