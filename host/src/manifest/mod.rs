//! The pipeline file as it is written: every key read, of the right type and in its range, with its
//! place. What the keys mean together is [`pipeline`](crate::pipeline)'s matter.

mod brackets;
mod expand;
mod reader;

use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue, Error};

pub(crate) use self::expand::Env;
pub(crate) use self::reader::{At, Text};
use self::reader::{Reader, Table};
use crate::diagnostics::{Problem, Problems, Span};

/// Values of a file, those in lists and tables among them: what they mean to each other takes longer than to read them.
const MAX_VALUES: usize = 10_000;
const MAX_PARTITIONS: i64 = 10_000;
const MAX_REPLICATION: i64 = 100;
const MAX_CONNECTIONS: i64 = 1000;
const MAX_ATTEMPTS: i64 = 1000;
const MAX_BATCH_MESSAGES: i64 = 100_000;
const MAX_CONCURRENCY: i64 = 1000;
const MILLISECOND: Duration = Duration::from_millis(1);
const MINUTE: Duration = Duration::from_mins(1);
const HOUR: Duration = Duration::from_hours(1);
const DAY: Duration = Duration::from_hours(24);
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// What one invocation may emit in all.
const MAX_OUTPUT: u64 = crate::capability::producer::MAX_HELD_BYTES as u64;

/// The file. A field is `None` (or shorter) where its key is missing, or wrong and reported.
pub(crate) struct Manifest {
    pub(crate) name: Option<Text>,
    pub(crate) data_dir: Option<Text>,
    pub(crate) shutdown_timeout: Option<At<Duration>>,
    pub(crate) kafka: Option<KafkaSection>,
    pub(crate) topics: Vec<TopicSection>,
    pub(crate) sql: Vec<SqlSection>,
    pub(crate) redis: Vec<RedisSection>,
    pub(crate) stages: Vec<StageSection>,
    pub(crate) http: Option<HttpSection>,
    pub(crate) admin: Option<AdminSection>,
}

pub(crate) struct KafkaSection {
    pub(crate) brokers: Option<Text>,
    pub(crate) listen: Option<Text>,
    pub(crate) properties: Vec<(Text, Text)>,
}

pub(crate) struct TopicSection {
    pub(crate) name: Text,
    pub(crate) partitions: Option<At<i64>>,
    pub(crate) replication: Option<At<i64>>,
    pub(crate) config: Vec<(Text, Text)>,
}

pub(crate) struct SqlSection {
    pub(crate) name: Text,
    pub(crate) url: Option<Text>,
    pub(crate) stage_url: Option<Text>,
    pub(crate) migrations: Option<Text>,
    pub(crate) max_connections: Option<At<i64>>,
}

pub(crate) struct RedisSection {
    pub(crate) name: Text,
    pub(crate) url: Option<Text>,
}

pub(crate) struct StageSection {
    pub(crate) name: Text,
    /// The section's header.
    pub(crate) span: Span,
    pub(crate) component: Option<Text>,
    pub(crate) input: Option<At<Vec<Text>>>,
    pub(crate) group: Option<Text>,
    pub(crate) output: Option<At<Vec<Text>>>,
    pub(crate) sql: Option<At<Vec<SqlGrantSection>>>,
    pub(crate) redis: Vec<GrantSection>,
    pub(crate) config: Vec<(Text, Text)>,
    pub(crate) retry: RetrySection,
    pub(crate) dead_letter: Option<Text>,
    pub(crate) limits: LimitsSection,
    pub(crate) batch: BatchSection,
    pub(crate) instances: Option<At<InstancesWord>>,
    pub(crate) delivery: Option<At<DeliveryWord>>,
    pub(crate) order: Option<At<OrderWord>>,
    pub(crate) concurrency: Option<At<i64>>,
    pub(crate) on_exhausted: Option<At<OnExhaustedWord>>,
    pub(crate) on_gap: Option<At<OnGapWord>>,
    pub(crate) instance_id: Option<Text>,
    pub(crate) allow_cycle: bool,
}

/// A database's name, and what the stage may do with it.
pub(crate) struct SqlGrantSection {
    pub(crate) store: Text,
    pub(crate) access: Option<At<AccessWord>>,
}

/// A Redis store's name, and what the stage may do with it.
pub(crate) struct GrantSection {
    pub(crate) store: Text,
    pub(crate) prefix: Option<Text>,
    pub(crate) commands: Vec<Text>,
}

