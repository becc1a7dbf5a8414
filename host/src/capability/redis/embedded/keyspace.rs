//! The keys, in redb's tables: entries by key, and the keys that expire by their time.

use redb::{
    Database, ReadOnlyTable, ReadTransaction, ReadableTable, Table, TableDefinition,
    WriteTransaction,
};

use super::super::commands::Command;
use super::super::transition::{self, Change, Content, Entry};
use super::super::{Condition, Error, MAX_ANSWER_BYTES, Reply, Set, version_key};

const ENTRIES: TableDefinition<&[u8], &[u8]> = TableDefinition::new("entries");
const EXPIRIES: TableDefinition<(u64, &[u8]), ()> = TableDefinition::new("expiries");
/// Entries that one sweep removes; the next one goes on.
pub(super) const SWEEP_LIMIT: usize = 1_000;

/// What is asked of the writer.
#[derive(Debug)]
pub(super) enum Operation {
    Set(Set),
    Delete(Vec<Vec<u8>>),
    Execute(&'static Command, Vec<Vec<u8>>),
    Sweep,
}

/// What it answers.
#[derive(Debug)]
pub(super) enum Answer {
    Written(Vec<bool>),
    Deleted(u64),
    Reply(Reply),
    /// How many entries were removed.
    Swept(usize),
}

/// Makes the tables of a new database.
pub(super) fn create(database: &Database) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    transaction.open_table(ENTRIES)?;
    transaction.open_table(EXPIRIES)?;
    transaction.commit()?;
    Ok(())
}

/// The key and the other arguments of a command of one key.
pub(super) fn split(arguments: &[Vec<u8>]) -> (&[u8], &[Vec<u8>]) {
    match arguments {
        [key, others @ ..] => (key, others),
        [] => (&[], &[]),
    }
}

/// The entries, to be read.
pub(super) struct Entries(ReadOnlyTable<&'static [u8], &'static [u8]>);

impl Entries {
    pub(super) fn open(transaction: &ReadTransaction) -> Result<Self, redb::Error> {
        Ok(Self(transaction.open_table(ENTRIES)?))
    }

    /// Bytes of a value of Redis's type string, before it is read.
    pub(super) fn value_size(&self, key: &[u8]) -> Result<usize, redb::Error> {
        let found = self.0.get(key)?;
        let found = found.as_ref().map_or(&[][..], |found| found.value());
        let is_value = found.get(HEADER - 1) == Some(&BYTES);
        Ok(if is_value { found.len() - HEADER } else { 0 })
    }

    pub(super) fn entry(&self, key: &[u8], now: u64) -> Result<Option<Entry>, redb::Error> {
        live_entry(&self.0, key, now)
    }
}

/// The keys in one write transaction, all of it at one time.
pub(super) struct Keyspace<'t> {
    entries: Table<'t, &'static [u8], &'static [u8]>,
    expiries: Table<'t, (u64, &'static [u8]), ()>,
    now: u64,
    changed: bool,
}

impl<'t> Keyspace<'t> {
    pub(super) fn open(transaction: &'t WriteTransaction, now: u64) -> Result<Self, redb::Error> {
        Ok(Self {
            entries: transaction.open_table(ENTRIES)?,
            expiries: transaction.open_table(EXPIRIES)?,
            now,
            changed: false,
        })
    }

    /// Whether there is anything to commit.
    pub(super) fn is_changed(&self) -> bool {
        self.changed
    }

    /// The inner error is the operation's own, which has changed nothing then; the outer one is the disk's.
    pub(super) fn apply(
        &mut self,
        operation: Operation,
    ) -> Result<Result<Answer, Error>, redb::Error> {
        Ok(match operation {
            Operation::Set(set) => Ok(Answer::Written(self.set(&set)?)),
            Operation::Delete(keys) => Ok(Answer::Deleted(self.delete(&keys)?)),
            Operation::Execute(command, arguments) => {
                self.execute(command, &arguments)?.map(Answer::Reply)
            }
            Operation::Sweep => Ok(Answer::Swept(self.sweep()?)),
        })
    }

    fn set(&mut self, set: &Set) -> Result<Vec<bool>, redb::Error> {
        let mut written = Vec::with_capacity(set.entries.len());
        for (key, value) in &set.entries {
            let version_key = version_key(key);
            let allowed = self.condition_holds(key, set.condition)?
                && self.is_newer(&version_key, set.version)?;
            written.push(allowed);
            if !allowed {
                continue;
            }
            self.put(key, &self.entry_of(value, set.ttl))?;
            match set.version {
                Some(version) => {
                    let version = version.to_string();
                    self.put(&version_key, &self.entry_of(version.as_bytes(), set.ttl))?;
                }
                None => {
                    self.remove(&version_key)?;
                }
            }
        }
        Ok(written)
    }

