//! What the hosts run: two transactional stages in a chain, and a cache beside the second.
//!
//! ```text
//! input → first → middle → second → out
//!                      ↘ cacher → Redis
//! ```

use std::path::Path;

pub(crate) const INPUT: &str = "faults.input";
pub(crate) const MIDDLE: &str = "faults.middle";
pub(crate) const OUT: &str = "faults.out";

/// What every key in Redis begins with.
pub(crate) const CACHE_PREFIX: &str = "cache:";

/// A stage as the judge looks at it.
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
pub(crate) const STAGES: [&Stage; 3] = [&FIRST, &SECOND, &CACHER];

/// The tables that the stages write. `effects` has no constraint that would hide a duplicate;
/// `taken` has a row that is in the way of `fail-caught`.
pub(crate) const TABLES: &str = "
    CREATE TABLE effects (
        id bigserial PRIMARY KEY, lane text NOT NULL, key text NOT NULL, seq bigint NOT NULL
    );
    CREATE TABLE taken (id int PRIMARY KEY);
    INSERT INTO taken VALUES (1);
    CREATE ROLE stagehost LOGIN;
    GRANT ALL ON SCHEMA public TO stagehost;
    GRANT ALL ON ALL TABLES IN SCHEMA public TO stagehost;
    GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO stagehost;
";
/// Who the hosts are there.
pub(crate) const ROLE: &str = "stagehost";

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
[topics."{INPUT}"]
partitions = 8
[topics."{MIDDLE}"]
partitions = 8
config = {{ "message.timestamp.type" = "LogAppendTime" }}
[topics."{OUT}"]
partitions = 8
[sql.effects]
url = "postgres://{ROLE}@127.0.0.1:{postgres}/postgres"
max-connections = 20
[redis.cache]
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
        format!("output = [\"{to}\"]\nconfig = {{ lane = \"{name}\", to = \"{to}\" }}\n")
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
