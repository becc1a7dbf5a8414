//! `[sql]` and `[redis]`.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::PathBuf;

use url::Url;

use super::load::{Checks, describe_io};
use super::url_faults::{self, UrlFault};
use super::{RedisStore, RedisUrl, SqlStore, SqlUrl};
use crate::capability::{redis as redis_store, sql as sql_store};
use crate::diagnostics::Problem;
use crate::manifest::{RedisSection, SqlSection, Text};

/// What the client of Redis knows: it then takes any certificate.
const REDIS_FRAGMENTS: &[&str] = &["insecure"];
const DEFAULT_MAX_CONNECTIONS: u32 = 8;

const SQL_HELP: &str =
    "write `postgres://user:password@host:port/database` or `sqlite:path/to/file.db`";
const REDIS_HELP: &str = "write `redis://host:port`, `rediss://user:password@host:port`, `embedded:path/to/folder` or `memory:`";

pub(super) fn sql(
    checks: &Checks<'_>,
    sections: &[SqlSection],
) -> Option<BTreeMap<String, SqlStore>> {
    let read = |section: &SqlSection| {
        let named = checks.name("store", &section.name);
        let migrations = section
            .migrations
            .as_ref()
            .map(|text| migrations(checks, text));
        let url = section.url.as_ref().and_then(|text| sql_url(checks, text));
        let stage_url = section.stage_url.as_ref();
        let stage_url = stage_url.map(|text| stage_url_of(checks, text, url.as_ref()));
        let store = SqlStore {
            url: url?,
            stage_url: stage_url.map_or(Some(None), |url| url.map(Some))?,
            migrations: migrations.map_or(Some(None), |folder| folder.map(Some))?,
            max_connections: section
                .max_connections
                .as_ref()
                .and_then(|n| u32::try_from(n.value).ok())
                .unwrap_or(DEFAULT_MAX_CONNECTIONS),
        };
        named.then(|| (section.name.value.clone(), store))
    };
    let stores: Vec<_> = sections.iter().map(read).collect();
    stores.into_iter().collect()
}

pub(super) fn redis(
    checks: &Checks<'_>,
    sections: &[RedisSection],
) -> Option<BTreeMap<String, RedisStore>> {
    let read = |section: &RedisSection| {
        let named = checks.name("store", &section.name);
        let url = redis_url(checks, section.url.as_ref()?)?;
        named.then(|| (section.name.value.clone(), RedisStore { url }))
    };
    let stores: Vec<_> = sections.iter().map(read).collect();
    stores.into_iter().collect()
}

/// Reports files and folders that two stores would open, each as if it were its own.
pub(super) fn check_shared_paths(checks: &Checks<'_>, sql: &[SqlSection], redis: &[RedisSection]) {
    let sqlite = sql
        .iter()
        .filter_map(|s| s.url.as_ref())
        .filter_map(|text| {
            let path = sqlite_path(&text.value)?.ok()?;
            Some((checks.path(path), text))
        });
    let embedded = redis
        .iter()
        .filter_map(|s| s.url.as_ref())
        .filter_map(|text| {
            let path = text
                .value
                .strip_prefix("embedded:")
                .filter(|path| !path.is_empty())?;
            Some((checks.path(path), text))
        });
    let mut seen: BTreeMap<PathBuf, &Text> = BTreeMap::new();
    for (path, text) in sqlite.chain(embedded) {
        if let Some(first) = seen.insert(path, text) {
            checks.report(
                Problem::at(&text.span, "two stores have the same path")
                    .also(&first.span, "the other one")
                    .help("give each a path of its own, or let stages share one store"),
            );
        }
    }
}

fn migrations(checks: &Checks<'_>, text: &Text) -> Option<PathBuf> {
    let path = checks.path(&text.value);
    let folder = fs::read_dir(&path).and_then(|entries| {
        entries
            .map(|entry| entry.map(|e| e.file_name().to_string_lossy().into_owned()))
            .collect::<Result<Vec<_>, _>>()
    });
    let (message, help) = match folder {
        Err(error) => (
            format!(
                "the folder `{}` can't be read: {}",
                text.shown(),
                describe_io(&error)
            ),
            "the path is relative to this file; put migrations such as `0001_posts.sql` there, or leave `migrations` out",
        ),
        Ok(names) => match migrations_fault(names) {
            None => return Some(path),
            Some(message) => (
                message,
                "migrations are called `NUMBER_NAME.sql`, such as `0001_posts.sql`",
            ),
        },
    };
    checks.report(Problem::at(&text.span, message).help(help));
    None
}

