//! A run: load, rounds of faults, the end of both, and the judge.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::bench::Bench;
use crate::books::{Books, Written};
use crate::charged::Charged;
use crate::history::Histories;
use crate::judge::{Anomalies, Anomaly, MessageId, Progress, Reset, Row, judge_letter};
use crate::load::Loader;
use crate::others::Others;
use crate::pipeline::{STAGES, Stage};
use crate::plants;
use crate::quiet::Quiet;
use crate::reader::{Lag, Letters};
use crate::report::{Report, Tally};
use crate::restore::Again;
use crate::said::{Evidence, until_well};
use crate::say;
use crate::schedule::schedule;

/// Further behind than this, the hosts get time before the next round: a fault is of use where
/// there is work.
const FAR_BEHIND: i64 = 4_000;
/// How long the hosts may be at a standstill while nothing is broken.
const STALLED: Duration = Duration::from_secs(120);
const ASK_INTERVAL: Duration = Duration::from_millis(500);
const SAY_INTERVAL: Duration = Duration::from_secs(5);

/// Runs so many cycles of faults.
pub(crate) fn run(seed: u64, cycles: usize, logs: &Path) -> Report {
    let begun = Instant::now();
    let bench = Bench::start(logs);
    say!("servers and hosts are there after {:.0?}", begun.elapsed());
    let lag = Lag::new(&bench.addresses.brokers);
    let loader = Loader::start(&bench.addresses.brokers, &logs.join("loader.log"));
    let mut run = Run {
        lag,
        begun,
        letters: Letters::new(&bench.addresses.brokers),
        books: Books::start(&bench.addresses.brokers),
        bench,
        tally: Tally::default(),
        found: Anomalies::default(),
        flushed_at: 0,
        others: Others::default(),
        again: Again::default(),
        resets: Vec::new(),
        removed: 0,
        evidence: Vec::new(),
        quiet: Vec::new(),
        charged: Vec::new(),
        emptied: Vec::new(),
        anew: Vec::new(),
        changed_database: None,
    };
    let rounds = schedule(seed, cycles);
    for (n, round) in rounds.iter().enumerate() {
        run.round(round);
        run.look_at_letters(round.kind.name());
        let (behind, hosts) = (run.behind(), run.bench.hosts.count());
        let (what, of, sent) = (round.kind.name(), rounds.len(), loader.sent());
        let (n, at) = (n + 1, begun.elapsed());
        say!("{at:>6.0?} {n:>3}/{of} {what:<16} hosts {hosts}, sent {sent}, behind {behind}");
        if !run.catch_up(FAR_BEHIND) {
            break;
        }
    }
    let messages = loader.stop();
    say!("the load is over: {messages} messages; what is left is worked off");
    run.end(messages, seed, cycles)
}

/// A run that goes on, and what the judge has to know of it.
pub(crate) struct Run {
    pub(crate) bench: Bench,
    pub(crate) lag: Lag,
    pub(crate) books: Books,
    begun: Instant,
    letters: Letters,
    pub(crate) tally: Tally,
    pub(crate) found: Anomalies,
    /// When Redis last lost all, in milliseconds since the Unix epoch.
    pub(crate) flushed_at: i64,
    pub(crate) others: Others,
    pub(crate) again: Again,
    pub(crate) resets: Vec<Reset>,
    /// Offsets of the books that were removed.
    pub(crate) removed: i64,
    /// What was said of each trouble.
    pub(crate) evidence: Vec<Evidence>,
    /// What was said where there was none.
    pub(crate) quiet: Vec<Quiet>,
    /// What was counted while stores were sick.
    pub(crate) charged: Vec<Charged>,
    /// Rows of the second stage that were the last before its lanes' own were emptied.
    pub(crate) emptied: Vec<Row>,
    /// Messages that were in a topic made anew before somebody was to read it.
    pub(crate) anew: Vec<MessageId>,
    /// When the stages' database was another one last.
    pub(crate) changed_database: Option<Instant>,
}

