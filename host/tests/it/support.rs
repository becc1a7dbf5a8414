//! What the tests share: names, servers, a running host, and plain clients to look from the outside.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message, OwnedHeaders};
use rdkafka::producer::{BaseProducer, FutureProducer, FutureRecord};
use rdkafka::{Offset, TopicPartitionList};
use tempfile::TempDir;

/// How long anything may take before its test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
const ASK: Duration = Duration::from_secs(10);
/// Longer than the host waits for the log.
const ANSWER: Duration = Duration::from_secs(20);

/// A server's address, from `make test`.
pub(crate) fn server(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| {
        panic!("{variable} is not set: run `make test`, which starts the servers")
    })
}

/// A component that `make stages` built.
pub(crate) fn component(name: &str) -> String {
    let folder = std::env::var("STAGES_DIR").map_or_else(
        |_| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/stages"),
        PathBuf::from,
    );
    let path = folder.join(format!("{name}.wasm"));
    assert!(
        path.exists(),
        "{} is missing: run `make test`, which builds it",
        path.display()
    );
    path.display().to_string()
}

/// A name that no other test has.
pub(crate) fn unique(what: &str) -> String {
    format!(
        "{what}-{}",
        &uuid::Uuid::new_v4().simple().to_string()[..12]
    )
}

/// Asks until the answer is some.
pub(crate) fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A host process on a pipeline file in a folder of its own.
pub(crate) struct Host {
    folder: Arc<TempDir>,
    process: Child,
    log: Arc<Mutex<Vec<String>>>,
    out: Arc<Mutex<Vec<String>>>,
}

impl Host {
    /// Starts `host run` on a pipeline of this text, and waits until it is ready.
    pub(crate) fn start(pipeline: &str) -> Self {
        let host = Self::spawn(
            Arc::new(tempfile::tempdir().expect("a folder")),
            pipeline,
            &[],
        );
        host.ready();
        host
    }

    /// Starts `host run` in a folder that an earlier one may have used; does not wait.
    pub(crate) fn spawn(folder: Arc<TempDir>, pipeline: &str, variables: &[(&str, &str)]) -> Self {
        let file = folder.path().join("pipeline.toml");
        std::fs::write(&file, pipeline).expect("the pipeline file is written");
        Self::run(folder, &file, variables)
    }

    /// Starts `host run` on a file.
    pub(crate) fn run(folder: Arc<TempDir>, file: &Path, variables: &[(&str, &str)]) -> Self {
        Self::run_with(folder, file, variables, &[])
    }

