//! Every message that a pipeline file can be refused with.
//!
//! A case is a folder of `tests/check`: `pipeline.toml`, and `expected.txt` with what `host check` prints.
//! `UPDATE_EXPECT=1 cargo test -p host --test check` writes the expectations anew. Cases are copied to a
//! folder of their own, beside the components that `components/*.wat` are translated to.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use expect_test::expect_file;
use host::pipeline::{Pipeline, Probe};

/// Checks without the ports, which other tests may have.
const TEXT_AND_COMPONENTS: Probe = Probe {
    components: true,
    files: true,
    ..Probe::NONE
};

fn cases() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/check")
}

/// A folder with a pipeline file and every component that a case may name.
fn prepare(pipeline: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("pipeline.toml"), pipeline).unwrap();
    fs::write(folder.path().join("text.wasm"), "not a component at all\n").unwrap();
    for (name, file, content) in [
        ("migrations", "0001_posts.sql", &b"SELECT 1;"[..]),
        ("no-migrations", "posts.sql", b"SELECT 1;"),
        ("latin-1", "0001_posts.sql", b"SELECT '\xfc';"),
    ] {
        fs::create_dir(folder.path().join(name)).unwrap();
        fs::write(folder.path().join(name).join(file), content).unwrap();
    }
    for entry in fs::read_dir(cases().join("components")).unwrap() {
        let source = entry.unwrap().path();
        let bytes = wat::parse_file(&source).unwrap();
        let name = source.with_extension("wasm");
        let damaged = &bytes[..bytes.len() - 1];
        if name.file_stem().unwrap() == "handler" {
            fs::write(folder.path().join("damaged.wasm"), damaged).unwrap();
        }
        fs::write(folder.path().join(name.file_name().unwrap()), &bytes).unwrap();
    }
    folder
}

/// What loading says, with the temporary folder left out of the paths.
fn load(pipeline: &str, env: &[(&str, &str)], probe: Probe) -> Result<Pipeline, String> {
    load_in(&prepare(pipeline), env, probe)
}

fn load_in(
    folder: &tempfile::TempDir,
    env: &[(&str, &str)],
    probe: Probe,
) -> Result<Pipeline, String> {
    let env: BTreeMap<&str, &str> = env.iter().copied().collect();
    let look_up = |name: &str| env.get(name).map(|value| (*value).to_owned());
    let place = format!("{}/", folder.path().display());
    Pipeline::load(&folder.path().join("pipeline.toml"), &look_up, probe)
        .map_err(|diagnostics| diagnostics.to_string().replace(&place, ""))
}

fn check(case: &str, env: &[(&str, &str)], probe: Probe) {
    let folder = cases().join(case);
    let pipeline = fs::read_to_string(folder.join("pipeline.toml")).unwrap();
    let files = prepare(&pipeline);
    let place = format!("{}/", files.path().display());
    let said = match load_in(&files, env, probe) {
        Err(said) => said,
        Ok(pipeline) => match pipeline.warnings() {
            Some(warnings) => warnings.to_string().replace(&place, ""),
            None => panic!("{case} was taken for a good pipeline"),
        },
    };
    for (_, secret) in env.iter().filter(|(name, _)| name.starts_with("SECRET")) {
        assert!(!said.contains(secret), "{case} shows a secret:\n{said}");
    }
    assert!(!said.contains("hunter"), "{case} shows a secret:\n{said}");
    let expected = folder.join("expected.txt");
    expect_file![expected.to_str().unwrap()].assert_eq(&said);
}

#[test]
fn each_wrong_pipeline_has_its_message() {
    let mut names: Vec<String> = fs::read_dir(cases())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "components" && !name.starts_with("port-"))
        .collect();
    names.sort();
    assert!(names.len() > 30, "the cases are gone");
    for name in &names {
        let env = [
            ("SECRET_URL", "mysql://me:hunter2@db/posts"),
            ("SECRET_NUMBER", "hunter3"),
            ("SECRET_WITH_HASH", "postgres://me:hunter#4@db/posts"),
            ("SECRET_WITH_LINE", "redis://:hunter5\n@cache"),
            ("TOPIC", "not a topic"),
        ];
        check(name, &env, TEXT_AND_COMPONENTS);
    }
}

