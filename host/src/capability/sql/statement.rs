//! What a guest may send as a statement, seen from its text alone.
//!
//! The database does the parsing; this only finds the first word and, for SQLite, whose driver runs
//! several statements in one call and binds what is missing as NULL, the end of the statement and
//! its placeholders. PostgreSQL has nobody to ask about each thing that a statement would do, so all of its words are
//! looked at (`postgres`).

pub(super) mod postgres;
mod sqlite;

use super::{
    Error, MAX_PARAMETER_LISTS, MAX_PARAMETERS, MAX_STATEMENT_BYTES, SqlAccess, Value,
    database_error,
};

const SYNTAX_ERROR: &str = "42601";
const NOT_SUPPORTED: &str = "0A000";
const LIMIT_EXCEEDED: &str = "54000";
const TOO_MANY_ARGUMENTS: &str = "54023";
/// What PostgreSQL answers to a wrong number of parameters.
const PROTOCOL_VIOLATION: &str = "08P01";

/// SQLite takes it for a space where a word could begin.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Whose SQL it is: the two differ in comments and quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    Postgres,
    Sqlite,
}

pub(super) const TRANSACTIONS: &str = "the host runs the transactions";
pub(super) const SESSION: &str = "connections are shared, so their settings stay as they are";
pub(super) const FILES: &str = "a stage has the one database and no files";

/// First words that are refused, and why.
const REFUSED_BY_BOTH: &[(&str, &str)] = &[
    ("BEGIN", TRANSACTIONS),
    ("COMMIT", TRANSACTIONS),
    ("END", TRANSACTIONS),
    ("RELEASE", TRANSACTIONS),
    ("ROLLBACK", TRANSACTIONS),
    ("SAVEPOINT", TRANSACTIONS),
];
const REFUSED_BY_POSTGRES: &[(&str, &str)] = &[
    ("ABORT", TRANSACTIONS),
    ("START", TRANSACTIONS),
    ("COPY", "use INSERT … SELECT * FROM unnest($1, …)"),
    ("DEALLOCATE", SESSION),
    ("DECLARE", SESSION),
    ("DISCARD", SESSION),
    (
        "DO",
        "a stage sends SQL, and functions are made by migrations",
    ),
    ("EXECUTE", "the host prepares the statements"),
    ("LISTEN", SESSION),
    ("LOAD", SESSION),
    ("PREPARE", "the host prepares the statements"),
    ("RESET", SESSION),
    ("SET", SESSION),
    ("UNLISTEN", SESSION),
];

/// SQLite asks about each thing that a statement does (`sqlite/authorizer.rs`), except for this.
const REFUSED_BY_SQLITE: &[(&str, &str)] = &[("VACUUM", FILES)];

/// The first word of a statement that may be sent, in upper case; empty where it does not begin with a word.
pub(super) fn check(
    dialect: Dialect,
    access: SqlAccess,
    text: &str,
    params: usize,
) -> Result<String, Error> {
    if text.len() > MAX_STATEMENT_BYTES {
        let message = format!("the statement has more than {MAX_STATEMENT_BYTES} bytes");
        return Err(database_error(LIMIT_EXCEEDED, message));
    }
    if params > MAX_PARAMETERS {
        let message = format!("a statement takes at most {MAX_PARAMETERS} parameters");
        return Err(database_error(TOO_MANY_ARGUMENTS, message));
    }
    if text.contains('\0') {
        let message = "the statement has a character of code 0";
        return Err(database_error(SYNTAX_ERROR, message));
    }
    let start = skip_blank(dialect, text.as_bytes(), 0);
    let text = &text.as_bytes()[start..];
    if text.is_empty() {
        return Err(database_error(SYNTAX_ERROR, "the statement is empty"));
    }
    let mut words = Words { dialect, text };
    let keyword = words.next();
    check_word(dialect, &keyword)?;
    if dialect == Dialect::Sqlite {
        sqlite::check(text, params)?;
        return Ok(keyword);
    }
    check_access(access, &keyword)?;
    if keyword == "CREATE" {
        let created = words.after(&["OR", "REPLACE", "GLOBAL", "LOCAL"]);
        if matches!(created.as_str(), "TEMP" | "TEMPORARY") {
            return Err(refusal("CREATE TEMP", SESSION));
        }
    }
    Ok(keyword)
}

