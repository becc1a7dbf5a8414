//! Pipeline files as large as they may be, of the shapes whose checks take longest.

use std::time::{Duration, Instant};

use fuzz::Target;

/// Of the largest file that is read.
const BYTES: usize = (1 << 20) - 100;
/// A few seconds, on a busy machine and not optimised; what takes as long as the square of the size takes hours.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_pipeline_file_of_any_size_is_checked_in_time_and_memory() {
    for (what, file) in [
        ("an error a line", many(|_| "=\n".to_owned())),
        ("errors in one line", many(|_| "= ".to_owned())),
        ("unknown keys", many(|i| format!("k{i}=1\n"))),
        ("one long key", format!("{}=1", "k".repeat(BYTES - 2))),
        (
            "a long line",
            format!("name={:?}\nk=1", "n".repeat(BYTES - 20)),
        ),
        ("values", format!("k=[{}]", many(|_| "1,".to_owned()))),
        (
            "topics of no route",
            topics_and(|i| output(&format!("b{i}"))),
        ),
        ("topics of one name", topics_and(|_| output("a1"))),
        ("stages in a row", stages(|i| (i, i + 1))),
        ("stages in rings", stages(|i| (i, i ^ 1))),
        ("stages in all rings", stages(|_| (0, 0))),
        ("stages of long names", long_stages()),
        ("read routes of one text", routes("a{n}")),
        ("lists in lists", "k=".to_owned() + &"[".repeat(BYTES)),
        (
            "tables in tables",
            "k=".to_owned() + &"{a=".repeat(BYTES / 3),
        ),
        (
            "a long way down",
            format!("{}=1", vec!["a"; BYTES / 2].join(".")),
        ),
        ("as deep as TOML goes", deep()),
        ("variables", format!("name={:?}", "${A".repeat(BYTES / 3))),
    ] {
        println!("{what}: {} bytes", file.len());
        let started = Instant::now();
        (Target::named("pipeline-file").expect("a target").check)(file.as_bytes());
        assert!(
            started.elapsed() < PATIENCE,
            "{what}: {:?}",
            started.elapsed()
        );
        println!("{:?}", started.elapsed());
    }
}

/// So many of them as fill a file.
fn many(one: impl Fn(usize) -> String) -> String {
    filled(String::new(), BYTES, one)
}

fn filled(mut file: String, bytes: usize, one: impl Fn(usize) -> String) -> String {
    for i in 0.. {
        let more = one(i);
        if file.len() + more.len() > bytes {
            break;
        }
        file.push_str(&more);
    }
    file
}

/// Few enough to be looked at one by one.
const VALUES: usize = 9_000;

fn topics_and(stage: impl Fn(usize) -> String) -> String {
    let topics: String = (0..VALUES / 2)
        .map(|i| format!("topics.a{i}={{}}\n"))
        .collect();
    let rest: String = (0..VALUES / 2).map(stage).collect();
    format!("{topics}[stages.s]\noutput=[{rest}]\n")
}

fn output(topic: &str) -> String {
    format!("{topic:?},")
}

fn stages(topics: impl Fn(usize) -> (usize, usize)) -> String {
    let stage = |i: usize| {
        let (from, to) = topics(i);
        format!("[stages.s{i}]\ninput=[\"t{from}\"]\noutput=[\"t{to}\"]\n")
    };
    (0..VALUES / 5).map(stage).collect()
}

/// Each in one group with the first, whose name is half of the file.
fn long_stages() -> String {
    let first = format!(
        "[stages.{}]\ninput=[\"a\"]\ngroup=\"g\"\n",
        "s".repeat(BYTES / 2)
    );
    let other = |i: usize| format!("[stages.s{i}]\ninput=[\"b\"]\ngroup=\"g\"\n");
    first + &(0..VALUES / 5).map(other).collect::<String>()
}

fn routes(key: &str) -> String {
    let route = |i: usize| {
        format!(
            "[[http.routes]]\npath=\"/{i}/{{n}}\"\nmethod=\"GET\"\nread={{redis=\"r\",key={key:?}}}\n"
        )
    };
    filled("redis.r.url=\"memory\"\n".to_owned(), BYTES, |i| {
        if i < VALUES / 6 {
            route(i)
        } else {
            "\n".repeat(BYTES)
        }
    })
}

/// The most keys in the most tables that the parser takes.
fn deep() -> String {
    const LIMIT: usize = 79;
    let path = vec!["a"; LIMIT].join(".");
    let inside = format!("{{{path}=").repeat(LIMIT - 1);
    format!("[{path}]\n{path}={inside}1{}\n", "}".repeat(LIMIT - 1))
}
