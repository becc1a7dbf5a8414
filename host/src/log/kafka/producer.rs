//! Appending to the log: idempotent, acknowledged by all in-sync replicas.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header as KafkaHeader, Message, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer as _, ProducerContext, PurgeConfig};
use tokio::sync::Notify;
use tracing::{debug, info, warn};

use super::super::{Addressed, LogError, Sink, Unsent};
use super::bootstrap::{Bootstrap, STATISTICS};
use super::message::{RawHeader, to_send};
use super::partitioner::{Count, Partitioner};
use super::polled::PolledProducer;
pub(crate) use super::polled::until_closed;
use super::{ClientSettings, Kind, log_error, log_line};
use crate::record::Outgoing;

/// How long to wait for room in librdkafka's queue before another try.
const FULL_QUEUE_WAIT: Duration = Duration::from_millis(5);

/// How often a flight that does not land looks whether its client has failed for good.
const FATAL_CHECK: Duration = Duration::from_millis(100);

/// librdkafka's property for [`Patience::Gapless`].
pub(super) const GAPLESS: &str = "enable.gapless.guarantee";
/// What librdkafka has room for where lanes bound what they send, at 16 MiB each: what a few of them have for partitions whose
/// leader is away must leave room for what the others have for theirs.
const ROOM: [(&str, &str); 2] = [
    ("queue.buffering.max.kbytes", "524288"),
    ("queue.buffering.max.messages", "2000000"),
];
/// How long the log may take to say how many partitions a topic has.
const ASK: Duration = Duration::from_secs(5);
/// How often a topic is looked for that is not there, and how long to wait in between.
const TOPIC_TRIES: u32 = 4;
const TOPIC_WAIT: Duration = Duration::from_millis(500);

/// What a full queue, an outage and a late acknowledgement mean to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Waits as long as it takes, and leaves no gaps: no record times out while a later one gets through, and after one
    /// that the log refuses, all that were sent behind it fail too, and are to be sent again.
    Gapless,
    /// Gives up on a record after this time.
    Bounded(Duration),
}

/// A producer; clones share it.
#[derive(Clone)]
pub struct Producer {
    settings: Arc<ClientSettings>,
    patience: Patience,
    client: Arc<Mutex<Arc<Client>>>,
    /// Sends one record a request; made when it is needed first.
    alone: Arc<tokio::sync::Mutex<Option<Client>>>,
    partitioner: Arc<Partitioner>,
}

type Client = PolledProducer<Context>;

impl Producer {
    /// A producer that connects by itself, now and after every loss.
    pub fn new(settings: &ClientSettings, patience: Patience) -> Result<Self, LogError> {
        let client = create(settings, &config(settings, patience))?;
        Ok(Self {
            settings: Arc::new(settings.clone()),
            patience,
            client: Arc::new(Mutex::new(Arc::new(client))),
            alone: Arc::default(),
            partitioner: Arc::default(),
        })
    }

    fn client(&self) -> Arc<Client> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Arc<Client>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After a fatal error an idempotent producer takes no more records: a new one must.
    fn replace_if_fatal(&self, failed: &Arc<Client>) {
        let Some((code, why)) = failed.client().fatal_error() else {
            return;
        };
        let mut current = self.lock();
        if !Arc::ptr_eq(&current, failed) {
            return;
        }
        if code == RDKafkaErrorCode::GaplessGuarantee {
            info!("the log refused a record: what was sent behind it is sent again");
            debug!("{why}");
        } else {
            warn!("the producer failed for good ({code}: {why}); going on with a new one");
        }
        match create(&self.settings, &config(&self.settings, self.patience)) {
            Ok(client) => *current = Arc::new(client),
            Err(error) => warn!("cannot make a new producer: {error}"),
        }
    }

    /// Appends one record and answers its partition and offset.
    pub async fn produce_one(&self, record: &Outgoing) -> Result<(i32, i64), LogError> {
        let client = self.client();
        let flight = Flight::new(1);
        self.enqueue(&client, &flight, 0, record).await;
        land(&client, &flight).await;
        self.replace_if_fatal(&client);
        let mut state = flight.lock();
        match state.unsent.pop() {
            Some(unsent) => Err(unsent.error),
            None => Ok(state.last),
        }
    }

