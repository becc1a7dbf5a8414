//! The pipeline as it is meant: validated, defaults filled in, paths resolved. Nothing here can be
//! constructed outside this module but through [`Pipeline::load`], so what holds a `Pipeline` need not check again.

mod components;
mod delivery;
mod files;
mod flow;
mod http;
mod kafka;
mod listen;
mod load;
mod stages;
mod stores;
mod template;
mod url_faults;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use self::load::Probe;
pub use self::template::{NoKey, Template};
use crate::diagnostics::{Diagnostics, Problem, Span};
pub use crate::log::BatchLimits;

/// One validated `pipeline.toml`.
#[derive(Debug)]
pub struct Pipeline {
    pub(crate) source: Source,
    /// What may be meant, and is more likely a slip.
    pub(crate) warnings: Vec<Problem>,
    pub(crate) name: String,
    /// Where what is embedded and the compile cache live. Absolute.
    pub(crate) data_dir: PathBuf,
    pub(crate) shutdown_timeout: Duration,
    pub(crate) kafka: Kafka,
    /// By name: the topics of `[topics]`.
    pub(crate) topics: BTreeMap<String, Topic>,
    pub(crate) sql: BTreeMap<String, SqlStore>,
    pub(crate) redis: BTreeMap<String, RedisStore>,
    pub(crate) stages: Vec<Stage>,
    pub(crate) http: Option<Http>,
    pub(crate) admin: Admin,
}

/// The file that a pipeline was read from, for what is found to be wrong with it later. `Debug` hides its text.
#[derive(Default)]
pub struct Source {
    /// As the user wrote it.
    path: String,
    text: String,
}

/// `[kafka]`. `Debug` hides what the properties are set to.
pub struct Kafka {
    pub(crate) brokers: Brokers,
    /// librdkafka properties, passed through to every client.
    pub(crate) properties: BTreeMap<String, String>,
}

/// Where the log is.
#[derive(Debug)]
pub enum Brokers {
    /// A broker inside this process.
    Embedded {
        /// A loopback address; port 0 takes the last one used in this data-dir if it is free, else any.
        listen: SocketAddr,
    },
    /// `host:port[,host:port…]`.
    Remote(String),
}

/// A topic that is created if it is missing.
#[derive(Clone, Debug, Default)]
pub struct Topic {
    /// `None`: one where it is created, as many as there are where it exists.
    pub(crate) partitions: Option<i32>,
    /// `None`: the broker's default.
    pub(crate) replication: Option<i32>,
    /// Topic configuration, as `kafka-topics --config` takes it.
    pub(crate) config: BTreeMap<String, String>,
}

/// A SQL database.
#[derive(Debug)]
pub struct SqlStore {
    pub(crate) url: SqlUrl,
    /// What stages log in with, on PostgreSQL; `None`: with `url`.
    pub(crate) stage_url: Option<SqlUrl>,
    /// A folder of `*.sql` migrations, run at start.
    pub(crate) migrations: Option<PathBuf>,
    pub(crate) max_connections: u32,
}

/// Where a SQL database is. `Debug` hides passwords.
#[derive(Clone)]
pub enum SqlUrl {
    /// A `postgres:` URL.
    Postgres(String),
    /// A file, created if missing.
    Sqlite(PathBuf),
}

/// A Redis store.
#[derive(Debug)]
pub struct RedisStore {
    pub(crate) url: RedisUrl,
}

/// What a stage may do in a database that it is granted. Never what names the host's own tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SqlAccess {
    /// Read rows.
    ReadOnly,
    /// Read and change rows.
    Data,
    /// Make, alter and drop tables, views and indices too.
    DataDefinition,
}

/// Where a Redis store is. `Debug` hides passwords.
#[derive(Clone)]
pub enum RedisUrl {
    /// A `redis:` or `rediss:` URL.
    Remote(String),
    /// A folder of this process's own store.
    Embedded(PathBuf),
    /// In this process, gone when it ends.
    Memory,
}

/// One stage. `Debug` hides what its config is set to.
pub struct Stage {
    pub(crate) name: String,
    pub(crate) component: PathBuf,
    /// Where the file names the component.
    pub(crate) component_span: Span,
    pub(crate) input: Vec<String>,
    pub(crate) group: String,
    /// Topics that the stage may produce to.
    pub(crate) output: Vec<String>,
    /// What the stage may do in databases, by store name.
    pub(crate) sql: BTreeMap<String, SqlAccess>,
    /// By store name.
    pub(crate) redis: BTreeMap<String, RedisGrant>,
    /// What `wasi:config/store` answers.
    pub(crate) config: BTreeMap<String, String>,
    pub(crate) retry: Retry,
    /// `None`: `<topic of the message>.dlq`.
    pub(crate) dead_letter: Option<String>,
    pub(crate) limits: Limits,
    pub(crate) batch: BatchLimits,
    pub(crate) instances: Instances,
    pub(crate) delivery: Delivery,
    pub(crate) order: Order,
    /// Messages of one partition that may be worked on at one time; 1 where `order` is by partition.
    pub(crate) concurrency: usize,
    pub(crate) on_exhausted: OnExhausted,
    pub(crate) on_gap: OnGap,
    /// The name of a member that keeps its partitions over a restart (`group.instance.id`).
    pub(crate) instance_id: Option<String>,
}