    fn entry_of(&self, value: &[u8], ttl: Option<u64>) -> Entry {
        Entry {
            expires: ttl.map(|ttl| self.now.saturating_add(ttl)),
            content: Content::Bytes(value.to_vec()),
        }
    }

    fn condition_holds(
        &self,
        key: &[u8],
        condition: Option<Condition>,
    ) -> Result<bool, redb::Error> {
        let Some(condition) = condition else {
            return Ok(true);
        };
        let there = live_entry(&self.entries, key, self.now)?.is_some();
        Ok(there == (condition == Condition::IfPresent))
    }

    fn is_newer(&self, version_key: &[u8], version: Option<u64>) -> Result<bool, redb::Error> {
        let Some(version) = version else {
            return Ok(true);
        };
        let old = transition::get(live_entry(&self.entries, version_key, self.now)?);
        let old = old
            .ok()
            .flatten()
            .and_then(|old| String::from_utf8(old).ok());
        let old = old.and_then(|old| old.parse::<u64>().ok());
        Ok(old.is_none_or(|old| version > old))
    }

    fn delete(&mut self, keys: &[Vec<u8>]) -> Result<u64, redb::Error> {
        let mut count = 0;
        for key in keys {
            let removed = self.remove(key)?;
            count += u64::from(removed.is_some_and(|entry| entry.is_live(self.now)));
            self.remove(&version_key(key))?;
        }
        Ok(count)
    }

    fn execute(
        &mut self,
        command: &Command,
        arguments: &[Vec<u8>],
    ) -> Result<Result<Reply, Error>, redb::Error> {
        let (key, others) = split(arguments);
        let entry = live_entry(&self.entries, key, self.now)?;
        let (reply, change) = match transition::run(command, entry, others, self.now) {
            Ok(outcome) => outcome,
            Err(message) => return Ok(Err(Error::Server(message))),
        };
        match change {
            Change::Keep => {}
            // What is kept is read whole, and written whole at each change.
            Change::Put(entry) if entry.is_too_large() => {
                return Ok(Err(Error::TooLarge(MAX_ANSWER_BYTES as u64)));
            }
            Change::Put(entry) => self.put(key, &entry)?,
            Change::Remove => {
                self.remove(key)?;
            }
        }
        Ok(Ok(reply))
    }

    /// Removes expired entries, the oldest first.
    fn sweep(&mut self) -> Result<usize, redb::Error> {
        let expired = self
            .expiries
            .range(..(self.now, [].as_slice()))?
            .take(SWEEP_LIMIT)
            .map(|item| item.map(|(key, _)| key.value().1.to_vec()))
            .collect::<Result<Vec<_>, _>>()?;
        for key in &expired {
            self.remove(key)?;
        }
        Ok(expired.len())
    }

    fn put(&mut self, key: &[u8], entry: &Entry) -> Result<(), redb::Error> {
        self.changed = true;
        let old = self.entries.insert(key, encode(entry).as_slice())?;
        let old = old.and_then(|old| expiry(old.value()));
        if let Some(old) = old {
            self.expiries.remove((old, key))?;
        }
        if let Some(expires) = entry.expires {
            self.expiries.insert((expires, key), ())?;
        }
        Ok(())
    }

    fn remove(&mut self, key: &[u8]) -> Result<Option<Entry>, redb::Error> {
        let old = match self.entries.remove(key)? {
            Some(old) => decode(old.value())?,
            None => return Ok(None),
        };
        self.changed = true;
        if let Some(expires) = old.expires {
            self.expiries.remove((expires, key))?;
        }
        Ok(Some(old))
    }
}

fn live_entry(
    entries: &impl ReadableTable<&'static [u8], &'static [u8]>,
    key: &[u8],
    now: u64,
) -> Result<Option<Entry>, redb::Error> {
    let entry = match entries.get(key)? {
        Some(found) => decode(found.value())?,
        None => return Ok(None),
    };
    Ok(entry.is_live(now).then_some(entry))
}

// An entry in bytes: its last millisecond (8 bytes, little-endian), a letter for its type, and what it holds:
// the bytes as they are, or each piece after its length (4 bytes, little-endian).
const NEVER: u64 = u64::MAX;
const BYTES: u8 = b'b';
const HASH: u8 = b'h';
const SET: u8 = b's';
const HEADER: usize = 9;