    /// As [`Sink::produce`], of records whose headers' names may be any bytes.
    pub async fn produce_raw(&self, records: &[RawOutgoing]) -> Result<(), Vec<Unsent>> {
        self.produce_all(records).await
    }

    async fn produce_all(&self, records: &[impl Sent]) -> Result<(), Vec<Unsent>> {
        let client = self.client();
        let failed = self.fly(&client, records).await;
        self.replace_if_fatal(&client);
        let unsent = self.send_refused_alone(records, failed).await;
        if unsent.is_empty() {
            Ok(())
        } else {
            Err(unsent)
        }
    }

    /// Appends the records and answers those that were not taken.
    async fn fly(&self, client: &Client, records: &[impl Sent]) -> Vec<Unsent> {
        let flight = Flight::new(records.len());
        for (index, record) in records.iter().enumerate() {
            self.enqueue(client, &flight, index, record).await;
        }
        land(client, &flight).await;
        std::mem::take(&mut flight.lock().unsent)
    }

    /// Appends one record in a request of its own.
    async fn fly_alone(&self, record: &impl Sent) -> Result<(), LogError> {
        let mut alone = self.alone.lock().await;
        let client = match alone.take() {
            Some(client) => client,
            None => {
                let mut config = config(&self.settings, self.patience);
                create(&self.settings, config.set("batch.num.messages", "1"))?
            }
        };
        let failed = self.fly(&client, std::slice::from_ref(record)).await.pop();
        if client.client().fatal_error().is_none() {
            *alone = Some(client);
        }
        failed.map_or(Ok(()), |unsent| Err(unsent.error))
    }

    async fn enqueue(
        &self,
        client: &Client,
        flight: &Arc<Flight>,
        index: usize,
        record: &impl Sent,
    ) {
        let mut ticket = Box::new(Ticket {
            flight: flight.clone(),
            index,
        });
        let deadline = match self.patience {
            Patience::Gapless => None,
            Patience::Bounded(time) => Some(tokio::time::Instant::now() + time),
        };
        loop {
            let Err((error, rejected)) = client.send(base_record(record, ticket)) else {
                return;
            };
            ticket = rejected.delivery_opaque;
            let full = error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull);
            if full && client.in_flight_count() == 0 {
                let why = "it is larger than `queue.buffering.max.kbytes`".to_owned();
                ticket.flight.land(index, Err(LogError::TooLarge(why)));
                return;
            }
            let late = deadline.is_some_and(|d| tokio::time::Instant::now() >= d);
            if !full || late {
                ticket.flight.land(index, Err(log_error(&error)));
                return;
            }
            tokio::time::sleep(FULL_QUEUE_WAIT).await;
        }
    }
}

impl Sink for Producer {
    async fn produce(&self, records: &[Outgoing]) -> Result<(), Vec<Unsent>> {
        self.produce_all(records).await
    }
}

impl Addressed for Producer {
    async fn partition_of(&self, record: &Outgoing) -> Result<i32, LogError> {
        if let Some(partition) = record.partition {
            return Ok(partition);
        }
        let count = match self.partitioner.count(&record.topic) {
            Some(Count::Fresh(count)) => count,
            // Topics do not shrink unless they are made anew: what was known once is good enough until the log has answered, which it may be long about
            // where a broker hangs.
            Some(Count::Old(count)) => {
                self.partitioner.learn(&record.topic, count);
                self.ask_aside(record.topic.to_string());
                count
            }
            None => self.ask_for_partitions(&record.topic).await?,
        };
        Ok(self.partitioner.choose(record.key.as_deref(), count))
    }
}

