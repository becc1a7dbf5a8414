//! An idempotent producer: what one caller sends to a partition arrives in order and without gaps, at the latest when
//! nobody waits for it any more.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use host::log::{Addressed, LogError, Sink, Unsent};
use host::record::Outgoing;
use tokio::sync::Notify;

use super::broker::Broker;
use super::evidence::id_of;
use super::process::Process;
use super::trace::{Subject, digest};
use super::{lock, pause};

/// Records in one request at most.
const REQUEST: usize = 5;
/// How long the log may take to say how many partitions a topic has, in milliseconds.
const ASK: u64 = 5000;

type Place = (Arc<str>, i32);

/// One process's, for one stage.
pub(crate) struct Producer {
    process: Process,
    broker: Arc<Broker>,
    /// What each partition is sent; of the producer that is in use, which another takes the place of when it fails.
    queues: Mutex<BTreeMap<Place, Arc<Queue>>>,
    known_topics: Mutex<BTreeMap<Arc<str>, usize>>,
}

/// What is to be appended to one partition, in order.
#[derive(Default)]
struct Queue {
    waiting: Mutex<VecDeque<Queued>>,
    /// The producer has failed for good, or its process is dead: the queue's end is decided elsewhere.
    abandoned: AtomicBool,
}

struct Queued {
    record: Outgoing,
    flight: Arc<Flight>,
    index: usize,
    /// It is in the log, and that is on its way back.
    appended: bool,
}

/// The records of one call.
struct Flight {
    state: Mutex<(usize, Vec<Unsent>)>,
    landed: Notify,
}

impl Flight {
    fn land(&self, index: usize, result: Result<(), LogError>) {
        let mut state = lock(&self.state);
        state.0 -= 1;
        if let Err(error) = result {
            state.1.push(Unsent { index, error });
        }
        if state.0 == 0 {
            self.landed.notify_one();
        }
    }
}

impl Producer {
    pub(crate) fn new(process: Process, broker: Arc<Broker>) -> Arc<Self> {
        Arc::new(Self {
            process,
            broker,
            queues: Mutex::default(),
            known_topics: Mutex::default(),
        })
    }

    fn enqueue(&self, record: &Outgoing, flight: &Arc<Flight>, index: usize) {
        let place = (record.topic.clone(), record.partition.unwrap_or(0));
        let queue = lock(&self.queues).entry(place).or_default().clone();
        let mut waiting = lock(&queue.waiting);
        let idle = waiting.is_empty();
        waiting.push_back(Queued {
            record: record.clone(),
            flight: flight.clone(),
            index,
            appended: false,
        });
        drop(waiting);
        if idle {
            let pump = pump(self.process.clone(), self.broker.clone(), queue);
            self.process.world().spawn(pump);
        }
    }

    /// The producer fails for good, and another takes its place. What it had sent may arrive all the same.
    pub(crate) fn fail(&self) {
        self.process.note("producer fails", Subject::None, [0, 0]);
        for queue in std::mem::take(&mut *lock(&self.queues)).into_values() {
            let left = abandon(&self.process, &self.broker, &queue);
            for Queued { flight, index, .. } in left {
                let why = "the producer failed for good";
                flight.land(index, Err(LogError::Unavailable(why.into())));
            }
        }
    }

    /// The process is dead: nobody waits, and what was sent may arrive all the same.
    pub(crate) fn lose(&self) {
        for queue in std::mem::take(&mut *lock(&self.queues)).into_values() {
            abandon(&self.process, &self.broker, &queue);
        }
    }
}

/// Takes all from a queue. A prefix of what is not in the log yet gets there later, or nothing.
fn abandon(process: &Process, broker: &Arc<Broker>, queue: &Queue) -> Vec<Queued> {
    queue.abandoned.store(true, Ordering::Relaxed);
    let left: Vec<_> = lock(&queue.waiting).drain(..).collect();
    let rest: Vec<_> = left
        .iter()
        .filter(|queued| !queued.appended)
        .map(|queued| queued.record.clone())
        .collect();
    let world = process.world();
    if rest.is_empty() || world.one_in(4) {
        return left;
    }
    let count = world.roll(0..=rest.len());
    let delay = match world.roll(0..=2) {
        0 => 0,
        1 => world.roll(0..=20),
        _ => world.roll(0..=world.weather().late),
    };
    let (broker, who) = (broker.clone(), process.number());
    process.world().spawn(async move {
        pause(delay).await;
        broker.until_up().await;
        for record in rest.iter().take(count) {
            if refuses(&broker, record) {
                return;
            }
            broker.append(who, record);
        }
    });
    left
}

