//! The admin listener: health, readiness and metrics for whoever operates the host.

mod origin;

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use hyper::header::{AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use hyper::{Method, Request, StatusCode};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::http::{
    self, Answer, Handler, RequestBody, content, method_not_allowed, not_found, text,
};
use crate::metrics::{self, Metrics};
use crate::pipeline::Secret;
use crate::readiness::Readiness;

/// What log and metrics call the listener.
const LISTENER: &str = "admin";
/// Operators and scrapers are few.
const MAX_CONNECTIONS: usize = 128;
/// Of them, those whose requests are worked for at one time.
const MAX_REQUESTS: usize = 64;
/// How long requests may take once the host stops: it has done all else by then, and no answer here takes long.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Serves `/healthz`, `/readyz` and `/metrics` until `shutdown`; to those who carry the token, where there is one, and
/// else to those who call it by a loopback name.
pub async fn serve(
    listener: TcpListener,
    token: Option<Secret>,
    readiness: Arc<Readiness>,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
) {
    let limits = http::Limits {
        connections: MAX_CONNECTIONS,
        requests: MAX_REQUESTS,
        drain_timeout: DRAIN_TIMEOUT,
        ..http::Limits::default()
    };
    let admin = Admin {
        route: LISTENER.into(),
        // A token that is read from a file ends with a newline, which no header can carry.
        token: token.map(|token| digest(token.0.trim_ascii().as_bytes())),
        readiness,
        metrics,
    };
    let metrics = Arc::clone(&admin.metrics);
    http::serve(listener, admin, limits, metrics, shutdown).await;
}

struct Admin {
    /// The label of requests that are refused.
    route: Arc<str>,
    token: Option<[u8; 32]>,
    readiness: Arc<Readiness>,
    metrics: Arc<Metrics>,
}

impl Handler for Admin {
    const LISTENER: &'static str = LISTENER;

    async fn handle(&self, request: Request<RequestBody>) -> Answer {
        if let Some(refusal) = self.refusal(&request) {
            self.refused(request.method(), refusal.status());
            return refusal;
        }
        let answer: fn(&Self) -> Answer = match request.uri().path() {
            "/healthz" => |_| text(StatusCode::OK, "ok\n"),
            "/readyz" => Self::readyz,
            "/metrics" => Self::metrics,
            _ => return not_found(),
        };
        match *request.method() {
            Method::GET | Method::HEAD => answer(self),
            _ => method_not_allowed("GET, HEAD"),
        }
    }

    fn refused(&self, method: &Method, status: StatusCode) {
        let route = Arc::clone(&self.route);
        self.metrics
            .http_request(&route, method, status, Duration::ZERO);
    }
}

impl Admin {
    /// The answer to a request that is not for this listener, or not from whom it may be.
    fn refusal(&self, request: &Request<RequestBody>) -> Option<Answer> {
        // Who has the token may call the host what they like: a page that was led here has none.
        if self.token.is_none() && !origin::is_loopback(request) {
            return Some(text(
                StatusCode::MISDIRECTED_REQUEST,
                "without a token, the admin listener answers to loopback names only: localhost, 127.0.0.1, [::1]\n",
            ));
        }
        if !origin::is_own(request.headers()) {
            return Some(text(
                StatusCode::FORBIDDEN,
                "the admin listener does not answer to web pages of others\n",
            ));
        }
        (!self.authorized(request.headers())).then(unauthorized)
    }

    /// Compares digests, so that how long it takes says nothing about the token.
    fn authorized(&self, headers: &HeaderMap) -> bool {
        let Some(expected) = &self.token else {
            return true;
        };
        let credentials = headers
            .get(AUTHORIZATION)
            .map_or(&b""[..], HeaderValue::as_bytes);
        match credentials.split_at_checked(b"Bearer ".len()) {
            Some((scheme, token)) => {
                scheme.eq_ignore_ascii_case(b"Bearer ") && digest(token.trim_ascii()) == *expected
            }
            None => false,
        }
    }

    fn readyz(&self) -> Answer {
        let reasons = self.readiness.reasons();
        if reasons.is_empty() {
            return text(StatusCode::OK, "ready\n");
        }
        let mut lines = String::new();
        for reason in reasons {
            let _ = writeln!(lines, "{reason}");
        }
        text(StatusCode::SERVICE_UNAVAILABLE, lines)
    }

    fn metrics(&self) -> Answer {
        self.metrics.set_lanes(&self.readiness.lanes().waits());
        match self.metrics.encode() {
            Ok(text) => content(
                StatusCode::OK,
                HeaderValue::from_static(metrics::CONTENT_TYPE),
                text,
            ),
            Err(error) => {
                tracing::error!(%error, "cannot write the metrics");
                text(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "cannot write the metrics",
                )
            }
        }
    }
}

fn unauthorized() -> Answer {
    let mut answer = text(
        StatusCode::UNAUTHORIZED,
        "the admin token is missing or wrong",
    );
    answer
        .headers_mut()
        .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    answer
}

fn digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}
