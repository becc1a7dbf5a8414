//! The requests: which versions are taken, and who answers each. One file a family.

mod admin;
mod configs;
mod fetch;
mod groups;
mod metadata;
mod offsets;
mod produce;

use std::collections::HashSet;
use std::hash::Hash;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use kafka_protocol::ResponseError;
use kafka_protocol::messages::{ApiKey, RequestHeader, ResponseHeader};
use kafka_protocol::protocol::{Decodable, Encodable, StrBytes};

use crate::node::Node;
use crate::shape::{self, BadShape};

/// The requests that are taken, with the first and last version.
///
/// `Produce` 0 to 2 are named only because librdkafka looks for version 0 to find out which codecs it may use; like
/// Apache Kafka, the broker does not take them.
pub(crate) const TAKEN: [(ApiKey, i16, i16); 26] = [
    (ApiKey::Produce, 0, 8),
    (ApiKey::Fetch, 4, 11),
    (ApiKey::ListOffsets, 1, 7),
    (ApiKey::Metadata, 0, 12),
    (ApiKey::OffsetCommit, 2, 7),
    (ApiKey::OffsetFetch, 1, 7),
    (ApiKey::FindCoordinator, 0, 3),
    (ApiKey::JoinGroup, 0, 5),
    (ApiKey::Heartbeat, 0, 3),
    (ApiKey::LeaveGroup, 0, 3),
    (ApiKey::SyncGroup, 0, 3),
    (ApiKey::DescribeGroups, 0, 2),
    (ApiKey::ListGroups, 0, 5),
    (ApiKey::ApiVersions, 0, 3),
    (ApiKey::CreateTopics, 2, 7),
    (ApiKey::DeleteTopics, 1, 6),
    (ApiKey::DeleteRecords, 0, 1),
    (ApiKey::InitProducerId, 0, 4),
    (ApiKey::DescribeConfigs, 0, 2),
    (ApiKey::AlterConfigs, 0, 1),
    (ApiKey::DescribeLogDirs, 1, 4),
    (ApiKey::CreatePartitions, 0, 1),
    (ApiKey::DeleteGroups, 0, 1),
    (ApiKey::IncrementalAlterConfigs, 0, 1),
    (ApiKey::OffsetDelete, 0, 0),
    // Named so that a client that asks for this way of being a group is told that there is none: one that does not find
    // it named waits for ever.
    (ApiKey::ConsumerGroupHeartbeat, 0, 1),
];

/// The first version of `Produce` whose records have the format that the broker keeps.
const FIRST_PRODUCE: i16 = 3;
/// Key, version and correlation id.
const MIN_REQUEST_BYTES: usize = 8;

/// Bytes of one answer: those of records (`fetch::MAX_BYTES`, or one batch) fit, and those of all groups and topics.
const MAX_ANSWER_BYTES: usize = 256 << 20;

/// An answer being worked on: bytes with their length in front, or none where the client wants none.
pub(crate) type Answer = Pin<Box<dyn Future<Output = Result<Option<Bytes>, BadRequest>> + Send>>;

/// A request that ends its connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadRequest {
    #[error("a request of {0} bytes is too short to be one")]
    Short(usize),
    #[error("the request {0} is not known")]
    Key(i16),
    #[error("version {version} of the request {key:?} is not taken")]
    Version { key: ApiKey, version: i16 },
    #[error("the header of a request {key:?} is malformed: {error}")]
    Header { key: ApiKey, error: String },
    #[error("a request {key:?} of version {version} is malformed: {bad}")]
    Shape {
        key: ApiKey,
        version: i16,
        bad: BadShape,
    },
    #[error("a request {key:?} of version {version} is malformed: {error}")]
    Body {
        key: ApiKey,
        version: i16,
        error: String,
    },
    #[error("the answer to a request {key:?} of version {version} could not be written: {error}")]
    Answer {
        key: ApiKey,
        version: i16,
        error: String,
    },
    #[error("the work on a request ended before its end, which the log explains")]
    Panicked,
    #[error("records produced without acknowledgement were refused: {0}")]
    Unacknowledged(ResponseError),
}

/// A request with what its answer depends on.
struct Call {
    node: Arc<Node>,
    peer: SocketAddr,
    key: ApiKey,
    version: i16,
    correlation: i32,
    client_id: String,
    body: Bytes,
}

