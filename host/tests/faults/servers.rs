//! Apache Kafka, PostgreSQL and Redis of the suite's own. Each can be stopped, killed and started
//! again on the same port and the same files.

use std::collections::HashSet;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rand::Rng;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};

use crate::pipeline::ROLE;
use crate::process::{Process, tied};

/// How long a server may take until it answers.
const START_PATIENCE: Duration = Duration::from_secs(90);
/// How long it may take to stop before the suite fails.
const STOP_PATIENCE: Duration = Duration::from_secs(60);
const ASK_INTERVAL: Duration = Duration::from_millis(50);
const ASK: Duration = Duration::from_secs(2);
/// Below those that Linux gives to outgoing connections: nobody takes one while its server is away.
const PORTS: Range<u16> = 20_000..32_000;
const PORT_ATTEMPTS: usize = 1_000;
const JAVA: [&str; 4] = [
    "-Xms128m",
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
];

/// Who is let in, and how.
const LOGINS: &str = "\
host all stagehost 127.0.0.1/32 scram-sha-256
host all postgres 127.0.0.1/32 trust
";

/// Hands out free ports on the loopback address, each once.
#[derive(Default)]
pub(crate) struct Ports(HashSet<u16>);

impl Ports {
    pub(crate) fn free(&mut self) -> u16 {
        for _ in 0..PORT_ATTEMPTS {
            let port = rand::rng().random_range(PORTS);
            let is_free = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
            if is_free && self.0.insert(port) {
                return port;
            }
        }
        panic!("no port of {PORTS:?} is free");
    }
}

/// How a server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It is asked to.
    Stopped,
    /// SIGKILL, children included.
    Killed,
}

/// A server, running or not.
pub(crate) struct Server {
    name: &'static str,
    command: Box<dyn Fn() -> Command>,
    answers: Box<dyn Fn() -> bool>,
    /// What asks it to stop and does not wait for its clients.
    stop_signal: i32,
    log: PathBuf,
    process: Option<Process>,
}

impl Server {
    /// Starts it and waits until it answers.
    pub(crate) fn start(&mut self) {
        let mut process = Process::start(self.name, (self.command)(), &self.log);
        let deadline = Instant::now() + START_PATIENCE;
        while !(self.answers)() {
            assert!(
                process.ended().is_none() && Instant::now() < deadline,
                "{} does not start:\n{}",
                self.name,
                process.last_words()
            );
            std::thread::sleep(ASK_INTERVAL);
        }
        self.process = Some(process);
    }

    /// Stops its process for a while, or has it go on.
    pub(crate) fn signal(&mut self, signal: i32) {
        let process = self.process.as_mut().expect("a server that runs");
        process.signal(signal);
    }

    /// Ends it.
    pub(crate) fn end(&mut self, how: End) {
        let mut process = self.process.take().expect("a server that runs");
        let ended = process.ended();
        assert!(
            ended.is_none(),
            "{} died:\n{}",
            self.name,
            process.last_words()
        );
        match how {
            End::Killed => process.kill(),
            End::Stopped => {
                process.signal(self.stop_signal);
                let ended = process.wait(STOP_PATIENCE);
                assert!(
                    ended.is_some(),
                    "{} does not stop:\n{}",
                    self.name,
                    process.last_words()
                );
            }
        }
    }
}

/// Where Kafka's clients find it.
pub(crate) struct Listeners {
    /// Where it listens for the hosts, behind a proxy.
    pub(crate) behind: u16,
    /// The proxy's port, which it tells its clients.
    pub(crate) proxy: u16,
    /// Where it listens for those that are not to notice a cut network.
    pub(crate) direct: u16,
}

/// Apache Kafka: one node, broker and controller. The jars come from `scripts/kafka-jars`.
pub(crate) fn kafka(
    folder: &Path,
    logs: &Path,
    ports: &mut Ports,
    listeners: &Listeners,
) -> Server {
    let properties = folder.join("kafka.properties");
    let text = kafka_properties(&folder.join("kafka"), ports.free(), listeners);
    std::fs::write(&properties, text).expect("Kafka's properties");
    let log = logs.join("kafka.log");
    let mut format = java();
    let cluster = "c3RhZ2Vob3N0LWZhdWx0cw"; // 16 bytes in base64
    format.args(["kafka.tools.StorageTool", "format", "-t", cluster, "-c"]);
    run("Kafka's folder", format.arg(&properties), &log);
    let brokers = format!("127.0.0.1:{}", listeners.direct);
    Server {
        name: "kafka",
        command: Box::new(move || {
            let mut command = java();
            command.arg("kafka.Kafka").arg(&properties);
            command
        }),
        answers: Box::new(move || {
            let client: Result<BaseConsumer, _> = ClientConfig::new()
                .set("bootstrap.servers", &brokers)
                .create();
            client.is_ok_and(|c| c.fetch_metadata(None, ASK).is_ok())
        }),
        stop_signal: libc::SIGTERM,
        log,
        process: None,
    }
}

fn java() -> Command {
    let mut classes = std::env::var_os("KAFKA_JARS")
        .expect("KAFKA_JARS is not set: run `make test` or `make test-faults`, which fetch Kafka");
    classes.push("/*");
    let mut command = tied("KILL");
    command.arg("java").args(JAVA).arg("-cp").arg(&classes);
    command
}

/// Changes what Kafka's authorizer lets the hosts do, as Kafka's own tool does.
pub(crate) fn acl(brokers: &str, arguments: &[&str]) {
    let mut tool = java();
    tool.arg("org.apache.kafka.tools.AclCommand");
    tool.args(["--bootstrap-server", brokers])
        .args(arguments)
        .args(["--deny-principal", &format!("User:{ROLE}")]);
    let done = tool.stdin(Stdio::null()).output().expect("java");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{arguments:?}: {said}");
}

