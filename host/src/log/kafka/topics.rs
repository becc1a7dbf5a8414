//! Topics: waited for, created where they are missing, never silently changed. And whether the log is there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::metadata::{Metadata, MetadataPartition, MetadataTopic};
use rdkafka::producer::{DeliveryResult, Producer as _, ProducerContext};
use rdkafka::util::Timeout;
use tracing::{debug, info};

use super::super::LogError;
use super::bootstrap::{Bootstrap, STATISTICS};
use super::polled::PolledProducer;
use super::{ClientSettings, Kind, QuietContext, forbidden, log_error, log_line};
use crate::delivery::seen::UNKNOWN_CLUSTER;
use crate::pipeline::Topic;
use crate::sync::lock;

/// How long one question to the log may take.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a broker may take for it before it is taken for one that hangs: the next question goes to another.
const HANGS_AFTER_MS: &str = "3000";
/// What librdkafka calls a connection that failed, and the state that it is in until the broker has answered for the first time.
const FAILED: &str = "FAIL";
const FIRST_QUESTION: &str = "APIVERSION_QUERY";
/// How long creating topics may take.
const CREATE_TIMEOUT: Duration = Duration::from_secs(30);
/// How often and how long to look for topics that were just created.
const APPEAR_TRIES: u32 = 100;
const APPEAR_WAIT: Duration = Duration::from_millis(100);

/// A client for questions about the log. Clones share it.
#[derive(Clone)]
pub struct Admin {
    /// It produces nothing: of rdkafka's clients, only producers hand on why a connection failed.
    asker: Arc<PolledProducer<Asking>>,
    creator: Arc<Creator>,
}

/// Makes topics and reads their settings. Rdkafka serves no callbacks of such a client, so nobody would know that it has
/// forgotten all brokers (see [`Bootstrap`]): after any failure it is a new one.
struct Creator {
    config: ClientConfig,
    client: Mutex<Arc<AdminClient<QuietContext>>>,
}

impl Creator {
    fn new(config: ClientConfig) -> KafkaResult<Self> {
        let client = AdminClient::from_config_and_context(&config, QuietContext)?;
        let client = Mutex::new(Arc::new(client));
        Ok(Self { config, client })
    }

    fn client(&self) -> Arc<AdminClient<QuietContext>> {
        lock(&self.client).clone()
    }

    /// What a client answered; after an error the next question is another client's.
    fn heard<T>(
        &self,
        client: Arc<AdminClient<QuietContext>>,
        answer: KafkaResult<T>,
    ) -> KafkaResult<T> {
        if answer.is_err() {
            match AdminClient::from_config_and_context(&self.config, QuietContext) {
                Ok(new) => {
                    let old = std::mem::replace(&mut *lock(&self.client), Arc::new(new));
                    // It waits for its thread.
                    tokio::task::spawn_blocking(move || drop((old, client)));
                }
                Err(error) => debug!("cannot make a new client: {error}"),
            }
        }
        answer
    }
}

/// Remembers what librdkafka said last of a connection that failed: its answers say only that one did.
struct Asking {
    trouble: Mutex<Option<String>>,
    bootstrap: Bootstrap,
}

impl Asking {
    fn trouble(&self) -> MutexGuard<'_, Option<String>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientContext for Asking {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        // It takes what comes before it is logged in for a matter of course, and hands it on to nobody.
        if facility == FAILED && message.contains(FIRST_QUESTION) {
            *self.trouble() = Some(format!(
                "the broker ends connections at the client's first question, as one does whose port speaks TLS: then write \
                 \"security.protocol\" = \"ssl\" or \"sasl_ssl\" under [kafka.properties] ({message})"
            ));
        }
        log_line(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // That all brokers are down follows the error that says why.
        if error.rdkafka_error_code() != Some(RDKafkaErrorCode::AllBrokersDown) {
            *self.trouble() = Some(reason.to_string());
        }
    }

    fn stats_raw(&self, statistics: &[u8]) {
        self.bootstrap.hear(statistics);
    }
}

impl ProducerContext for Asking {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}

