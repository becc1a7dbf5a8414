//! A running pipeline: assembles log, stores, stages and listeners, and takes them down again.

mod banner;
mod broker;
pub mod components;
mod lanes;
mod stage;
mod topics;
mod wait;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info, info_span, warn};

use self::components::Components;
use self::lanes::LanesWatch;
use self::wait::{GatedSink, LogWatch, Waiting};
use crate::admin;
use crate::capability::{StoreError, StoreName, Stores, redis, sql};
use crate::component::Runtime;
use crate::delivery::breaker::Breaker;
use crate::ingress::{self, Ingress, Starting};
use crate::log::kafka::ClientSettings;
use crate::log::kafka::consumer::StopHandle;
use crate::log::kafka::producer::{Patience, Producer};
use crate::log::kafka::topics::Admin;
use crate::metrics::Metrics;
use crate::pipeline::{Brokers, Delivery, Pipeline};
use crate::readiness::Readiness;

/// Where, in a data-dir, the embedded broker lives.
pub const EMBEDDED_FOLDER: &str = "kafka";
/// Where, in a data-dir, compiled components are kept.
const COMPILED_FOLDER: &str = "compiled";
/// How long the log may take to acknowledge what an HTTP client sends.
const INGRESS_PATIENCE: Duration = Duration::from_secs(10);
/// Of a drain's time, what is kept for leaving the groups and closing the stores.
const CLOSING_TIME: Duration = Duration::from_secs(2);

/// Runs the pipeline until `shutdown`, then drains it. Fails when it cannot be started or cannot go on.
pub async fn run(
    pipeline: Pipeline,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let listeners = Listeners::bind(&pipeline).await?;
    let readiness = Arc::new(Readiness::default());
    name_conditions(&pipeline, &readiness);
    info!("admin listens on http://{}", listeners.addresses.admin);
    let admin_stop = CancellationToken::new();
    let admin = tokio::spawn(admin::serve(
        listeners.admin,
        pipeline.admin.token.clone(),
        readiness.clone(),
        metrics.clone(),
        admin_stop.clone(),
    ));
    // Nothing is created for a pipeline whose components can't run.
    let runtime = Runtime::new(&pipeline.data_dir.join(COMPILED_FOLDER))?;
    let components = components::prepare(&pipeline, runtime).await?;
    let broker = broker::start(&pipeline, &readiness).await?;
    let brokers = match (&broker, &pipeline.kafka.brokers) {
        (Some(broker), _) => broker.address().to_string(),
        (None, Brokers::Remote(brokers)) => brokers.clone(),
        (None, Brokers::Embedded { .. }) => bail!("the embedded broker is not running"),
    };
    let settings = ClientSettings {
        brokers,
        properties: pipeline.kafka.properties.clone(),
    };
    let waiting = Waiting {
        readiness: &readiness,
        shutdown: &shutdown,
    };
    let serve = |listener| Starting::serve(listener, Arc::clone(&metrics));
    let starting = listeners.http.map(serve).transpose()?;
    let started = Host::start(
        &pipeline, components, &settings, &waiting, &metrics, starting,
    );
    let result = match started.await {
        Ok(Some(mut host)) => {
            banner::print(&pipeline, &settings.brokers, &listeners.addresses);
            let failed = host.serve(&shutdown).await;
            readiness.not_ready("host", "shutting down");
            host.drain(pipeline.shutdown_timeout).await;
            failed
        }
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    if let Some(broker) = broker {
        broker.shutdown().await;
    }
    admin_stop.cancel();
    let _ = admin.await;
    result
}

/// Sockets that are bound before anything else starts.
struct Listeners {
    admin: TcpListener,
    http: Option<TcpListener>,
    addresses: banner::Addresses,
}

impl Listeners {
    async fn bind(pipeline: &Pipeline) -> anyhow::Result<Self> {
        let admin = bind("[admin] listen", pipeline.admin.listen).await?;
        let http = match &pipeline.http {
            Some(http) => Some(bind("[http] listen", http.listen).await?),
            None => None,
        };
        let addresses = banner::Addresses {
            admin: admin.local_addr()?,
            http: http.as_ref().map(TcpListener::local_addr).transpose()?,
        };
        Ok(Self {
            admin,
            http,
            addresses,
        })
    }
}

async fn bind(key: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} ({key})"))
}

