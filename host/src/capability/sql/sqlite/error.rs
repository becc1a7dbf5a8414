//! What SQLite's errors mean.

use super::super::statement::not_supported;
use super::super::{
    DatabaseError, Error, Failure, IN_THE_WAY, StoreError, database_error, out_of_time,
};
use super::connection::MAX_WRITTEN_PAGES;
use super::guard::Guard;
use crate::capability::Concern;

/// The error of a statement, in the terms of the interface.
pub(super) fn error_of(error: &rusqlite::Error) -> Error {
    let (code, message) = match error {
        rusqlite::Error::SqliteFailure(code, message) => (code.extended_code, message.clone()),
        other => return Error::Unsupported(other.to_string()),
    };
    let message = message.unwrap_or_else(|| rusqlite::ffi::code_to_str(code).to_owned());
    match code & 0xff {
        INTERRUPT => return out_of_time(),
        code => match concern(code) {
            Concern::Store => return Error::Unavailable(message),
            Concern::Others => return Error::Unavailable(format!("{IN_THE_WAY}{message}")),
            Concern::Standing | Concern::Message => {}
        },
    }
    Error::Database(DatabaseError {
        sqlstate: sqlstate(code).map(str::to_owned),
        constraint: constraint(code, &message).map(str::to_owned),
        message,
    })
}

/// Whether it is what a statement is refused with that the file's tables have no place for: they, and nothing that it is run with,
/// decide whether it can be prepared.
pub(super) fn is_of_text(error: &rusqlite::Error) -> bool {
    let code = error.sqlite_error().map(|error| error.extended_code);
    code.is_some_and(|code| code & 0xff == ERROR)
}

/// What is known of the connection after a statement that failed.
pub(super) fn failure_of(error: &rusqlite::Error, guard: &Guard) -> Failure {
    // SQLite says nothing of what the authorizer and the functions know better.
    if let Some(why) = guard.with_sender(|sender| sender.refusal.take()) {
        return Failure::Statement(not_supported(why));
    }
    if guard.is_full() {
        let message = format!("the transaction writes more than {MAX_WRITTEN_PAGES} pages");
        return Failure::Statement(database_error(LIMIT_EXCEEDED, message));
    }
    if guard.is_over() {
        return Failure::Statement(out_of_time());
    }
    let is_busy = super::connection::IsBusy::is_busy(error);
    match error_of(error) {
        error if is_busy => Failure::Busy(error),
        error => Failure::Statement(error),
    }
}

/// What a primary result code speaks of.
fn concern(code: i32) -> Concern {
    match code {
        PERMISSION | BUSY | LOCKED | READ_ONLY | IO_ERROR | CORRUPT | FULL | CANNOT_OPEN
        | PROTOCOL | NOT_A_DATABASE => Concern::Store,
        // All stages' memory, and other work may have it.
        NO_MEMORY => Concern::Others,
        _ => Concern::Message,
    }
}

// SQLite's result codes.
const ERROR: i32 = 1;
const PERMISSION: i32 = 3;
const BUSY: i32 = 5;
const LOCKED: i32 = 6;
const NO_MEMORY: i32 = 7;
const READ_ONLY: i32 = 8;
const INTERRUPT: i32 = 9;
const IO_ERROR: i32 = 10;
const CORRUPT: i32 = 11;
const FULL: i32 = 13;
const CANNOT_OPEN: i32 = 14;
const PROTOCOL: i32 = 15;
const TOO_BIG: i32 = 18;
const CONSTRAINT: i32 = 19;
const MISMATCH: i32 = 20;
const NOT_A_DATABASE: i32 = 26;
const CONSTRAINT_CHECK: i32 = 275;
const CONSTRAINT_FOREIGN_KEY: i32 = 787;
const CONSTRAINT_NOT_NULL: i32 = 1299;
const CONSTRAINT_PRIMARY_KEY: i32 = 1555;
const CONSTRAINT_TRIGGER: i32 = 1811;
const CONSTRAINT_UNIQUE: i32 = 2067;
const CONSTRAINT_ROW_ID: i32 = 2579;
const CONSTRAINT_DATA_TYPE: i32 = 3091;

const LIMIT_EXCEEDED: &str = "54000";

/// What PostgreSQL calls it.
fn sqlstate(code: i32) -> Option<&'static str> {
    Some(match code {
        CONSTRAINT_UNIQUE | CONSTRAINT_PRIMARY_KEY | CONSTRAINT_ROW_ID => "23505",
        CONSTRAINT_NOT_NULL => "23502",
        CONSTRAINT_FOREIGN_KEY => "23503",
        CONSTRAINT_CHECK => "23514",
        CONSTRAINT_TRIGGER => "P0001",
        CONSTRAINT_DATA_TYPE => "42804",
        _ => match code & 0xff {
            CONSTRAINT => "23000",
            MISMATCH => "42804",
            TOO_BIG => LIMIT_EXCEEDED,
            _ => return None,
        },
    })
}

/// `UNIQUE constraint failed: posts.slug` names the columns, `CHECK constraint failed: positive` the constraint.
fn constraint(code: i32, message: &str) -> Option<&str> {
    match code {
        CONSTRAINT_UNIQUE | CONSTRAINT_PRIMARY_KEY | CONSTRAINT_CHECK => message
            .split_once(" constraint failed: ")
            .map(|(_, name)| name),
        _ => None,
    }
}

pub(super) fn open_error(place: &str, error: &sqlx::Error) -> StoreError {
    let sqlx::Error::Database(database) = error else {
        return StoreError::Unavailable(format!("{place}: {error}"));
    };
    let code: i32 = database
        .code()
        .and_then(|code| code.parse().ok())
        .unwrap_or_default();
    let message = format!("{place}: {}", database.message());
    match code & 0xff {
        INTERRUPT | BUSY | LOCKED | NO_MEMORY | IO_ERROR | FULL | CANNOT_OPEN => {
            StoreError::Unavailable(message)
        }
        // A file that is no database, or damaged, is one that the pipeline is to be mended for.
        _ => StoreError::Refused(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_codes_speak_of_the_file_or_of_the_message() {
        let cases = [
            (FULL, Concern::Store),
            (READ_ONLY, Concern::Store),
            (IO_ERROR, Concern::Store),
            (BUSY, Concern::Store),
            (CANNOT_OPEN, Concern::Store),
            (CORRUPT, Concern::Store),
            (NO_MEMORY, Concern::Others),
            (CONSTRAINT, Concern::Message),
            (TOO_BIG, Concern::Message),
            (ERROR, Concern::Message),
        ];
        for (code, expected) in cases {
            assert_eq!(concern(code), expected, "{code}");
        }
    }
}
