//! A server, and how to log in there.

use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{
    ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256,
};
use postgres_protocol::message::backend::{AuthenticationSaslBody, Header, Message};
use postgres_protocol::message::frontend;
use sqlx::ConnectOptions;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::super::StoreError;
use super::client::Client;
use super::error::{Spoken, is_of_way};
use super::wire::{Eager, Incoming, Stream, Wire};
use crate::capability::tls::speaks_tls;
use crate::diagnostics::nearest;

/// What the host calls itself, unless the URL does.
const APPLICATION_NAME: &str = "stagehost";
/// Bytes of the largest message before a session has begun.
const MAX_GREETING_BYTES: usize = 64 * 1024;

/// Bytes that are read of an error that comes before anything else.
const MAX_HASTY_BYTES: usize = 8 * 1024;

/// How long it may take to find out what an address speaks that could not be spoken to.
const DIAGNOSIS_TIMEOUT: Duration = Duration::from_secs(1);
const TLS_AT_ONCE: &str = "what answers there speaks TLS from the first byte on, and PostgreSQL is asked for TLS in the clear \
                           first: write the server's own port, not that of a TLS proxy or of another service";

/// What a certificate or key begins with, where it stands in the URL itself.
const PEM: &str = "-----BEGIN";

/// Where a database is, and who logs in there.
#[derive(Clone)]
pub(super) struct Server {
    /// As the URL, the environment and the password file say it.
    options: PgConnectOptions,
    password: Option<String>,
    root_certificate: Option<String>,
    certificate: Option<String>,
    key: Option<String>,
}

/// Why there is no session.
pub(super) enum LoginError {
    /// There may be one later.
    Away(String),
    /// The same, where nothing was heard that PostgreSQL says.
    Mute(String),
    /// The server said so.
    Spoken(Spoken),
    /// There will be none.
    Refused(String),
}

impl From<io::Error> for LoginError {
    fn from(error: io::Error) -> Self {
        Self::Mute(error.to_string())
    }
}

/// Parameters of a URL; others are left out, and `host check` names them.
const PARAMETERS: &[&str] = &[
    "application_name",
    "dbname",
    "host",
    "hostaddr",
    "options",
    "password",
    "port",
    "ssl-ca",
    "ssl-cert",
    "ssl-key",
    "ssl-mode",
    "ssl-root-cert",
    "sslcert",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "statement-cache-capacity",
    "user",
];

/// The parameters of a URL that mean nothing here, each with the one that it may be a slip of.
pub(super) fn unknown_parameters(url: &str) -> Vec<(String, Option<&'static str>)> {
    let Ok(url) = url::Url::parse(url) else {
        return Vec::new();
    };
    let unknown = url.query_pairs().filter(|(name, _)| !is_known(name));
    unknown
        .map(|(name, _)| {
            let near = nearest(&name, PARAMETERS.iter().copied());
            (name.into_owned(), near)
        })
        .collect()
}

/// The files that a URL names, each with its parameter.
pub(super) fn files(url: &str) -> Vec<(String, PathBuf)> {
    let Ok(url) = url::Url::parse(url) else {
        return Vec::new();
    };
    let is_file = |name: &str, value: &str| {
        let names = ["ca", "cert", "key", "root-cert", "rootcert"];
        let name = name
            .strip_prefix("ssl")
            .map(|name| name.trim_start_matches('-'));
        name.is_some_and(|name| names.contains(&name)) && !value.contains(PEM)
    };
    let pairs = url
        .query_pairs()
        .filter(|(name, value)| is_file(name, value));
    pairs
        .map(|(name, value)| (name.into_owned(), PathBuf::from(&*value)))
        .collect()
}

fn is_known(parameter: &str) -> bool {
    PARAMETERS.contains(&parameter) || parameter.starts_with("options[")
}

/// The URL without them: the driver of the migrations would say them with their values, and not whose they are.
fn without_unknown(url: &str) -> String {
    let Ok(mut parsed) = url::Url::parse(url) else {
        return url.to_owned();
    };
    let pairs: Vec<(String, String)> = parsed.query_pairs().into_owned().collect();
    if pairs.iter().all(|(name, _)| is_known(name)) {
        return url.to_owned();
    }
    let known = pairs.iter().filter(|(name, _)| is_known(name));
    parsed.query_pairs_mut().clear().extend_pairs(known);
    parsed.into()
}

