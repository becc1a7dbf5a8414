//! What the Makefile calls, where a fault of it would go unseen.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

/// A test run that is given up must not leave its hosts behind.
#[test]
fn with_servers_ends_all_that_its_command_started() {
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts");
    let servers = [
        "KAFKA_BROKERS",
        "KAFKA_SASL_BROKERS",
        "DATABASE_URL",
        "REDIS_URL",
    ];
    let mut script = Command::new(scripts.join("with-servers"))
        .args(["sh", "-c", "sleep 3600 & echo $!; wait"])
        .envs(servers.map(|name| (name, "none is started")))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut started = String::new();
    let mut printed = BufReader::new(script.stdout.take().unwrap());
    printed.read_line(&mut started).unwrap();
    let started = started.trim();
    assert!(is_alive(started));
    let term = ["-TERM".to_owned(), script.id().to_string()];
    assert!(Command::new("kill").args(term).status().unwrap().success());
    assert_eq!(script.wait().unwrap().code(), Some(143));
    assert!(!is_alive(started), "{started} goes on");
}

/// One id of 64 begins with the sign that options begin with.
#[test]
fn with_servers_starts_kafka_whatever_its_cluster_is_called() {
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts");
    let script = Command::new(scripts.join("with-servers"))
        .args(["sh", "-c", "kcat -L -b \"$KAFKA_BROKERS\" -m 5"])
        .env_remove("KAFKA_BROKERS")
        .env_remove("KAFKA_SASL_BROKERS")
        .envs([("DATABASE_URL", "none"), ("REDIS_URL", "none")])
        .env("KAFKA_CLUSTER_ID", "-AAAAAAAAAAAAAAAAAAAAA")
        .output()
        .unwrap();
    let (listed, said) = (&script.stdout, String::from_utf8_lossy(&script.stderr));
    assert!(script.status.success(), "{said}");
    let listed = String::from_utf8_lossy(listed);
    assert!(listed.contains("1 brokers:"), "{listed}");
}

/// Whether a process is there and has not ended.
fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| &rest[..1]);
    state.is_some_and(|state| !"ZX".contains(state))
}
