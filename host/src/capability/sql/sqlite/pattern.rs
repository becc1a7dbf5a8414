//! LIKE and GLOB, which look at the clock.

use rusqlite::Result;

use super::functions::{failed, out_of_time};
use super::guard::Guard;

/// Bytes of a pattern; SQLite's own limit.
pub(super) const MAX_BYTES: usize = 50_000;
/// Characters that are compared between two looks at the clock.
const STEPS_PER_LOOK: usize = 100_000;

/// What stands at a place of a pattern.
#[derive(Debug, PartialEq, Eq)]
enum Token {
    Any,
    One,
    Char(u32),
    /// One of GLOB's sets, from behind its `[` on.
    Set,
    /// Nothing matches it.
    Never,
}

/// How a pattern is read.
#[derive(Clone, Copy)]
enum Dialect {
    Like { escape: Option<u32> },
    Glob,
}

/// The one character behind ESCAPE.
pub(super) fn escape(text: &[u8]) -> Result<u32> {
    match char_at(text, 0) {
        Some((char, length)) if length == text.len() => Ok(char),
        _ => Err(failed("ESCAPE expression must be a single character")),
    }
}

pub(super) fn like(
    pattern: &[u8],
    text: &[u8],
    escape: Option<u32>,
    guard: &Guard,
) -> Result<bool> {
    matches(Dialect::Like { escape }, pattern, text, guard)
}

pub(super) fn glob(pattern: &[u8], text: &[u8], guard: &Guard) -> Result<bool> {
    matches(Dialect::Glob, pattern, text, guard)
}

/// What did not match behind the last wildcard is tried again a character later; what is before it needn't be.
fn matches(dialect: Dialect, pattern: &[u8], text: &[u8], guard: &Guard) -> Result<bool> {
    if pattern.len() > MAX_BYTES {
        return Err(failed("LIKE or GLOB pattern too complex"));
    }
    let (mut at, mut place, mut steps) = (0, 0, 0);
    // Behind the last wildcard in the pattern, and where in the text its match ends.
    let mut again: Option<(usize, usize)> = None;
    loop {
        let token = dialect.token(pattern, at);
        // A set is read once more for every character.
        steps += if matches!(token, Some((Token::Set, _))) {
            pattern.len()
        } else {
            1
        };
        if steps >= STEPS_PER_LOOK {
            steps = 0;
            if guard.is_over() {
                return Err(out_of_time());
            }
        }
        let here = char_at(text, place);
        let next = match token {
            Some((Token::Any, behind)) => {
                at = behind;
                again = Some((at, place));
                continue;
            }
            Some((token, behind)) => here.and_then(|(char, behind_char)| {
                Some((dialect.fits(token, pattern, behind, char)?, behind_char))
            }),
            None if here.is_none() => return Ok(true),
            None => None,
        };
        match (next, again) {
            (Some((behind, behind_char)), _) => (at, place) = (behind, behind_char),
            (None, None) => return Ok(false),
            (None, Some((behind, from))) => {
                let Some((_, from)) = char_at(text, from) else {
                    return Ok(false);
                };
                again = Some((behind, from));
                (at, place) = (behind, from);
            }
        }
    }
}

impl Dialect {
    /// What stands at a place, and the place behind it.
    fn token(self, pattern: &[u8], at: usize) -> Option<(Token, usize)> {
        let (char, behind) = char_at(pattern, at)?;
        let is = |other: char| char == u32::from(other);
        Some(match self {
            Self::Like { escape } if Some(char) == escape => match char_at(pattern, behind) {
                Some((char, behind)) => (Token::Char(fold(char)), behind),
                None => (Token::Never, behind),
            },
            Self::Like { .. } if is('%') => (Token::Any, behind),
            Self::Like { .. } if is('_') => (Token::One, behind),
            Self::Like { .. } => (Token::Char(fold(char)), behind),
            Self::Glob if is('*') => (Token::Any, behind),
            Self::Glob if is('?') => (Token::One, behind),
            Self::Glob if is('[') => (Token::Set, behind),
            Self::Glob => (Token::Char(char), behind),
        })
    }

    /// The place behind the token, if the character is one that it stands for.
    fn fits(self, token: Token, pattern: &[u8], behind: usize, char: u32) -> Option<usize> {
        match token {
            Token::Any | Token::One => Some(behind),
            Token::Never => None,
            Token::Set => set(pattern, behind, char),
            Token::Char(expected) => {
                let char = match self {
                    Self::Like { .. } => fold(char),
                    Self::Glob => char,
                };
                (char == expected).then_some(behind)
            }
        }
    }
}

/// As SQLite: letters of ASCII only.
fn fold(char: u32) -> u32 {
    match u8::try_from(char) {
        Ok(byte) => u32::from(byte.to_ascii_lowercase()),
        Err(_) => char,
    }
}

/// The place behind a set's `]`, if the character is in it; `at` is behind its `[`.
fn set(pattern: &[u8], mut at: usize, char: u32) -> Option<usize> {
    let take = |at: &mut usize| {
        let (char, behind) = char_at(pattern, *at)?;
        *at = behind;
        Some(char)
    };
    let is = |char: u32, other: char| char == u32::from(other);
    let mut next = take(&mut at)?;
    let inverted = is(next, '^');
    if inverted {
        next = take(&mut at)?;
    }
    let mut seen = false;
    let mut previous = None;
    if is(next, ']') {
        seen = is(char, ']');
        next = take(&mut at)?;
    }
    while !is(next, ']') {
        let range =
            previous.filter(|_| is(next, '-') && pattern.get(at).is_some_and(|byte| *byte != b']'));
        match range {
            Some(from) => {
                let to = take(&mut at)?;
                seen |= (from..=to).contains(&char);
                previous = None;
            }
            None => {
                seen |= next == char;
                previous = Some(next);
            }
        }
        next = take(&mut at)?;
    }
    (seen != inverted).then_some(at)
}

/// The character that begins at a place and the place behind it. What is no UTF-8 counts byte by byte.
fn char_at(text: &[u8], at: usize) -> Option<(u32, usize)> {
    let first = *text.get(at)?;
    if first < 0x80 {
        return Some((u32::from(first), at + 1));
    }
    let length = match first {
        0xc0..0xe0 => 2,
        0xe0..0xf0 => 3,
        0xf0.. => 4,
        _ => 1,
    };
    let char = text
        .get(at..at + length)
        .and_then(|bytes| std::str::from_utf8(bytes).ok())
        .and_then(|text| text.chars().next());
    match char {
        Some(char) => Some((char.into(), at + length)),
        None => Some((u32::from(first), at + 1)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_comparison_that_takes_long_is_interrupted() {
        let guard = Guard::new();
        let text = vec![b'a'; 16_000_000];
        let pattern = [&b"%"[..], &[b'a'; 40_000], b"b"].concat();
        guard.renew(Duration::from_millis(50));
        let answer = like(&pattern, &text, None, &guard);
        assert!(answer.is_err(), "{answer:?}");
        assert!(guard.is_over());
        guard.renew(Duration::from_secs(60));
        let wildcards = b"%a".repeat(20_000);
        assert!(matches!(like(&wildcards, &text, None, &guard), Ok(true)));
    }
}