/// Reads a URL; the error has no part of it.
pub(super) fn parse(url: &str) -> Result<PgConnectOptions, String> {
    PgConnectOptions::from_str(&without_unknown(url)).map_err(|error| {
        let mut why = error.to_string();
        while let Some(rest) = why.strip_prefix("error with configuration: ") {
            why = rest.to_owned();
        }
        // What it quotes is a part of the URL.
        match (why.find('"'), why.rfind('"')) {
            (Some(from), Some(to)) if from < to => format!("{}…{}", &why[..from], &why[to + 1..]),
            _ => why,
        }
    })
}

impl Server {
    pub(super) fn new(url: &str) -> Result<Self, StoreError> {
        let options = parse(url);
        let mut options =
            options.map_err(|why| StoreError::Refused(format!("the PostgreSQL URL: {why}")))?;
        if options.get_application_name().is_none() {
            options = options.application_name(APPLICATION_NAME);
        }
        // What the driver of the migrations has gathered, and shows in no other way.
        let whole = options.to_url_lossy();
        let find = |name: &str| {
            let mut pairs = whole.query_pairs();
            let value = pairs.find_map(|(key, value)| (key == name).then_some(value))?;
            // It says so of what it would read.
            Some(value.strip_prefix("file: ").unwrap_or(&value).to_owned())
        };
        let password = whole.password().map(|password| {
            let decoded = percent_encoding::percent_decode_str(password);
            decoded.decode_utf8_lossy().into_owned()
        });
        Ok(Self {
            password,
            root_certificate: find("sslrootcert"),
            certificate: find("sslcert"),
            key: find("sslkey"),
            options: options.disable_statement_logging(),
        })
    }

    /// For the driver of the migrations.
    pub(super) fn options(&self) -> &PgConnectOptions {
        &self.options
    }

    /// The database's address, without user and password.
    pub(super) fn place(&self) -> String {
        let options = &self.options;
        let database = options.get_database().unwrap_or(options.get_username());
        match self.socket() {
            Some(socket) => format!("PostgreSQL at {}/{database}", socket.display()),
            None => format!(
                "PostgreSQL at {}:{}/{database}",
                options.get_host(),
                options.get_port()
            ),
        }
    }

    /// The folder of a Unix socket.
    fn socket(&self) -> Option<PathBuf> {
        let host = self.options.get_host();
        match self.options.get_socket() {
            Some(socket) => Some(socket.clone()),
            None => host.starts_with('/').then(|| PathBuf::from(host)),
        }
    }

    /// Connects and logs in.
    pub(super) async fn connect(&self) -> Result<Client, LoginError> {
        let mut was_heard = false;
        match self.log_in(&mut was_heard).await {
            Err(LoginError::Mute(why)) if was_heard => Err(LoginError::Away(why)),
            Err(LoginError::Mute(why)) => Err(LoginError::Away(self.diagnosed(why).await)),
            other => other,
        }
    }

    /// The cause where it is one that nobody would guess: who speaks TLS from the first byte on hangs up at a client that begins
    /// in the clear, as PostgreSQL's do.
    async fn diagnosed(&self, why: String) -> String {
        if self.socket().is_some() {
            return why;
        }
        let asked = speaks_tls(self.options.get_host(), self.options.get_port());
        match tokio::time::timeout(DIAGNOSIS_TIMEOUT, asked).await {
            Ok(true) => format!("{TLS_AT_ONCE} ({why})"),
            _ => why,
        }
    }

    /// `was_heard` is set once the server has said what PostgreSQL says.
    async fn log_in(&self, was_heard: &mut bool) -> Result<Client, LoginError> {
        let (stream, end_point) = match self.socket() {
            Some(folder) => {
                let file = folder.join(format!(".s.PGSQL.{}", self.options.get_port()));
                let stream = UnixStream::connect(file).await?;
                self.encrypted(stream).await?
            }
            None => {
                let address = (self.options.get_host(), self.options.get_port());
                let stream = TcpStream::connect(address).await;
                let stream = stream.map_err(|error| LoginError::Away(error.to_string()))?;
                stream.set_nodelay(true)?;
                self.encrypted(Eager(stream)).await?
            }
        };
        *was_heard = self.asks_for_tls();
        let mut wire = Wire::new(stream, MAX_GREETING_BYTES, MAX_GREETING_BYTES);
        self.greet(&mut wire)?;
        wire.flush().await?;
        let mut login = Login {
            server: self,
            end_point,
            scram: None,
            process: 0,
        };
        loop {
            let message = match wire.next().await.map_err(misread)? {
                Incoming::Message(message) => message,
                Incoming::TooLarge(_) => return Err(unexpected()),
            };
            *was_heard = true;
            match message {
                Message::ReadyForQuery(_) => return Ok(Client::new(wire, login.process)),
                Message::ErrorResponse(body) => {
                    return Err(LoginError::Spoken(Spoken::read(&body)));
                }
                other => {
                    if login.answer(other, &mut wire.output)? {
                        wire.flush().await?;
                    }
                }
            }
        }
    }

