//! Guests that compute without end, and what their neighbours notice of them.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Message;
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};
use rdkafka::{Offset, TopicPartitionList};

use crate::bench::{Bench, Side};
use crate::log::config;
use crate::program::Program;
use crate::report::{Goal, Row};
use crate::web;

/// As many spin at one time.
const SPINNERS: usize = 64;
const SPINNERS_PARTITIONS: i32 = 4;
/// Each spins until its deadline of 5 s, and the next one is taken.
const SPINS: u64 = 2_000;
/// What is looked at, and how long.
const EACH: Duration = Duration::from_millis(10);
const LOOK: Duration = Duration::from_secs(15);
const ROUNDS: usize = 3;
/// Of what is looked at, the beginning counts for nothing: clients connect, and the log tells them where to go.
const WARM_UP: Duration = Duration::from_secs(3);
/// So that they spin, all of them.
const SETTLE: Duration = Duration::from_secs(3);
/// How long an output may take, and an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long something took, mostly and at worst.
struct Times {
    p50: Duration,
    p99: Duration,
}

impl Times {
    fn of(mut all: Vec<Duration>) -> anyhow::Result<Self> {
        ensure!(!all.is_empty(), "nothing was seen");
        all.sort();
        let at = |part: f64| all[((all.len() - 1) as f64 * part) as usize];
        Ok(Self {
            p50: at(0.5),
            p99: at(0.99),
        })
    }

    fn shown(&self) -> String {
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        format!(
            "p50 {:.1} ms, p99 {:.1} ms",
            millis(self.p50),
            millis(self.p99)
        )
    }
}

/// What a client and a neighbour notice in one round, without guests that spin and with them.
struct Round {
    health_alone: Times,
    health: Times,
    neighbour_alone: Times,
    neighbour: Times,
}

/// What a host does beside 64 guests that spin: `/healthz`, and a stage that passes messages on. The medians of some rounds: a
/// broker that compiles itself beside them, say, is noticed longer than they are.
pub(crate) fn spinners(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        rounds.push(round(bench)?);
    }
    let work = format!("{SPINNERS} guests that spin, on {SPINNERS_PARTITIONS} partitions");
    let Round {
        health,
        health_alone,
        ..
    } = middle(&mut rounds, |round| round.health.p99.as_secs_f64());
    tell(Row {
        id: "F14",
        work: format!("{work}: `/healthz`, p99"),
        goal: Goal::AtMost(20.0),
        measured: health.p99.as_secs_f64() * 1e3,
        unit: "ms",
        figures: format!("{}; without them {}", health.shown(), health_alone.shown()),
    });
    let ratio =
        |round: &Round| round.neighbour.p99.as_secs_f64() / round.neighbour_alone.p99.as_secs_f64();
    let middle = middle(&mut rounds, ratio);
    tell(Row {
        id: "F14",
        work: format!(
            "{work}: a message through a neighbour stage, p99, against the same without them"
        ),
        goal: Goal::AtMost(2.0),
        measured: ratio(middle),
        unit: "×",
        figures: format!(
            "{}; without them {}",
            middle.neighbour.shown(),
            middle.neighbour_alone.shown()
        ),
    });
    Ok(())
}

fn middle(rounds: &mut [Round], of: impl Fn(&Round) -> f64) -> &Round {
    rounds.sort_by(|a, b| of(a).total_cmp(&of(b)));
    &rounds[rounds.len() / 2]
}

fn round(bench: &Bench) -> anyhow::Result<Round> {
    let topics = Topics::new(bench)?;
    let mut program = bench.start(&Side::Host(pipeline(bench, &topics)))?;
    let admin = bench.address(&mut program, "admin")?;
    bench.until("readiness", &mut program, || {
        Ok(web::answers(&admin, "/readyz"))
    })?;
    let (health_alone, neighbour_alone) = look(bench, &topics, &mut program, &admin)?;
    bench.log.fill(&topics.spins, SPINS, |n| {
        (format!("key-{n}"), b"{\"do\":\"spin\"}".to_vec())
    })?;
    thread::sleep(SETTLE);
    let (health, neighbour) = look(bench, &topics, &mut program, &admin)?;
    program.stop()?;
    bench
        .log
        .delete(&[&topics.spins, &topics.input, &topics.output])?;
    Ok(Round {
        health_alone,
        health,
        neighbour_alone,
        neighbour,
    })
}

