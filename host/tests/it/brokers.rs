//! A cluster of which one broker hangs: what lies on the other goes on, what lies on it waits and says so.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use rdkafka::consumer::BaseConsumer;
use rdkafka::message::Message;

use self::cluster::{Cluster, Turn};
use crate::support::{Host, Log, component, get, http, unique};

mod cluster;
mod forgetful;
mod leaderless;
mod older;
mod proxy;
mod without_ids;

/// How long messages may take while a broker hangs, of which one after the other is sent. Its stage's thread was held up for
/// 3.5 of every 4.5 s before.
const ROUNDS: i64 = 10;
const PROMPT: Duration = Duration::from_secs(15);
const DELIVERIES: [&str; 2] = ["transactional", "at-least-once"];

/// A stage of each delivery, that reads one topic and passes its messages on to another of its own.
struct Bench {
    host: Host,
    log: Log,
    input: String,
    pipeline: String,
    /// Of each delivery.
    outputs: BTreeMap<&'static str, Output>,
}

/// What has come out of a stage.
struct Output {
    consumer: BaseConsumer,
    /// Of each partition of the input, in their order.
    numbers: BTreeMap<i32, Vec<i64>>,
}

impl Output {
    fn new(log: &Log, topic: &str) -> Self {
        Self {
            consumer: log.follow(topic),
            numbers: BTreeMap::new(),
        }
    }

    /// What has come by now; waits for a moment where there is nothing.
    fn read(&mut self) -> &BTreeMap<i32, Vec<i64>> {
        while let Some(Ok(message)) = self.consumer.poll(Duration::from_millis(20)) {
            let value = String::from_utf8_lossy(message.payload().unwrap_or_default());
            // Others are posted.
            if let Some((partition, number)) = value.split_once(':')
                && let (Ok(partition), Ok(number)) = (partition.parse(), number.parse())
            {
                self.numbers.entry(partition).or_default().push(number);
            }
        }
        &self.numbers
    }
}

/// How many messages of each of the input's partitions there are.
type Counts = BTreeMap<i32, i64>;

impl Bench {
    /// The input's partitions, and those of each output, lie on these brokers.
    async fn start(
        cluster: &Cluster,
        inputs: &[&[i32]],
        outputs: &[&[i32]],
        settings: &[(&str, &str)],
    ) -> Self {
        let input = unique("in");
        cluster.create(&input, inputs, &[]).await;
        cluster.create(&format!("{input}.dlq"), &[&[1]], &[]).await;
        let mut stages = String::new();
        for delivery in DELIVERIES {
            cluster
                .create(&output(&input, delivery), outputs, settings)
                .await;
            stages += &stage(&input, delivery);
        }
        let pipeline = pipeline(&cluster.brokers, &input, &stages);
        let log = Log::new(&cluster.first());
        Self {
            host: Host::start(&pipeline),
            outputs: DELIVERIES
                .map(|delivery| (delivery, Output::new(&log, &output(&input, delivery))))
                .into(),
            log,
            input,
            pipeline,
        }
    }

    /// The input's partitions lie on the first and the second broker by turns, and have had three messages each.
    async fn on_both(cluster: &Cluster) -> (Self, Counts) {
        let mut bench = Self::start(cluster, &[&[1], &[2], &[1], &[2]], &[&[1]], &[]).await;
        let counts: Counts = (0..4).map(|partition| (partition, 3)).collect();
        for (partition, count) in &counts {
            bench.send(*partition, 0..*count).await;
        }
        bench.arrived(&counts);
        (bench, counts)
    }

    /// The host ends, and another reads these partitions from where it was.
    async fn begin_again(&mut self, partitions: [i32; 2], counts: &mut Counts) {
        self.host.signal(libc::SIGTERM);
        self.host.wait_for_end();
        self.host = Host::spawn(self.host.folder(), &self.pipeline, &[]);
        self.send_each(partitions, counts).await;
    }