impl Admin {
    /// A client that connects by itself.
    pub fn new(settings: &ClientSettings) -> Result<Self, LogError> {
        let config = settings.client_config(Kind::Admin, &[], &[]);
        let refuse = |error| LogError::Refused(format!("cannot make a client: {error}"));
        // librdkafka asks the broker that it asked last, while its connection stands.
        let ends = [("socket.timeout.ms", HANGS_AFTER_MS)];
        let asks = settings.client_config(Kind::Admin, &ends, &[STATISTICS]);
        let asking = Asking {
            trouble: Mutex::default(),
            bootstrap: Bootstrap::new(settings),
        };
        let asker = PolledProducer::new(&asks, asking).map_err(refuse)?;
        asker.context().bootstrap.is_of(asker.client());
        let creator = Creator::new(config).map_err(refuse)?;
        Ok(Self {
            asker: Arc::new(asker),
            creator: Arc::new(creator),
        })
    }

    /// How many partitions each topic of the log has.
    pub async fn partitions(&self) -> Result<BTreeMap<String, usize>, LogError> {
        let metadata = self.metadata().await?;
        let topics = metadata.topics().iter();
        Ok(topics
            .map(|topic| (topic.name().to_string(), topic.partitions().len()))
            .collect())
    }

    /// What is wrong with each of these topics, where something is: it is missing, a partition has no leader, or, of those that
    /// are `written`, too few replicas.
    pub async fn troubles(
        &self,
        topics: &BTreeSet<String>,
        written: &BTreeSet<String>,
    ) -> Result<BTreeMap<String, String>, LogError> {
        let metadata = self.metadata().await?;
        let mut troubles = BTreeMap::new();
        for name in topics {
            let topic = metadata.topics().iter().find(|topic| topic.name() == name);
            let trouble = match topic.map_or(Health::Missing, Health::of) {
                Health::Missing => Some(Health::missing(name)),
                Health::Error(why) | Health::Leaderless(why) => Some(why),
                // Only these are asked about further, for it is asked often.
                Health::Led(mut replicas) if written.contains(name) => {
                    replicas.retain(Replicas::lacks_some);
                    // The log is there, though it may be long about its settings where a broker hangs.
                    let few = self.too_few_in_sync(name, &replicas).await;
                    few.unwrap_or_else(|error| {
                        debug!("how many replicas {name} must have is not told: {error}");
                        None
                    })
                }
                Health::Led(_) => None,
            };
            troubles.extend(trouble.map(|trouble| (name.clone(), trouble)));
        }
        Ok(troubles)
    }

    async fn metadata(&self) -> Result<Metadata, LogError> {
        let asker = self.asker.clone();
        // librdkafka blocks on it.
        let asked = tokio::task::spawn_blocking(move || {
            let ask = || {
                let timeout = Timeout::After(ASK_TIMEOUT);
                asker.client().fetch_metadata(None, timeout)
            };
            // A broker that hangs was asked, it may be, and another one knows as well.
            let answer = match ask() {
                Err(error) if is_late(&error) => ask(),
                answer => answer,
            };
            let mut trouble = asker.client().context().trouble();
            match answer {
                Ok(metadata) => {
                    *trouble = None;
                    Ok(metadata)
                }
                // librdkafka says the same again only after a while, so it is kept.
                Err(error) => Err(trouble.clone().unwrap_or(error.to_string())),
            }
        });
        asked
            .await
            .map_err(|error| LogError::Unavailable(error.to_string()))?
            .map_err(LogError::Unavailable)
    }

    /// What keeps a topic from taking records, as far as its brokers tell; `None` where nothing does.
    pub async fn trouble_of(&self, topic: &str) -> Result<Option<String>, LogError> {
        let (asker, name) = (self.asker.clone(), topic.to_owned());
        // librdkafka blocks on it.
        let asked = tokio::task::spawn_blocking(move || {
            let timeout = Timeout::After(ASK_TIMEOUT);
            let metadata = asker.client().fetch_metadata(Some(&name), timeout)?;
            Ok::<_, KafkaError>(
                metadata
                    .topics()
                    .first()
                    .map_or(Health::Missing, Health::of),
            )
        });
        let health = asked
            .await
            .map_err(|error| LogError::Unavailable(error.to_string()))?
            .map_err(|error| log_error(&error))?;
        match health {
            Health::Missing => Ok(Some(Health::missing(topic))),
            Health::Error(why) | Health::Leaderless(why) => Ok(Some(why)),
            Health::Led(replicas) => self.too_few_in_sync(topic, &replicas).await,
        }
    }

    /// Whether one of these partitions takes no records for want of replicas, in words.
    async fn too_few_in_sync(
        &self,
        topic: &str,
        partitions: &[Replicas],
    ) -> Result<Option<String>, LogError> {
        if partitions.is_empty() {
            return Ok(None);
        }
        let wanted = self.min_in_sync(topic).await?;
        let few = (partitions.iter()).find(|partition| partition.in_sync.len() < wanted);
        Ok(few.map(|partition| partition.too_few(topic, wanted)))
    }