struct Topics {
    spins: String,
    input: String,
    output: String,
}

impl Topics {
    fn new(bench: &Bench) -> anyhow::Result<Self> {
        let topics = Self {
            spins: bench.unique("spins"),
            input: bench.unique("input"),
            output: bench.unique("output"),
        };
        bench.log.create(&topics.spins, SPINNERS_PARTITIONS)?;
        bench.log.create(&topics.input, 1)?;
        bench.log.create(&topics.output, 1)?;
        Ok(topics)
    }
}

fn pipeline(bench: &Bench, topics: &Topics) -> String {
    let Topics {
        spins,
        input,
        output,
    } = topics;
    let neighbour = super::topics::pipeline(bench, "test-identity", input, output, "");
    let (component, group) = (bench.stage("test-probe"), bench.unique("group"));
    let concurrency = SPINNERS / usize::try_from(SPINNERS_PARTITIONS).unwrap_or(1);
    format!(
        r#"{neighbour}
        [stages.spins]
        component = "{component}"
        input = ["{spins}"]
        group = "{group}"
        order = "none"
        concurrency = {concurrency}
        output = ["{output}"]
        sql = ["unused"]
        delivery = "at-least-once"
        redis = {{ unused = {{ prefix = "" }} }}
        [sql.unused]
        url = "sqlite:data/unused.db"
        [redis.unused]
        url = "memory:"
        "#
    )
}

/// Asks for `/healthz` and has messages passed on, both for a while.
fn look(
    bench: &Bench,
    topics: &Topics,
    program: &mut Program,
    admin: &str,
) -> anyhow::Result<(Times, Times)> {
    let (health, neighbour) = thread::scope(|scope| {
        let health = scope.spawn(|| health(admin));
        let neighbour = scope.spawn(|| messages(bench, topics));
        (health.join(), neighbour.join())
    });
    program.check()?;
    let health = health.ok().context("asking for /healthz panicked")??;
    let neighbour = neighbour
        .ok()
        .context("the neighbour's clients panicked")??;
    Ok((health, neighbour))
}

fn health(admin: &str) -> anyhow::Result<Times> {
    let (mut all, since) = (Vec::new(), Instant::now());
    while since.elapsed() < LOOK {
        let asked = Instant::now();
        ensure!(web::answers(admin, "/healthz"), "/healthz did not answer");
        if since.elapsed() >= WARM_UP {
            all.push(asked.elapsed());
        }
        thread::sleep(EACH.saturating_sub(asked.elapsed()));
    }
    Times::of(all)
}

/// From a record's sending until its output is read, one by one at a fixed pace.
fn messages(bench: &Bench, topics: &Topics) -> anyhow::Result<Times> {
    let producer: ThreadedProducer<DefaultProducerContext> =
        config(&bench.log.brokers).set("linger.ms", "0").create()?;
    let consumer: BaseConsumer = config(&bench.log.brokers)
        .set("group.id", "bench.neighbour")
        .create()?;
    let mut from = TopicPartitionList::new();
    let end: u64 = bench.log.ends(&topics.output)?.iter().sum();
    from.add_partition_offset(&topics.output, 0, Offset::Offset(i64::try_from(end)?))?;
    consumer.assign(&from)?;
    let began = Instant::now();
    let (mut all, mut sent, mut seen) = (Vec::new(), 0_u32, 0_u32);
    let count = u32::try_from(LOOK.as_millis() / EACH.as_millis())?;
    while seen < count {
        // What is late is sent late, with the time at which it was due.
        while sent < count && EACH * sent <= began.elapsed() {
            let due = (EACH * sent).as_nanos().to_string();
            let record = BaseRecord::<str, str>::to(&topics.input).payload(&due);
            producer.send(record).map_err(|(error, _)| error)?;
            sent += 1;
        }
        let wait = (EACH * sent).saturating_sub(began.elapsed());
        if let Some(message) = consumer.poll(wait).transpose()? {
            let due = std::str::from_utf8(message.payload().context("a value")?)?.parse()?;
            let due = Duration::from_nanos(due);
            seen += 1;
            if due >= WARM_UP {
                all.push(began.elapsed().saturating_sub(due));
            }
        }
        ensure!(
            began.elapsed() < LOOK + PATIENCE,
            "{seen} of {count} messages came through"
        );
    }
    producer.flush(PATIENCE)?;
    Times::of(all)
}