    /// All partitions are read again, those of the second broker too, and nothing was given up on.
    async fn goes_on(&mut self, mut counts: Counts) {
        for partition in [1, 3] {
            let count = counts[&partition];
            self.send(partition, count..count + 3).await;
            counts.insert(partition, count + 3);
        }
        self.arrived(&counts);
        self.host.ready();
        self.has_no_dead_letters();
    }

    /// Sends messages with these numbers to a partition of the input.
    async fn send(&self, partition: i32, numbers: Range<i64>) {
        let messages: Vec<_> = numbers.map(|n| format!("{partition}:{n}")).collect();
        self.log.produce_to(&self.input, partition, &messages).await;
    }

    /// Waits until so many messages of each partition have been passed on by both stages, and sees that it was once each and in
    /// order.
    fn arrived(&mut self, counts: &Counts) {
        for (delivery, output) in &mut self.outputs {
            let numbers = self.host.wait_for("the messages", || {
                let numbers = output.read();
                let is_there = |(partition, count): (&i32, &i64)| {
                    let there = numbers.get(partition).map_or(0, Vec::len);
                    i64::try_from(there).is_ok_and(|there| there >= *count)
                };
                counts.iter().all(is_there).then(|| numbers.clone())
            });
            for (partition, count) in counts {
                let expected: Vec<_> = (0..*count).collect();
                assert_eq!(numbers[partition], expected, "{delivery}, {partition}");
            }
        }
    }

    fn has_no_dead_letters(&self) {
        assert_eq!(self.log.read(&format!("{}.dlq", self.input)), []);
    }

    /// Posts to a stage's output: status, head and body of the answer.
    fn post(&self, delivery: &str) -> (u16, String, String) {
        let form = "content-type: application/x-www-form-urlencoded";
        let head = format!("POST /{delivery} HTTP/1.1\r\n{form}");
        http(&self.host.address("HTTP"), &head, "n=1")
    }

    /// Waits until readiness, the log and the metric say of each stage that so many of its lanes wait, and why.
    fn says(&self, lanes: usize, words: &[&str]) {
        let admin = self.host.address("admin");
        let says = |said: &str| words.iter().all(|word| said.contains(word));
        for delivery in DELIVERIES {
            let stage = format!("stage {delivery} on ");
            self.host
                .wait_for(&format!("readiness to say {words:?}"), || {
                    let (status, said) = get(&admin, "/readyz");
                    let lines = said.lines().filter(|l| l.contains(&stage) && says(l));
                    (status == 503 && lines.count() == lanes).then_some(())
                });
            let metric =
                format!("stagehost_lanes_waiting{{stage=\"{delivery}\",for=\"log\"}} {lanes}");
            self.host.wait_for("the metric", || {
                get(&admin, "/metrics").1.contains(&metric).then_some(())
            });
            self.host.wait_for("the log", || {
                let log = self.host.log();
                let mut lines = log.lines().filter(|l| l.contains(delivery));
                lines.any(says).then_some(())
            });
        }
    }

    /// Messages of these partitions pass one after the other, none waiting for partitions of another broker.
    async fn pass(&mut self, partitions: [i32; 2], counts: &mut Counts) {
        let began = Instant::now();
        for _ in 0..ROUNDS {
            self.send_each(partitions, counts).await;
        }
        let took = began.elapsed();
        assert!(took < PROMPT, "{took:?}");
    }

    /// One more message of each of these partitions passes.
    async fn send_each(&mut self, partitions: [i32; 2], counts: &mut Counts) {
        let mut now = Counts::new();
        for partition in partitions {
            let count = counts.entry(partition).or_default();
            self.send(partition, *count..*count + 1).await;
            *count += 1;
            now.insert(partition, *count);
        }
        self.arrived(&now);
    }
}

/// Stages, and routes to their outputs, on a log with this input.
fn pipeline(brokers: &str, input: &str, stages: &str) -> String {
    format!(
        r#"
        name = "brokers"
        [kafka]
        brokers = "{brokers}"
        [topics."{input}"]
        [sql.db]
        url = "sqlite:db.sqlite"
        [http]
        listen = "127.0.0.1:0"
        [admin]
        listen = "127.0.0.1:0"
        {stages}
        "#
    )
}

