//! What is wrong with the URL of a store: most of it is a password that was written as it is.

use url::{ParseError, Url};

use crate::diagnostics::secrets::masked;
use crate::manifest::Text;

/// Why a text is no URL that can be used, and the mend where there is a better one than to write it anew. Neither has a part of
/// the password.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct UrlFault {
    pub(super) why: String,
    pub(super) help: Option<String>,
}

/// Reads a URL. `fragments` are those that mean something.
pub(super) fn read(text: &str, fragments: &[&str]) -> Result<Url, UrlFault> {
    if let Some(c) = text.chars().find(|c| c.is_control()) {
        return Err(UrlFault {
            why: format!(
                "there is a control character in it ({})",
                c.escape_default()
            ),
            help: Some(
                "take it out: a variable that was read from a file may end with a line break"
                    .to_owned(),
            ),
        });
    }
    let parsed = Url::parse(text);
    let fragment = parsed.as_ref().ok().and_then(Url::fragment);
    let is_odd = fragment.is_some_and(|fragment| !fragments.contains(&fragment));
    if (parsed.is_err() || is_odd || cuts_password(text))
        && let Some(c) = reserved_before_at(text)
    {
        return Err(UrlFault {
            why: format!("`{c}` ends the user name or password that it stands in"),
            help: Some(format!(
                "write it percent-encoded there, as `{}`, and other signs but letters, digits, `-`, `.`, `_` and `~` too",
                encoded(c)
            )),
        });
    }
    if is_odd && fragments.is_empty() {
        return Err(UrlFault {
            why: "`#` ends what is read of it".to_owned(),
            help: Some("write the `#` percent-encoded, as `%23`".to_owned()),
        });
    }
    parsed.map_err(|error| UrlFault {
        why: match error {
            ParseError::RelativeUrlWithoutBase => "it does not begin with a scheme".to_owned(),
            error => error.to_string(),
        },
        help: None,
    })
}

/// As messages may show a URL: as it stands in the file, without its password.
pub(super) fn shown(text: &Text) -> String {
    masked(text.shown())
}

/// The sign that ends what stands before the host, where an `@` behind it says that it was not meant to.
fn reserved_before_at(text: &str) -> Option<char> {
    let (_, rest) = text.split_once("://")?;
    let (end, c) = rest.char_indices().find(|(_, c)| "/?#".contains(*c))?;
    let is_user = !rest[..end].contains('@') && rest[end..].contains('@');
    is_user.then_some(c)
}

/// Whether what reads as a host and its port is a user and the beginning of a password: the `@` behind it stands where no
/// database's name and no parameter has one.
fn cuts_password(text: &str) -> bool {
    let rest = text.split_once("://").map_or("", |(_, rest)| rest);
    let Some(at) = rest.rfind('@') else {
        return false;
    };
    let (before, _) = rest.split_at(at);
    let has_port = before
        .split(['/', '?', '#'])
        .next()
        .is_some_and(|host| host.contains(':'));
    has_port
        && !before
            .split_once('?')
            .is_some_and(|(_, query)| query.contains('='))
}

fn encoded(c: char) -> String {
    let mut bytes = [0; 4];
    let bytes = c.encode_utf8(&mut bytes).bytes();
    bytes.map(|byte| format!("%{byte:02X}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_signs_in_a_password_are_named() {
        for (url, sign) in [
            ("postgres://me:p#w@db/posts", '#'),
            ("postgres://me:p/w@db/posts", '/'),
            ("postgres://me:p?w@db/posts", '?'),
            ("postgres://me:12#w@db/posts", '#'),
            ("postgres://me:12/w@db/posts", '/'),
            ("postgres://me:12?w@db/posts", '?'),
            ("postgres://m#e:pw@db/posts", '#'),
            ("redis://:#pw@cache", '#'),
            ("rediss://me:/pw@cache/1#insecure", '/'),
        ] {
            let fault = read(url, &["insecure"]).unwrap_err();
            assert!(
                fault.why.starts_with(&format!("`{sign}` ends")),
                "{url}: {fault:?}"
            );
            let help = fault.help.unwrap();
            assert!(
                help.contains(&format!("`{}`", encoded(sign))),
                "{url}: {help}"
            );
        }
        let fault = read("postgres://db/posts?password=p#w", &[]).unwrap_err();
        assert!(fault.help.unwrap().contains("`%23`"));
        for url in ["postgres://me:pw\n@db/posts", "redis://cache\r"] {
            let fault = read(url, &[]).unwrap_err();
            assert!(fault.why.contains("control character"), "{fault:?}");
        }
    }

    #[test]
    fn other_urls_are_read() {
        for url in [
            "postgres://me:p%23w@db:5432/posts",
            "postgres://me:p@w@db/posts",
            "postgres://me:p[:]w!$&'()*+,;=%@db/posts",
            "postgres://db:5432/posts?application_name=a@b",
            "postgres://db/posts?user=a@b&password=p%23",
            "postgres:///posts?host=/run/postgresql",
            "redis://cache:6379/1",
            "rediss://:pw@cache#insecure",
            "redis+unix:///run/redis.sock",
        ] {
            assert!(read(url, &["insecure"]).is_ok(), "{url}");
        }
    }
}
