//! The log: what the host, its stages and its libraries say, on stderr.
//!
//! [`format`] makes a line of it, [`budget`] says which may be written, [`escape`] keeps it one line, and [`queue`] has a
//! thread of its own write it.

mod budget;
mod escape;
mod format;
mod queue;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tracing::error;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::JsonFields;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt};

use self::budget::Budgets;
pub use self::escape::escaped;
use self::format::{Bounded, Fields};
use self::queue::Queue;
use crate::metrics::DroppedLines;

/// How long the end of the process waits for its last lines to be written.
const FLUSH_TIME: Duration = Duration::from_secs(1);

/// How lines are written.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// A JSON object a line
    Json,
}

/// The process's log. Dropping the last one waits a moment for what is not written yet.
#[derive(Clone)]
pub struct LogOutput(Arc<Output>);

struct Output(Arc<Queue>);

/// As the log is the process's own, so is what was dropped of it.
static BUDGETS: OnceLock<Arc<Budgets>> = OnceLock::new();

/// Lines of a stage were dropped by who would have written them; they are counted and said with the others.
pub fn dropped(stage: &str, lines: u64) {
    if let Some(budgets) = BUDGETS.get() {
        budgets.dropped(stage, lines);
    }
}

impl LogOutput {
    /// Has all that is said from here on written to stderr, panics included. Lines that are dropped are counted in `metric`.
    pub fn start(format: LogFormat, metric: DroppedLines) -> io::Result<Self> {
        let queue = Queue::new(metric.clone());
        let budgets = BUDGETS.get_or_init(|| Budgets::new(metric)).clone();
        let (written, said) = (queue.clone(), budgets.clone());
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || written.run(io::stderr(), &said))?;
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
        let lines = lines(format, budgets, Lines(queue.clone()));
        tracing_subscriber::registry()
            .with(lines.with_filter(filter))
            .init();
        std::panic::set_hook(Box::new(|panic| {
            let backtrace = Backtrace::capture();
            match backtrace.status() {
                BacktraceStatus::Captured => error!(%backtrace, "{panic}"),
                _ => error!("{panic}"),
            }
        }));
        Ok(Self(Arc::new(Output(queue))))
    }

    /// Writes a text of the host's own as it is, behind what was said before.
    pub fn print(&self, text: &str) {
        self.0.0.push(text.as_bytes());
    }

    /// Waits a moment for what is not written yet.
    pub fn flush(&self) {
        self.0.flush();
    }
}

impl Output {
    fn flush(&self) {
        if let Some(budgets) = BUDGETS.get() {
            budgets.say();
        }
        self.0.flush(FLUSH_TIME);
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.flush();
    }
}

fn lines(
    format: LogFormat,
    budgets: Arc<Budgets>,
    writer: Lines,
) -> Box<dyn Layer<Registry> + Send + Sync> {
    // Said of the layer too, for the fields of spans.
    let is_coloured = io::stderr().is_terminal();
    let layer = fmt::layer().with_writer(writer).with_ansi(is_coloured);
    match format {
        LogFormat::Text => {
            let format = fmt::format().with_target(false).with_ansi(is_coloured);
            let bounded = Bounded {
                format,
                budgets,
                is_json: false,
            };
            layer.fmt_fields(Fields).event_format(bounded).boxed()
        }
        LogFormat::Json => {
            let bounded = Bounded {
                format: fmt::format().json().flatten_event(true),
                budgets,
                is_json: true,
            };
            layer
                .fmt_fields(JsonFields::new())
                .event_format(bounded)
                .boxed()
        }
    }
}

/// Leaves each line to the queue.
struct Lines(Arc<Queue>);

impl MakeWriter<'_> for Lines {
    type Writer = Line;

    fn make_writer(&self) -> Self::Writer {
        Line(self.0.clone())
    }
}

struct Line(Arc<Queue>);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
