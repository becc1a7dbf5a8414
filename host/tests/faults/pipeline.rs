//! What the hosts run: two transactional stages in a chain, and a cache beside the second; and two stages, one of each
//! delivery, behind a topic that another program writes in transactions.
//!
//! ```text
//! input → first → middle → second → out
//!                      ↘ cacher → Redis
//! books → booked → booked-out
//!      ↘ passer → passed
//! ```

use std::path::Path;

pub(crate) const INPUT: &str = "faults.input";
pub(crate) const MIDDLE: &str = "faults.middle";
pub(crate) const OUT: &str = "faults.out";
/// What Kafka transactions are written to, and retention empties.
pub(crate) const BOOKS: &str = "faults.books";
pub(crate) const BOOKED_OUT: &str = "faults.booked-out";
pub(crate) const PASSED: &str = "faults.passed";
/// Of the topics of the chain, and of those around the books.
const PARTITIONS: usize = 8;
pub(crate) const BOOKS_PARTITIONS: usize = 4;

/// What every key in Redis begins with.
pub(crate) const CACHE_PREFIX: &str = "cache:";

/// A stage as the judge looks at it.
#[derive(Debug)]
pub(crate) struct Stage {
    /// Its name, and what it is called in the column `lane`.
    pub(crate) name: &'static str,
    pub(crate) input: &'static str,
    pub(crate) group: &'static str,
    pub(crate) letters: &'static str,
    /// Where it passes messages on to; the cacher does not.
    pub(crate) output: Option<&'static str>,
}

pub(crate) const FIRST: Stage = Stage {
    name: "first",
    input: INPUT,
    group: "faults.first",
    letters: "faults.first.dlq",
    output: Some(MIDDLE),
};
pub(crate) const SECOND: Stage = Stage {
    name: "second",
    input: MIDDLE,
    group: "faults.second",
    letters: "faults.second.dlq",
    output: Some(OUT),
};
pub(crate) const CACHER: Stage = Stage {
    name: "cacher",
    input: MIDDLE,
    group: "faults.cacher",
    letters: "faults.cacher.dlq",
    output: None,
};
pub(crate) const BOOKED: Stage = Stage {
    name: "booked",
    input: BOOKS,
    group: "faults.booked",
    letters: "faults.booked.dlq",
    output: Some(BOOKED_OUT),
};
/// Delivered to at least once: for it, an operator's reset of its offsets counts.
pub(crate) const PASSER: Stage = Stage {
    name: "passer",
    input: BOOKS,
    group: "faults.passer",
    letters: "faults.passer.dlq",
    output: Some(PASSED),
};
pub(crate) const STAGES: [&Stage; 5] = [&FIRST, &SECOND, &CACHER, &BOOKED, &PASSER];
/// Those with a row a lane in the database.
pub(crate) const TRANSACTIONAL: [&Stage; 3] = [&FIRST, &SECOND, &BOOKED];
/// Their lanes.
pub(crate) const TRANSACTIONAL_LANES: usize = 2 * PARTITIONS + BOOKS_PARTITIONS;
/// Partitions of the input topics of all stages.
pub(crate) const INPUT_PARTITIONS: usize = 3 * PARTITIONS + 2 * BOOKS_PARTITIONS;

/// The database of the stages, which may be set back to an older copy.
pub(crate) const DATABASE: &str = "faults";
/// The tables that the stages write. `effects` has no constraint that would hide a duplicate;
/// `taken` has a row that is in the way of `fail-caught`.
pub(crate) const TABLES: &str = "
    CREATE TABLE effects (
        id bigserial PRIMARY KEY, lane text NOT NULL, key text NOT NULL, seq bigint NOT NULL
    );
    CREATE TABLE taken (id int PRIMARY KEY);
    INSERT INTO taken VALUES (1);
    CREATE ROLE stagehost LOGIN PASSWORD 'stagehost';
    GRANT ALL ON SCHEMA public TO stagehost;
    GRANT ALL ON ALL TABLES IN SCHEMA public TO stagehost;
    GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO stagehost;
";
/// Who the hosts are there, and in Kafka; and their password in both.
pub(crate) const ROLE: &str = "stagehost";
/// What only the hosts' stores are called: what they say of one names it.
pub(crate) const EFFECTS: &str = "effects";
pub(crate) const CACHE: &str = "cache";

/// The ports of the proxies that the hosts use.
pub(crate) struct Ways {
    pub(crate) kafka: u16,
    pub(crate) postgres: u16,
    pub(crate) redis: u16,
}

/// The pipeline's file; `stages` is the folder of the components.
pub(crate) fn text(ways: &Ways, stages: &Path) -> String {
    let Ways {
        kafka,
        postgres,
        redis,
    } = ways;
    let stages_text = [
        stage(&FIRST, stages, "test-writer", WRITER),
        stage(&SECOND, stages, "test-writer", WRITER),
        stage(
            &CACHER,
            stages,
            "test-cacher",
            "redis = { cache = { prefix = \"cache:\" } }",
        ),
        stage(&BOOKED, stages, "test-writer", WRITER),
        stage(&PASSER, stages, "test-identity", ""),
    ]
    .concat();
    // The broker's time on what it appends tells what was cached before a flush.
    format!(
        r#"
name = "faults"
[kafka]
brokers = "127.0.0.1:{kafka}"
[kafka.properties]
"session.timeout.ms" = "6000"
"reconnect.backoff.max.ms" = "1000"
"security.protocol" = "sasl_plaintext"
"sasl.mechanism" = "PLAIN"
"sasl.username" = "{ROLE}"
"sasl.password" = "{ROLE}"
[topics."{INPUT}"]
partitions = {PARTITIONS}
[topics."{MIDDLE}"]
partitions = {PARTITIONS}
config = {{ "message.timestamp.type" = "LogAppendTime" }}
[topics."{OUT}"]
partitions = {PARTITIONS}
[topics."{BOOKS}"]
partitions = {BOOKS_PARTITIONS}
[topics."{BOOKED_OUT}"]
partitions = {BOOKS_PARTITIONS}
[topics."{PASSED}"]
partitions = {BOOKS_PARTITIONS}
[sql.{EFFECTS}]
url = "postgres://{ROLE}:{ROLE}@127.0.0.1:{postgres}/{DATABASE}"
max-connections = 20
[redis.{CACHE}]
url = "redis://127.0.0.1:{redis}"
[admin]
listen = "127.0.0.1:0"
{stages_text}"#
    )
}

const WRITER: &str = r#"sql = ["effects"]
limits = { deadline = "2s" }"#;

fn stage(stage: &Stage, components: &Path, component: &str, settings: &str) -> String {
    let Stage {
        name,
        input,
        group,
        letters,
        output,
    } = stage;
    let component = components.join(format!("{component}.wasm"));
    let passes_on = output.map_or_else(String::new, |to| {
        // The writer's settings, and the passer's.
        let config = format!("{{ lane = \"{name}\", to = \"{to}\", output = \"{to}\" }}");
        format!("output = [\"{to}\"]\nconfig = {config}\n")
    });
    format!(
        r#"
[stages.{name}]
component = "{}"
input = ["{input}"]
group = "{group}"
dead-letter = "{letters}"
retry = {{ max-attempts = 3, initial = "50ms", max = "1s" }}
{passes_on}{settings}
"#,
        component.display()
    )
}
