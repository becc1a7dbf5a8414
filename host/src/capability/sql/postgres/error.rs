//! What PostgreSQL's errors mean.

use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::ErrorResponseBody;
use sqlx::postgres::PgDatabaseError;

use super::super::{
    CANCELED, DatabaseError, ENDED, Error, Failure, IN_THE_WAY, LOCKED, StoreError, transport_error,
};
use super::server::LoginError;
use crate::capability::Concern;

/// What a statement fails with whose plan gives other columns than it did when it was prepared.
pub(super) const STALE_PLAN: &str = "a table was altered after the statement had been prepared";
/// By `statement_timeout`, or by somebody who found that it took too long.
const QUERY_CANCELED: &str = "57014";
/// By `lock_timeout`, or for `NOWAIT`.
const LOCK_NOT_AVAILABLE: &str = "55P03";
/// By `idle_in_transaction_session_timeout`.
const IDLE_IN_TRANSACTION: &str = "25P03";
/// By `transaction_timeout`, which version 17 has.
const TRANSACTION_TIMEOUT: &str = "25P04";
/// By `idle_session_timeout`.
const IDLE_SESSION: &str = "57P05";
/// What a database says that is a replica, or was made read-only. Also what a stage is told that may only read.
pub(super) const READ_ONLY: &str = "25006";
/// What PgBouncer says of what a client asks for at its login.
const UNSUPPORTED: &str = "unsupported startup parameter";
/// Bytes that are kept of the server's words: it quotes values, however long they are.
const MAX_WORDS: usize = 8 * 1024;

