//! The connection to a Redis server, which everybody shares: made when it is needed, and made anew once an answer shows that it
//! is of no use, whatever the answer is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ConnectionAddr, RedisError, Value, cmd, pipe};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tracing::{debug, warn};

use super::answers::{CAN_NOT_SAVE, CLUSTER, Refusal};
use super::{Concern, Error};
use crate::capability::tls::speaks_tls;

/// How long making a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// And asking whether it is Redis who answers.
const MAKE_TIMEOUT: Duration = CONNECT_TIMEOUT.saturating_mul(2);
/// How long the server may take to answer a command.
pub(super) const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a call may wait for a connection that is being made again, and a rehearsal may take. Each answer has its own time.
const RENEW_TIMEOUT: Duration = Duration::from_secs(12);
/// How long it may take to find out what an address speaks that could not be spoken to.
const DIAGNOSIS_TIMEOUT: Duration = Duration::from_secs(1);
/// How much of it the address may take to answer a question that is not in TLS.
const PLAIN_ANSWER_TIMEOUT: Duration = Duration::from_millis(400);
/// Bytes of such an answer that are read, and shown.
const PLAIN_ANSWER_BYTES: u64 = 256;
/// Commands that may wait to be written; more wait for their turn.
const PIPELINE_BUFFER: usize = 512;

/// Clones share it.
#[derive(Clone)]
pub(super) struct Connection(Arc<Inner>);

struct Inner {
    client: Client,
    config: AsyncConnectionConfig,
    current: Mutex<Current>,
    /// Whoever holds it makes a connection; the others wait for what comes of it.
    making: tokio::sync::Mutex<Option<Unmade>>,
    /// Connections that were to be made so far.
    tries: AtomicU64,
    /// Held while something is rehearsed, which takes one more connection.
    rehearsing: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Current {
    connection: Option<MultiplexedConnection>,
    /// Of the connection, so that who had an earlier one does not give up this one.
    number: u64,
}

impl Connection {
    pub(super) fn new(client: Client) -> Self {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(RESPONSE_TIMEOUT))
            .set_pipeline_buffer_size(PIPELINE_BUFFER);
        Self(Arc::new(Inner {
            client,
            config,
            current: Mutex::default(),
            making: tokio::sync::Mutex::default(),
            tries: AtomicU64::new(0),
            rehearsing: tokio::sync::Mutex::default(),
        }))
    }

    /// Asks the server for something, on the connection that there is or on a new one.
    pub(super) async fn ask<T>(
        &self,
        call: impl AsyncFnOnce(&mut MultiplexedConnection) -> Result<T, RedisError>,
    ) -> Result<T, Refusal> {
        let (mut connection, number) = self.0.take().await?;
        // The client gives each command its time: another timer around them costs as much as it does to send one.
        call(&mut connection).await.map_err(|error| {
            let refusal = Refusal::of(error);
            self.note(number, &refusal);
            refusal
        })
    }

    /// Sees whether these commands could be run, each a name and its arguments, without running them. It is asked on a connection
    /// of its own, since others' commands must not become part of it. A server that can't be asked so refuses as a message's own
    /// affair.
    pub(super) async fn rehearse(&self, commands: &[Vec<Vec<u8>>]) -> Result<(), Refusal> {
        let asked = async {
            let _rehearsing = self.0.rehearsing.lock().await;
            let mut connection = self.0.make().await?;
            rehearse(&mut connection, commands).await
        };
        let asked = tokio::time::timeout(RENEW_TIMEOUT, asked).await;
        asked.unwrap_or_else(|_| Err(Unmade::from(too_late(RENEW_TIMEOUT)).into()))
    }

    /// Whether the server is one that the host can use; asked once.
    pub(super) async fn check(&self) -> Result<(), Error> {
        let mode = self.ask(async |connection| cmd("HELLO").query_async(connection).await);
        // A server that is older, or does not let its user ask, shows later what it is.
        match mode.await.as_ref().ok().and_then(mode_of) {
            Some("cluster") => Err(Error::Server(CLUSTER.to_owned())),
            Some("sentinel") => Err(Error::Server(
                "it is a Redis Sentinel, which has no data: write the address of the server"
                    .to_owned(),
            )),
            _ => Ok(()),
        }
    }

