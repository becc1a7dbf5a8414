//! Two brokers of Apache Kafka in one cluster, of which the second can be made to hang.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rand::Rng;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use tempfile::TempDir;

use crate::support::{server, until};

const ASK: Duration = Duration::from_secs(5);
/// A class of small heap that starts fast.
const JVM: [&str; 4] = [
    "-Xms64m",
    "-Xmx256m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
];

/// The second broker leads and follows what it is given; group's offsets are the first one's.
pub(super) struct Cluster {
    pub(super) brokers: String,
    second: Mutex<Broker>,
    first: Broker,
}

pub(super) struct Broker {
    process: Child,
    port: u16,
    folder: TempDir,
}

/// One for all tests that run at the same time.
static RUNNING: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
/// Held by the test whose turn it is.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A test's turn with the cluster.
pub(super) struct Turn {
    // Dropped first: the second broker goes on before the next test's turn.
    pub(super) cluster: Going,
    _turn: tokio::sync::MutexGuard<'static, ()>,
}

/// The cluster; its second broker goes on, or is there again, when this is dropped.
pub(super) struct Going(Arc<Cluster>);

impl std::ops::Deref for Going {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.0
    }
}

impl Drop for Going {
    fn drop(&mut self) {
        self.0.come_back();
        self.0.hang(false);
    }
}

impl Turn {
    pub(super) async fn take() -> Self {
        let running = || RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let cluster = tokio::task::block_in_place(|| {
            let mut running = running();
            running.upgrade().unwrap_or_else(|| {
                let cluster = Arc::new(Cluster::start());
                *running = Arc::downgrade(&cluster);
                cluster
            })
        });
        let _turn = TURN.lock().await;
        Self {
            cluster: Going(cluster),
            _turn,
        }
    }
}

impl Cluster {
    fn start() -> Self {
        let [controller, first, second] = free_ports();
        let voters = format!("1@127.0.0.1:{controller}");
        let id = cluster_id();
        let starts = [
            ("broker,controller", 1, first, Some(controller)),
            ("broker", 2, second, None),
        ];
        let [mut first, mut second] = starts.map(|(roles, node, port, controller)| {
            let own = controller.map(|port| format!(",CONTROLLER://127.0.0.1:{port}"));
            let own = own.unwrap_or_default();
            let settings = format!(
                "process.roles={roles}\nnode.id={node}\nlisteners=PLAINTEXT://127.0.0.1:{port}{own}\n\
                 advertised.listeners=PLAINTEXT://127.0.0.1:{port}\n"
            );
            Broker::format(&id, port, &voters, &settings)
        });
        // Both are formatted at the same time.
        first.wait_formatted();
        second.wait_formatted();
        first.run();
        // The group's offsets are to be with the broker that goes on: it is the only one.
        let member = member(&first.address());
        until("the first broker's groups", || {
            let mut list = rdkafka::TopicPartitionList::new();
            list.add_partition("none", 0);
            member.committed_offsets(list, ASK).ok()
        });
        second.run();
        let brokers = format!("{},{}", first.address(), second.address());
        until("the second broker", || {
            let metadata = member.fetch_metadata(None, ASK).ok()?;
            (metadata.brokers().len() == 2).then_some(())
        });
        Self {
            brokers,
            second: Mutex::new(second),
            first,
        }
    }

    /// Where the first broker listens, which never hangs.
    pub(super) fn first(&self) -> String {
        self.first.address()
    }

    /// The second broker as who asks for it is told of it.
    pub(super) fn second(&self) -> String {
        format!("broker 2 at {}", self.lock_second().address())
    }

    /// Stops the second broker in the middle of what it does, or has it go on.
    pub(super) fn hang(&self, hangs: bool) {
        self.lock_second()
            .signal(if hangs { libc::SIGSTOP } else { libc::SIGCONT });
    }

    /// Ends the second broker, which takes leave of the cluster: nobody leads its partitions any more.
    pub(super) fn leave(&self) {
        let mut second = self.lock_second();
        second.end();
    }

    /// Starts the second broker again, where it has ended.
    pub(super) fn come_back(&self) {
        let mut second = self.lock_second();
        if second.process.try_wait().expect("its status").is_some() {
            second.run();
        }
    }

    /// Waits until these partitions of a topic have no leader, as who asks is told.
    pub(super) fn wait_leaderless(&self, topic: &str, partitions: &[i32]) {
        let member = member(&self.first());
        until("partitions without a leader", || {
            let metadata = member.fetch_metadata(Some(topic), ASK).ok()?;
            let all = metadata.topics().first()?.partitions().iter();
            let without = all.filter(|partition| partition.leader() < 0);
            let without: Vec<_> = without.map(|partition| partition.id()).collect();
            (without == partitions).then_some(())
        });
    }

    fn lock_second(&self) -> MutexGuard<'_, Broker> {
        self.second.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn delete(&self, topic: &str) {
        let admin: AdminClient<DefaultClientContext> =
            config(&self.brokers).create().expect("an admin client");
        let deleted = admin.delete_topics(&[topic], &AdminOptions::new()).await;
        let deleted = deleted.expect("an answer").pop().expect("of the topic");
        deleted.expect("the topic is deleted");
    }

