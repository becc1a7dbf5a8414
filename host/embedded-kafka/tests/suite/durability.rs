//! What was acknowledged is there, whatever happens to the process, the end of a file, or the disk.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use embedded_kafka::{Broker, Config, StartError};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{ClientConfig, Offset};

use crate::cluster::{Cluster, PATIENCE, eventually, read, runtime, text};
use crate::raw::{Batch, Connection};

const PARTITIONS: i32 = 3;
const TOPIC: &str = "numbers";

/// A broker in a process of its own.
struct Process {
    child: Child,
    address: String,
}

impl Process {
    fn start(folder: &Path, address: &str) -> Self {
        Self::run(
            Command::new(env!("CARGO_BIN_EXE_embedded-kafka"))
                .arg(folder)
                .arg(address),
        )
    }

    fn run(command: &mut Command) -> Self {
        let command = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut address)
            .unwrap();
        Self {
            child,
            address: address.trim().to_owned(),
        }
    }

    /// `kill -9`.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.address)
            .set("reconnect.backoff.max.ms", "200");
        config
    }
}

/// Several producers that count up, and what of it was acknowledged: partition and offset of each value.
struct Load {
    acknowledged: Arc<Mutex<HashMap<String, (i32, i64)>>>,
    count: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    const PRODUCERS: usize = 3;
    const IN_FLIGHT: usize = 64;

    fn start(runtime: &tokio::runtime::Runtime, config: &ClientConfig) -> Self {
        let (acknowledged, count, stop) = Default::default();
        let mut load = Self {
            acknowledged,
            count,
            stop,
            tasks: Vec::new(),
        };
        for name in 0..Self::PRODUCERS {
            let mut config = config.clone();
            config
                .set("enable.idempotence", "true")
                .set("linger.ms", "0")
                .set("message.timeout.ms", "80000");
            let producer: FutureProducer = config.create().unwrap();
            let (acknowledged, count, stop) = (
                load.acknowledged.clone(),
                load.count.clone(),
                load.stop.clone(),
            );
            load.tasks.push(runtime.spawn(async move {
                let slots = Arc::new(tokio::sync::Semaphore::new(Self::IN_FLIGHT));
                for i in 0.. {
                    let slot = slots.clone().acquire_owned().await.unwrap();
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let value = format!("{name}:{i}");
                    let record = FutureRecord::<(), str>::to(TOPIC)
                        .partition(i % PARTITIONS)
                        .payload(&value);
                    // In the queue, so in order, when this returns.
                    let delivery = producer.send_result(record).unwrap();
                    let (acknowledged, count) = (acknowledged.clone(), count.clone());
                    tokio::spawn(async move {
                        let delivery = delivery.await.unwrap().unwrap();
                        acknowledged
                            .lock()
                            .unwrap()
                            .insert(value, (delivery.partition, delivery.offset));
                        count.fetch_add(1, Ordering::Relaxed);
                        drop(slot);
                    });
                }
                let _ = slots.acquire_many(Self::IN_FLIGHT as u32).await.unwrap();
            }));
        }
        load
    }

    fn acknowledged(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Ends the load and gives all that was acknowledged.
    fn finish(self, runtime: &tokio::runtime::Runtime) -> HashMap<String, (i32, i64)> {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            runtime
                .block_on(async { tokio::time::timeout(PATIENCE, task).await })
                .unwrap()
                .unwrap();
        }
        std::mem::take(&mut self.acknowledged.lock().unwrap())
    }
}

#[test]
fn kill_9_loses_nothing_and_keeps_the_order() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path()).unwrap();
    let mut process = Process::start(folder.path(), "127.0.0.1:0");
    let config = process.config();
    let runtime = runtime();
    create_topic(&runtime, &config);
    let load = Load::start(&runtime, &config);
    for round in 1..=4 {
        eventually("more is acknowledged", || {
            load.acknowledged() > round * 3_000
        });
        let address = process.address.clone();
        process.kill();
        process = Process::start(folder.path(), &address);
        assert_eq!(process.address, address);
    }
    eventually("it goes on", || load.acknowledged() > 15_000);
    let acknowledged = load.finish(&runtime);
    process.kill();
    check_numbers(
        Cluster::embedded_with(Config::new(folder.path()), folder),
        &acknowledged,
    );
}

