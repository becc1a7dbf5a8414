//! The socket of a connection, as hyper sees it: heads come whole and checked, and a client that takes nothing is let go.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use hyper::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::{Instant, Sleep, sleep};

use super::head::{Framing, Refusal, Scanner, check};
use super::places::Place;
use super::room::{Hold, NoRoom, Room};

/// Bytes of a request's head.
pub(super) const MAX_HEAD: usize = 64 * 1024;
/// Bytes that a client takes of its answer in each `write_timeout`, at least.
const MIN_TAKEN: usize = 64 * 1024;
/// What hyper reads in place of a head that is refused. It is answered by what [`Link::refusal`] says.
const STAND_IN: &[u8] = b"REFUSED / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";

pub(super) struct Stream {
    socket: TcpStream,
    /// What was read beyond what hyper may have.
    held: BytesMut,
    scanner: Scanner,
    /// Bytes up to the end of a message, or of all, that hyper may have.
    cleared: u64,
    link: Arc<Link>,
    place: Arc<Place>,
    writing: WriteClock,
}

/// What those who answer a connection's requests and its stream tell each other.
#[derive(Debug, Default)]
pub(super) struct Link {
    /// Why a head was refused. It is set before hyper sees the request that stands in for it.
    refusal: OnceLock<Refusal>,
    request: Mutex<Held>,
    /// Whether it holds anything.
    is_held: AtomicBool,
    /// Whether a body was not read to its end.
    body_left: AtomicBool,
    gives_way: Arc<Notify>,
}

/// What a request holds until the client has taken its answer.
#[derive(Debug, Default)]
struct Held {
    place: Option<OwnedSemaphorePermit>,
    /// Room for the answer.
    room: Option<Hold>,
}

impl Link {
    pub(super) fn refusal(&self) -> Option<&Refusal> {
        self.refusal.get()
    }

    /// There is a place for the request.
    pub(super) fn has(&self, place: OwnedSemaphorePermit) {
        self.request().place = Some(place);
        self.is_held.store(true, Ordering::Relaxed);
    }

    /// The client is to take an answer of so many bytes.
    pub(super) fn holds(&self, room: &Arc<Room>, bytes: u64) -> Result<(), NoRoom> {
        let bytes = usize::try_from(bytes).map_err(|_| NoRoom)?;
        if !room.is_needed(bytes) {
            return Ok(());
        }
        let mut hold = room.hold(Arc::clone(&self.gives_way));
        hold.resize(bytes)?;
        self.request().room = Some(hold);
        Ok(())
    }

    /// Until the room of an answer is given to another. Cancel-safe: the news is kept.
    pub(super) async fn gives_way(&self) {
        self.gives_way.notified().await;
    }

    /// Whether there is an answer that holds room: the news that it is given to another may be of one that was taken meanwhile.
    pub(super) fn holds_an_answer(&self) -> bool {
        self.request().room.is_some()
    }

    /// A body is let go of before its end.
    pub(super) fn leaves_a_body(&self) {
        self.body_left.store(true, Ordering::Relaxed);
    }

    pub(super) fn has_body_left(&self) -> bool {
        self.body_left.load(Ordering::Relaxed)
    }

    /// The client has taken its answer, or takes no more of it.
    pub(super) fn taken(&self) {
        // Looked at whenever a head is waited for.
        if self.is_held.swap(false, Ordering::Relaxed) {
            *self.request() = Held::default();
        }
        self.body_left.store(false, Ordering::Relaxed);
    }

    fn request(&self) -> MutexGuard<'_, Held> {
        self.request.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What came of the wait for a head.
enum Head {
    /// The client sends nothing more.
    Ended,
    /// It is held.
    Held,
    /// Hyper has it, and what came of its body.
    Given,
}

/// How many bytes of the body are to come where these are a whole head, that is not refused, and nothing of a next message: most
/// requests come so, and need not be held.
fn alone(bytes: &[u8]) -> Option<u64> {
    if bytes.starts_with(b"\r\n") {
        return None;
    }
    let length = Scanner::default().find(bytes).ok()??;
    let head = bytes.get(..length).filter(|_| length <= MAX_HEAD)?;
    match check(head).ok()? {
        Framing::Length(body) => (length as u64 + body).checked_sub(bytes.len() as u64),
        Framing::Chunked => None,
    }
}

impl Stream {
    pub(super) fn new(socket: TcpStream, place: Arc<Place>, write_timeout: Duration) -> Self {
        Self {
            socket,
            held: BytesMut::new(),
            scanner: Scanner::default(),
            cleared: 0,
            link: Arc::default(),
            place,
            writing: WriteClock::new(write_timeout),
        }
    }

    pub(super) fn link(&self) -> Arc<Link> {
        Arc::clone(&self.link)
    }

    pub(super) fn into_socket(self) -> TcpStream {
        self.socket
    }