/// A request that is in its place among all others, and its answer.
pub(crate) struct Begun {
    pub(crate) answer: Answer,
    /// Whether it changes topics. Such an answer must be awaited to its end once it was polled: half a deletion would
    /// leave a topic that takes records and is gone with the next start.
    pub(crate) must_finish: bool,
}

/// Begins to answer a request. Produced records are in their place among all others when this returns; everything
/// else happens when the answer is awaited.
pub(crate) async fn begin(
    node: &Arc<Node>,
    peer: SocketAddr,
    request: Bytes,
) -> Result<Begun, BadRequest> {
    let call = Call::parse(node.clone(), peer, request)?;
    let must_finish = matches!(
        call.key,
        ApiKey::CreateTopics
            | ApiKey::DeleteTopics
            | ApiKey::CreatePartitions
            | ApiKey::DeleteRecords
            | ApiKey::AlterConfigs
            | ApiKey::IncrementalAlterConfigs
            // It creates topics that are missing.
            | ApiKey::Metadata
    );
    let answer = match call.key {
        ApiKey::Produce => produce::begin(call).await?,
        _ => Box::pin(answer(call)),
    };
    Ok(Begun {
        answer,
        must_finish,
    })
}

async fn answer(call: Call) -> Result<Option<Bytes>, BadRequest> {
    let c = &call;
    match c.key {
        ApiKey::Fetch => c.encode(&fetch::fetch(c, c.decode()?).await),
        ApiKey::ListOffsets => c.encode(&offsets::list(c, c.decode()?).await),
        ApiKey::Metadata => c.encode(&metadata::metadata(c, c.decode()?).await),
        ApiKey::OffsetCommit => c.encode(&offsets::commit(c, c.decode()?).await),
        ApiKey::OffsetFetch => c.encode(&offsets::fetch(c, c.decode()?)),
        ApiKey::FindCoordinator => c.encode(&metadata::find_coordinator(c, c.decode()?)),
        ApiKey::JoinGroup => c.encode(&groups::join(c, c.decode()?).await),
        ApiKey::Heartbeat => c.encode(&groups::heartbeat(c, c.decode()?)),
        ApiKey::LeaveGroup => c.encode(&groups::leave(c, c.decode()?)),
        ApiKey::SyncGroup => c.encode(&groups::sync(c, c.decode()?).await),
        ApiKey::DescribeGroups => c.encode(&groups::describe(c, c.decode()?)),
        ApiKey::ListGroups => c.encode(&groups::list(c, c.decode()?)),
        ApiKey::DeleteGroups => c.encode(&groups::delete(c, c.decode()?).await),
        ApiKey::ApiVersions => c.encode(&metadata::api_versions(c)?),
        ApiKey::CreateTopics => c.encode(&admin::create_topics(c, c.decode()?).await),
        ApiKey::DeleteTopics => c.encode(&admin::delete_topics(c, c.decode()?).await),
        ApiKey::DeleteRecords => c.encode(&admin::delete_records(c, c.decode()?).await),
        ApiKey::CreatePartitions => c.encode(&admin::create_partitions(c, c.decode()?).await),
        ApiKey::InitProducerId => c.encode(&produce::init_producer_id(c, c.decode()?).await),
        ApiKey::DescribeConfigs if c.version == 0 => configs::describe_v0(c).map(Some),
        ApiKey::DescribeConfigs => c.encode(&configs::describe(c, c.decode()?)),
        ApiKey::AlterConfigs => c.encode(&configs::alter(c, c.decode()?).await),
        ApiKey::IncrementalAlterConfigs => {
            c.encode(&configs::alter_incrementally(c, c.decode()?).await)
        }
        ApiKey::DescribeLogDirs => c.encode(&admin::describe_log_dirs(c, c.decode()?)),
        ApiKey::OffsetDelete => c.encode(&offsets::delete(c, c.decode()?).await),
        ApiKey::ConsumerGroupHeartbeat => c.encode(&groups::consumer_heartbeat(c, c.decode()?)),
        key => Err(BadRequest::Version {
            key,
            version: c.version,
        }),
    }
}

