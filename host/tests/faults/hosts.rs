//! The hosts: processes that run one pipeline, and share its partitions.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::judge::{Anomalies, Anomaly};
use crate::process::{Process, tied};
use crate::said::Speaker;

/// How long a host may take to end after SIGTERM: its own limit is 30 s.
const STOP_PATIENCE: Duration = Duration::from_secs(45);

/// Hosts, each with a folder of its own, which the next in its place takes over.
pub(crate) struct Hosts {
    binary: PathBuf,
    folder: PathBuf,
    logs: PathBuf,
    pipeline: String,
    running: Vec<Host>,
    started: usize,
}

struct Host {
    process: Process,
    place: usize,
    frozen_until: Option<Instant>,
}

impl Hosts {
    pub(crate) fn new(folder: &Path, logs: &Path, pipeline: String) -> Self {
        let own = || PathBuf::from(env!("CARGO_BIN_EXE_host"));
        Self {
            binary: std::env::var_os("HOST_BINARY").map_or_else(own, PathBuf::from),
            folder: folder.to_owned(),
            logs: logs.to_owned(),
            pipeline,
            running: Vec::new(),
            started: 0,
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.running.len()
    }

    /// Those that work, as far as they have said where they tell of themselves.
    pub(crate) fn speakers(&self) -> Vec<Speaker> {
        let is_working = |host: &&Host| host.frozen_until.is_none();
        let working = self.running.iter().filter(is_working);
        let speaker = |host: &Host| {
            Some(Speaker {
                name: host.process.name().to_owned(),
                admin: host.process.said_after("admin listens on http://")?,
                log: host.process.log().to_owned(),
            })
        };
        working.filter_map(speaker).collect()
    }

    /// Starts one; does not wait for it.
    pub(crate) fn add(&mut self) {
        let is_free = |place: &usize| self.running.iter().all(|host| host.place != *place);
        let place = (0..).find(is_free).expect("a place");
        let folder = self.folder.join(format!("host-{place}"));
        std::fs::create_dir_all(&folder).expect("a host's folder");
        let file = folder.join("pipeline.toml");
        std::fs::write(&file, &self.pipeline).expect("a host's pipeline");
        self.started += 1;
        let name = format!("host-{}", self.started);
        let mut command = tied("KILL");
        command.arg(&self.binary).arg("run").arg(file);
        command.env_remove("RUST_LOG");
        let log = self.logs.join(format!("{name}.log"));
        self.running.push(Host {
            process: Process::start(&name, command, &log),
            place,
            frozen_until: None,
        });
    }

    /// SIGKILL for one that works.
    pub(crate) fn kill(&mut self, victim: usize) {
        if let Some(at) = self.working(victim) {
            self.running.remove(at).process.kill();
        }
    }

    /// SIGTERM for one that works: it must exit with 0.
    pub(crate) fn stop(&mut self, victim: usize, found: &mut Anomalies) {
        if let Some(at) = self.working(victim) {
            let host = self.running.remove(at);
            stop(vec![host], found);
        }
    }

    /// SIGTERM for all at once.
    pub(crate) fn stop_all(&mut self, found: &mut Anomalies) {
        self.thaw_all();
        stop(std::mem::take(&mut self.running), found);
    }

    /// SIGSTOP for one that works; [`Hosts::thaw`] lets it go on after that time.
    pub(crate) fn freeze(&mut self, victim: usize, time: Duration) {
        if let Some(at) = self.working(victim) {
            let host = &mut self.running[at];
            host.process.signal(libc::SIGSTOP);
            host.frozen_until = Some(Instant::now() + time);
        }
    }

    /// SIGCONT for those whose time has come.
    pub(crate) fn thaw(&mut self) {
        let now = Instant::now();
        for host in &mut self.running {
            if host.frozen_until.is_some_and(|until| until <= now) {
                host.process.signal(libc::SIGCONT);
                host.frozen_until = None;
            }
        }
    }

    /// Waits for those that are frozen, and lets them go on. Answers whether there was one.
    pub(crate) fn thaw_all(&mut self) -> bool {
        let last = self
            .running
            .iter()
            .filter_map(|host| host.frozen_until)
            .max();
        if let Some(until) = last {
            std::thread::sleep(until.saturating_duration_since(Instant::now()));
        }
        self.thaw();
        last.is_some()
    }

    /// Finds those that ended though nobody told them to, and starts others.
    pub(crate) fn replace_dead(&mut self, found: &mut Anomalies) {
        let (dead, running): (Vec<_>, Vec<_>) = std::mem::take(&mut self.running)
            .into_iter()
            .map(|mut host| (host.process.ended(), host))
            .partition(|(ended, _)| ended.is_some());
        self.running = running.into_iter().map(|(_, host)| host).collect();
        for (status, host) in dead {
            let words = host.process.last_words();
            let name = host.process.name();
            found.add(Anomaly::HostDied, || format!("{name}: {status:?}\n{words}"));
            self.add();
        }
    }

    fn working(&self, victim: usize) -> Option<usize> {
        let working: Vec<_> = (0..self.running.len())
            .filter(|at| self.running[*at].frozen_until.is_none())
            .collect();
        Some(*working.get(victim.checked_rem(working.len())?)?)
    }
}

fn stop(mut hosts: Vec<Host>, found: &mut Anomalies) {
    for host in &mut hosts {
        host.process.signal(libc::SIGTERM);
    }
    for mut host in hosts {
        let status = host.process.wait(STOP_PATIENCE);
        if !status.is_some_and(|status| status.success()) {
            let words = host.process.last_words();
            let name = host.process.name();
            found.add(Anomaly::UncleanStop, || {
                format!("{name}: {status:?}\n{words}")
            });
        }
    }
}
