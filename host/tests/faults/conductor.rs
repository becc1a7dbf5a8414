//! A run: load, rounds of faults, the end of both, and the judge.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::bench::Bench;
use crate::judge::{self, Anomalies, Anomaly, Progress, Repeated, StageHistory};
use crate::load::{Loader, unix_milliseconds};
use crate::pipeline::{CACHER, FIRST, SECOND, STAGES, Stage};
use crate::proxy::{Link, Proxy};
use crate::reader::{self, Lag};
use crate::report::{Report, Tally};
use crate::say;
use crate::schedule::{Kind, Round, schedule};
use crate::servers::{End, Server};
use crate::sick::{self, SAID_WITHIN, Sickness};

/// What a frozen host sleeps at least; its groups wait for it for 6 s.
const FROZEN: Duration = Duration::from_secs(8);
/// How long the network is away before a host is frozen.
const UNDER_WAY: Duration = Duration::from_millis(700);
/// Further behind than this, the hosts get time before the next round: a fault is of use where
/// there is work.
const FAR_BEHIND: i64 = 4_000;
/// How long the hosts may be at a standstill while nothing is broken.
const STALLED: Duration = Duration::from_secs(120);
/// How soon the hosts say that they are ready, once all is worked off.
const READY_WITHIN: Duration = Duration::from_secs(30);
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
        bench,
        lag,
        begun,
        tally: Tally::default(),
        found: Anomalies::default(),
        flushed_at: 0,
    };
    let rounds = schedule(seed, cycles);
    for (n, round) in rounds.iter().enumerate() {
        run.round(round);
        let (behind, hosts) = (run.behind(), run.bench.hosts.count());
        let (what, of, sent) = (round.kind.name(), rounds.len(), loader.sent());
        let (n, at) = (n + 1, begun.elapsed());
        say!("{at:>6.0?} {n:>3}/{of} {what:<14} hosts {hosts}, sent {sent}, behind {behind}");
        if !run.catch_up(FAR_BEHIND) {
            break;
        }
    }
    let messages = loader.stop();
    say!("the load is over: {messages} messages; what is left is worked off");
    run.bench.hosts.thaw_all();
    run.catch_up(0);
    run.bench.hosts.replace_dead(&mut run.found);
    run.all_ready();
    run.bench.hosts.stop_all(&mut run.found);
    let (cached_keys, repeated) = run.judge(messages);
    Report {
        seed,
        took: begun.elapsed(),
        messages,
        cached_keys,
        repeated,
        planned: cycles,
        tally: run.tally,
        found: run.found,
    }
}

struct Run {
    bench: Bench,
    lag: Lag,
    begun: Instant,
    tally: Tally,
    found: Anomalies,
    /// When Redis last lost all, in milliseconds since the Unix epoch.
    flushed_at: i64,
}

impl Run {
    fn round(&mut self, round: &Round) {
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
                    (
                        &bench.to_postgres,
                        Link::Frozen,
                        "host frozen, in transactions",
                    )
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
            Kind::ScaleHosts if round.rough => {
                hosts.stop(victim, found);
                std::thread::sleep(round.hold);
                hosts.add();
            }
            Kind::ScaleHosts => {
                hosts.add();
                std::thread::sleep(round.hold);
                hosts.stop(victim, found);
            }
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
            Kind::CutRedis => cut(&bench.to_redis, round, tally),
            Kind::SickPostgres | Kind::RefusePostgres | Kind::SickRedis | Kind::RefuseRedis => {
                sick(bench, round, tally, found)
            }
        }
        tally.round(round.kind);
        bench.hosts.thaw();
        std::thread::sleep(round.rest);
        bench.hosts.thaw();
        bench.hosts.replace_dead(found);
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

    /// Nothing is broken any more: no host may say that something is.
    fn all_ready(&mut self) {
        let deadline = Instant::now() + READY_WITHIN;
        for admin in self.bench.hosts.admins() {
            loop {
                let answer = sick::readiness(&admin);
                if answer.as_ref().is_some_and(|(status, _)| *status == 200) {
                    break;
                }
                if Instant::now() >= deadline {
                    let found = &mut self.found;
                    found.add(Anomaly::Unsaid, || {
                        format!("all is well, and a host says {answer:?}")
                    });
                    break;
                }
                std::thread::sleep(ASK_INTERVAL);
            }
        }
    }

    /// Reads all that is there. Answers how many keys of Redis could be judged, and what the second
    /// stage had to drop.
    fn judge(&mut self, messages: u64) -> (usize, Repeated) {
        let (bench, found) = (&self.bench, &mut self.found);
        let topic = |name| reader::topic(&bench.addresses.brokers, name);
        let history = |stage: &Stage| StageHistory {
            stage: stage.name,
            inputs: topic(stage.input),
            rows: reader::rows(
                bench.runtime.handle(),
                &bench.addresses.postgres,
                stage.name,
            ),
            outputs: stage.output.map(topic).unwrap_or_default(),
            letters: topic(stage.letters),
        };
        let first = history(&FIRST);
        let loaded = judge::without_repeated(&first.inputs).len() as u64;
        assert_eq!(
            loaded, messages,
            "Kafka has what it acknowledged to the loader"
        );
        judge::judge_stage(&first, found);
        judge::judge_stage(&history(&SECOND), found);
        judge::judge_cacher(&topic(CACHER.letters), found);
        let progress = self.lag.progress().expect("Kafka answers");
        judge::judge_progress(&progress, found);
        let cache = reader::cache(&bench.addresses.redis);
        let middle = &first.outputs;
        let cached_keys = judge::judge_cache(middle, &cache, self.flushed_at, found);
        (cached_keys, judge::repeated(middle))
    }
}

fn behind(progress: &[Progress], group: &str) -> i64 {
    let of_group = progress.iter().filter(|p| p.group == group);
    of_group.map(|p| p.end - p.committed).sum()
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

/// A server is sick until a host has said so, and for a while longer.
fn sick(bench: &Bench, round: &Round, tally: &mut Tally, found: &mut Anomalies) {
    let (runtime, addresses) = (bench.runtime.handle(), &bench.addresses);
    let sickness = Sickness::begin(round.kind, round.rough, runtime, addresses);
    tally.add(sickness.deed());
    let said = sick::until_said(|| bench.hosts.admins(), sickness.words(), SAID_WITHIN);
    if let Err(last) = said {
        let (deed, words) = (sickness.deed(), sickness.words());
        found.add(Anomaly::Unsaid, || {
            format!("{deed}: no host says {words:?}, but {last}")
        });
    }
    std::thread::sleep(round.hold);
    sickness.heal();
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