impl Call {
    fn parse(node: Arc<Node>, peer: SocketAddr, mut request: Bytes) -> Result<Self, BadRequest> {
        if request.len() < MIN_REQUEST_BYTES {
            return Err(BadRequest::Short(request.len()));
        }
        let mut start = request.slice(..MIN_REQUEST_BYTES);
        let (key, version, correlation) = (start.get_i16(), start.get_i16(), start.get_i32());
        let key = ApiKey::try_from(key).map_err(|_| BadRequest::Key(key))?;
        let bounds = TAKEN
            .iter()
            .find(|(taken, ..)| *taken == key)
            .map(|(_, min, max)| (*min, *max));
        let first = if key == ApiKey::Produce {
            FIRST_PRODUCE
        } else {
            i16::MIN
        };
        let taken = bounds.is_some_and(|(min, max)| (min.max(first)..=max).contains(&version));
        if !taken && key == ApiKey::ApiVersions {
            // A newer client asks in a newer way; it is told the versions in the oldest, with an error.
            let (client_id, body) = (String::new(), Bytes::new());
            return Ok(Self {
                node,
                peer,
                key,
                version: -1,
                correlation,
                client_id,
                body,
            });
        }
        if !taken {
            return Err(BadRequest::Version { key, version });
        }
        shape::check_header(key, version, &request).map_err(|bad| BadRequest::Shape {
            key,
            version,
            bad,
        })?;
        let header = RequestHeader::decode(&mut request, key.request_header_version(version))
            .map_err(|error| BadRequest::Header {
                key,
                error: error.to_string(),
            })?;
        let client_id = text(header.client_id.unwrap_or_default());
        Ok(Self {
            node,
            peer,
            key,
            version,
            correlation,
            client_id,
            body: request,
        })
    }

    fn decode<T: Decodable>(&self) -> Result<T, BadRequest> {
        self.decode_as(self.version, &[])
    }

    /// [`Self::decode`], for a version that the codec does not have: what is missing of the next one is `rest`.
    fn decode_next<T: Decodable>(&self, rest: &[u8]) -> Result<T, BadRequest> {
        self.decode_as(self.version + 1, rest)
    }

    /// The body with this behind it, as the codec reads that version; it has the shape of its own.
    fn decode_as<T: Decodable>(&self, codecs: i16, rest: &[u8]) -> Result<T, BadRequest> {
        let (key, version) = (self.key, self.version);
        shape::check(key, version, &self.body).map_err(|bad| BadRequest::Shape {
            key,
            version,
            bad,
        })?;
        let mut body = match rest.is_empty() {
            true => self.body.clone(),
            false => Bytes::from([&self.body[..], rest].concat()),
        };
        T::decode(&mut body, codecs).map_err(|error| BadRequest::Body {
            key,
            version,
            error: error.to_string(),
        })
    }

    /// An answer whose body was written by hand.
    fn framed(&self, body: &[u8]) -> Bytes {
        let len = (size_of::<i32>() + body.len()) as i32;
        let mut bytes = BytesMut::with_capacity(size_of::<i32>() + len as usize);
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(&self.correlation.to_be_bytes());
        bytes.extend_from_slice(body);
        bytes.freeze()
    }

    fn encode<T: Encodable>(&self, response: &T) -> Result<Option<Bytes>, BadRequest> {
        let (key, version) = (self.key, self.version.max(0));
        self.try_encode(response, version)
            .map(Some)
            .map_err(|error| BadRequest::Answer {
                key,
                version,
                error: error.to_string(),
            })
    }

    fn try_encode<T: Encodable>(&self, response: &T, version: i16) -> anyhow::Result<Bytes> {
        let header = ResponseHeader::default().with_correlation_id(self.correlation);
        let header_version = self.key.response_header_version(version);
        let len = header.compute_size(header_version)? + response.compute_size(version)?;
        anyhow::ensure!(
            len <= MAX_ANSWER_BYTES,
            "it would have {len} bytes, where {MAX_ANSWER_BYTES} are given: ask for less at a time"
        );
        let mut bytes = BytesMut::with_capacity(size_of::<i32>() + len);
        bytes.extend_from_slice(&(len as i32).to_be_bytes());
        header.encode(&mut bytes, header_version)?;
        response.encode(&mut bytes, version)?;
        Ok(bytes.freeze())
    }
}

fn text(bytes: StrBytes) -> String {
    bytes.as_str().to_owned()
}

fn wire(text: impl Into<String>) -> StrBytes {
    StrBytes::from_string(text.into())
}

/// Each of the things that a request names, once: what is told of a topic or group can be much longer than its name.
fn once<T: Clone + Eq + Hash>(named: Vec<T>) -> impl Iterator<Item = T> {
    let mut seen = HashSet::new();
    named
        .into_iter()
        .filter(move |each| seen.insert(each.clone()))
}

/// The error code of a result, 0 if it is good.
fn code<T>(result: &Result<T, ResponseError>) -> i16 {
    result.as_ref().err().map_or(0, ResponseError::code)
}
