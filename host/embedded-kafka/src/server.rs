//! Connections: accepted within a bound, read request by request, answered in order.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::api::{self, BadRequest, Begun};
use crate::node::Node;

/// Bytes of one request, as Kafka's `socket.request.max.bytes`.
const MAX_REQUEST_BYTES: usize = 100 << 20;
/// KiB of all requests that are being read or worked on. One that does not fit waits.
const MAX_REQUESTS_KIB: usize = 512 << 10;
/// Bytes set aside at first for a request; more as it arrives.
const FIRST_READ: usize = 64 << 10;

/// Requests of a connection that are begun and not answered. Beyond it the connection is not read.
const MAX_IN_FLIGHT: usize = 16;

/// A connection that asks nothing for so long is closed, as Kafka's `connections.max.idle.ms`.
const MAX_IDLE: Duration = Duration::from_secs(10 * 60);
/// A request must be here, and an answer taken, within this time.
const MAX_TRANSFER: Duration = Duration::from_secs(30);
/// After an error of `accept` (no more file descriptors, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a connection is closed by the broker.
#[derive(Debug, thiserror::Error)]
enum Closed {
    #[error("a request of {0} bytes, where at most {MAX_REQUEST_BYTES} are taken")]
    TooLarge(i32),
    #[error("a request or an answer did not get through within {} s", MAX_TRANSFER.as_secs())]
    Slow,
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Request(#[from] api::BadRequest),
}

/// Bounds that all connections share.
#[derive(Clone)]
struct Limits {
    connections: Arc<Semaphore>,
    request_kib: Arc<Semaphore>,
}

/// An answer being worked on, and the room that its request takes.
struct InFlight {
    begun: Begun,
    room: OwnedSemaphorePermit,
}

/// Accepts connections until the node shuts down; each runs as a task of `tasks`.
pub(crate) async fn serve(node: Arc<Node>, listener: TcpListener, tasks: TaskTracker) {
    let limits = Limits {
        connections: Arc::new(Semaphore::new(node.config.max_connections)),
        request_kib: Arc::new(Semaphore::new(MAX_REQUESTS_KIB)),
    };
    loop {
        // Both are cancel-safe.
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = node.shutdown.cancelled() => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = limits.connections.clone().try_acquire_owned() else {
            warn!(%peer, limit = node.config.max_connections, "too many connections: closed the newest");
            continue;
        };
        let (node, limits, of_connection) = (node.clone(), limits.clone(), tasks.clone());
        tasks.spawn(async move {
            connection(&node, stream, peer, &limits, &of_connection).await;
            drop(permit);
        });
    }
}

async fn connection(
    node: &Arc<Node>,
    stream: TcpStream,
    peer: SocketAddr,
    limits: &Limits,
    tasks: &TaskTracker,
) {
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%peer, %error, "a connection was gone at once");
        return;
    }
    let (reader, writer) = stream.into_split();
    let (answers, to_write) = mpsc::channel(MAX_IN_FLIGHT);
    // Whichever ends first ends the other: a client that is gone needs no answer, one that takes none is not read.
    // At shutdown, what was written but not answered is sent again by the client.
    let end = tokio::select! {
        end = read_requests(node, reader, peer, &limits.request_kib, answers) => end,
        end = write_answers(writer, to_write, tasks) => end,
        () = node.shutdown.cancelled() => Ok(()),
    };
    match end {
        Ok(()) => {}
        Err(Closed::Io(error)) => debug!(%peer, %error, "a connection broke"),
        Err(reason) => warn!(%peer, "closed a connection: {reason}"),
    }
}

async fn read_requests(
    node: &Arc<Node>,
    mut reader: OwnedReadHalf,
    peer: SocketAddr,
    request_kib: &Arc<Semaphore>,
    answers: mpsc::Sender<InFlight>,
) -> Result<(), Closed> {
    loop {
        let mut length = [0; 4];
        match timeout(MAX_IDLE, reader.read_exact(&mut length)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => return Ok(()),
        }
        let length = i32::from_be_bytes(length);
        let Some(len) = usize::try_from(length)
            .ok()
            .filter(|len| *len <= MAX_REQUEST_BYTES)
        else {
            return Err(Closed::TooLarge(length));
        };
        let room = (len / 1024 + 1) as u32;
        let Ok(room) = request_kib.clone().acquire_many_owned(room).await else {
            return Ok(());
        };
        let request = timeout(MAX_TRANSFER, read_request(&mut reader, len))
            .await
            .map_err(|_| Closed::Slow)??;
        let begun = api::begin(node, peer, request).await?;
        if answers.send(InFlight { begun, room }).await.is_err() {
            return Ok(());
        }
    }
}

/// Reads `len` bytes, with memory for no more than has arrived, doubled.
async fn read_request(reader: &mut OwnedReadHalf, len: usize) -> std::io::Result<Bytes> {
    let mut request = BytesMut::with_capacity(len.min(FIRST_READ));
    while request.len() < len {
        if request.len() == request.capacity() {
            request.reserve(request.len().min(len - request.len()));
        }
        let missing = (len - request.len()) as u64;
        if (&mut *reader).take(missing).read_buf(&mut request).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(request.freeze())
}

/// Finishes the answers in the order of their requests.
async fn write_answers(
    mut writer: OwnedWriteHalf,
    mut answers: mpsc::Receiver<InFlight>,
    tasks: &TaskTracker,
) -> Result<(), Closed> {
    while let Some(InFlight { begun, room }) = answers.recv().await {
        let (answer, room) = if begun.must_finish {
            // It goes on when this connection ends, and keeps its room, which bounds how many do.
            let work = tasks.spawn(async move { (begun.answer.await, room) });
            work.await.map_err(|_| BadRequest::Panicked)?
        } else {
            (begun.answer.await, room)
        };
        if let Some(answer) = answer? {
            timeout(MAX_TRANSFER, writer.write_all(&answer))
                .await
                .map_err(|_| Closed::Slow)??;
        }
        drop(room);
    }
    // The reader is at its end too; it says why.
    std::future::pending().await
}