/// So that the host is not ready before each of them was found to hold.
fn name_conditions(pipeline: &Pipeline, readiness: &Readiness) {
    readiness.not_ready(wait::LOG, "starting");
    for store in store_names(pipeline) {
        readiness.not_ready(&condition(pipeline, &store), "starting");
    }
    for stage in &pipeline.stages {
        readiness.not_ready(&wait::stage(&stage.name), "starting");
    }
}

/// Everything of a pipeline that runs, but for the admin listener and the embedded broker.
struct Host {
    stages: Vec<StopHandle>,
    ended: JoinSet<anyhow::Result<()>>,
    ingress: Option<JoinHandle<()>>,
    ingress_stop: CancellationToken,
    watch: LogWatch,
    _lanes: LanesWatch,
    stores: Stores,
    /// Keeps the engine's clock going.
    _runtime: Arc<Runtime>,
}

impl Host {
    /// Waits for the log and the stores. `None` when it was told to shut down meanwhile.
    async fn start(
        pipeline: &Pipeline,
        components: Components,
        settings: &ClientSettings,
        waiting: &Waiting<'_>,
        metrics: &Arc<Metrics>,
        starting: Option<Starting>,
    ) -> anyhow::Result<Option<Self>> {
        let admin = Admin::new(settings)?;
        let Some(()) = topics::prepare(pipeline, &admin, waiting, settings).await? else {
            return Ok(None);
        };
        let lanes = LanesWatch::start(admin.clone(), waiting.readiness.clone());
        let cluster = admin.cluster().await;
        let watch = LogWatch::start(
            admin,
            settings.brokers.clone(),
            (topics::all(pipeline), topics::written(pipeline)),
            waiting.readiness.clone(),
            metrics.clone(),
        );
        let Some(stores) = open_stores(pipeline, waiting).await? else {
            return Ok(None);
        };
        let mut host = Self {
            stages: Vec::new(),
            ended: JoinSet::new(),
            ingress: None,
            ingress_stop: CancellationToken::new(),
            watch,
            _lanes: lanes,
            stores,
            _runtime: components.runtime,
        };
        let shared = stage::Shared {
            settings: settings.clone(),
            breaker: Arc::new(breaker(pipeline, waiting.readiness, metrics)),
            readiness: waiting.readiness.clone(),
            metrics: metrics.clone(),
            cluster,
        };
        let mut loaded = Vec::with_capacity(pipeline.stages.len());
        for (stage, ready) in pipeline.stages.iter().zip(components.ready) {
            let loading = stage::load(settings, stage, ready, &host.stores);
            loaded.push((stage, loading.await?));
        }
        for (stage, loaded) in loaded {
            let ready = wait::stage(&stage.name);
            let stop = loaded.start(&shared, ready, &mut host.ended)?;
            host.stages.push(stop);
        }
        if let (Some(config), Some(starting)) = (&pipeline.http, starting) {
            let patience = Patience::Bounded(INGRESS_PATIENCE);
            let sink = GatedSink::new(Producer::new(settings, patience)?, &host.watch);
            let limits = ingress::Limits::default();
            let stores = &host.stores.redis;
            let ingress = Ingress::new(config, Arc::new(sink), stores, metrics.clone(), limits)?;
            let listener = starting.end().await?;
            host.ingress = Some(tokio::spawn(
                ingress.serve(listener, host.ingress_stop.clone()),
            ));
        }
        Ok(Some(host))
    }

    /// Until it is told to shut down, or a stage ends by itself, which it does only when it cannot go on.
    async fn serve(&mut self, shutdown: &CancellationToken) -> anyhow::Result<()> {
        tokio::select! {
            // Both are cancel-safe: what has ended stays in the set.
            () = shutdown.cancelled() => Ok(()),
            Some(ended) = self.ended.join_next() => match ended {
                Ok(Ok(())) => Err(anyhow!("a stage ended by itself")),
                Ok(Err(error)) => Err(error),
                Err(error) => Err(anyhow!("a stage's task failed: {error}")),
            },
        }
    }