    /// Says so where no script may be run, which most sets and deletes are. Routes that only read need none.
    pub(super) async fn look_for_scripts(&self, place: &str) {
        let none = "0".repeat(40);
        let run = self.ask(async |connection| {
            let run = cmd("EVALSHA").arg(&none).arg(0).to_owned();
            run.exec_async(connection).await
        });
        if let Err(Refusal {
            concern: Concern::Standing,
            error,
            ..
        }) = run.await
        {
            warn!(
                "{place}: its user may run no scripts, so stages' deletes, and sets with a version or a condition, will be \
                 denied: give it EVALSHA, EVAL and SCRIPT LOAD ({error})"
            );
        }
    }

    /// Lets the connection go if it is of no use any more.
    fn note(&self, number: u64, refusal: &Refusal) {
        if refusal.ends_connection {
            self.0.give_up(number);
        } else if refusal.is_late {
            // A server that hangs has it back in order once it goes on. But the address may lead to another one by now.
            let inner = self.0.clone();
            tokio::spawn(async move { inner.replace(number).await });
        }
    }
}

impl Inner {
    async fn take(&self) -> Result<(MultiplexedConnection, u64), Refusal> {
        match self.there() {
            Some(there) => Ok(there),
            // What is seldom done is in a box: a call's future is moved with all that it may come to.
            None => {
                let renewed = tokio::time::timeout(RENEW_TIMEOUT, Box::pin(self.renew()));
                renewed
                    .await
                    .unwrap_or_else(|_| Err(Unmade::from(too_late(RENEW_TIMEOUT)).into()))
            }
        }
    }

    /// Makes a connection, or waits for who does, and shares what comes of it.
    async fn renew(&self) -> Result<(MultiplexedConnection, u64), Refusal> {
        let tries = self.tries.load(Ordering::Acquire);
        let mut failed = self.making.lock().await;
        if let Some(there) = self.there() {
            return Ok(there);
        }
        if self.tries.load(Ordering::Acquire) != tries
            && let Some(why) = failed.clone()
        {
            return Err(why.into());
        }
        self.tries.fetch_add(1, Ordering::AcqRel);
        // Who is dropped half-way has nothing to share.
        *failed = None;
        match self.make().await {
            Ok(made) => Ok(self.keep(made)),
            Err(why) => {
                *failed = Some(why.clone());
                Err(why.into())
            }
        }
    }

    fn there(&self) -> Option<(MultiplexedConnection, u64)> {
        let current = self.current();
        Some((current.connection.clone()?, current.number))
    }

    fn keep(&self, connection: MultiplexedConnection) -> (MultiplexedConnection, u64) {
        let mut current = self.current();
        current.number += 1;
        current.connection = Some(connection.clone());
        (connection, current.number)
    }

    fn give_up(&self, number: u64) {
        let mut current = self.current();
        if current.number == number {
            current.connection = None;
        }
    }

