//! Reads tables of a TOML document key by key, and reports every problem that it meets with its place.
//!
//! Serde stops at the first error; a user who mends a file wants to see all of them.

use std::ops::RangeInclusive;
use std::time::Duration;

use bytesize::ByteSize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::expand::{Env, ExpandError, expand};
use crate::diagnostics::{Problem, Problems, Span, suggestion};

/// A value with its place.
#[derive(Clone, Debug)]
pub(crate) struct At<T> {
    pub(crate) value: T,
    pub(crate) span: Span,
}

/// A string with its place, after `${…}` was replaced.
#[derive(Clone)]
pub(crate) struct Text {
    pub(crate) value: String,
    pub(crate) span: Span,
    written: Option<String>,
}

impl Text {
    /// The text as it stands in the file: what messages may show, since the value may be a secret.
    pub(crate) fn shown(&self) -> &str {
        self.written.as_deref().unwrap_or(&self.value)
    }
}

/// What reading needs beside the table at hand.
pub(crate) struct Reader<'a> {
    pub(crate) env: &'a Env<'a>,
    pub(crate) problems: &'a Problems,
}

/// One table of the file. Ask for every key that it may have, then [`finish`](Table::finish) it.
/// A getter that answers `None` for a key that is there, or is required, has reported why.
pub(crate) struct Table<'a> {
    reader: &'a Reader<'a>,
    /// As messages show it: `[stages.publisher]`.
    name: String,
    /// Its header, or its braces.
    pub(crate) span: Span,
    entries: &'a DeTable<'a>,
    known: Vec<&'static str>,
    /// Its own name was chosen by the user, as in `[topics.NAME]`.
    named: bool,
}

type Value<'a> = &'a Spanned<DeValue<'a>>;

impl<'a> Table<'a> {
    pub(crate) fn root(reader: &'a Reader<'a>, entries: &'a DeTable<'a>) -> Self {
        Self::new(reader, String::new(), 0..0, entries)
    }

    fn new(reader: &'a Reader<'a>, name: String, span: Span, entries: &'a DeTable<'a>) -> Self {
        Self {
            reader,
            name,
            span,
            entries,
            known: Vec::new(),
            named: false,
        }
    }

    /// Reports the keys that nobody asked for.
    pub(crate) fn finish(self) {
        for (key, value) in self.entries {
            let word = key.get_ref().as_ref();
            if self.known.contains(&word) {
                continue;
            }
            let dotted = self.named && value.get_ref().is_table();
            let help = suggestion(word, self.known.iter().copied(), |keys| {
                if dotted {
                    let (section, name) = self.name.split_once('.').unwrap_or(("", &self.name));
                    format!("a name with dots stands in quotes: `[{section}.\"{name}.{word}\"]`")
                } else {
                    format!("{} takes {keys}", self.place())
                }
            });
            self.report(
                Problem::at(
                    &key.span(),
                    format!("unknown key `{word}` in {}", self.place()),
                )
                .help(help),
            );
        }
    }

    pub(crate) fn text(&mut self, key: &'static str) -> Option<Text> {
        let value = self.get(key)?;
        self.read_text(key, value)
    }

    pub(crate) fn required_text(&mut self, key: &'static str, example: &str) -> Option<Text> {
        match self.get(key) {
            Some(value) => self.read_text(key, value),
            None => {
                self.missing(key, example);
                None
            }
        }
    }

    /// A list of strings; one string alone is an error that says how to write a list.
    pub(crate) fn texts(&mut self, key: &'static str) -> Option<At<Vec<Text>>> {
        let value = self.get(key)?;
        let DeValue::Array(items) = value.get_ref() else {
            let help = format!("write a list: `{key} = [\"…\"]`");
            self.wrong_type(key, value, "a list of strings", &help);
            return None;
        };
        let read: Vec<Text> = items
            .iter()
            .filter_map(|item| self.read_text(key, item))
            .collect();
        (read.len() == items.len()).then(|| At {
            value: read,
            span: value.span(),
        })
    }

    pub(crate) fn required_texts(
        &mut self,
        key: &'static str,
        example: &str,
    ) -> Option<At<Vec<Text>>> {
        if !self.entries.contains_key(key) {
            self.known.push(key);
            self.missing(key, example);
            return None;
        }
        self.texts(key)
    }

