//! The same broker through `kcat`.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::cluster::{Cluster, unique};

pub(crate) fn lists_a_topic(cluster: &Cluster) {
    let topic = cluster.topic(3);
    let listed = kcat(cluster, &["-L", "-t", &topic], "");
    assert!(
        listed.contains(&format!("topic \"{topic}\" with 3 partitions")),
        "{listed}"
    );
    assert!(listed.contains("1 brokers:"), "{listed}");
}

pub(crate) fn produces_and_consumes(cluster: &Cluster) {
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
        let topic = unique("kcat");
        let produce = [
            "-P", "-t", &topic, "-p", "0", "-z", codec, "-K", ":", "-H", "trace=1", "-H",
            "trace=2", "-Z",
        ];
        kcat(cluster, &produce, "k1:one\nk2:\n:three\n");
        let format = "%o|%K|%k|%S|%s|%h\n";
        let read = kcat(
            cluster,
            &[
                "-C",
                "-t",
                &topic,
                "-p",
                "0",
                "-o",
                "beginning",
                "-e",
                "-q",
                "-f",
                format,
            ],
            "",
        );
        // `-Z` makes an empty key or value a null one, whose length is -1.
        let expected = "0|2|k1|3|one|trace=1,trace=2\n1|2|k2|-1||trace=1,trace=2\n2|-1||5|three|trace=1,trace=2\n";
        assert_eq!(read, expected, "{codec}");
    }
}

pub(crate) fn consumes_in_a_group(cluster: &Cluster) {
    let (topic, group) = (cluster.topic(2), unique("g"));
    cluster.produce(&topic, 0, &["a", "b"]);
    cluster.produce(&topic, 1, &["c"]);
    let consume = |count: &str| {
        kcat(
            cluster,
            &[
                "-G",
                &group,
                "-X",
                "auto.offset.reset=earliest",
                "-q",
                "-c",
                count,
                &topic,
            ],
            "",
        )
    };
    let first = consume("3");
    let mut lines: Vec<&str> = first.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["a", "b", "c"]);
    // It committed when it left, so the next one goes on from there.
    cluster.produce(&topic, 1, &["d"]);
    assert_eq!(consume("1"), "d\n");
}

pub(crate) fn finds_offsets_by_time(cluster: &Cluster) {
    let topic = cluster.topic(1);
    cluster.produce(&topic, 0, &["a", "b"]);
    for (time, offset) in [("-1", "2"), ("-2", "0"), ("1", "0")] {
        let answer = kcat(cluster, &["-Q", "-t", &format!("{topic}:0:{time}")], "");
        assert_eq!(
            answer,
            format!("{topic} [0] offset {offset}\n"),
            "at {time}"
        );
    }
}

/// Runs `kcat` with some input and gives what it printed.
fn kcat(cluster: &Cluster, arguments: &[&str], input: &str) -> String {
    let mut child = Command::new("kcat")
        .args(["-b", &cluster.brokers])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kcat is installed: run `make test`, which sees to it");
    child
        .stdin
        .take()
        .expect("a pipe")
        .write_all(input.as_bytes())
        .expect("kcat reads its input");
    let output = child.wait_with_output().expect("kcat ends");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "kcat {arguments:?}: {errors}");
    String::from_utf8(output.stdout).expect("UTF-8")
}
