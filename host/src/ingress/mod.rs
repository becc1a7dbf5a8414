//! HTTP routes in: requests become records, and reads of a Redis store.

mod body;
mod read;
mod router;
mod starting;
mod trace;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{HeaderName, HeaderValue};
use hyper::{Request, StatusCode};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::read::Read;
use self::router::{Found, Router};
pub use self::starting::Starting;
use crate::capability::redis::Store;
use crate::http::{self, Answer, BodyRoom, Handler, busy, method_not_allowed, not_found, text};
use crate::log::{LogError, Sink, Unsent};
use crate::metrics::Metrics;
use crate::pipeline::{Action, Http, Route};
use crate::record::{Header, Outgoing};

/// Requests that wait for the log, and again those that wait for the stores; further ones are told to come back.
const MAX_WAITING: usize = 512;
/// How long the log may take to acknowledge a record.
const LOG_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a store may take to answer.
const STORE_TIMEOUT: Duration = Duration::from_secs(5);

/// The bounds of the ingress.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Those of its connections.
    pub http: http::Limits,
    /// Requests that wait for the log, and again those that wait for the stores; those beyond are answered 503.
    pub waiting: usize,
    /// How long the log may take to acknowledge a record.
    pub log_timeout: Duration,
    /// How long a store may take to answer.
    pub store_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            http: http::Limits::default(),
            waiting: MAX_WAITING,
            log_timeout: LOG_TIMEOUT,
            store_timeout: STORE_TIMEOUT,
        }
    }
}

/// The routes with what they act on, ready to be served.
pub struct Ingress<S> {
    router: Router<Endpoint>,
    bodies: BodyRoom,
    log: Arc<S>,
    metrics: Arc<Metrics>,
    limits: Limits,
    waiting_for_log: Semaphore,
    waiting_for_stores: Semaphore,
    /// The label of requests that meet no route.
    no_route: Arc<str>,
}

impl<S: Sink + 'static> Ingress<S> {
    /// Puts routes, log and stores (by name) together; fails where they do not fit.
    pub fn new(
        http: &Http,
        log: Arc<S>,
        stores: &BTreeMap<String, Store>,
        metrics: Arc<Metrics>,
        limits: Limits,
    ) -> anyhow::Result<Self> {
        let mut router = Router::default();
        for route in &http.routes {
            let endpoint = Endpoint::new(route, stores)
                .with_context(|| format!("the HTTP route {}", route.path))?;
            router.insert(route.method, &route.path, endpoint)?;
        }
        Ok(Self {
            router,
            bodies: BodyRoom::new(http.max_body, &limits.http),
            log,
            metrics,
            limits,
            waiting_for_log: Semaphore::new(limits.waiting),
            waiting_for_stores: Semaphore::new(limits.waiting),
            no_route: "none".into(),
        })
    }

    /// Serves until `shutdown`; then requests in flight finish within `limits.http.drain_timeout`.
    pub async fn serve(self, listener: TcpListener, shutdown: CancellationToken) {
        let limits = self.limits.http;
        http::serve(listener, self, limits, shutdown).await;
    }
}

/// One route.
struct Endpoint {
    /// The path as the pipeline has it: the route's label.
    path: Arc<str>,
    action: EndpointAction,
}

enum EndpointAction {
    Produce(Produce),
    Read(Read),
}

/// What a produce route makes of a request.
struct Produce {
    topic: Arc<str>,
    /// Where in `names` the key is.
    key: Option<usize>,
    /// The record's fields: the generated ones first.
    names: Vec<String>,
    generated: Vec<HeaderName>,
    status: StatusCode,
    body: Bytes,
}

impl Endpoint {
    fn new(route: &Route, stores: &BTreeMap<String, Store>) -> anyhow::Result<Self> {
        let action = match &route.action {
            Action::Read { store, key } => {
                let store = stores
                    .get(store)
                    .with_context(|| format!("no Redis store {store}"))?;
                EndpointAction::Read(Read::new(store.clone(), key))
            }
            Action::Produce { .. } => EndpointAction::Produce(Produce::new(&route.action)?),
        };
        Ok(Self {
            path: route.path.as_str().into(),
            action,
        })
    }
}

impl<S: Sink + 'static> Handler for Ingress<S> {
    async fn handle(&self, request: Request<Incoming>) -> Answer {
        let started = Instant::now();
        let method = request.method().clone();
        let (route, answer) = self.dispatch(request).await;
        self.metrics
            .http_request(route, &method, answer.status(), started.elapsed());
        answer
    }

    fn refuse(&self, request: Request<Incoming>) -> Answer {
        let answer = busy("too many connections");
        let status = answer.status();
        self.metrics
            .http_request(&self.no_route, request.method(), status, Duration::ZERO);
        answer
    }
}

