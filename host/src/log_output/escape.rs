//! Characters that would make a line of the log look like something that it is not.
//!
//! Texts of guests, clients and servers are in it: a line break forges a line, an escape sequence clears a terminal, and a
//! bidirectional control shows a text in another order than it has.

use std::fmt::{self, Write};

/// Passes a text on with what must not stand in a line escaped, as Rust writes it: `\n`, `\u{1b}`.
pub(super) struct Escaping<'a, W: ?Sized>(pub(super) &'a mut W);

impl<W: Write + ?Sized> Write for Escaping<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        escape(text, self.0, |c, out| write!(out, "{}", c.escape_default()))
    }
}

/// The text in one line.
pub fn escaped(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    // To write into a string can't fail.
    let _ = Escaping(&mut line).write_str(text);
    line
}

/// A line of JSON whose strings have what JSON itself lets stand in them escaped too. Such characters stand nowhere else.
pub(super) fn escaped_json(json: &str) -> String {
    let mut line = String::with_capacity(json.len());
    let _ = escape(json, &mut line, |c, out| {
        let mut units = [0; 2];
        c.encode_utf16(&mut units)
            .iter()
            .try_for_each(|unit| write!(out, "\\u{unit:04x}"))
    });
    line
}

fn escape<W: Write + ?Sized>(
    text: &str,
    out: &mut W,
    mut instead: impl FnMut(char, &mut W) -> fmt::Result,
) -> fmt::Result {
    let mut plain = 0;
    for (at, c) in text.char_indices().filter(|(_, c)| is_deceptive(*c)) {
        out.write_str(&text[plain..at])?;
        instead(c, out)?;
        plain = at + c.len_utf8();
    }
    out.write_str(&text[plain..])
}

/// Controls, separators of lines and paragraphs, what turns the direction of writing, and what is not seen at all; but
/// not the joiners that some scripts and emoji need.
fn is_deceptive(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{61c}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_stays_in_its_line() {
        for (text, line) in [
            ("plain, ä, नमस्ते, 👩‍💻", "plain, ä, नमस्ते, 👩‍💻"),
            ("a\nb\r\tc", r"a\nb\r\tc"),
            (
                "\u{1b}[2J\u{9b}1m\u{7f}\u{85}",
                r"\u{1b}[2J\u{9b}1m\u{7f}\u{85}",
            ),
            ("a\u{2028}b\u{2029}", r"a\u{2028}b\u{2029}"),
            ("\u{202e}gpj\u{2066}", r"\u{202e}gpj\u{2066}"),
            (r"a\nb", r"a\nb"),
        ] {
            assert_eq!(escaped(text), line);
        }
    }

    #[test]
    fn json_stays_what_it_was() {
        let value = serde_json::json!({ "message": "a\n\u{1b}\u{2028}\u{202e}\u{e0041}b" });
        let line = escaped_json(&value.to_string());
        assert_eq!(line, r#"{"message":"a\n\u001b\u2028\u202e\udb40\udc41b"}"#);
        let read: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(read, value);
    }
}
