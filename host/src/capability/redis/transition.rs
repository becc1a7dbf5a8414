//! What a command makes of the entry at its key: pure functions, in Redis's semantics and words.

use std::collections::{BTreeMap, BTreeSet};

use super::commands::Command;
use super::{MAX_ANSWER_BYTES, MAX_ANSWER_ITEMS, Reply};

const WRONG_TYPE: &str = "WRONGTYPE Operation against a key holding the wrong kind of value";
const NO_INTEGER: &str = "ERR value is not an integer or out of range";
const OVERFLOW: &str = "ERR increment or decrement would overflow";
const DECREMENT_OVERFLOW: &str = "ERR decrement would overflow";

/// What is kept at a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The last millisecond of its life, since the Unix epoch.
    pub(super) expires: Option<u64>,
    pub(super) content: Content,
}

/// Redis's types.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Bytes(Vec<u8>),
    Hash(BTreeMap<Vec<u8>, Vec<u8>>),
    Set(BTreeSet<Vec<u8>>),
}

impl Entry {
    pub(super) fn is_live(&self, now: u64) -> bool {
        self.expires.is_none_or(|expires| now <= expires)
    }

    /// Whether it has more than one answer can carry.
    pub(super) fn is_too_large(&self) -> bool {
        let (items, bytes) = match &self.content {
            Content::Bytes(bytes) => (1, bytes.len()),
            Content::Hash(fields) => {
                let bytes = fields
                    .iter()
                    .map(|(field, value)| field.len() + value.len());
                (fields.len(), bytes.sum())
            }
            Content::Set(members) => (members.len(), members.iter().map(Vec::len).sum()),
        };
        items > MAX_ANSWER_ITEMS || bytes > MAX_ANSWER_BYTES
    }

    fn lasting(content: Content) -> Self {
        Self {
            expires: None,
            content,
        }
    }
}

/// What becomes of the entry.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    Keep,
    Put(Entry),
    Remove,
}

type Outcome = Result<(Reply, Change), String>;

/// Runs a command of one key on what is there. `arguments` are those after the key; there are as many as the
/// command takes.
pub(super) fn run(
    command: &Command,
    entry: Option<Entry>,
    arguments: &[Vec<u8>],
    now: u64,
) -> Outcome {
    match (command.name, arguments) {
        ("APPEND", [more]) => append(entry, more),
        ("DECR", []) => add(entry, -1),
        ("DECRBY", [count]) => match integer(count)?.checked_neg() {
            Some(delta) => add(entry, delta),
            None => Err(DECREMENT_OVERFLOW.to_owned()),
        },
        ("EXPIRE", [seconds]) => {
            let millis = integer(seconds)?.checked_mul(1000);
            expire("expire", entry, millis, now)
        }
        ("GETDEL", []) => get_and(entry, |found| match found {
            true => Change::Remove,
            false => Change::Keep,
        }),
        ("GETRANGE", [start, end]) => get_range(entry, start, end),
        ("GETSET", [value]) => get_and(entry, |_| {
            Change::Put(Entry::lasting(Content::Bytes(value.clone())))
        }),
        ("HDEL", fields) => hash_delete(entry, fields),
        ("HGET", [field]) => hash_get(entry, field),
        ("HGETALL", []) => hash_get_all(entry),
        ("HSET", pairs) => hash_set(entry, pairs),
        ("INCR", []) => add(entry, 1),
        ("INCRBY", [count]) => add(entry, integer(count)?),
        ("PERSIST", []) => persist(entry),
        ("PEXPIRE", [millis]) => expire("pexpire", entry, Some(integer(millis)?), now),
        ("PTTL", []) => Ok(keep(time_to_live(entry.as_ref(), now))),
        ("SADD", members) => set_add(entry, members),
        ("SETNX", [value]) => match entry {
            Some(_) => Ok(keep(Reply::Int(0))),
            None => {
                let entry = Entry::lasting(Content::Bytes(value.clone()));
                Ok((Reply::Int(1), Change::Put(entry)))
            }
        },
        ("SISMEMBER", [member]) => {
            let found = set(entry)?.is_some_and(|(_, members)| members.contains(member));
            Ok(keep(Reply::Int(found.into())))
        }
        ("SMEMBERS", []) => {
            let members = set(entry)?.map(|(_, members)| members);
            Ok(keep(Reply::Items(members.into_iter().flatten().collect())))
        }
        ("SREM", members) => set_remove(entry, members),
        ("STRLEN", []) => {
            let length = bytes(entry)?.map_or(0, |(_, bytes)| bytes.len());
            Ok(keep(Reply::Int(length as i64)))
        }
        ("TTL", []) => Ok(keep(match time_to_live(entry.as_ref(), now) {
            Reply::Int(millis) if millis >= 0 => Reply::Int((millis + 500) / 1000),
            other => other,
        })),
        ("TYPE", []) => Ok(keep(Reply::Status(type_name(entry.as_ref()).to_owned()))),
        (name, _) => Err(format!("ERR unknown command '{name}'")),
    }
}