    /// Makes another connection, and gives up the one of that number if that succeeds.
    async fn replace(&self, number: u64) {
        let Ok(_making) = self.making.try_lock() else {
            return;
        };
        if self.current().number != number {
            return;
        }
        match self.make().await {
            Ok(made) if self.current().number == number => {
                self.keep(made);
            }
            Ok(_) => {}
            Err(Unmade { why, .. }) => debug!("no other connection to Redis: {why}"),
        }
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects, logs in, and sees that it is Redis who answers.
    async fn make(&self) -> Result<MultiplexedConnection, Unmade> {
        let client = &self.client;
        let made = tokio::time::timeout(MAKE_TIMEOUT, async {
            let made = client.get_multiplexed_async_connection_with_config(&self.config);
            let mut made = made.await?;
            let is_redis = ping(&mut made).await?;
            Ok::<_, RedisError>((made, is_redis))
        });
        let error = match made.await {
            Ok(Ok((made, true))) => return Ok(made),
            Ok(Ok(_)) => return Err("what answers there is not Redis".to_owned().into()),
            Ok(Err(error)) => error,
            Err(_) => return Err(too_late(MAKE_TIMEOUT).into()),
        };
        // One that was answered says itself why.
        let says_why = error.is_connection_refusal() || error.code().is_some();
        let refusal = Refusal::of(error);
        let mut unmade = Unmade::from(words(refusal.error));
        unmade.is_login = refusal.is_login;
        if !says_why && let Some(cause) = diagnose(client.get_connection_info().addr()).await {
            unmade.why = format!("{cause} ({})", unmade.why);
            // Whatever a login is answered is taken for a wrong password.
            unmade.is_login = false;
        }
        Err(unmade)
    }
}

/// Whether what answers is Redis. One that can't save refuses even this, and can be read all the same.
pub(super) async fn ping(connection: &mut MultiplexedConnection) -> Result<bool, RedisError> {
    match cmd("PING").query_async(connection).await {
        Ok(Value::SimpleString(_) | Value::BulkString(_)) => Ok(true),
        Ok(_) => Ok(false),
        Err(error) if error.code() == Some(CAN_NOT_SAVE) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Why there is no connection.
#[derive(Clone)]
struct Unmade {
    why: String,
    is_login: bool,
}

impl From<String> for Unmade {
    fn from(why: String) -> Self {
        Self {
            why,
            is_login: false,
        }
    }
}

impl From<Unmade> for Refusal {
    /// Whatever keeps a connection from being made, no message does.
    fn from(Unmade { why, is_login }: Unmade) -> Self {
        Self {
            concern: Concern::Store,
            ends_connection: false,
            is_late: false,
            is_login,
            error: Error::Unavailable(why),
        }
    }
}

fn words(error: Error) -> String {
    match error {
        Error::Unavailable(why) | Error::Server(why) | Error::Denied(why) => why,
        Error::TooLarge(_) => "an answer that is too large".to_owned(),
    }
}

fn too_late(after: Duration) -> String {
    format!("no answer within {} s", after.as_secs())
}

/// The mode that a server says it runs in.
fn mode_of(hello: &Value) -> Option<&str> {
    fn text(value: &Value) -> Option<&str> {
        match value {
            Value::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
            Value::SimpleString(text) => Some(text),
            _ => None,
        }
    }
    match hello {
        Value::Array(items) => {
            let at = items.iter().position(|item| text(item) == Some("mode"))?;
            text(items.get(at + 1)?)
        }
        Value::Map(pairs) => {
            let mode = pairs.iter().find(|(name, _)| text(name) == Some("mode"))?;
            text(&mode.1)
        }
        _ => None,
    }
}

/// What is wrong with an address that could not be spoken to: TLS on one side only makes for errors that nobody understands, and
/// a server that hangs up with a word of why is heard of as a connection that broke.
async fn diagnose(address: &ConnectionAddr) -> Option<String> {
    let (host, port, is_tls) = match address {
        ConnectionAddr::Tcp(host, port) => (host, *port, false),
        ConnectionAddr::TcpTls { host, port, .. } => (host, *port, true),
        _ => return None,
    };
    let asked = tokio::time::timeout(DIAGNOSIS_TIMEOUT, async {
        let plain = tokio::time::timeout(PLAIN_ANSWER_TIMEOUT, plain_answer(host, port));
        let plain = plain.await.ok().flatten().unwrap_or_default();
        // A pong, or that it first wants to know who asks.
        let is_plain = plain.starts_with(['+', '-']);
        if is_tls {
            return is_plain.then(|| TLS_HERE_ONLY.to_owned());
        }
        if is_plain {
            return plain.strip_prefix('-').and_then(own_words);
        }
        speaks_tls(host, port)
            .await
            .then(|| TLS_THERE_ONLY.to_owned())
    });
    asked.await.ok()?
}

const TLS_HERE_ONLY: &str =
    "the server does not speak TLS there: write redis:// in place of rediss://";
const TLS_THERE_ONLY: &str = "the server speaks TLS there: write rediss:// in place of redis://";

/// The line that somebody is answered who does not log in, without TLS, or its beginning.
async fn plain_answer(host: &str, port: u16) -> Option<String> {
    let mut stream = TcpStream::connect((host, port)).await.ok()?;
    // Who is sent away at once has an answer, but may not get to ask.
    let _ = stream.write_all(b"PING\r\n").await;
    let mut line = Vec::new();
    let mut stream = BufReader::new(stream).take(PLAIN_ANSWER_BYTES);
    // What came before it hung up counts.
    let _ = stream.read_until(b'\n', &mut line).await;
    let line = String::from_utf8_lossy(&line);
    Some(line.trim_end().replace(char::is_control, " "))
}

/// An error that a server answers everybody, not only one who does not log in.
fn own_words(error: &str) -> Option<String> {
    let is_of_login = ["NOAUTH", "NOPERM"].iter().any(|w| error.starts_with(w));
    (!is_of_login).then(|| error.to_owned())
}

/// Asks for commands as a transaction that is never executed: the server checks for each whether it could be run just now, and
/// for whom. Answers the first refusal that is no message's. Each step waits for the one before, so that nothing is run whatever
/// is refused.
async fn rehearse(
    connection: &mut MultiplexedConnection,
    commands: &[Vec<Vec<u8>>],
) -> Result<(), Refusal> {
    if let Err(error) = cmd("MULTI").exec_async(connection).await {
        let refusal = Refusal::of(error);
        return Err(match refusal.concern {
            // It says nothing of the call.
            Concern::Standing => Refusal {
                concern: Concern::Message,
                ..refusal
            },
            _ => refusal,
        });
    }
    let mut rehearsal = pipe();
    for (name, arguments) in commands.iter().filter_map(|words| words.split_first()) {
        rehearsal.cmd(&String::from_utf8_lossy(name)).arg(arguments);
    }
    let answers = connection.send_packed_commands(&rehearsal, 0, commands.len());
    for answer in answers.await.map_err(Refusal::of)? {
        if let Value::ServerError(error) = answer {
            counts(Refusal::of_server(&error))?;
        }
    }
    Ok(())
}

/// What no message is to blame for.
fn counts(refusal: Refusal) -> Result<(), Refusal> {
    match refusal.concern {
        Concern::Message => Ok(()),
        _ => Err(refusal),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// What is said of a server that answers everybody so, and hangs up.
    async fn diagnosis(answer: &'static [u8]) -> Option<String> {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let server = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let _ = client.write_all(answer).await;
            }
        });
        let said = diagnose(&ConnectionAddr::Tcp("127.0.0.1".to_owned(), port)).await;
        server.abort();
        said
    }

    #[tokio::test]
    async fn why_a_server_hangs_up_is_told_in_its_own_words() {
        const FULL: &[u8] = b"-ERR max number of clients reached\r\n";
        let full = diagnosis(FULL).await;
        assert_eq!(full.as_deref(), Some("ERR max number of clients reached"));
        assert_eq!(
            diagnosis(b"-ERR a\x1b[1mb\r\nc").await.as_deref(),
            Some("ERR a [1mb")
        );
        let endless = diagnosis(&[b'-'; 100_000]).await.expect("its beginning");
        assert_eq!(endless.len() as u64, PLAIN_ANSWER_BYTES - 1);
        // Who logs in may be answered otherwise.
        for nothing in [
            &b"-NOAUTH Authentication required.\r\n"[..],
            b"+PONG\r\n",
            b"SSH-2.0\r\n",
            b"",
        ] {
            assert_eq!(diagnosis(nothing).await, None);
        }
    }
}