/// As [`check`], of a statement that is run once for every list of parameters.
pub(super) fn check_many(
    dialect: Dialect,
    access: SqlAccess,
    text: &str,
    lists: &[Vec<Value>],
) -> Result<String, Error> {
    if lists.len() > MAX_PARAMETER_LISTS {
        let message = format!("a call takes at most {MAX_PARAMETER_LISTS} lists of parameters");
        return Err(database_error(LIMIT_EXCEEDED, message));
    }
    let lengths = || lists.iter().map(Vec::len);
    let most = lengths().max().unwrap_or(MAX_PARAMETERS);
    check(dialect, access, text, most)?;
    let least = lengths().min().unwrap_or(MAX_PARAMETERS);
    check(dialect, access, text, least)
}

fn check_word(dialect: Dialect, word: &str) -> Result<(), Error> {
    let own = match dialect {
        Dialect::Postgres => REFUSED_BY_POSTGRES,
        Dialect::Sqlite => REFUSED_BY_SQLITE,
    };
    let mut refused = REFUSED_BY_BOTH.iter().chain(own);
    match refused.find(|(refused, _)| *refused == word) {
        Some((_, why)) => Err(refusal(word, why)),
        None => Ok(()),
    }
}

/// What a statement on PostgreSQL that begins with the word asks for, if a stage may ever send it. A parenthesis begins a SELECT or VALUES.
fn needed(word: &str) -> Option<SqlAccess> {
    match word {
        "" | "EXPLAIN" | "SELECT" | "TABLE" | "VALUES" | "WITH" => Some(SqlAccess::ReadOnly),
        "DELETE" | "INSERT" | "MERGE" | "UPDATE" => Some(SqlAccess::Data),
        "ALTER" | "ANALYZE" | "COMMENT" | "CREATE" | "DROP" | "REINDEX" | "TRUNCATE" => {
            Some(SqlAccess::DataDefinition)
        }
        _ => None,
    }
}

fn check_access(access: SqlAccess, word: &str) -> Result<(), Error> {
    match needed(word) {
        None => Err(refusal(
            word,
            "it sends statements that read and change rows",
        )),
        Some(needed) if needed <= access => Ok(()),
        Some(needed) => Err(refusal_of_access(word, needed)),
    }
}

fn refusal_of_access(word: &str, needed: SqlAccess) -> Error {
    match needed {
        SqlAccess::DataDefinition => refusal(
            word,
            "its grant in the pipeline needs `access = \"data-definition\"`",
        ),
        _ => refusal(word, "its grant in the pipeline is read-only"),
    }
}

fn refusal(what: &str, why: &str) -> Error {
    not_supported(format!("{what} is not for stages: {why}"))
}

/// A statement that no stage may send, or not this one.
pub(super) fn not_supported(why: String) -> Error {
    database_error(NOT_SUPPORTED, why)
}

/// The words at the beginning of a statement, in upper case; empty from where there is something else.
struct Words<'a> {
    dialect: Dialect,
    text: &'a [u8],
}

impl Words<'_> {
    fn next(&mut self) -> String {
        let start = skip_blank(self.dialect, self.text, 0);
        let (word, rest) = self.text[start..].split_at(word_len(&self.text[start..]));
        self.text = rest;
        String::from_utf8_lossy(word).to_ascii_uppercase()
    }

    /// The next word that is none of these.
    fn after(&mut self, skipped: &[&str]) -> String {
        loop {
            let word = self.next();
            if !skipped.contains(&word.as_str()) {
                return word;
            }
        }
    }
}

/// The place of the first byte from `at` on that is no space, comment or empty statement.
fn skip_blank(dialect: Dialect, text: &[u8], mut at: usize) -> usize {
    loop {
        match text.get(at) {
            Some(b' ' | b'\t' | b'\r' | b'\n' | b'\x0b' | b'\x0c' | b';') => at += 1,
            Some(b'-' | b'/') if is_comment(text, at) => at = skip_comment(dialect, text, at),
            Some(_) if text[at..].starts_with(BYTE_ORDER_MARK) => at += BYTE_ORDER_MARK.len(),
            _ => return at,
        }
    }
}

fn is_comment(text: &[u8], at: usize) -> bool {
    matches!(text.get(at..at + 2), Some(b"--" | b"/*"))
}

