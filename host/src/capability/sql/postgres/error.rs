//! What PostgreSQL's errors mean.

use sqlx::postgres::{PgDatabaseError, PgSeverity};

use super::super::{DatabaseError, Error, Failure, StoreError, out_of_time, transport_error};

/// What a statement fails with whose plan gives other columns than it did when it was prepared.
pub(super) const STALE_PLAN: &str = "a table was altered after the statement had been prepared";

/// By `statement_timeout`, or by somebody who found that it took too long.
const QUERY_CANCELED: &str = "57014";

/// The error of a statement, in the terms of the interface.
pub(super) fn error_of(error: &sqlx::Error) -> Error {
    let Some(database) = spoken(error) else {
        return transport_error(error);
    };
    if database.routine() == Some("RevalidateCachedQuery") {
        return Error::Unavailable(STALE_PLAN.to_owned());
    }
    if database.code() == QUERY_CANCELED {
        return out_of_time();
    }
    if is_unavailable(database.code()) {
        return Error::Unavailable(database.message().to_owned());
    }
    Error::Database(DatabaseError {
        sqlstate: Some(database.code().to_owned()),
        message: database.message().to_owned(),
        constraint: database.constraint().map(str::to_owned),
    })
}

/// What is known of the connection after a statement that failed.
pub(super) fn failure_of(error: &sqlx::Error) -> Failure {
    const SERIALIZATION_FAILURE: &str = "40001";
    match (spoken(error), error_of(error)) {
        // The server closes the connection after it.
        (Some(database), _)
            if matches!(database.severity(), PgSeverity::Fatal | PgSeverity::Panic) =>
        {
            Failure::Lost(Error::Unavailable(database.message().to_owned()))
        }
        (Some(database), error) if database.code() == SERIALIZATION_FAILURE => {
            Failure::Transaction(error)
        }
        (Some(_), error) | (None, error @ Error::Unsupported(_)) => Failure::Statement(error),
        (None, error) => Failure::Lost(error),
    }
}

/// The server's own words.
fn spoken(error: &sqlx::Error) -> Option<&PgDatabaseError> {
    match error {
        sqlx::Error::Database(error) => error.try_downcast_ref(),
        _ => None,
    }
}

/// What is not about the statement, and may be gone when it is sent again.
fn is_unavailable(sqlstate: &str) -> bool {
    const PROTOCOL_VIOLATION: &str = "08P01";
    match sqlstate {
        // A wrong number of parameters, for one.
        PROTOCOL_VIOLATION => false,
        // Serialization failure, deadlock; shutdowns, start.
        "40001" | "40P01" | "57P01" | "57P02" | "57P03" | "57P05" => true,
        // Lock not available; read-only, as a primary that became a standby is.
        "55P03" | "25006" => true,
        // Connection exceptions; out of connections, memory, disk; system errors.
        _ => matches!(sqlstate.get(..2), Some("08" | "53" | "58")),
    }
}

pub(super) fn open_error(place: &str, error: &sqlx::Error) -> StoreError {
    match error {
        sqlx::Error::Database(_) => match error_of(error) {
            Error::Unavailable(why) => StoreError::Unavailable(format!("{place}: {why}")),
            Error::Database(database) => {
                StoreError::Refused(format!("{place}: {}", database.message))
            }
            other => StoreError::Refused(format!("{place}: {other}")),
        },
        sqlx::Error::Configuration(_) | sqlx::Error::Tls(_) => {
            StoreError::Refused(format!("{place}: {error}"))
        }
        other => StoreError::Unavailable(format!("{place}: {other}")),
    }
}