/// The value at a key of Redis's type string.
pub(super) fn get(entry: Option<Entry>) -> Result<Option<Vec<u8>>, String> {
    Ok(bytes(entry)?.map(|(_, bytes)| bytes))
}

fn keep(reply: Reply) -> (Reply, Change) {
    (reply, Change::Keep)
}

/// Redis takes no plus sign, no leading zero, no minus zero.
fn integer(text: &[u8]) -> Result<i64, String> {
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| Some((text, text.parse::<i64>().ok()?)))
        .filter(|(text, number)| number.to_string() == *text)
        .map(|(_, number)| number)
        .ok_or_else(|| NO_INTEGER.to_owned())
}

/// What is there, and how long it lives.
type Found<T> = Option<(Option<u64>, T)>;

fn bytes(entry: Option<Entry>) -> Result<Found<Vec<u8>>, String> {
    match entry {
        None => Ok(None),
        Some(Entry {
            expires,
            content: Content::Bytes(bytes),
        }) => Ok(Some((expires, bytes))),
        Some(_) => Err(WRONG_TYPE.to_owned()),
    }
}

type Fields = BTreeMap<Vec<u8>, Vec<u8>>;

fn hash(entry: Option<Entry>) -> Result<Found<Fields>, String> {
    match entry {
        None => Ok(None),
        Some(Entry {
            expires,
            content: Content::Hash(fields),
        }) => Ok(Some((expires, fields))),
        Some(_) => Err(WRONG_TYPE.to_owned()),
    }
}

type Members = BTreeSet<Vec<u8>>;

fn set(entry: Option<Entry>) -> Result<Found<Members>, String> {
    match entry {
        None => Ok(None),
        Some(Entry {
            expires,
            content: Content::Set(members),
        }) => Ok(Some((expires, members))),
        Some(_) => Err(WRONG_TYPE.to_owned()),
    }
}

fn append(entry: Option<Entry>, more: &[u8]) -> Outcome {
    let (expires, mut bytes) = bytes(entry)?.unwrap_or_default();
    bytes.extend_from_slice(more);
    let reply = Reply::Int(bytes.len() as i64);
    let content = Content::Bytes(bytes);
    Ok((reply, Change::Put(Entry { expires, content })))
}

fn add(entry: Option<Entry>, delta: i64) -> Outcome {
    let (expires, number) = match bytes(entry)? {
        Some((expires, bytes)) => (expires, integer(&bytes)?),
        None => (None, 0),
    };
    let sum = number.checked_add(delta).ok_or(OVERFLOW)?;
    let content = Content::Bytes(sum.to_string().into_bytes());
    Ok((Reply::Int(sum), Change::Put(Entry { expires, content })))
}

fn get_and(entry: Option<Entry>, change: impl FnOnce(bool) -> Change) -> Outcome {
    let value = get(entry)?;
    let change = change(value.is_some());
    Ok((value.map_or(Reply::Nil, Reply::Data), change))
}

/// Places count from 0, or from the end where they are negative; `end` is the last one.
fn get_range(entry: Option<Entry>, start: &[u8], end: &[u8]) -> Outcome {
    let (start, end) = (integer(start)?, integer(end)?);
    let bytes = get(entry)?.unwrap_or_default();
    let length = bytes.len() as i64;
    let place = |at: i64| {
        if at < 0 {
            (length.saturating_add(at)).max(0)
        } else {
            at
        }
    };
    // Redis's special case: both before the beginning, in the wrong order.
    if start < 0 && end < 0 && start > end {
        return Ok(keep(Reply::Data(Vec::new())));
    }
    let (start, end) = (place(start), place(end).min(length - 1));
    let range = if start > end {
        &[]
    } else {
        &bytes[start as usize..=end as usize]
    };
    Ok(keep(Reply::Data(range.to_vec())))
}

