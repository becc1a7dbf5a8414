//! What a call takes of a server's user, and what each grant's calls have done: rights are given by commands and by keys.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::commands::{self, Command};
use super::{Set, version_key};

/// What calls are named by that are no commands of the table.
pub(super) const GET: &str = "get";
pub(super) const GET_MANY: &str = "get-many";
pub(super) const SET: &str = "set";
pub(super) const SET_IF: &str = "set-if";
pub(super) const DELETE: &str = "delete";

/// Bytes of the value that a probe would write.
pub(super) const PROBE_BYTES: usize = 1024;
/// Rights do not depend on which script it is.
const ANY_SCRIPT: &[u8; 40] = &[b'0'; 40];

/// A kind of call: all that takes the same commands.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Get,
    /// What `get` asks further where there is no value.
    GetNothing,
    GetMany,
    /// Whatever is there.
    Set,
    /// One key, with a version.
    SetNewer,
    /// Whatever else there is to be seen to.
    SetAll {
        condition: bool,
        version: bool,
    },
    Delete,
    Execute(&'static Command),
}

impl Kind {
    /// How these are set.
    pub(super) fn of_set(set: &Set) -> Self {
        match (set.entries.as_slice(), set.condition, set.version, set.ttl) {
            (_, None, None, _) => Self::Set,
            ([_], None, Some(_), None) => Self::SetNewer,
            (_, condition, version, _) => Self::SetAll {
                condition: condition.is_some(),
                version: version.is_some(),
            },
        }
    }

    /// The kinds that calls of that name may be of.
    pub(super) fn named(name: &str) -> Vec<Self> {
        let all = |condition, version| Self::SetAll { condition, version };
        match name {
            GET => vec![Self::Get, Self::GetNothing],
            GET_MANY | "MGET" => vec![Self::GetMany],
            SET => vec![Self::Set],
            SET_IF => vec![
                Self::SetNewer,
                all(true, false),
                all(false, true),
                all(true, true),
            ],
            DELETE => vec![Self::Delete],
            name => commands::lookup(name)
                .map(Self::Execute)
                .into_iter()
                .collect(),
        }
    }

    /// What it is remembered by.
    fn bit(self) -> u64 {
        1 << match self {
            Self::Get => 0,
            Self::GetNothing => 1,
            Self::GetMany => 2,
            Self::Set => 3,
            Self::SetNewer => 4,
            Self::SetAll { condition, version } => {
                5 + usize::from(condition) + 2 * usize::from(version)
            }
            Self::Delete => 9,
            Self::Execute(command) => 10 + commands::index(command),
        }
    }

    /// The commands that it takes, on this key, each with its arguments. Their values are not looked at.
    pub(super) fn commands(self, key: &[u8]) -> Vec<Vec<Vec<u8>>> {
        let words = |words: &[&[u8]]| -> Vec<_> { words.iter().map(|w| w.to_vec()).collect() };
        let (versions, value) = (version_key(key), [b'x'; PROBE_BYTES]);
        let set = |key: &[u8]| words(&[b"SET", key, &value, b"XX"]);
        let script = words(&[b"EVALSHA", ANY_SCRIPT, b"1", key]);
        let versioned = words(&[b"EVALSHA", ANY_SCRIPT, b"2", key, &versions]);
        // A server that was started anew has no script any more.
        let load = words(&[b"SCRIPT", b"LOAD", b"return 1"]);
        match self {
            Self::Get => vec![words(&[b"GETRANGE", key, b"0", b"0"])],
            Self::GetNothing => vec![load, script, words(&[b"GET", key])],
            Self::GetMany => vec![load, script, words(&[b"MGET", key])],
            Self::Set => vec![set(key), words(&[b"DEL", &versions])],
            Self::SetNewer => vec![
                load,
                versioned,
                words(&[b"GET", &versions]),
                words(&[b"MSET", key, &value, &versions, b"1"]),
            ],
            Self::SetAll { condition, version } => {
                let mut all = vec![load, versioned, set(key)];
                if condition {
                    all.push(words(&[b"EXISTS", key]));
                }
                if version {
                    all.extend([words(&[b"GET", &versions]), set(&versions)]);
                } else {
                    all.push(words(&[b"DEL", &versions]));
                }
                all
            }
            Self::Delete => vec![
                load,
                versioned,
                words(&[b"DEL", key]),
                words(&[b"DEL", &versions]),
            ],
            Self::Execute(command) if command.answers_content => {
                vec![load, script, command.example(key)]
            }
            Self::Execute(command) => vec![command.example(key)],
        }
    }
}

