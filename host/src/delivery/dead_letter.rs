//! The record that a stage gave up on, with why.

use std::sync::Arc;

use super::Fault;
use crate::record::{Header, Outgoing, Record};

/// Bytes of the fault's words in a header; what is longer is cut.
const MAX_MESSAGE: usize = 8 << 10;
/// The same where the letter is too large for its topic.
const SHORT_MESSAGE: usize = 200;
/// The header that has them.
const ERROR_MESSAGE: &str = "__dlq.errors.message";

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
        let message = &fault.message[..fault.message.floor_char_boundary(MAX_MESSAGE)];
        let why = [
            ("__dlq.errors.topic", record.topic.to_string()),
            ("__dlq.errors.partition", record.partition.to_string()),
            ("__dlq.errors.offset", record.offset.to_string()),
            ("__dlq.errors.group", self.group.to_string()),
            ("__dlq.errors.delivery.count", attempts.to_string()),
            (ERROR_MESSAGE, message.to_string()),
            ("stagehost-stage", self.stage.to_string()),
            ("stagehost-component", self.component.to_string()),
            ("stagehost-cause", fault.cause.label().to_string()),
        ];
        let mut headers = record.headers.clone();
        headers.extend(
            why.into_iter()
                .map(|(name, value)| Header::new(name, value)),
        );
        Outgoing {
            topic: self.topic_for(record),
            partition: None,
            timestamp: record.timestamp,
            key: record.key.clone(),
            value: record.value.clone(),
            headers,
        }
    }

    fn topic_for(&self, record: &Record) -> Arc<str> {
        match &self.topic {
            Some(topic) => topic.clone(),
            None => Arc::from(default_topic(&record.topic)),
        }
    }
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