#[derive(Default)]
pub(crate) struct RetrySection {
    pub(crate) max_attempts: Option<At<i64>>,
    pub(crate) initial: Option<At<Duration>>,
    pub(crate) max: Option<At<Duration>>,
}

#[derive(Default)]
pub(crate) struct LimitsSection {
    pub(crate) memory: Option<At<u64>>,
    pub(crate) deadline: Option<At<Duration>>,
    pub(crate) max_output: Option<At<u64>>,
}

#[derive(Default)]
pub(crate) struct BatchSection {
    pub(crate) max_messages: Option<At<i64>>,
    pub(crate) max_bytes: Option<At<u64>>,
    pub(crate) max_time: Option<At<Duration>>,
}

#[derive(Clone, Copy)]
pub(crate) enum AccessWord {
    ReadOnly,
    Data,
    DataDefinition,
}

#[derive(Clone, Copy)]
pub(crate) enum InstancesWord {
    Warm,
    Fresh,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeliveryWord {
    AtLeastOnce,
    Transactional,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum OrderWord {
    Partition,
    Key,
    None,
}

#[derive(Clone, Copy)]
pub(crate) enum OnExhaustedWord {
    DeadLetter,
    Stop,
}

#[derive(Clone, Copy)]
pub(crate) enum OnGapWord {
    Stop,
    Continue,
}

pub(crate) struct HttpSection {
    pub(crate) listen: Option<Text>,
    pub(crate) max_body: Option<At<u64>>,
    pub(crate) routes: Vec<RouteSection>,
}

pub(crate) struct RouteSection {
    /// The section's header.
    pub(crate) span: Span,
    pub(crate) path: Option<Text>,
    pub(crate) method: Option<Text>,
    pub(crate) produce: Option<ProduceSection>,
    pub(crate) read: Option<ReadSection>,
    pub(crate) status: Option<At<i64>>,
    pub(crate) body: Option<Text>,
}

pub(crate) struct ProduceSection {
    pub(crate) span: Span,
    pub(crate) topic: Option<Text>,
    pub(crate) key: Option<Text>,
    pub(crate) fields: Vec<Text>,
    pub(crate) generate: Vec<Text>,
}

pub(crate) struct ReadSection {
    pub(crate) redis: Option<Text>,
    pub(crate) key: Option<Text>,
}

pub(crate) struct AdminSection {
    pub(crate) listen: Option<Text>,
    pub(crate) token: Option<Text>,
}

/// Reads the text of a pipeline file. `None` where it is not TOML; problems of both kinds are reported.
pub(crate) fn read(text: &str, env: &Env<'_>, problems: &Problems) -> Option<Manifest> {
    let (document, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        report_syntax(text, errors, problems);
        return None;
    }
    if let Some(span) = beyond(document.get_ref(), MAX_VALUES) {
        problems.report(
            Problem::at(&span, format!("the file has more than {MAX_VALUES} values"))
                .help("is it the right file?"),
        );
        return None;
    }
    let reader = Reader { env, problems };
    Some(manifest(Table::root(&reader, document.get_ref())))
}

/// Reports the first error of each line: what follows it mostly follows from it. What follows a bracket that is not closed
/// all does.
fn report_syntax(text: &str, mut errors: Vec<Error>, problems: &Problems) {
    let start = |error: &Error| error.span().unwrap_or_default().start.min(text.len());
    errors.sort_by_key(start);
    let line_end = |at: usize| text[at..].find('\n').map_or(text.len(), |end| at + end);
    let unclosed = brackets::unclosed(text);
    let mut reported = None;
    for error in errors {
        let start = text.floor_char_boundary(start(&error));
        if reported.is_some_and(|end| start <= end) {
            continue;
        }
        if problems.are_enough() {
            break;
        }
        let unclosed = unclosed.filter(|(at, _)| start > *at);
        // What is wrong on the bracket's own line says more: a text that is not closed, say.
        if let Some((at, bracket)) = unclosed.filter(|(at, _)| start > line_end(*at)) {
            problems.report(not_closed(at, bracket));
            break;
        }
        let span = error.span().unwrap_or_default();
        problems.report(
            Problem::at(&span, format!("the file is not TOML: {}", error.message()))
                .help("the meaning of the file is checked once this is mended"),
        );
        if unclosed.is_some() {
            break;
        }
        reported = Some(line_end(start));
    }
}

fn not_closed(at: usize, bracket: char) -> Problem {
    let closing = if bracket == '[' { ']' } else { '}' };
    let message = format!("the file is not TOML: this `{bracket}` is not closed");
    Problem::at(&(at..at + 1), message).help(format!(
        "write the `{closing}`; what follows is checked once this is mended"
    ))
}

/// Where a value is that is one too many.
fn beyond(document: &DeTable<'_>, most: usize) -> Option<Span> {
    let mut waiting: Vec<&Spanned<DeValue<'_>>> = document.values().collect();
    for _ in 0..most {
        match waiting.pop()?.get_ref() {
            DeValue::Table(entries) => waiting.extend(entries.values()),
            DeValue::Array(items) => waiting.extend(items.iter()),
            _ => {}
        }
    }
    waiting.pop().map(Spanned::span)
}

fn manifest(mut t: Table<'_>) -> Manifest {
    let manifest = Manifest {
        name: t.required_text("name", "\"my-pipeline\""),
        data_dir: t.text("data-dir"),
        shutdown_timeout: t.duration("shutdown-timeout", Duration::ZERO..=HOUR),
        kafka: t.table("kafka").map(kafka),
        topics: t.named_tables("topics").into_iter().map(topic).collect(),
        sql: t.named_tables("sql").into_iter().map(sql).collect(),
        redis: t.named_tables("redis").into_iter().map(redis).collect(),
        stages: t.named_tables("stages").into_iter().map(stage).collect(),
        http: t.table("http").map(http),
        admin: t.table("admin").map(admin),
    };
    if manifest.kafka.is_none() {
        t.missing_table("kafka", "brokers = \"embedded\"");
    }
    t.finish();
    manifest
}

fn kafka(mut t: Table<'_>) -> KafkaSection {
    let section = KafkaSection {
        brokers: t.required_text("brokers", "\"embedded\"` or `brokers = \"host:9092\""),
        listen: t.text("listen"),
        properties: t.settings("properties"),
    };
    t.finish();
    section
}

fn topic((name, mut t): (Text, Table<'_>)) -> TopicSection {
    let section = TopicSection {
        name,
        partitions: t.integer("partitions", 1..=MAX_PARTITIONS),
        replication: t.integer("replication", 1..=MAX_REPLICATION),
        config: t.settings("config"),
    };
    t.finish();
    section
}

fn sql((name, mut t): (Text, Table<'_>)) -> SqlSection {
    let section = SqlSection {
        name,
        url: t.required_text(
            "url",
            "\"sqlite:data/my.db\"` or `url = \"postgres://user@host/database\"",
        ),
        stage_url: t.text("stage-url"),
        migrations: t.text("migrations"),
        max_connections: t.integer("max-connections", 1..=MAX_CONNECTIONS),
    };
    t.finish();
    section
}

fn redis((name, mut t): (Text, Table<'_>)) -> RedisSection {
    let section = RedisSection {
        name,
        url: t.required_text("url", "\"embedded:data/cache\"` or `url = \"redis://host\""),
    };
    t.finish();
    section
}

fn stage((name, mut t): (Text, Table<'_>)) -> StageSection {
    let section = StageSection {
        span: t.span.clone(),
        component: t.required_text("component", "\"my-stage.wasm\""),
        input: t.required_texts("input", "[\"a-topic\"]"),
        group: t.required_text("group", &format!("\"service.{}\"", name.value)),
        output: t.texts("output"),
        sql: sql_grants(&mut t),
        redis: grants(&mut t),
        config: t.settings("config"),
        retry: t.table("retry").map(retry).unwrap_or_default(),
        dead_letter: t.text("dead-letter"),
        limits: t.table("limits").map(limits).unwrap_or_default(),
        batch: t.table("batch").map(batch).unwrap_or_default(),
        instances: t.choice(
            "instances",
            &[
                ("warm", InstancesWord::Warm),
                ("fresh", InstancesWord::Fresh),
            ],
        ),
        delivery: t.choice(
            "delivery",
            &[
                ("at-least-once", DeliveryWord::AtLeastOnce),
                ("transactional", DeliveryWord::Transactional),
            ],
        ),
        order: t.choice(
            "order",
            &[
                ("partition", OrderWord::Partition),
                ("key", OrderWord::Key),
                ("none", OrderWord::None),
            ],
        ),
        concurrency: t.integer("concurrency", 1..=MAX_CONCURRENCY),
        on_exhausted: t.choice(
            "on-exhausted",
            &[
                ("dead-letter", OnExhaustedWord::DeadLetter),
                ("stop", OnExhaustedWord::Stop),
            ],
        ),
        on_gap: t.choice(
            "on-gap",
            &[("stop", OnGapWord::Stop), ("continue", OnGapWord::Continue)],
        ),
        instance_id: t.text("instance-id"),
        allow_cycle: t.boolean("allow-cycle").unwrap_or(false),
        name,
    };
    t.finish();
    section
}

/// A list of names, or a table with what each grant is for.
fn sql_grants(stage: &mut Table<'_>) -> Option<At<Vec<SqlGrantSection>>> {
    let Some(span) = stage.span_of_table("sql") else {
        let names = stage.texts("sql")?;
        let grant = |store| SqlGrantSection {
            store,
            access: None,
        };
        return Some(At {
            value: names.value.into_iter().map(grant).collect(),
            span: names.span,
        });
    };
    let read = |(store, mut t): (Text, Table<'_>)| {
        let section = SqlGrantSection {
            access: t.choice(
                "access",
                &[
                    ("read-only", AccessWord::ReadOnly),
                    ("data", AccessWord::Data),
                    ("data-definition", AccessWord::DataDefinition),
                ],
            ),
            store,
        };
        t.finish();
        section
    };
    Some(At {
        value: stage.named_tables("sql").into_iter().map(read).collect(),
        span,
    })
}

fn grants(stage: &mut Table<'_>) -> Vec<GrantSection> {
    let read = |(store, mut t): (Text, Table<'_>)| {
        let section = GrantSection {
            prefix: t.required_text("prefix", "\"my-keys:\""),
            commands: t.texts("commands").map_or_else(Vec::new, |list| list.value),
            store,
        };
        t.finish();
        section
    };
    stage.named_tables("redis").into_iter().map(read).collect()
}

fn retry(mut t: Table<'_>) -> RetrySection {
    let section = RetrySection {
        max_attempts: t.integer("max-attempts", 1..=MAX_ATTEMPTS),
        initial: t.duration("initial", MILLISECOND..=HOUR),
        max: t.duration("max", MILLISECOND..=DAY),
    };
    t.finish();
    section
}

fn limits(mut t: Table<'_>) -> LimitsSection {
    let section = LimitsSection {
        memory: t.size("memory", MIB..=4 * GIB),
        deadline: t.duration("deadline", MILLISECOND..=HOUR),
        max_output: t.size("max-output", KIB..=MAX_OUTPUT),
    };
    t.finish();
    section
}

fn batch(mut t: Table<'_>) -> BatchSection {
    let section = BatchSection {
        max_messages: t.integer("max-messages", 1..=MAX_BATCH_MESSAGES),
        max_bytes: t.size("max-bytes", KIB..=GIB),
        max_time: t.duration("max-time", MILLISECOND..=MINUTE),
    };
    t.finish();
    section
}

fn http(mut t: Table<'_>) -> HttpSection {
    let section = HttpSection {
        listen: t.required_text("listen", "\"127.0.0.1:8080\""),
        max_body: t.size("max-body", 1..=GIB),
        routes: t.tables("routes").into_iter().map(route).collect(),
    };
    t.finish();
    section
}

fn route(mut t: Table<'_>) -> RouteSection {
    let section = RouteSection {
        span: t.span.clone(),
        path: t.required_text("path", "\"/things/{id}\""),
        method: t.required_text("method", "\"GET\""),
        produce: t.table("produce").map(produce),
        read: t.table("read").map(read_section),
        status: t.integer("status", 200..=299),
        body: t.text("body"),
    };
    t.finish();
    section
}

fn produce(mut t: Table<'_>) -> ProduceSection {
    let section = ProduceSection {
        span: t.span.clone(),
        topic: t.required_text("topic", "\"a-topic\""),
        key: t.text("key"),
        fields: t.texts("fields").map_or_else(Vec::new, |list| list.value),
        generate: t.texts("generate").map_or_else(Vec::new, |list| list.value),
    };
    t.finish();
    section
}

fn read_section(mut t: Table<'_>) -> ReadSection {
    let section = ReadSection {
        redis: t.required_text("redis", "\"a-store\""),
        key: t.required_text("key", "\"thing:{id}\""),
    };
    t.finish();
    section
}

fn admin(mut t: Table<'_>) -> AdminSection {
    let section = AdminSection {
        listen: t.text("listen"),
        token: t.text("token"),
    };
    t.finish();
    section
}