impl Run {
    /// Works off what is left, stops the hosts, and judges.
    fn end(mut self, messages: u64, seed: u64, planned: usize) -> Report {
        self.books.pause();
        self.bench.hosts.thaw_all();
        self.catch_up(0);
        self.bench.hosts.replace_dead(&mut self.found);
        until_well(&self.bench.hosts.speakers(), "all", &mut self.found);
        self.bench.hosts.stop_all(&mut self.found);
        let Self {
            books,
            bench,
            mut found,
            ..
        } = self;
        let written: Written = books.stop();
        let mut histories = Histories::read(&bench, &self.again, written, self.resets);
        (histories.emptied, histories.anew) = (self.emptied, self.anew);
        histories.have_waited(&self.charged);
        let loaded = usize::try_from(messages).expect("a number") + self.others.in_input();
        assert_eq!(
            histories.loaded(),
            loaded,
            "Kafka has what it acknowledged to the loader and to others"
        );
        histories.judge(&mut found);
        let progress = self.lag.progress().expect("Kafka answers");
        let (cached_keys, repeated) =
            histories.judge_rest(&bench, &progress, self.flushed_at, &mut found);
        let missed = plants::missed(&histories, &self.evidence, &self.quiet, &self.charged);
        Report {
            seed,
            took: self.begun.elapsed(),
            messages,
            cached_keys,
            repeated,
            planned,
            others: self.others,
            committed: histories.written.committed.len(),
            aborted: histories.written.aborted.len(),
            removed: self.removed,
            again: self.again.values().flat_map(|m| m.values()).sum(),
            reset: histories.resets.iter().map(|reset| reset.again.len()).sum(),
            said: self.evidence.len(),
            quiet: self.quiet.len(),
            planted: plants::COUNT,
            missed,
            tally: self.tally,
            found,
        }
    }

    /// No message may have become a dead letter that does not want to.
    fn look_at_letters(&mut self, after: &str) {
        for (stage, letter) in self.letters.new_ones() {
            let before = self.found.count(Anomaly::WrongOutcome);
            judge_letter(stage, &letter, &mut self.found);
            if self.found.count(Anomaly::WrongOutcome) > before {
                say!(
                    "{after}: a dead letter of {} that nobody wanted: {letter:?}",
                    stage.name
                );
            }
        }
    }

    /// How far each stage is behind, in words.
    fn behind(&self) -> String {
        let Ok(progress) = self.lag.progress() else {
            return "unknown".to_owned();
        };
        let of = |stage: &&Stage| format!("{} {}", stage.name, behind(&progress, stage.group));
        STAGES.iter().map(of).collect::<Vec<_>>().join(" ")
    }

    /// Waits until the hosts are behind by no more than this. A standstill is an anomaly.
    fn catch_up(&mut self, allowed: i64) -> bool {
        let (mut last, mut since, mut said) = (i64::MAX, Instant::now(), Instant::now());
        loop {
            self.bench.hosts.thaw();
            let progress = self.lag.progress().unwrap_or_default();
            let sum = STAGES
                .map(|stage| behind(&progress, stage.group))
                .iter()
                .sum();
            if !progress.is_empty() && sum <= allowed {
                return true;
            }
            if sum != last {
                (last, since) = (sum, Instant::now());
            }
            if since.elapsed() > STALLED {
                let what = format!("at a standstill, behind {}", self.behind());
                self.found.add(Anomaly::Stalled, || what);
                return false;
            }
            if said.elapsed() > SAY_INTERVAL {
                said = Instant::now();
                say!("{:>6.0?} behind {}", self.begun.elapsed(), self.behind());
            }
            std::thread::sleep(ASK_INTERVAL);
        }
    }
}

fn behind(progress: &[Progress], group: &str) -> i64 {
    let of_group = progress.iter().filter(|p| p.group == group);
    of_group.map(|p| p.end - p.committed).sum()
}