    /// A whole number, or a string made one by `${…}`.
    pub(crate) fn integer(
        &mut self,
        key: &'static str,
        range: RangeInclusive<i64>,
    ) -> Option<At<i64>> {
        let value = self.get(key)?;
        let help = format!(
            "write a whole number from {} to {}",
            range.start(),
            range.end()
        );
        let number = match value.get_ref() {
            DeValue::Integer(i) => i64::from_str_radix(i.as_str(), i.radix()).ok(),
            DeValue::String(s) if s.contains("${") => {
                self.read_text(key, value)?.value.parse().ok()
            }
            _ => {
                self.wrong_type(key, value, "a whole number", &help);
                return None;
            }
        };
        match number.filter(|n| range.contains(n)) {
            Some(number) => Some(At {
                value: number,
                span: value.span(),
            }),
            None => {
                let message = format!("`{key}` in {} is out of range", self.place());
                self.report(Problem::at(&value.span(), message).help(help));
                None
            }
        }
    }

    pub(crate) fn boolean(&mut self, key: &'static str) -> Option<bool> {
        let value = self.get(key)?;
        match value.get_ref() {
            DeValue::Boolean(b) => Some(*b),
            _ => {
                let help = format!("write `{key} = true` or `{key} = false`");
                self.wrong_type(key, value, "true or false", &help);
                None
            }
        }
    }

    /// A string such as `"100ms"`, `"5s"`, `"2m 30s"`.
    pub(crate) fn duration(
        &mut self,
        key: &'static str,
        range: RangeInclusive<Duration>,
    ) -> Option<At<Duration>> {
        let value = self.get(key)?;
        let help = "write a number and a unit in quotes, such as \"100ms\", \"5s\" or \"2m\"";
        if !matches!(value.get_ref(), DeValue::String(_)) {
            self.wrong_type(key, value, "a duration in quotes", help);
            return None;
        }
        let text = self.read_text(key, value)?;
        let Ok(duration) = humantime::parse_duration(&text.value) else {
            let message = format!("`{}` is not a duration", text.shown());
            self.report(Problem::at(&text.span, message).help(help));
            return None;
        };
        let (least, most) = (range.start(), range.end());
        self.in_range(
            key,
            At {
                value: duration,
                span: text.span,
            },
            range.contains(&duration),
            &format!(
                "write a duration from {} to {}",
                humantime::format_duration(*least),
                humantime::format_duration(*most)
            ),
        )
    }

    /// Bytes: a string such as `"64MiB"`, or a whole number.
    pub(crate) fn size(
        &mut self,
        key: &'static str,
        range: RangeInclusive<u64>,
    ) -> Option<At<u64>> {
        let value = self.get(key)?;
        let help = "write a size such as \"64MiB\", or a number of bytes";
        let size = match value.get_ref() {
            DeValue::Integer(i) => u64::from_str_radix(i.as_str(), i.radix()).ok(),
            DeValue::String(_) => {
                let text = self.read_text(key, value)?;
                text.value
                    .parse::<ByteSize>()
                    .ok()
                    .map(|size| size.as_u64())
            }
            _ => {
                self.wrong_type(key, value, "a size", help);
                return None;
            }
        };
        let Some(size) = size else {
            let message = format!("`{key}` in {} is not a size", self.place());
            self.report(Problem::at(&value.span(), message).help(help));
            return None;
        };
        let (least, most) = (ByteSize::b(*range.start()), ByteSize::b(*range.end()));
        let size = At {
            value: size,
            span: value.span(),
        };
        let inside = range.contains(&size.value);
        self.in_range(
            key,
            size,
            inside,
            &format!("write a size from {least} to {most}"),
        )
    }

    /// One of the words, each with what it means.
    pub(crate) fn choice<T: Copy>(
        &mut self,
        key: &'static str,
        words: &[(&str, T)],
    ) -> Option<At<T>> {
        let text = self.text(key)?;
        if let Some((_, meaning)) = words.iter().find(|(word, _)| *word == text.value) {
            return Some(At {
                value: *meaning,
                span: text.span,
            });
        }
        let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let help = suggestion(&text.value, words.iter().copied(), |all| {
            format!("it is one of {all}")
        });
        let message = format!("`{key}` can't be `{}`", text.shown());
        self.report(Problem::at(&text.span, message).help(help));
        None
    }

