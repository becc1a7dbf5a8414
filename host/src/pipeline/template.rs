//! The keys that read routes make of a path: texts with `{name}`s, such as `post:{slug}`.
//!
//! A key must be of its own route only. So a value may not contain what separates the parts of its template, and two
//! templates of one store may not be able to make the same key.

use std::fmt;

/// A text with `{name}`s.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    /// A named part of the path.
    Param(String),
}

/// Why there is no key for some values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoKey {
    /// The value is malformed, and how.
    Malformed(String),
    /// The value is fine, and no key of this template has it.
    NotHere,
}

/// What a template is made of, as far as it matters which keys it makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Char(char),
    /// Any characters but separators, at least one.
    Value,
}

impl Template {
    /// Reads a template. A brace that opens no name stands for itself.
    pub fn parse(key: &str) -> Self {
        let mut parts = Vec::new();
        let mut rest = key;
        while let Some((before, (name, after))) = rest
            .split_once('{')
            .and_then(|(before, after)| Some((before, after.split_once('}')?)))
        {
            if !before.is_empty() {
                parts.push(Part::Text(before.to_owned()));
            }
            parts.push(Part::Param(name.to_owned()));
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        Self { parts }
    }

    /// The key for the decoded values of the `{name}`s.
    pub fn key<'v>(&self, value: impl Fn(&str) -> Option<&'v str>) -> Result<String, NoKey> {
        let mut key = String::new();
        for part in &self.parts {
            match part {
                Part::Text(text) => key.push_str(text),
                Part::Param(name) => {
                    let value = value(name).unwrap_or_default();
                    if value.chars().any(char::is_control) {
                        let why = format!("{name} in the path has a control character");
                        return Err(NoKey::Malformed(why));
                    }
                    if value.is_empty() || value.chars().any(|c| self.separates(c)) {
                        return Err(NoKey::NotHere);
                    }
                    key.push_str(value);
                }
            }
        }
        Ok(key)
    }

    /// Whether the template makes one key only.
    pub fn is_plain(&self) -> bool {
        !self.parts.iter().any(|part| matches!(part, Part::Param(_)))
    }

    /// Two `{name}`s whose values can't be told apart in a key, since nothing separates them.
    pub fn confused_names(&self) -> Option<(&str, &str)> {
        let mut last: Option<&str> = None;
        for part in &self.parts {
            match part {
                Part::Text(text) if text.chars().any(|c| self.separates(c)) => last = None,
                Part::Text(_) => {}
                Part::Param(name) => {
                    if let Some(last) = last {
                        return Some((last, name));
                    }
                    last = Some(name);
                }
            }
        }
        None
    }

    /// Whether both make the same keys: they are the same but for the names.
    pub fn is_like(&self, other: &Self) -> bool {
        self.steps() == other.steps()
    }

    /// Whether there is a key that both make: walks through both at once, a character of the key at a time. A row is about a step
    /// of this one, and says at which steps of the other one may be then.
    pub fn overlaps(&self, other: &Self) -> bool {
        let (a, b) = (self.steps(), other.steps());
        let mut row = vec![false; b.len() + 1];
        row[0] = true;
        for &x in &a {
            let mut next = vec![false; b.len() + 1];
            for (j, &y) in b.iter().enumerate() {
                let is_both = row[j]
                    && match (x, y) {
                        (Step::Char(x), Step::Char(y)) => x == y,
                        (Step::Char(c), Step::Value) => other.takes(c),
                        (Step::Value, Step::Char(c)) => self.takes(c),
                        (Step::Value, Step::Value) => true,
                    };
                next[j + 1] |= is_both;
                next[j] |= is_both && y == Step::Value;
                row[j + 1] |= is_both && x == Step::Value;
            }
            if !next.contains(&true) {
                return false;
            }
            row = next;
        }
        row[b.len()]
    }

    fn takes(&self, c: char) -> bool {
        !c.is_control() && !self.separates(c)
    }

