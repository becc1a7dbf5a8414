//! Other people's clients: they produce in every codec, consume in groups, and administer. Their programs are in
//! `tests/clients`; `scripts/kafka-clients` gets what they need.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::cluster::{Cluster, PATIENCE, unique};

pub(crate) fn kafka_python(cluster: &Cluster) {
    python(cluster, "kafka-python");
}

pub(crate) fn aiokafka(cluster: &Cluster) {
    python(cluster, "aiokafka");
}

pub(crate) fn confluent_kafka(cluster: &Cluster) {
    python(cluster, "confluent-kafka");
}

pub(crate) fn kafkajs(cluster: &Cluster) {
    let mut node = Command::new("node");
    node.arg(sources().join("javascript/kafkajs.js"))
        .args([&cluster.brokers, &unique("kafkajs")]);
    run(&mut node, "");
}

pub(crate) fn franz_go(cluster: &Cluster) {
    go(cluster, "franz-go");
}

pub(crate) fn kafka_go(cluster: &Cluster) {
    go(cluster, "kafka-go");
}

pub(crate) fn sarama(cluster: &Cluster) {
    go(cluster, "sarama");
}

/// Apache Kafka's own, which are Java's client too.
pub(crate) fn kafkas_own_tools(cluster: &Cluster) {
    let (topic, group) = (&*unique("tools"), &*unique("tools"));
    let of_topic = ["--entity-type", "topics", "--entity-name", topic];
    let create = [
        "--create",
        "--topic",
        topic,
        "--partitions",
        "2",
        "--config",
        "segment.bytes=2097152",
    ];
    tool(cluster, TOPICS, &create, "");
    let described = tool(cluster, TOPICS, &["--describe", "--topic", topic], "");
    assert!(
        described.contains("PartitionCount: 2") && described.contains("TopicId: "),
        "{described}"
    );
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
        let produce = [
            "--topic",
            topic,
            "--compression-codec",
            codec,
            "--property",
            "parse.key=true",
        ];
        let keyed = format!("a\t{codec} one\nb\t{codec} two\n");
        tool(cluster, PRODUCER, &produce, &keyed);
    }
    let consume = [
        "--topic",
        topic,
        "--group",
        group,
        "--from-beginning",
        "--max-messages",
        "10",
    ];
    let consumed = tool(cluster, CONSUMER, &consume, "");
    let mut lines: Vec<&str> = consumed.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines.len(), 10, "{consumed}");
    assert_eq!((lines[0], lines[9]), ("gzip one", "zstd two"));
    let listed = tool(cluster, GROUPS, &["--list", "--state", "Empty"], "");
    assert!(listed.contains(group), "{listed}");
    let described = tool(cluster, GROUPS, &["--describe", "--group", group], "");
    assert!(described.contains(topic), "{described}");
    let forget = ["--delete-offsets", "--group", group, "--topic", topic];
    let forgotten = tool(cluster, GROUPS, &forget, "");
    assert!(forgotten.contains("Successful"), "{forgotten}");
    let alter = [
        &["--alter", "--add-config", "retention.ms=77777"][..],
        &of_topic,
    ]
    .concat();
    tool(cluster, CONFIGS, &alter, "");
    let described = tool(
        cluster,
        CONFIGS,
        &[&["--describe"][..], &of_topic].concat(),
        "",
    );
    assert!(described.contains("retention.ms=77777"), "{described}");
    let newest = tool(
        cluster,
        OFFSETS,
        &["--topic", topic, "--time", "max-timestamp"],
        "",
    );
    assert!(newest.contains(&format!("{topic}:")), "{newest}");
    let sizes = tool(
        cluster,
        LOG_DIRS,
        &["--describe", "--topic-list", topic],
        "",
    );
    assert!(sizes.contains(&format!("{topic}-1")), "{sizes}");
    tool(cluster, TOPICS, &["--delete", "--topic", topic], "");
}

