//! HTTP as bytes on a socket, so that tests see just what a client sees.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// A connection of a client.
pub(crate) struct Client(TcpStream);

impl Client {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        Self(
            TcpStream::connect(address)
                .await
                .expect("the server accepts"),
        )
    }

    /// One that is connected already, and does not block.
    pub(crate) fn of(socket: std::net::TcpStream) -> Self {
        Self(TcpStream::from_std(socket).expect("a socket"))
    }

    /// One that takes little before it reads.
    pub(crate) async fn connect_small(address: SocketAddr) -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(4096).expect("a small buffer");
        Self(socket.connect(address).await.expect("the server accepts"))
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0
            .write_all(bytes.as_ref())
            .await
            .expect("the server reads");
    }

    /// Sends what the server may refuse to read.
    pub(crate) async fn try_send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.0.write_all(bytes.as_ref()).await;
    }

    /// One answer with a content-length.
    pub(crate) async fn answer(&mut self) -> String {
        let mut read = Vec::new();
        while !is_whole(&read) {
            let byte = self
                .0
                .read_u8()
                .await
                .expect("the server answers before it closes");
            read.push(byte);
        }
        without_date(&String::from_utf8(read).expect("answers are UTF-8"))
    }

    /// One byte, if there is one.
    pub(crate) async fn byte(&mut self) {
        let _ = self.0.read_u8().await;
    }

    /// Whether the server closes or resets, without an answer.
    pub(crate) async fn ended(&mut self) -> bool {
        self.0.read_u8().await.is_err()
    }

    /// Some bytes of an answer: how many.
    pub(crate) async fn some(&mut self) -> usize {
        let mut scrap = vec![0; 64 * 1024];
        self.0.read(&mut scrap).await.expect("there is more")
    }

    /// Bytes until the server closes or resets: how many.
    pub(crate) async fn some_rest(&mut self) -> usize {
        let mut scrap = vec![0; 64 * 1024];
        let mut all = 0;
        while let Ok(read @ 1..) = self.0.read(&mut scrap).await {
            all += read;
        }
        all
    }

    /// Waits until an answer begins to come in.
    pub(crate) async fn wait_for_byte(&mut self) {
        self.0.readable().await.expect("the server answers");
    }

    /// Everything until the server closes.
    pub(crate) async fn rest(&mut self) -> String {
        let mut read = Vec::new();
        self.0
            .read_to_end(&mut read)
            .await
            .expect("the server closes and does not reset");
        without_date(&String::from_utf8(read).expect("answers are UTF-8"))
    }
}

/// Sends a request and answers what comes back until the server closes.
pub(crate) async fn exchange(address: SocketAddr, request: &str) -> String {
    let mut client = Client::connect(address).await;
    client.try_send(request).await;
    client.rest().await
}

/// A request of lines, each to be ended as HTTP wants it, and a body.
pub(crate) fn request(head: &[&str], body: &str) -> String {
    let mut request = head.join("\r\n");
    request.push_str("\r\nhost: test\r\n");
    if !body.is_empty() {
        request.push_str(&format!("content-length: {}\r\n", body.len()));
    }
    request + "\r\n" + body
}

fn is_whole(read: &[u8]) -> bool {
    let text = String::from_utf8_lossy(read);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    body.len() >= length.map_or(0, |length| length.parse().expect("a number"))
}

/// The date is the one header that changes; line ends are for people.
fn without_date(answer: &str) -> String {
    let kept: Vec<&str> = answer
        .split("\r\n")
        .filter(|line| !line.starts_with("date: "))
        .collect();
    kept.join("\n")
}