/// What the server has done for one grant, and at which key: its user may have rights to some keys only, and the grant to
/// more, or to none that the host could make up.
#[derive(Debug, Default)]
pub(super) struct Done {
    /// A bit for each kind that was done since it was last refused, so that a call that is done costs a look.
    settled: AtomicU64,
    keys: Mutex<BTreeMap<u64, Vec<u8>>>,
}

impl Done {
    /// It was done, at this key.
    pub(super) fn note(&self, kind: Kind, key: &[u8]) {
        let bit = kind.bit();
        if self.settled.load(Ordering::Relaxed) & bit == 0 {
            self.keys().insert(bit, key.to_vec());
            self.settled.fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// It was refused. Answers where it was done before, if it was. The next key takes that one's place: what is done at any key
    /// now says more than what was done once.
    pub(super) fn refuse(&self, kind: Kind) -> Option<Vec<u8>> {
        self.settled.fetch_and(!kind.bit(), Ordering::Relaxed);
        self.key(kind)
    }

    /// Where it was done.
    pub(super) fn key(&self, kind: Kind) -> Option<Vec<u8>> {
        self.keys().get(&kind.bit()).cloned()
    }

    fn keys(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<u8>>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_remembered_by_itself() {
        let calls = [GET, GET_MANY, SET, SET_IF, DELETE].into_iter();
        let names = calls.chain(commands::names().filter(|name| *name != "MGET"));
        let mut seen = 0;
        for kind in names.flat_map(Kind::named) {
            assert_eq!(seen & kind.bit(), 0, "{kind:?}");
            seen |= kind.bit();
        }
        let done = Done::default();
        done.note(Kind::SetNewer, b"a");
        assert_eq!(done.refuse(Kind::Set), None);
        assert_eq!(done.key(Kind::SetNewer), Some(b"a".to_vec()));
    }

    #[test]
    fn the_key_that_was_done_last_is_known_once_one_was_refused() {
        let done = Done::default();
        done.note(Kind::Get, b"a");
        done.note(Kind::Get, b"b");
        assert_eq!(done.refuse(Kind::Get), Some(b"a".to_vec()));
        done.note(Kind::Get, b"c");
        done.note(Kind::Get, b"d");
        assert_eq!(done.key(Kind::Get), Some(b"c".to_vec()));
    }

    #[test]
    fn a_call_is_rehearsed_with_what_it_takes_and_no_more() {
        let names = |kind: Kind| -> Vec<String> {
            let commands = kind.commands(b"k");
            let name = |words: &Vec<Vec<u8>>| String::from_utf8_lossy(&words[0]).into_owned();
            commands.iter().map(name).collect()
        };
        assert_eq!(names(Kind::Get), ["GETRANGE"]);
        assert_eq!(names(Kind::GetNothing), ["SCRIPT", "EVALSHA", "GET"]);
        assert_eq!(names(Kind::GetMany), ["SCRIPT", "EVALSHA", "MGET"]);
        let content = commands::lookup("GETDEL").expect("a command");
        assert_eq!(
            names(Kind::Execute(content)),
            ["SCRIPT", "EVALSHA", "GETDEL"]
        );
        assert_eq!(names(Kind::Set), ["SET", "DEL"]);
        assert_eq!(names(Kind::Delete), ["SCRIPT", "EVALSHA", "DEL", "DEL"]);
        assert_eq!(names(Kind::SetNewer), ["SCRIPT", "EVALSHA", "GET", "MSET"]);
        let absent = Kind::SetAll {
            condition: true,
            version: false,
        };
        assert_eq!(names(absent), ["SCRIPT", "EVALSHA", "SET", "EXISTS", "DEL"]);
    }
}
