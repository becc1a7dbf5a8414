//! A line of the log: within its stage's budget, within a length, and one line whatever is in it. What goes into the log
//! goes through here, so that no place that says something has to think of it.

use std::fmt::{self, Write};
use std::sync::Arc;

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::budget::Budgets;
use super::escape::{Escaping, escaped_json};

/// Bytes of a line.
const MAX_LINE: usize = 64 << 10;

/// Lines as `format` makes them, as far as they may be written.
pub(super) struct Bounded<F> {
    pub(super) format: F,
    pub(super) budgets: Arc<Budgets>,
    pub(super) is_json: bool,
}

impl<S, N, F> FormatEvent<S, N> for Bounded<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut of = Stage::default();
        event.record(&mut of);
        let Stage(stage) = of;
        let metadata = event.metadata();
        if !self.budgets.admits(metadata, &stage) {
            return Ok(());
        }
        let mut line = String::new();
        self.format
            .format_event(context, Writer::new(&mut line), event)?;
        if self.is_json {
            line = escaped_json(line.trim_end_matches('\n'));
        } else {
            line.truncate(line.trim_end_matches('\n').len());
        }
        if line.len() > MAX_LINE && self.is_json {
            // Half of it would be no JSON.
            self.budgets.dropped(&stage, 1);
            return Ok(());
        }
        if line.len() > MAX_LINE {
            line.truncate(line.floor_char_boundary(MAX_LINE));
            line.push('…');
        }
        line.push('\n');
        self.budgets.charge(metadata, &stage, line.len());
        writer.write_str(&line)
    }
}

/// The field `stage` of an event.
#[derive(Default)]
struct Stage(String);

impl Visit for Stage {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "stage" {
            value.clone_into(&mut self.0);
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
}

/// An event's fields as text: the message, then `name=value` each, escaped.
pub(super) struct Fields;

impl<'w> FormatFields<'w> for Fields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'w>, fields: R) -> fmt::Result {
        let mut visitor = Text {
            writer,
            is_first: true,
            result: Ok(()),
        };
        fields.record(&mut visitor);
        visitor.result
    }
}

struct Text<'w> {
    writer: Writer<'w>,
    is_first: bool,
    result: fmt::Result,
}

impl Text<'_> {
    fn write(&mut self, name: &str, value: fmt::Arguments<'_>) -> fmt::Result {
        if !std::mem::take(&mut self.is_first) {
            self.writer.write_char(' ')?;
        }
        if name != "message" {
            match self.writer.has_ansi_escapes() {
                true => write!(self.writer, "\u{1b}[3m{name}\u{1b}[0m\u{1b}[2m=\u{1b}[0m")?,
                false => write!(self.writer, "{name}=")?,
            }
        }
        Escaping(&mut self.writer).write_fmt(value)
    }
}

impl Visit for Text<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // What libraries that use the crate `log` say of their place.
        let is_place = field.name().starts_with("log.");
        if self.result.is_ok() && !is_place {
            self.result = self.write(field.name(), format_args!("{value:?}"));
        }
    }
}
