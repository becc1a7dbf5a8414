//! The network between the hosts and a server: a loopback TCP proxy that can be cut or frozen.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::watch;

/// How long the port may take to be there, or to be gone.
const LISTEN_PATIENCE: Duration = Duration::from_secs(20);
const ASK_INTERVAL: Duration = Duration::from_millis(10);
const CHUNK: usize = 16 << 10;
/// How long a slow network takes, one way.
const DELAY: Duration = Duration::from_millis(150);

/// What the network does with what it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    /// It passes it on.
    Open,
    /// It keeps it, as a network that loses packets for a while does: connections are there, and
    /// nothing arrives before it is open again.
    Frozen,
    /// It passes on what comes after a while, each time.
    Slow,
    /// Connections break, on both sides, and new ones are refused.
    Cut,
}

impl Link {
    fn passes(self) -> bool {
        matches!(self, Self::Open | Self::Slow)
    }
}

/// A way to a server.
pub(crate) struct Proxy {
    port: u16,
    link: watch::Sender<Link>,
}

impl Proxy {
    /// Listens on the loopback port and passes on to another.
    pub(crate) fn start(runtime: &Handle, port: u16, to: u16) -> Self {
        let (link, changes) = watch::channel(Link::Open);
        runtime.spawn(serve(port, to, changes));
        let proxy = Self { port, link };
        proxy.wait_listening(true);
        proxy
    }

    /// Changes what becomes of connections; when this returns, it has begun.
    pub(crate) fn set(&self, link: Link) {
        self.link.send_replace(link);
        self.wait_listening(link != Link::Cut);
    }

    fn wait_listening(&self, wanted: bool) {
        let deadline = Instant::now() + LISTEN_PATIENCE;
        let listens = || std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_ok();
        while listens() != wanted {
            assert!(
                Instant::now() < deadline,
                "the proxy on {} hangs",
                self.port
            );
            std::thread::sleep(ASK_INTERVAL);
        }
    }
}

async fn serve(port: u16, to: u16, mut link: watch::Receiver<Link>) {
    // Ends with the proxy, which has the sender.
    while link.wait_for(|l| *l != Link::Cut).await.is_ok() {
        let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await else {
            tokio::time::sleep(ASK_INTERVAL).await;
            continue;
        };
        let mut cut = link.clone();
        loop {
            // Both are cancel-safe.
            tokio::select! {
                _ = cut.wait_for(|l| *l == Link::Cut) => break,
                accepted = listener.accept() => if let Ok((client, _)) = accepted {
                    tokio::spawn(carry(client, to, link.clone()));
                },
            }
        }
    }
}

/// One connection: when either side ends or the link is cut, both streams are dropped.
async fn carry(client: TcpStream, to: u16, mut link: watch::Receiver<Link>) {
    let passed = link.clone();
    tokio::select! {
        () = pass_on(client, to, passed) => {}
        _ = link.wait_for(|l| *l == Link::Cut) => {}
    }
}

async fn pass_on(client: TcpStream, to: u16, mut link: watch::Receiver<Link>) {
    let _ = link.wait_for(|l| l.passes()).await;
    let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, to)).await else {
        return;
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::select! {
        () = pump(from_client, to_server, link.clone()) => {}
        () = pump(from_server, to_client, link) => {}
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut link: watch::Receiver<Link>) {
    let mut bytes = vec![0; CHUNK];
    while let Ok(n @ 1..) = from.read(&mut bytes).await {
        let Ok(passed) = link.wait_for(|l| l.passes()).await.map(|l| *l) else {
            return;
        };
        if passed == Link::Slow {
            tokio::time::sleep(DELAY).await;
        }
        if to.write_all(&bytes[..n]).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::TcpStream;

    use super::*;
    use crate::servers::Ports;

    const A_WHILE: Duration = Duration::from_millis(300);
    const LONG: Duration = Duration::from_secs(20);

    /// A server that answers every byte with the same.
    fn echo() -> u16 {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let port = listener.local_addr().expect("an address").port();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
            }
        });
        port
    }

    fn ask(stream: &mut TcpStream, patience: Duration) -> std::io::Result<u8> {
        stream.set_read_timeout(Some(patience))?;
        let mut answer = [0];
        stream.read_exact(&mut answer)?;
        Ok(answer[0])
    }

    #[test]
    fn a_link_passes_on_keeps_or_breaks() {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let port = Ports::default().free();
        let proxy = Proxy::start(runtime.handle(), port, echo());
        let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, port));
        let mut stream = connect().expect("connected");
        stream.write_all(b"1").expect("sent");
        assert_eq!(ask(&mut stream, LONG).expect("an answer"), b'1');
        proxy.set(Link::Frozen);
        stream.write_all(b"2").expect("sent");
        let mut second = connect().expect("connected, as far as one can see");
        second.write_all(b"3").expect("sent");
        let nothing = ask(&mut stream, A_WHILE).expect_err("no answer").kind();
        assert!(matches!(
            nothing,
            ErrorKind::WouldBlock | ErrorKind::TimedOut
        ));
        proxy.set(Link::Open);
        assert_eq!(ask(&mut stream, LONG).expect("an answer"), b'2');
        assert_eq!(ask(&mut second, LONG).expect("an answer"), b'3');
        proxy.set(Link::Slow);
        let asked = Instant::now();
        stream.write_all(b"5").expect("sent");
        assert_eq!(ask(&mut stream, LONG).expect("an answer"), b'5');
        assert!(asked.elapsed() >= 2 * DELAY);
        proxy.set(Link::Cut);
        assert!(ask(&mut stream, LONG).is_err(), "the connection broke");
        assert_eq!(
            connect().expect_err("refused").kind(),
            ErrorKind::ConnectionRefused
        );
        proxy.set(Link::Open);
        let mut stream = connect().expect("connected");
        stream.write_all(b"4").expect("sent");
        assert_eq!(ask(&mut stream, LONG).expect("an answer"), b'4');
    }
}
