//! Instructions that a message costs in a lane, counted by valgrind, and held against what they may be: `make budget`.
//!
//! Times differ from run to run on a machine that does other things too; counts do not.

mod count;
mod lanes;
mod world;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use toml::de::DeTable;

use self::lanes::Kind;

const USAGE: &str = "usage: budget check FILE | budget run KIND MESSAGES";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("budget: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["check", file] => check(Path::new(file)),
        ["run", kind, messages] => {
            let kind = Kind::named(kind).with_context(|| format!("no kind of lane: {kind}"))?;
            lanes::run(kind, messages.parse().context(USAGE)?);
            Ok(())
        }
        _ => bail!(USAGE),
    }
}

fn check(file: &Path) -> anyhow::Result<()> {
    ensure!(
        !cfg!(debug_assertions),
        "this is not optimised, and its counts say nothing: `make budget` builds it as it is to be"
    );
    let text = std::fs::read_to_string(file);
    let text = text.with_context(|| format!("cannot read {}", file.display()))?;
    let budget = DeTable::parse(&text).with_context(|| format!("{}", file.display()))?;
    let number = |name: &str| -> anyhow::Result<u64> {
        let value = budget.get_ref().get(name);
        let value = value.and_then(|value| value.get_ref().as_integer());
        let number = value.and_then(|value| value.as_str().parse().ok());
        number.with_context(|| format!("{}: `{name} = NUMBER` is missing", file.display()))
    };
    let tolerance = number("tolerance-percent")?;
    let mut over = 0;
    for kind in Kind::ALL {
        let allowed = number(kind.name())?;
        let counted = count::a_message(kind)?;
        println!(
            "{:<14} {counted:>6} instructions a message, budget {allowed}",
            kind.name()
        );
        if counted * 100 > allowed * (100 + tolerance) {
            over += 1;
            eprintln!("{}", too_many(file, kind, counted, allowed));
        } else if counted * 100 < allowed * (100 - tolerance) {
            println!(
                "  fewer than that: lower `{}` in {}",
                kind.name(),
                file.display()
            );
        }
    }
    ensure!(
        over == 0,
        "{over} kinds of lane cost more than their budget"
    );
    Ok(())
}

fn too_many(file: &Path, kind: Kind, counted: u64, allowed: u64) -> String {
    let name = kind.name();
    format!(
        "error: a message costs a lane of the kind `{name}` {counted} instructions, and the budget is {allowed}
  --> {}
   = help: where they go: valgrind --tool=callgrind {} run {name} {}, then callgrind_annotate
   = help: if they are worth it: write `{name} = {counted}` there, and why in the commit",
        file.display(),
        count::this_program().display(),
        count::MANY,
    )
}