    fn greet(&self, wire: &mut Wire) -> io::Result<()> {
        let options = &self.options;
        let mut parameters = vec![
            ("user", options.get_username()),
            ("client_encoding", "UTF8"),
            ("DateStyle", "ISO, MDY"),
            ("TimeZone", "UTC"),
            ("extra_float_digits", "2"),
        ];
        parameters.extend(options.get_database().map(|name| ("database", name)));
        let name = options.get_application_name();
        parameters.extend(name.map(|name| ("application_name", name)));
        parameters.extend(options.get_options().map(|options| ("options", options)));
        frontend::startup_message(parameters, &mut wire.output)
    }

    fn asks_for_tls(&self) -> bool {
        let mode = self.options.get_ssl_mode();
        !matches!(mode, PgSslMode::Disable | PgSslMode::Allow)
    }

    /// Asks for encryption as far as `sslmode` wants it.
    async fn encrypted<S: Stream + 'static>(
        &self,
        mut stream: S,
    ) -> Result<(Box<dyn Stream>, Option<Vec<u8>>), LoginError> {
        let mode = self.options.get_ssl_mode();
        let plain = |stream| -> (Box<dyn Stream>, _) { (Box::new(stream), None) };
        if !self.asks_for_tls() {
            return Ok(plain(stream));
        }
        let mut request = BytesMut::new();
        frontend::ssl_request(&mut request);
        stream.write_all(&request).await?;
        match stream.read_u8().await? {
            b'S' => {}
            b'N' if matches!(mode, PgSslMode::Prefer) => return Ok(plain(stream)),
            b'N' => {
                let why = "the server does not support TLS, which sslmode asks for";
                return Err(LoginError::Refused(why.to_owned()));
            }
            b'E' => return Err(LoginError::Away(hasty_words(&mut stream).await)),
            _ => return Err(foreign()),
        }
        let connector = self.connector().await.map_err(LoginError::Refused)?;
        let host = self.options.get_host();
        let stream = connector.connect(host, stream).await;
        let stream = stream.map_err(|error| {
            let why = format!("TLS: {error}");
            match is_of_way(&error) {
                true => LoginError::Away(why),
                false => LoginError::Refused(why),
            }
        })?;
        // A certificate with an unknown signature has none.
        let end_point = stream.get_ref().tls_server_end_point();
        let end_point = end_point.unwrap_or_default();
        Ok((Box::new(stream), end_point))
    }

    async fn connector(&self) -> Result<tokio_native_tls::TlsConnector, String> {
        let mode = self.options.get_ssl_mode();
        let mut builder = native_tls::TlsConnector::builder();
        let verifies = matches!(mode, PgSslMode::VerifyCa | PgSslMode::VerifyFull);
        builder
            .danger_accept_invalid_certs(!verifies)
            .danger_accept_invalid_hostnames(!matches!(mode, PgSslMode::VerifyFull));
        if let Some(root) = &self.root_certificate {
            let pem = pem("sslrootcert", root).await?;
            let root = native_tls::Certificate::from_pem(&pem);
            builder.add_root_certificate(root.map_err(|error| format!("sslrootcert: {error}"))?);
        }
        if let (Some(certificate), Some(key)) = (&self.certificate, &self.key) {
            let (certificate, key) = (
                pem("sslcert", certificate).await?,
                pem("sslkey", key).await?,
            );
            let identity = native_tls::Identity::from_pkcs8(&certificate, &key);
            builder.identity(identity.map_err(|error| format!("sslcert and sslkey: {error}"))?);
        }
        // It reads the system's certificates from files.
        let built = tokio::task::spawn_blocking(move || builder.build()).await;
        let built = built.map_err(|error| error.to_string())?;
        built
            .map(Into::into)
            .map_err(|error| format!("TLS: {error}"))
    }
}