    /// How many replicas must have a record; 1 where nobody may ask.
    async fn min_in_sync(&self, topic: &str) -> Result<usize, LogError> {
        let options = AdminOptions::new().request_timeout(Some(ASK_TIMEOUT));
        let topic = ResourceSpecifier::Topic(topic);
        let client = self.creator.client();
        let asked = client.describe_configs([&topic], &options).await;
        let resources = self.creator.heard(client, asked);
        let resources = resources.map_err(|error| log_error(&error))?;
        let resource = resources.into_iter().next().and_then(Result::ok);
        let entry = resource.and_then(|resource| {
            let entry = resource.get("min.insync.replicas")?;
            entry.value.as_deref()?.parse().ok()
        });
        Ok(entry.unwrap_or(1))
    }

    /// The id of the cluster, if it has one. To be asked once the log has answered something.
    pub async fn cluster(&self) -> Arc<str> {
        let asker = self.asker.clone();
        let asked =
            tokio::task::spawn_blocking(move || asker.client().fetch_cluster_id(ASK_TIMEOUT));
        let id = asked.await.ok().flatten();
        // A slash would end it within an id.
        let id = id.filter(|id| !id.is_empty() && !id.contains('/'));
        id.map_or(UNKNOWN_CLUSTER.into(), Arc::from)
    }

    /// Creates the topics that are missing, and checks the partitions of those that are there. Answers
    /// how many partitions each topic of the log has.
    pub async fn ensure(
        &self,
        wanted: &BTreeMap<String, Topic>,
    ) -> Result<BTreeMap<String, usize>, LogError> {
        let there = self.partitions().await?;
        self.create_missing(wanted, there).await
    }

    /// As [`Admin::ensure`], for who has asked which topics are `there`.
    pub async fn create_missing(
        &self,
        wanted: &BTreeMap<String, Topic>,
        there: BTreeMap<String, usize>,
    ) -> Result<BTreeMap<String, usize>, LogError> {
        check_partitions(wanted, &there)?;
        let missing: Vec<_> = wanted
            .iter()
            .filter(|(name, _)| !there.contains_key(*name))
            .collect();
        if missing.is_empty() {
            return Ok(there);
        }
        // All or none: the log would make those that it takes of a list, and refuse the others.
        let only_looked_at = true;
        self.create(&missing, only_looked_at).await?;
        self.create(&missing, !only_looked_at).await?;
        self.appeared(&missing).await
    }

