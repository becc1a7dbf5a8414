//! What is left to see to where the driver does not.

use super::{
    BYTE_ORDER_MARK, Dialect, Error, PROTOCOL_VIOLATION, SYNTAX_ERROR, TRANSACTIONS,
    database_error, is_comment, is_word, refusal, skip_blank, skip_comment, skip_quoted, word_len,
};

/// One statement, and placeholders `$1` to `$params` only; and none that ends a transaction when it fails.
pub(super) fn check(text: &[u8], params: usize) -> Result<(), Error> {
    let mut at = 0;
    let mut before = Before::default();
    while at < text.len() {
        if !text[at].is_ascii_whitespace() && !is_comment(text, at) {
            before.check(&text[at..])?;
        }
        at = match text[at] {
            b'\'' | b'"' | b'`' => skip_quoted(text, at, text[at]),
            b'[' => skip_quoted(text, at, b']'),
            b'-' | b'/' if is_comment(text, at) => skip_comment(Dialect::Sqlite, text, at),
            b';' => {
                if skip_blank(Dialect::Sqlite, text, at) < text.len() {
                    let message = "cannot insert multiple commands into a prepared statement";
                    return Err(database_error(SYNTAX_ERROR, message));
                }
                return Ok(());
            }
            b'$' => {
                let name = &text[at + 1..at + 1 + word_len(&text[at + 1..])];
                check_placeholder(name, params)?;
                skip_casts(text, at + 1 + name.len())?
            }
            _ if text[at..].starts_with(BYTE_ORDER_MARK) => at + BYTE_ORDER_MARK.len(),
            b'?' | b':' | b'@' | b'#' => {
                let message = "parameters are written $1, $2, …";
                return Err(database_error(SYNTAX_ERROR, message));
            }
            byte if is_word(byte) => at + word_len(&text[at..]),
            _ => at + 1,
        };
    }
    Ok(())
}

/// The last two tokens of a statement of SQLite.
#[derive(Default)]
struct Before<'a>(&'a [u8], &'a [u8]);

impl<'a> Before<'a> {
    /// Refuses what has a failure undo the whole transaction, and end it: `OR ROLLBACK`, `ON CONFLICT ROLLBACK` and
    /// `RAISE(ROLLBACK, …)`. Elsewhere it is a name like others.
    fn check(&mut self, rest: &'a [u8]) -> Result<(), Error> {
        let token = &rest[..word_len(rest).max(1)];
        if token.eq_ignore_ascii_case(b"ROLLBACK") {
            let follows = |first: &[u8], second: &[u8]| {
                self.0.eq_ignore_ascii_case(first) && self.1.eq_ignore_ascii_case(second)
            };
            if follows(b"INSERT", b"OR") || follows(b"UPDATE", b"OR") {
                return Err(refusal("OR ROLLBACK", TRANSACTIONS));
            }
            if follows(b"ON", b"CONFLICT") || follows(b"RAISE", b"(") {
                return Err(refusal("ROLLBACK", TRANSACTIONS));
            }
        }
        *self = Self(self.1, token);
        Ok(())
    }
}

/// The place after the `::type`s at `at`: SQLite takes them for a part of the placeholder's name, so
/// that PostgreSQL's casts of parameters do no harm. It takes a `(…)` for a part too, quotes and all.
fn skip_casts(text: &[u8], mut at: usize) -> Result<usize, Error> {
    while text[at..].starts_with(b"::") {
        at += 2 + word_len(&text[at + 2..]);
    }
    if text.get(at) == Some(&b'(') {
        return Err(database_error(SYNTAX_ERROR, "near \"(\": syntax error"));
    }
    Ok(at)
}

fn check_placeholder(name: &[u8], params: usize) -> Result<(), Error> {
    let number = std::str::from_utf8(name)
        .ok()
        .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|name| name.parse::<usize>().ok())
        .filter(|number| *number > 0);
    match number {
        None => {
            let message = "parameters are written $1, $2, …";
            Err(database_error(SYNTAX_ERROR, message))
        }
        Some(number) if number > params => {
            let message =
                format!("the statement has ${number}, but {params} parameters were given");
            Err(database_error(PROTOCOL_VIOLATION, message))
        }
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Dialect;
    use super::super::tests::check;

    #[test]
    fn sqlite_ends_no_transaction_by_itself() {
        let sqlite = Dialect::Sqlite;
        for text in [
            "insert or rollback into t values (1)",
            "update or /* a */ rollback t set a = 1",
            "create table t (a unique on conflict Rollback)",
            "create trigger x before insert on t begin select raise ( -- \n rollback, 'no'); end",
            "with x as (select 1) insert or rollback into t select * from x",
        ] {
            check(sqlite, text, 0, Err("the host runs the transactions"));
        }
        for text in [
            "insert or ignore into t values ('or rollback')",
            "insert into t values (1) on conflict do nothing",
            "select a or rollback, \"rollback\" from t",
        ] {
            let keyword = text.split(' ').next().unwrap_or_default();
            check(sqlite, text, 0, Ok(&keyword.to_ascii_uppercase()));
        }
        check(Dialect::Postgres, "select 1 or rollback", 0, Ok("SELECT"));
    }

    #[test]
    fn sqlite_takes_one_statement_and_numbered_parameters() {
        let sqlite = Dialect::Sqlite;
        check(sqlite, "select 1; -- done\n ;", 0, Ok("SELECT"));
        check(
            sqlite,
            "select ';'; delete from t",
            0,
            Err("multiple commands"),
        );
        check(
            sqlite,
            "select ';', \"a;b\", `c;d`, [e;f], 'it''s;' /* ; */ -- ;",
            0,
            Ok("SELECT"),
        );
        check(sqlite, "select $1, $2", 2, Ok("SELECT"));
        check(sqlite, "select $2, $1", 1, Err("has $2, but 1"));
        check(sqlite, "select $0", 1, Err("written $1"));
        check(sqlite, "select $name", 1, Err("written $1"));
        check(sqlite, "select ?", 1, Err("written $1"));
        check(sqlite, "select :a", 1, Err("written $1"));
        check(sqlite, "select $1::jsonb, $2 :: text", 2, Err("written $1"));
        check(sqlite, "select $1::jsonb", 1, Ok("SELECT"));
        check(sqlite, "select \u{feff}$0", 1, Err("written $1"));
        check(sqlite, "select $1('); commit --')", 1, Err("syntax error"));
        check(
            sqlite,
            "select 1 --\r '\n; commit -- '",
            1,
            Err("multiple commands"),
        );
        check(
            sqlite,
            "select a$1, '$9', data->>'$.x' from t where b = $1",
            1,
            Ok("SELECT"),
        );
    }
}
