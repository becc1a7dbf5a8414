//! What a lane takes for a repetition is one: ids count in the place that they name, whoever copies headers, and new outputs
//! are above all that their lane has sent. On Apache Kafka and PostgreSQL.

use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::bench::Bench;
use crate::support::{Host, Log, Seen, component, server, unique, until};

/// A database of its own.
async fn database() -> String {
    let (url, name) = (server("DATABASE_URL"), unique("db").replace('-', "_"));
    execute(&url, &format!("CREATE DATABASE {name}")).await;
    in_place_of(&url, &name)
}

/// The same server's database of another name.
fn in_place_of(url: &str, name: &str) -> String {
    let (server, _) = url.rsplit_once('/').expect("a database's name");
    format!("{server}/{name}")
}

fn name_of(url: &str) -> &str {
    url.rsplit_once('/').expect("a database's name").1
}

async fn execute(url: &str, statement: &str) {
    let connected = PgConnection::connect(url).await;
    let mut connection = connected.expect("PostgreSQL");
    let statement = sqlx::AssertSqlSafe(statement.to_owned());
    let done = sqlx::raw_sql(statement).execute(&mut connection).await;
    done.expect("the statement is run");
}

/// Appends a record as another program does that was given it: with these headers, in their order.
async fn append(topic: &str, value: &str, headers: &[(String, Option<String>)]) {
    let producer: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", server("KAFKA_BROKERS"))
        .set("partitioner", "murmur2_random")
        .create()
        .expect("a producer");
    let copied = headers
        .iter()
        .fold(OwnedHeaders::new(), |all, (name, value)| {
            all.insert(Header {
                key: name,
                value: value.as_deref(),
            })
        });
    let record = FutureRecord::to(topic)
        .key("k")
        .payload(value)
        .headers(copied);
    let sent = producer.send(record, Duration::from_secs(30)).await;
    sent.expect("the record is acknowledged");
}

async fn copy(from: &Seen, to: &str) {
    append(to, from.value.as_deref().expect("a value"), &from.headers).await;
}

/// A bench whose stage is transactional, in front of a second stage that reads what it sends. `{mid}` in the settings of
/// the second is the topic between, and `{out}` the one behind.
struct Chain {
    bench: Bench,
    out: String,
    second: String,
}

impl Chain {
    fn start(url: &str, guest: &str, settings: &str) -> Self {
        let (out, second) = (unique("behind"), unique("second"));
        let component = component(guest);
        let settings = settings.replace("{out}", &out);
        let stage = format!(
            r#"
            [topics."{out}"]
            partitions = 1
            [stages.second]
            component = "{component}"
            input = ["MIDDLE"]
            group = "{second}"
            output = ["{out}"]
            config = {{ to = "{out}" }}
            retry = {{ max-attempts = 3, initial = "10ms", max = "50ms" }}
            {settings}
            "#
        );
        // The topics' names are the bench's to choose.
        let mut bench = Bench::with("test-probe", 1, "", url, "");
        bench.host.signal(libc::SIGTERM);
        bench.host.wait_for_end();
        let stage = stage.replace("MIDDLE", &bench.output);
        bench.pipeline = bench
            .pipeline
            .replace("[sql.db]", &format!("{stage}\n[sql.db]"));
        bench.restart();
        bench.host.ready();
        Self { bench, out, second }
    }

    /// What has the first stage send this, which is a command to the second.
    fn send_on(&self, command: &Value) -> Value {
        json!({ "do": "emit", "topic": self.bench.output, "value": command })
    }

    /// A command to the second stage: emits a number.
    fn emit(&self, n: i64) -> Value {
        json!({ "do": "emit", "topic": self.out, "value": n })
    }

    async fn deliver(&self, messages: &[Value]) -> Vec<i64> {
        self.bench.send(messages).await;
        self.settled()
    }

    /// What came out behind the second stage, once all is through.
    fn settled(&self) -> Vec<i64> {
        let Bench {
            log, group, input, ..
        } = &self.bench;
        log.wait_committed(group, input);
        log.wait_committed(&self.second, &self.bench.output);
        let number = |seen: Seen| seen.value.as_deref()?.parse().ok();
        log.read(&self.out).into_iter().filter_map(number).collect()
    }
}