/// What a client says that the broker does not have what it wants. Of the embedded broker only.
pub(crate) fn java_is_told_what_there_is_not(cluster: &Cluster) {
    let topic = &*cluster.topic(1);
    let said = tool_fails(
        cluster,
        CONSUMER,
        &[
            "--topic",
            topic,
            "--group",
            &unique("g"),
            "--consumer-property",
            "group.protocol=consumer",
        ],
    );
    assert!(said.contains("Set group.protocol=classic"), "{said}");
    let transaction = [
        "--topic",
        topic,
        "--transactional-id",
        "t",
        "--num-records",
        "1",
        "--record-size",
        "1",
        "--throughput",
        "1",
        "--producer-props",
        &format!("bootstrap.servers={}", cluster.brokers),
    ];
    let said = fails(java(PERFORMANCE).args(transaction));
    assert!(
        said.contains("has no transactions; use Apache Kafka"),
        "{said}"
    );
}

const PERFORMANCE: &str = "org.apache.kafka.tools.ProducerPerformance";
const TOPICS: &str = "org.apache.kafka.tools.TopicCommand";
const PRODUCER: &str = "org.apache.kafka.tools.ConsoleProducer";
const CONSUMER: &str = "org.apache.kafka.tools.consumer.ConsoleConsumer";
const GROUPS: &str = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand";
const CONFIGS: &str = "kafka.admin.ConfigCommand";
const OFFSETS: &str = "org.apache.kafka.tools.GetOffsetShell";
const LOG_DIRS: &str = "org.apache.kafka.tools.LogDirsCommand";

fn python(cluster: &Cluster, client: &str) {
    let mut python = Command::new(clients().join("python/bin/python"));
    python.arg(sources().join("python/clients.py")).args([
        client,
        &cluster.brokers,
        &unique(client),
    ]);
    run(&mut python, "");
}

fn go(cluster: &Cluster, client: &str) {
    let mut clients = Command::new(clients().join("clients"));
    clients.args([client, &cluster.brokers, &unique(client)]);
    run(&mut clients, "");
}

fn tool(cluster: &Cluster, class: &str, arguments: &[&str], input: &str) -> String {
    let mut tool = java(class);
    tool.args(["--bootstrap-server", &cluster.brokers])
        .args(arguments);
    run(&mut tool, input)
}

fn tool_fails(cluster: &Cluster, class: &str, arguments: &[&str]) -> String {
    let mut tool = java(class);
    fails(
        tool.args(["--bootstrap-server", &cluster.brokers])
            .args(arguments),
    )
}

fn java(class: &str) -> Command {
    let jars = std::env::var("KAFKA_JARS")
        .expect("KAFKA_JARS is not set: run `make test`, which sees to it");
    let mut java = Command::new("java");
    // They live for a second each: to compile much takes longer than it saves.
    java.args([
        "-XX:TieredStopAtLevel=1",
        "-XX:+UseSerialGC",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=error",
    ])
    .args(["-cp", &format!("{jars}/*"), class]);
    java
}

/// Where the programs are.
fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients")
}

/// Where what they need is.
fn clients() -> PathBuf {
    std::env::var("KAFKA_CLIENTS")
        .expect("KAFKA_CLIENTS is not set: run `make test`, which sees to it")
        .into()
}

/// Runs a program to its end, within a time, and gives what it printed.
fn run(command: &mut Command, input: &str) -> String {
    let (status, printed, said) = end(command, input);
    let ended_well = status.is_some_and(|status| status.success());
    assert!(ended_well, "{command:?}: {status:?}\n{printed}\n{said}");
    printed
}

/// Runs a program that ends by itself for want of something, and gives all that it said.
fn fails(command: &mut Command) -> String {
    let (status, printed, said) = end(command, "");
    assert!(status.is_some(), "{command:?} waits:\n{printed}\n{said}");
    printed + &said
}

/// How a program ended (`None`: it had to be killed), and what it wrote.
fn end(command: &mut Command, input: &str) -> (Option<ExitStatus>, String, String) {
    let mut given = tempfile::tempfile().expect("a file");
    given.write_all(input.as_bytes()).expect("written");
    given.rewind().expect("rewound");
    let mut printed = tempfile::tempfile().expect("a file");
    let mut said = tempfile::tempfile().expect("a file");
    let mut child = command
        .stdin(Stdio::from(given))
        .stdout(printed.try_clone().expect("a file"))
        .stderr(said.try_clone().expect("a file"))
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().expect("a status") {
            break Some(status);
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let text = |file: &mut File| {
        let mut text = String::new();
        file.rewind().expect("rewound");
        file.read_to_string(&mut text).expect("UTF-8");
        text
    };
    (status, text(&mut printed), text(&mut said))
}