    /// Reads until there is a whole head.
    fn poll_head(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<Head>> {
        self.writing.rest();
        self.link.taken();
        if self.link.refusal().is_some() {
            return Poll::Ready(Ok(Head::Ended));
        }
        loop {
            // A client may end what it sends with an empty line that belongs to nothing.
            while self.held.starts_with(b"\r\n") {
                self.held.advance(2);
                self.scanner = Scanner::default();
            }
            match self.whole_head() {
                Ok(None) => {}
                Ok(Some(cleared)) => {
                    self.cleared = cleared;
                    break;
                }
                Err(refusal) => {
                    let _ = self.link.refusal.set(refusal);
                    self.held = STAND_IN.into();
                    self.cleared = STAND_IN.len() as u64;
                    break;
                }
            }
            let before = buf.filled().len();
            let read = Pin::new(&mut self.socket).poll_read(cx, buf);
            if read.is_pending() {
                self.place.waits();
            }
            ready!(read)?;
            let read = &buf.filled()[before..];
            if read.is_empty() {
                return Poll::Ready(Ok(Head::Ended));
            }
            if self.held.is_empty()
                && let Some(left) = alone(read)
            {
                self.cleared = left;
                return Poll::Ready(Ok(self.begin(Head::Given)));
            }
            self.held.extend_from_slice(read);
            buf.set_filled(before);
        }
        Poll::Ready(Ok(self.begin(Head::Held)))
    }

    fn begin(&mut self, head: Head) -> Head {
        self.scanner = Scanner::default();
        self.place.works();
        head
    }

    /// How many bytes hyper may have, if a whole head is held.
    fn whole_head(&mut self) -> Result<Option<u64>, Refusal> {
        let found = self.scanner.find(&self.held)?;
        if found.unwrap_or(self.held.len()) > MAX_HEAD {
            return Err(Refusal {
                status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                why: "the head is too large",
            });
        }
        let Some(length) = found else {
            return Ok(None);
        };
        Ok(Some(match check(&self.held[..length])? {
            Framing::Length(body) => length as u64 + body,
            // To follow chunks would be to parse them twice, and perhaps to see other ends than hyper: all that comes is
            // its, and the connection ends with the answer.
            Framing::Chunked => u64::MAX,
        }))
    }

    /// Hands over what is cleared.
    fn poll_cleared(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let most = usize::try_from(self.cleared).unwrap_or(usize::MAX);
        let given = if self.held.is_empty() {
            let before = buf.filled().len();
            let read = Pin::new(&mut self.socket).poll_read(cx, buf);
            match read.is_pending() {
                true => self.place.transfers(),
                false => self.place.moved(),
            }
            ready!(read)?;
            let read = buf.filled().len() - before;
            if read > most {
                // The next request has come behind this one.
                self.held.extend_from_slice(&buf.filled()[before + most..]);
                buf.set_filled(before + most);
            }
            read.min(most)
        } else {
            let given = self.held.len().min(most).min(buf.remaining());
            buf.put_slice(&self.held[..given]);
            self.held.advance(given);
            if self.held.is_empty() {
                // A connection that idles needs no memory for it.
                self.held = BytesMut::new();
            }
            given
        };
        if self.cleared != u64::MAX {
            self.cleared -= given as u64;
            if self.cleared == 0 {
                self.place.works();
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.cleared == 0 {
            match ready!(this.poll_head(cx, buf))? {
                Head::Ended | Head::Given => return Poll::Ready(Ok(())),
                Head::Held => {}
            }
        }
        this.poll_cleared(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.socket).poll_write(cx, buf);
        this.wrote(cx, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.socket).poll_write_vectored(cx, bufs);
        this.wrote(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_shutdown(cx)
    }
}

impl Stream {
    fn wrote(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match written {
            Poll::Pending => {
                self.place.transfers();
                self.writing.blocked(cx)?;
            }
            Poll::Ready(Ok(count)) => {
                self.place.moved();
                self.writing.took(count);
            }
            Poll::Ready(Err(_)) => {}
        }
        written
    }
}

/// Sees to it that a client goes on taking its answer. One that takes a byte now and then would hold it, and its
/// connection, for ever.
struct WriteClock {
    window: Duration,
    /// The end of the window, once the client has let us wait.
    end: Option<Pin<Box<Sleep>>>,
    /// Bytes taken in the window.
    taken: usize,
}

impl WriteClock {
    fn new(window: Duration) -> Self {
        Self {
            window,
            end: None,
            taken: 0,
        }
    }

    fn blocked(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let window = self.window;
        let end = self.end.get_or_insert_with(|| {
            self.taken = 0;
            Box::pin(sleep(window))
        });
        while end.as_mut().poll(cx).is_ready() {
            if self.taken < MIN_TAKEN {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.taken = 0;
            end.as_mut().reset(Instant::now() + window);
        }
        Ok(())
    }

    fn took(&mut self, count: usize) {
        if self.end.is_some() {
            self.taken += count;
        }
    }

    /// The answer is taken.
    fn rest(&mut self) {
        self.end = None;
    }
}