/// What is wrong with the names in a folder of migrations, as the store that runs them sees it.
fn migrations_fault(mut names: Vec<String>) -> Option<String> {
    names.retain(|name| name.ends_with(".sql"));
    names.sort();
    if names.is_empty() {
        return Some("there are no migrations in the folder".to_owned());
    }
    let mut seen: BTreeMap<i64, &str> = BTreeMap::new();
    for name in &names {
        let number = name
            .split_once('_')
            .and_then(|(number, _)| number.parse::<i64>().ok());
        let undoes = name.ends_with(".down.sql");
        let Some(number) = number.filter(|number| undoes || *number > 0) else {
            return Some(format!("`{name}` is not the name of a migration"));
        };
        if undoes {
            continue;
        }
        if let Some(other) = seen.insert(number, name) {
            return Some(format!(
                "the migrations `{other}` and `{name}` have the same number"
            ));
        }
    }
    None
}

fn sql_url(checks: &Checks<'_>, text: &Text) -> Option<SqlUrl> {
    let bad = |why: &str, help: &str| {
        let shown = url_faults::shown(text);
        let message = format!("`{shown}` is not the URL of a SQL database");
        checks.report(Problem::at(&text.span, message).label(why).help(help));
    };
    match sqlite_path(&text.value) {
        Some(Ok(path)) => return Some(SqlUrl::Sqlite(checks.path(path))),
        Some(Err(why)) => {
            bad(why, "write `sqlite:path/to/file.db`");
            return None;
        }
        None => {}
    }
    match url_faults::read(&text.value, &[]) {
        Err(UrlFault { why, help }) => bad(&why, help.as_deref().unwrap_or(SQL_HELP)),
        Ok(url) if !["postgres", "postgresql"].contains(&url.scheme()) => {
            bad("no database has this scheme", SQL_HELP)
        }
        Ok(url) => {
            let socket = url.query_pairs().any(|(name, _)| name == "host");
            if !socket && url.host_str().is_none_or(str::is_empty) {
                bad("there is no host", SQL_HELP);
                return None;
            }
            match sql_store::check_postgres_url(&text.value) {
                Ok(()) => {
                    warn_of_parameters(checks, text);
                    return Some(SqlUrl::Postgres(text.value.clone()));
                }
                Err(why) => bad(&why, SQL_HELP),
            }
        }
    }
    None
}

fn warn_of_parameters(checks: &Checks<'_>, text: &Text) {
    for (name, near) in sql_store::unknown_postgres_parameters(&text.value) {
        // What came from a variable is not shown, for it may be a secret.
        let is_shown = text.shown().contains(&name);
        let help = match near.filter(|_| is_shown) {
            Some(near) => format!("did you mean `{near}`?"),
            None => "leave it out".to_owned(),
        };
        let message = match is_shown {
            true => format!("the URL's parameter `{name}` means nothing here"),
            false => "a parameter of the URL means nothing here".to_owned(),
        };
        checks.report(Problem::at(&text.span, message).help(help).warning());
    }
}

/// The URL that stages log in with, beside the host's.
fn stage_url_of(checks: &Checks<'_>, text: &Text, url: Option<&SqlUrl>) -> Option<SqlUrl> {
    const HELP: &str = "roles are PostgreSQL's: write `postgres://role:password@host:port/database`, or leave `stage-url` out";
    if let Some(SqlUrl::Sqlite(_)) = url {
        checks.report(Problem::at(&text.span, "`stage-url` is for PostgreSQL").help(HELP));
        return None;
    }
    match sql_url(checks, text)? {
        SqlUrl::Sqlite(_) => {
            checks.report(Problem::at(&text.span, "`stage-url` is for PostgreSQL").help(HELP));
            None
        }
        url => Some(url),
    }
}

/// The path of a `sqlite:` URL, or why it has none; `None` for other URLs.
pub(super) fn sqlite_path(url: &str) -> Option<Result<&str, &'static str>> {
    let rest = url.strip_prefix("sqlite:")?;
    let path = rest.strip_prefix("//").unwrap_or(rest);
    Some(if path.is_empty() {
        Err("there is no path")
    } else if path.contains(":memory:") {
        Err("a database in memory would be gone after a restart")
    } else if path.contains('?') {
        Err("it takes no parameters; the file is created if it is missing")
    } else {
        Ok(path)
    })
}

