//! What Redis's errors mean.

use redis::{ErrorKind, RedisError, ServerError};

use super::connection::RESPONSE_TIMEOUT;
use super::{Concern, Error, MAX_ANSWER_BYTES};

/// The first word of the error that the host's script answers where a value is too large.
const TOO_LARGE: &str = "TOOLARGE";

/// An error, and what it speaks of.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) concern: Concern,
    /// The connection is of no use any more: it was let in as somebody that it is not now, or leads to a server that can't help.
    pub(super) ends_connection: bool,
    /// No answer came in time.
    pub(super) is_late: bool,
    /// It did not let the host's user in.
    pub(super) is_login: bool,
    pub(super) error: Error,
}

/// What an error speaks of, by its first word; and whether it ends the connection.
fn concern(code: &str) -> (Concern, bool) {
    match code {
        // Full, a replica, not able to save, without its replicas, starting, busy with a script.
        "OOM" | "MISCONF" | "NOREPLICAS" | "LOADING" | "BUSY" | "NOGOODSLAVE" => {
            (Concern::Store, false)
        }
        // A master that became a replica: the address may lead to another by now.
        "READONLY" | "MASTERDOWN" | "UNBLOCKED" => (Concern::Store, true),
        // The password was changed, or the user.
        "NOAUTH" | "WRONGPASS" | "NOPROTO" => (Concern::Store, true),
        // A node of a cluster.
        "MOVED" | "ASK" | "CLUSTERDOWN" | "TRYAGAIN" => (Concern::Store, true),
        "NOPERM" => (Concern::Standing, false),
        _ => (Concern::Message, false),
    }
}

/// Of errors that have no word of their own. Scripts that may not do what they do, and commands that a server does not have
/// (any more).
fn concern_of_text(text: &str) -> Concern {
    const STANDING: &[&str] = &[
        "The user executing the script can't",
        "ACL failure in script",
        "unknown command",
    ];
    match STANDING.iter().any(|words| text.contains(words)) {
        true => Concern::Standing,
        false => Concern::Message,
    }
}

impl Refusal {
    pub(super) fn of(error: RedisError) -> Self {
        if error.kind() == ErrorKind::AuthenticationFailed {
            let why = format!("{error}: were the password or the user changed?");
            return Self {
                is_login: true,
                ..Self::unavailable(why, true)
            };
        }
        if error.kind() == ErrorKind::Parse {
            let why = format!("what answers there does not speak Redis's protocol: {error}");
            return Self::unavailable(why, true);
        }
        let (is_late, is_of_client) = (
            error.is_timeout(),
            matches!(
                error.kind(),
                ErrorKind::UnexpectedReturnType | ErrorKind::Client
            ),
        );
        let text = match is_late {
            true => format!("no answer within {} s", RESPONSE_TIMEOUT.as_secs()),
            false => error.to_string(),
        };
        match error.into_server_errors() {
            Some(said) => Self::spoken(&said),
            None if is_of_client => Self {
                concern: Concern::Message,
                ends_connection: false,
                is_late: false,
                is_login: false,
                error: Error::Server(text),
            },
            None => Self {
                is_late,
                ..Self::unavailable(text, !is_late)
            },
        }
    }

    fn unavailable(why: String, ends_connection: bool) -> Self {
        Self {
            concern: Concern::Store,
            ends_connection,
            is_late: false,
            is_login: false,
            error: Error::Unavailable(why),
        }
    }

    /// Of the server's own errors, the one that says most.
    fn spoken(said: &[(usize, ServerError)]) -> Self {
        let all = said.iter().map(|(_, error)| Self::of_server(error));
        let rank = |refusal: &Self| match refusal.concern {
            Concern::Store => 3,
            Concern::Standing => 2,
            Concern::Others => 1,
            Concern::Message => 0,
        };
        // The first of those that weigh the same.
        let most = all.rev().max_by_key(rank);
        most.unwrap_or_else(|| Self::unavailable("it was refused without a word".to_owned(), false))
    }

    pub(super) fn of_server(error: &ServerError) -> Self {
        let code = error.code();
        let detail = error.details().unwrap_or_default().trim_end();
        let (code, detail) = of_script(code, detail).unwrap_or((code, detail));
        if code == TOO_LARGE {
            return Self {
                concern: Concern::Message,
                ends_connection: false,
                is_late: false,
                is_login: false,
                error: Error::TooLarge(MAX_ANSWER_BYTES as u64),
            };
        }
        let text = format!("{code} {detail}");
        let (concern, ends_connection) = match concern(code) {
            (Concern::Message, ends) => (concern_of_text(&text), ends),
            known => known,
        };
        let error = match concern {
            Concern::Store if matches!(code, "MOVED" | "ASK" | "CLUSTERDOWN") => {
                Error::Unavailable(format!("{text}: {CLUSTER}"))
            }
            Concern::Store | Concern::Others => Error::Unavailable(text),
            Concern::Standing | Concern::Message => Error::Server(text),
        };
        Self {
            concern,
            ends_connection,
            is_late: false,
            is_login: matches!(code, "NOAUTH" | "WRONGPASS"),
            error,
        }
    }
}

