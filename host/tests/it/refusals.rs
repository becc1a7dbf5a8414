//! What `host run` refuses: `host check` has said it before, and nothing was created.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use tempfile::TempDir;

use crate::support::{Host, Log, component, server, unique};

/// A stage that can run, on topics that are declared.
fn pipeline(brokers: &str, settings: &str) -> String {
    let component = component("test-echo");
    format!(
        r#"
        name = "refused"
        kafka.brokers = "{brokers}"
        topics.a = {{}}
        topics.b = {{}}
        {settings}
        [stages.one]
        component = "{component}"
        input = ["a"]
        group = "g"
        output = ["b"]
        config = {{ to = "b" }}
        "#
    )
}

const FREE_ADMIN: &str = "admin.listen = \"127.0.0.1:0\"";

fn folder_with(pipeline: &str) -> Arc<TempDir> {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("pipeline.toml"), pipeline).expect("the pipeline file");
    Arc::new(folder)
}

/// The exit code of `host check`, and what it wrote to stdout and stderr.
fn check(folder: &Path, options: &[&str]) -> (Option<i32>, String) {
    let done = Command::new(env!("CARGO_BIN_EXE_host"))
        .arg("check")
        .args(options)
        .current_dir(folder)
        .output()
        .expect("the host");
    let (out, error) = (&done.stdout, &done.stderr);
    let said = [out.as_slice(), error].concat();
    (done.status.code(), String::from_utf8(said).expect("UTF-8"))
}

/// Both refuse it with these words and the place, and the log was not even made. Answers what `check` said.
fn both_refuse(folder: &Arc<TempDir>, words: &str) -> String {
    let (code, checked) = check(folder.path(), &[]);
    assert_eq!(code, Some(2), "{checked}");
    assert!(
        checked.contains(words) && checked.contains("pipeline.toml:"),
        "{checked}"
    );
    assert!(!folder.path().join("data").exists(), "check made something");
    let host = Host::run(folder.clone(), &folder.path().join("pipeline.toml"), &[]);
    let (status, said) = host.ended();
    assert_eq!(status.code(), Some(2), "{said}");
    assert!(
        said.contains(words) && said.contains("pipeline.toml:"),
        "{said}"
    );
    assert!(!folder.path().join("data/kafka").exists(), "{said}");
    checked
}

#[test]
fn check_refuses_a_component_that_run_can_not_link() {
    for (name, words) in [
        ("async", "the component of `one` can't be compiled"),
        ("other-function", "the component of `one` can't be linked"),
        ("handler", "the component of `one` can't be linked"),
    ] {
        let text = pipeline("embedded", FREE_ADMIN);
        let text = text.replace(&component("test-echo"), "stage.wasm");
        let folder = folder_with(&text);
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/check/components");
        let bytes = wat::parse_file(source.join(name).with_extension("wat"));
        let bytes = bytes.expect("a component");
        std::fs::write(folder.path().join("stage.wasm"), bytes).expect("the component");
        println!("{}", both_refuse(&folder, words));
    }
}

#[test]
fn check_refuses_a_component_without_room_for_its_memory() {
    let text = pipeline("embedded", FREE_ADMIN);
    let folder = folder_with(&format!("{text}limits = {{ memory = \"1MiB\" }}\n"));
    both_refuse(&folder, "and `limits.memory` is 1.0 MiB");
}

#[test]
fn check_refuses_listeners_that_only_one_of_can_have() {
    let free = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = free.local_addr().expect("its number").port();
    drop(free);
    let settings =
        format!("admin.listen = \"127.0.0.1:{port}\"\nkafka.listen = \"127.0.0.1:{port}\"\n");
    let folder = folder_with(&pipeline("embedded", &settings));
    both_refuse(&folder, "[kafka] and [admin] listen on the same address");
}

#[test]
fn check_says_that_another_host_has_the_data_dir() {
    let settings = format!("{FREE_ADMIN}\nredis.cache.url = \"embedded:data/cache\"\n");
    let folder = folder_with(&pipeline("embedded", &settings));
    let host = Host::run(folder.clone(), &folder.path().join("pipeline.toml"), &[]);
    host.ready();
    let (code, said) = check(folder.path(), &[]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("in use by another broker"), "{said}");
    assert!(
        said.contains("another host has this embedded store open"),
        "{said}"
    );
    let (code, said) = check(folder.path(), &["--skip-ports"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(host.stop().0.success());
}

/// The names that begin so of the log's topics.
fn topics(log: &Log, prefix: &str) -> BTreeSet<String> {
    let names = log.topics().into_iter();
    names.filter(|name| name.starts_with(prefix)).collect()
}

#[test]
fn a_slip_in_an_inputs_name_is_told_by_check_and_creates_nothing() {
    let brokers = server("KAFKA_BROKERS");
    let name = unique("slip");
    let text = pipeline(&brokers, FREE_ADMIN)
        .replace("topics.a", &format!("topics.\"{name}.newPosts\""))
        .replace("topics.b", &format!("topics.\"{name}.out\""))
        .replace("[\"a\"]", &format!("[\"{name}.newPost\"]"))
        .replace("[\"b\"]", &format!("[\"{name}.out\"]"));
    let folder = folder_with(&text);
    let mend = format!("did you mean `{name}.newPosts`?");
    let (code, said) = check(folder.path(), &[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("warning: ") && said.contains(&mend), "{said}");
    let host = Host::run(folder.clone(), &folder.path().join("pipeline.toml"), &[]);
    let (status, said) = host.ended();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(
        said.contains("does not exist") && said.contains(&mend),
        "{said}"
    );
    assert_eq!(topics(&Log::new(&brokers), &name), BTreeSet::new());
}

#[test]
fn a_topic_that_the_log_refuses_leaves_no_others_behind() {
    let brokers = server("KAFKA_BROKERS");
    let name = unique("refused");
    let text = pipeline(&brokers, FREE_ADMIN)
        .replace("topics.a = {}", &format!("topics.\"{name}.a\" = {{}}"))
        .replace(
            "topics.b = {}",
            &format!("topics.\"{name}.b\".config = {{ \"retention.ms\" = \"soon\" }}"),
        )
        .replace("[\"a\"]", &format!("[\"{name}.a\"]"))
        .replace("[\"b\"]", &format!("[\"{name}.b\"]"));
    let folder = folder_with(&text);
    let host = Host::run(folder.clone(), &folder.path().join("pipeline.toml"), &[]);
    let (status, said) = host.ended();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(
        said.contains(&format!("topic `{name}.b` cannot be created")),
        "{said}"
    );
    assert_eq!(topics(&Log::new(&brokers), &name), BTreeSet::new());
}

#[test]
fn an_unclosed_bracket_is_one_problem_and_a_password_is_not_shown() {
    let text = pipeline("embedded", FREE_ADMIN);
    let folder = folder_with(&text.replace("[\"a\"]", "[\"a\""));
    let (code, said) = check(folder.path(), &[]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("this `[` is not closed"), "{said}");
    assert!(said.contains("1 problem;"), "{said}");
    let stores = "sql.db.url = \"postgres://me:hunter#2@db/posts\"\n";
    let folder = folder_with(&pipeline("embedded", &format!("{FREE_ADMIN}\n{stores}")));
    let (code, said) = check(folder.path(), &[]);
    assert_eq!(code, Some(2), "{said}");
    assert!(
        said.contains("percent-encoded") && said.contains("`%23`"),
        "{said}"
    );
    assert!(!said.contains("hunter"), "{said}");
}
