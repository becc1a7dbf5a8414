//! Another program that writes in Kafka transactions: it commits some of them, and aborts others, whose messages must never
//! have an effect.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};

use crate::judge::MessageId;
use crate::load::{Deed, Message};
use crate::pipeline::{BOOKED, BOOKS};

/// Between two transactions.
const INTERVAL: Duration = Duration::from_millis(500);
/// One of so many is aborted.
const ABORT_EVERY: u64 = 3;
/// Keys of a transaction, enough for all partitions, and messages of each.
const KEYS: u64 = 8;
const MESSAGES_OF_A_KEY: u64 = 2;
/// Transactions that write the same keys.
const TRANSACTIONS_OF_A_KEY: u64 = 10;
/// One transaction of so many has a bad message.
const BAD_EVERY: u64 = 4;
/// How long Kafka may be away in the middle of one; its own limit for a transaction is a minute.
const PATIENCE: Duration = Duration::from_secs(120);
const TRY: Duration = Duration::from_secs(10);
const ASK_INTERVAL: Duration = Duration::from_millis(20);

/// What was written, in its order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Written {
    pub(crate) committed: Vec<Message>,
    pub(crate) aborted: Vec<Message>,
    /// Of transactions whose end is unknown.
    pub(crate) doubtful: HashSet<MessageId>,
}

/// The program, until it is told to stop.
pub(crate) struct Books {
    shared: Arc<Shared>,
    thread: JoinHandle<Written>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    pause: AtomicBool,
    is_paused: AtomicBool,
}

impl Books {
    pub(crate) fn start(brokers: &str) -> Self {
        let (shared, brokers) = (Arc::<Shared>::default(), brokers.to_owned());
        let told = shared.clone();
        let thread = std::thread::spawn(move || write(&brokers, &told));
        Self { shared, thread }
    }

    /// Returns once all that was begun has ended.
    pub(crate) fn pause(&self) {
        self.shared.pause.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + PATIENCE;
        while !self.shared.is_paused.load(Ordering::SeqCst) {
            let goes_on = Instant::now() < deadline && !self.thread.is_finished();
            assert!(goes_on, "a transaction of the load does not end");
            std::thread::sleep(ASK_INTERVAL);
        }
    }

    pub(crate) fn go_on(&self) {
        self.shared.pause.store(false, Ordering::SeqCst);
    }

    pub(crate) fn stop(self) -> Written {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("the books were written")
    }
}

fn write(brokers: &str, told: &Shared) -> Written {
    let mut written = Written::default();
    let mut producer = begin(brokers);
    let mut n = 0;
    while !told.stop.load(Ordering::SeqCst) {
        let pauses = told.pause.load(Ordering::SeqCst);
        told.is_paused.store(pauses, Ordering::SeqCst);
        if pauses {
            std::thread::sleep(ASK_INTERVAL);
            continue;
        }
        let is_aborted = n % ABORT_EVERY == ABORT_EVERY - 1;
        let messages = messages(n, is_aborted);
        n += 1;
        match transaction(&producer, &messages, is_aborted) {
            Ok(Ended::Committed) => written.committed.extend(messages),
            Ok(Ended::Aborted) => written.aborted.extend(messages),
            // It may have been committed, and the next producer ends it if it was not ended.
            Err(_) => {
                written.doubtful.extend(messages.iter().map(Message::id));
                producer = begin(brokers);
            }
        }
        std::thread::sleep(INTERVAL);
    }
    written
}

fn messages(n: u64, is_aborted: bool) -> Vec<Message> {
    let (group, within) = (n / TRANSACTIONS_OF_A_KEY, n % TRANSACTIONS_OF_A_KEY);
    let all = Deed::ALL.len() as u64;
    let bad = (n % BAD_EVERY == 1).then_some(Deed::ALL[(n / BAD_EVERY % all) as usize]);
    let number = |i: u64| (within * MESSAGES_OF_A_KEY + i).cast_signed();
    let message = |i: u64, key: u64| Message {
        key: if is_aborted {
            format!("aborted-{n}-{key}")
        } else {
            format!("booked-{group}-{key}")
        },
        seq: number(i),
        deed: bad.filter(|_| (i, key) == (0, 0)),
        at: Some(BOOKED.name.to_owned()),
    };
    let all = (0..MESSAGES_OF_A_KEY).flat_map(|i| (0..KEYS).map(move |key| (i, key)));
    all.map(|(i, key)| message(i, key)).collect()
}

enum Ended {
    Committed,
    Aborted,
}

/// A producer that has ended what one before it has left.
fn begin(brokers: &str) -> BaseProducer {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let producer: BaseProducer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("transactional.id", "faults.books")
            .set("partitioner", "murmur2_random")
            .set("reconnect.backoff.max.ms", "1000")
            .create()
            .expect("a producer");
        match producer.init_transactions(TRY) {
            Ok(()) => return producer,
            Err(error) => assert!(Instant::now() < deadline, "no transactions: {error}"),
        }
    }
}

/// All of them, to a known end.
fn transaction(
    producer: &BaseProducer,
    messages: &[Message],
    is_aborted: bool,
) -> KafkaResult<Ended> {
    producer.begin_transaction()?;
    for message in messages {
        let value = serde_json::to_string(message).expect("JSON");
        let record = BaseRecord::to(BOOKS).key(&message.key).payload(&value);
        producer.send(record).map_err(|(error, _)| error)?;
    }
    // What is aborted is to be in the log first.
    patiently(|| producer.flush(TRY))?;
    if is_aborted {
        patiently(|| producer.abort_transaction(TRY))?;
        return Ok(Ended::Aborted);
    }
    match patiently(|| producer.commit_transaction(TRY)) {
        Ok(()) => Ok(Ended::Committed),
        Err(KafkaError::Transaction(error)) if error.txn_requires_abort() => {
            patiently(|| producer.abort_transaction(TRY))?;
            Ok(Ended::Aborted)
        }
        Err(error) => Err(error),
    }
}

/// Tries again as long as librdkafka says that it may help.
fn patiently(attempt: impl Fn() -> KafkaResult<()>) -> KafkaResult<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let error = match attempt() {
            Err(error) if Instant::now() < deadline => error,
            ended => return ended,
        };
        let may_help = match &error {
            KafkaError::Transaction(error) => error.is_retriable(),
            // Of a flush: not all are acknowledged.
            KafkaError::Flush(_) => true,
            _ => false,
        };
        if !may_help {
            return Err(error);
        }
        std::thread::sleep(ASK_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_key_rise_and_what_is_aborted_has_keys_of_its_own() {
        let mut next = std::collections::HashMap::<String, i64>::new();
        let mut deeds = HashSet::new();
        for n in 0..200 {
            let is_aborted = n % ABORT_EVERY == ABORT_EVERY - 1;
            for message in messages(n, is_aborted) {
                assert_eq!(message.key.starts_with("aborted"), is_aborted);
                let next = next.entry(message.key).or_insert(message.seq);
                assert!(message.seq >= *next);
                *next = message.seq + 1;
                deeds.extend(
                    message
                        .deed
                        .filter(|_| !is_aborted)
                        .map(|d| format!("{d:?}")),
                );
            }
        }
        assert_eq!(deeds.len(), Deed::ALL.len());
    }
}