/// Compaction goes on all the time, and the process is killed again and again: of each key, what was acknowledged last is
/// there, at its offset.
#[test]
fn a_compacted_topic_survives_kill_9_at_any_moment() {
    const KEYS: usize = 20;
    const ROUNDS: usize = 8;
    let folder = tempfile::tempdir().unwrap();
    let start = |address: &str| {
        Process::run(
            Command::new(env!("CARGO_BIN_EXE_embedded-kafka"))
                .arg(folder.path())
                .args([address, "1"]),
        )
    };
    let mut process = start("127.0.0.1:0");
    let runtime = runtime();
    let compacted = [
        ("cleanup.policy", "compact"),
        ("segment.bytes", "2000"),
        ("min.cleanable.dirty.ratio", "0"),
        ("delete.retention.ms", "0"),
    ];
    create_topic_with(&runtime, &process.config(), &compacted);
    let mut latest: HashMap<String, (i64, Option<String>)> = HashMap::new();
    for round in 0..ROUNDS {
        let mut config = process.config();
        let producer: FutureProducer = config.set("linger.ms", "0").create().unwrap();
        for i in 0..150 + round * 37 {
            let key = format!("key {}", i * 7 % KEYS);
            let value = (i % 5 > 0).then(|| format!("{round} {i} {}", "x".repeat(40)));
            let mut record = FutureRecord::<str, str>::to(TOPIC).partition(0).key(&key);
            record.payload = value.as_deref();
            let delivery = runtime.block_on(producer.send(record, PATIENCE)).unwrap();
            latest.insert(key, (delivery.offset, value));
        }
        let address = process.address.clone();
        process.kill();
        process = start(&address);
        assert_eq!(process.address, address);
    }
    process.kill();
    let cluster = Cluster::embedded_with(Config::new(folder.path()), folder);
    let end = latest.values().map(|(offset, _)| *offset).max().unwrap();
    let reader = cluster.reader(TOPIC, 0, Offset::Beginning, &[]);
    let (mut found, mut count) = (HashMap::new(), 0);
    loop {
        let seen = read(&reader, 1).remove(0);
        let offset = seen.offset;
        found.insert(
            text(seen.key),
            (offset, seen.value.map(|value| text(Some(value)))),
        );
        count += 1;
        if offset == end {
            break;
        }
    }
    for (key, (offset, value)) in &latest {
        match value {
            Some(_) => assert_eq!(found.get(key), Some(&(*offset, value.clone())), "{key}"),
            // Its tombstone may be gone, but nothing that was before it is left.
            None => assert!(
                found.get(key).is_none_or(|found| found.0 == *offset),
                "{key}"
            ),
        }
    }
    assert!(count < end / 2, "{count} records of {end} are left");
}

/// Each acknowledged value is where the broker said, and each producer's values are in order, none twice.
fn check_numbers(cluster: Cluster, acknowledged: &HashMap<String, (i32, i64)>) {
    let mut found = HashMap::new();
    for partition in 0..PARTITIONS {
        let reader: BaseConsumer = cluster.config().create().unwrap();
        let (_, end) = reader.fetch_watermarks(TOPIC, partition, PATIENCE).unwrap();
        let mut last: HashMap<String, i32> = HashMap::new();
        for seen in cluster.read(TOPIC, partition, end as usize) {
            let value = text(seen.value);
            let (producer, number) = value.split_once(':').unwrap();
            let number: i32 = number.parse().unwrap();
            let before = last.insert(producer.to_owned(), number);
            let expected = before.map_or(number % PARTITIONS, |before| before + PARTITIONS);
            assert_eq!(
                number, expected,
                "of producer {producer} in partition {partition}"
            );
            found.insert(value, (partition, seen.offset));
        }
    }
    for (value, place) in acknowledged {
        assert_eq!(found.get(value), Some(place), "{value}");
    }
}

#[test]
fn committed_offsets_and_topics_survive_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start(folder.path(), "127.0.0.1:0");
    let runtime = runtime();
    create_topic(&runtime, &process.config());
    let consumer: BaseConsumer = process.config().set("group.id", "g").create().unwrap();
    let mut offsets = rdkafka::TopicPartitionList::new();
    offsets
        .add_partition_offset(TOPIC, 2, Offset::Offset(77))
        .unwrap();
    consumer.commit(&offsets, CommitMode::Sync).unwrap();
    let address = process.address.clone();
    process.kill();
    let process = Process::start(folder.path(), &address);
    let consumer: BaseConsumer = process.config().set("group.id", "g").create().unwrap();
    let mut wanted = rdkafka::TopicPartitionList::new();
    wanted.add_partition(TOPIC, 2);
    let committed = consumer.committed_offsets(wanted, PATIENCE).unwrap();
    assert_eq!(committed.elements()[0].offset(), Offset::Offset(77));
    process.kill();
}

