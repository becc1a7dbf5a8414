//! HTTP routes in: requests become records, and reads of a Redis store.

mod aside;
pub mod body;
mod produce;
mod read;
mod router;
mod starting;
mod trace;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use hyper::{Method, Request, StatusCode};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use self::aside::Aside;
use self::produce::{Made, Produce, log_refusal};
use self::read::{Read, plain_keys};
use self::router::{Found, Router};
pub use self::starting::Starting;
use crate::capability::redis::Store;
use crate::http::{
    self, Answer, Bodies, Handler, RequestBody, busy, method_not_allowed, not_found, text,
};
use crate::log::Sink;
use crate::metrics::Metrics;
use crate::pipeline::{Action, Http, NoKey, Route};
use crate::record::Header;

/// Requests that wait for the log, and again those that wait for the stores; further ones are told to come back.
const MAX_WAITING: usize = 512;
/// Bytes of a body from which on it is worked on beside the threads that serve everybody: a few of the largest would
/// make all others wait.
const LARGE_BODY: usize = 64 * 1024;
/// What log and metrics call the listener.
const LISTENER: &str = "http";
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
    bodies: Bodies,
    aside: Aside,
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
            let endpoint = Endpoint::new(route, stores, &http.routes)
                .with_context(|| format!("the HTTP route {}", route.path))?;
            router.insert(route.method, &route.path, endpoint)?;
        }
        Ok(Self {
            router,
            bodies: Bodies::new(http.max_body, &limits.http),
            aside: Aside::default(),
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
        let metrics = Arc::clone(&self.metrics);
        http::serve(listener, self, limits, metrics, shutdown).await;
    }
}

/// One route.
struct Endpoint {
    /// The path as the pipeline has it: the route's label.
    path: Arc<str>,
    action: EndpointAction,
}

enum EndpointAction {
    Produce(Arc<Produce>),
    Read(Read),
}

impl Endpoint {
    fn new(route: &Route, stores: &BTreeMap<String, Store>, all: &[Route]) -> anyhow::Result<Self> {
        let action = match &route.action {
            Action::Read { store: name, key } => {
                let store = stores
                    .get(name)
                    .with_context(|| format!("no Redis store {name}"))?;
                let others = plain_keys(all, name);
                EndpointAction::Read(Read::new(store.clone(), key.clone(), others))
            }
            Action::Produce { .. } => {
                EndpointAction::Produce(Arc::new(Produce::new(&route.action)?))
            }
        };
        Ok(Self {
            path: route.path.as_str().into(),
            action,
        })
    }
}

impl<S: Sink + 'static> Handler for Ingress<S> {
    const LISTENER: &'static str = LISTENER;

    async fn handle(&self, request: Request<RequestBody>) -> Answer {
        let started = Instant::now();
        let method = request.method().clone();
        let (route, answer) = self.dispatch(request).await;
        self.metrics
            .http_request(route, &method, answer.status(), started.elapsed());
        answer
    }

    fn refused(&self, method: &Method, status: StatusCode) {
        self.metrics
            .http_request(&self.no_route, method, status, Duration::ZERO);
    }
}

impl<S: Sink + 'static> Ingress<S> {
    /// The label of the route, and its answer.
    async fn dispatch(&self, request: Request<RequestBody>) -> (&Arc<str>, Answer) {
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

    async fn produce(
        &self,
        route: &Arc<Produce>,
        request: Request<RequestBody>,
    ) -> Result<Answer, Answer> {
        let (head, body) = request.into_parts();
        let kind = body::kind(&head.headers)
            .map_err(|why| text(StatusCode::UNSUPPORTED_MEDIA_TYPE, why))?;
        let header = trace::parent(&head.headers).map(|parent| Header::new("traceparent", parent));
        let body = self.bodies.read(body).await?;
        let (made, mut hold) = if body.bytes.len() < LARGE_BODY {
            (route.make(kind, &body.bytes, header), body.hold)
        } else {
            let route = Arc::clone(route);
            let make = move || (route.make(kind, &body.bytes, header), body.hold);
            self.aside.run(make).await
        };
        let Made { record, generated } = made.map_err(|why| text(StatusCode::BAD_REQUEST, why))?;
        // In JSON, a control character may take six times the bytes that it had in a form.
        let length = record.value.as_ref().map_or(0, Vec::len);
        if length > 2 * hold.size() {
            hold.resize(length)
                .map_err(|_| busy("too many requests are worked on"))?;
        }

        let _waiting = self
            .waiting_for_log
            .try_acquire()
            .map_err(|_| busy("too many requests wait for the log"))?;
        match timeout(self.limits.log_timeout, self.log.produce(&[record])).await {
            Ok(Ok(())) => Ok(route.answer(&generated)),
            Ok(Err(unsent)) => Err(log_refusal(&unsent, &route.topic)),
            Err(_) => Err(busy(
                "the log has not acknowledged in time; the record may still arrive",
            )),
        }
    }

    async fn read(&self, read: &Read, params: &matchit::Params<'_, '_>) -> Result<Answer, Answer> {
        let key = read.key(params).map_err(|no_key| match no_key {
            NoKey::NotHere => not_found(),
            NoKey::Malformed(why) => text(StatusCode::BAD_REQUEST, why),
        })?;
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