fn redis_url(checks: &Checks<'_>, text: &Text) -> Option<RedisUrl> {
    let bad = |why: &str, help: &str| {
        let shown = url_faults::shown(text);
        let message = format!("`{shown}` is not the URL of a Redis store");
        checks.report(Problem::at(&text.span, message).label(why).help(help));
        None
    };
    if let Some(path) = text.value.strip_prefix("embedded:") {
        return match path {
            "" => bad("there is no path", REDIS_HELP),
            path => Some(RedisUrl::Embedded(checks.path(path))),
        };
    }
    if text.value == "memory:" {
        return Some(RedisUrl::Memory);
    }
    let url = match url_faults::read(&text.value, REDIS_FRAGMENTS) {
        Ok(url) => url,
        Err(UrlFault { why, help }) => return bad(&why, help.as_deref().unwrap_or(REDIS_HELP)),
    };
    if !["redis", "rediss"].contains(&url.scheme()) {
        return bad("no Redis store has this scheme", REDIS_HELP);
    }
    if url.host_str().is_none_or(str::is_empty) {
        return bad("there is no host", REDIS_HELP);
    }
    let database = url.path().trim_matches('/');
    if !database.is_empty() && database.parse::<u32>().is_err() {
        return bad("the path is the database's number", REDIS_HELP);
    }
    match redis_store::check_url(&text.value) {
        Ok(()) => Some(RedisUrl::Remote(text.value.clone())),
        Err(why) => bad(&why, REDIS_HELP),
    }
}

/// The URL without passwords.
fn redacted(url: &str) -> String {
    const HIDDEN: &str = "***";
    let Ok(mut url) = Url::parse(url) else {
        return HIDDEN.to_owned();
    };
    if url.password().is_some() && url.set_password(Some(HIDDEN)).is_err() {
        return HIDDEN.to_owned();
    }
    if url.query().is_some() {
        let pairs: Vec<(String, String)> = url.query_pairs().into_owned().collect();
        let mut query = url.query_pairs_mut();
        query.clear();
        for (name, value) in &pairs {
            let secret = name.to_lowercase().contains("pass");
            query.append_pair(name, if secret { HIDDEN } else { value });
        }
    }
    url.to_string()
}

impl fmt::Display for SqlUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Postgres(url) => f.write_str(&redacted(url)),
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
        }
    }
}

impl fmt::Debug for SqlUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Remote(url) => f.write_str(&redacted(url)),
            Self::Embedded(path) => write!(f, "embedded:{}", path.display()),
            Self::Memory => f.write_str("memory:"),
        }
    }
}

impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_migrations_from_other_files() {
        let fault =
            |names: &[&str]| migrations_fault(names.iter().map(|n| (*n).to_owned()).collect());
        let good: [&[&str]; 3] = [
            &["0001_posts.sql", "0002_users.sql", "README.md"],
            &[
                "20260101120000_posts.up.sql",
                "20260101120000_posts.down.sql",
            ],
            &["1_a.sql", "10_b.sql"],
        ];
        for names in good {
            assert_eq!(fault(names), None, "{names:?}");
        }
        let bad: [&[&str]; 6] = [
            &[],
            &["posts.txt"],
            &["posts.sql"],
            &["01_a.sql", "1_b.sql"],
            &["0_a.sql"],
            &["-1_a.sql"],
        ];
        for names in bad {
            assert!(fault(names).is_some(), "{names:?}");
        }
    }

    #[test]
    fn hides_passwords() {
        let cases = [
            (
                "postgres://me:secret@db/posts",
                "postgres://me:***@db/posts",
            ),
            (
                "postgres://db/posts?password=secret&sslmode=require",
                "postgres://db/posts?password=***&sslmode=require",
            ),
            (
                "postgres:///posts?host=/run&sslpassword=secret",
                "postgres:///posts?host=%2Frun&sslpassword=***",
            ),
            ("postgres://db/posts", "postgres://db/posts"),
        ];
        for (url, shown) in cases {
            assert_eq!(format!("{:?}", SqlUrl::Postgres(url.into())), shown);
        }
        let url = RedisUrl::Remote("rediss://:secret@cache:6380/1".into());
        assert_eq!(
            format!("{url:?} {url}"),
            "rediss://:***@cache:6380/1 rediss://:***@cache:6380/1"
        );
    }
}