    /// Makes a topic whose partitions lie on these brokers, the leader's first.
    pub(super) async fn create(
        &self,
        topic: &str,
        partitions: &[&[i32]],
        settings: &[(&str, &str)],
    ) {
        let admin: AdminClient<DefaultClientContext> =
            config(&self.brokers).create().expect("an admin client");
        let new = NewTopic::new(
            topic,
            i32::try_from(partitions.len()).expect("few"),
            TopicReplication::Variable(partitions),
        );
        let new = settings
            .iter()
            .fold(new, |new, (key, value)| new.set(key, value));
        let made = admin.create_topics([&new], &AdminOptions::new()).await;
        let made = made.expect("an answer").pop().expect("of the topic");
        made.expect("the topic is made");
        let member = member(&self.brokers);
        until("the topic's leaders", || {
            let metadata = member.fetch_metadata(Some(topic), ASK).ok()?;
            let made = metadata.topics().first()?.partitions();
            let leaders: Vec<_> = made.iter().map(|p| p.leader()).collect();
            let wanted: Vec<_> = partitions.iter().map(|replicas| replicas[0]).collect();
            (leaders == wanted && made.iter().all(|p| p.isr().len() == p.replicas().len()))
                .then_some(())
        });
    }
}

impl Broker {
    /// A cluster of one, whose clients are told to come to this port, if it is not its own.
    pub(super) fn alone(advertised: Option<u16>) -> Self {
        let [controller, port] = free_ports();
        let advertised = advertised.unwrap_or(port);
        let voters = format!("1@127.0.0.1:{controller}");
        let settings = format!(
            "process.roles=broker,controller\nnode.id=1\n\
             listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}\n\
             advertised.listeners=PLAINTEXT://127.0.0.1:{advertised}\n"
        );
        let mut broker = Self::format(&cluster_id(), port, &voters, &settings);
        broker.wait_formatted();
        broker.run();
        broker
    }

    /// One whose folder is being formatted.
    fn format(cluster: &str, port: u16, voters: &str, own: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let settings = settings(folder.path(), voters) + own;
        std::fs::write(folder.path().join("properties"), settings).expect("its settings");
        let process = format(&folder, cluster);
        Self {
            process,
            port,
            folder,
        }
    }

    fn wait_formatted(&mut self) {
        let done = self.process.wait().expect("the formatting ends");
        assert!(done.success(), "{}", self.log());
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Has it end in order.
    pub(super) fn end(&mut self) {
        self.signal(libc::SIGTERM);
        until("a broker to end", || {
            self.process.try_wait().expect("its status")
        });
    }

    /// Copies what it has, once it has ended.
    pub(super) fn save(&self) {
        self.copy("data", "saved");
    }

    /// And has it have that again, and nothing else.
    pub(super) fn restore(&self) {
        let data = self.folder.path().join("data");
        std::fs::remove_dir_all(data).expect("its data are removed");
        self.copy("saved", "data");
    }

    fn copy(&self, from: &str, to: &str) {
        let path = |name| self.folder.path().join(name);
        let copied = Command::new("cp")
            .arg("-a")
            .args([path(from), path(to)])
            .status();
        assert!(copied.expect("cp").success());
    }

    pub(super) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(super) fn run(&mut self) {
        self.process = java(&self.folder, "kafka.Kafka", &[]);
        let address = self.address();
        until("a broker to listen", || {
            let ended = self.process.try_wait().expect("its status");
            assert!(ended.is_none(), "it ended:\n{}", self.log());
            std::net::TcpStream::connect(&address).ok()
        });
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    fn signal(&self, signal: i32) {
        let id = i32::try_from(self.process.id()).expect("a process id");
        // SAFETY: plain system call on the id of a child that was not waited for.
        #[allow(unsafe_code)]
        let result = unsafe { libc::kill(id, signal) };
        assert_eq!(result, 0, "the broker is there to be signalled");
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // Nobody needs its data any more.
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("--- the broker's log:\n{}", self.log());
        }
    }
}

/// A broker that hangs is led on to be a leader for as long as a test takes, and is soon no replica in sync.
fn settings(folder: &Path, voters: &str) -> String {
    format!(
        "controller.quorum.voters={voters}\ncontroller.listener.names=CONTROLLER\n\
         listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT\nlog.dirs={}\n\
         broker.session.timeout.ms=60000\nreplica.lag.time.max.ms=2000\n\
         offsets.topic.replication.factor=1\noffsets.topic.num.partitions=1\n\
         group.initial.rebalance.delay.ms=0\nauto.create.topics.enable=false\n",
        folder.join("data").display()
    )
}

fn format(folder: &TempDir, cluster: &str) -> Child {
    let file = folder.path().join("properties");
    let cluster = format!("--cluster-id={cluster}");
    let file = file.display().to_string();
    java(
        folder,
        "kafka.tools.StorageTool",
        &["format", &cluster, "-c", &file],
    )
}

/// Runs one of Kafka's programs; the broker takes its settings as its only argument.
fn java(folder: &TempDir, class: &str, arguments: &[&str]) -> Child {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(folder.path().join("log"))
        .expect("a log");
    let mut command = Command::new("java");
    command
        .args(JVM)
        .args(["-cp", &format!("{}/*", server("KAFKA_JARS")), class]);
    if arguments.is_empty() {
        command.arg(folder.path().join("properties"));
    }
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(log.try_clone().expect("a log"))
        .stdout(log)
        .spawn()
        .expect("java")
}

/// Below the range that Linux gives to outgoing connections.
fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| {
        until("a free port", || {
            let port = rand::rng().random_range(20_000..32_000);
            TcpListener::bind(("127.0.0.1", port)).ok()
        })
    });
    listeners.map(|listener| listener.local_addr().expect("its address").port())
}

/// 16 bytes in base64, as Kafka writes them.
fn cluster_id() -> String {
    let id = uuid::Uuid::new_v4().simple().to_string();
    format!("{}AA", &id[..20])
}

fn config(brokers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    config
}

fn member(brokers: &str) -> BaseConsumer {
    let mut config = config(brokers);
    config.set("group.id", "cluster");
    config.create().expect("a consumer")
}
