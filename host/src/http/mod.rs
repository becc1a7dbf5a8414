//! The HTTP/1.1 server under ingress and admin: the accept loop, its bounds and timeouts, the drain,
//! and the few shapes that answers have.

use std::convert::Infallible;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;

/// Connections served at once. Below the usual 1,024 file descriptors of a process, so that the log
/// and the stores keep theirs.
const MAX_CONNECTIONS: usize = 768;
/// Connections beyond those served, that are told so; further ones wait in the kernel's backlog.
const MAX_REFUSED_CONNECTIONS: usize = 64;
/// Bytes of the bodies that are read or worked on at once.
const MAX_BODY_BYTES: usize = 256 * 1024 * 1024;
/// Bodies of the largest size for which there is room in any case.
const MIN_BODIES: usize = 4;
/// How long a request's head may take. hyper starts this clock when it begins to wait for a request,
/// so it is how long a connection may idle, too.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a request's body may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a client may take nothing of its answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long requests in flight may take once the server stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of a request's head, and of what is read ahead of a body.
const READ_BUFFER: usize = 64 * 1024;
/// How long a connection that the server closes is read on, so that its last answer arrives.
const LINGER: Duration = Duration::from_secs(1);
/// How long to wait after `accept` failed: it does when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// What `retry-after` says, in seconds.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("1");

/// The bounds of a server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections served at once; those beyond are answered 503.
    pub connections: usize,
    /// Bytes of the bodies that are read or worked on at once, or those of a few of the largest if that
    /// is more; a request whose body has no room is answered 503.
    pub body_bytes: usize,
    /// How long a request's head may take, idling before it included.
    pub header_timeout: Duration,
    /// How long a request's body may take.
    pub body_timeout: Duration,
    /// How long a client may take nothing of its answer.
    pub write_timeout: Duration,
    /// How long requests in flight may take once the server stops.
    pub drain_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: MAX_CONNECTIONS,
            body_bytes: MAX_BODY_BYTES,
            header_timeout: HEADER_TIMEOUT,
            body_timeout: BODY_TIMEOUT,
            write_timeout: WRITE_TIMEOUT,
            drain_timeout: DRAIN_TIMEOUT,
        }
    }
}

/// What handlers answer.
pub(crate) type Answer = Response<Full<Bytes>>;

/// What a server does with requests.
pub(crate) trait Handler: Send + Sync + 'static {
    /// Answers a request. Dropped when the client is gone.
    fn handle(&self, request: Request<Incoming>) -> impl Future<Output = Answer> + Send;

    /// Answers a request on a connection beyond those that are served.
    fn refuse(&self, _request: Request<Incoming>) -> Answer {
        busy("too many connections")
    }
}