/// The size of a file is limited, which is how a full disk looks to the broker: writes fail half done.
#[test]
fn a_write_that_fails_is_answered_with_an_error_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let limited = "trap '' XFSZ; ulimit -f 200; exec \"$0\" \"$@\"";
    let mut command = Command::new("bash");
    command
        .args(["-c", limited, env!("CARGO_BIN_EXE_embedded-kafka")])
        .arg(folder.path());
    let process = Process::run(&mut command);
    let runtime = runtime();
    create_topic(&runtime, &process.config());
    let mut config = process.config();
    config
        .set("message.timeout.ms", "1500")
        .set("linger.ms", "0");
    let producer: FutureProducer = config.create().unwrap();
    let mut acknowledged = Vec::new();
    let mut refused = 0;
    while refused < 3 {
        let value = format!("{:06}{}", acknowledged.len() + refused, "x".repeat(10_000));
        let record = FutureRecord::<(), str>::to(TOPIC)
            .partition(0)
            .payload(&value);
        match runtime.block_on(producer.send(record, PATIENCE)) {
            Ok(delivery) => {
                assert_eq!(delivery.offset, acknowledged.len() as i64);
                acknowledged.push(value);
            }
            Err(_) => refused += 1,
        }
        assert!(acknowledged.len() < 1000, "the limit does not hold");
    }
    // Smaller ones still fit, at the next offset, and other partitions are none the worse.
    let small = FutureRecord::<(), str>::to(TOPIC)
        .partition(1)
        .payload("small");
    assert_eq!(
        runtime
            .block_on(producer.send(small, PATIENCE))
            .unwrap()
            .offset,
        0
    );
    process.kill();
    let cluster = Cluster::embedded_with(Config::new(folder.path()), folder);
    assert_eq!(cluster.values(TOPIC, 0, acknowledged.len()), acknowledged);
    cluster.produce(TOPIC, 0, &["next"]);
    let next = cluster.reader(TOPIC, 0, Offset::Offset(acknowledged.len() as i64), &[]);
    assert_eq!(text(read(&next, 1).remove(0).value), "next");
}

#[test]
fn a_torn_tail_is_cut_wherever_it_is_torn() {
    let cluster = Cluster::embedded();
    let topic = cluster.topic(1);
    cluster.produce(&topic, 0, &["a", "b"]);
    let mut folder = cluster.stop();
    let segment = segments(folder.path(), &topic).remove(0);
    let whole = std::fs::metadata(&segment).unwrap().len();
    let batch = Batch {
        producer: -1,
        epoch: -1,
        sequence: -1,
        count: 3,
    };
    let mut bytes = batch.bytes();
    bytes[..8].copy_from_slice(&2i64.to_be_bytes());
    let torn: Vec<Vec<u8>> = [1, 11, 12, 60, 61, 62, bytes.len() - 1]
        .into_iter()
        .map(|len| bytes[..len].to_vec())
        .chain([vec![0; 5000], {
            let mut bad = bytes.clone();
            bad[70] ^= 1;
            bad
        }])
        .collect();
    for tail in torn {
        OpenOptions::new()
            .append(true)
            .open(&segment)
            .unwrap()
            .write_all(&tail)
            .unwrap();
        let cluster = Cluster::embedded_with(Config::new(folder.path()), folder);
        assert_eq!(
            std::fs::metadata(&segment).unwrap().len(),
            whole,
            "{} bytes",
            tail.len()
        );
        assert_eq!(cluster.values(&topic, 0, 2), ["a", "b"]);
        folder = cluster.stop();
    }
    let cluster = Cluster::embedded_with(Config::new(folder.path()), folder);
    cluster.produce(&topic, 0, &["c"]);
    assert_eq!(cluster.values(&topic, 0, 3), ["a", "b", "c"]);
}

