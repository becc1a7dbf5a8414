//! Templates of keys, such as `post:{slug}`, with values out of paths that anybody may ask for.

use std::collections::BTreeMap;

use host::pipeline::{NoKey, Template};

use crate::memory::within;

/// Names of the templates that are tried: enough for values that might be confused.
const MAX_NAMES: usize = 3;
/// Characters of a key whose other readings are looked for: one by one.
const MAX_KEY: usize = 24;
const AT_FIRST: usize = 64 << 10;
const TIMES: usize = 1 << 10;

/// A key begins as its template does, and comes of one choice of values only, where the template is one that a pipeline may
/// have. What one template makes of any path, another with which it does not overlap can't make of any.
pub(crate) fn check(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let mut lines = text.splitn(2 + MAX_NAMES, '\n');
    let mut next = || lines.next().unwrap_or_default();
    let (one, other) = (next(), next());
    let values: Vec<&str> = (0..MAX_NAMES).map(|_| next()).collect();
    let (one, other) = (Shape::new(one), Shape::new(other));
    if ![&one, &other].into_iter().all(Shape::is_of_a_pipeline) {
        return;
    }
    let most = AT_FIRST + TIMES * bytes.len();
    let overlap = within(most, || one.template.overlaps(&other.template));
    assert_eq!(overlap, other.template.overlaps(&one.template));
    assert!(one.template.overlaps(&one.template) || one.key(&["x"; MAX_NAMES]).is_err());
    let key = match within(most, || one.key(&values)) {
        Ok(key) => key,
        Err(NoKey::Malformed(why)) => return assert!(!why.contains(char::is_control), "{why:?}"),
        Err(NoKey::NotHere) => return,
    };
    assert!(
        key.starts_with(one.prefix),
        "{key:?} begins otherwise than {}",
        one.text
    );
    if key.chars().count() > MAX_KEY {
        return;
    }
    let readings = one.readings(&key);
    if one.template.confused_names().is_none() {
        assert_eq!(readings.len(), 1, "{key:?} is of {readings:?}");
    }
    if !overlap {
        let others = other.readings(&key);
        assert!(
            others.is_empty(),
            "{} makes {key:?} too, of {others:?}",
            other.text
        );
    }
}

/// A template, and what a plain look at its text finds.
struct Shape<'a> {
    text: &'a str,
    template: Template,
    pieces: Vec<Piece<'a>>,
    /// What comes before the first name.
    prefix: &'a str,
    /// Each once.
    names: Vec<&'a str>,
}

#[derive(Clone, Copy)]
enum Piece<'a> {
    Text(&'a str),
    Name(&'a str),
}

impl<'a> Shape<'a> {
    fn new(text: &'a str) -> Self {
        let (mut pieces, mut names) = (Vec::new(), Vec::new());
        let mut rest = text;
        while let Some((before, (name, after))) = rest
            .split_once('{')
            .and_then(|(before, after)| Some((before, after.split_once('}')?)))
        {
            pieces.extend([Piece::Text(before), Piece::Name(name)]);
            if !names.contains(&name) {
                names.push(name);
            }
            rest = after;
        }
        pieces.push(Piece::Text(rest));
        let prefix = match pieces[0] {
            Piece::Text(text) | Piece::Name(text) => text,
        };
        Self {
            text,
            template: Template::parse(text),
            pieces,
            prefix,
            names,
        }
    }

    /// Whether it has so few names, and each is one that a path may have.
    fn is_of_a_pipeline(&self) -> bool {
        let is_name = |name: &&str| {
            !name.is_empty()
                && name
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
        };
        self.names.len() <= MAX_NAMES && self.names.iter().all(is_name)
    }

    fn key(&self, values: &[&str]) -> Result<String, NoKey> {
        let values: BTreeMap<&str, &str> = self.named(values).collect();
        self.template.key(|name| values.get(name).copied())
    }

    fn named<'v>(&self, values: &[&'v str]) -> impl Iterator<Item = (&'a str, &'v str)> {
        self.names.iter().copied().zip(values.iter().copied())
    }

    /// All values of which the template makes the key, found by trying each way to cut it.
    fn readings<'k>(&self, key: &'k str) -> Vec<BTreeMap<&'a str, &'k str>> {
        let mut found = Vec::new();
        cut(&self.pieces, key, &BTreeMap::new(), &mut found);
        found.retain(|values| {
            let made = self.template.key(|name| values.get(name).copied());
            made.as_deref() == Ok(key)
        });
        found
    }
}

fn cut<'a, 'k>(
    pieces: &[Piece<'a>],
    key: &'k str,
    values: &BTreeMap<&'a str, &'k str>,
    found: &mut Vec<BTreeMap<&'a str, &'k str>>,
) {
    match pieces.split_first() {
        None if key.is_empty() => found.push(values.clone()),
        None => {}
        Some((Piece::Text(text), pieces)) => {
            if let Some(rest) = key.strip_prefix(text) {
                cut(pieces, rest, values, found);
            }
        }
        Some((Piece::Name(name), pieces)) => {
            for (at, _) in key.char_indices().skip(1).chain([(key.len(), ' ')]) {
                let (value, rest) = key.split_at(at);
                if values.get(name).is_some_and(|other| *other != value) {
                    continue;
                }
                let mut values = values.clone();
                values.insert(name, value);
                cut(pieces, rest, &values, found);
            }
        }
    }
}
