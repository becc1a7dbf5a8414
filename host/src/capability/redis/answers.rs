//! What Redis's errors mean.

use redis::{ErrorKind, RedisError, ServerError};

use super::connection::RESPONSE_TIMEOUT;
use super::{Concern, Error, MAX_ANSWER_BYTES};

/// The first word of the error that the host's script answers where a value is too large.
const TOO_LARGE: &str = "TOOLARGE";

/// The first word of a server that can't save what it has, and takes no writes for it. It refuses `PING`, too.
pub(super) const CAN_NOT_SAVE: &str = "MISCONF";

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
        // Full, a replica, not able to save, without its replicas, starting, busy with a script, open to its own machine only.
        "OOM" | CAN_NOT_SAVE | "NOREPLICAS" | "LOADING" | "BUSY" | "NOGOODSLAVE" | "DENIED" => {
            (Concern::Store, false)
        }
        // A master that became a replica: the address may lead to another by now.
        "READONLY" | "MASTERDOWN" | "UNBLOCKED" => (Concern::Store, true),
        // The password was changed, or the user.
        "NOAUTH" | "WRONGPASS" | "NOPROTO" => (Concern::Store, true),
        // A node of a cluster.
        "MOVED" | "ASK" | "CLUSTERDOWN" | "CROSSSLOT" | "TRYAGAIN" => (Concern::Store, true),
        "NOPERM" => (Concern::Standing, false),
        _ => (Concern::Message, false),
    }
}

/// How proxies and managed servers begin to say that the server is not to be had, or no more of it: they have no words of one
/// kind for it. What they say of one request's size is its own affair, and not among them.
const NOT_TO_BE_HAD: &[&str] = &[
    // A server that has no place left, which proxies hand on.
    "ERR max number of clients reached",
    // Envoy; the last where it sent a command's keys to several servers.
    "no upstream host",
    "upstream failure",
    "upstream protocol error",
    "finished with ",
    // Predixy, in its own spelling.
    "ERR no server connection avaliable",
    "ERR no server avaliable",
    "ERR server connection close",
    "ERR deliver request fail",
    // Twemproxy: the system's words for what its own connection came to.
    "ERR Broken pipe",
    "ERR Connection refused",
    "ERR Connection reset by peer",
    "ERR Connection timed out",
    "ERR Host is down",
    "ERR Network is unreachable",
    "ERR No route to host",
    // Upstash, once a plan is used up.
    "ERR max requests limit exceeded",
    "ERR max daily request limit exceeded",
    "ERR max concurrent connections exceeded",
    "ERR DB capacity quota exceeded",
];

/// Of errors that have no word of their own. Beside those above: scripts that may not do what they do, commands that a server
/// does not have (any more), and a script that an operator ended, who may have meant another.
fn concern_of_text(text: &str) -> Concern {
    const STANDING: &[&str] = &[
        "The user executing the script can't",
        "ACL failure in script",
        "unknown command",
    ];
    const KILLED: &str = "Script killed by user";
    if NOT_TO_BE_HAD.iter().any(|words| text.starts_with(words)) {
        return Concern::Store;
    }
    if STANDING.iter().any(|words| text.contains(words)) {
        return Concern::Standing;
    }
    match text.contains(KILLED) {
        true => Concern::Others,
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
            Concern::Store if matches!(code, "MOVED" | "ASK" | "CLUSTERDOWN" | "CROSSSLOT") => {
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
/// `ERR Error running script (call to f_…): @user_script:4: @user_script: 4: -READONLY You can't write …`, or as
/// `@user_script: 4: -READONLY You can't write …` where the script itself hands it on.
fn of_script<'a>(code: &str, detail: &'a str) -> Option<(&'a str, &'a str)> {
    let is_handed_on = code.starts_with("@user_script");
    let is_inside = code == "ERR" && detail.starts_with("Error running script");
    if !(is_handed_on || is_inside) {
        return None;
    }
    // A line's number may be a part of the first word.
    let answer = match (is_handed_on, detail.strip_prefix('-')) {
        (true, Some(answer)) => answer,
        _ => detail.split_once(": -")?.1,
    };
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
        use Concern::{Message, Others, Standing, Store};
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
                "CROSSSLOT Keys in request don't hash to the same slot",
                Store,
                true,
            ),
            (
                "DENIED Redis is running in protected mode because protected mode is enabled",
                Store,
                false,
            ),
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
            (
                "@user_script: 35: -READONLY You can't write against a read only replica.  ",
                Store,
                true,
            ),
            (
                "@user_script:35: -READONLY You can't write against a read only replica.",
                Store,
                true,
            ),
            (
                "@user_script: 35: -OOM command not allowed when used memory > 'maxmemory'.",
                Store,
                false,
            ),
            (
                "@user_script: 35: -MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist on disk.",
                Store,
                false,
            ),
            (
                "@user_script: 35: -ERR value is not an integer or out of range",
                Message,
                false,
            ),
            (
                "@user_script: 35: The user executing the script can't run this command or subcommand",
                Standing,
                false,
            ),
            (
                "ERR Script killed by user with SCRIPT KILL... script: 6b1bf486c81ceb7edf3c093f4c48582e38c0e791, on @user_script:1.",
                Others,
                false,
            ),
            (
                "ERR Error running script (call to f_6b): @user_script:4: Script killed by user with SCRIPT KILL... ",
                Others,
                false,
            ),
        ] {
            let refusal = refusal(line);
            assert_eq!(refusal.concern, expected, "{line}");
            assert_eq!(refusal.ends_connection, ends_connection, "{line}");
            let is_unavailable = matches!(refusal.error, Error::Unavailable(_));
            assert_eq!(is_unavailable, matches!(expected, Store | Others), "{line}");
        }
    }

    #[test]
    fn what_a_proxy_or_a_managed_server_says_of_itself_is_no_messages() {
        for line in [
            "no upstream host",
            "upstream failure",
            "upstream protocol error",
            "finished with 2 error(s)",
            "ERR no server connection avaliable",
            "ERR server connection close",
            "ERR no server avaliable",
            "ERR deliver request fail",
            "ERR Connection refused",
            "ERR Connection timed out",
            "ERR Host is down",
            "ERR max number of clients reached",
            "ERR max requests limit exceeded. Limit: 500000, Usage: 500000.",
            "ERR max daily request limit exceeded. Limit: 10000, Usage: 10001.",
            "ERR max concurrent connections exceeded",
            "ERR DB capacity quota exceeded. Threshold: 268435456 bytes, Usage: 276006634 bytes",
        ] {
            let refusal = refusal(line);
            assert_eq!(refusal.concern, Concern::Store, "{line}");
            assert_eq!(refusal.error, Error::Unavailable(line.into()));
        }
        for line in [
            "ERR max request size exceeded. Limit: 1048576 bytes, Actual: 2000000 bytes.",
            "ERR max key size exceeded. Limit: 32768 bytes, Actual: 40000 bytes.",
            "ERR max single record size exceeded. Limit: 104857600 bytes, Actual: 104857601 bytes.",
            "invalid request",
            "ERR wrong kind: upstream failure",
        ] {
            assert_eq!(refusal(line).concern, Concern::Message, "{line}");
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
