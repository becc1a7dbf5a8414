//! Servers of a test's own, whose state it may change, and a way to them that can lead elsewhere.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;

use crate::support::until;

/// Where a test's servers listen: below the range that Linux gives to outgoing connections.
pub(super) fn free_port() -> u16 {
    use rand::Rng;
    until("a free port", || {
        let port = rand::rng().random_range(20_000..32_000);
        TcpListener::bind(("127.0.0.1", port))
            .is_ok()
            .then_some(port)
    })
}

/// A process that ends with its test.
pub(super) struct Server {
    pub(super) port: u16,
    process: Child,
    folder: TempDir,
}

impl Server {
    fn start(command: &mut Command, port: u16, folder: TempDir) -> Self {
        let log = std::fs::File::create(folder.path().join("log")).expect("a log");
        let process = command
            .stdin(Stdio::null())
            .stderr(log.try_clone().expect("a log"))
            .stdout(log)
            .process_group(0)
            .spawn()
            .expect("the server starts");
        let mut server = Self {
            port,
            process,
            folder,
        };
        until("the server", || {
            let ended = server.process.try_wait().expect("its status");
            assert!(ended.is_none(), "it ended:\n{}", server.log());
            TcpStream::connect(("127.0.0.1", port)).ok()
        });
        server
    }

    /// Where it has its files.
    pub(super) fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    pub(super) fn signal(&self, signal: i32) {
        let id = i32::try_from(self.process.id()).expect("a process id");
        // SAFETY: plain system call on the id of a child that was not waited for.
        #[allow(unsafe_code)]
        let result = unsafe { libc::kill(id, signal) };
        assert_eq!(result, 0, "the server is there to be signalled");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // PostgreSQL's fast shutdown; a server that is paused has to be woken for it.
        self.signal(libc::SIGCONT);
        self.signal(libc::SIGINT);
        for _ in 0..100 {
            if self.process.try_wait().ok().flatten().is_some() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("--- the server's log:\n{}", self.log());
        }
    }
}

/// A Redis server with these options.
pub(super) fn redis(options: &[&str]) -> Server {
    let (folder, port) = (tempfile::tempdir().expect("a folder"), free_port());
    let mut command = Command::new("redis-server");
    command
        .args(["--bind", "127.0.0.1", "--port", &port.to_string()])
        .args(["--save", "", "--daemonize", "no", "--dir"])
        .arg(folder.path())
        .args(options);
    Server::start(&mut command, port, folder)
}

/// A certificate for 127.0.0.1 that signs itself, and its key.
pub(super) struct Certificate(TempDir);

impl Certificate {
    pub(super) fn new() -> Self {
        let made = Self(tempfile::tempdir().expect("a folder"));
        let output = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes"])
            .args(["-days", "2", "-subj", "/CN=localhost"])
            .args(["-addext", "subjectAltName=IP:127.0.0.1"])
            .args([
                "-keyout",
                &made.file("key"),
                "-out",
                &made.file("certificate"),
            ])
            .output()
            .expect("openssl");
        assert!(output.status.success(), "{output:?}");
        made
    }

    /// The path of its `certificate`, or of its `key`.
    pub(super) fn file(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }
}

/// A Redis server that speaks TLS at a port of its own, too, which is the one that is answered.
pub(super) fn redis_with_tls(certificate: &Certificate) -> (Server, u16) {
    let (port, chain) = (free_port(), certificate.file("certificate"));
    let server = redis(&[
        "--tls-port",
        &port.to_string(),
        "--tls-cert-file",
        &chain,
        "--tls-key-file",
        &certificate.file("key"),
        "--tls-ca-cert-file",
        &chain,
        "--tls-auth-clients",
        "no",
    ]);
    (server, port)
}

/// Begins a command of Redis's that takes its time, and ends with the test at the latest: the server does.
pub(super) fn begin(server: &Server, arguments: &[&str]) -> Child {
    Command::new("redis-cli")
        .args(["-h", "127.0.0.1", "-p", &server.port.to_string()])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("redis-cli")
}

/// Runs a command of Redis's with `redis-cli`, and answers what it says.
pub(super) fn cli(server: &Server, arguments: &[&str]) -> String {
    let output = Command::new("redis-cli")
        .args(["-h", "127.0.0.1", "-p", &server.port.to_string()])
        .args(arguments)
        .output()
        .expect("redis-cli");
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(output.status.success(), "{arguments:?}: {said}");
    said
}

/// A program of PostgreSQL's server, as the user that it needs.
fn postgres_program(name: &str) -> Command {
    let program = postgres_file(name);
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(AS_POSTGRES).arg(program).current_dir("/");
    command
}

const AS_POSTGRES: [&str; 3] = ["--reuid=postgres", "--regid=postgres", "--init-groups"];