/// Sends what is in a queue, until it is empty.
async fn pump(process: Process, broker: Arc<Broker>, queue: Arc<Queue>) {
    let world = process.world().clone();
    loop {
        let records: Vec<_> = {
            let waiting = lock(&queue.waiting);
            let count = world.roll(1..=REQUEST).min(waiting.len());
            waiting
                .iter()
                .take(count)
                .map(|q| q.record.clone())
                .collect()
        };
        world.travel().await;
        broker.until_up().await;
        if queue.abandoned.load(Ordering::Relaxed) {
            return;
        }
        let mut refused = false;
        let mut appended = 0;
        for record in &records {
            if refuses(&broker, record) {
                refused = true;
                break;
            }
            broker.append(process.number(), record);
            appended += 1;
        }
        for queued in lock(&queue.waiting).iter_mut().take(appended) {
            queued.appended = true;
        }
        world.travel().await;
        if queue.abandoned.load(Ordering::Relaxed) {
            return;
        }
        for _ in 0..appended {
            if let Some(queued) = lock(&queue.waiting).pop_front() {
                queued.flight.land(queued.index, Ok(()));
            }
        }
        if refused {
            refuse_first(&process, &queue);
        }
        if lock(&queue.waiting).is_empty() {
            return;
        }
    }
}

/// The log refuses the first record of a queue. Those behind it of the same call fail with it, or do not.
fn refuse_first(process: &Process, queue: &Queue) {
    let mut waiting = lock(&queue.waiting);
    let Some(first) = waiting.pop_front() else {
        return;
    };
    let error = match process.world().one_in(2) {
        true => LogError::Refused("not in this topic".into()),
        false => LogError::TooLarge("not in this topic".into()),
    };
    first.flight.land(first.index, Err(error));
    if process.world().one_in(2) {
        return;
    }
    let (behind, others) = std::mem::take(&mut *waiting)
        .into_iter()
        .partition(|queued| Arc::ptr_eq(&queued.flight, &first.flight));
    *waiting = others;
    let behind: VecDeque<Queued> = behind;
    for queued in behind {
        let why = "a record before it was not taken";
        queued
            .flight
            .land(queued.index, Err(LogError::Unavailable(why.into())));
    }
}

fn refuses(broker: &Broker, record: &Outgoing) -> bool {
    broker.refuses(&record.topic, &id_of(record.value.as_deref()))
}

impl Sink for Producer {
    async fn produce(&self, records: &[Outgoing]) -> Result<(), Vec<Unsent>> {
        let flight = Arc::new(Flight {
            state: Mutex::new((records.len(), Vec::new())),
            landed: Notify::new(),
        });
        for (index, record) in records.iter().enumerate() {
            self.process.point("enqueue").await;
            let id = id_of(record.value.as_deref());
            self.process.note(
                "produce",
                Subject::Name(id),
                [index.try_into().unwrap_or(0), 0],
            );
            let partition = match record.partition {
                Some(partition) => partition,
                None => self.choose(record),
            };
            let record = Outgoing {
                partition: Some(partition),
                ..record.clone()
            };
            self.enqueue(&record, &flight, index);
        }
        while lock(&flight.state).0 > 0 {
            flight.landed.notified().await;
        }
        self.process.point("acknowledged").await;
        let unsent = std::mem::take(&mut lock(&flight.state).1);
        if unsent.is_empty() {
            Ok(())
        } else {
            Err(unsent)
        }
    }
}

impl Addressed for Producer {
    async fn partition_of(&self, record: &Outgoing) -> Result<i32, LogError> {
        self.process.point("partition").await;
        if let Some(partition) = record.partition {
            return Ok(partition);
        }
        let known = lock(&self.known_topics).contains_key(&record.topic);
        if !known {
            let ask = std::time::Duration::from_millis(ASK);
            if tokio::time::timeout(ask, self.broker.until_up())
                .await
                .is_err()
            {
                self.process.world().evidence().disturbed_all(1);
                return Err(LogError::Unavailable("no answer".into()));
            }
            let count = self.broker.partitions(&record.topic);
            lock(&self.known_topics).insert(record.topic.clone(), count);
        }
        Ok(self.choose(record))
    }
}

impl Producer {
    fn choose(&self, record: &Outgoing) -> i32 {
        let count = self.broker.partitions(&record.topic).max(1);
        let number = match &record.key {
            Some(key) => digest(0, &[&String::from_utf8_lossy(key)]),
            None => self.process.world().roll(0..=u64::MAX),
        };
        i32::try_from(number % count as u64).unwrap_or(0)
    }
}
