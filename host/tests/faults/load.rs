//! The load: numbered messages of many keys, a few of which want something bad of a stage.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rdkafka::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use serde::{Deserialize, Serialize};

use crate::judge::MessageId;
use crate::pipeline::{FIRST, INPUT, SECOND};

/// Messages a second: 100,000 in twenty cycles.
const RATE: u64 = 110;
/// How often what is due is sent. They take turns: calm, where a batch is a message or two, and bursts.
const TICKS: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];
const TURN: Duration = Duration::from_secs(10);
/// How long the log may take to acknowledge the last ones.
const FLUSH_PATIENCE: Duration = Duration::from_secs(90);

/// Keys that are written in turn at one time.
const KEYS_AT_ONCE: u64 = 32;
/// Messages of a key. Then it is left as it is, so that what touches it once more shows.
const MESSAGES_OF_A_KEY: u64 = 25;
/// One message of so many is a bad one.
const BAD_EVERY: u64 = 250;

/// What a message makes the stage do that it names.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Deed {
    Reject,
    Trap,
    Spin,
    /// Succeed at the third attempt.
    Retry,
    /// Run a statement that fails, and go on.
    FailCaught,
}

impl Deed {
    pub(crate) const ALL: [Self; 5] = [
        Self::Reject,
        Self::Retry,
        Self::Trap,
        Self::FailCaught,
        Self::Spin,
    ];

    /// The cause that its dead letter names; none where it ends well.
    pub(crate) fn cause(self) -> Option<&'static str> {
        match self {
            Self::Reject => Some("reject"),
            Self::Trap => Some("trap"),
            Self::Spin => Some("deadline"),
            Self::Retry | Self::FailCaught => None,
        }
    }
}

/// A message of the load, which is told from all others by key and number.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) struct Message {
    pub(crate) key: String,
    pub(crate) seq: i64,
    #[serde(rename = "do", skip_serializing_if = "Option::is_none")]
    pub(crate) deed: Option<Deed>,
    /// The stage that shall do it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) at: Option<String>,
}

impl Message {
    /// The message of that number, from 0.
    fn numbered(n: u64) -> Self {
        let generation = n / (KEYS_AT_ONCE * MESSAGES_OF_A_KEY);
        let within = n % (KEYS_AT_ONCE * MESSAGES_OF_A_KEY);
        let bad = (n % BAD_EVERY == BAD_EVERY / 2).then_some(n / BAD_EVERY);
        let all = Deed::ALL.len() as u64;
        let deed = bad.map(|bad| Deed::ALL[(bad % all) as usize]);
        let stage = [&FIRST, &SECOND];
        Self {
            key: format!("{generation}-{}", within % KEYS_AT_ONCE),
            seq: i64::try_from(within / KEYS_AT_ONCE).expect("a small number"),
            deed,
            at: bad.map(|bad| stage[(bad / all % 2) as usize].name.to_owned()),
        }
    }

    /// What tells it from others.
    pub(crate) fn id(&self) -> MessageId {
        (self.key.clone(), self.seq)
    }

    /// What the stage is to do with it.
    pub(crate) fn deed_at(&self, stage: &str) -> Option<Deed> {
        self.deed.filter(|_| self.at.as_deref() == Some(stage))
    }
}

/// Sends the load, message after message, until it is told to stop.
pub(crate) struct Loader {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Loader {
    pub(crate) fn start(brokers: &str, log: &Path) -> Self {
        let log = Log(File::create(log).expect("the loader's log"));
        let producer: ThreadedProducer<Log> = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("enable.idempotence", "true")
            // Kafka may be away, but never for good.
            .set("message.timeout.ms", "0")
            .set("reconnect.backoff.max.ms", "1000")
            .set("linger.ms", "5")
            .set("partitioner", "murmur2_random")
            .set("debug", "eos")
            .create_with_context(log)
            .expect("a producer");
        let (stop, sent) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, count) = (stop.clone(), sent.clone());
        let thread = std::thread::spawn(move || send(&producer, &stopped, &count));
        Self { stop, sent, thread }
    }

    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Ends the load, waits until the log has all of it, and answers how much it was.
    pub(crate) fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the load was sent");
        self.sent.load(Ordering::Relaxed)
    }
}

fn send(producer: &ThreadedProducer<Log>, stop: &AtomicBool, sent: &AtomicU64) {
    let begun = Instant::now();
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        let due = u64::try_from(begun.elapsed().as_millis()).expect("an age") * RATE / 1000;
        while n < due {
            let message = Message::numbered(n);
            let value = serde_json::to_string(&message).expect("JSON");
            let record = BaseRecord::to(INPUT).key(&message.key).payload(&value);
            // The queue holds more than any outage lets through.
            producer
                .send(record)
                .map_err(|(e, _)| e)
                .expect("room in the queue");
            n += 1;
            sent.store(n, Ordering::Relaxed);
        }
        let turn = begun.elapsed().as_secs() / TURN.as_secs();
        std::thread::sleep(TICKS[(turn % 2) as usize]);
    }
    let flushed = producer.flush(FLUSH_PATIENCE);
    let left = producer.in_flight_count();
    flushed.unwrap_or_else(|e| panic!("{left} of {n} messages are not acknowledged: {e}"));
}

/// What librdkafka says, and what became of messages that Kafka did not take.
struct Log(File);

impl Log {
    fn write(&self, what: &str) {
        // A log that can't be written is no reason to end the run.
        let _ = writeln!(&self.0, "{} {what}", unix_milliseconds());
    }
}

impl ClientContext for Log {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.write(&format!("{level:?} {facility}: {message}"));
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.write(&format!("{error}: {reason}"));
    }
}

impl ProducerContext for Log {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result {
            self.write(&format!("a message is lost: {error}"));
        }
    }
}

/// Now, in milliseconds since the Unix epoch.
pub(crate) fn unix_milliseconds() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    i64::try_from(now.expect("a time").as_millis()).expect("a time")
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;

    #[test]
    fn keys_are_numbered_in_order_and_every_deed_is_asked_of_each_stage() {
        let mut next: HashMap<String, i64> = HashMap::new();
        let mut deeds = HashSet::new();
        for message in (0..5_000).map(Message::numbered) {
            let expected = next.entry(message.key.clone()).or_default();
            assert_eq!(message.seq, *expected, "{}", message.key);
            *expected += 1;
            if let Some(deed) = message.deed {
                deeds.insert((format!("{deed:?}"), message.at));
            }
        }
        assert_eq!(deeds.len(), Deed::ALL.len() * 2);
    }
}
