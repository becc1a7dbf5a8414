//! The stages' component files: there, of the right kind, and importing no more than was granted.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::load::{Checks, describe_io};
use super::stages::{sql_sections, texts};
use crate::component::inspect::{
    InspectError, MAX_COMPONENT_BYTES, Needs, STAGE_VERSION, World, inspect, needs,
};
use crate::diagnostics::{Problem, quoted_list};
use crate::manifest::{Manifest, OrderWord, StageSection, Text};

const BUILD_HELP: &str =
    "build the stage for the target `wasm32-wasip2`, whose files are components";

pub(super) fn check(checks: &Checks<'_>, manifest: &Manifest) {
    for stage in &manifest.stages {
        let Some(component) = &stage.component else {
            continue;
        };
        let bytes = match read(&checks.path(&component.value)) {
            Ok(bytes) => bytes,
            Err(error) => {
                checks.report(unreadable(component, &error));
                continue;
            }
        };
        match inspect(&bytes) {
            Ok(inspection) => {
                if inspection.world == World::BatchHandler {
                    check_order(checks, stage, component);
                }
                for import in &inspection.imports {
                    check_import(checks, manifest, stage, component, import);
                }
            }
            Err(error) => checks.report(no_stage(component, error)),
        }
    }
}

/// At most one byte more than a component may have.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(MAX_COMPONENT_BYTES + 1)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn unreadable(component: &Text, error: &io::Error) -> Problem {
    Problem::at(
        &component.span,
        format!("the component `{}` can't be read", component.shown()),
    )
    .label(describe_io(error))
    .help("build the stage first, or correct the path, which is relative to this file")
}

fn no_stage(component: &Text, error: InspectError) -> Problem {
    let is_not = format!("`{}` is not a component", component.shown());
    let (message, label, help) = match error {
        InspectError::TooLarge => (
            format!("the component `{}` is too large", component.shown()),
            error.to_string(),
            "build it in release mode and strip it".to_owned(),
        ),
        InspectError::NotWasm => (is_not, error.to_string(), BUILD_HELP.to_owned()),
        InspectError::Text => (
            is_not,
            error.to_string(),
            "translate it with `wasm-tools parse`".to_owned(),
        ),
        InspectError::Damaged(_) => (
            is_not,
            error.to_string(),
            "build the stage again".to_owned(),
        ),
        InspectError::CoreModule => (
            is_not,
            "it is a core module".to_owned(),
            BUILD_HELP.to_owned(),
        ),
        InspectError::NoHandler { exports } => (
            format!("the component `{}` is not a stage", component.shown()),
            format!(
                "it exports neither `handler` nor `batch-handler` of stagehost:stage@{STAGE_VERSION}"
            ),
            match exports.as_slice() {
                [] => "it exports nothing at all: implement a handler, as the SDK shows".to_owned(),
                exports => format!(
                    "it exports {}: implement a handler of stagehost:stage@{STAGE_VERSION}, as the SDK shows",
                    quoted_list(exports.iter().map(String::as_str))
                ),
            },
        ),
        InspectError::BothHandlers => (
            format!(
                "the component `{}` is two stages at once",
                component.shown()
            ),
            error.to_string(),
            "implement one of them".to_owned(),
        ),
    };
    Problem::at(&component.span, message)
        .label(label)
        .help(help)
}

/// For a component that takes all messages at hand in one call.
fn check_order(checks: &Checks<'_>, stage: &StageSection, component: &Text) {
    if let Some(order) = (stage.order.as_ref()).filter(|word| word.value != OrderWord::Partition) {
        checks.report(
            Problem::at(
                &order.span,
                format!(
                    "`{}` takes a partition's messages in batches, so their order is the partition's",
                    stage.name.value
                ),
            )
            .also(&component.span, "this component exports `batch-handler`")
            .help("leave `order` and `concurrency` out, or build it with `handler`"),
        );
    }
}

fn check_import(
    checks: &Checks<'_>,
    manifest: &Manifest,
    stage: &StageSection,
    component: &Text,
    import: &str,
) {
    let name = &stage.name.value;
    let not_granted = |what: &str, help: String| {
        let message = format!("`{name}` imports `{import}`, and is granted no {what}");
        checks.report(
            Problem::at(&component.span, message)
                .also(&stage.span, "its grants are here")
                .help(help),
        );
    };
    match needs(import) {
        Needs::Nothing => {}
        Needs::Sql if sql_sections(stage).is_empty() => {
            let store = manifest.sql.first().map_or("my-store", |s| &s.name.value);
            not_granted("SQL store", format!("add `sql = [\"{store}\"]`, or build it without the import"));
        }
        Needs::Redis if stage.redis.is_empty() => {
            let store = manifest.redis.first().map_or("my-store", |s| &s.name.value);
            not_granted(
                "Redis store",
                format!("add `redis = {{ {store} = {{ prefix = \"my-keys:\" }} }}`, or build it without the import"),
            );
        }
        Needs::Output if texts(stage.output.as_ref()).is_empty() => {
            not_granted("topic to produce to", "add `output = [\"a-topic\"]`, or build it without the import".to_owned());
        }
        Needs::Sql | Needs::Redis | Needs::Output => {}
        Needs::OtherVersion => checks.report(
            Problem::at(&component.span, format!("`{name}` imports `{import}`, and this host has version {STAGE_VERSION}"))
                .help("build it with the SDK of this host"),
        ),
        Needs::Unknown => checks.report(
            Problem::at(&component.span, format!("`{name}` imports `{import}`, which this host does not offer")).help(
                "build it without; a stage has stagehost:stage (sql, redis, producer), wasi:config, wasi:logging and the basics of WASI 0.2",
            ),
        ),
    }
}
