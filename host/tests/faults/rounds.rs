//! What is done in a round of each kind, and what must be seen of it at once.

use std::time::{Duration, Instant};

use crate::bench::Bench;
use crate::charged::{Charged, judge_charged};
use crate::conductor::Run;
use crate::judge::{Anomaly, Progress};
use crate::load::unix_milliseconds;
use crate::offsets;
use crate::pipeline::{BOOKED, CACHER, FIRST, INPUT, TRANSACTIONAL_LANES};
use crate::proxy::{Link, Proxy};
use crate::quiet::{self, Quiet, judge_quiet};
use crate::reader;
use crate::report::Tally;
use crate::restore::{self, Copy};
use crate::said::{ALL_SAID_WITHIN, Counted, Listening, Words, judge_said, until_well};
use crate::schedule::{Kind, Round};
use crate::servers::{End, Server};
use crate::sick::Sickness;

/// What a frozen host sleeps at least; its groups wait for it for 6 s.
const FROZEN: Duration = Duration::from_secs(8);
/// How long the network is away before a host is frozen.
const UNDER_WAY: Duration = Duration::from_millis(700);
/// How long hosts may take to get on a bit.
const GETS_ON: Duration = Duration::from_secs(60);
/// What is processed between a copy of the database and its return, at least.
const SINCE_COPY: i64 = 100;
const ASK_INTERVAL: Duration = Duration::from_millis(200);

impl Run {
    pub(crate) fn round(&mut self, round: &Round) {
        match round.kind {
            Kind::KillHost | Kind::FreezeHost | Kind::StopHost | Kind::ScaleHosts => {
                self.hosts_round(round);
            }
            Kind::SickPostgres
            | Kind::RefusePostgres
            | Kind::SickRedis
            | Kind::RefuseRedis
            | Kind::SickKafka
            | Kind::RefuseKafka => self.sick(round),
            Kind::SlowServers => self.slow(round),
            Kind::Retention => self.retention(round),
            Kind::CopyHeaders => self.copy_headers(),
            Kind::RestorePostgres => self.restore(round),
            Kind::ResetOffsets => self.reset(round),
            Kind::EmptyPostgres => self.empty(round),
            Kind::ReplacePostgres => self.replace(round),
            Kind::RemakeTopic => self.make_anew(round),
            _ => self.servers_round(round),
        }
        self.tally.round(round.kind);
        self.bench.hosts.thaw();
        std::thread::sleep(round.rest);
        self.bench.hosts.thaw();
        self.bench.hosts.replace_dead(&mut self.found);
        let speakers = self.bench.hosts.speakers();
        until_well(&speakers, round.kind.name(), &mut self.found);
    }

    fn hosts_round(&mut self, round: &Round) {
        let Self {
            bench,
            tally,
            found,
            ..
        } = self;
        let (hosts, victim) = (&mut bench.hosts, round.victim);
        match round.kind {
            Kind::KillHost => {
                hosts.kill(victim);
                tally.add("host killed");
                std::thread::sleep(round.hold);
                hosts.add();
            }
            Kind::FreezeHost => {
                // What is under way can't end before the host sleeps, and does when others have long
                // gone on: outputs that it has not sent, or transactions that it has not committed.
                let (way, link, deed) = if round.rough {
                    (&bench.to_kafka, Link::Cut, "host frozen, outputs unsent")
                } else {
                    let way = &bench.to_postgres;
                    (way, Link::Frozen, "host frozen, in transactions")
                };
                way.set(link);
                std::thread::sleep(UNDER_WAY);
                hosts.freeze(victim, FROZEN + round.hold);
                way.set(Link::Open);
                tally.add(deed);
            }
            Kind::StopHost => {
                hosts.stop(victim, found);
                tally.add("host stopped");
                hosts.add();
            }
            _ if round.rough => {
                hosts.stop(victim, found);
                std::thread::sleep(round.hold);
                hosts.add();
            }
            _ => {
                hosts.add();
                std::thread::sleep(round.hold);
                hosts.stop(victim, found);
            }
        }
    }

    fn servers_round(&mut self, round: &Round) {
        let Self { bench, tally, .. } = self;
        match round.kind {
            Kind::RestartKafka => restart(&mut bench.kafka, "kafka", round, tally),
            Kind::KillPostgres => {
                let killed = Round {
                    rough: true,
                    ..round.clone()
                };
                restart(&mut bench.postgres, "postgres", &killed, tally);
            }
            Kind::FlushRedis => {
                self.flushed_at = flush(&bench.addresses.redis);
                restart(&mut bench.redis, "redis", round, tally);
            }
            Kind::CutKafka => cut(&bench.to_kafka, round, tally),
            Kind::CutPostgres => cut(&bench.to_postgres, round, tally),
            _ => cut(&bench.to_redis, round, tally),
        }
    }