impl Producer {
    /// The log judges a request as a whole, with whatever other records were packed into it, those of other lanes too:
    /// only what it refuses alone is at fault. Answers what is still unsent. None is sent before one that is not.
    async fn send_refused_alone(
        &self,
        records: &[impl Sent],
        mut failed: Vec<Unsent>,
    ) -> Vec<Unsent> {
        failed.sort_by_key(|unsent| unsent.index);
        let mut unsent = Vec::new();
        let mut is_away = false;
        for Unsent { index, mut error } in failed {
            if matches!(error, LogError::NoPartition(_)) {
                self.partitioner.forget(&records[index].record().topic);
            }
            if is_away {
                error = LogError::Unavailable("a record before it was not taken yet".into());
            } else if !matches!(error, LogError::Unavailable(_)) {
                match self.fly_alone(&records[index]).await {
                    Ok(()) => continue,
                    Err(again) => error = again,
                }
            }
            is_away |= matches!(error, LogError::Unavailable(_));
            unsent.push(Unsent { index, error });
        }
        unsent
    }

    /// Has the partitioner learn how many partitions a topic has by now.
    fn ask_aside(&self, topic: String) {
        let producer = self.clone();
        tokio::spawn(async move {
            if let Err(error) = producer.ask_for_partitions(&topic).await {
                debug!("the partitions of {topic} are taken for those that were known: {error}");
            }
        });
    }

    /// How many partitions a topic has. One that is missing may be about to be made by the broker.
    async fn ask_for_partitions(&self, topic: &str) -> Result<i32, LogError> {
        let mut tries = 1;
        loop {
            let (client, name) = (self.client(), topic.to_owned());
            let ask = move || client.client().fetch_metadata(Some(&name), ASK);
            let answer = tokio::task::spawn_blocking(ask).await;
            let answer = answer.map_err(|error| LogError::Unavailable(error.to_string()))?;
            let metadata = answer.map_err(|error| log_error(&error))?;
            let found = metadata.topics().iter().find(|t| t.name() == topic);
            let error = found
                .and_then(|topic| topic.error())
                .map(RDKafkaErrorCode::from);
            if let Some(error) = error.filter(|error| !is_unknown_topic(*error)) {
                return Err(log_error(&KafkaError::MetadataFetch(error)));
            }
            let count = found.map_or(0, |t| t.partitions().len());
            if count > 0 {
                let count = i32::try_from(count).unwrap_or(i32::MAX);
                self.partitioner.learn(topic, count);
                return Ok(count);
            }
            if tries == TOPIC_TRIES {
                return Err(LogError::Unavailable(format!(
                    "there is no topic {topic}: make it"
                )));
            }
            tries += 1;
            tokio::time::sleep(TOPIC_WAIT).await;
        }
    }
}

fn is_unknown_topic(error: RDKafkaErrorCode) -> bool {
    matches!(
        error,
        RDKafkaErrorCode::UnknownTopic | RDKafkaErrorCode::UnknownTopicOrPartition
    )
}

/// Waits until the flight is over. What a client that failed for good still has in its queue would
/// never come back by itself.
async fn land(client: &Client, flight: &Flight) {
    while tokio::time::timeout(FATAL_CHECK, flight.landed())
        .await
        .is_err()
    {
        if client.client().fatal_error().is_some() {
            client.purge(PurgeConfig::default().queue().inflight().non_blocking());
        }
    }
}

/// A producer's configuration.
pub(super) fn config(settings: &ClientSettings, patience: Patience) -> ClientConfig {
    let timeout = match patience {
        Patience::Gapless => "0".to_string(),
        Patience::Bounded(time) => time.as_millis().max(1).to_string(),
    };
    let mut defaults = vec![
        // As Java's clients choose: the same key goes to the same partition whoever produces it.
        ("partitioner", "murmur2_random"),
        ("queue.buffering.max.kbytes", "65536"),
        // How large a record may be is the topic's to say; the dead letter of a large record is larger still.
        ("message.max.bytes", "1000000000"),
    ];
    if patience == Patience::Gapless {
        defaults.extend(ROOM);
    }
    if !settings.properties.contains_key("queue.buffering.max.ms") {
        defaults.push(("linger.ms", "1"));
    }
    let mut fixed = vec![
        ("enable.idempotence", "true"),
        ("acks", "all"),
        ("message.timeout.ms", &timeout),
        STATISTICS,
    ];
    if patience == Patience::Gapless {
        fixed.push((GAPLESS, "true"));
    }
    settings.client_config(Kind::Producer, &defaults, &fixed)
}