fn output(input: &str, delivery: &str) -> String {
    format!("{input}.{delivery}")
}

/// A stage, and a route to its output.
fn stage(input: &str, delivery: &str) -> String {
    let (output, component) = (output(input, delivery), component("test-identity"));
    let store = match delivery {
        "transactional" => "sql = [\"db\"]",
        _ => "",
    };
    format!(
        r#"
        [topics."{output}"]
        [stages.{delivery}]
        component = "{component}"
        input = ["{input}"]
        group = "{output}"
        output = ["{output}"]
        delivery = "{delivery}"
        config = {{ output = "{output}" }}
        {store}
        [[http.routes]]
        path = "/{delivery}"
        method = "POST"
        produce = {{ topic = "{output}", fields = ["n"] }}
        "#
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_hangs_holds_up_no_other_partition_and_is_named() {
    let turn = Turn::take().await;
    let cluster = &turn.cluster;
    let (mut bench, mut counts) = Bench::on_both(cluster).await;

    cluster.hang(true);
    bench.pass([0, 2], &mut counts).await;
    let second = cluster.second();
    bench.says(2, &[&second, "its leader"]);
    bench.pass([0, 2], &mut counts).await;

    // Nor where it has to be asked where its partitions begin.
    bench.begin_again([0, 2], &mut counts).await;
    bench.pass([0, 2], &mut counts).await;
    bench.says(2, &[&second, "its leader"]);

    cluster.hang(false);
    bench.goes_on(counts).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn too_few_in_sync_replicas_are_waited_for_and_named() {
    let turn = Turn::take().await;
    let cluster = &turn.cluster;
    let wanted = [("min.insync.replicas", "2")];
    let mut bench = Bench::start(cluster, &[&[1]], &[&[1, 2]], &wanted).await;
    bench.send(0, 0..3).await;
    bench.arrived(&Counts::from([(0, 3)]));

    cluster.hang(true);
    bench.send(0, 3..6).await;
    let words = [
        "1 in-sync replica(s), and the topic's `min.insync.replicas` is 2",
        "bring broker(s) [2] back",
        &bench.input,
    ];
    bench.says(1, &words);
    for delivery in DELIVERIES {
        let (status, _, body) = bench.post(delivery);
        assert!(
            status == 503 && body.contains("the log"),
            "{status}: {body}"
        );
    }

    cluster.hang(false);
    bench.arrived(&Counts::from([(0, 6)]));
    bench.host.ready();
    for delivery in DELIVERIES {
        assert_eq!(bench.post(delivery).0, 202, "{delivery}");
    }
    bench.send(0, 6..7).await;
    bench.arrived(&Counts::from([(0, 7)]));
    bench.has_no_dead_letters();
}

/// By an operator, on a log that makes none by itself.
#[tokio::test(flavor = "multi_thread")]
async fn an_output_that_is_deleted_is_waited_for_and_named() {
    let turn = Turn::take().await;
    let cluster = &turn.cluster;
    let mut bench = Bench::start(cluster, &[&[1]], &[&[1]], &[]).await;
    bench.send(0, 0..3).await;
    bench.arrived(&Counts::from([(0, 3)]));

    let topics = DELIVERIES.map(|delivery| output(&bench.input, delivery));
    for topic in &topics {
        cluster.delete(topic).await;
    }
    bench.send(0, 3..6).await;
    bench.says(1, &["nknown topic"]);
    for delivery in DELIVERIES {
        assert_eq!(bench.post(delivery).0, 503, "{delivery}");
    }
    bench.has_no_dead_letters();

    for (delivery, topic) in DELIVERIES.iter().zip(&topics) {
        cluster.create(topic, &[&[1]], &[]).await;
        let mut new = Output::new(&bench.log, topic);
        let numbers = bench.host.wait_for("the messages", || {
            let numbers = new.read().get(&0)?;
            (numbers.len() >= 3).then(|| numbers.clone())
        });
        assert_eq!(numbers, [3, 4, 5], "{delivery}");
    }
    bench.host.ready();
    bench.has_no_dead_letters();
}