const TRANSACTIONAL: &str = "sql = [\"db\"]\nredis = { cache = { prefix = \"p:\" } }";
/// The probe's grants without a store of its own.
const AT_LEAST_ONCE: &str =
    "delivery = \"at-least-once\"\nredis = { cache = { prefix = \"p:\" } }\nsql = [\"db\"]";

#[tokio::test(flavor = "multi_thread")]
async fn an_output_says_from_which_cluster_it_is_and_where_it_was_sent() {
    let url = database().await;
    let bench = Bench::with("test-probe", 1, "", &url, "");
    let emit = json!({ "do": "emit", "topic": bench.output, "value": 1 });
    let (outputs, _) = bench.deliver(&[emit]).await;
    let id = outputs[0].header("stagehost-id").expect("an id");
    let parts: Vec<_> = id.split('/').collect();
    let [
        cluster,
        topic,
        partition,
        group,
        input,
        number,
        _,
        offset,
        index,
    ] = parts[..]
    else {
        panic!("{id}");
    };
    assert!(cluster.len() > 10 && cluster.starts_with('@'), "{id}");
    assert_eq!([topic, partition], [bench.output.as_str(), "0"], "{id}");
    let from = [bench.group.as_str(), bench.input.as_str(), "0"];
    assert_eq!([group, input, number], from, "{id}");
    assert_eq!([offset, index], ["0", "0"], "{id}");
}

/// As the SDK's own example does.
#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_copies_headers_behind_a_transactional_one_is_like_any_other() {
    let url = database().await;
    for settings in ["", "sql = [\"db\"]"] {
        let chain = Chain::start(&url, "test-echo", settings);
        let numbers: Vec<_> = (0..20).collect();
        let messages: Vec<_> = numbers.iter().map(|n| chain.send_on(&json!(n))).collect();
        assert_eq!(chain.deliver(&messages).await, numbers, "{settings}");
        let behind = chain.bench.log.read(&chain.out);
        for record in behind {
            let ids = record
                .headers
                .iter()
                .filter(|(name, _)| name == "stagehost-id");
            let expected = usize::from(!settings.is_empty());
            assert_eq!(
                ids.count(),
                expected,
                "its own, or none: {:?}",
                record.headers
            );
        }
    }
}

/// A Kafka Streams application, say: it reads a topic, and writes what it makes of it into another with all headers.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_program_in_between_copied_with_its_headers_is_not_dropped() {
    let url = database().await;
    let chain = Chain::start(&url, "test-probe", TRANSACTIONAL);
    let numbers: Vec<_> = (0..10).collect();
    let sent: Vec<_> = numbers
        .iter()
        .map(|n| chain.send_on(&chain.emit(*n)))
        .collect();
    assert_eq!(chain.deliver(&sent).await, numbers);
    // What is between has ids of the first stage. All of it goes into that one's own input, later ones first.
    let mut copies = chain.bench.log.read(&chain.bench.output);
    copies.reverse();
    for (n, record) in (100..).zip(&copies) {
        let on = chain.send_on(&chain.emit(n)).to_string();
        append(&chain.bench.input, &on, &record.headers).await;
    }
    let all: Vec<_> = numbers.into_iter().chain(100..110).collect();
    assert_eq!(chain.settled(), all);
    assert_eq!(duplicates(&chain, "probe"), None);
}

fn duplicates(chain: &Chain, stage: &str) -> Option<String> {
    let dropped = format!("stagehost_messages_total{{stage=\"{stage}\",outcome=\"duplicate\"}}");
    chain.bench.metric(&dropped)
}