    /// A server is sick until a host has said so everywhere, and for a while longer. No message pays for a store.
    fn sick(&mut self, round: &Round) {
        let Self { bench, .. } = self;
        let listening = Listening::begin(&bench.hosts.speakers());
        let sickness = Sickness::begin(round.kind, round.rough, bench);
        let deed = sickness.deed();
        self.tally.add(deed);
        let words = sickness.words();
        let evidence = listening.until_said(deed, &words, || bench.hosts.speakers());
        judge_said(&evidence, &mut self.found);
        self.evidence.push(evidence);
        let charged = Charged::watch(round.kind, deed, bench, &self.lag, round.hold);
        if let Some(charged) = charged {
            judge_charged(&charged, &mut self.found);
            self.charged.push(charged);
        }
        sickness.heal(bench);
    }

    /// A host says so everywhere.
    pub(crate) fn must_say(&mut self, listening: &Listening, deed: &'static str, words: &Words) {
        let hosts = &self.bench.hosts;
        let evidence = listening.until_said(deed, words, || hosts.speakers());
        judge_said(&evidence, &mut self.found);
        self.evidence.push(evidence);
    }

    /// No host says what is not so; the books are paused, and worked off.
    fn must_be_quiet(&mut self, since: &Counted, after: &'static str) {
        let hosts = &self.bench.hosts;
        // An idle lane may not have looked yet.
        let is_long_ago = |at: Instant| at.elapsed() >= ALL_SAID_WITHIN;
        let rows_are_kept = self.changed_database.is_none_or(is_long_ago);
        let quiet = Quiet {
            after,
            behind: quiet::until_not_behind(|| hosts.speakers()),
            counted: quiet::miscounted(since, &hosts.speakers(), rows_are_kept),
        };
        judge_quiet(&quiet, &mut self.found);
        self.quiet.push(quiet);
    }

    /// What another program wrote is no repetition, whatever headers it has.
    fn copy_headers(&mut self) {
        let since = Counted::by(&self.bench.hosts.speakers());
        let brokers = &self.bench.addresses.brokers;
        self.others.write(brokers);
        self.tally.add("headers copied");
        let ends = reader::bounds(brokers, INPUT);
        let is_behind = |p: &Progress| p.group == FIRST.group && p.committed < ends[&p.partition].1;
        let deadline = Instant::now() + GETS_ON;
        while !(self.lag.progress()).is_ok_and(|all| !all.iter().any(is_behind)) {
            if Instant::now() >= deadline {
                let what = "what was copied is not worked off".to_owned();
                self.found.add(Anomaly::Stalled, || what);
                return;
            }
            std::thread::sleep(ASK_INTERVAL);
        }
        self.books.pause();
        self.must_be_quiet(&since, "headers copied");
        self.books.go_on();
    }

    /// Slow servers are no trouble: the stages get on.
    fn slow(&mut self, round: &Round) {
        let ways: &[&Proxy] = if round.rough {
            &[&self.bench.to_postgres, &self.bench.to_redis]
        } else {
            &[&self.bench.to_kafka]
        };
        let before = self.lag.progress();
        ways.iter().for_each(|way| way.set(Link::Slow));
        let deed = if round.rough {
            "stores slow"
        } else {
            "kafka slow"
        };
        self.tally.add(deed);
        std::thread::sleep(round.hold);
        let deadline = Instant::now() + GETS_ON;
        let gets_on = |now: &[Progress]| {
            let before = before.as_deref().unwrap_or_default();
            let of = |all: &[Progress], group: &str| -> i64 {
                let of_group = all.iter().filter(|p| p.group == group);
                of_group.map(|p| p.committed).sum()
            };
            let stages = [&FIRST, &CACHER, &BOOKED];
            stages
                .iter()
                .all(|s| of(now, s.group) > of(before, s.group))
        };
        while !self.lag.progress().is_ok_and(|now| gets_on(&now)) {
            if Instant::now() >= deadline {
                let what = format!("{deed}, and not all stages get on");
                self.found.add(Anomaly::Stalled, || what);
                break;
            }
            std::thread::sleep(ASK_INTERVAL);
        }
        ways.iter().for_each(|way| way.set(Link::Open));
    }

    /// All of the books is processed and then removed: nobody may take markers that are gone for a gap.
    fn retention(&mut self, round: &Round) {
        let since = Counted::by(&self.bench.hosts.speakers());
        self.books.pause();
        self.bench.hosts.thaw_all();
        if let Err(behind) = offsets::until_worked_off(&self.bench, &self.lag) {
            let what = format!("the books are not worked off: {behind}");
            self.found.add(Anomaly::Stalled, || what);
        } else if round.rough {
            self.removed += self.while_stopped(offsets::remove_books);
            self.tally.add("books removed, hosts stopped");
        } else {
            self.removed += offsets::remove_books(&self.bench);
            self.bench.hosts.kill(round.victim);
            self.bench.hosts.add();
            self.tally.add("books removed, a host killed");
        }
        self.must_be_quiet(&since, "books removed");
        self.books.go_on();
    }

