//! A statement as PostgreSQL's scanner takes it apart (`scan.l`), with `standard_conforming_strings` on.

use super::super::{is_comment, skip_comment};
use crate::capability::sql::statement::Dialect;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// A word, in lower case as the server reads it.
    Word(String),
    /// A name in quotes, without them.
    Quoted(String),
    /// A string of whatever kind.
    Text,
    /// One byte of what is none of these.
    Symbol(u8),
}

/// The tokens, or why they can't be told.
pub(super) fn scan(text: &str) -> Result<Vec<Token>, &'static str> {
    let mut scanner = Scanner {
        text: text.as_bytes(),
        at: 0,
    };
    let mut tokens = Vec::new();
    while let Some(token) = scanner.next()? {
        tokens.push(token);
    }
    Ok(tokens)
}

struct Scanner<'a> {
    text: &'a [u8],
    at: usize,
}

impl Scanner<'_> {
    fn next(&mut self) -> Result<Option<Token>, &'static str> {
        self.skip_blank();
        let Some(byte) = self.text.get(self.at).copied() else {
            return Ok(None);
        };
        let second = self.text.get(self.at + 1).copied();
        let third = self.text.get(self.at + 2).copied();
        Ok(Some(match (byte, second) {
            (b'"', _) => Token::Quoted(self.quoted()?),
            (b'\'', _) => self.string(0)?,
            (b'e' | b'E', Some(b'\'')) => self.escaped()?,
            // Codes of characters stand for any name.
            (b'u' | b'U', Some(b'&')) if third == Some(b'"') => {
                return Err("names are not written as U&\"…\"");
            }
            (b'u' | b'U', Some(b'&')) if third == Some(b'\'') => self.string(2)?,
            (b'b' | b'B' | b'x' | b'X' | b'n' | b'N', Some(b'\'')) => self.string(1)?,
            (b'$', Some(digit)) if digit.is_ascii_digit() => {
                self.at += 1;
                self.skip(|byte| byte.is_ascii_digit());
                Token::Symbol(b'$')
            }
            (b'$', _) => self.dollars()?,
            _ if begins_word(byte) => {
                let begin = self.at;
                self.skip(|byte| begins_word(byte) || byte.is_ascii_digit() || byte == b'$');
                let word = String::from_utf8_lossy(&self.text[begin..self.at]);
                Token::Word(word.to_ascii_lowercase())
            }
            _ => {
                self.at += 1;
                Token::Symbol(byte)
            }
        }))
    }

    fn skip(&mut self, which: impl Fn(u8) -> bool) {
        let rest = &self.text[self.at..];
        self.at += rest.iter().take_while(|byte| which(**byte)).count();
    }

    fn skip_blank(&mut self) {
        loop {
            self.skip(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n' | b'\x0b' | b'\x0c'));
            if !is_comment(self.text, self.at) {
                return;
            }
            self.at = skip_comment(Dialect::Postgres, self.text, self.at);
        }
    }

    /// A string whose quote is so far from here. One that goes on in another line is two to us.
    fn string(&mut self, before: usize) -> Result<Token, &'static str> {
        self.at += before;
        self.until_quote(b'\'')?;
        Ok(Token::Text)
    }

    fn quoted(&mut self) -> Result<String, &'static str> {
        let mut name = String::new();
        loop {
            let part = self.until_quote(b'"')?;
            name.push_str(&String::from_utf8_lossy(&self.text[part.0..part.1]));
            if self.text.get(self.at) != Some(&b'"') {
                return Ok(name);
            }
            name.push('"');
        }
    }

    /// Passes over what is in quotes, the first of which is here; answers where it is.
    fn until_quote(&mut self, quote: u8) -> Result<(usize, usize), &'static str> {
        let begin = self.at + 1;
        let length = self.text[begin..].iter().position(|byte| *byte == quote);
        let end = begin + length.ok_or("a quote is not closed")?;
        self.at = end + 1;
        Ok((begin, end))
    }

    /// A string with backslashes. Where it goes on in another line, they would count there too.
    fn escaped(&mut self) -> Result<Token, &'static str> {
        self.at += 2;
        loop {
            match (self.text.get(self.at), self.text.get(self.at + 1)) {
                (Some(b'\\'), Some(_)) | (Some(b'\''), Some(b'\'')) => self.at += 2,
                (Some(b'\''), _) => break,
                (Some(_), _) => self.at += 1,
                (None, _) => return Err("a quote is not closed"),
            }
        }
        self.at += 1;
        self.skip_blank();
        match self.text.get(self.at) {
            Some(b'\'') => Err("a string E'…' is written in one piece"),
            _ => Ok(Token::Text),
        }
    }

    fn dollars(&mut self) -> Result<Token, &'static str> {
        let begin = self.at;
        self.at += 1;
        if self
            .text
            .get(self.at)
            .is_some_and(|byte| begins_word(*byte))
        {
            self.skip(|byte| begins_word(byte) || byte.is_ascii_digit());
        }
        if self.text.get(self.at) != Some(&b'$') {
            self.at = begin + 1;
            return Ok(Token::Symbol(b'$'));
        }
        self.at += 1;
        let tag = &self.text[begin..self.at];
        let rest = &self.text[self.at..];
        let end = rest.windows(tag.len()).position(|window| window == tag);
        self.at += end.ok_or("a string $…$ is not closed")? + tag.len();
        Ok(Token::Text)
    }
}

fn begins_word(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_' || byte >= 0x80
}

#[cfg(test)]
mod tests {
    use super::Token::{Quoted, Symbol, Text, Word};
    use super::*;

    fn word(word: &str) -> Token {
        Word(word.to_owned())
    }

    #[test]
    fn takes_statements_apart() {
        for (text, expected) in [
            ("SELECT a$1", vec![word("select"), word("a$1")]),
            (
                "a/* /* ' */ */b--'\rc",
                vec![word("a"), word("b"), word("c")],
            ),
            ("'a''b\\' c", vec![Text, Text, word("c")]),
            ("E'a\\'b''c' d", vec![Text, word("d")]),
            ("n'a' x'0' U&'\\0061' b", vec![Text, Text, Text, word("b")]),
            ("\"A\"\"b\" c", vec![Quoted("A\"b".to_owned()), word("c")]),
            ("$1$a$'$a $b$a$c", vec![Symbol(b'$'), Text, word("c")]),
            ("$$'$$ a", vec![Text, word("a")]),
            ("1e'\\'' b", vec![Symbol(b'1'), Text, word("b")]),
            ("a<b", vec![word("a"), Symbol(b'<'), word("b")]),
        ] {
            assert_eq!(scan(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_can_not_be_told_is_refused() {
        for text in [
            "U&\"a\"",
            "u&\"a\"",
            "'a",
            "\"a",
            "E'a\\'",
            "E'a'\n'b'",
            "E'a' -- c\n 'b'",
            "$a$ $b$",
        ] {
            assert!(scan(text).is_err(), "{text}");
        }
    }
}
