//! Bodies of requests, as they arrive: their size, their room in memory, and their pace.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::StatusCode;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Instant, timeout_at};

use super::room::{Hold, NoRoom, Room};
use super::stream::Link;
use super::{Answer, Limits, busy, closing, text};

/// Bodies of the largest size for which there is room in any case.
const MIN_BODIES: usize = 4;
/// Bytes that a body brings in each `body_window`, at least.
const MIN_PACE: usize = 4 * 1024;
/// Bytes of a body for each of the pieces that it comes in, on average, beyond the first ones.
const MIN_PIECE: usize = 16;
/// Pieces that may be as small as they like.
const SMALL_PIECES: usize = 4096;

/// The body of a request. Its connection is told if it is let go of before its end.
pub(crate) struct RequestBody {
    incoming: Incoming,
    link: Arc<Link>,
}

impl RequestBody {
    pub(super) fn new(incoming: Incoming, link: &Arc<Link>) -> Self {
        let link = Arc::clone(link);
        Self { incoming, link }
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if !self.incoming.is_end_stream() {
            self.link.leaves_a_body();
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.incoming).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

/// Reads the bodies of a server's requests.
pub(crate) struct Bodies {
    room: Arc<Room>,
    /// Bytes of one body.
    max: usize,
    timeout: Duration,
    window: Duration,
}

/// A body, which keeps its room.
pub(crate) struct HeldBody {
    pub(crate) bytes: Vec<u8>,
    pub(crate) hold: Hold,
}

impl Bodies {
    /// For bodies of `max` bytes at most.
    pub(crate) fn new(max: usize, limits: &Limits) -> Self {
        let all = limits.body_bytes.max(MIN_BODIES.saturating_mul(max));
        Self {
            room: Arc::new(Room::new(all, limits.own_bytes)),
            max,
            timeout: limits.body_timeout,
            window: limits.body_window,
        }
    }

    /// The whole body, or the answer that says why not: 413 above `max` bytes, 503 without room, 408, 400.
    pub(crate) async fn read(&self, mut body: RequestBody) -> Result<HeldBody, Answer> {
        let size = body.size_hint();
        if size.lower() > self.max as u64 {
            return Err(self.too_large());
        }
        let announced = size.upper().and_then(|size| usize::try_from(size).ok());
        let most = announced.map_or(self.max, |size| size.min(self.max));
        let mut held = HeldBody {
            bytes: Vec::new(),
            hold: self.room.hold(Arc::default()),
        };
        let mut pace = Pace::new(self.timeout, self.window);
        let mut pieces = 0;
        while let Some(frame) = pace.next(&mut body, &held.hold).await? {
            // Trailers are none of the body's bytes.
            let Ok(piece) = frame.into_data() else {
                continue;
            };
            pieces += 1;
            if held.bytes.len() + piece.len() > self.max {
                return Err(self.too_large());
            }
            if pieces > SMALL_PIECES + held.bytes.len() / MIN_PIECE {
                let line = "the body comes in too small pieces";
                return Err(closing(text(StatusCode::BAD_REQUEST, line)));
            }
            held.append(&piece, most).map_err(no_room)?;
            pace.brought(piece.len());
        }
        held.hold.arrived().map_err(no_room)?;
        Ok(held)
    }

    fn too_large(&self) -> Answer {
        let line = format!("the body is larger than {} bytes", self.max);
        closing(text(StatusCode::PAYLOAD_TOO_LARGE, line))
    }
}

impl HeldBody {
    /// Copies: a piece may be one byte of a buffer of thousands, which it would keep.
    fn append(&mut self, piece: &Bytes, most: usize) -> Result<(), NoRoom> {
        let needed = self.bytes.len() + piece.len();
        if needed > self.bytes.capacity() {
            let doubled = (2 * self.bytes.capacity()).min(most);
            let capacity = doubled.max(needed);
            self.hold.resize(capacity)?;
            self.bytes.reserve_exact(capacity - self.bytes.len());
        }
        self.bytes.extend_from_slice(piece);
        Ok(())
    }
}

fn no_room(_: NoRoom) -> Answer {
    closing(busy("too many requests send their bodies"))
}

/// When a body is too slow.
struct Pace {
    /// When all of it must be there.
    end: Instant,
    window: Duration,
    window_end: Instant,
    /// Bytes that came in the window.
    brought: usize,
}

impl Pace {
    fn new(timeout: Duration, window: Duration) -> Self {
        let now = Instant::now();
        Self {
            end: now + timeout,
            window,
            window_end: now + window,
            brought: 0,
        }
    }

    /// The body's next piece.
    async fn next(
        &mut self,
        body: &mut RequestBody,
        hold: &Hold,
    ) -> Result<Option<Frame<Bytes>>, Answer> {
        loop {
            let until = self.end.min(self.window_end);
            // All are cancel-safe: a frame is answered or not taken.
            let next = tokio::select! {
                biased;
                next = timeout_at(until, body.frame()) => next,
                () = hold.gives_way() => return Err(no_room(NoRoom)),
            };
            match next {
                Ok(None) => return Ok(None),
                Ok(Some(Ok(frame))) => return Ok(Some(frame)),
                Ok(Some(Err(error))) => return Err(unreadable(&error)),
                Err(_) if until == self.end => return Err(slow("the body took too long")),
                Err(_) if self.brought < MIN_PACE => {
                    return Err(slow("the body came too slowly"));
                }
                Err(_) => {
                    self.brought = 0;
                    self.window_end += self.window;
                }
            }
        }
    }

    fn brought(&mut self, bytes: usize) {
        self.brought += bytes;
    }
}

fn slow(line: &'static str) -> Answer {
    closing(text(StatusCode::REQUEST_TIMEOUT, line))
}

fn unreadable(error: &hyper::Error) -> Answer {
    let cause = std::error::Error::source(error);
    let why = cause.map_or_else(|| error.to_string(), ToString::to_string);
    let line = format!("the body could not be read: {why}");
    closing(text(StatusCode::BAD_REQUEST, line))
}
