//! Counting: this program again, under valgrind.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use super::lanes::Kind;

/// Messages of the two runs whose difference counts: what beginning and ending costs is in both.
const FEW: u64 = 2_000;
pub(crate) const MANY: u64 = 12_000;

/// Instructions that one more message costs.
pub(crate) fn a_message(kind: Kind) -> anyhow::Result<u64> {
    let few = instructions(kind, FEW)?;
    let many = instructions(kind, MANY)?;
    ensure!(
        many > few,
        "{MANY} messages cost {many} instructions, and {FEW} cost {few}"
    );
    Ok((many - few) / (MANY - FEW))
}

fn instructions(kind: Kind, messages: u64) -> anyhow::Result<u64> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let profile = folder.path().join("callgrind.out");
    let run = Command::new("valgrind")
        .arg("--tool=callgrind")
        .arg(format!("--callgrind-out-file={}", profile.display()))
        .arg(this_program())
        .args(["run", kind.name(), &messages.to_string()])
        .output()
        .context("cannot run valgrind: `scripts/install-deps test` installs it")?;
    let said = String::from_utf8_lossy(&run.stderr);
    ensure!(
        run.status.success(),
        "the run under valgrind failed:\n{said}"
    );
    total(&profile).with_context(|| format!("callgrind counted nothing:\n{said}"))
}

/// The line `totals: NUMBER` of a profile.
fn total(profile: &Path) -> Option<u64> {
    let profile = std::fs::read_to_string(profile).ok()?;
    let total = profile
        .lines()
        .find_map(|line| line.strip_prefix("totals:"))?;
    total.trim().parse().ok()
}

pub(crate) fn this_program() -> PathBuf {
    std::env::current_exe().unwrap_or_else(|_| "budget".into())
}
