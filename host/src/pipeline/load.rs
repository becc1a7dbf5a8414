//! From a file to a [`Pipeline`], or to everything that is wrong with it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use super::{Pipeline, Source, components, files, flow, http, kafka, listen, stages, stores};
use crate::diagnostics::{Diagnostics, Problem, Problems};
use crate::manifest::{self, Env, Manifest, Text};

const MAX_FILE_BYTES: u64 = 1 << 20;
pub(super) const DEFAULT_DATA_DIR: &str = "data";
const DEFAULT_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_NAME: usize = 100;

/// What [`Pipeline::load`] tries out beyond the text of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Read the stages' components, and hold what they import against what they are granted.
    pub components: bool,
    /// Look at the files and folders that stores and log will open.
    pub files: bool,
    /// Bind the listen addresses for a moment, to see whether they are free.
    pub ports: bool,
    /// See whether another host has what is embedded. Who runs finds out by taking it.
    pub embedded: bool,
}

impl Probe {
    /// All that running needs.
    pub const ALL: Self = Self {
        components: true,
        files: true,
        ports: true,
        embedded: false,
    };
    /// The text alone: for commands that talk to the log of a pipeline that may be running already.
    pub const NONE: Self = Self {
        components: false,
        files: false,
        ports: false,
        embedded: false,
    };
}

impl Pipeline {
    /// Reads and checks a pipeline file. `env` answers the values of `${NAME}`. On an error, answers
    /// every problem that could be found, and has started nothing.
    pub fn load(
        path: &Path,
        env: &dyn Fn(&str) -> Option<String>,
        probe: Probe,
    ) -> Result<Self, Diagnostics> {
        let shown = path.display().to_string();
        let (text, dir) = match read_file(path) {
            Ok(read) => read,
            Err(problem) => return Err(Diagnostics::new(shown, "", vec![*problem])),
        };
        let problems = Problems::default();
        let pipeline = check(&text, env, &dir, probe, &problems);
        let source = Source { path: shown, text };
        match pipeline {
            Some(pipeline) if problems.are_warnings() => Ok(Self {
                source,
                warnings: problems.into_vec(),
                ..pipeline
            }),
            _ => Err(source.diagnostics(problems.into_errors())),
        }
    }
}

/// What every check needs.
pub(super) struct Checks<'a> {
    /// The folder that the file stands in, absolute.
    dir: &'a Path,
    problems: &'a Problems,
}

impl Checks<'_> {
    pub(super) fn report(&self, problem: Problem) {
        self.problems.report(problem);
    }

    /// A path of the file, made absolute; `.` and `..` are resolved by name.
    pub(super) fn path(&self, text: &str) -> PathBuf {
        let mut path = PathBuf::new();
        for part in self.dir.join(text).components() {
            match part {
                Component::CurDir => {}
                Component::ParentDir => {
                    path.pop();
                }
                part => path.push(part),
            }
        }
        path
    }

    /// Whether a name that the user chose can stand in metrics, logs and headers.
    pub(super) fn name(&self, what: &str, name: &Text) -> bool {
        let fine = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let good =
            !name.value.is_empty() && name.value.len() <= MAX_NAME && name.value.chars().all(fine);
        if !good {
            self.report(
                Problem::at(
                    &name.span,
                    format!("`{}` can't be the name of a {what}", name.shown()),
                )
                .help(format!(
                    "take letters, digits, `-`, `_` and `.`, at most {MAX_NAME} of them"
                )),
            );
        }
        good
    }

    /// Reports what a list names twice.
    pub(super) fn no_repeats<'t>(&self, list: impl IntoIterator<Item = &'t Text>) {
        let mut seen: BTreeMap<&str, &Text> = BTreeMap::new();
        for item in list {
            if let Some(first) = seen.insert(&item.value, item) {
                self.report(
                    Problem::at(
                        &item.span,
                        format!("`{}` stands in the list twice", item.shown()),
                    )
                    .also(&first.span, "the first time")
                    .help("leave one of them out"),
                );
            }
        }
    }
}