#[test]
fn a_port_in_use_is_refused() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    check("port-in-use", &[("TAKEN", &address)], Probe::ALL);
    check("port-twice", &[("SAME", "127.0.0.1:18181")], Probe::ALL);
    // Who talks to the log of a running pipeline does not mind.
    let text = fs::read_to_string(cases().join("port-in-use/pipeline.toml")).unwrap();
    load(&text, &[("TAKEN", &address)], Probe::NONE).unwrap();
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let none = |_: &str| None;
    let said = Pipeline::load(Path::new("no/such/pipeline.toml"), &none, Probe::ALL).unwrap_err();
    expect_test::expect![[r#"
        error: the pipeline file can't be read: there is no such file or folder
        --> no/such/pipeline.toml
         = help: give the path of a pipeline file, such as `examples/blog/pipeline.toml`

        no/such/pipeline.toml: 1 problem; nothing was started
    "#]]
    .assert_eq(&said.to_string());
}

/// A pipeline that is fine, to be spoiled or extended.
const GOOD: &str = r#"
name = "good"
kafka = { brokers = "${BROKERS:-embedded}", properties = { linger.ms = 5, "sasl.password" = "${SECRET}" } }
topics."a.in" = { partitions = "${PARTITIONS:-8}", config = { retention.ms = 1000 } }
sql.db.url = "postgres://me:${SECRET}@db/posts"
redis.cache.url = "rediss://:${SECRET}@cache/1"
[stages.one]
component = "all.wasm"
input = ["a.in"]
output = ["a.out"]
group = "g"
sql = ["db"]
redis.cache = { prefix = "one:", commands = ["expire"] }
delivery = "at-least-once"
config = { password = "${SECRET}" }
[stages.two]
component = "batch.wasm"
input = ["a.out"]
output = ["a.in"]
group = "h"
allow-cycle = true
[admin]
listen = "0.0.0.0:0"
token = "${SECRET}"
"#;

#[test]
fn a_good_pipeline_is_taken_and_shows_no_secret() {
    let env = [("SECRET", "hunter2"), ("PARTITIONS", "12")];
    let pipeline = load(GOOD, &env, Probe::ALL).unwrap();
    let shown = format!("{pipeline:?}{}", host::cli::check::summary(&pipeline));
    assert!(!shown.contains("hunter2"), "{shown}");
    for part in [
        "Some(12)",
        "one: a.in → a.out  group g  store db  store cache  at least once\n",
        "two: a.out → a.in  group h  at least once\n",
        "\"EXPIRE\"",
        "rediss://:***@cache/1",
    ] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
}

#[test]
fn delivery_has_its_defaults() {
    for (settings, meant) in [
        (
            "",
            "AtLeastOnce, order: Partition, concurrency: 1, on_exhausted: DeadLetter, on_gap: Stop",
        ),
        (
            "sql = [\"one\"]",
            "Transactional, order: Partition, concurrency: 1,",
        ),
        ("sql = [\"one\", \"two\"]", "AtLeastOnce, order: Partition"),
        (
            "sql = [\"one\"]\ndelivery = \"at-least-once\"",
            "AtLeastOnce, order: Partition",
        ),
        (
            "order = \"key\"",
            "AtLeastOnce, order: Key, concurrency: 16,",
        ),
        (
            "order = \"none\"\nconcurrency = 1000",
            "AtLeastOnce, order: None, concurrency: 1000,",
        ),
        (
            "on-exhausted = \"stop\"\non-gap = \"continue\"",
            "on_exhausted: Stop, on_gap: Continue",
        ),
        ("instance-id = \"${HOST}\"", "instance_id: Some(\"host-7\")"),
    ] {
        let pipeline = format!(
            "name = \"defaults\"\nkafka.brokers = \"embedded\"\n[sql]\none.url = \"sqlite:one.db\"\n\
             two.url = \"sqlite:two.db\"\n[stages.a]\ncomponent = \"all.wasm\"\ninput = [\"i\"]\ngroup = \"g\"\n\
             {settings}"
        );
        let pipeline = load(&pipeline, &[("HOST", "host-7")], Probe::NONE).unwrap();
        let shown = format!("{pipeline:?}");
        assert!(
            shown.contains(meant),
            "{settings}: {meant} is not in {shown}"
        );
    }
}

#[test]
fn a_spoiled_file_is_answered_whatever_is_spoiled() {
    let folder = prepare("");
    let path = folder.path().join("pipeline.toml");
    let env = |_: &str| Some("ü".to_owned());
    for at in 0..GOOD.len() {
        let (before, after) = GOOD.split_at(at);
        let spoiled = [
            before.to_owned(),
            format!("{before}{}", &after[1..]),
            format!("{before}ü{}", &after[1..]),
        ];
        for text in spoiled {
            fs::write(&path, &text).unwrap();
            if let Err(problems) = Pipeline::load(&path, &env, Probe::NONE) {
                assert!(problems.count() > 0, "refused without a reason:\n{text}");
                assert!(problems.to_string().contains("pipeline.toml"));
            }
        }
    }
}

#[test]
fn the_example_is_taken() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/blog/pipeline.toml");
    let none = |_: &str| None;
    Pipeline::load(&path, &none, Probe::NONE).unwrap();
    let real = |name: &str| match name {
        "KAFKA_BROKERS" => Some("kafka-1:9092,kafka-2:9092".to_owned()),
        "DATABASE_URL" => Some("postgres://user:password@db/blog".to_owned()),
        "REDIS_URL" => Some("redis://cache:6379".to_owned()),
        _ => None,
    };
    Pipeline::load(&path, &real, Probe::NONE).unwrap();
}