/// The place after the comment that begins at `at`. PostgreSQL's nest, SQLite's do not.
fn skip_comment(dialect: Dialect, text: &[u8], at: usize) -> usize {
    if text[at] == b'-' {
        let ends_line = |byte: &u8| match dialect {
            Dialect::Postgres => matches!(byte, b'\n' | b'\r'),
            Dialect::Sqlite => *byte == b'\n',
        };
        let ends = text[at..].iter().position(ends_line);
        return ends.map_or(text.len(), |length| at + length);
    }
    let mut depth = 1;
    let mut at = at + 2;
    while depth > 0 && at < text.len() {
        match text.get(at..at + 2) {
            Some(b"*/") => (depth, at) = (depth - 1, at + 2),
            Some(b"/*") if dialect == Dialect::Postgres => (depth, at) = (depth + 1, at + 2),
            _ => at += 1,
        }
    }
    at
}

/// The place after the quoted text that begins at `at`. A doubled quote is two texts in a row to us.
fn skip_quoted(text: &[u8], at: usize, end: u8) -> usize {
    let length = text[at + 1..].iter().position(|byte| *byte == end);
    length.map_or(text.len(), |length| at + 1 + length + 1)
}

fn word_len(text: &[u8]) -> usize {
    text.iter().take_while(|byte| is_word(**byte)).count()
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$' || byte >= 0x80
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    pub(super) fn check(dialect: Dialect, text: &str, params: usize, expected: Result<&str, &str>) {
        let access = SqlAccess::DataDefinition;
        let seen = super::check(dialect, access, text, params).map_err(|error| match error {
            Error::Database(error) => error.message,
            other => panic!("{text}: {other:?}"),
        });
        match (&seen, expected) {
            (Ok(seen), Ok(expected)) => assert_eq!(seen, expected, "{text}"),
            (Err(seen), Err(expected)) => assert!(seen.contains(expected), "{text}: {seen}"),
            _ => panic!("{text}: {seen:?} instead of {expected:?}"),
        }
    }

    #[test]
    fn finds_the_first_word() {
        for dialect in [Dialect::Postgres, Dialect::Sqlite] {
            check(dialect, " select 1", 0, Ok("SELECT"));
            check(
                dialect,
                "-- why\n/* and */ With x as (select 1) select 2;",
                0,
                Ok("WITH"),
            );
            check(dialect, "(select 1)", 0, Ok(""));
            check(dialect, " -- nothing", 0, Err("empty"));
            check(dialect, "select 1\0; drop table t", 0, Err("code 0"));
            check(
                dialect,
                &" ".repeat(MAX_STATEMENT_BYTES + 1),
                0,
                Err("bytes"),
            );
            check(dialect, "select 1", MAX_PARAMETERS + 1, Err("parameters"));
        }
    }

    #[test]
    fn leaves_transactions_to_the_host() {
        for dialect in [Dialect::Postgres, Dialect::Sqlite] {
            for text in [
                "begin",
                "COMMIT;",
                ";rollback",
                "--\nsavepoint a",
                "\u{feff}BEGIN",
                "end",
            ] {
                check(dialect, text, 0, Err("the host runs the transactions"));
            }
        }
        check(
            Dialect::Postgres,
            "/* /* */ */ start transaction",
            0,
            Err("transactions"),
        );
        check(
            Dialect::Postgres,
            "/* /* */ begin */ select 1",
            0,
            Ok("SELECT"),
        );
        check(Dialect::Sqlite, "/* /* */ begin", 0, Err("transactions"));
        check(Dialect::Sqlite, "vacuum into '/tmp/x'", 0, Err("no files"));
        check(
            Dialect::Postgres,
            "set role admin",
            0,
            Err("connections are shared"),
        );
    }

    #[test]
    fn connections_stay_as_they_are() {
        let postgres = Dialect::Postgres;
        check(postgres, "explain select 1", 0, Ok("EXPLAIN"));
        check(postgres, "do $$ begin end $$", 0, Err("migrations"));
        check(postgres, "listen posts", 0, Err("connections are shared"));
        for text in [
            "create temp table t (a int)",
            "create temporary view v as select 1",
            "create or replace local temp view v as select 1",
        ] {
            check(postgres, text, 0, Err("CREATE TEMP is not for stages"));
        }
        check(
            postgres,
            "create table temperatures (a int)",
            0,
            Ok("CREATE"),
        );
    }
}