/// What a command was answered that a script had called: before version 7 a server hands it on inside of words of its own, as
/// `ERR Error running script (call to f_…): @user_script:4: @user_script: 4: -READONLY You can't write …`.
fn of_script<'a>(code: &str, detail: &'a str) -> Option<(&'a str, &'a str)> {
    if code != "ERR" || !detail.starts_with("Error running script") {
        return None;
    }
    let (_, answer) = detail.split_once(": -")?;
    Some(answer.split_once(' ').unwrap_or((answer, "")))
}

/// What to do about one.
pub(super) const CLUSTER: &str = "it is a node of a Redis Cluster, which the host does not support: take a server without \
                                  `cluster-enabled`, or a proxy that hides the cluster";

#[cfg(test)]
mod tests {
    use redis::{Value, parse_redis_value};

    use super::*;

    fn refusal(line: &str) -> Refusal {
        let value = parse_redis_value(format!("-{line}\r\n").as_bytes()).expect("an answer");
        let Value::ServerError(error) = value else {
            panic!("{value:?}")
        };
        Refusal::of_server(&error)
    }

    #[test]
    fn answers_speak_of_the_store_of_rights_or_of_the_message() {
        use Concern::{Message, Standing, Store};
        for (line, expected, ends_connection) in [
            (
                "OOM command not allowed when used memory > 'maxmemory'.",
                Store,
                false,
            ),
            (
                "MISCONF Redis is configured to save RDB snapshots",
                Store,
                false,
            ),
            (
                "NOREPLICAS Not enough good replicas to write.",
                Store,
                false,
            ),
            (
                "LOADING Redis is loading the dataset in memory",
                Store,
                false,
            ),
            ("BUSY Redis is busy running a script.", Store, false),
            (
                "READONLY You can't write against a read only replica.",
                Store,
                true,
            ),
            ("MASTERDOWN Link with MASTER is down", Store, true),
            ("NOAUTH Authentication required.", Store, true),
            ("WRONGPASS invalid username-password pair", Store, true),
            ("MOVED 3999 127.0.0.1:6381", Store, true),
            ("CLUSTERDOWN Hash slot not served", Store, true),
            (
                "NOPERM this user has no permissions to run the 'set' command",
                Standing,
                false,
            ),
            (
                "ERR The user executing the script can't run this command",
                Standing,
                false,
            ),
            ("ERR unknown command 'GETDEL', with args", Standing, false),
            (
                "WRONGTYPE Operation against a key holding the wrong kind",
                Message,
                false,
            ),
            (
                "ERR value is not an integer or out of range",
                Message,
                false,
            ),
            ("TOOLARGE the answer", Message, false),
            (
                "ERR Error running script (call to f_6b): @user_script:4: @user_script: 4: -OOM command not allowed",
                Store,
                false,
            ),
            (
                "ERR Error running script (call to f_6b): @user_script:4: -READONLY You can't write",
                Store,
                true,
            ),
            (
                "ERR Error running script (call to f_6b): @user_script:4: Script attempted to access a missing field",
                Message,
                false,
            ),
        ] {
            let refusal = refusal(line);
            assert_eq!(refusal.concern, expected, "{line}");
            assert_eq!(refusal.ends_connection, ends_connection, "{line}");
            let is_unavailable = matches!(refusal.error, Error::Unavailable(_));
            assert_eq!(is_unavailable, expected == Store, "{line}");
        }
    }

    #[test]
    fn of_several_errors_the_one_that_says_most_is_named() {
        let errors = ["ERR wrong number", "READONLY You can't write", "ERR other"];
        let errors =
            errors.map(
                |line| match parse_redis_value(format!("-{line}\r\n").as_bytes()) {
                    Ok(Value::ServerError(error)) => (0, error),
                    other => panic!("{other:?}"),
                },
            );
        let refusal = Refusal::spoken(&errors);
        assert_eq!(
            refusal.error,
            Error::Unavailable("READONLY You can't write".into())
        );
        assert!(refusal.ends_connection);
    }
}
