//! The message that is sent through everything, and how time is taken.

use std::sync::Arc;
use std::time::{Duration, Instant};

use host::record::{Header, Outgoing, Record};

/// Characters of the post's content.
const CONTENT: usize = 200;

/// As long as Kafka's are.
pub(crate) const CLUSTER: &str = "nUcoD3k0SHyTn1WYwXqZCg";

/// A post in JSON, as another stage emitted it.
pub(crate) fn record(offset: i64) -> Record {
    let uid = format!("0198f3a2-6f3e-7c1d-9b57-{offset:012}");
    let content = "x".repeat(CONTENT);
    let value = format!(r#"{{"uid":"{uid}","title":"About Kafka","content":"{content}"}}"#);
    Record {
        topic: Arc::from("app.posts"),
        partition: 3,
        offset,
        timestamp: Some(1_760_000_000_000),
        key: Some(uid.into_bytes()),
        value: Some(value.into_bytes()),
        headers: vec![Header::new(
            "stagehost-id",
            format!("@{CLUSTER}/app.posts/3/service.publisher/app.newPosts/3/0/{offset}/0"),
        )],
    }
}

/// So many, one after the other.
pub(crate) fn records(count: i64) -> Vec<Record> {
    (0..count).map(record).collect()
}

/// What a stage makes of a record.
pub(crate) fn output(record: &Record) -> Outgoing {
    Outgoing {
        topic: record.topic.clone(),
        partition: Some(record.partition),
        timestamp: record.timestamp,
        key: record.key.clone(),
        value: record.value.clone(),
        headers: record.headers.clone(),
    }
}

/// The time that `run` takes for one of its `messages`, as often as it is asked; what `prepare` does and what
/// becomes of the results takes none.
pub(crate) fn timed<S, T>(
    rounds: u64,
    messages: u32,
    mut prepare: impl FnMut() -> S,
    mut run: impl FnMut(S) -> T,
) -> Duration {
    let mut total = Duration::ZERO;
    for _ in 0..rounds {
        let prepared = prepare();
        let since = Instant::now();
        let result = run(prepared);
        total += since.elapsed();
        std::hint::black_box(result);
    }
    total / messages
}
