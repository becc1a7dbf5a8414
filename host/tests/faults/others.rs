//! Other programs and their clients: one that copies headers with what it makes of a message, and somebody who sends dead
//! letters back. Nothing of it is a repetition.

use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};

use crate::load::{Deed, Message};
use crate::pipeline::{FIRST, INPUT, MIDDLE, OUT, SECOND, Stage};
use crate::reader::{self, COPIED, Raw};

/// Records of each partition whose headers are copied.
const COPIED_OF_EACH: i64 = 3;
/// Messages that get them.
const KEYS: usize = 6;
const MESSAGES_OF_A_KEY: i64 = 4;
/// Dead letters of a stage that are sent back at most.
const SENT_BACK: usize = 4;
const LETTERS_LOOKED_AT: i64 = 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// What was written, counted.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Others {
    /// Messages with copied headers.
    pub(crate) copies: usize,
    /// Dead letters that were sent back to the first topic, and to the others.
    pub(crate) letters_to_input: usize,
    pub(crate) letters_elsewhere: usize,
}

impl Others {
    /// Of them in the chain's first topic.
    pub(crate) fn in_input(&self) -> usize {
        self.copies + self.letters_to_input
    }

    pub(crate) fn letters(&self) -> usize {
        self.letters_to_input + self.letters_elsewhere
    }

    /// Messages with the headers of what has come out of the chain, into its beginning, and dead letters back to where they
    /// came from.
    pub(crate) fn write(&mut self, brokers: &str) {
        let producer: BaseProducer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("enable.idempotence", "true")
            .set("partitioner", "murmur2_random")
            .create()
            .expect("a producer");
        let mut models = reader::tail(brokers, MIDDLE, COPIED_OF_EACH);
        models.extend(reader::tail(brokers, OUT, COPIED_OF_EACH));
        let models = models.iter().cycle();
        for (message, model) in copies(self.copies).into_iter().zip(models) {
            let value = serde_json::to_vec(&message).expect("JSON");
            let headers = model.headers.clone();
            send(&producer, INPUT, message.key.as_bytes(), &value, headers);
            self.copies += 1;
        }
        self.letters_to_input += send_back(&producer, brokers, &FIRST);
        self.letters_elsewhere += send_back(&producer, brokers, &SECOND);
        producer.flush(PATIENCE).expect("all are in the log");
        assert_eq!(producer.in_flight_count(), 0);
    }
}

/// New messages; `before` makes their keys new.
fn copies(before: usize) -> Vec<Message> {
    let message = |seq, key| Message {
        key: format!("copied-{before}-{key}"),
        seq,
        deed: None,
        at: None,
    };
    let all = (0..MESSAGES_OF_A_KEY).flat_map(|seq| (0..KEYS).map(move |key| (seq, key)));
    all.map(|(seq, key)| message(seq, key)).collect()
}

/// Sends the newest letters of a stage to its input, as they are. Answers how many.
fn send_back(producer: &BaseProducer, brokers: &str, stage: &Stage) -> usize {
    let letters = reader::tail(brokers, stage.letters, LETTERS_LOOKED_AT);
    let is_quick = |letter: &&Raw| {
        let value = letter.value.as_deref().unwrap_or_default();
        let message: Message = serde_json::from_slice(value).expect("a message of the load");
        // To meet a deadline again takes its time.
        message.deed != Some(Deed::Spin)
    };
    let mut sent = 0;
    for letter in letters.iter().filter(is_quick).take(SENT_BACK) {
        let key = letter.key.as_deref().unwrap_or_default();
        let value = letter.value.as_deref().unwrap_or_default();
        send(producer, stage.input, key, value, letter.headers.clone());
        sent += 1;
    }
    sent
}

fn send(producer: &BaseProducer, topic: &str, key: &[u8], value: &[u8], headers: OwnedHeaders) {
    let headers = headers.insert(Header {
        key: COPIED,
        value: Some("yes"),
    });
    let record = BaseRecord::to(topic)
        .key(key)
        .payload(value)
        .headers(headers);
    let sent = producer.send(record).map_err(|(error, _)| error);
    sent.expect("room in the queue");
}