    async fn create(
        &self,
        missing: &[(&String, &Topic)],
        only_looked_at: bool,
    ) -> Result<(), LogError> {
        let new: Vec<_> = missing
            .iter()
            .map(|(name, topic)| {
                let replication = TopicReplication::Fixed(topic.replication.unwrap_or(-1));
                let new = NewTopic::new(name, topic.partitions.unwrap_or(1), replication);
                topic
                    .config
                    .iter()
                    .fold(new, |new, (key, value)| new.set(key, value))
            })
            .collect();
        let options = AdminOptions::new()
            .operation_timeout(Some(CREATE_TIMEOUT))
            .validate_only(only_looked_at);
        let client = self.creator.client();
        let made = client.create_topics(&new, &options).await;
        let results = self.creator.heard(client, made);
        let results = results.map_err(|error| LogError::Unavailable(error.to_string()))?;
        for (result, (name, topic)) in results.into_iter().zip(missing) {
            match result {
                Ok(_) if only_looked_at => {}
                Ok(_) => info!(
                    "created topic {name} with {} partition(s)",
                    topic.partitions.unwrap_or(1)
                ),
                // Another host was faster.
                Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((_, code)) if is_passing(code) => {
                    return Err(LogError::Unavailable(format!("creating {name}: {code}")));
                }
                Err((_, code)) if forbidden(code).is_some() => {
                    return Err(LogError::Unavailable(format!(
                        "topic `{name}` is not there, or not to be seen, and can't be created: the host's Kafka user lacks DESCRIBE \
                         on it, or CREATE ({code})"
                    )));
                }
                Err((_, code)) => {
                    return Err(LogError::Refused(format!(
                        "topic `{name}` cannot be created: {code}"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Brokers learn of a new topic one after another.
    async fn appeared(
        &self,
        missing: &[(&String, &Topic)],
    ) -> Result<BTreeMap<String, usize>, LogError> {
        let mut unseen = Vec::new();
        for _ in 0..APPEAR_TRIES {
            let there = self.partitions().await?;
            let is_unseen = |(name, topic): &&(&String, &Topic)| {
                there.get(*name).copied().unwrap_or(0) < partitions_wanted(topic)
            };
            unseen = missing
                .iter()
                .filter(is_unseen)
                .map(|(name, _)| format!("`{name}`"))
                .collect();
            if unseen.is_empty() {
                return Ok(there);
            }
            tokio::time::sleep(APPEAR_WAIT).await;
        }
        Err(LogError::Unavailable(format!(
            "topics that were created do not appear, or the host's Kafka user lacks DESCRIBE on them: {}",
            unseen.join(", ")
        )))
    }
}

/// How a topic's brokers are.
enum Health {
    Missing,
    /// Of the topic as a whole.
    Error(String),
    Leaderless(String),
    /// Each partition has a leader.
    Led(Vec<Replicas>),
}

/// Where a partition lies, as brokers' ids.
struct Replicas {
    partition: i32,
    all: Vec<i32>,
    in_sync: Vec<i32>,
}

impl Replicas {
    fn of(partition: &MetadataPartition) -> Self {
        Self {
            partition: partition.id(),
            all: partition.replicas().to_vec(),
            in_sync: partition.isr().to_vec(),
        }
    }

    fn lacks_some(&self) -> bool {
        self.in_sync.len() < self.all.len()
    }

    fn too_few(&self, topic: &str, wanted: usize) -> String {
        let Self {
            partition,
            all,
            in_sync,
        } = self;
        let away: Vec<_> = (all.iter().filter(|broker| !in_sync.contains(broker))).collect();
        let mend = if away.is_empty() {
            "give it more replicas".to_owned()
        } else {
            format!("bring broker(s) {away:?} back")
        };
        let count = in_sync.len();
        format!(
            "partition {partition} of {topic} has {count} in-sync replica(s), and the topic's `min.insync.replicas` is {wanted}: \
             {mend}, or lower the setting"
        )
    }
}

impl Health {
    fn missing(topic: &str) -> String {
        format!("there is no topic {topic}, or the host's Kafka user lacks DESCRIBE on it")
    }

    fn of(topic: &MetadataTopic) -> Self {
        let error = topic.error().map(RDKafkaErrorCode::from);
        if let Some(error) = error {
            return match forbidden(error) {
                Some(lacks) => Self::Error(format!("{lacks} ({})", topic.name())),
                None => Self::Error(format!("{}: {error}", topic.name())),
            };
        }
        let leaderless = topic.partitions().iter().find(|p| p.leader() < 0);
        if let Some(partition) = leaderless {
            return Self::Leaderless(format!(
                "partition {} has no leader: none of its replicas ({:?}) is there",
                partition.id(),
                partition.replicas()
            ));
        }
        Self::Led(topic.partitions().iter().map(Replicas::of).collect())
    }
}

/// Whether a broker was asked, and did not answer in time.
fn is_late(error: &KafkaError) -> bool {
    let late = [
        RDKafkaErrorCode::OperationTimedOut,
        RDKafkaErrorCode::RequestTimedOut,
    ];
    error
        .rdkafka_error_code()
        .is_some_and(|code| late.contains(&code))
}

/// While brokers start, or elect a controller.
fn is_passing(code: RDKafkaErrorCode) -> bool {
    matches!(
        code,
        RDKafkaErrorCode::BrokerNotAvailable
            | RDKafkaErrorCode::LeaderNotAvailable
            | RDKafkaErrorCode::NotController
            | RDKafkaErrorCode::OperationTimedOut
            | RDKafkaErrorCode::RequestTimedOut
    )
}

fn partitions_wanted(topic: &Topic) -> usize {
    topic
        .partitions
        .and_then(|n| usize::try_from(n).ok())
        .unwrap_or(1)
}

fn check_partitions(
    declared: &BTreeMap<String, Topic>,
    there: &BTreeMap<String, usize>,
) -> Result<(), LogError> {
    let few: Vec<_> = declared
        .iter()
        .filter_map(|(name, topic)| {
            let (have, want) = (*there.get(name)?, partitions_wanted(topic));
            (have < want).then(|| {
                format!(
                    "topic `{name}` has {have} partition(s) and the pipeline declares {want}: declare {have}, \
                     or add partitions with Kafka's tools (keys will then move to other partitions)"
                )
            })
        })
        .collect();
    if few.is_empty() {
        Ok(())
    } else {
        Err(LogError::Refused(few.join("; ")))
    }
}
