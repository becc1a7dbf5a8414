//! The record that a stage gave up on, with why.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::Fault;
use super::seen::{self, OutputId};
use crate::log::LogError;
use crate::record::{Header, Outgoing, Record};

/// Bytes of the fault's words where the letter is too large for its topic.
const SHORT_MESSAGE: usize = 200;
/// Bytes of its value then, at first, and where that is too much too.
const KEPT_VALUE: usize = 64 << 10;
const SHORT_VALUE: usize = 256;
/// An id of more bytes is none.
const MAX_KEPT_ID: usize = 2 << 10;
/// A key of more bytes may be why.
const SHORT_KEY: usize = 64;
/// The header that has the fault's words.
const ERROR_MESSAGE: &str = "__dlq.errors.message";
/// The headers that say where the letter's record is.
const ERROR_TOPIC: &str = "__dlq.errors.topic";
const ERROR_PARTITION: &str = "__dlq.errors.partition";
const ERROR_OFFSET: &str = "__dlq.errors.offset";
/// The headers that say what of a letter is not the record's, since the log refused it: `<part>: <what it was>`.
pub const CUT: &str = "stagehost-cut";
/// The header that has the record's timestamp, in milliseconds, where the log does not take it.
pub const TIMESTAMP: &str = "stagehost-timestamp";
/// The header that has the fault's cause; a stage can't set it.
pub const CAUSE: &str = "stagehost-cause";

/// What the dead letters of one stage carry beside the record and the fault.
#[derive(Clone, Debug)]
pub struct DeadLetters {
    /// The stage's name.
    pub stage: Arc<str>,
    /// Its consumer group.
    pub group: Arc<str>,
    /// SHA-256 of its component file, in hex.
    pub component: Arc<str>,
    /// Where to; `None` is `<topic of the record>.dlq`.
    pub topic: Option<Arc<str>>,
}

impl DeadLetters {
    /// The dead letter: key, value, headers and timestamp byte for byte, and why it was given up on
    /// after `attempts` deliveries. The header names are relied on by others.
    pub fn letter(&self, record: &Record, attempts: u32, fault: &Fault) -> Outgoing {
        let Record {
            topic,
            partition,
            offset,
            ..
        } = record;
        let mut headers = without_id(&record.headers);
        headers.extend(self.why(topic, *partition, *offset, attempts, fault));
        Outgoing {
            topic: self.topic_for(topic),
            partition: None,
            timestamp: record.timestamp,
            key: record.key.clone(),
            value: record.value.clone(),
            headers,
        }
    }

    /// The dead letter of an output that the log refused after its message had been committed: the output, and which
    /// message it came of, as far as its id says. The letter's own id is to be added by who knows where it goes.
    pub fn refused(&self, output: &Outgoing, fault: &Fault) -> Outgoing {
        let id = id_of_output(output);
        let of = id.as_ref().and_then(|id| {
            let (_, topic, partition) = id.source()?;
            Some((topic, partition, id.place.offset))
        });
        let (topic, partition, offset) = of.unwrap_or((&output.topic, -1, -1));
        let mut headers = without_id(&output.headers);
        headers.extend(self.why(topic, partition, offset, 1, fault));
        Outgoing {
            topic: self.topic_for(topic),
            partition: None,
            headers,
            ..output.clone()
        }
    }

    fn why(
        &self,
        topic: &str,
        partition: i32,
        offset: i64,
        attempts: u32,
        fault: &Fault,
    ) -> impl Iterator<Item = Header> {
        let why = [
            (ERROR_TOPIC, topic.to_string()),
            (ERROR_PARTITION, partition.to_string()),
            (ERROR_OFFSET, offset.to_string()),
            ("__dlq.errors.group", self.group.to_string()),
            ("__dlq.errors.delivery.count", attempts.to_string()),
            (ERROR_MESSAGE, fault.message.clone()),
            ("stagehost-stage", self.stage.to_string()),
            ("stagehost-component", self.component.to_string()),
            (CAUSE, fault.cause.label().to_string()),
        ];
        why.into_iter()
            .map(|(name, value)| Header::new(name, value))
    }

    /// Where the dead letters of an input go.
    pub fn topic_for(&self, input: &str) -> Arc<str> {
        match &self.topic {
            Some(topic) => topic.clone(),
            None => Arc::from(default_topic(input)),
        }
    }
}

/// The id of an output that is on its way.
pub fn id_of_output(output: &Outgoing) -> Option<OutputId> {
    let header = output.headers.iter().rfind(|h| h.name == seen::HEADER)?;
    std::str::from_utf8(header.value.as_deref()?)
        .ok()?
        .parse()
        .ok()
}

/// Headers for a letter: the id is kept under another name, so that what is sent back with all of them is new.
fn without_id(headers: &[Header]) -> Vec<Header> {
    let mut headers = headers.to_vec();
    for header in headers.iter_mut().filter(|h| h.name == seen::HEADER) {
        header.name = seen::ORIGINAL.to_owned();
    }
    headers
}

/// The topic of the record that a dead letter is of, where a record has a letter's headers.
pub(super) fn sent_back_from(record: &Record) -> Option<&str> {
    let headers = &record.headers;
    headers.iter().find(|h| h.name == CAUSE)?;
    let topic = headers.iter().rfind(|h| h.name == ERROR_TOPIC)?;
    std::str::from_utf8(topic.value.as_deref()?).ok()
}