    /// Whether the character separates parts of a key: a sign in the template's text. `-`, `_` and `.` are part of many
    /// names and values, so they do only beside a `{name}` or between two.
    fn separates(&self, c: char) -> bool {
        if c.is_alphanumeric() {
            return false;
        }
        let is_in_names = matches!(c, '-' | '_' | '.');
        let (first, last) = (0, self.parts.len().saturating_sub(1));
        self.parts.iter().enumerate().any(|(at, part)| {
            let Part::Text(text) = part else {
                return false;
            };
            match is_in_names {
                false => text.contains(c),
                true if at == first && at == last => false,
                true if at == first => text.ends_with(c),
                true if at == last => text.starts_with(c),
                true => text.contains(c),
            }
        })
    }

    fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for part in &self.parts {
            match part {
                Part::Text(text) => steps.extend(text.chars().map(Step::Char)),
                Part::Param(_) => steps.push(Step::Value),
            }
        }
        steps
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.parts.iter().try_for_each(|part| match part {
            Part::Text(text) => f.write_str(text),
            Part::Param(name) => write!(f, "{{{name}}}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts() {
        let check = |key: &str, expected: &[Part]| {
            let template = Template::parse(key);
            assert_eq!(template.parts, expected, "{key}");
            assert_eq!(template.to_string(), key);
        };
        let text = |text: &str| Part::Text(text.to_owned());
        let param = |name: &str| Part::Param(name.to_owned());
        check("post:{slug}", &[text("post:"), param("slug")]);
        check("{a}{b}:c", &[param("a"), param("b"), text(":c")]);
        check("plain", &[text("plain")]);
        check("post:{slug", &[text("post:{slug")]);
    }

    #[test]
    fn no_value_crosses_a_separator_of_its_template() {
        let check = |template: &str, value: &str, expected: Option<&str>| {
            let key = Template::parse(template).key(|_| Some(value));
            let expected = expected.map(str::to_owned).ok_or(NoKey::NotHere);
            assert_eq!(key, expected, "{template} with {value:?}");
        };
        check("post:{slug}", "a-b.c_d/e ü", Some("post:a-b.c_d/e ü"));
        check("post:{slug}", "uid:X", None);
        check("post:{slug}", ":", None);
        check("post:{slug}", "", None);
        check("my-blog:post:{slug}", "a-b", Some("my-blog:post:a-b"));
        check("post-{slug}", "uid-X", None);
        check("post-{slug}", "uid_X", Some("post-uid_X"));
        check("{slug}.json", "a.json", None);
        check("p/{a}v-1w:{b}", "a-b", None);
        check("posts {a}", "a b", None);
        let malformed = Template::parse("{a}").key(|_| Some("a\nb"));
        assert!(matches!(malformed, Err(NoKey::Malformed(_))));
    }

    #[test]
    fn names_that_nothing_separates() {
        let check = |key: &str, expected| {
            assert_eq!(Template::parse(key).confused_names(), expected, "{key}");
        };
        check("{a}{b}", Some(("a", "b")));
        check("x:{a}y{b}", Some(("a", "b")));
        check("{a}:{b}{c}", Some(("b", "c")));
        check("{a}:{b}-{c}", None);
        check("{a}v.{b}", None);
        check("post:{slug}", None);
    }

    #[test]
    fn templates_that_make_the_same_key() {
        let check = |one: &str, other: &str, expected| {
            let (a, b) = (Template::parse(one), Template::parse(other));
            assert_eq!(a.overlaps(&b), expected, "{one} and {other}");
            assert_eq!(b.overlaps(&a), expected, "{other} and {one}");
        };
        check("post:{slug}", "post:uid:{uid}", false);
        check("post:{slug}", "tag:{slug}", false);
        check("post:{slug}", "post:{id}", true);
        check("post:{slug}", "{x}:y", true);
        check("post:{slug}", "post:latest", true);
        check("post:{slug}", "post:uid:latest", false);
        check("post:{slug}", "post:x{y}", true);
        check("post:{slug}", "post:a-{x}", true);
        check("post-{slug}", "post-a-{x}", false);
        check("{a}:{b}", "post:{slug}", true);
        check("{a}:{b}", "post:uid:{slug}", false);
        check("{a}", "{b}:x", true);
        check("{a}", "x", true);
        check("", "x", false);
        check("{a}", "", false);
    }
}