#[test]
fn damage_before_good_records_is_not_cut_but_said() {
    let cluster = Cluster::embedded();
    let topic = cluster.topic(1);
    for value in ["a", "b", "c"] {
        cluster.produce(&topic, 0, &[value]);
    }
    let folder = cluster.stop();
    let segment = segments(folder.path(), &topic).remove(0);
    let good = std::fs::read(&segment).unwrap();
    let batch_len = good.len() as u64 / 3;
    // In the second batch: a bit of its offset, of its length, of its format, of its records.
    for at in [7, 10, 16, 66] {
        let at = batch_len as usize + at;
        let mut bad = good.clone();
        bad[at] ^= 1;
        std::fs::write(&segment, &bad).unwrap();
        let error = runtime()
            .block_on(Broker::start(Config::new(folder.path())))
            .unwrap_err();
        let StartError::Corrupt { file, position, .. } = &error else {
            panic!("byte {at}: {error}")
        };
        assert_eq!(
            (file, *position),
            (&segment, batch_len),
            "byte {at}: {error}"
        );
        assert_eq!(
            std::fs::read(&segment).unwrap(),
            bad,
            "the file is left alone"
        );
    }
    // As the message says: without the rest, the broker starts with what is before the damage.
    OpenOptions::new()
        .write(true)
        .open(&segment)
        .unwrap()
        .set_len(batch_len)
        .unwrap();
    let cluster = Cluster::embedded_with(Config::new(folder.path()), folder);
    assert_eq!(cluster.values(&topic, 0, 1), ["a"]);
}

/// The machine went away: of what was being written, the start may be missing and the end there.
#[test]
fn after_a_crash_the_same_is_set_aside_and_the_broker_starts() {
    let cluster = Cluster::embedded();
    let topic = cluster.topic(1);
    for value in ["a", "b", "c"] {
        cluster.produce(&topic, 0, &[value]);
    }
    let folder = cluster.stop();
    let segment = segments(folder.path(), &topic).remove(0);
    Process::start(folder.path(), "127.0.0.1:0").kill();
    let mut bytes = std::fs::read(&segment).unwrap();
    let batch_len = bytes.len() / 3;
    bytes[batch_len..batch_len * 2].fill(0);
    std::fs::write(&segment, &bytes).unwrap();
    let cluster = Cluster::embedded_with(Config::new(folder.path()), folder);
    assert_eq!(cluster.values(&topic, 0, 1), ["a"]);
    cluster.produce(&topic, 0, &["d"]);
    assert_eq!(cluster.values(&topic, 0, 2), ["a", "d"]);
    let _folder = cluster.stop();
    let aside = segment.with_extension("log.torn");
    assert_eq!(std::fs::read(aside).unwrap(), bytes[batch_len..]);
}

#[test]
fn damage_in_an_older_segment_is_not_served() {
    let cluster = Cluster::embedded();
    let topic = cluster.topic_with(1, &[("segment.bytes", "200")]);
    for value in ["good", "damaged", "after", "last"] {
        cluster.produce(&topic, 0, &[&value.repeat(20)]);
    }
    let folder = cluster.stop();
    let segment = segments(folder.path(), &topic).remove(1);
    let mut bytes = std::fs::read(&segment).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let cluster = Cluster::embedded_with(Config::new(folder.path()), folder);
    assert_eq!(cluster.values(&topic, 0, 1), ["good".repeat(20)]);
    let reader = cluster.reader(&topic, 0, Offset::Offset(1), &[]);
    let mut error = None;
    eventually("an error", || {
        error = reader.poll(Duration::from_millis(100));
        error.is_some()
    });
    let error = error.unwrap().expect_err("not the damaged record");
    assert_eq!(
        error.rdkafka_error_code(),
        Some(rdkafka::error::RDKafkaErrorCode::InvalidMessage),
        "{error}"
    );
    drop(reader);
    // What is after the damage can be read by whoever goes there.
    let after = cluster.reader(&topic, 0, Offset::Offset(2), &[]);
    assert_eq!(text(read(&after, 1).remove(0).value), "after".repeat(20));
}

