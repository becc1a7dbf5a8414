//! Files and folders that stores and log will open: what they are by now, without making any.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::kafka::is_embedded;
use super::load::{Checks, DEFAULT_DATA_DIR, describe_io};
use crate::capability::{redis as redis_store, sql as sql_store};
use crate::diagnostics::{Problem, Span};
use crate::manifest::{Manifest, SqlSection, Text};
use crate::run::EMBEDDED_FOLDER;

/// What a SQLite database begins with, once there is something in it.
const SQLITE_MAGIC: &[u8] = b"SQLite format 3\0";

/// Reports what can't be opened.
pub(super) fn check(checks: &Checks<'_>, manifest: &Manifest) {
    let data_dir = manifest.data_dir.as_ref();
    let path = checks.path(data_dir.map_or(DEFAULT_DATA_DIR, |d| &d.value));
    if let Some(why) = no_folder(&path) {
        let message = format!("the data-dir can't be used: {why}");
        checks.report(match data_dir {
            Some(text) => Problem::at(&text.span, message).help("name another folder"),
            None => Problem::of_file(message).help("name another folder: `data-dir = \"…\"`"),
        });
    }
    for section in &manifest.sql {
        check_sql(checks, section);
    }
    for text in manifest.redis.iter().filter_map(|s| s.url.as_ref()) {
        let folder = text
            .value
            .strip_prefix("embedded:")
            .filter(|path| !path.is_empty());
        if let Some(why) = folder.and_then(|folder| no_folder(&checks.path(folder))) {
            checks.report(store_problem(text, &why));
        }
    }
}

/// Reports a host that runs on what is embedded: its broker has the log, or its stores are open.
pub(super) fn check_none_runs(checks: &Checks<'_>, manifest: &Manifest) {
    for text in manifest.redis.iter().filter_map(|s| s.url.as_ref()) {
        let folder = text.value.strip_prefix("embedded:");
        if folder.is_some_and(|folder| redis_store::is_in_use(&checks.path(folder))) {
            checks.report(
                Problem::at(&text.span, "another host has this embedded store open")
                    .help("stop it, or give each host a folder of its own"),
            );
        }
    }
    let kafka = manifest
        .kafka
        .as_ref()
        .filter(|_| is_embedded(manifest.kafka.as_ref()));
    let Some(brokers) = kafka.and_then(|kafka| kafka.brokers.as_ref()) else {
        return;
    };
    let data_dir = manifest.data_dir.as_ref();
    let path = checks.path(data_dir.map_or(DEFAULT_DATA_DIR, |d| &d.value));
    if let Some(address) = embedded_kafka::running(&path.join(EMBEDDED_FOLDER)) {
        checks.report(
            Problem::at(
                &brokers.span,
                "the data-dir's log is in use by another broker",
            )
            .label(format!("it listens on {address}"))
            .help("stop the host that runs there, or give this pipeline a `data-dir` of its own"),
        );
    }
}

fn check_sql(checks: &Checks<'_>, section: &SqlSection) {
    let texts = [&section.url, &section.stage_url];
    for text in texts.into_iter().flatten() {
        for (name, path) in sql_store::postgres_files(&text.value) {
            if let Err(error) = File::open(&path) {
                let why = format!("its `{name}` can't be read: {}", describe_io(&error));
                let problem = store_problem(text, &why);
                checks.report(
                    problem.help("give the path from the root, or from where the host is started"),
                );
            }
        }
    }
    if let Some(text) = &section.url
        && let Some(Ok(path)) = super::stores::sqlite_path(&text.value)
        && let Some(why) = no_sqlite_file(&checks.path(path))
    {
        checks.report(store_problem(text, &why));
    }
    if let Some(text) = &section.migrations {
        check_migrations(checks, &text.span, &checks.path(&text.value));
    }
}

fn store_problem(text: &Text, why: &str) -> Problem {
    Problem::at(&text.span, "the store can't be opened")
        .label(why)
        .help("correct the path, which is relative to this file")
}

/// Why there can be no such folder. Without its path, which may have come from a variable.
fn no_folder(path: &Path) -> Option<String> {
    no_folder_for(path, path)
}

/// The same of a folder for what is to lie there.
fn no_folder_for(content: &Path, path: &Path) -> Option<String> {
    let there = path.ancestors().find(|folder| folder.exists())?;
    let which = match there == content {
        true => "it",
        false => "what should be a folder above it",
    };
    match fs::metadata(there) {
        Ok(found) if !found.is_dir() => Some(format!("{which} is no folder")),
        Ok(_) if !is_writable(there) => Some("this user may not write there".to_owned()),
        Ok(_) => None,
        Err(error) => Some(describe_io(&error)),
    }
}

fn is_writable(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok()
}

/// Why there can be no database in the file.
fn no_sqlite_file(path: &Path) -> Option<String> {
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| {
        let most = SQLITE_MAGIC.len() as u64;
        file.take(most).read_to_end(&mut head)
    });
    match read {
        Err(error) if is_missing(&error) => no_folder_for(path, path.parent()?),
        Err(error) => Some(describe_io(&error)),
        Ok(0) => None,
        Ok(_) if head != SQLITE_MAGIC => Some("the file is no SQLite database".to_owned()),
        Ok(_) if !is_writable(path) => Some("this user may not write the file".to_owned()),
        Ok(_) => None,
    }
}

fn is_missing(error: &io::Error) -> bool {
    let kinds = [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory];
    kinds.contains(&error.kind())
}

/// That a folder and its names can be read, the pipeline's own checks have said.
fn check_migrations(checks: &Checks<'_>, span: &Span, folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        if path.extension().is_none_or(|extension| extension != "sql") {
            continue;
        }
        let Err(error) = fs::read_to_string(&path) else {
            continue;
        };
        let name = path.file_name().unwrap_or_default().display().to_string();
        let why = match error.kind() {
            io::ErrorKind::InvalidData => "it is not UTF-8".to_owned(),
            _ => describe_io(&error),
        };
        checks.report(
            Problem::at(span, format!("the migration `{name}` can't be read"))
                .label(why)
                .help("mend the file, or take it out of the folder"),
        );
    }
}