/// What a stage's effects hold to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Effects may be repeated after a crash.
    AtLeastOnce,
    /// Effects in the stage's one SQL store, and what it emits, happen exactly once.
    Transactional,
}

/// What is kept in order of a partition's messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// All: one after the other.
    Partition,
    /// Those of one key.
    Key,
    /// None.
    None,
}

/// What becomes of a message whose retries are exhausted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnExhausted {
    /// A dead letter.
    DeadLetter,
    /// Its partition stops until the host is started again.
    Stop,
}

/// What happens where records were removed before they were processed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnGap {
    /// The partition stops until the host is started again.
    Stop,
    /// The partition goes on behind the gap.
    Continue,
}

/// What a stage may do with a Redis store.
#[derive(Clone, Debug)]
pub struct RedisGrant {
    /// Every key begins with it.
    pub(crate) prefix: String,
    /// Upper-case commands beyond those with a function of their own.
    pub(crate) commands: Vec<String>,
}

/// How often and how fast a message is tried again.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    /// Deliveries in all, at least 1.
    pub max_attempts: u32,
    /// The first wait; doubled each time, with jitter.
    pub initial: Duration,
    /// The longest wait.
    pub max: Duration,
}

/// What one call may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of linear memory an instance may have.
    pub(crate) memory: usize,
    /// How long one call may take, the host's work for it included.
    pub(crate) deadline: Duration,
    /// Bytes of one record a stage may emit, key, value and headers together.
    pub(crate) max_output: usize,
}

/// Whether instances serve more than one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instances {
    /// An instance is kept for the next call until it traps.
    Warm,
    /// A new instance each call.
    Fresh,
}

/// `[http]`.
#[derive(Debug)]
pub struct Http {
    pub(crate) listen: SocketAddr,
    /// Bytes of a request body at most.
    pub(crate) max_body: usize,
    pub(crate) routes: Vec<Route>,
}

/// One of `[[http.routes]]`.
#[derive(Debug)]
pub struct Route {
    /// A path with `{name}` segments.
    pub(crate) path: String,
    pub(crate) method: Method,
    pub(crate) action: Action,
}

/// The methods that routes may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Method {
    Get,
    Post,
    Put,
    Patch,
    Delete,
}

/// What a route does.
#[derive(Debug)]
pub enum Action {
    /// Appends a record made of the request, and answers once the log has acknowledged it.
    Produce {
        /// One of `[topics]`.
        topic: String,
        /// The field or generated field whose text is the record's key.
        key: Option<String>,
        /// Fields that the body must have.
        fields: Vec<String>,
        /// Fields that the host makes: a UUID (version 7) each, answered as header `stagehost-<name>`.
        generate: Vec<String>,
        /// The answer's status, 2xx.
        status: u16,
        /// The answer's body.
        body: String,
    },
    /// Answers the value at a key of a Redis store as JSON.
    Read {
        /// One of `[redis]`.
        store: String,
        /// With the path's `{name}`s.
        key: Template,
    },
}

/// The admin listener.
#[derive(Debug)]
pub struct Admin {
    /// Loopback unless there is a token.
    pub(crate) listen: SocketAddr,
    /// What `authorization: Bearer …` must carry. `Debug` hides it.
    pub(crate) token: Option<Secret>,
}

/// Text that `Debug` does not show.
#[derive(Clone)]
pub struct Secret(pub(crate) String);

impl Pipeline {
    /// `[http]`, where there is one.
    pub fn http(&self) -> Option<&Http> {
        self.http.as_ref()
    }

    /// What may be meant, and is more likely a slip, if there is such.
    pub fn warnings(&self) -> Option<Diagnostics> {
        let some = !self.warnings.is_empty();
        some.then(|| self.source.diagnostics(self.warnings.clone()))
    }

    /// The stages, in the order of their names.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// The `[redis]` stores by name.
    pub fn redis(&self) -> &BTreeMap<String, RedisStore> {
        &self.redis
    }
}

impl Source {
    /// The problems with what is printed of their places.
    pub(crate) fn diagnostics(&self, problems: Vec<Problem>) -> Diagnostics {
        Diagnostics::new(&*self.path, &*self.text, problems)
    }
}

impl Stage {
    /// Whether its instances serve more than one call.
    pub fn instances(&self) -> Instances {
        self.instances
    }
}

impl Secret {
    /// Hides the text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

impl fmt::Debug for Kafka {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kafka")
            .field("brokers", &self.brokers)
            .field("properties", &self.properties.keys())
            .finish()
    }
}

impl fmt::Debug for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stage")
            .field("name", &self.name)
            .field("component", &self.component)
            .field("input", &self.input)
            .field("group", &self.group)
            .field("output", &self.output)
            .field("sql", &self.sql)
            .field("redis", &self.redis)
            .field("config", &self.config.keys())
            .field("retry", &self.retry)
            .field("dead_letter", &self.dead_letter)
            .field("limits", &self.limits)
            .field("batch", &self.batch)
            .field("instances", &self.instances)
            .field("delivery", &self.delivery)
            .field("order", &self.order)
            .field("concurrency", &self.concurrency)
            .field("on_exhausted", &self.on_exhausted)
            .field("on_gap", &self.on_gap)
            .field("instance_id", &self.instance_id)
            .finish()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
        })
    }
}