    /// The same, with options.
    pub(crate) fn run_with(
        folder: Arc<TempDir>,
        file: &Path,
        variables: &[(&str, &str)],
        options: &[&str],
    ) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_host"));
        command.arg("run").arg(file).args(options);
        Self::started(folder, command, variables)
    }

    /// Starts `host run` with its data on a disk of so many MiB, which nobody else has.
    pub(crate) fn spawn_on_small_disk(pipeline: &str, mib: u32) -> Self {
        let folder = Arc::new(tempfile::tempdir().expect("a folder"));
        let file = folder.path().join("pipeline.toml");
        std::fs::write(&file, pipeline).expect("the pipeline file is written");
        let data = folder.path().join("data");
        std::fs::create_dir(&data).expect("a folder for the data");
        let mount = format!("mount -t tmpfs -o size={mib}m tmpfs \"$1\" && exec \"$2\" run \"$3\"");
        let mut command = Command::new("unshare");
        command
            .args(["--map-root-user", "--mount", "sh", "-c", &mount, "sh"])
            .arg(data)
            .arg(env!("CARGO_BIN_EXE_host"))
            .arg(file);
        Self::started(folder, command, &[])
    }

    /// The folder of its data, as the host sees it.
    pub(crate) fn data(&self) -> PathBuf {
        let data = self.folder.path().join("data");
        let data = data.strip_prefix("/").expect("an absolute path");
        PathBuf::from(format!("/proc/{}/root", self.process.id())).join(data)
    }

    fn started(folder: Arc<TempDir>, mut command: Command, variables: &[(&str, &str)]) -> Self {
        let mut process = command
            .env_remove("KAFKA_BROKERS")
            .env_remove("DATABASE_URL")
            .env_remove("REDIS_URL")
            .env_remove("RUST_LOG")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the host starts");
        let out = collect(process.stdout.take().expect("stdout"));
        let log = collect(process.stderr.take().expect("stderr"));
        Self {
            folder,
            process,
            log,
            out,
        }
    }

    pub(crate) fn folder(&self) -> Arc<TempDir> {
        self.folder.clone()
    }

    /// What it has written to stderr.
    pub(crate) fn log(&self) -> String {
        self.log.lock().expect("the log").join("\n")
    }

    /// The most memory that it has had, in MiB.
    pub(crate) fn peak_mib(&self) -> u64 {
        let status = format!("/proc/{}/status", self.process.id());
        let status = std::fs::read_to_string(status).expect("what Linux tells of a process");
        let peak = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        let kib: u64 = peak.and_then(|kib| kib.parse().ok()).expect("its peak");
        kib / 1024
    }

    /// An address of the lines on stdout, by the word that the line begins with.
    pub(crate) fn address(&self, word: &str) -> String {
        self.wait_for(&format!("the {word} address"), || {
            let out = self.out.lock().expect("stdout");
            let line = out.iter().find(|l| l.trim_start().starts_with(word))?;
            let address = line.split_whitespace().nth(1)?;
            Some(address.trim_start_matches("http://").to_string())
        })
    }

    /// The admin address of a host that has not started yet: what it prints once it runs, it logs before.
    pub(crate) fn admin_of_a_start(&self) -> String {
        self.wait_for("the admin listener", || {
            let log = self.log();
            let (_, rest) = log.split_once("admin listens on http://")?;
            Some(rest.split_whitespace().next()?.to_owned())
        })
    }

    /// Waits until `/readyz` answers 200 and every stage has said what it was assigned.
    pub(crate) fn ready(&self) {
        let admin = self.address("admin");
        self.wait_for("readiness", || {
            (get(&admin, "/readyz").0 == 200).then_some(())
        });
    }

    /// Waits for an answer, and fails at once when the host has ended.
    pub(crate) fn wait_for<T>(&self, what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
        let id = self.process.id();
        until(what, || {
            assert!(
                !is_zombie(id),
                "the host ended while it was waited for {what}:\n{}",
                self.log()
            );
            ask()
        })
    }

    pub(crate) fn signal(&self, signal: i32) {
        let id = i32::try_from(self.process.id()).expect("a process id");
        // SAFETY: plain system call on the id of a child that was not waited for.
        #[allow(unsafe_code)]
        let result = unsafe { libc::kill(id, signal) };
        assert_eq!(result, 0, "the host is there to be signalled");
    }

    /// Waits until it has ended, as after a signal.
    pub(crate) fn wait_for_end(&mut self) -> ExitStatus {
        until("the host to end", || {
            self.process.try_wait().expect("the child's status")
        })
    }

    /// SIGTERM, and its exit status.
    pub(crate) fn stop(mut self) -> (ExitStatus, String) {
        self.signal(libc::SIGTERM);
        let status = until("the host to end", || {
            self.process.try_wait().expect("the child's status")
        });
        // Its last lines may still be on their way through the pipe.
        std::thread::sleep(Duration::from_millis(100));
        (status, self.log())
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.process.kill().expect("the host is killed");
        self.process.wait().expect("the host has ended");
    }

    /// Waits until it ends by itself.
    pub(crate) fn ended(mut self) -> (ExitStatus, String) {
        let status = until("the host to end", || {
            self.process.try_wait().expect("the child's status")
        });
        std::thread::sleep(Duration::from_millis(100));
        (status, self.log())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("--- the host's log:\n{}", self.log());
        }
    }
}

fn is_zombie(id: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    stat.is_empty() || stat.contains(") Z ")
}

fn collect(stream: impl std::io::Read + Send + 'static) -> Arc<Mutex<Vec<String>>> {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let kept = lines.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            kept.lock().expect("lines").push(line);
        }
    });
    lines
}

