//! The HTTP/1.1 server under ingress and admin: the accept loop, its bounds and timeouts, the drain,
//! and the few shapes that answers have.

mod body;
mod head;
mod places;
mod room;
mod stream;

use std::convert::Infallible;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures::{FutureExt, poll};
use http_body_util::Full;
use hyper::body::{Body, Incoming};
use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER, TRANSFER_ENCODING};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

pub(crate) use self::body::{Bodies, RequestBody};
use self::places::{Connections, LOOK_EVERY, PLACE_TIMEOUT, Place, Requests};
use self::room::Room;
use self::stream::{Link, MAX_HEAD, Stream};
use crate::metrics::Metrics;

/// Connections at once. Below the usual 1,024 file descriptors of a process, so that the log and the
/// stores keep theirs.
const MAX_CONNECTIONS: usize = 832;
/// Requests that are worked for at once. The other connections are of those that wait for a place.
const MAX_REQUESTS: usize = 768;
/// Bytes of the bodies that are read or worked on at once.
const MAX_BODY_BYTES: usize = 256 * 1024 * 1024;
/// Bytes of an answer that a socket takes at once.
const SMALL_ANSWER: u64 = 16 * 1024;
/// Bytes of the answers that their clients have yet to take.
const MAX_ANSWER_BYTES: usize = 256 * 1024 * 1024;
/// How long a request's head may take. hyper starts this clock when it begins to wait for a request,
/// so it is how long a connection may idle, too.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a request's body may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a request's body may bring next to nothing.
const BODY_WINDOW: Duration = Duration::from_secs(10);
/// How long a client may take next to nothing of its answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long requests in flight may take once the server stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a connection that the server closes is read on, so that its last answer arrives.
const LINGER: Duration = Duration::from_secs(1);
/// How long a connection that is asked to give way is left to see what has come: a tick of tokio's clock.
const LOOK_AT_SOCKETS: Duration = Duration::from_millis(1);
/// How long to wait after `accept` failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// What `retry-after` says, in seconds.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("1");

/// The bounds of a server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once, at most. From `requests` on, each new one takes the place of one that idles, or of the oldest; where
    /// there is no room, it waits for a moment, and is closed then.
    pub connections: usize,
    /// Requests that are worked for at once, bodies and answers on their way included; others wait for their turn for a
    /// moment, and are answered 503 then.
    pub requests: usize,
    /// Bytes of the bodies that are read or worked on at once, or those of a few of the largest if that
    /// is more; a request whose body has no room is answered 503.
    pub body_bytes: usize,
    /// Bytes of the answers that their clients have yet to take; where there is no room for one, it is a 503.
    pub answer_bytes: usize,
    /// Bytes of each body and answer that are not counted.
    pub own_bytes: usize,
    /// How long a request's head may take, idling before it included.
    pub header_timeout: Duration,
    /// How long a request's body may take.
    pub body_timeout: Duration,
    /// How long a request's body may bring next to nothing.
    pub body_window: Duration,
    /// How long a client may take next to nothing of its answer.
    pub write_timeout: Duration,
    /// How long requests in flight may take once the server stops.
    pub drain_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: MAX_CONNECTIONS,
            requests: MAX_REQUESTS,
            body_bytes: MAX_BODY_BYTES,
            answer_bytes: MAX_ANSWER_BYTES,
            own_bytes: room::OWN_BYTES,
            header_timeout: HEADER_TIMEOUT,
            body_timeout: BODY_TIMEOUT,
            body_window: BODY_WINDOW,
            write_timeout: WRITE_TIMEOUT,
            drain_timeout: DRAIN_TIMEOUT,
        }
    }
}

/// What handlers answer.
pub(crate) type Answer = Response<Full<Bytes>>;

