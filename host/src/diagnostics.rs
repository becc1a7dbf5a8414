//! Problems of a pipeline file, shown with their place as rustc shows them.

pub(crate) mod secrets;

use std::cell::RefCell;
use std::fmt;
use std::io::IsTerminal;
use std::ops::Range;

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer, Snippet};

/// Bytes of the pipeline file, from the first to past the last.
pub type Span = Range<usize>;

/// One thing that is wrong in a pipeline file.
#[derive(Clone, Debug)]
pub struct Problem {
    /// Where; `None` for the file as a whole.
    span: Option<Span>,
    message: String,
    label: String,
    also: Vec<(Span, String)>,
    help: Option<String>,
    is_warning: bool,
}

/// Bytes of a problem's words. They quote the file, where a name can be as long as the file.
const MAX_WORDS: usize = 2000;

impl Problem {
    /// A problem with the text at `span`.
    pub fn at(span: &Span, message: impl Into<String>) -> Self {
        Self {
            span: Some(span.clone()),
            ..Self::of_file(message)
        }
    }

    /// A problem that has no place in the file's text.
    pub fn of_file(message: impl Into<String>) -> Self {
        Self {
            span: None,
            message: shortened(message.into()),
            label: String::new(),
            also: Vec::new(),
            help: None,
            is_warning: false,
        }
    }

    /// What may be meant, and is no reason to refuse the file.
    pub fn warning(mut self) -> Self {
        self.is_warning = true;
        self
    }

    /// Adds a few words under the place.
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.label = shortened(label.into());
        self
    }

    /// Points at a second place that has to do with it.
    pub fn also(mut self, span: &Span, label: impl Into<String>) -> Self {
        self.also.push((span.clone(), shortened(label.into())));
        self
    }

    /// Adds the mend.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(shortened(help.into()));
        self
    }
}

fn shortened(mut words: String) -> String {
    if words.len() > MAX_WORDS {
        words.truncate(words.floor_char_boundary(MAX_WORDS));
        words.push('…');
    }
    words
}

/// Problems of a file that are kept: who has so many begins with the first ones.
const MAX_KEPT: usize = 1000;

/// Where checks put what they find, so that each can go on and find more.
#[derive(Debug, Default)]
pub(crate) struct Problems(RefCell<Vec<Problem>>);

impl Problems {
    pub(crate) fn report(&self, problem: Problem) {
        let mut kept = self.0.borrow_mut();
        if kept.len() < MAX_KEPT {
            kept.push(problem);
        } else if !problem.is_warning
            && let Some(warning) = kept.iter().rposition(|kept| kept.is_warning)
        {
            // Whether a pipeline may run rests on its errors.
            kept[warning] = problem;
        }
    }

    /// Whether no more are kept.
    pub(crate) fn are_enough(&self) -> bool {
        self.0.borrow().len() >= MAX_KEPT
    }

    /// Whether there is none but warnings.
    pub(crate) fn are_warnings(&self) -> bool {
        self.0.borrow().iter().all(|problem| problem.is_warning)
    }

    pub(crate) fn into_vec(self) -> Vec<Problem> {
        self.0.into_inner()
    }

    /// Those that are more than warnings, which may follow from them.
    pub(crate) fn into_errors(self) -> Vec<Problem> {
        let mut problems = self.0.into_inner();
        problems.retain(|problem| !problem.is_warning);
        problems
    }
}

/// Problems that are printed: a file that is none of ours has one a line.
const MAX_SHOWN: usize = 50;

/// All problems of one pipeline file, in the order of their places. `Display` is plain text.
#[derive(Debug)]
pub struct Diagnostics {
    path: String,
    text: String,
    problems: Vec<Problem>,
}

impl Diagnostics {
    /// `path` as the user wrote it; `text` is what the spans count in.
    pub fn new(
        path: impl Into<String>,
        text: impl Into<String>,
        mut problems: Vec<Problem>,
    ) -> Self {
        let start = |p: &Problem| p.span.as_ref().map(|s| (s.start, s.end));
        problems.sort_by(|a, b| {
            start(a)
                .cmp(&start(b))
                .then_with(|| a.message.cmp(&b.message))
        });
        Self {
            path: path.into(),
            text: secrets::masked(&text.into()),
            problems,
        }
    }

    /// How many problems there are, at least one.
    pub fn count(&self) -> usize {
        self.problems.len()
    }