#[test]
fn a_missing_segment_is_said() {
    let cluster = Cluster::embedded();
    let topic = cluster.topic_with(1, &[("segment.bytes", "100")]);
    for value in ["a", "b", "c"] {
        cluster.produce(&topic, 0, &[&value.repeat(60)]);
    }
    let folder = cluster.stop();
    std::fs::remove_file(&segments(folder.path(), &topic)[1]).unwrap();
    let error = runtime()
        .block_on(Broker::start(Config::new(folder.path())))
        .unwrap_err();
    assert!(matches!(error, StartError::Corrupt { .. }), "{error}");
}

#[test]
fn a_missing_journal_does_not_begin_an_empty_cluster_over_records() {
    let cluster = Cluster::embedded();
    cluster.topic(1);
    let topic = cluster.topic(1);
    cluster.produce(&topic, 0, &["a"]);
    let folder = cluster.stop();
    let journal = folder.path().join("journal");
    let bytes = std::fs::read(&journal).unwrap();
    std::fs::remove_file(&journal).unwrap();
    let error = runtime()
        .block_on(Broker::start(Config::new(folder.path())))
        .unwrap_err();
    assert!(matches!(error, StartError::Corrupt { .. }), "{error}");
    std::fs::write(&journal, bytes).unwrap();
    let cluster = Cluster::embedded_with(Config::new(folder.path()), folder);
    assert_eq!(cluster.values(&topic, 0, 1), ["a"]);
}

#[test]
fn a_repeat_is_known_after_a_restart() {
    let cluster = Cluster::embedded();
    let topic = cluster.topic(1);
    let mut connection = Connection::open(cluster.address());
    let producer = connection.producer_id();
    let batch = |sequence| {
        Batch {
            producer,
            epoch: 0,
            sequence,
            count: 2,
        }
        .bytes()
    };
    assert_eq!(connection.produce(&topic, &batch(0)), (0, 0));
    assert_eq!(connection.produce(&topic, &batch(2)), (0, 2));
    let folder = cluster.stop();
    let cluster = Cluster::embedded_with(Config::new(folder.path()), folder);
    let mut connection = Connection::open(cluster.address());
    assert_eq!(connection.produce(&topic, &batch(0)), (0, 0));
    assert_eq!(connection.produce(&topic, &batch(2)), (0, 2));
    assert_eq!(connection.produce(&topic, &batch(4)), (0, 4));
    assert_eq!(
        connection.produce(&topic, &batch(8)),
        (45, -1),
        "OUT_OF_ORDER_SEQUENCE_NUMBER"
    );
    assert!(
        connection.producer_id() > producer,
        "a producer id is not given twice"
    );
}

#[test]
fn a_process_ends_with_its_input_and_says_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let mut process = Process::start(folder.path(), "127.0.0.1:0");
    drop(process.child.stdin.take());
    assert!(process.child.wait().unwrap().success());
    let mut child = Command::new(env!("CARGO_BIN_EXE_embedded-kafka"))
        .arg(folder.path())
        .arg("0.0.0.0:9092")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut errors = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut errors)
        .unwrap();
    assert!(!child.wait().unwrap().success());
    assert!(errors.contains("not a loopback address"), "{errors}");
}

fn create_topic(runtime: &tokio::runtime::Runtime, config: &ClientConfig) {
    create_topic_with(runtime, config, &[]);
}

fn create_topic_with(
    runtime: &tokio::runtime::Runtime,
    config: &ClientConfig,
    settings: &[(&str, &str)],
) {
    use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
    let admin: AdminClient<_> = config.create().unwrap();
    let topic = NewTopic::new(TOPIC, PARTITIONS, TopicReplication::Fixed(1));
    let topic = settings
        .iter()
        .fold(topic, |topic, (key, value)| topic.set(key, value));
    let created = runtime
        .block_on(admin.create_topics(&[topic], &AdminOptions::new()))
        .unwrap();
    assert_eq!(created, [Ok(TOPIC.to_owned())]);
}

fn segments(folder: &Path, topic: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(partition_folder(folder, topic))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

/// The folder of the topic's partition 0, which the journal knows.
pub(crate) fn partition_folder(folder: &Path, topic: &str) -> PathBuf {
    let journal = std::fs::read_to_string(folder.join("journal")).unwrap();
    let mut entries = journal
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(&line[9..]).unwrap());
    let created = entries
        .rfind(|entry| entry["entry"] == "topic" && entry["name"] == topic)
        .expect("the topic");
    folder
        .join("topics")
        .join(created["id"].as_str().unwrap())
        .join("0")
}