    /// Names and values of the user's own; numbers and truth values become text, and dotted names that
    /// are not in quotes are taken as they are meant.
    pub(crate) fn settings(&mut self, key: &'static str) -> Vec<(Text, Text)> {
        let Some(value) = self.get(key) else {
            return Vec::new();
        };
        let mut found = Vec::new();
        match value.get_ref() {
            DeValue::Table(entries) => self.collect_settings("", entries, &mut found),
            _ => self.wrong_type(
                key,
                value,
                "a table",
                &format!("write `{key} = {{ \"name\" = \"value\" }}`"),
            ),
        }
        found.sort_by_key(|(name, _)| name.span.start);
        found
    }

    fn collect_settings(
        &self,
        prefix: &str,
        entries: &'a DeTable<'a>,
        found: &mut Vec<(Text, Text)>,
    ) {
        for (key, value) in entries {
            let name = format!("{prefix}{}", key.get_ref());
            let plain = |text: String| Text {
                value: text,
                span: value.span(),
                written: None,
            };
            let read = match value.get_ref() {
                DeValue::Table(inner) => {
                    self.collect_settings(&format!("{name}."), inner, found);
                    continue;
                }
                DeValue::String(_) => self.read_text(&name, value),
                DeValue::Integer(i) => i64::from_str_radix(i.as_str(), i.radix())
                    .ok()
                    .map(|n| plain(n.to_string())),
                DeValue::Float(f) => Some(plain(f.as_str().to_owned())),
                DeValue::Boolean(b) => Some(plain(b.to_string())),
                DeValue::Array(_) | DeValue::Datetime(_) => {
                    self.wrong_type(&name, value, "a string", "write the value in quotes");
                    None
                }
            };
            if let Some(text) = read {
                let name = Text {
                    value: name,
                    span: key.span(),
                    written: None,
                };
                found.push((name, text));
            }
        }
    }