    /// No more requests, no more records; what is at hand is finished, settled and committed within `timeout`.
    async fn drain(mut self, timeout: Duration) {
        let began = Instant::now();
        let left = || timeout.saturating_sub(began.elapsed());
        info!(
            "draining, for {} at most",
            humantime::format_duration(timeout)
        );
        self.ingress_stop.cancel();
        for stage in &self.stages {
            stage.stop(left().saturating_sub(CLOSING_TIME.min(timeout / 10)));
        }
        let requests = async {
            if let Some(ingress) = &mut self.ingress
                && tokio::time::timeout(left(), &mut *ingress).await.is_err()
            {
                warn!("HTTP requests were cut off at the end of the shutdown-timeout");
                ingress.abort();
            }
        };
        let ended = async { while self.ended.join_next().await.is_some() {} };
        let stages = async {
            let time = left().max(CLOSING_TIME);
            if tokio::time::timeout(time, ended).await.is_err() {
                warn!(
                    "stages were cut off at the end of the shutdown-timeout; their records will be delivered again"
                );
            }
        };
        tokio::join!(requests, stages);
        self.watch.stop();
        let close = async {
            for database in self.stores.sql.values() {
                database.close().await;
            }
        };
        if tokio::time::timeout(left().max(CLOSING_TIME), close)
            .await
            .is_err()
        {
            warn!("databases were left with statements running");
        }
        info!("drained in {:.1?}", began.elapsed());
    }
}

fn sql_name(name: &str) -> StoreName {
    StoreName::Sql(name.into())
}

fn redis_name(name: &str) -> StoreName {
    StoreName::Redis(name.into())
}

fn store_names(pipeline: &Pipeline) -> impl Iterator<Item = StoreName> {
    let sql = pipeline.sql.keys().map(|name| sql_name(name));
    let redis = pipeline.redis.keys().map(|name| redis_name(name));
    sql.chain(redis)
}

fn condition(pipeline: &Pipeline, store: &StoreName) -> String {
    let (sql, redis) = (&pipeline.sql, &pipeline.redis);
    let shares_name = sql.contains_key(store.name()) && redis.contains_key(store.name());
    Breaker::condition(store, shares_name)
}

fn breaker(pipeline: &Pipeline, readiness: &Arc<Readiness>, metrics: &Arc<Metrics>) -> Breaker {
    let stores = store_names(pipeline);
    Breaker::new(stores, readiness.clone(), metrics.clone(), rand::random())
}

/// How long a transaction in the database may wait for its next statement: as long as a call of a stage that has
/// transactions there. `None` where no stage has.
fn longest_pause(pipeline: &Pipeline, database: &String) -> Option<Duration> {
    let stages = pipeline.stages.iter();
    let stages = stages.filter(|stage| {
        stage.delivery == Delivery::Transactional && stage.sql.contains_key(database)
    });
    stages.map(|stage| stage.limits.deadline).max()
}

/// `None` when told to shut down meanwhile.
async fn open_stores(pipeline: &Pipeline, waiting: &Waiting<'_>) -> anyhow::Result<Option<Stores>> {
    let mut stores = Stores::default();
    for (name, settings) in &pipeline.sql {
        let store = sql_name(name);
        let pause = longest_pause(pipeline, name);
        let open = async || {
            let database = sql::Database::open(settings, pause).await?;
            if pause.is_some() {
                database.prepare_progress().await?;
            }
            Ok::<_, StoreError>(database)
        };
        // What the driver of the migrations says, and what they have the server say, has its store's name.
        let named = || open().instrument(info_span!("sql", store = name));
        let opened = waiting
            .until_available(&condition(pipeline, &store), &store.to_string(), named)
            .await?;
        let Some(database) = opened else {
            return Ok(None);
        };
        stores.sql.insert(name.clone(), database);
    }
    for (name, settings) in &pipeline.redis {
        let store = redis_name(name);
        let opened = waiting
            .until_available(&condition(pipeline, &store), &store.to_string(), || {
                redis::Store::open(settings).instrument(info_span!("redis", store = name))
            })
            .await?;
        let Some(store) = opened else {
            return Ok(None);
        };
        stores.redis.insert(name.clone(), store);
    }
    Ok(Some(stores))
}
