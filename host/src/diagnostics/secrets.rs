//! Passwords that stand in a pipeline file, kept out of what is printed of it: that goes into logs, and into tickets.

/// What hides a byte, so that places in the text stay where they are.
const HIDDEN: char = '*';

/// The text with the passwords of its URLs hidden, and as long as before. What stands as `${NAME}` is no secret.
pub(crate) fn masked(text: &str) -> String {
    let mut masked = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + "://".len());
        masked.push_str(before);
        let url = &after[..end_of_url(before, after)];
        masked.push_str(&masked_url(url));
        rest = &after[url.len()..];
    }
    masked.push_str(rest);
    masked
}

/// Where a URL ends that begins with a scheme at the end of `before`: at the quote that it stands in, or at a blank.
fn end_of_url(before: &str, after: &str) -> usize {
    let scheme = |c: char| c.is_ascii_alphanumeric() || "+-.:/".contains(c);
    let quote = before.trim_end_matches(scheme).chars().next_back();
    let quote = quote.filter(|c| "\"'`".contains(*c));
    let ends = |c: char| match quote {
        Some(quote) => c == quote || c == '\n',
        None => c.is_whitespace() || "\"'`".contains(c),
    };
    after.find(ends).unwrap_or(after.len())
}

/// What follows the scheme, without its password and without parameters that are one.
fn masked_url(url: &str) -> String {
    // A password may hold what ends a user's name or a host, so all before the last `@` is taken for user and password.
    let (user, rest) = match url.rfind('@') {
        Some(at) => url.split_at(at),
        None => ("", url),
    };
    let mut masked = match user.split_once(':') {
        Some((name, password)) => format!("{name}:{}", hidden(password)),
        None => user.to_owned(),
    };
    let mut is_first = true;
    for parameter in rest.split_inclusive(['?', '&']) {
        match parameter.split_once('=') {
            Some((name, value)) if !is_first && name.to_lowercase().contains("pass") => {
                let end = value.len() - usize::from(value.ends_with('&'));
                masked += &format!("{name}={}{}", hidden(&value[..end]), &value[end..]);
            }
            _ => masked.push_str(parameter),
        }
        is_first = false;
    }
    masked
}

fn hidden(secret: &str) -> String {
    match secret.starts_with("${") {
        true => secret.to_owned(),
        false => HIDDEN.to_string().repeat(secret.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_of_urls_are_hidden_and_places_kept() {
        for (text, expected) in [
            ("no = \"url\"", "no = \"url\""),
            (
                "url = \"postgres://me:pä#:@/?ss@db/posts\" # me:x@y",
                "url = \"postgres://me:**********@db/posts\" # me:x@y",
            ),
            (
                "a = 'redis://:it\"s@h' b = \"redis://h\"",
                "a = 'redis://:****@h' b = \"redis://h\"",
            ),
            (
                "url = \"${URL:-postgres://me:secret@db}\"",
                "url = \"${URL:-postgres://me:******@db}\"",
            ),
            (
                "url = \"postgres://me:${PASSWORD}@db\"",
                "url = \"postgres://me:${PASSWORD}@db\"",
            ),
            (
                "\"postgres://me@db/x?a=b&sslpassword=secret&c=d\"",
                "\"postgres://me@db/x?a=b&sslpassword=******&c=d\"",
            ),
            (
                "`postgres://me:secret@db` is not; write `redis://host`",
                "`postgres://me:******@db` is not; write `redis://host`",
            ),
            (
                "url = \"postgres://me:sec\nret@db\"",
                "url = \"postgres://me:sec\nret@db\"",
            ),
        ] {
            let masked = masked(text);
            assert_eq!(masked, expected);
            assert_eq!(masked.len(), text.len());
        }
    }
}
