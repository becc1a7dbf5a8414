//! What PostgreSQL's errors mean.

use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::ErrorResponseBody;
use sqlx::postgres::PgDatabaseError;

use super::super::{DatabaseError, Error, Failure, StoreError, out_of_time, transport_error};
use super::server::LoginError;

/// What a statement fails with whose plan gives other columns than it did when it was prepared.
pub(super) const STALE_PLAN: &str = "a table was altered after the statement had been prepared";
/// By `statement_timeout`, or by somebody who found that it took too long.
const QUERY_CANCELED: &str = "57014";
/// Bytes that are kept of the server's words: it quotes values, however long they are.
const MAX_WORDS: usize = 8 * 1024;

/// The server's own words.
#[derive(Debug, Default)]
pub(super) struct Spoken {
    severity: String,
    pub(super) code: String,
    pub(super) message: String,
    constraint: Option<String>,
    routine: Option<String>,
}

impl Spoken {
    pub(super) fn read(body: &ErrorResponseBody) -> Self {
        let mut spoken = Self::default();
        let mut fields = body.fields();
        // What can't be read has no words.
        while let Ok(Some(field)) = fields.next() {
            let text = words(&field.value_bytes()[..field.value_bytes().len().min(MAX_WORDS)]);
            match field.type_() {
                // The second one is not translated, and comes later.
                b'S' | b'V' => spoken.severity = text,
                b'C' => spoken.code = text,
                b'M' => spoken.message = text,
                b'n' => spoken.constraint = Some(text),
                b'R' => spoken.routine = Some(text),
                _ => {}
            }
        }
        spoken
    }

    /// As the driver of the migrations has it.
    fn of(error: &PgDatabaseError) -> Self {
        Self {
            severity: String::new(),
            code: error.code().to_owned(),
            message: error.message().to_owned(),
            constraint: error.constraint().map(str::to_owned),
            routine: error.routine().map(str::to_owned),
        }
    }

    /// In the terms of the interface.
    pub(super) fn error(self) -> Error {
        if self.routine.as_deref() == Some("RevalidateCachedQuery") {
            return Error::Unavailable(STALE_PLAN.to_owned());
        }
        if self.code == QUERY_CANCELED {
            return out_of_time();
        }
        if is_unavailable(&self.code) {
            return Error::Unavailable(self.message);
        }
        Error::Database(DatabaseError {
            sqlstate: Some(self.code),
            message: self.message,
            constraint: self.constraint,
        })
    }

    /// What is known of the connection after it.
    pub(super) fn failure(self) -> Failure {
        const SERIALIZATION_FAILURE: &str = "40001";
        // The server closes the connection after it.
        if matches!(self.severity.as_str(), "FATAL" | "PANIC") {
            return Failure::Lost(Error::Unavailable(self.message));
        }
        let is_of_transaction = self.code == SERIALIZATION_FAILURE;
        match (is_of_transaction, self.error()) {
            (true, error) => Failure::Transaction(error),
            (false, error) => Failure::Statement(error),
        }
    }
}

fn words(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The error of the driver of the migrations.
pub(super) fn error_of(error: &sqlx::Error) -> Error {
    let spoken = match error {
        sqlx::Error::Database(error) => error.try_downcast_ref().map(Spoken::of),
        _ => None,
    };
    spoken.map_or_else(|| transport_error(error), Spoken::error)
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

/// Why a database can't be opened, with its place.
pub(super) fn open_error(place: &str, error: &sqlx::Error) -> StoreError {
    match error {
        sqlx::Error::Configuration(_) | sqlx::Error::Tls(_) => {
            StoreError::Refused(format!("{place}: {error}"))
        }
        other => at(place, error_of(other).into()),
    }
}

/// The same with its place.
pub(super) fn at(place: &str, error: StoreError) -> StoreError {
    match error {
        StoreError::Unavailable(why) => StoreError::Unavailable(format!("{place}: {why}")),
        StoreError::Refused(why) => StoreError::Refused(format!("{place}: {why}")),
    }
}

impl From<LoginError> for StoreError {
    fn from(error: LoginError) -> Self {
        match error {
            LoginError::Away(why) => Self::Unavailable(why),
            LoginError::Refused(why) => Self::Refused(why),
            LoginError::Spoken(spoken) => spoken.error().into(),
        }
    }
}
