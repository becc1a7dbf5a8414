//! Fetch: records out, as soon as there are any.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use kafka_protocol::ResponseError;
use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic};
use kafka_protocol::messages::fetch_response::{FetchableTopicResponse, PartitionData};
use kafka_protocol::messages::{FetchRequest, FetchResponse, TopicName};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::{Call, code};
use crate::node::Node;
use crate::storage::partition::{Partition, Read};

/// Bytes of one answer, as Kafka's `fetch.max.bytes`; a larger batch is handed out alone.
const MAX_BYTES: usize = 55 << 20;
/// A client that wants to wait longer asks again.
const MAX_WAIT: Duration = Duration::from_secs(300);

/// What a request wants of a partition.
struct Wanted {
    partition: Result<Arc<Partition>, ResponseError>,
    index: i32,
    offset: i64,
    max_bytes: usize,
}

type Topic = (TopicName, Vec<Wanted>);

/// Reads what is there; with less than the client wants, waits for more as long as it wants.
pub(super) async fn fetch(call: &Call, request: FetchRequest) -> FetchResponse {
    if request.session_id != 0 {
        // No sessions: each request names all its partitions, as the answer to the first one (session 0) says.
        return FetchResponse::default()
            .with_error_code(ResponseError::FetchSessionIdNotFound.code());
    }
    let deadline =
        Instant::now() + Duration::from_millis(bound(request.max_wait_ms) as u64).min(MAX_WAIT);
    let max_bytes = bound(request.max_bytes).min(MAX_BYTES);
    let wanted = all_wanted(&call.node, request.topics);
    let arrived = Arc::new(Notify::new());
    loop {
        // First wait, then look: what arrives in between is not missed.
        partitions(&wanted)
            .filter_map(|wanted| wanted.partition.as_ref().ok())
            .for_each(|p| p.wait(&arrived));
        let is_last = Instant::now() >= deadline
            || call.node.shutdown.is_cancelled()
            || partitions(&wanted).next().is_none();
        if is_last || partitions(&wanted).any(Wanted::is_ready) {
            let to_read = wanted.clone();
            let read = tokio::task::spawn_blocking(move || read_all(&to_read, max_bytes)).await;
            let (response, found) = read.unwrap_or_else(|_| {
                // A panic while reading, which the log has.
                let error = ResponseError::UnknownServerError.code();
                (
                    FetchResponse::default().with_error_code(error),
                    Found {
                        bytes: 0,
                        error: true,
                    },
                )
            });
            if is_last || found.error || found.bytes >= bound(request.min_bytes) {
                return response;
            }
        }
        // Both are cancel-safe.
        tokio::select! {
            _ = timeout_at(deadline, arrived.notified()) => {}
            () = call.node.shutdown.cancelled() => {}
        }
    }
}

/// What a pass over the partitions found.
struct Found {
    bytes: usize,
    error: bool,
}

fn read_all(wanted: &[Topic], max_bytes: usize) -> (FetchResponse, Found) {
    let mut found = Found {
        bytes: 0,
        error: false,
    };
    let mut response = FetchResponse::default();
    for (name, partitions) in wanted {
        let mut topic = FetchableTopicResponse::default().with_topic(name.clone());
        for wanted in partitions {
            let left = max_bytes.saturating_sub(found.bytes);
            let read = wanted.read(left, found.bytes == 0);
            found.bytes += read.as_ref().map_or(0, |read| read.records.len());
            found.error |= read.is_err();
            topic.partitions.push(partition_data(wanted.index, read));
        }
        response.responses.push(topic);
    }
    (response, found)
}

impl Wanted {
    /// Whether there is something to answer without waiting: records, or an error.
    fn is_ready(&self) -> bool {
        match &self.partition {
            Ok(partition) => partition.is_deleted() || self.offset != partition.high_watermark(),
            Err(_) => true,
        }
    }

    fn read(&self, left: usize, at_least_one: bool) -> Result<Read, ResponseError> {
        let partition = self.partition.as_ref().map_err(|error| *error)?;
        partition.read(self.offset, self.max_bytes.min(left), at_least_one)
    }
}

fn all_wanted(node: &Node, topics: Vec<FetchTopic>) -> Arc<[Topic]> {
    let mut seen = HashSet::new();
    topics
        .into_iter()
        .map(
            |FetchTopic {
                 topic, partitions, ..
             }| {
                let wanted = partitions
                    .iter()
                    .map(|partition| want(node, &topic, partition, &mut seen))
                    .collect();
                (topic, wanted)
            },
        )
        .collect()
}

/// `seen`: the partitions of this request so far. One named again is refused: there are no more to wait for than there
/// are partitions.
fn want(
    node: &Node,
    topic: &str,
    request: &FetchPartition,
    seen: &mut HashSet<*const Partition>,
) -> Wanted {
    let found = node.topics.partition(topic, request.partition);
    let partition = found.and_then(|partition| {
        if seen.insert(Arc::as_ptr(&partition)) {
            Ok(partition)
        } else {
            Err(ResponseError::InvalidRequest)
        }
    });
    Wanted {
        partition,
        index: request.partition,
        offset: request.fetch_offset,
        max_bytes: bound(request.partition_max_bytes),
    }
}

fn partitions(topics: &[Topic]) -> impl Iterator<Item = &Wanted> {
    topics.iter().flat_map(|(_, partitions)| partitions)
}

fn partition_data(index: i32, read: Result<Read, ResponseError>) -> PartitionData {
    let data = PartitionData::default()
        .with_partition_index(index)
        .with_error_code(code(&read));
    match read {
        Ok(read) => data
            .with_high_watermark(read.high_watermark)
            .with_last_stable_offset(read.high_watermark)
            .with_log_start_offset(read.start)
            .with_records(Some(read.records)),
        Err(_) => data.with_high_watermark(-1),
    }
}

/// A size or time of the protocol, where less than 0 is 0.
fn bound(value: i32) -> usize {
    usize::try_from(value).unwrap_or(0)
}