/// An HTTP request of its own connection: status, head and body.
pub(crate) fn http(address: &str, head: &str, body: &str) -> (u16, String, String) {
    let attempt = || -> std::io::Result<String> {
        let mut stream = std::net::TcpStream::connect(address)?;
        stream.set_read_timeout(Some(ANSWER))?;
        write!(
            stream,
            "{head}\r\nhost: {address}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        std::io::Read::read_to_string(&mut stream, &mut answer)?;
        Ok(answer)
    };
    let answer = attempt().unwrap_or_default();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
    (status.unwrap_or(0), head.to_string(), body.to_string())
}

/// `GET path`: status and body; 0 when nobody answers.
pub(crate) fn get(address: &str, path: &str) -> (u16, String) {
    let (status, _, body) = http(address, &format!("GET {path} HTTP/1.1"), "");
    (status, body)
}

/// Changes what Kafka's authorizer allows, as Kafka's own tool does.
pub(crate) fn acl(arguments: &[&str]) {
    kafka_tool("org.apache.kafka.tools.AclCommand", arguments);
}

/// Changes Kafka's settings, as its own tool does.
pub(crate) fn kafka_configs(arguments: &[&str]) {
    kafka_tool("kafka.admin.ConfigCommand", arguments);
}

fn kafka_tool(class: &str, arguments: &[&str]) {
    let (jars, brokers) = (server("KAFKA_JARS"), server("KAFKA_BROKERS"));
    let done = std::process::Command::new("java")
        .args(["-XX:TieredStopAtLevel=1", "-cp", &format!("{jars}/*")])
        .args([class, "--bootstrap-server", &brokers])
        .args(arguments)
        .output()
        .expect("java");
    let said =
        String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
}

/// A record as a test sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) key: Option<String>,
    pub(crate) value: Option<String>,
    pub(crate) headers: Vec<(String, Option<String>)>,
    pub(crate) timestamp: Option<i64>,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n == name)?;
        found.1.as_deref()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        let value = self.value.as_deref().unwrap_or("null");
        serde_json::from_str(value).expect("the value is JSON")
    }
}

/// Another program that writes in transactions. One that it leaves open stays so for longer than a test takes.
pub(crate) fn transactional_producer() -> BaseProducer {
    use rdkafka::producer::Producer as _;
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", server("KAFKA_BROKERS"))
        .set("transactional.id", unique("other"))
        .set("transaction.timeout.ms", "600000")
        .create()
        .expect("a producer");
    let has_id = producer.init_transactions(PATIENCE);
    has_id.expect("a producer's id");
    producer
}

/// A client of a log, that has no part in any group.
pub(crate) struct Log {
    brokers: String,
    producer: FutureProducer,
}

impl Log {
    pub(crate) fn new(brokers: &str) -> Self {
        let producer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("acks", "all")
            .set("partitioner", "murmur2_random")
            .set("message.max.bytes", "2000000")
            .create()
            .expect("a producer");
        Self {
            brokers: brokers.to_string(),
            producer,
        }
    }

    /// Appends values with their keys, in order, and waits for all acknowledgements.
    pub(crate) async fn produce(&self, topic: &str, records: &[(Option<&str>, &str)]) {
        let mut sent = Vec::with_capacity(records.len());
        for (key, value) in records {
            let mut record = FutureRecord::<str, str>::to(topic).payload(value);
            record.key = *key;
            sent.push(self.enqueue(record).await);
        }
        for delivery in sent {
            delivery
                .await
                .expect("an answer")
                .expect("the record is acknowledged");
        }
    }

    /// Appends values to a partition, in order, and waits for all acknowledgements.
    pub(crate) async fn produce_to(&self, topic: &str, partition: i32, values: &[String]) {
        let mut sent = Vec::with_capacity(values.len());
        for value in values {
            let record = FutureRecord::<str, str>::to(topic).payload(value);
            sent.push(self.enqueue(record.partition(partition)).await);
        }
        for delivery in sent {
            let delivery = delivery.await.expect("an answer");
            delivery.expect("the record is acknowledged");
        }
    }

    /// Appends one record with a header.
    pub(crate) async fn produce_with_header(
        &self,
        topic: &str,
        key: &str,
        value: &str,
        (name, header): (&str, &str),
    ) {
        let headers = OwnedHeaders::new().insert(rdkafka::message::Header {
            key: name,
            value: Some(header),
        });
        let record = FutureRecord::to(topic)
            .key(key)
            .payload(value)
            .headers(headers);
        let sent = self.enqueue(record).await;
        let delivery = sent.await.expect("an answer");
        delivery.expect("the record is acknowledged");
    }

    /// Appends one record with its time.
    pub(crate) async fn produce_at(&self, topic: &str, value: &str, timestamp: i64) {
        let record = FutureRecord::<str, str>::to(topic).payload(value);
        let sent = self.enqueue(record.timestamp(timestamp)).await;
        let delivery = sent.await.expect("an answer");
        delivery.expect("the record is acknowledged");
    }

