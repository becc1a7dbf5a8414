//! A program under measurement: a host or its native counterpart, as a process of its own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// How long a program may take to end after SIGTERM.
const END: Duration = Duration::from_secs(40);

/// A running program, killed when it is dropped.
pub(crate) struct Program {
    child: Child,
    log: PathBuf,
}

/// What a program has used.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// Of all its threads, in user and system mode.
    pub(crate) cpu: Duration,
    /// Bytes of memory that are resident now.
    pub(crate) resident: u64,
    /// The most that were.
    pub(crate) peak: u64,
}

impl Program {
    /// Starts it, with its output in `folder`.
    pub(crate) fn start(mut command: Command, folder: &Path, name: &str) -> anyhow::Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let file = File::create(&log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        Ok(Self { child, log })
    }

    /// Fails with the end of its output if it has ended.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("a program ended with {status}:\n{}", self.last_words());
        }
        Ok(())
    }

    fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().rev().take(20).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    pub(crate) fn log_path(&self) -> PathBuf {
        self.log.clone()
    }

    pub(crate) fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn usage(&self) -> anyhow::Result<Usage> {
        let folder = PathBuf::from(format!("/proc/{}", self.child.id()));
        let stat = fs::read_to_string(folder.join("stat"))?;
        // Behind the name in parentheses, which may have spaces: proc(5).
        let fields: Vec<_> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split(' ')
            .collect();
        let ticks: u64 = [12, 13]
            .iter()
            .filter_map(|n| fields.get(*n)?.parse::<u64>().ok())
            .sum();
        let status = fs::read_to_string(folder.join("status"))?;
        let kilobytes = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name));
            let number = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
            number.unwrap_or_default() * 1024
        };
        Ok(Usage {
            // Linux counts in hundredths of a second for user space, whatever the kernel does.
            cpu: Duration::from_millis(ticks * 10),
            resident: kilobytes("VmRSS:"),
            peak: kilobytes("VmHWM:"),
        })
    }

    /// Asks it to end, and waits until it has.
    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
        self.check()?;
        let pid = libc::pid_t::try_from(self.child.id())?;
        #[expect(unsafe_code, reason = "there is no safe way to send a signal")]
        // SAFETY: no memory is touched, and the child was not waited for, so the number is its own.
        unsafe {
            libc::kill(pid, libc::SIGTERM)
        };
        let since = Instant::now();
        while since.elapsed() < END {
            if self.child.try_wait()?.is_some() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("a program does not end:\n{}", self.last_words());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