/// The first stage sends to a topic of its own, and the program brings it to the second, which reads the first's outputs, too.
#[tokio::test(flavor = "multi_thread")]
async fn of_copies_from_another_topic_and_real_repetitions_the_latter_alone_are_dropped() {
    let url = database().await;
    for settings in [TRANSACTIONAL, AT_LEAST_ONCE] {
        let mut chain = Chain::start(&url, "test-probe", settings);
        let (middle, aside) = (chain.bench.output.clone(), unique("aside"));
        let granted = format!("output = [\"{middle}\"]");
        let more = format!("output = [\"{middle}\", \"{aside}\"]");
        assert!(chain.bench.pipeline.contains(&granted));
        chain.bench.pipeline =
            chain.bench.pipeline.replace(&granted, &more) + &format!("[topics.\"{aside}\"]");
        chain.bench.host.signal(libc::SIGTERM);
        chain.bench.host.wait_for_end();
        chain.bench.restart();
        chain.bench.host.ready();
        let beside = |n| json!({ "do": "emit", "topic": aside, "value": chain.emit(n) });
        let both =
            |n| json!({ "do": "steps", "steps": [chain.send_on(&chain.emit(n)), beside(n + 100)] });
        let sent: Vec<_> = (0..5).map(both).collect();
        assert_eq!(chain.deliver(&sent).await, [0, 1, 2, 3, 4], "{settings}");
        let real = chain.bench.log.read(&middle);
        let copies = chain.bench.log.read(&aside);
        // Later ones first, and what was there before behind each.
        for (copied, repeated) in copies.iter().zip(&real).rev() {
            copy(copied, &middle).await;
            copy(repeated, &middle).await;
        }
        let all = [0, 1, 2, 3, 4, 104, 103, 102, 101, 100];
        assert_eq!(chain.settled(), all, "{settings}");
        let dropped = duplicates(&chain, "second");
        assert_eq!(dropped.as_deref(), Some("5"), "{settings}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_that_is_sent_back_with_all_its_headers_is_new() {
    let url = database().await;
    for settings in [TRANSACTIONAL, AT_LEAST_ONCE] {
        let chain = Chain::start(&url, "test-probe", settings);
        let table = unique("t").replace('-', "_");
        let insert = |n: i64| {
            let statement = format!("INSERT INTO {table} VALUES ($1)");
            let insert = json!({ "do": "sql", "store": "db", "statement": statement, "params": [n], "execute": true });
            chain.send_on(&json!({ "do": "steps", "steps": [insert, chain.emit(n)] }))
        };
        // The table is not there yet.
        let sent: Vec<_> = (0..3).map(insert).collect();
        assert_eq!(chain.deliver(&sent).await, Vec::<i64>::new());
        let letters = format!("{}.dlq", chain.bench.output);
        let dead = chain.bench.log.read_at_least(&letters, 3);
        assert_eq!(dead.len(), 3, "{settings}");
        for letter in &dead {
            let original = letter
                .header("stagehost-original-id")
                .expect("its record's id");
            assert!(original.contains(&chain.bench.group), "{original}");
        }
        execute(&url, &format!("CREATE TABLE {table} (n bigint)")).await;
        // What was not mended at first may be sent back twice, in any order.
        for letter in [&dead[2], &dead[0], &dead[1], &dead[0]] {
            copy(letter, &chain.bench.output).await;
        }
        assert_eq!(chain.settled(), [2, 0, 1, 0], "{settings}");
    }
}

/// MirrorMaker's, say: the same topic and partition, and lanes of the same names, whose rows are newer there.
#[tokio::test(flavor = "multi_thread")]
async fn records_copied_from_another_cluster_blind_no_stage() {
    let url = database().await;
    let chain = Chain::start(&url, "test-probe", TRANSACTIONAL);
    let first = [chain.send_on(&chain.emit(0))];
    assert_eq!(chain.deliver(&first).await, [0]);
    let between = chain.bench.log.read(&chain.bench.output);
    let id = between[0].header("stagehost-id").expect("an id");
    let generation: i64 = id
        .rsplit('/')
        .nth(2)
        .and_then(|g| g.parse().ok())
        .expect("a number");
    let (cluster, _) = id.split_once('/').expect("a cluster");
    let newer = id
        .replacen(cluster, "@another-cluster-altogether", 1)
        .replace(
            &format!("/{generation}/"),
            &format!("/{}/", generation + 1_000_000_000),
        );
    for n in 1..8 {
        let headers = [("stagehost-id".to_owned(), Some(newer.clone()))];
        append(&chain.bench.output, &chain.emit(n).to_string(), &headers).await;
    }
    let more: Vec<_> = (8..20).map(|n| chain.send_on(&chain.emit(n))).collect();
    assert_eq!(chain.deliver(&more).await, (0..20).collect::<Vec<_>>());
}

/// Has the database of a host that is stopped be what `to` is, and starts it again.
async fn restore(chain: &mut Chain, url: &str, to: &str) {
    let (there, copy) = (name_of(url), name_of(to));
    let server = server("DATABASE_URL");
    execute(&server, &format!("DROP DATABASE {there} WITH (FORCE)")).await;
    execute(&server, &format!("CREATE DATABASE {there} TEMPLATE {copy}")).await;
    chain.bench.restart();
}

/// A copy of a database that nobody uses just now.
async fn copy_of(url: &str) -> String {
    let name = unique("copy").replace('-', "_");
    let copy = format!("CREATE DATABASE {name} TEMPLATE {}", name_of(url));
    execute(&server("DATABASE_URL"), &copy).await;
    in_place_of(url, &name)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_goes_back_to_an_older_copy_and_forth_loses_no_outputs() {
    let (url, other) = (database().await, database().await);
    let settings = format!(
        "sql = [\"other\"]\nredis = {{ cache = {{ prefix = \"p:\" }} }}\n[sql.other]\nurl = \"{other}\""
    );
    let mut chain = Chain::start(&url, "test-probe", &settings);
    let on = |chain: &Chain, numbers: std::ops::Range<i64>| -> Vec<Value> {
        numbers.map(|n| chain.send_on(&chain.emit(n))).collect()
    };
    let messages = on(&chain, 0..10);
    assert_eq!(chain.deliver(&messages).await, (0..10).collect::<Vec<_>>());
    chain.bench.host.signal(libc::SIGTERM);
    chain.bench.host.wait_for_end();
    let older = copy_of(&url).await;
    chain.bench.restart();
    chain.bench.host.ready();
    let messages = on(&chain, 10..20);
    chain.deliver(&messages).await;
    chain.bench.host.signal(libc::SIGTERM);
    chain.bench.host.wait_for_end();
    let newer = copy_of(&url).await;

    // What was processed since is processed again, and said; nothing of it or of what comes then is dropped.
    restore(&mut chain, &url, &older).await;
    let messages = on(&chain, 20..120);
    let through = chain.deliver(&messages).await;
    let again = (0..20).chain(10..120).collect::<Vec<_>>();
    assert_eq!(through, again);
    let said = chain.bench.host.log();
    assert!(said.contains("is an older copy"), "{said}");

    chain.bench.host.signal(libc::SIGTERM);
    chain.bench.host.wait_for_end();
    restore(&mut chain, &url, &newer).await;
    let messages = on(&chain, 120..220);
    let through = chain.deliver(&messages).await;
    let fresh: Vec<_> = through.iter().copied().filter(|n| *n >= 120).collect();
    assert_eq!(fresh, (120..220).collect::<Vec<_>>());
    let said = chain.bench.host.log();
    assert!(said.contains("is an older copy"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_nothing_but_repetitions_and_a_generation_that_falls_are_said() {
    for settings in [TRANSACTIONAL, AT_LEAST_ONCE] {
        let url = database().await;
        let chain = Chain::start(&url, "test-probe", settings);
        assert_eq!(chain.deliver(&[chain.send_on(&chain.emit(0))]).await, [0]);
        let between = chain.bench.log.read(&chain.bench.output);
        let id = between[0].header("stagehost-id").expect("an id").to_owned();
        copy(&between[0], &chain.bench.output).await;
        assert_eq!(chain.settled(), [0], "{settings}");
        chain.bench.host.wait_for("the log to say so", || {
            let said = chain.bench.host.log();
            said.contains("all records of a batch were dropped as repetitions")
                .then_some(())
        });
        // In a lane of its own, for it is said once a minute.
        let chain = Chain::start(&url, "test-probe", settings);
        assert_eq!(chain.deliver(&[chain.send_on(&chain.emit(0))]).await, [0]);
        let between = chain.bench.log.read(&chain.bench.output);
        let newer = between[0].header("stagehost-id").unwrap_or(&id);
        let older = lower_generation(newer);
        let headers = [("stagehost-id".to_owned(), Some(older))];
        append(&chain.bench.output, &chain.emit(1).to_string(), &headers).await;
        assert_eq!(chain.settled(), [0], "{settings}");
        chain.bench.host.wait_for("the log to say so", || {
            let said = chain.bench.host.log();
            said.contains("sends outputs of generation 1").then_some(())
        });
        let duplicates = "stagehost_messages_total{stage=\"second\",outcome=\"duplicate\"}";
        assert_eq!(chain.bench.metric(duplicates).as_deref(), Some("1"));
    }
}

fn lower_generation(id: &str) -> String {
    let mut parts: Vec<_> = id.split('/').collect();
    let generation = parts.len() - 3;
    parts[generation] = "1";
    parts.join("/")
}

/// What a host of an earlier version has left: rows with outputs and with what was seen, records and a dead letter.
struct Earlier {
    all: Value,
}

impl Earlier {
    /// Written by that version; with names that no other run has, of the same length, since lengths stand before them.
    fn new() -> Self {
        const WRITTEN: &str = include_str!("earlier/chain-407f7cc.json");
        const SUFFIX: &str = "5e94902a";
        let fresh = &uuid::Uuid::new_v4().simple().to_string()[..SUFFIX.len()];
        let hex =
            |text: &str| -> String { text.bytes().map(|byte| format!("{byte:02x}")).collect() };
        let renamed = WRITTEN
            .replace(SUFFIX, fresh)
            .replace(&hex(SUFFIX), &hex(fresh));
        Self {
            all: serde_json::from_str(&renamed).expect("JSON"),
        }
    }

    fn name(&self, what: &str) -> &str {
        self.all[what].as_str().expect("a name")
    }

    fn pipeline(&self, url: &str) -> String {
        let (brokers, probe) = (server("KAFKA_BROKERS"), component("test-probe"));
        let [input, middle, output] = ["in", "mid", "out"].map(|what| self.name(what));
        let stage = |name: &str, input: &str, output: &str| {
            format!(
                r#"
                [stages.{name}]
                component = "{probe}"
                input = ["{input}"]
                group = "{}"
                output = ["{output}"]
                redis = {{ cache = {{ prefix = "p:" }} }}
                sql = ["db"]
                "#,
                self.name(name)
            )
        };
        format!(
            r#"
            name = "earlier"
            kafka.brokers = "{brokers}"
            topics."{input}".partitions = 1
            topics."{middle}".partitions = 1
            topics."{output}".partitions = 1
            redis.cache.url = "memory:"
            sql.db.url = "{url}"
            admin.listen = "127.0.0.1:0"
            {}{}
            "#,
            stage("first", input, middle),
            stage("second", middle, output)
        )
    }

    /// The records that it had got into the log.
    async fn append(&self, topic: &str) {
        for record in self.all["records"][topic].as_array().expect("records") {
            let headers = record["headers"].as_array().cloned().unwrap_or_default();
            let text = |value: &Value| value.as_str().map(str::to_owned);
            let headers: Vec<_> = headers
                .chunks(2)
                .map(|pair| (text(&pair[0]).expect("a name"), text(&pair[1])))
                .collect();
            append(topic, record["payload"].as_str().expect("text"), &headers).await;
        }
    }

    async fn write_rows(&self, url: &str) {
        for row in self.all["rows"].as_array().expect("rows") {
            let text = |name: &str| row[name].as_str().expect("text");
            let number = |name: &str| row[name].as_i64().expect("a number");
            let statement = format!(
                "INSERT INTO stagehost_progress (consumer_group, topic, partition, epoch, generation, commits, next_offset, \
                 attempts, pending, seen) VALUES ('{}', '{}', 0, {}, {}, {}, {}, {}, '\\x{}', '\\x{}')",
                text("group"),
                text("topic"),
                number("epoch"),
                number("generation"),
                number("commits"),
                number("next_offset"),
                number("attempts"),
                text("pending"),
                text("seen")
            );
            execute(url, &statement).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_and_records_of_an_earlier_version_are_taken_over() {
    let (url, earlier) = (database().await, Earlier::new());
    let pipeline = earlier.pipeline(&url);
    // Makes the topics and the table.
    let (status, said) = Host::start(&pipeline).stop();
    assert!(status.success(), "{said}");
    execute(&url, "DELETE FROM stagehost_progress").await;
    let [input, middle, output] = ["in", "mid", "out"].map(|what| earlier.name(what).to_owned());
    let letters = format!("{middle}.dlq");
    for topic in [&input, &middle, &output, &letters] {
        earlier.append(topic).await;
    }
    earlier.write_rows(&url).await;

    // What the rows hold is produced again, by the ids that it has; whoever has seen it drops it.
    let host = Host::start(&pipeline);
    let log = Log::new(&server("KAFKA_BROKERS"));
    until("what the rows hold to be in the log", || {
        (log.read(&middle).len() == 8 && log.read(&output).len() == 6).then_some(())
    });
    log.wait_committed(earlier.name("second"), &middle);
    assert_eq!(log.read(&output).len(), 6, "what came again was dropped");
    let ids = |seen: &[Seen]| -> Vec<String> {
        seen.iter()
            .filter_map(|s| {
                let id = s.headers.iter().rfind(|(n, _)| n == "stagehost-id")?;
                id.1.clone()
            })
            .collect()
    };
    let between = log.read(&middle);
    assert_eq!(ids(&between)[..4], ids(&between)[4..], "by the same ids");

    // New ones come through, and a letter that the earlier version has written is new where it is sent back.
    let emit = json!({ "do": "emit", "topic": output, "value": 7 });
    let on = json!({ "do": "emit", "topic": middle, "value": emit }).to_string();
    append(&input, &on, &[]).await;
    let values = || -> Vec<_> {
        log.read(&output)
            .into_iter()
            .filter_map(|s| s.value)
            .collect()
    };
    until("the new one", || (values()[6..] == ["7"]).then_some(()));
    let letter = log.read(&letters).remove(0);
    let mended = json!({ "do": "emit", "topic": output, "value": 8 }).to_string();
    for n in 7..9 {
        append(&middle, &mended, &letter.headers).await;
        until("what was sent back", || {
            (values().len() == n + 1).then_some(())
        });
    }
    assert_eq!(values()[6..], ["7", "8", "8"]);
    let (status, said) = host.stop();
    assert!(status.success(), "{said}");
}

/// Both versions read what the other has written beside an output, and a row that the other has left.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_now_is_read_by_an_earlier_version() {
    let url = database().await;
    let chain = Chain::start(&url, "test-probe", TRANSACTIONAL);
    assert_eq!(chain.deliver(&[chain.send_on(&chain.emit(0))]).await, [0]);
    let between = chain.bench.log.read(&chain.bench.output);
    let id = between[0].header("stagehost-id").expect("an id");
    // As it read ids: four parts from the end, of which the first is a lane that ends with topic and partition.
    let mut parts = id.rsplitn(4, '/');
    for number in ["index", "offset", "generation"] {
        let read = parts.next().and_then(|part| part.parse::<i64>().ok());
        assert!(read.is_some(), "{number} of {id}");
    }
    let lane = parts.next().expect("a lane").to_owned();
    let expected = format!("{}/{}/0", chain.bench.group, chain.bench.input);
    assert!(lane.ends_with(&expected), "{lane}");
    // And its row remembers the lane by that name: a map of lanes to places, behind the format's number.
    let mut connection = PgConnection::connect(&url).await.expect("PostgreSQL");
    let row = sqlx::query_scalar("SELECT seen FROM stagehost_progress WHERE consumer_group = $1");
    let seen: Vec<u8> = row
        .bind(&chain.second)
        .fetch_one(&mut connection)
        .await
        .expect("a row");
    let length = u8::try_from(lane.len()).ok().filter(|length| *length < 128);
    let name = [&[length.expect("a short name")], lane.as_bytes()].concat();
    let is_there = seen.windows(name.len()).any(|window| window == name);
    assert!(seen[0] == 1 && is_there, "{seen:?}");
}
