//! `${NAME}` and `${NAME:-default}` in the strings of a pipeline file.

/// Where variables come from: the process's environment, or a test's.
pub(crate) type Env<'a> = dyn Fn(&str) -> Option<String> + 'a;

/// What stands in a value for bytes that are not UTF-8.
const NO_TEXT: char = char::REPLACEMENT_CHARACTER;

/// What is wrong with a `${…}`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ExpandError {
    /// The variable is not set, and there is no default.
    Unset(String),
    /// Its value is no text: [`NO_TEXT`] stands where it isn't UTF-8.
    NotText(String),
    /// There is no `}`.
    Unclosed,
    /// What stands between the braces is not a name; nesting is not supported.
    BadName(String),
}

/// Puts the environment's values in. `None` where the text has no `${`. An empty variable counts as
/// unset for `:-`, as in a shell. `$${` stands for `${` itself. Answers every error, not the first alone.
pub(crate) fn expand(text: &str, env: &Env<'_>) -> Result<Option<String>, Vec<ExpandError>> {
    if !text.contains("${") {
        return Ok(None);
    }
    let mut out = String::new();
    let mut errors = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        let (before, from) = rest.split_at(at);
        if let Some(before) = before.strip_suffix('$') {
            out.push_str(before);
            out.push_str("${");
            rest = &from[2..];
            continue;
        }
        out.push_str(before);
        let Some(end) = from.find('}') else {
            errors.push(ExpandError::Unclosed);
            rest = "";
            break;
        };
        match variable(&from[2..end], env) {
            Ok(value) => out.push_str(&value),
            Err(error) => errors.push(error),
        }
        rest = &from[end + 1..];
    }
    out.push_str(rest);
    if errors.is_empty() {
        Ok(Some(out))
    } else {
        Err(errors)
    }
}

fn variable(inside: &str, env: &Env<'_>) -> Result<String, ExpandError> {
    let (name, default) = match inside.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inside, None),
    };
    let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if !is_name || default.is_some_and(|d| d.contains("${")) {
        return Err(ExpandError::BadName(inside.to_owned()));
    }
    match (env(name), default) {
        (Some(value), _) if value.contains(NO_TEXT) => Err(ExpandError::NotText(name.to_owned())),
        (Some(value), None) => Ok(value),
        (Some(value), Some(_)) if !value.is_empty() => Ok(value),
        (_, Some(default)) => Ok(default.to_owned()),
        (None, None) => Err(ExpandError::Unset(name.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Result<Option<&str>, Vec<ExpandError>>) {
        let env = |name: &str| match name {
            "SET" => Some("value".to_owned()),
            "EMPTY" => Some(String::new()),
            "LATIN" => Some("caf\u{fffd}".to_owned()),
            _ => None,
        };
        assert_eq!(
            expand(text, &env),
            expected.map(|v| v.map(str::to_owned)),
            "{text}"
        );
    }

    #[test]
    fn puts_values_in_and_finds_every_error() {
        use ExpandError::{BadName, NotText, Unclosed, Unset};
        check("${LATIN:-other}", Err(vec![NotText("LATIN".into())]));
        check("plain $ {text}", Ok(None));
        check("${SET}", Ok(Some("value")));
        check("a-${SET}-b-${SET}", Ok(Some("a-value-b-value")));
        check("${SET:-other}", Ok(Some("value")));
        check("${UNSET:-sqlite:data/a.db}", Ok(Some("sqlite:data/a.db")));
        check("${UNSET:-}", Ok(Some("")));
        check("${EMPTY}", Ok(Some("")));
        check("${EMPTY:-other}", Ok(Some("other")));
        check("$${SET} ${SET}", Ok(Some("${SET} value")));
        check(
            "${UNSET} ${ALSO_UNSET}",
            Err(vec![Unset("UNSET".into()), Unset("ALSO_UNSET".into())]),
        );
        check("${SET", Err(vec![Unclosed]));
        check("${}", Err(vec![BadName(String::new())]));
        check("${SE-T}", Err(vec![BadName("SE-T".into())]));
        check(
            "${UNSET:-${SET}}",
            Err(vec![BadName("UNSET:-${SET".into())]),
        );
    }
}