/// What a server says that answers with an error whatever it was asked, whose first byte was read: a message, or, where it
/// could make no process for us, a line of text.
async fn hasty_words(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut said = BytesMut::from(&b"E"[..]);
    // Where it says no more, what has come is what it said.
    while !is_whole(&said) {
        let room = MAX_HASTY_BYTES.saturating_sub(said.len());
        let read = stream.read_buf(&mut (&mut said).limit(room)).await;
        if !matches!(read, Ok(1..)) {
            break;
        }
    }
    let line = said[1..].split(|byte| *byte == 0).next();
    let line = String::from_utf8_lossy(line.unwrap_or_default())
        .trim()
        .to_owned();
    // Letters read as a length would have memory taken for a message of gigabytes.
    let message = match length(&said) {
        Some(length) if length <= said.len() => Message::parse(&mut said).ok().flatten(),
        _ => None,
    };
    let words = match message {
        Some(Message::ErrorResponse(body)) => Spoken::read(&body).message,
        _ => line,
    };
    match words.is_empty() {
        true => "the server answered with an error, and no words".to_owned(),
        false => words,
    }
}

fn is_whole(said: &[u8]) -> bool {
    match length(said) {
        Some(length) if length < MAX_HASTY_BYTES => said.len() >= length,
        // Letters, read as a length.
        Some(_) => said[1..].contains(&0),
        None => false,
    }
}

/// Bytes of the message that has begun, once its header is there.
fn length(said: &[u8]) -> Option<usize> {
    match Header::parse(said) {
        Ok(header) => Some(1 + usize::try_from(header?.len()).unwrap_or(MAX_HASTY_BYTES)),
        Err(_) => Some(MAX_HASTY_BYTES),
    }
}

/// The content of a certificate or key, which may be the parameter itself.
async fn pem(name: &str, value: &str) -> Result<Vec<u8>, String> {
    if value.contains(PEM) {
        return Ok(value.as_bytes().to_vec());
    }
    let read = tokio::fs::read(value).await;
    read.map_err(|error| format!("{name}: {error}"))
}

/// An error of what came, not of its way.
fn misread(error: io::Error) -> LoginError {
    match error.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::FileTooLarge => {
            foreign()
        }
        _ => error.into(),
    }
}

/// Something else has the server's address, and may give it back.
fn foreign() -> LoginError {
    LoginError::Mute("what answers there does not speak PostgreSQL's protocol".to_owned())
}

fn unexpected() -> LoginError {
    LoginError::Refused("the server does not speak PostgreSQL's protocol as expected".to_owned())
}

/// The server's questions and our answers.
struct Login<'a> {
    server: &'a Server,
    /// What the login is bound to, where the connection is encrypted.
    end_point: Option<Vec<u8>>,
    scram: Option<ScramSha256>,
    /// Who serves the session, as it says.
    process: i32,
}

impl Login<'_> {
    /// Whether there is an answer.
    fn answer(&mut self, message: Message, output: &mut BytesMut) -> Result<bool, LoginError> {
        match message {
            Message::AuthenticationCleartextPassword => {
                frontend::password_message(self.password()?, output)?;
            }
            Message::AuthenticationMd5Password(body) => {
                let user = self.server.options.get_username().as_bytes();
                let hash = md5_hash(user, self.password()?, body.salt());
                frontend::password_message(hash.as_bytes(), output)?;
            }
            Message::AuthenticationSasl(body) => self.begin_scram(&body, output)?,
            Message::AuthenticationSaslContinue(body) => {
                let scram = self.scram.as_mut().ok_or_else(unexpected)?;
                scram.update(body.data()).map_err(refused)?;
                frontend::sasl_response(scram.message(), output)?;
            }
            Message::AuthenticationSaslFinal(body) => {
                let scram = self.scram.as_mut().ok_or_else(unexpected)?;
                scram.finish(body.data()).map_err(refused)?;
                return Ok(false);
            }
            Message::BackendKeyData(body) => {
                self.process = body.process_id();
                return Ok(false);
            }
            Message::AuthenticationOk
            | Message::ParameterStatus(_)
            | Message::NoticeResponse(_) => return Ok(false),
            Message::AuthenticationGss
            | Message::AuthenticationKerberosV5
            | Message::AuthenticationScmCredential
            | Message::AuthenticationSspi => {
                let why = "the server asks for a kind of authentication that the host does not have: use a password \
                           (scram-sha-256) or a certificate";
                return Err(LoginError::Refused(why.to_owned()));
            }
            _ => return Err(unexpected()),
        }
        Ok(true)
    }

    fn begin_scram(
        &mut self,
        body: &AuthenticationSaslBody,
        output: &mut BytesMut,
    ) -> Result<(), LoginError> {
        let mechanisms: Vec<_> = body.mechanisms().map(|m| Ok(m.to_owned())).collect()?;
        let offers = |name: &str| mechanisms.iter().any(|mechanism| mechanism == name);
        let (mechanism, binding) = match self.end_point.take() {
            Some(end_point) if offers(SCRAM_SHA_256_PLUS) => {
                let binding = ChannelBinding::tls_server_end_point(end_point);
                (SCRAM_SHA_256_PLUS, binding)
            }
            Some(_) => (SCRAM_SHA_256, ChannelBinding::unrequested()),
            None => (SCRAM_SHA_256, ChannelBinding::unsupported()),
        };
        if !offers(mechanism) {
            return Err(unexpected());
        }
        let scram = ScramSha256::new(self.password()?, binding);
        frontend::sasl_initial_response(mechanism, scram.message(), output)?;
        self.scram = Some(scram);
        Ok(())
    }

    fn password(&self) -> Result<&[u8], LoginError> {
        let password = self.server.password.as_deref();
        let missing = || {
            LoginError::Refused("the server asks for a password, and the URL has none".to_owned())
        };
        password.map(str::as_bytes).ok_or_else(missing)
    }
}