    /// What was processed since the copy is processed again: that is said, and nothing of it is lost.
    fn restore(&mut self, round: &Round) {
        // A copy that lacks a lane's row is one that was emptied, to its hosts, and that is another round.
        let have_rows = |rows: &restore::Offsets| {
            rows.len() == TRANSACTIONAL_LANES && rows.values().all(|next| *next > 0)
        };
        let deadline = Instant::now() + GETS_ON;
        while !have_rows(&restore::offsets(&self.bench)) && Instant::now() < deadline {
            std::thread::sleep(ASK_INTERVAL);
        }
        let copy = Copy::take(&self.bench);
        let deadline = Instant::now() + GETS_ON;
        while copy.behind(&self.bench) < SINCE_COPY && Instant::now() < deadline {
            std::thread::sleep(ASK_INTERVAL);
        }
        let is_running = round.rough;
        let listening = Listening::begin(&self.bench.hosts.speakers());
        let hosts = self.bench.hosts.count();
        if is_running {
            self.tally.add("database set back, hosts running");
        } else {
            self.tally.add("database set back, hosts stopped");
            self.bench.hosts.stop_all(&mut self.found);
        }
        let is_known = is_running || copy.is_known_as_older(&self.lag);
        let (again, before) = copy.restore(&self.bench);
        if !is_running {
            (0..hosts).for_each(|_| self.bench.hosts.add());
        }
        for (stage, messages) in again {
            let again = self.again.entry(stage).or_default();
            for (message, times) in messages {
                *again.entry(message).or_default() += times;
            }
        }
        if is_known {
            self.must_say(&listening, "a database set back", &Words::OLDER);
            self.tally.add("and known to be older");
        }
        self.bench.to_postgres.set(Link::Open);
        self.changed_database = Some(Instant::now());
        let deadline = Instant::now() + GETS_ON;
        while !restore::have_got_to(&self.bench, &before) {
            if Instant::now() >= deadline {
                let what = "the lanes of a database set back do not get to where they were";
                self.found.add(Anomaly::Stalled, || what.to_owned());
                break;
            }
            std::thread::sleep(ASK_INTERVAL);
        }
    }

    /// Where a group is set to counts for a stage that is delivered to at least once; for a transactional one its rows do.
    fn reset(&mut self, round: &Round) {
        let since = Counted::by(&self.bench.hosts.speakers());
        let listening = Listening::begin(&[]);
        let to_first = round.rough;
        let (reset, is_set) = self.while_stopped(|bench| {
            let reset = offsets::reset_passer(bench, to_first);
            (reset, offsets::reset_booked(bench, to_first))
        });
        self.resets.push(reset);
        self.tally.add(if to_first {
            "groups set to their first"
        } else {
            "groups set back and forth"
        });
        if is_set {
            let words = ["was set by somebody else"];
            self.must_log(&listening, "a group's offsets set", &words);
        }
        // The row counts, and nothing is amiss with it.
        self.books.pause();
        self.must_be_quiet(&since, "a group's offsets set");
        self.books.go_on();
    }

    /// Does something while no host runs.
    pub(crate) fn while_stopped<T>(&mut self, work: impl FnOnce(&Bench) -> T) -> T {
        let hosts = self.bench.hosts.count();
        self.bench.hosts.stop_all(&mut self.found);
        let done = work(&self.bench);
        (0..hosts).for_each(|_| self.bench.hosts.add());
        done
    }

    fn must_log(&mut self, listening: &Listening, deed: &'static str, words: &[&str]) {
        let hosts = &self.bench.hosts;
        if listening.until_logged(words, || hosts.speakers()).is_none() {
            self.found.add(Anomaly::Unsaid, || {
                format!("{deed}: no host's log says {words:?}")
            });
        }
    }
}

fn restart(server: &mut Server, name: &str, round: &Round, tally: &mut Tally) {
    let how = if round.rough {
        End::Killed
    } else {
        End::Stopped
    };
    server.end(how);
    tally.add(match (name, how) {
        ("kafka", End::Killed) => "kafka killed",
        ("kafka", End::Stopped) => "kafka stopped",
        ("redis", End::Killed) => "redis killed",
        ("redis", End::Stopped) => "redis stopped",
        (_, End::Killed) => "postgres killed",
        (_, End::Stopped) => "postgres stopped",
    });
    std::thread::sleep(round.hold);
    server.start();
}

fn cut(way: &Proxy, round: &Round, tally: &mut Tally) {
    let (link, deed) = if round.rough {
        (Link::Cut, "network cut")
    } else {
        (Link::Frozen, "network frozen")
    };
    way.set(link);
    tally.add(deed);
    std::thread::sleep(round.hold);
    way.set(Link::Open);
}

/// Takes all that Redis has, and answers when.
fn flush(redis: &str) -> i64 {
    let flush = || -> redis::RedisResult<()> {
        let mut connection = redis::Client::open(redis)?.get_connection()?;
        redis::cmd("FLUSHALL").query(&mut connection)
    };
    flush().expect("Redis is flushed");
    unix_milliseconds()
}
