//! A proxy in front of PostgreSQL that notes what a client sends, and can cut its connections.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use host::pipeline::SqlUrl;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What a client's request for encryption carries in place of a version.
const SSL_REQUEST: u32 = 80_877_103;

/// Where a connection is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// The server does not get the COMMIT.
    BeforeCommit,
    /// The server gets it, and the client no answer.
    AfterCommit,
}

pub(super) struct Proxy {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// The types of messages, as one trip each.
    trips: Vec<String>,
    trip: String,
    cut: Option<Cut>,
}

impl Proxy {
    pub(super) async fn before(url: &SqlUrl) -> (Self, SqlUrl) {
        let SqlUrl::Postgres(url) = url else {
            panic!("not PostgreSQL");
        };
        let mut url = url::Url::parse(url).expect("a URL");
        let host = url.host_str().expect("a server on TCP").to_owned();
        let server = (host, url.port().unwrap_or(5432));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("its address");
        let state = Arc::<Mutex<State>>::default();
        tokio::spawn({
            let state = state.clone();
            async move {
                while let Ok((client, _)) = listener.accept().await {
                    let server = TcpStream::connect(server.clone()).await;
                    let server = server.expect("the server of DATABASE_URL");
                    client.set_nodelay(true).expect("a socket");
                    server.set_nodelay(true).expect("a socket");
                    tokio::spawn(serve(client, server, state.clone()));
                }
            }
        });
        url.set_host(Some("127.0.0.1")).expect("a URL with hosts");
        url.set_port(Some(address.port()))
            .expect("a URL with ports");
        (Self { address, state }, SqlUrl::Postgres(url.into()))
    }

    /// What was sent since this was last asked: each trip as the text of its command or the types of its messages.
    pub(super) fn take_trips(&self) -> Vec<String> {
        assert!(self.address.ip().is_loopback());
        std::mem::take(&mut self.state.lock().expect("no panic").trips)
    }

    /// Cuts the connection of the next COMMIT.
    pub(super) fn cut(&self, cut: Cut) {
        self.state.lock().expect("no panic").cut = Some(cut);
    }
}

async fn serve(client: TcpStream, server: TcpStream, state: Arc<Mutex<State>>) {
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let (silence, silenced) = watch::channel(false);
    let answers = tokio::spawn(answer(from_server, to_client, silenced));
    // An error is a side that has closed its connection.
    let _ = listen(from_client, to_server, &state, &silence).await;
    // A server that is to get a last COMMIT gets the time for it.
    if *silence.borrow() {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    answers.abort();
}

async fn answer(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, silenced: watch::Receiver<bool>) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if *silenced.borrow() {
            continue;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

/// Passes messages on, until the client leaves or is cut.
async fn listen(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    state: &Mutex<State>,
    silence: &watch::Sender<bool>,
) -> std::io::Result<()> {
    loop {
        let message = read(&mut from, Vec::new()).await?;
        to.write_all(&message).await?;
        let code = message.get(4..8).and_then(|code| code.try_into().ok());
        if code.map(u32::from_be_bytes) != Some(SSL_REQUEST) {
            break;
        }
    }
    loop {
        let kind = from.read_u8().await?;
        let message = read(&mut from, vec![kind]).await?;
        let cut = {
            let mut state = state.lock().expect("no panic");
            state.note(kind, &message[5..])
        };
        match cut {
            Some(Cut::BeforeCommit) => return Ok(()),
            Some(Cut::AfterCommit) => {
                silence.send_replace(true);
                to.write_all(&message).await?;
                return Ok(());
            }
            None => to.write_all(&message).await?,
        }
    }
}

/// A message from its length on.
async fn read(from: &mut OwnedReadHalf, mut message: Vec<u8>) -> std::io::Result<Vec<u8>> {
    let length = from.read_u32().await?;
    message.extend(length.to_be_bytes());
    let start = message.len();
    message.resize(start + length as usize - 4, 0);
    from.read_exact(&mut message[start..]).await?;
    Ok(message)
}

impl State {
    fn note(&mut self, kind: u8, body: &[u8]) -> Option<Cut> {
        match kind {
            b'Q' => {
                let text = String::from_utf8_lossy(body)
                    .trim_end_matches('\0')
                    .to_owned();
                let cut = self.cut.take_if(|_| text == "COMMIT");
                self.trips.push(text);
                cut
            }
            // Sync ends a trip.
            b'S' => {
                let trip = std::mem::take(&mut self.trip);
                self.trips.push(format!("{trip}S"));
                None
            }
            other => {
                self.trip.push(char::from(other));
                None
            }
        }
    }
}
