//! Brackets of a TOML file that are not closed. The parser stumbles over each line behind one, and not over the bracket.

/// The first list or table of a value that is not closed, by its bracket: where, and which. `None` too where a text is not
/// closed, since nobody knows then what stands in it.
pub(super) fn unclosed(text: &str) -> Option<(usize, char)> {
    let mut open: Vec<(usize, char)> = Vec::new();
    let mut at = 0;
    while at < text.len() {
        let (line, next) = match text[at..].find('\n') {
            Some(end) => (&text[at..at + end], at + end + 1),
            None => (&text[at..], text.len()),
        };
        let innermost = open.last().map(|(_, bracket)| *bracket);
        if begins_anew(line, innermost) {
            return open.first().copied();
        }
        if innermost.is_none() && line.trim_start().starts_with('[') {
            at = next;
            continue;
        }
        match read_line(text, at, &mut open) {
            Ok(next) => at = next,
            Err(unclosed) => return unclosed,
        }
    }
    open.first().copied()
}

/// Whether a line can't belong to the value around it: a key with its value in a list, or a section's header in either.
fn begins_anew(line: &str, innermost: Option<char>) -> bool {
    let Some(innermost) = innermost else {
        return false;
    };
    let line = line.trim();
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.\"' ".contains(c);
    if let Some(header) = line.strip_prefix('[') {
        let header = header.trim_start_matches('[');
        let (name, _) = header.split_once(']').unwrap_or(("", ""));
        let is_section = name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(is_name)
            && !["true", "false", "inf", "nan"].contains(&name.trim());
        return is_section;
    }
    let is_key = |key: &str| {
        let quotes = key.chars().filter(|c| "\"'".contains(*c)).count();
        !key.is_empty() && key.chars().all(is_name) && quotes % 2 == 0
    };
    let key = line.split_once('=').map(|(key, _)| key.trim());
    innermost == '[' && key.is_some_and(is_key)
}

/// Reads on to the end of the line, or of the text over several lines that begins there. Answers where the next one begins; or
/// the bracket that another kind of bracket should close, if it is known.
fn read_line(
    text: &str,
    from: usize,
    open: &mut Vec<(usize, char)>,
) -> Result<usize, Option<(usize, char)>> {
    let mut at = from;
    while let Some(c) = text[at..].chars().next() {
        match c {
            '\n' => return Ok(at + 1),
            '#' => {
                let end = text[at..].find('\n').map_or(text.len(), |end| at + end);
                at = end;
                continue;
            }
            '"' | '\'' => {
                at = behind_text(text, at, c).ok_or(None)?;
                continue;
            }
            '[' | '{' => open.push((at, c)),
            ']' | '}' => {
                let opening = if c == ']' { '[' } else { '{' };
                if let Some(other) = open.pop().filter(|(_, bracket)| *bracket != opening) {
                    return Err(Some(other));
                }
            }
            _ => {}
        }
        at += c.len_utf8();
    }
    Ok(at)
}

/// Where the text ends that begins at `at`; one of one line ends with it, closed or not.
fn behind_text(text: &str, at: usize, quote: char) -> Option<usize> {
    let three = quote.to_string().repeat(3);
    let escapes = quote == '"';
    let (begin, is_long) = match text[at..].starts_with(&three) {
        true => (at + 3, true),
        false => (at + 1, false),
    };
    let mut characters = text[begin..].char_indices();
    while let Some((offset, c)) = characters.next() {
        let here = begin + offset;
        match c {
            '\\' if escapes => _ = characters.next(),
            '\n' if !is_long => return Some(here),
            c if c == quote && !is_long => return Some(here + 1),
            c if c == quote && text[here..].starts_with(&three) => return Some(here + 3),
            _ => {}
        }
    }
    (!is_long).then_some(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_bracket_that_is_not_closed() {
        let check = |text: &str, expected: Option<&str>| {
            let found = unclosed(text).map(|(at, _)| &text[at..]);
            assert_eq!(
                found.map(|rest| rest.lines().next().unwrap()),
                expected,
                "{text}"
            );
        };
        check("a = [1, 2]\n[b]\nc = { d = [\"]\"] }\n", None);
        check(
            "a = [\n  \"b\", # [\n  '''\n]'''\n]\n[[c]]\nd = '['\n",
            None,
        );
        check("a = [\n [1, 2],\n [\"x\"],\n]\nb = {\n c = 1,\n}\n", None);
        check("[a\nb = 1\n", None);
        check("a = [\"b\"\nc = 1\nd = [2]\n", Some("[\"b\""));
        check("[s]\na = [\n\"b\",\n\n[t]\nc = [1]\n", Some("["));
        check("a = { b = 1\n[c]\nd = 1\n", Some("{ b = 1"));
        check("a = { b = [1 }\nc = 1\n", Some("[1 }"));
        check("a = [\n\"b=c\",\n'd = e',\n]\n", None);
        check("a = [[1], [2]\n\"b.c\" = 1\n", Some("[[1], [2]"));
        check("a = [", Some("["));
        check("a = \"\"\"[\nb = [\n", None);
        check("a = \"[\nb = [1,\nc = 2", Some("[1,"));
        check("ä = [\"\\\"\", 'ü\\'\nö = 1\nx=1", Some("[\"\\\"\", 'ü\\'"));
    }
}