/// Serves until `shutdown`, then stops accepting and lets the requests in flight finish, within `drain_timeout`.
pub(crate) async fn serve<H: Handler>(
    listener: TcpListener,
    handler: H,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let handler = Arc::new(handler);
    let mut connections = JoinSet::new();
    loop {
        // All three are cancel-safe: none takes a connection or a task's end without returning it.
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < limits.connections + MAX_REFUSED_CONNECTIONS => {
                match accepted {
                    Ok((stream, _)) => {
                        let full = connections.len() >= limits.connections;
                        let handler = Arc::clone(&handler);
                        connections.spawn(connection(stream, handler, limits, full, shutdown.clone()));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        }
    }
    drop(listener);
    let drained = timeout(limits.drain_timeout, async {
        while connections.join_next().await.is_some() {}
    });
    if drained.await.is_err() {
        tracing::warn!(
            connections = connections.len(),
            "requests were not done in time; closing their connections"
        );
        connections.shutdown().await;
    }
}

async fn connection<H: Handler>(
    stream: TcpStream,
    handler: Arc<H>,
    limits: Limits,
    full: bool,
    shutdown: CancellationToken,
) {
    // Answers are written whole: waiting for more to send would only delay them.
    let _ = stream.set_nodelay(true);
    let mut stream = Box::pin(TimeoutStream::new(stream));
    stream
        .as_mut()
        .set_write_timeout_pinned(Some(limits.write_timeout));
    let service = service_fn(|request| answer(Arc::clone(&handler), request, full));
    let served = {
        let mut served = pin!(
            http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(limits.header_timeout)
                .max_buf_size(READ_BUFFER)
                // A client may close its side once it has sent its request, as `nc -N` does.
                .half_close(true)
                .serve_connection(TokioIo::new(&mut stream), service)
        );
        // Both are cancel-safe: the connection is polled by reference.
        tokio::select! {
            result = served.as_mut() => result,
            () = shutdown.cancelled() => {
                served.as_mut().graceful_shutdown();
                served.await
            }
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "an HTTP connection ended early");
    }
    linger(stream).await;
}

/// Closes our side and reads on for a moment: to close with bytes unread resets the connection, and
/// the client may then never see the answer that says why.
async fn linger(mut stream: Pin<Box<TimeoutStream<TcpStream>>>) {
    if stream.shutdown().await.is_err() {
        return;
    }
    let unread = async {
        let mut scrap = [0; 4096];
        while let Ok(1..) = stream.read(&mut scrap).await {}
    };
    let _ = timeout(LINGER, unread).await;
}

async fn answer<H: Handler>(
    handler: Arc<H>,
    request: Request<Incoming>,
    full: bool,
) -> Result<Answer, Infallible> {
    if full {
        return Ok(closing(handler.refuse(request)));
    }
    let what = format!("{} {}", request.method(), request.uri().path());
    let handled = AssertUnwindSafe(handler.handle(request)).catch_unwind();
    Ok(handled.await.unwrap_or_else(|_| {
        tracing::error!(request = what, "the handler of a request panicked");
        text(StatusCode::INTERNAL_SERVER_ERROR, "internal error")
    }))
}

/// Room in memory that the bodies of a server's requests share.
pub(crate) struct BodyRoom {
    bytes: Semaphore,
    /// Bytes of one body.
    max: u32,
    timeout: Duration,
}

/// A body, which keeps its room until it is dropped.
pub(crate) struct HeldBody<'a> {
    pub(crate) bytes: Bytes,
    _room: SemaphorePermit<'a>,
}

impl BodyRoom {
    /// For bodies of `max` bytes at most.
    pub(crate) fn new(max: usize, limits: &Limits) -> Self {
        let max = u32::try_from(max).unwrap_or(u32::MAX);
        let all = limits.body_bytes.max(MIN_BODIES * max as usize);
        Self {
            bytes: Semaphore::new(all.min(Semaphore::MAX_PERMITS)),
            max,
            timeout: limits.body_timeout,
        }
    }

    /// The whole body, or the answer that says why not: 413 above `max` bytes, 503 without room, 408, 400.
    pub(crate) async fn read(&self, body: Incoming) -> Result<HeldBody<'_>, Answer> {
        let size = body.size_hint();
        if size.lower() > u64::from(self.max) {
            return Err(self.too_large());
        }
        // What has no length may become as large as any.
        let needed = size.upper().and_then(|size| u32::try_from(size).ok());
        let room = self
            .bytes
            .try_acquire_many(needed.unwrap_or(self.max).min(self.max))
            .map_err(|_| closing(busy("too many requests send their bodies")))?;
        let whole = Limited::new(body, self.max as usize).collect();
        match timeout(self.timeout, whole).await {
            Ok(Ok(whole)) => Ok(HeldBody {
                bytes: whole.to_bytes(),
                _room: room,
            }),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(self.too_large()),
            Ok(Err(error)) => {
                let why = error
                    .source()
                    .map_or_else(|| error.to_string(), ToString::to_string);
                let line = format!("the body could not be read: {why}");
                Err(closing(text(StatusCode::BAD_REQUEST, line)))
            }
            Err(_) => Err(closing(text(
                StatusCode::REQUEST_TIMEOUT,
                "the body took too long",
            ))),
        }
    }

    fn too_large(&self) -> Answer {
        let line = format!("the body is larger than {} bytes", self.max);
        closing(text(StatusCode::PAYLOAD_TOO_LARGE, line))
    }
}

/// An answer of one line of text.
pub(crate) fn text(status: StatusCode, line: impl Into<Bytes>) -> Answer {
    content(
        status,
        HeaderValue::from_static("text/plain; charset=utf-8"),
        line,
    )
}

/// An answer of some type.
pub(crate) fn content(status: StatusCode, kind: HeaderValue, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, kind);
    answer
}

/// 404.
pub(crate) fn not_found() -> Answer {
    text(StatusCode::NOT_FOUND, "not found")
}

/// 405; `allow` has the methods, comma-separated.
pub(crate) fn method_not_allowed(allow: &str) -> Answer {
    let mut answer = text(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("method not allowed; allowed: {allow}"),
    );
    if let Ok(allow) = HeaderValue::from_str(allow) {
        answer.headers_mut().insert(ALLOW, allow);
    }
    answer
}

/// 503: worth another try.
pub(crate) fn busy(line: impl Into<Bytes>) -> Answer {
    let mut answer = text(StatusCode::SERVICE_UNAVAILABLE, line);
    answer
        .headers_mut()
        .insert(RETRY_AFTER, RETRY_AFTER_SECONDS);
    answer
}

/// The answer, after which the connection is closed.
fn closing(mut answer: Answer) -> Answer {
    answer
        .headers_mut()
        .insert(CONNECTION, HeaderValue::from_static("close"));
    answer
}