    async fn enqueue(
        &self,
        mut record: FutureRecord<'_, str, str>,
    ) -> rdkafka::producer::DeliveryFuture {
        loop {
            match self.producer.send_result(record) {
                Ok(delivery) => return delivery,
                Err((_, back)) => record = back,
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// All records of a topic up to its end, by partition and offset.
    pub(crate) fn read(&self, topic: &str) -> Vec<Seen> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set("group.id", unique("reader"))
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            .create()
            .expect("a consumer");
        let mut list = TopicPartitionList::new();
        let partitions = self.partitions(&consumer, topic);
        for partition in &partitions {
            list.add_partition_offset(topic, *partition, Offset::Beginning)
                .expect("an offset");
        }
        consumer.assign(&list).expect("assigned");
        let (mut seen, mut at_end) = (Vec::new(), 0);
        let deadline = Instant::now() + PATIENCE;
        while at_end < partitions.len() {
            assert!(Instant::now() < deadline, "{topic} was not read to its end");
            match consumer.poll(Duration::from_millis(100)) {
                Some(Ok(message)) => seen.push(see(&message)),
                Some(Err(rdkafka::error::KafkaError::PartitionEOF(_))) => at_end += 1,
                Some(Err(_)) | None => {}
            }
        }
        seen.sort_by_key(|s| (s.partition, s.offset));
        seen
    }

    /// Reads the first partition of a topic from its beginning, record by record as it is polled.
    pub(crate) fn follow(&self, topic: &str) -> BaseConsumer {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set("group.id", unique("reader"))
            .set("enable.auto.commit", "false")
            .create()
            .expect("a consumer");
        let mut list = TopicPartitionList::new();
        let added = list.add_partition_offset(topic, 0, Offset::Beginning);
        added.expect("an offset");
        consumer.assign(&list).expect("it is assigned");
        consumer
    }

    /// Reads a topic until it has at least `count` records.
    pub(crate) fn read_at_least(&self, topic: &str, count: usize) -> Vec<Seen> {
        until(&format!("{count} records of {topic}"), || {
            Some(self.read(topic)).filter(|seen| seen.len() >= count)
        })
    }

    /// The names of all topics.
    pub(crate) fn topics(&self) -> Vec<String> {
        use rdkafka::producer::Producer as _;
        let metadata = self.producer.client().fetch_metadata(None, ASK);
        let metadata = metadata.expect("the log's topics");
        let topics = metadata.topics().iter();
        topics.map(|topic| topic.name().to_owned()).collect()
    }

    fn partitions(&self, consumer: &BaseConsumer, topic: &str) -> Vec<i32> {
        until(&format!("topic {topic}"), || {
            let metadata = consumer.fetch_metadata(Some(topic), ASK).ok()?;
            let partitions = metadata.topics().first()?.partitions();
            let ids: Vec<_> = partitions
                .iter()
                .map(rdkafka::metadata::MetadataPartition::id)
                .collect();
            (!ids.is_empty()).then_some(ids)
        })
    }

    /// How many members the group has.
    pub(crate) fn members(&self, group: &str) -> usize {
        use rdkafka::producer::Producer as _;
        let groups = self.producer.client().fetch_group_list(Some(group), ASK);
        let groups = groups.expect("the log's groups");
        let members = groups.groups().iter().map(|group| group.members().len());
        members.sum()
    }

    /// Records between the group's committed offsets and the ends of the topic's partitions.
    pub(crate) fn lag(&self, group: &str, topic: &str) -> i64 {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set("group.id", group)
            .create()
            .expect("a consumer");
        let mut list = TopicPartitionList::new();
        for partition in self.partitions(&consumer, topic) {
            list.add_partition(topic, partition);
        }
        let committed = until("committed offsets", || {
            consumer.committed_offsets(list.clone(), ASK).ok()
        });
        let lags = committed.elements().into_iter().map(|element| {
            let (low, high) = until("watermarks", || {
                consumer
                    .fetch_watermarks(topic, element.partition(), ASK)
                    .ok()
            });
            match element.offset() {
                Offset::Offset(offset) => high - offset,
                _ => high - low,
            }
        });
        lags.sum()
    }

    /// Waits until the group has committed all of the topic.
    pub(crate) fn wait_committed(&self, group: &str, topic: &str) {
        until(&format!("{group} to commit all of {topic}"), || {
            (self.lag(group, topic) == 0).then_some(())
        });
    }
}

fn see(message: &rdkafka::message::BorrowedMessage<'_>) -> Seen {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let headers = message.headers().map_or_else(Vec::new, |headers| {
        headers
            .iter()
            .map(|h| (h.key.to_string(), h.value.map(text)))
            .collect()
    });
    Seen {
        partition: message.partition(),
        offset: message.offset(),
        key: message.key().map(text),
        value: message.payload().map(text),
        headers,
        timestamp: message.timestamp().to_millis(),
    }
}