impl<S: Sink + 'static> Ingress<S> {
    /// The label of the route, and its answer.
    async fn dispatch(&self, request: Request<Incoming>) -> (&Arc<str>, Answer) {
        let path = request.uri().path().to_owned();
        match self.router.find(request.method(), &path) {
            Found::Nothing => (&self.no_route, not_found()),
            Found::OtherMethods(endpoint, allow) => (&endpoint.path, method_not_allowed(&allow)),
            Found::Route(endpoint, params) => {
                let answer = match &endpoint.action {
                    EndpointAction::Produce(produce) => self.produce(produce, request).await,
                    EndpointAction::Read(read) => self.read(read, &params).await,
                };
                (&endpoint.path, answer.unwrap_or_else(|refusal| refusal))
            }
        }
    }

    async fn produce(&self, route: &Produce, request: Request<Incoming>) -> Result<Answer, Answer> {
        let (head, body) = request.into_parts();
        let kind = body::kind(&head.headers)
            .map_err(|why| text(StatusCode::UNSUPPORTED_MEDIA_TYPE, why))?;
        let body = self.bodies.read(body).await?;
        let declared = &route.names[route.generated.len()..];
        let sent = body::fields(kind, &body.bytes, declared)
            .map_err(|why| text(StatusCode::BAD_REQUEST, why))?;
        let generated: Vec<String> = route.generated.iter().map(|_| new_id()).collect();
        let headers = trace::parent(&head.headers).map(|parent| Header::new("traceparent", parent));
        let values = [generated.as_slice(), sent.as_slice()].concat();

        let _waiting = self
            .waiting_for_log
            .try_acquire()
            .map_err(|_| busy("too many requests wait for the log"))?;
        let record = route.record(&values, headers.into_iter().collect());
        match timeout(self.limits.log_timeout, self.log.produce(&[record])).await {
            Ok(Ok(())) => Ok(route.answer(&generated)),
            Ok(Err(unsent)) => Err(log_refusal(&unsent, &route.topic)),
            Err(_) => Err(busy(
                "the log has not acknowledged in time; the record may still arrive",
            )),
        }
    }

    async fn read(&self, read: &Read, params: &matchit::Params<'_, '_>) -> Result<Answer, Answer> {
        let key = read
            .key(params)
            .map_err(|why| text(StatusCode::BAD_REQUEST, why))?;
        let _waiting = self
            .waiting_for_stores
            .try_acquire()
            .map_err(|_| busy("too many requests wait for the store"))?;
        match timeout(self.limits.store_timeout, read.value(&key)).await {
            Ok(answer) => answer,
            Err(_) => Err(busy("the store did not answer in time")),
        }
    }
}

impl Produce {
    fn new(action: &Action) -> anyhow::Result<Self> {
        let Action::Produce {
            topic,
            key,
            fields,
            generate,
            status,
            body,
        } = action
        else {
            anyhow::bail!("not a produce route");
        };
        let names: Vec<String> = generate.iter().chain(fields).cloned().collect();
        let key = match key {
            None => None,
            Some(key) => {
                let place = names.iter().position(|name| name == key);
                Some(place.with_context(|| format!("the key {key} is none of its fields"))?)
            }
        };
        let generated = generate
            .iter()
            .map(|name| HeaderName::from_bytes(format!("stagehost-{name}").as_bytes()))
            .collect::<Result<_, _>>()
            .context("the name of a generated field must suit an HTTP header")?;
        Ok(Self {
            topic: topic.as_str().into(),
            key,
            names,
            generated,
            status: StatusCode::from_u16(*status)?,
            body: Bytes::copy_from_slice(body.as_bytes()),
        })
    }

    /// The record of the fields' values: a JSON object in the order of `names`.
    fn record(&self, values: &[String], headers: Vec<Header>) -> Outgoing {
        Outgoing {
            topic: Arc::clone(&self.topic),
            partition: None,
            timestamp: None,
            key: self.key.map(|place| values[place].clone().into_bytes()),
            value: Some(json_object(&self.names, values)),
            headers,
        }
    }

    fn answer(&self, generated: &[String]) -> Answer {
        let mut answer = text(self.status, self.body.clone());
        for (name, value) in self.generated.iter().zip(generated) {
            if let Ok(value) = HeaderValue::from_str(value) {
                answer.headers_mut().insert(name, value);
            }
        }
        answer
    }
}

/// Version 7: its first bytes are the time, so that rows come to the end of an index and not all over it.
fn new_id() -> String {
    Uuid::now_v7().to_string()
}

fn json_object(names: &[String], values: &[String]) -> Vec<u8> {
    use serde::Serializer;
    let mut json = Vec::new();
    let written = serde_json::Serializer::new(&mut json).collect_map(names.iter().zip(values));
    debug_assert!(written.is_ok(), "text into memory cannot fail");
    json
}

/// What a client is told does not show the log's inside; our log does.
fn log_refusal(unsent: &[Unsent], topic: &str) -> Answer {
    let Some(Unsent { error, .. }) = unsent.first() else {
        return busy("the log is not available");
    };
    match error {
        // That the log is away is said once, by who watches it, and not for every request.
        LogError::Unavailable(_) => {
            tracing::debug!(topic, "a record was not acknowledged: {error}")
        }
        _ => tracing::warn!(topic, "a request's record was not acknowledged: {error}"),
    }
    match error {
        LogError::Unavailable(_) => busy("the log is not available"),
        LogError::TooLarge(_) => text(
            StatusCode::PAYLOAD_TOO_LARGE,
            "the record is larger than the log takes",
        ),
        LogError::Refused(_) => text(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the log refused the record",
        ),
    }
}