/// What a server does with requests.
pub(crate) trait Handler: Send + Sync + 'static {
    /// What log and metrics call the listener.
    const LISTENER: &'static str;

    /// Answers a request. Dropped when its connection ends.
    fn handle(&self, request: Request<RequestBody>) -> impl Future<Output = Answer> + Send;

    /// A request was answered so without being handled: it is malformed, or there are too many.
    fn refused(&self, _method: &Method, _status: StatusCode) {}
}

/// Serves until `shutdown`, then stops accepting and lets the requests in flight finish, within `drain_timeout`.
pub(crate) async fn serve<H: Handler>(
    listener: TcpListener,
    handler: H,
    limits: Limits,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
) {
    let requests = Requests::new(H::LISTENER, metrics, limits.requests);
    let server = Arc::new(Server {
        handler,
        limits,
        requests: Arc::new(requests),
        answers: Arc::new(Room::new(limits.answer_bytes, limits.own_bytes)),
        shutdown: shutdown.clone(),
    });
    let mut open = Connections::new(Arc::clone(&server.requests), &limits);
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut connections = JoinSet::new();
    // A connection that is to be served next.
    let mut next: Option<Next> = None;
    loop {
        // All are cancel-safe: none takes a connection or a task's end without returning it, and news are kept.
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            Some(ended) = connections.join_next_with_id() => {
                open.remove(id_of(ended));
            }
            _ = look.tick(), if server.requests.wait() || next.is_some() => {
                open.make_room();
                if next.is_some() {
                    open.make_way_again();
                }
            }
            accepted = listener.accept(), if next.is_none() && connections.len() < open.max_tasks() => {
                match accepted {
                    Ok((stream, _)) => {
                        open.make_way();
                        next = Some(Next { stream, since: Instant::now() });
                    }
                    Err(error) => {
                        open.cannot_accept(&error);
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
            // So that the clock above is looked at.
            () = server.requests.news() => {}
        }
        // Those behind it wait, too.
        let Some(waiting) = next.take() else {
            continue;
        };
        match open.admit() {
            Some(place) => {
                let serving = connection(waiting.stream, Arc::clone(&server), Arc::clone(&place));
                open.insert(place, connections.spawn(serving).id());
            }
            None if waiting.since.elapsed() < PLACE_TIMEOUT => next = Some(waiting),
            None => open.refuse(),
        }
    }
    drop((listener, next));
    let drained = timeout(limits.drain_timeout, async {
        loop {
            // Both are cancel-safe.
            tokio::select! {
                ended = connections.join_next_with_id() => match ended {
                    Some(ended) => open.remove(id_of(ended)),
                    None => return,
                },
                _ = look.tick() => open.make_room(),
            }
        }
    });
    if drained.await.is_err() {
        tracing::warn!(
            connections = connections.len(),
            "requests were not done in time; closing their connections"
        );
        connections.shutdown().await;
    }
}

fn id_of(ended: Result<(Id, ()), JoinError>) -> Id {
    ended.map_or_else(|error| error.id(), |(id, ())| id)
}

/// A connection that waits for room.
struct Next {
    stream: TcpStream,
    since: Instant,
}

/// What all connections share.
struct Server<H> {
    handler: H,
    limits: Limits,
    requests: Arc<Requests>,
    /// Room for what their clients have yet to take.
    answers: Arc<Room>,
    shutdown: CancellationToken,
}

impl<H> Server<H> {
    /// Whether a connection that was asked to give way does, which is counted.
    fn gave_way(&self, place: &Place) -> bool {
        let why = place.gives_way();
        if let Some(why) = why {
            self.requests.turned_away(why);
        }
        why.is_some()
    }

    /// Cancel-safe: the news that it is asked is kept.
    async fn until_it_gives_way(&self, place: &Place) {
        loop {
            place.asked().await;
            if self.gave_way(place) {
                return;
            }
        }
    }
}

async fn connection<H: Handler>(socket: TcpStream, server: Arc<Server<H>>, place: Arc<Place>) {
    // Answers are written whole: waiting for more to send would only delay them.
    let _ = socket.set_nodelay(true);
    let limits = &server.limits;
    let mut stream = Stream::new(socket, Arc::clone(&place), limits.write_timeout);
    let link = stream.link();
    let service = service_fn(|request| answer(&server, request, &link, &place));
    let served = {
        let mut served = pin!(
            http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(limits.header_timeout)
                .max_buf_size(MAX_HEAD)
                // A client may close its side once it has sent its request, as `nc -N` does.
                .half_close(true)
                .serve_connection(TokioIo::new(&mut stream), service)
        );
        let mut stopping = false;
        loop {
            // All are cancel-safe: the connection is polled by reference, and news are kept.
            tokio::select! {
                biased;
                result = served.as_mut() => break result,
                () = server.shutdown.cancelled(), if !stopping => {
                    stopping = true;
                    served.as_mut().graceful_shutdown();
                }
                // Its answer's room is another's.
                () = link.gives_way() => if link.holds_an_answer() {
                    return;
                },
                () = place.asked() => {
                    // What has come by now is not seen before the runtime looks at its sockets, which it does before its timers.
                    tokio::time::sleep(LOOK_AT_SOCKETS).await;
                    if let Poll::Ready(result) = poll!(served.as_mut()) {
                        // What it was asked is over, too.
                        place.gives_way();
                        break result;
                    }
                    if server.gave_way(&place) {
                        return;
                    }
                }
            }
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "an HTTP connection ended early");
    }
    link.taken();
    place.waits();
    // Both are cancel-safe: what is read is thrown away.
    tokio::select! {
        () = linger(stream.into_socket()) => {}
        () = server.until_it_gives_way(&place) => {}
    }
}

/// Closes our side and reads on for a moment: to close with bytes unread resets the connection, and
/// the client may then never see the answer that says why.
async fn linger(mut socket: TcpStream) {
    if socket.shutdown().await.is_err() {
        return;
    }
    let unread = async {
        let mut scrap = [0; 4096];
        while let Ok(1..) = socket.read(&mut scrap).await {}
    };
    let _ = timeout(LINGER, unread).await;
}

async fn answer<H: Handler>(
    server: &Server<H>,
    request: Request<Incoming>,
    link: &Arc<Link>,
    place: &Place,
) -> Result<Answer, Infallible> {
    let has_place = match link.refusal() {
        Some(refusal) => Err(text(refusal.status, refusal.why)),
        None => (server.requests.place(place).await).ok_or_else(|| busy("too many requests")),
    };
    match has_place {
        Ok(permit) => link.has(permit),
        Err(refused) => {
            let status = refused.status();
            server.handler.refused(request.method(), status);
            return Ok(closing(refused));
        }
    }
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    // Where a body in chunks ended, hyper alone knows: see `Stream`.
    let is_chunked = request.headers().contains_key(TRANSFER_ENCODING);
    let request = request.map(|body| RequestBody::new(body, link));
    let handled = AssertUnwindSafe(server.handler.handle(request)).catch_unwind();
    let mut answer = handled.await.unwrap_or_else(|_| {
        tracing::error!(
            request = format!("{method} {path}"),
            "the handler of a request panicked"
        );
        text(StatusCode::INTERNAL_SERVER_ERROR, "internal error")
    });
    let length = answer.body().size_hint().lower();
    if link.holds(&server.answers, length).is_err() {
        answer = busy("too many large answers wait for their clients");
    }
    place.works();
    // hyper looks for the end of what is left of a body, and then for the next request, though this answer may not be taken yet.
    let goes_on_too_soon = link.has_body_left() && length > SMALL_ANSWER;
    Ok(match is_chunked || goes_on_too_soon || place.ends() {
        true => closing(answer),
        false => answer,
    })
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
pub(crate) fn closing(mut answer: Answer) -> Answer {
    answer
        .headers_mut()
        .insert(CONNECTION, HeaderValue::from_static("close"));
    answer
}