fn refused(error: io::Error) -> LoginError {
    LoginError::Refused(error.to_string())
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// Bytes of a request for TLS.
    const REQUEST: usize = 8;
    /// How long the server reads what else may come.
    const READING: Duration = Duration::from_millis(100);

    /// What comes of a login with TLS at a server that answers these bytes to the request for it, and goes.
    async fn answered(mode: &str, bytes: &'static [u8], resets: bool) -> StoreError {
        let listener = TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.expect("a client");
            client
                .read_exact(&mut [0; REQUEST])
                .await
                .expect("a request");
            client.write_all(bytes).await.expect("an answer");
            if resets {
                client.set_zero_linger().expect("no linger");
            } else {
                // It reads what comes, so that its end is an end.
                let mut bytes = [0; 4096];
                let reading = client.read(&mut bytes);
                tokio::time::timeout(READING, reading).await.ok();
            }
        });
        let url = format!("postgres://me@127.0.0.1:{port}/db?sslmode={mode}");
        let server = Server::new(&url).expect("a URL");
        match server.connect().await {
            Ok(_) => panic!("{bytes:?}: a session"),
            Err(error) => error.into(),
        }
    }

    fn message(kind: u8, fields: &str) -> &'static [u8] {
        let mut message = vec![kind];
        let length = u32::try_from(4 + fields.len()).expect("a length");
        message.extend(length.to_be_bytes());
        message.extend(fields.as_bytes());
        message.leak()
    }

    #[tokio::test]
    async fn an_error_in_the_place_of_tls_is_the_servers_state_in_its_own_words() {
        let line = b"Ecould not fork new process for connection: Cannot allocate memory\n\0";
        let full = "SFATAL\0VFATAL\0C53300\0Msorry, too many clients already\0\0";
        let endless = [b"E".as_slice(), &[b'x'; 2 * MAX_HASTY_BYTES]].concat();
        for mode in ["prefer", "require"] {
            for (bytes, words) in [
                (
                    line.as_slice(),
                    "could not fork new process for connection: Cannot allocate memory",
                ),
                (message(b'E', full), "sorry, too many clients already"),
                (b"E", "the server answered with an error, and no words"),
                (b"Ecould not fork", "could not fork"),
            ] {
                match answered(mode, bytes, false).await {
                    StoreError::Unavailable(why) => assert_eq!(why, words, "{mode}"),
                    other => panic!("{mode}: {words}: {other}"),
                }
            }
            match answered(mode, endless.clone().leak(), false).await {
                StoreError::Unavailable(why) => assert!(why.len() < MAX_HASTY_BYTES),
                other => panic!("{mode}: {other}"),
            }
        }
        match answered("require", b"N", false).await {
            StoreError::Refused(why) => assert!(why.contains("does not support TLS"), "{why}"),
            other => panic!("{other}"),
        }
    }

    #[tokio::test]
    async fn a_handshake_that_breaks_off_is_tried_again_and_one_that_fails_is_not() {
        for resets in [true, false] {
            let error = answered("require", b"S", resets).await;
            assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
        }
        // No version of TLS.
        let error = answered("require", b"SHTTP/1.1 400 Bad Request\r\n\r\n", false).await;
        assert!(matches!(error, StoreError::Refused(_)), "{error}");
    }
}
