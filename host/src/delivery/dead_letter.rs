//! The record that a stage gave up on, with why.

use std::sync::Arc;

use super::Fault;
use super::seen::{self, OutputId};
use crate::record::{Header, Outgoing, Record};

/// Bytes of the fault's words where the letter is too large for its topic.
const SHORT_MESSAGE: usize = 200;
/// The header that names the topic of the letter's record.
const ERROR_TOPIC: &str = "__dlq.errors.topic";
/// The header that has the fault's words.
const ERROR_MESSAGE: &str = "__dlq.errors.message";
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
            ("__dlq.errors.partition", partition.to_string()),
            ("__dlq.errors.offset", offset.to_string()),
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

/// Cuts the fault's words of a dead letter that is too large for its topic.
pub fn shorten(letter: &mut Outgoing) {
    for header in &mut letter.headers {
        if header.name == ERROR_MESSAGE
            && let Some(words) = &mut header.value
        {
            words.truncate(SHORT_MESSAGE);
            // It was UTF-8 before it was cut.
            while std::str::from_utf8(words).is_err() {
                words.pop();
            }
        }
    }
}

/// Where the dead letters of an input topic go unless the stage says otherwise.
pub fn default_topic(input: &str) -> String {
    format!("{input}.dlq")
}