/// `millis` is none where the seconds are too many.
fn expire(name: &str, entry: Option<Entry>, millis: Option<i64>, now: u64) -> Outcome {
    let expires = millis
        .and_then(|millis| i64::try_from(now).ok()?.checked_add(millis))
        .ok_or_else(|| format!("ERR invalid expire time in '{name}' command"))?;
    let Some(entry) = entry else {
        return Ok(keep(Reply::Int(0)));
    };
    let change = match u64::try_from(expires) {
        Ok(expires) if expires > now => Change::Put(Entry {
            expires: Some(expires),
            ..entry
        }),
        _ => Change::Remove,
    };
    Ok((Reply::Int(1), change))
}

fn persist(entry: Option<Entry>) -> Outcome {
    match entry {
        Some(Entry {
            expires: Some(_),
            content,
        }) => Ok((Reply::Int(1), Change::Put(Entry::lasting(content)))),
        _ => Ok(keep(Reply::Int(0))),
    }
}

fn time_to_live(entry: Option<&Entry>, now: u64) -> Reply {
    Reply::Int(match entry {
        None => -2,
        Some(entry) => entry
            .expires
            .map_or(-1, |expires| expires.saturating_sub(now) as i64),
    })
}

fn type_name(entry: Option<&Entry>) -> &'static str {
    match entry.map(|entry| &entry.content) {
        None => "none",
        Some(Content::Bytes(_)) => "string",
        Some(Content::Hash(_)) => "hash",
        Some(Content::Set(_)) => "set",
    }
}

fn hash_get(entry: Option<Entry>, field: &[u8]) -> Outcome {
    let value = hash(entry)?.and_then(|(_, mut fields)| fields.remove(field));
    Ok(keep(value.map_or(Reply::Nil, Reply::Data)))
}

fn hash_get_all(entry: Option<Entry>) -> Outcome {
    let fields = hash(entry)?.map(|(_, fields)| fields);
    let items = fields.into_iter().flatten();
    let items = items.flat_map(|(field, value)| [field, value]);
    Ok(keep(Reply::Items(items.collect())))
}

fn hash_set(entry: Option<Entry>, pairs: &[Vec<u8>]) -> Outcome {
    let (expires, mut fields) = hash(entry)?.unwrap_or_default();
    let before = fields.len();
    for pair in pairs.chunks_exact(2) {
        fields.insert(pair[0].clone(), pair[1].clone());
    }
    let reply = Reply::Int((fields.len() - before) as i64);
    let content = Content::Hash(fields);
    Ok((reply, Change::Put(Entry { expires, content })))
}

fn hash_delete(entry: Option<Entry>, names: &[Vec<u8>]) -> Outcome {
    let Some((expires, mut fields)) = hash(entry)? else {
        return Ok(keep(Reply::Int(0)));
    };
    let before = fields.len();
    fields.retain(|name, _| !names.contains(name));
    let reply = Reply::Int((before - fields.len()) as i64);
    let empty = fields.is_empty();
    Ok((reply, put_unless(empty, expires, Content::Hash(fields))))
}

fn set_add(entry: Option<Entry>, added: &[Vec<u8>]) -> Outcome {
    let (expires, mut members) = set(entry)?.unwrap_or_default();
    let before = members.len();
    members.extend(added.iter().cloned());
    let reply = Reply::Int((members.len() - before) as i64);
    let content = Content::Set(members);
    Ok((reply, Change::Put(Entry { expires, content })))
}

fn set_remove(entry: Option<Entry>, removed: &[Vec<u8>]) -> Outcome {
    let Some((expires, mut members)) = set(entry)? else {
        return Ok(keep(Reply::Int(0)));
    };
    let before = members.len();
    for member in removed {
        members.remove(member);
    }
    let reply = Reply::Int((before - members.len()) as i64);
    let empty = members.is_empty();
    Ok((reply, put_unless(empty, expires, Content::Set(members))))
}

/// An empty hash or set is no key.
fn put_unless(empty: bool, expires: Option<u64>, content: Content) -> Change {
    if empty {
        Change::Remove
    } else {
        Change::Put(Entry { expires, content })
    }
}