    /// The places that the problems name.
    pub fn places(&self) -> impl Iterator<Item = &Span> {
        self.problems.iter().flat_map(|problem| {
            let also = problem.also.iter().map(|(span, _)| span);
            problem.span.iter().chain(also)
        })
    }

    /// Prints them to stderr, in colour where that is a terminal and `NO_COLOR` is not set.
    pub fn print(&self) {
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        let coloured = std::io::stderr().is_terminal() && !no_color;
        let renderer = if coloured {
            Renderer::styled()
        } else {
            Renderer::plain()
        };
        eprint!("{}", self.render(&renderer));
    }

    fn render(&self, renderer: &Renderer) -> String {
        let mut out = String::new();
        for problem in self.problems.iter().take(MAX_SHOWN) {
            out.push_str(&renderer.render(&[self.group(problem)]));
            out.push_str("\n\n");
        }
        if let Some(more @ 1..) = self.problems.len().checked_sub(MAX_SHOWN) {
            out.push_str(&format!("… and {more} more\n\n"));
        }
        let are_warnings = self.problems.iter().all(|problem| problem.is_warning);
        let what = if are_warnings { "warning" } else { "problem" };
        let count = match self.problems.len() {
            1 => format!("1 {what}"),
            MAX_KEPT.. => format!("{MAX_KEPT} {what}s or more"),
            n => format!("{n} {what}s"),
        };
        let counted = match are_warnings {
            true => count,
            false => count + "; nothing was started",
        };
        out.push_str(&format!("{}: {counted}\n", self.path));
        out
    }

    fn group<'a>(&'a self, problem: &'a Problem) -> Group<'a> {
        let level = match problem.is_warning {
            true => Level::WARNING,
            false => Level::ERROR,
        };
        let title = level.primary_title(&problem.message);
        let mut group = match &problem.span {
            None => title.element(Origin::path(&*self.path)),
            Some(span) => {
                let primary = AnnotationKind::Primary.span(self.clip(span));
                let also = problem.also.iter().map(|(span, label)| {
                    AnnotationKind::Context
                        .span(self.clip(span))
                        .label(label.as_str())
                });
                title.element(
                    Snippet::source(&*self.text)
                        .path(&*self.path)
                        .annotation(primary.label(Some(&*problem.label).filter(|l| !l.is_empty())))
                        .annotations(also),
                )
            }
        };
        if let Some(help) = &problem.help {
            group = group.element(Level::HELP.message(help));
        }
        group
    }

    /// The span's first line, inside the text and on character boundaries, as the renderer needs it.
    fn clip(&self, span: &Span) -> Span {
        let floor = |at: usize| self.text.floor_char_boundary(at.min(self.text.len()));
        let start = floor(span.start);
        let end = floor(span.end.max(start));
        let line = self.text[start..end]
            .lines()
            .next()
            .unwrap_or_default()
            .len();
        start..start + line
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(&Renderer::plain()))
    }
}

impl std::error::Error for Diagnostics {}

/// Characters of a word that is compared with others.
const MAX_WORD: usize = 100;

/// The candidate that `word` is most likely a slip of, if one is near enough.
pub(crate) fn nearest<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let len = word.chars().count();
    let reach = (len / 3).clamp(1, 3);
    candidates
        .into_iter()
        .filter(|c| len <= MAX_WORD && c.chars().count().abs_diff(len) <= reach)
        .map(|c| {
            (
                strsim::osa_distance(&word.to_lowercase(), &c.to_lowercase()),
                c,
            )
        })
        .filter(|(distance, _)| *distance <= reach)
        .min()
        .map(|(_, c)| c)
}

/// Bytes of the words that a list names.
const MAX_LISTED: usize = 1000;

/// `` `a`, `b` and `c` ``; of very many, the first.
pub(crate) fn quoted_list<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    let mut listed = 0;
    let mut words = words.into_iter().peekable();
    let mut quoted = Vec::new();
    while let Some(word) = words.next_if(|word| listed + word.len() <= MAX_LISTED) {
        listed += word.len();
        quoted.push(format!("`{word}`"));
    }
    if words.peek().is_some() {
        quoted.push("others".to_owned());
    }
    match quoted.as_slice() {
        [] => "nothing".to_owned(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

/// ``did you mean `x`?`` for a near candidate, else the list of candidates as `kind`.
pub(crate) fn suggestion<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str> + Clone,
    otherwise: impl FnOnce(String) -> String,
) -> String {
    match nearest(word, candidates.clone()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => otherwise(quoted_list(candidates)),
    }
}
