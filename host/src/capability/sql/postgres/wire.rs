//! PostgreSQL's messages on a stream, none larger than a limit.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, BytesMut};
use postgres_protocol::message::backend::{Header, Message};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

/// What is read at once.
const READ_BYTES: usize = 64 * 1024;
/// A buffer that has grown beyond it is given up when it is empty.
const MAX_KEPT_BYTES: usize = 1024 * 1024;

/// A connection of whatever kind.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Stream for T {}

/// A connection that is read as soon as somebody asks, though nothing was said to have come: near servers have often answered by
/// then, and to wait for the system to say so costs a third of a short statement. tokio's own does not try where the read before
/// took all that there was.
pub(super) struct Eager(pub(super) TcpStream);

impl AsyncRead for Eager {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        room: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read_buf(room) {
                // It was not ready after all, which is noted: so this ends.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(drop)),
            }
        }
    }
}

impl AsyncWrite for Eager {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// What the server says next.
pub(super) enum Incoming {
    Message(Message),
    /// A message of so many bytes, more than the limit. It was thrown away as it came.
    TooLarge(usize),
}

/// A stream of messages both ways.
pub(super) struct Wire {
    stream: Box<dyn Stream>,
    input: BytesMut,
    /// What [`Wire::flush`] sends.
    pub(super) output: BytesMut,
    /// Bytes of the largest message that is taken into memory.
    pub(super) limit: usize,
    /// Bytes of the largest message that is read at all.
    pub(super) patience: usize,
}

impl Wire {
    pub(super) fn new(stream: Box<dyn Stream>, limit: usize, patience: usize) -> Self {
        Self {
            stream,
            input: BytesMut::with_capacity(READ_BYTES),
            output: BytesMut::new(),
            limit,
            patience,
        }
    }

    pub(super) async fn flush(&mut self) -> io::Result<()> {
        self.stream.write_all_buf(&mut self.output).await?;
        if self.output.capacity() > MAX_KEPT_BYTES {
            self.output = BytesMut::new();
        }
        self.stream.flush().await
    }

    /// The next message. Its length is looked at before its bytes are read, since whoever wrote the statement decides on it.
    /// Dropped, it has lost nothing but the place in a message that is too large.
    pub(super) async fn next(&mut self) -> io::Result<Incoming> {
        loop {
            let missing = match Header::parse(&self.input)? {
                None => READ_BYTES,
                Some(header) => {
                    let length = 1 + usize::try_from(header.len()).unwrap_or_default();
                    if length > self.limit {
                        self.skip(length).await?;
                        return Ok(Incoming::TooLarge(length));
                    }
                    match length.checked_sub(self.input.len()) {
                        None | Some(0) => return self.parse(),
                        Some(missing) => missing.max(READ_BYTES),
                    }
                }
            };
            self.input.reserve(missing);
            self.read().await?;
        }
    }

    fn parse(&mut self) -> io::Result<Incoming> {
        let message = Message::parse(&mut self.input)?;
        if self.input.is_empty() && self.input.capacity() > MAX_KEPT_BYTES {
            self.input = BytesMut::with_capacity(READ_BYTES);
        }
        message.map(Incoming::Message).ok_or_else(ended)
    }

    async fn read(&mut self) -> io::Result<()> {
        // An encrypted stream clears all the room that it is given, for each of its small records.
        let mut room = (&mut self.input).limit(READ_BYTES);
        match self.stream.read_buf(&mut room).await? {
            0 => Err(ended()),
            _ => Ok(()),
        }
    }

    async fn skip(&mut self, length: usize) -> io::Result<()> {
        if length > self.patience {
            let why = format!("a message of {length} bytes was announced");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
        }
        let mut left = length;
        loop {
            let here = left.min(self.input.len());
            self.input.advance(here);
            left -= here;
            if left == 0 {
                return Ok(());
            }
            self.input.reserve(READ_BYTES);
            self.read().await?;
        }
    }

    /// Whether nothing is half read or half written.
    pub(super) fn is_empty(&self) -> bool {
        self.input.is_empty() && self.output.is_empty()
    }

    /// Says farewell to the server.
    pub(super) async fn close(mut self) {
        postgres_protocol::message::frontend::terminate(&mut self.output);
        // Who does not take it closes the connection anyway.
        let _ = self.flush().await;
        let _ = self.stream.shutdown().await;
    }
}

fn ended() -> io::Error {
    let why = "the server closed the connection";
    io::Error::new(io::ErrorKind::UnexpectedEof, why)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    const LIMIT: usize = 100;
    const PATIENCE: usize = 4_000_000;

    fn message(kind: u8, length: usize) -> Vec<u8> {
        let mut message = vec![kind];
        let body = length - 1;
        message.extend(u32::try_from(body).expect("a length").to_be_bytes());
        message.resize(length, 0);
        message
    }

    #[tokio::test]
    async fn large_messages_are_not_taken_into_memory() {
        let (here, mut there) = tokio::io::duplex(64);
        let mut wire = Wire::new(Box::new(here), LIMIT, PATIENCE);
        tokio::spawn(async move {
            for (kind, length) in [(b'd', LIMIT), (b'd', PATIENCE), (b'n', 5)] {
                there
                    .write_all(&message(kind, length))
                    .await
                    .expect("a reader");
            }
            there.write_all(&message(b'd', PATIENCE + 1)).await.ok();
        });
        let whole = wire.next().await.expect("a message");
        assert!(matches!(whole, Incoming::Message(Message::CopyData(_))));
        let large = wire.next().await.expect("a message");
        assert!(matches!(large, Incoming::TooLarge(PATIENCE)));
        let next = wire.next().await.expect("a message");
        assert!(matches!(next, Incoming::Message(Message::NoData)));
        assert!(wire.input.capacity() < PATIENCE / 10);
        assert!(wire.next().await.is_err(), "it is not even read");
    }
}