fn is_root() -> bool {
    // SAFETY: plain system call without arguments.
    #[allow(unsafe_code)]
    let user = unsafe { libc::getuid() };
    user == 0
}

fn postgres_file(name: &str) -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql");
    let newest = versions.ok().and_then(|versions| {
        let folders = versions
            .map_while(Result::ok)
            .map(|version| version.path().join("bin"));
        folders.filter(|bin| bin.join(name).exists()).max()
    });
    // Debian has PgBouncer where services are.
    let service = PathBuf::from("/usr/sbin").join(name);
    let other = Some(service).filter(|service| service.exists());
    let newest = newest.map(|bin| bin.join(name)).or(other);
    newest.unwrap_or_else(|| PathBuf::from(name))
}

/// The server's program, which finds a disk of a few MiB at `small`, that nobody else has.
fn postgres_beside_small_disk(small: &std::path::Path) -> Command {
    const MOUNT: &str = "mount -t tmpfs -o size=32m tmpfs \"$1\" && \
                         { chown postgres \"$1\" || true; } && shift && exec \"$@\"";
    let mut command = Command::new("unshare");
    if !is_root() {
        command.arg("--map-root-user");
    }
    command
        .args(["--mount", "sh", "-c", MOUNT, "sh"])
        .arg(small);
    if is_root() {
        command.arg("setpriv").args(AS_POSTGRES);
    } else {
        // PostgreSQL runs as anybody but root.
        command.args(["unshare", "--user", "--map-user=1000", "--map-group=1000"]);
    }
    command.arg(postgres_file("postgres")).current_dir("/");
    command
}

/// Gives a folder to the user whom servers run as, where that is not the test's own.
fn give_away(folder: &std::path::Path, user: &str) {
    let done = Command::new("chown")
        .args(["-R", user])
        .arg(folder)
        .status();
    // Only root can, and has to.
    let _ = done.map(|status| status.success());
}

/// A PostgreSQL server, for whose user `postgres` a password is asked, `geheim`. It takes prepared transactions, and has a small
/// disk at `small` in its folder.
pub(super) fn postgres() -> Server {
    let (folder, port) = (tempfile::tempdir().expect("a folder"), free_port());
    let (data, password) = (folder.path().join("data"), folder.path().join("password"));
    std::fs::write(&password, "geheim").expect("a password file");
    let small = folder.path().join("small");
    std::fs::create_dir(&small).expect("a folder");
    give_away(folder.path(), "postgres");
    let made = postgres_program("initdb")
        .args([
            "-U",
            "postgres",
            "-A",
            "scram-sha-256",
            "-E",
            "UTF8",
            "--no-locale",
            "-N",
            "-D",
        ])
        .arg(&data)
        .arg("--pwfile")
        .arg(&password)
        .output()
        .expect("initdb");
    assert!(made.status.success(), "{made:?}");
    start_postgres(folder, port)
}

/// Gives a PostgreSQL server what it takes to speak TLS, for when `ssl` is on.
pub(super) fn give_certificate(postgres: &Server, certificate: &Certificate) {
    for (from, to) in [("certificate", "server.crt"), ("key", "server.key")] {
        let file = postgres.folder().join("data").join(to);
        std::fs::copy(certificate.file(from), &file).expect("a copy");
        // It takes no key that others can read.
        let own = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&file, own).expect("its mode");
        give_away(&file, "postgres");
    }
}

/// Whom it lets in from when it reads its settings the next time: with `host` everybody who has a password, with `hostssl` only
/// in TLS.
pub(super) fn admit(postgres: &Server, kind: &str) {
    let file = postgres.folder().join("data/pg_hba.conf");
    let line = format!("{kind} all all 127.0.0.1/32 scram-sha-256\n");
    std::fs::write(file, line).expect("who is let in");
}

/// A standby of it, which follows it until it is promoted.
pub(super) fn standby(of: &Server) -> Server {
    let (folder, port) = (tempfile::tempdir().expect("a folder"), free_port());
    std::fs::create_dir(folder.path().join("small")).expect("a folder");
    give_away(folder.path(), "postgres");
    let made = postgres_program("pg_basebackup")
        .args(["-h", "127.0.0.1", "-p", &of.port.to_string()])
        .args(["-U", "postgres", "-R", "-X", "stream", "-c", "fast", "-D"])
        .arg(folder.path().join("data"))
        .env("PGPASSWORD", "geheim")
        .output()
        .expect("pg_basebackup");
    assert!(made.status.success(), "{made:?}");
    start_postgres(folder, port)
}