    pub(crate) fn table(&mut self, key: &'static str) -> Option<Table<'a>> {
        let value = self.get(key)?;
        match value.get_ref() {
            DeValue::Table(entries) => Some(self.inner(key, value.span(), entries)),
            _ => {
                self.wrong_type(key, value, "a table", &format!("write `{key} = {{ … }}`"));
                None
            }
        }
    }

    /// Where the value is, if it is a table.
    pub(crate) fn span_of_table(&self, key: &str) -> Option<Span> {
        let value = self.entries.get(key)?;
        value.get_ref().is_table().then(|| value.span())
    }

    /// `[[key]]` tables, or a list of inline ones.
    pub(crate) fn tables(&mut self, key: &'static str) -> Vec<Table<'a>> {
        let Some(value) = self.get(key) else {
            return Vec::new();
        };
        let help = format!("write it as `[[{}]]`", self.inner_name(key));
        let DeValue::Array(items) = value.get_ref() else {
            self.wrong_type(key, value, "a list of tables", &help);
            return Vec::new();
        };
        let mut tables = Vec::new();
        for item in items {
            match item.get_ref() {
                DeValue::Table(entries) => tables.push(self.inner(key, item.span(), entries)),
                _ => self.wrong_type(key, item, "a table", &help),
            }
        }
        tables
    }

    /// Tables under names of the user's own, in the order of the file.
    pub(crate) fn named_tables(&mut self, key: &'static str) -> Vec<(Text, Table<'a>)> {
        let Some(outer) = self.table(key) else {
            return Vec::new();
        };
        let mut tables = Vec::new();
        for (name, value) in outer.entries {
            let word = name.get_ref().to_string();
            match value.get_ref() {
                DeValue::Table(entries) => {
                    let mut table = outer.inner(&word, value.span(), entries);
                    table.named = true;
                    let name = Text {
                        value: word,
                        span: name.span(),
                        written: None,
                    };
                    tables.push((name, table));
                }
                _ => {
                    let help = format!("write it as `[{}]`", outer.inner_name(&word));
                    outer.wrong_type(&word, value, "a table", &help);
                }
            }
        }
        tables.sort_by_key(|(name, _)| name.span.start);
        tables
    }

    pub(crate) fn report(&self, problem: Problem) {
        self.reader.problems.report(problem);
    }

    /// How messages call this table.
    pub(crate) fn place(&self) -> String {
        if self.name.is_empty() {
            "the pipeline".to_owned()
        } else {
            format!("[{}]", self.name)
        }
    }

    pub(crate) fn missing(&self, key: &str, example: &str) {
        self.report(
            Problem::at(&self.span, format!("{} has no `{key}`", self.place()))
                .help(format!("add `{key} = {example}`")),
        );
    }

    /// Reports that a table is not there, unless the key is, and was reported.
    pub(crate) fn missing_table(&self, key: &str, example: &str) {
        if !self.entries.contains_key(key) {
            self.report(
                Problem::at(&self.span, format!("{} has no `[{key}]`", self.place()))
                    .help(format!("add `[{key}]` with `{example}`")),
            );
        }
    }

    fn get(&mut self, key: &'static str) -> Option<Value<'a>> {
        self.known.push(key);
        self.entries.get(key)
    }

    fn inner(&self, key: &str, span: Span, entries: &'a DeTable<'a>) -> Table<'a> {
        Table::new(self.reader, self.inner_name(key), span, entries)
    }

    fn inner_name(&self, key: &str) -> String {
        let bare = key
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
        let key = if bare {
            key.to_owned()
        } else {
            format!("{key:?}")
        };
        if self.name.is_empty() {
            key
        } else {
            format!("{}.{key}", self.name)
        }
    }

    fn read_text(&self, key: &str, value: Value<'a>) -> Option<Text> {
        let DeValue::String(written) = value.get_ref() else {
            self.wrong_type(key, value, "a string", "write it in quotes");
            return None;
        };
        match expand(written, self.reader.env) {
            Ok(expanded) => Some(Text {
                written: expanded.is_some().then(|| written.to_string()),
                value: expanded.unwrap_or_else(|| written.to_string()),
                span: value.span(),
            }),
            Err(errors) => {
                for error in errors {
                    self.report(expand_problem(&value.span(), error));
                }
                None
            }
        }
    }

    fn in_range<T>(&self, key: &str, value: At<T>, inside: bool, help: &str) -> Option<At<T>> {
        if inside {
            return Some(value);
        }
        let message = format!("`{key}` in {} is out of range", self.place());
        self.report(Problem::at(&value.span, message).help(help));
        None
    }

    fn wrong_type(&self, key: &str, value: Value<'a>, wanted: &str, help: &str) {
        let message = format!("`{key}` in {} must be {wanted}", self.place());
        let found = match value.get_ref() {
            DeValue::String(_) => "this is a string",
            DeValue::Integer(_) | DeValue::Float(_) => "this is a number",
            DeValue::Boolean(_) => "this is a truth value",
            DeValue::Datetime(_) => "this is a date",
            DeValue::Array(_) => "this is a list",
            DeValue::Table(_) => "this is a table",
        };
        self.report(Problem::at(&value.span(), message).label(found).help(help));
    }
}

fn expand_problem(span: &Span, error: ExpandError) -> Problem {
    match error {
        ExpandError::NotText(name) => Problem::at(
            span,
            format!("the environment variable {name} is not UTF-8"),
        )
        .help("write it in UTF-8; in a URL, percent-encode what is no ASCII"),
        ExpandError::Unset(name) => Problem::at(
            span,
            format!("the environment variable `{name}` is not set"),
        )
        .help(format!("set it, or give a default: `${{{name}:-…}}`")),
        ExpandError::Unclosed => Problem::at(span, "a `${` has no `}`")
            .help("write `${NAME}` or `${NAME:-default}`; `$${` stands for `${` itself"),
        ExpandError::BadName(name) => Problem::at(
            span,
            format!("`${{{name}}}` does not name an environment variable"),
        )
        .help("write `${NAME}` or `${NAME:-default}`; a default can't hold another `${…}`"),
    }
}