fn kafka_properties(data: &Path, controller: u16, listeners: &Listeners) -> String {
    let Listeners {
        behind,
        proxy,
        direct,
    } = listeners;
    // After a crash, the controller takes no broker of the same id until it has missed the old one:
    // that is to last a moment, not 9 s. A session of a group lasts at least 6 s.
    format!(
        "process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
controller.listener.names=CONTROLLER
listeners=HOSTS://127.0.0.1:{behind},DIRECT://127.0.0.1:{direct},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=HOSTS://127.0.0.1:{proxy},DIRECT://127.0.0.1:{direct}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,HOSTS:SASL_PLAINTEXT,DIRECT:PLAINTEXT
inter.broker.listener.name=DIRECT
listener.name.hosts.sasl.enabled.mechanisms=PLAIN
listener.name.hosts.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required user_{ROLE}=\"{ROLE}\";
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
allow.everyone.if.no.acl.found=true
super.users=User:ANONYMOUS
log.dirs={}
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=false
broker.heartbeat.interval.ms=500
broker.session.timeout.ms=2000
",
        data.display()
    )
}

/// PostgreSQL with the user `postgres`, who needs no password; the hosts' role does.
pub(crate) fn postgres(folder: &Path, logs: &Path, port: u16) -> Server {
    let bin = postgres_bin();
    let data = folder.join("postgres");
    std::fs::create_dir(&data).expect("PostgreSQL's folder");
    // It refuses to run as root.
    let is_root = output(Command::new("id").arg("-u")) == "0";
    if is_root {
        output(Command::new("chown").arg("postgres").arg(&data));
    }
    let as_user = move |program: PathBuf, signal: &str| {
        let mut command = tied(signal);
        if is_root {
            command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]);
        }
        command.arg(program).current_dir("/");
        command
    };
    let log = logs.join("postgres.log");
    let mut initdb = as_user(bin.join("initdb"), "KILL");
    initdb.args("-U postgres -A trust -E UTF8 --no-locale -N -D".split(' '));
    run("PostgreSQL's folder", initdb.arg(&data), &log);
    std::fs::write(data.join("pg_hba.conf"), LOGINS).expect("who may log in");
    let is_ready = bin.join("pg_isready");
    Server {
        name: "postgres",
        command: Box::new(move || {
            // Its immediate shutdown, which takes the children along.
            let mut command = as_user(bin.join("postgres"), "QUIT");
            command.arg("-D").arg(&data).arg("-p").arg(port.to_string());
            for setting in [
                "listen_addresses=127.0.0.1",
                "unix_socket_directories=",
                "max_connections=300",
            ] {
                command.args(["-c", setting]);
            }
            command
        }),
        answers: Box::new(move || {
            let mut ask = Command::new(&is_ready);
            ask.args(["-q", "-h", "127.0.0.1", "-U", "postgres", "-p"])
                .arg(port.to_string());
            ask.status().is_ok_and(|status| status.success())
        }),
        // Its fast shutdown; TERM would wait for the clients to leave.
        stop_signal: libc::SIGINT,
        log,
        process: None,
    }
}

/// The newest that Debian has, or the one on the path.
fn postgres_bin() -> PathBuf {
    let version =
        |bin: &PathBuf| -> Option<u32> { bin.parent()?.file_name()?.to_str()?.parse().ok() };
    let debian = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten();
    let newest = debian
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .max_by_key(version);
    newest.unwrap_or_else(|| {
        let found = output(Command::new("sh").args(["-c", "dirname \"$(command -v initdb)\""]));
        PathBuf::from(found)
    })
}

/// Redis, which keeps what it has acknowledged: with its usual `appendfsync everysec` it may answer
/// before it has written, while an earlier write is being flushed.
pub(crate) fn redis(folder: &Path, logs: &Path, port: u16) -> Server {
    let data = folder.join("redis");
    std::fs::create_dir(&data).expect("Redis's folder");
    let url = format!("redis://127.0.0.1:{port}");
    Server {
        name: "redis",
        command: Box::new(move || {
            let mut command = tied("KILL");
            let settings = "redis-server --bind 127.0.0.1 --daemonize no --appendonly yes --appendfsync always";
            command.args(settings.split(' ')).args(["--save", ""]);
            command
                .arg("--port")
                .arg(port.to_string())
                .arg("--dir")
                .arg(&data);
            command
        }),
        answers: Box::new(move || {
            let ping = || {
                let mut connection =
                    redis::Client::open(&*url)?.get_connection_with_timeout(ASK)?;
                redis::cmd("PING").query::<String>(&mut connection)
            };
            ping().is_ok()
        }),
        stop_signal: libc::SIGTERM,
        log: logs.join("redis.log"),
        process: None,
    }
}

/// Runs a command to its end, which must be a good one.
fn run(what: &str, command: &mut Command, log: &Path) {
    let out = command.stdin(Stdio::null()).output();
    let out = out.unwrap_or_else(|e| panic!("{what} can't be made: {e}"));
    let text = [out.stdout, out.stderr].concat();
    std::fs::write(log, &text).expect("a log");
    let text = String::from_utf8_lossy(&text);
    assert!(out.status.success(), "{what} could not be made:\n{text}");
}

fn output(command: &mut Command) -> String {
    let out = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(out.status.success(), "{command:?}: {}", out.status);
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}