/// A server of the data in a folder.
fn start_postgres(folder: TempDir, port: u16) -> Server {
    let (data, small) = (folder.path().join("data"), folder.path().join("small"));
    let mut command = postgres_beside_small_disk(&small);
    command
        .arg("-D")
        .arg(&data)
        .args(["-p", &port.to_string()])
        .args([
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            "unix_socket_directories=",
            "-c",
            "fsync=off",
            "-c",
            "max_prepared_transactions=4",
        ]);
    let server = Server::start(&mut command, port, folder);
    // It listens a moment before it lets anybody in.
    until("PostgreSQL", || {
        let asked = postgres_program("pg_isready")
            .args(["-h", "127.0.0.1", "-p", &port.to_string()])
            .output()
            .expect("pg_isready");
        asked.status.success().then_some(())
    });
    server
}

/// PgBouncer in front of a PostgreSQL server without passwords, at this port.
pub(super) fn pgbouncer(to: u16, mode: &str, more: &str) -> Server {
    let (folder, port) = (tempfile::tempdir().expect("a folder"), free_port());
    let file = folder.path().join("pgbouncer.ini");
    let settings = format!(
        "[databases]\n* = host=127.0.0.1 port={to}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
         auth_type = any\nadmin_users = postgres\npool_mode = {mode}\nunix_socket_dir =\n{more}\n"
    );
    // Everybody is let in as whom it says, and goes on as the server's user.
    let settings = settings.replace(
        &format!("port={to}\n"),
        &format!("port={to} user=postgres\n"),
    );
    std::fs::write(&file, settings).expect("its settings");
    give_away(folder.path(), "postgres");
    // It is no server of PostgreSQL's, and refuses to run as root too.
    let mut command = postgres_program("pgbouncer");
    command.arg(&file);
    Server::start(&mut command, port, folder)
}

/// Has PostgreSQL's own client run a command.
pub(super) fn psql(url: &str, command: &str) {
    let done = Command::new(postgres_file("psql"))
        .args([url, "-c", command])
        .output()
        .expect("psql");
    assert!(done.status.success(), "{command}: {done:?}");
}

/// A way to a local port that can lead to another.
pub(super) struct Way {
    pub(super) port: u16,
    to: Arc<AtomicU16>,
    open: Arc<Mutex<Vec<TcpStream>>>,
    is_shut: Arc<AtomicBool>,
}

impl Way {
    pub(super) fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let way = Self {
            port: listener.local_addr().expect("its address").port(),
            to: Arc::new(AtomicU16::new(port)),
            open: Arc::default(),
            is_shut: Arc::default(),
        };
        way.listen(listener);
        way
    }

    fn listen(&self, listener: TcpListener) {
        let (to, open, is_shut) = (self.to.clone(), self.open.clone(), self.is_shut.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if is_shut.load(Ordering::SeqCst) {
                    return;
                }
                let to = to.load(Ordering::SeqCst);
                let Ok(server) = TcpStream::connect(("127.0.0.1", to)) else {
                    continue;
                };
                let both = [(&client, &server), (&server, &client)];
                for (from, into) in both {
                    let from = from.try_clone().expect("a socket");
                    let into = into.try_clone().expect("a socket");
                    std::thread::spawn(move || pass(from, into));
                }
                open.lock().expect("no panic").extend([client, server]);
            }
        });
    }

    /// Ends all connections, and refuses new ones.
    pub(super) fn shut(&self) {
        self.is_shut.store(true, Ordering::SeqCst);
        until("the way to be shut", || {
            TcpStream::connect(("127.0.0.1", self.port))
                .is_err()
                .then_some(())
        });
        self.cut();
    }

    /// Takes connections again.
    pub(super) fn reopen(&self) {
        let listener = until("its port", || {
            TcpListener::bind(("127.0.0.1", self.port)).ok()
        });
        self.is_shut.store(false, Ordering::SeqCst);
        self.listen(listener);
    }

    /// From now on, new connections lead there; those that are open stay.
    pub(super) fn lead(&self, port: u16) {
        self.to.store(port, Ordering::SeqCst);
    }

    /// Ends all connections.
    pub(super) fn cut(&self) {
        for stream in self.open.lock().expect("no panic").drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn pass(mut from: TcpStream, mut into: TcpStream) {
    let mut bytes = [0; 4096];
    while let Ok(n @ 1..) = from.read(&mut bytes) {
        if into.write_all(&bytes[..n]).is_err() {
            break;
        }
    }
    let _ = into.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

/// Something that is neither Redis nor PostgreSQL, at the port that it answers.
pub(super) fn foreign() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("its address").port();
    std::thread::spawn(move || {
        for mut client in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut bytes = [0; 4096];
                while let Ok(1..) = client.read(&mut bytes) {
                    let _ =
                        client.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n");
                }
            });
        }
    });
    port
}