fn create(settings: &ClientSettings, config: &ClientConfig) -> Result<Client, LogError> {
    let context = Context {
        bootstrap: Bootstrap::new(settings),
    };
    let client = Client::new(config, context)
        .map_err(|error| LogError::Refused(format!("cannot make a producer: {error}")))?;
    client.context().bootstrap.is_of(client.client());
    Ok(client)
}

/// A record whose headers' names may be any bytes, as no stage makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawOutgoing {
    /// The record, without headers.
    pub record: Outgoing,
    /// Its headers, in their order.
    pub headers: Vec<RawHeader>,
}

/// What can be sent.
trait Sent: Sync {
    fn record(&self) -> &Outgoing;
    /// `None` where there are none.
    fn headers(&self) -> Option<OwnedHeaders>;
}

impl Sent for Outgoing {
    fn record(&self) -> &Outgoing {
        self
    }

    fn headers(&self) -> Option<OwnedHeaders> {
        if self.headers.is_empty() {
            return None;
        }
        let empty = OwnedHeaders::new_with_capacity(self.headers.len());
        Some(self.headers.iter().fold(empty, |headers, h| {
            headers.insert(KafkaHeader {
                key: &h.name,
                value: h.value.as_deref(),
            })
        }))
    }
}

impl Sent for RawOutgoing {
    fn record(&self) -> &Outgoing {
        &self.record
    }

    fn headers(&self) -> Option<OwnedHeaders> {
        (!self.headers.is_empty()).then(|| to_send(&self.headers))
    }
}

fn base_record(sent: &impl Sent, ticket: Box<Ticket>) -> BaseRecord<'_, [u8], [u8], Box<Ticket>> {
    let record = sent.record();
    let mut base = BaseRecord::with_opaque_to(&record.topic, ticket);
    base.partition = record.partition;
    base.timestamp = record.timestamp;
    base.key = record.key.as_deref();
    base.payload = record.value.as_deref();
    base.headers = sent.headers();
    base
}

/// Records on their way, until the last one is acknowledged or has failed.
struct Flight {
    state: Mutex<FlightState>,
    landed: Notify,
}

struct FlightState {
    aloft: usize,
    unsent: Vec<Unsent>,
    /// Partition and offset of the record that landed last.
    last: (i32, i64),
}

/// One record's place in a flight; librdkafka hands it back with the acknowledgement.
struct Ticket {
    flight: Arc<Flight>,
    index: usize,
}

impl Flight {
    fn new(records: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(FlightState {
                aloft: records,
                unsent: Vec::new(),
                last: (-1, -1),
            }),
            landed: Notify::new(),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, FlightState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn land(&self, index: usize, result: Result<(i32, i64), LogError>) {
        let mut state = self.lock();
        match result {
            Ok(place) => state.last = place,
            Err(error) => state.unsent.push(Unsent { index, error }),
        }
        state.aloft -= 1;
        if state.aloft == 0 {
            self.landed.notify_one();
        }
    }

    /// Cancel-safe; `notify_one` keeps its permit for a waiter that comes late.
    async fn landed(&self) {
        while self.lock().aloft > 0 {
            self.landed.notified().await;
        }
    }
}

struct Context {
    bootstrap: Bootstrap,
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_line(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        debug!(target: "librdkafka", "producer: {error}: {reason}");
    }

    fn stats_raw(&self, statistics: &[u8]) {
        self.bootstrap.hear(statistics);
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = Box<Ticket>;

    fn delivery(&self, result: &DeliveryResult<'_>, ticket: Box<Ticket>) {
        let result = match result {
            Ok(message) => Ok((message.partition(), message.offset())),
            Err((error, _)) => Err(log_error(error)),
        };
        ticket.flight.land(ticket.index, result);
    }
}