/// Whether an output is a dead letter.
pub fn is_one(output: &Outgoing) -> bool {
    output.headers.iter().any(|h| h.name == CAUSE)
}

/// Changes a dead letter that the log has refused so that it may take it, a step each time, and answers what was changed, in
/// words; `None` where nothing is left that could help. A bad message must not stop its partition: what is cut has its size and
/// its hash in a header [`CUT`], and the letter says where the original is.
pub fn mend(letter: &mut Outgoing, error: &LogError) -> Option<&'static str> {
    match error {
        LogError::TooLarge(_) => shrink(letter),
        LogError::InvalidTime(_) => {
            let timestamp = letter.timestamp.take()?;
            let original = Header::new(TIMESTAMP, timestamp.to_string());
            letter.headers.push(original);
            Some("its time is in a header")
        }
        // A compacted topic takes nothing without a key.
        LogError::Invalid(_) if letter.key.is_none() => {
            letter.key = Some(place(letter).into_bytes());
            say_cut(letter, "key", "none, where the topic takes none without");
            Some("its place is its key")
        }
        // Where another partition is, its id does not count.
        LogError::NoPartition(_) => {
            letter.partition.take()?;
            letter.headers.retain(|header| header.name != seen::HEADER);
            Some("its partition is chosen anew")
        }
        LogError::Invalid(_) | LogError::Refused(_) | LogError::Unavailable(_) => None,
    }
}

fn shrink(letter: &mut Outgoing) -> Option<&'static str> {
    if shorten(letter) {
        return Some("the fault's words are cut");
    }
    if cut_value(letter, KEPT_VALUE) {
        return Some("its value is cut");
    }
    if cut_headers(letter) {
        return Some("the record's headers are cut");
    }
    if cut_value(letter, SHORT_VALUE) || cut_value(letter, 0) {
        return Some("its value is cut");
    }
    let key = letter.key.as_ref().filter(|key| key.len() > SHORT_KEY)?;
    let (of, hash) = (digest(key), Sha256::digest(key).to_vec());
    letter.key = Some(hash);
    say_cut(letter, "key", &of);
    Some("its key is its hash")
}

/// Cuts the fault's words.
fn shorten(letter: &mut Outgoing) -> bool {
    // A letter that was sent back has those of its first way before.
    let mut headers = letter.headers.iter_mut().rev();
    let words = headers.find(|header| header.name == ERROR_MESSAGE);
    let words = words.and_then(|header| header.value.as_mut());
    let Some(words) = words.filter(|words| words.len() > SHORT_MESSAGE) else {
        return false;
    };
    words.truncate(SHORT_MESSAGE);
    // It was UTF-8 before it was cut.
    while std::str::from_utf8(words).is_err() {
        words.pop();
    }
    true
}

fn cut_value(letter: &mut Outgoing, kept: usize) -> bool {
    let Some(value) = letter.value.take_if(|value| value.len() > kept) else {
        return false;
    };
    letter.value = Some(value[..kept].to_vec());
    // What is cut once more was cut of the same.
    let own = &letter.headers[own_headers(letter)..];
    if !own.iter().any(|h| is_cut(h, "value")) {
        say_cut(letter, "value", &digest(&value));
    }
    true
}

/// Leaves out what is the record's, whatever it is called, but for an id of some length.
fn cut_headers(letter: &mut Outgoing) -> bool {
    let (all, bytes) = (letter.headers.len(), letter.size());
    let own = letter.headers.split_off(own_headers(letter));
    letter.headers.retain(|header| {
        let length = header.value.as_ref().map_or(0, Vec::len);
        header.name == seen::ORIGINAL && length <= MAX_KEPT_ID
    });
    letter.headers.truncate(1);
    letter.headers.extend(own);
    let (left, bytes) = (letter.headers.len(), bytes - letter.size());
    if left < all {
        let left_out = format!("{} of {bytes} bytes left out", all - left);
        say_cut(letter, "headers", &left_out);
    }
    left < all
}

/// Where the headers begin that the host has added: with the topic that it names last.
fn own_headers(letter: &Outgoing) -> usize {
    let mut headers = letter.headers.iter();
    headers
        .rposition(|header| header.name == ERROR_TOPIC)
        .unwrap_or(letter.headers.len())
}

fn say_cut(letter: &mut Outgoing, part: &str, of: &str) {
    let header = Header::new(CUT, format!("{part}: {of}"));
    letter.headers.push(header);
}

fn is_cut(header: &Header, part: &str) -> bool {
    let says = header.value.as_deref().unwrap_or_default();
    header.name == CUT && says.starts_with(part.as_bytes())
}

fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    format!("{} bytes, sha256 {hash:x}", bytes.len())
}

/// Where the original of a dead letter is: `topic/partition/offset`.
pub fn place(letter: &Outgoing) -> String {
    let of = |name| {
        let header = letter.headers.iter().rfind(|h| h.name == name);
        let value = header.and_then(|h| h.value.as_deref()).unwrap_or_default();
        String::from_utf8_lossy(value)
    };
    format!(
        "{}/{}/{}",
        of(ERROR_TOPIC),
        of(ERROR_PARTITION),
        of(ERROR_OFFSET)
    )
}

/// Where the dead letters of an input topic go unless the stage says otherwise.
pub fn default_topic(input: &str) -> String {
    format!("{input}.dlq")
}
