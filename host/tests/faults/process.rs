//! Child processes: started so that none outlives the suite, and ended by their ids.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How often a process is asked whether it has ended.
const ASK_INTERVAL: Duration = Duration::from_millis(10);
/// How long what was killed may take to be gone.
const GONE_PATIENCE: Duration = Duration::from_secs(20);
/// Lines of a log that are shown where its process failed.
const TAIL: usize = 15;

/// A child process, which is killed when this is dropped.
pub(crate) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

/// A command that gets `signal` should the thread that starts it end, however the suite itself is
/// killed. So every process is started by the thread that runs the test.
pub(crate) fn tied(signal: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", signal]);
    command
}

impl Process {
    /// Starts it; what it writes is added to the log.
    pub(crate) fn start(name: &str, mut command: Command, log: &Path) -> Self {
        let out = OpenOptions::new().create(true).append(true).open(log);
        let out = out.unwrap_or_else(|e| panic!("{}: {e}", log.display()));
        let child = command
            .stdin(Stdio::null())
            .stdout(out.try_clone().expect("a file"))
            .stderr(out)
            .spawn()
            .unwrap_or_else(|e| panic!("{name} can't be started: {e}"));
        Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Where it writes.
    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// The word that stands behind these in its log, the first time.
    pub(crate) fn said_after(&self, words: &str) -> Option<String> {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let (_, rest) = log.split_once(words)?;
        let (word, _) = rest.split_once(char::is_whitespace)?;
        Some(word.to_owned())
    }

    /// The end of its log.
    pub(crate) fn last_words(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(TAIL)..].join("\n")
    }

    pub(crate) fn signal(&mut self, signal: i32) {
        // The id of one that was waited for may be another's by now.
        if self.ended().is_none() {
            send(self.id(), signal);
        }
    }

    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("the child's status")
    }

    /// Waits until it ends by itself, as long as the patience lasts.
    pub(crate) fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            match self.ended() {
                None if Instant::now() < deadline => std::thread::sleep(ASK_INTERVAL),
                status => return status,
            }
        }
    }

    /// SIGKILL for it and all that it started, which get no chance to react to its end.
    pub(crate) fn kill(&mut self) {
        if self.ended().is_some() {
            return;
        }
        // Stopped, it starts nothing that would be missed.
        send(self.id(), libc::SIGSTOP);
        let started = descendants(self.id());
        send(self.id(), libc::SIGKILL);
        for id in &started {
            send(*id, libc::SIGKILL);
        }
        self.child.wait().expect("the child has ended");
        let deadline = Instant::now() + GONE_PATIENCE;
        while started.iter().any(|id| is_alive(*id)) {
            assert!(Instant::now() < deadline, "{} goes on", self.name);
            std::thread::sleep(ASK_INTERVAL);
        }
    }

    fn id(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a process id")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn send(id: i32, signal: i32) {
    // SAFETY: a plain system call. The id is that of a child that was not waited for, or of one of
    // its descendants that was alive a moment ago.
    #[allow(unsafe_code)]
    unsafe {
        libc::kill(id, signal);
    }
}

fn is_alive(id: i32) -> bool {
    stat(id).is_some_and(|(state, _)| !matches!(state, 'Z' | 'X'))
}

fn descendants(id: i32) -> Vec<i32> {
    let parents: HashMap<i32, i32> = std::fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|id| Some((id, stat(id)?.1)))
        .collect();
    let mut found = vec![id];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(
            parents
                .iter()
                .filter(|(_, p)| **p == parent)
                .map(|(c, _)| *c),
        );
        next += 1;
    }
    found.split_off(1)
}

/// State and parent of a process.
fn stat(id: i32) -> Option<(char, i32)> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The name before it may hold anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut words = rest.split(' ');
    Some((words.next()?.chars().next()?, words.next()?.parse().ok()?))
}