fn read_file(path: &Path) -> Result<(String, PathBuf), Box<Problem>> {
    let cannot = |error: io::Error| {
        let why = describe_io(&error);
        let problem = Problem::of_file(format!("the pipeline file can't be read: {why}"));
        let help = "give the path of a pipeline file, such as `examples/blog/pipeline.toml`";
        Box::new(problem.help(help))
    };
    let file = File::open(path).map_err(cannot)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(cannot)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let problem = Problem::of_file("the pipeline file is larger than 1 MiB");
        return Err(problem.help("is it the right file?").into());
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let line = error.as_bytes()[..error.utf8_error().valid_up_to()]
            .iter()
            .filter(|b| **b == b'\n')
            .count();
        let message = format!("the pipeline file is not UTF-8 in line {}", line + 1);
        Box::new(Problem::of_file(message).help("save it as UTF-8"))
    })?;
    let absolute = std::path::absolute(path).map_err(cannot)?;
    let dir = absolute.parent().unwrap_or(Path::new("/")).to_owned();
    Ok((text, dir))
}

/// What went wrong with a file, without the number that the system has for it.
pub(super) fn describe_io(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such file or folder".to_owned(),
        io::ErrorKind::IsADirectory => "it is a folder".to_owned(),
        io::ErrorKind::NotADirectory => "it is no folder".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        _ => error.to_string(),
    }
}

fn check(
    text: &str,
    env: &Env<'_>,
    dir: &Path,
    probe: Probe,
    problems: &Problems,
) -> Option<Pipeline> {
    let manifest = manifest::read(text, env, problems)?;
    let checks = Checks { dir, problems };
    if manifest.stages.is_empty()
        && manifest
            .http
            .as_ref()
            .is_none_or(|http| http.routes.is_empty())
    {
        checks.report(
            Problem::of_file("the pipeline has no stage and no HTTP route, so it does nothing")
                .help("add a `[stages.NAME]` section"),
        );
    }
    flow::check(&checks, &manifest);
    if probe.components {
        components::check(&checks, &manifest);
    }
    if probe.files {
        files::check(&checks, &manifest);
    }
    if probe.ports {
        listen::check_ports(&checks, &manifest);
    }
    if probe.embedded {
        files::check_none_runs(&checks, &manifest);
    }
    assemble(&checks, manifest)
}

/// Every section is looked at, whatever the others hold.
fn assemble(checks: &Checks<'_>, manifest: Manifest) -> Option<Pipeline> {
    let named = manifest.name.filter(|name| checks.name("pipeline", name));
    let declared = Declared::of(&manifest.topics, &manifest.sql, &manifest.redis);
    let stages: Vec<_> = manifest
        .stages
        .iter()
        .map(|s| stages::stage(checks, &declared, s))
        .collect();
    let http = manifest
        .http
        .as_ref()
        .map(|h| http::http(checks, &declared, h));
    let kafka = manifest
        .kafka
        .as_ref()
        .map(|k| kafka::kafka(checks, k, &manifest.stages));
    let topics = kafka::topics(checks, &manifest.topics, manifest.kafka.as_ref());
    let sql = stores::sql(checks, &manifest.sql);
    let redis = stores::redis(checks, &manifest.redis);
    stores::check_shared_paths(checks, &manifest.sql, &manifest.redis);
    let admin = listen::admin(checks, manifest.admin.as_ref());
    let data_dir = manifest
        .data_dir
        .as_ref()
        .map_or(DEFAULT_DATA_DIR, |d| &d.value);
    Some(Pipeline {
        source: Source::default(),
        warnings: Vec::new(),
        name: named?.value,
        data_dir: checks.path(data_dir),
        shutdown_timeout: manifest
            .shutdown_timeout
            .map_or(DEFAULT_SHUTDOWN_TIMEOUT, |t| t.value),
        kafka: kafka??,
        topics: topics?,
        sql: sql?,
        redis: redis?,
        stages: stages.into_iter().collect::<Option<_>>()?,
        http: http.map_or(Some(None), |h| h.map(Some))?,
        admin: admin?,
    })
}

/// The names that stages and routes may refer to.
pub(super) struct Declared {
    pub(super) topics: BTreeSet<String>,
    pub(super) sql: BTreeSet<String>,
    pub(super) redis: BTreeSet<String>,
}

impl Declared {
    fn of(
        topics: &[manifest::TopicSection],
        sql: &[manifest::SqlSection],
        redis: &[manifest::RedisSection],
    ) -> Self {
        Self {
            topics: topics.iter().map(|t| t.name.value.clone()).collect(),
            sql: sql.iter().map(|s| s.name.value.clone()).collect(),
            redis: redis.iter().map(|s| s.name.value.clone()).collect(),
        }
    }
}