fn encode(entry: &Entry) -> Vec<u8> {
    let mut bytes = entry.expires.unwrap_or(NEVER).to_le_bytes().to_vec();
    let piece = |bytes: &mut Vec<u8>, piece: &[u8]| {
        bytes.extend((piece.len() as u32).to_le_bytes());
        bytes.extend_from_slice(piece);
    };
    match &entry.content {
        Content::Bytes(value) => {
            bytes.push(BYTES);
            bytes.extend_from_slice(value);
        }
        Content::Hash(fields) => {
            bytes.push(HASH);
            for (field, value) in fields {
                piece(&mut bytes, field);
                piece(&mut bytes, value);
            }
        }
        Content::Set(members) => {
            bytes.push(SET);
            for member in members {
                piece(&mut bytes, member);
            }
        }
    }
    bytes
}

fn decode(bytes: &[u8]) -> Result<Entry, redb::Error> {
    let damaged = || redb::Error::Corrupted("an entry can't be read".to_owned());
    let kind = *bytes.get(HEADER - 1).ok_or_else(damaged)?;
    let payload = &bytes[HEADER..];
    let content = match kind {
        BYTES => Content::Bytes(payload.to_vec()),
        HASH => {
            let pieces = pieces(payload).ok_or_else(damaged)?;
            let pairs = pieces.chunks_exact(2);
            Content::Hash(
                pairs
                    .map(|pair| (pair[0].clone(), pair[1].clone()))
                    .collect(),
            )
        }
        SET => Content::Set(pieces(payload).ok_or_else(damaged)?.into_iter().collect()),
        _ => return Err(damaged()),
    };
    Ok(Entry {
        expires: expiry(bytes),
        content,
    })
}

fn expiry(bytes: &[u8]) -> Option<u64> {
    let expires = u64::from_le_bytes(*bytes.first_chunk()?);
    (expires != NEVER).then_some(expires)
}

fn pieces(mut bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut pieces = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk() {
        let (piece, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        pieces.push(piece.to_vec());
        bytes = rest;
    }
    bytes.is_empty().then_some(pieces)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use redb::backends::InMemoryBackend;
    use redb::{ReadableDatabase, ReadableTableMetadata};

    use super::*;

    #[test]
    fn entries_survive_the_way_there_and_back() {
        let pieces = || ["".into(), "a".into(), vec![0, 255]];
        for content in [
            Content::Bytes(vec![]),
            Content::Bytes(vec![0, 1, 2]),
            Content::Set(BTreeSet::from(pieces())),
            Content::Hash(BTreeMap::from(pieces().map(|piece| (piece.clone(), piece)))),
        ] {
            for expires in [None, Some(0), Some(1 << 62)] {
                let content = content.clone();
                let entry = Entry { expires, content };
                assert_eq!(decode(&encode(&entry)).expect("what was encoded"), entry);
            }
        }
        for damaged in [&[0; 8][..], &[0, 0, 0, 0, 0, 0, 0, 0, b's', 9, 0, 0, 0, 1]] {
            assert!(decode(damaged).is_err());
        }
    }

    #[test]
    fn a_sweep_removes_what_has_expired_and_its_versions() {
        let database = Database::builder().create_with_backend(InMemoryBackend::new());
        let database = database.expect("a database in memory");
        create(&database).expect("new tables");
        let apply = |operation, now| {
            let transaction = database.begin_write().expect("a transaction");
            let mut keyspace = Keyspace::open(&transaction, now).expect("the tables");
            let answer = keyspace.apply(operation).expect("a disk that works");
            drop(keyspace);
            transaction.commit().expect("a disk that works");
            answer.expect("no error of the operation's own")
        };
        let entries = (0..SWEEP_LIMIT).map(|n| (n.to_string().into_bytes(), vec![]));
        let expiring = Set {
            entries: entries.collect(),
            ttl: Some(10),
            version: Some(1),
            ..Set::default()
        };
        apply(Operation::Set(expiring), 0);
        let lasting = Set {
            entries: vec![(b"lasts".to_vec(), vec![])],
            ..Set::default()
        };
        apply(Operation::Set(lasting), 0);
        let counts = || {
            let transaction = database.begin_read().expect("a transaction");
            let entries = transaction.open_table(ENTRIES).expect("the table");
            let expiries = transaction.open_table(EXPIRIES).expect("the table");
            (
                entries.len().expect("a length"),
                expiries.len().expect("a length"),
            )
        };
        let all = 2 * SWEEP_LIMIT as u64;
        for (now, left) in [(10, all), (11, all / 2), (11, 0), (11, 0)] {
            apply(Operation::Sweep, now);
            assert_eq!(counts(), (left + 1, left), "at {now}");
        }
    }
}
