//! `host check`: reads a pipeline as `run` would, says what is wrong or what it is, and starts nothing.

use std::fmt::Write as _;
use std::path::PathBuf;

use crate::pipeline::{Action, Brokers, Delivery, Order, Pipeline, Probe, Stage};

/// Check a pipeline file, its components and its addresses, and start nothing.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// The pipeline file.
    #[arg(value_name = "PIPELINE", default_value = "pipeline.toml")]
    pipeline: PathBuf,
    /// Leave out whether the listen addresses and the data-dir are free, for a pipeline that is running.
    #[arg(long)]
    skip_ports: bool,
}

/// Prints the pipeline's problems to stderr, or what it is to stdout, and what may be a slip to stderr.
pub async fn run(args: &CheckArgs) -> anyhow::Result<()> {
    let env = super::variable;
    let probe = Probe {
        ports: !args.skip_ports,
        embedded: !args.skip_ports,
        ..Probe::ALL
    };
    let pipeline = Pipeline::load(&args.pipeline, &env, probe)?;
    crate::run::components::check(&pipeline).await?;
    let warnings = pipeline.warnings();
    if let Some(warnings) = &warnings {
        warnings.print();
    }
    let fine = match warnings {
        Some(_) => "fine, but for the warnings",
        None => "fine",
    };
    let path = args.pipeline.display();
    print!("{path}: {fine}\n\n{}", summary(&pipeline));
    Ok(())
}

/// A few lines, one a stage, a route and a store.
pub fn summary(pipeline: &Pipeline) -> String {
    let mut rows = vec![row("pipeline", &pipeline.name)];
    rows.push(row("log", &log(pipeline)));
    for (name, store) in &pipeline.sql {
        rows.push(row("sql", &format!("{name}: {}", store.url)));
    }
    for (name, store) in &pipeline.redis {
        rows.push(row("redis", &format!("{name}: {}", store.url)));
    }
    for each in &pipeline.stages {
        rows.push(row("stage", &stage(each)));
    }
    if let Some(http) = &pipeline.http {
        rows.push(row("http", &format!("listens on {}", http.listen)));
        for route in &http.routes {
            let does = match &route.action {
                Action::Produce { topic, .. } => format!("→ {topic}"),
                Action::Read { store, key } => format!("← {store} {key}"),
            };
            rows.push(row(
                "route",
                &format!("{} {} {does}", route.method, route.path),
            ));
        }
    }
    rows.push(row(
        "admin",
        &format!("listens on {}", pipeline.admin.listen),
    ));
    rows.concat()
}

fn row(kind: &str, text: &str) -> String {
    format!("{kind:<9} {text}\n")
}

fn log(pipeline: &Pipeline) -> String {
    match &pipeline.kafka.brokers {
        Brokers::Embedded { .. } => format!(
            "embedded broker, files under {}",
            pipeline.data_dir.display()
        ),
        Brokers::Remote(brokers) => format!("Kafka at {brokers}"),
    }
}

fn stage(stage: &Stage) -> String {
    let mut line = format!("{}: {}", stage.name, stage.input.join(", "));
    if !stage.output.is_empty() {
        let _ = write!(line, " → {}", stage.output.join(", "));
    }
    let _ = write!(line, "  group {}", stage.group);
    for store in stage.sql.keys().chain(stage.redis.keys()) {
        let _ = write!(line, "  store {store}");
    }
    line.push_str(match (stage.delivery, stage.order) {
        (Delivery::Transactional, _) => "  transactional",
        (Delivery::AtLeastOnce, Order::Partition) => "  at least once",
        (Delivery::AtLeastOnce, Order::Key) => "  at least once, in each key's order",
        (Delivery::AtLeastOnce, Order::None) => "  at least once, in no order",
    });
    line
}