/// The server's own words.
#[derive(Debug, Default)]
pub(super) struct Spoken {
    severity: String,
    pub(super) code: String,
    pub(super) message: String,
    constraint: Option<String>,
    /// A prepared statement's plan is what is wrong.
    is_of_plan: bool,
    /// It is of the server's work on its files.
    is_of_files: bool,
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
                b'R' => spoken.is_of_plan = is_of_plan(&text),
                b'F' => spoken.is_of_files = is_of_files(&text),
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
            is_of_plan: error.routine().is_some_and(is_of_plan),
            is_of_files: error.file().is_some_and(is_of_files),
        }
    }

    /// In the terms of the interface.
    pub(super) fn error(self) -> Error {
        if self.is_of_plan {
            return Error::Unavailable(STALE_PLAN.to_owned());
        }
        match self.code.as_str() {
            // Whether it was for its time, who has watched it knows.
            QUERY_CANCELED => {
                return Error::Unavailable(format!("{CANCELED}{}", self.message));
            }
            LOCK_NOT_AVAILABLE => return Error::Unavailable(format!("{LOCKED}{}", self.message)),
            _ if self.is_of_storage() => return Error::Unavailable(self.message),
            _ => {}
        }
        match concern(&self.code) {
            // Whose doing it is, depends on who asked.
            Concern::Store if self.code != READ_ONLY => return Error::Unavailable(self.message),
            Concern::Others => {
                return Error::Unavailable(format!("{IN_THE_WAY}{}", self.message));
            }
            _ => {}
        }
        Error::Database(DatabaseError {
            sqlstate: Some(self.code),
            message: self.message,
            constraint: self.constraint,
        })
    }

    /// Whether it is a system's error at the server's files that has no code of its own there: a quota that is used up, or a
    /// file system that became read-only, which it calls a want of privileges.
    fn is_of_storage(&self) -> bool {
        self.is_of_files && matches!(self.code.as_str(), "XX000" | "42501")
    }

    /// Who logs in, where, and with which settings of the URL's `options`.
    fn is_about_login(&self) -> bool {
        self.code == "3D000" || matches!(self.code.get(..2), Some("22" | "28" | "42"))
    }

    /// Where there is no session: whether one is to be had later.
    fn at_login(self) -> StoreError {
        // As the pipeline has them, who logs in and where are wrong, and waiting is no help at a start.
        if self.is_about_login() {
            return StoreError::Refused(self.message);
        }
        if self.message.contains(UNSUPPORTED) {
            return StoreError::Refused(format!(
                "{}: it is PgBouncer, which needs `ignore_startup_parameters = extra_float_digits` and \
                 `pool_mode = session` for this host",
                self.message
            ));
        }
        // No statement was sent that could be wrong: it is the server's state, or a pooler's, whose codes say nothing.
        StoreError::Unavailable(self.message)
    }

    /// Whether the session is of no use any more, though the server keeps it: what it was let into is not what it was, or its
    /// statements are another's. A server elsewhere may be what the address leads to by now.
    pub(super) fn ends_session(&self) -> bool {
        const UNKNOWN_PLAN: &str = "26000";
        const OTHERS_PLAN: &str = "42P05";
        matches!(
            self.code.as_str(),
            READ_ONLY | UNKNOWN_PLAN | OTHERS_PLAN | IDLE_SESSION | "57P01" | "57P02" | "57P03"
        )
    }

    /// What is known of the connection after it.
    pub(super) fn failure(self) -> Failure {
        const SERIALIZATION_FAILURE: &str = "40001";
        let limit = match self.code.as_str() {
            IDLE_IN_TRANSACTION => Some("idle_in_transaction_session_timeout"),
            TRANSACTION_TIMEOUT => Some("transaction_timeout"),
            _ => None,
        };
        if let Some(limit) = limit {
            let said = self.message;
            return Failure::Lost(Error::Unavailable(format!(
                "{ENDED}{said} ({limit} of the role or the database)"
            )));
        }
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

/// Whether this routine of the server's looks whether plans still hold.
fn is_of_plan(routine: &str) -> bool {
    routine == "RevalidateCachedQuery"
}

/// Whether the server's work on its files is in this file of its source.
fn is_of_files(source: &str) -> bool {
    matches!(
        source,
        "md.c" | "fd.c" | "buffile.c" | "slru.c" | "xlog.c" | "copydir.c"
    )
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

/// What an error speaks of, by its SQLSTATE.
pub(super) fn concern(sqlstate: &str) -> Concern {
    match sqlstate {
        // A wrong number of parameters, for one: a protocol violation. What a stage's temporary files may have.
        "08P01" | "53400" => Concern::Message,
        // Serialization failure, deadlock, lock not available, object in use, snapshot too old.
        "40001" | "40P01" | "55P03" | "55006" | "72000" => Concern::Others,
        // Shutdowns, start, a database that is dropped, sessions that were idle for too long.
        "57P01" | "57P02" | "57P03" | "57P04" | "57P05" | "25P03" => Concern::Store,
        // Read-only, as a primary that became a standby is.
        READ_ONLY => Concern::Store,
        // Prepared statements that the session does not have, or another's: a pooler is between.
        "26000" | "42P05" => Concern::Store,
        // Damaged data or indexes; a foreign server that is away.
        "XX001" | "XX002" | "HV00N" => Concern::Store,
        // Insufficient privilege; no such table, column, function, schema, type; no unique index for ON CONFLICT; a view or
        // another kind in the place of a table; a column that is generated by now.
        "42501" | "42P01" | "42703" | "42883" | "3F000" | "42704" | "42P10" | "42809" | "55000"
        | "428C9" => Concern::Standing,
        // Connections; out of connections, memory, disk; system errors; configuration files.
        _ => match sqlstate.get(..2) {
            Some("08" | "53" | "58" | "F0") => Concern::Store,
            _ => Concern::Message,
        },
    }
}

/// Whether the way to the server broke within a TLS handshake, and not what was agreed on there.
pub(super) fn is_of_way(error: &(dyn std::error::Error + 'static)) -> bool {
    /// As OpenSSL has it: of version 3, and of those before.
    const ENDED: [&str; 2] = ["unexpected eof while reading", "unexpected EOF"];
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|cause| cause.is::<std::io::Error>())
        || ENDED.iter().any(|ended| error.to_string().contains(ended))
}

/// Why a database can't be opened, with its place.
pub(super) fn open_error(place: &str, error: &sqlx::Error) -> StoreError {
    match error {
        sqlx::Error::Tls(why) if is_of_way(&**why) => {
            StoreError::Unavailable(format!("{place}: {error}"))
        }
        sqlx::Error::Configuration(_) | sqlx::Error::Tls(_) => {
            StoreError::Refused(format!("{place}: {error}"))
        }
        sqlx::Error::Database(said) => match said.try_downcast_ref() {
            Some(said) => at(place, Spoken::of(said).at_login()),
            None => StoreError::Unavailable(format!("{place}: {error}")),
        },
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
            LoginError::Away(why) | LoginError::Mute(why) => Self::Unavailable(why),
            LoginError::Refused(why) => Self::Refused(why),
            LoginError::Spoken(spoken) => spoken.at_login(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sqlstates_speak_of_the_store_of_others_of_rights_or_of_the_message() {
        use Concern::{Message, Others, Standing, Store};
        for (expected, codes) in [
            (
                Store,
                "08000 08006 25006 53000 53100 53200 53300 57P01 57P02 57P03 57P04 58000 58030 58P01 \
                 26000 42P05 XX001 F0000",
            ),
            (Others, "40001 40P01 55P03"),
            (Standing, "42501 42P01 42703 3F000"),
            (
                Message,
                "08P01 53400 22001 22012 23505 23514 42601 42804 P0001 54000 57014 XX000 0A000 2201B",
            ),
        ] {
            for code in codes.split_whitespace() {
                assert_eq!(concern(code), expected, "{code}");
            }
        }
    }

    #[test]
    fn what_a_server_or_a_pooler_says_at_the_login_is_waited_for_unless_the_login_is_wrong() {
        let said = |(code, message): (&str, &str)| {
            let spoken = Spoken {
                severity: "FATAL".to_owned(),
                code: code.to_owned(),
                message: message.to_owned(),
                ..Spoken::default()
            };
            StoreError::from(LoginError::Spoken(spoken))
        };
        for away in [
            (
                "08P01",
                "server login has been failing, try again later (server_login_retry)",
            ),
            ("08P01", "query_wait_timeout"),
            ("08P01", "no more connections allowed (max_client_conn)"),
            ("08P01", "pgbouncer cannot connect to server"),
            (
                "55000",
                "database \"posts\" is not currently accepting connections",
            ),
            ("XX000", "Max client connections reached"),
            ("57P03", "the database system is starting up"),
            ("53300", "sorry, too many clients already"),
        ] {
            let error = said(away);
            assert!(
                matches!(&error, StoreError::Unavailable(why) if why == away.1),
                "{error:?}"
            );
        }
        for wrong in [
            ("28P01", "password authentication failed for user \"posts\""),
            (
                "28000",
                "no pg_hba.conf entry for host \"10.0.0.1\", user \"posts\"",
            ),
            ("3D000", "database \"posts\" does not exist"),
            ("42501", "permission denied for database \"posts\""),
            ("42704", "unrecognized configuration parameter \"posts\""),
            (
                "22023",
                "invalid value for parameter \"work_mem\": \"posts\"",
            ),
            ("08P01", "unsupported startup parameter: extra_float_digits"),
        ] {
            let error = said(wrong);
            assert!(
                matches!(&error, StoreError::Refused(why) if why.starts_with(wrong.1)),
                "{error:?}"
            );
        }
    }

    #[test]
    fn errors_at_the_servers_files_speak_of_the_store_and_its_limits_of_time() {
        let spoken = |code: &str, file: &str| Spoken {
            code: code.to_owned(),
            message: "words".to_owned(),
            is_of_files: is_of_files(file),
            ..Spoken::default()
        };
        for (code, file) in [
            ("XX000", "md.c"),
            ("42501", "fd.c"),
            ("53100", "md.c"),
            // `could not write to file "base/pgsql_tmp/…": Disk quota exceeded`.
            ("XX000", "buffile.c"),
        ] {
            let error = spoken(code, file).error();
            assert_eq!(error, Error::Unavailable("words".into()), "{code} {file}");
        }
        for (code, file) in [
            ("XX000", "relcache.c"),
            ("42501", "aclchk.c"),
            ("53400", "fd.c"),
        ] {
            let error = spoken(code, file).error();
            assert!(matches!(error, Error::Database(_)), "{code} {file}");
        }
        for (code, limit) in [
            ("25P03", "idle_in_transaction_session_timeout"),
            ("25P04", "transaction_timeout"),
        ] {
            match spoken(code, "postgres.c").failure() {
                Failure::Lost(Error::Unavailable(why)) => {
                    assert!(why.starts_with(ENDED) && why.contains(limit), "{why}");
                }
                other => panic!("{code}: {other:?}"),
            }
        }
    }
}
