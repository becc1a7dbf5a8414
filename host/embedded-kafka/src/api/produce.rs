//! Produce and InitProducerId: records in.

use bytes::Bytes;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::produce_request::PartitionProduceData;
use kafka_protocol::messages::produce_response::{PartitionProduceResponse, TopicProduceResponse};
use kafka_protocol::messages::{
    InitProducerIdRequest, InitProducerIdResponse, ProduceRequest, ProduceResponse,
};
use tokio::sync::oneshot;

use super::{Answer, BadRequest, Call, wire};
use crate::storage::batch::{BadBatch, Header};
use crate::storage::partition::Appended;
use crate::storage::writer::Append;

/// `acks` of a client that wants no answer.
const NO_ACKS: i16 = 0;

/// The first version that says why a batch was refused.
const FIRST_WITH_REASON: i16 = 8;
/// In Kafka's words.
const WANTS_KEYS: &str = "Compacted topic cannot accept message without key.";

type Written = oneshot::Receiver<Result<Appended, ResponseError>>;

/// A partition's part of the request, being written or refused.
type Begun = Result<Written, ResponseError>;

/// Hands all batches to their writers, so that batches of requests that follow each other on a connection share a
/// flush; the answer waits for the disk.
pub(super) async fn begin(call: Call) -> Result<Answer, BadRequest> {
    let request: ProduceRequest = call.decode()?;
    let refused = refuse_all(&request);
    let mut begun = Vec::with_capacity(request.topic_data.len());
    for topic in request.topic_data {
        let mut partitions = Vec::with_capacity(topic.partition_data.len());
        for data in topic.partition_data {
            let index = data.index;
            let written = match refused {
                Some(error) => Err(error),
                None => append(&call, &topic.name, data).await,
            };
            partitions.push((index, written));
        }
        begun.push((topic.name, partitions));
    }
    Ok(Box::pin(async move {
        let mut response = ProduceResponse::default();
        for (name, partitions) in begun {
            let mut topic = TopicProduceResponse::default().with_name(name);
            for (index, begun) in partitions {
                let result = finish(begun).await;
                if let (Err(error), NO_ACKS) = (&result, request.acks) {
                    return Err(BadRequest::Unacknowledged(*error));
                }
                let partition = call.node.topics.partition(&topic.name, index).ok();
                let start = partition.as_ref().map_or(-1, |partition| partition.start());
                let mut response = partition_response(index, result, start);
                let wants_keys = partition.is_some_and(|partition| partition.settings().compacts);
                if result == Err(ResponseError::InvalidRecord)
                    && wants_keys
                    && call.version >= FIRST_WITH_REASON
                {
                    response.error_message = Some(wire(WANTS_KEYS));
                }
                topic.partition_responses.push(response);
            }
            response.responses.push(topic);
        }
        if request.acks == NO_ACKS {
            Ok(None)
        } else {
            call.encode(&response)
        }
    }))
}

/// A new producer id. Kafka, too, gives an idempotent producer that asks again a new one.
pub(super) async fn init_producer_id(
    call: &Call,
    request: InitProducerIdRequest,
) -> InitProducerIdResponse {
    let refused = |error: ResponseError| {
        InitProducerIdResponse::default()
            .with_error_code(error.code())
            .with_producer_id((-1).into())
            .with_producer_epoch(-1)
    };
    if request.transactional_id.is_some() {
        // What clients make words of are the code's: this one says that there is no such thing here. librdkafka takes only
        // errors of authorization as final, which would send people to look for ACLs; with this it logs and waits.
        call.node.tell_of_transactions();
        return refused(ResponseError::UnsupportedVersion);
    }
    match call.node.next_producer_id().await {
        Ok(id) => InitProducerIdResponse::default()
            .with_producer_id(id.into())
            .with_producer_epoch(0),
        Err(_) => refused(ResponseError::CoordinatorNotAvailable),
    }
}

fn refuse_all(request: &ProduceRequest) -> Option<ResponseError> {
    if request.transactional_id.is_some() {
        Some(ResponseError::UnsupportedVersion)
    } else if !(-1..=1).contains(&request.acks) {
        Some(ResponseError::InvalidRequiredAcks)
    } else {
        None
    }
}

async fn append(call: &Call, topic: &str, data: PartitionProduceData) -> Begun {
    let partition = call.node.topics.partition(topic, data.index)?;
    let batch = data.records.unwrap_or_default();
    let header = check(&batch, partition.settings().max_message_bytes)?;
    let (done, written) = oneshot::channel();
    call.node
        .writers
        .append(Append {
            partition,
            header,
            batch,
            done,
        })
        .await?;
    Ok(written)
}

async fn finish(begun: Begun) -> Result<Appended, ResponseError> {
    begun?
        .await
        .unwrap_or(Err(ResponseError::KafkaStorageError))
}

/// Exactly one good batch, as Kafka wants it.
fn check(batch: &Bytes, max_bytes: usize) -> Result<Header, ResponseError> {
    let first = Header::parse(batch).map_err(refusal)?;
    if first.len < batch.len() {
        return Err(ResponseError::InvalidRecord);
    }
    if first.len > max_bytes {
        return Err(ResponseError::MessageTooLarge);
    }
    let header = Header::check(batch).map_err(refusal)?;
    if header.is_unsupported() {
        Err(ResponseError::InvalidRecord)
    } else {
        Ok(header)
    }
}

fn refusal(bad: BadBatch) -> ResponseError {
    match bad {
        BadBatch::Magic(_) => ResponseError::UnsupportedForMessageFormat,
        BadBatch::Count => ResponseError::InvalidRecord,
        BadBatch::Short | BadBatch::Length(_) | BadBatch::Checksum | BadBatch::Offset { .. } => {
            ResponseError::CorruptMessage
        }
    }
}

fn partition_response(
    index: i32,
    result: Result<Appended, ResponseError>,
    start: i64,
) -> PartitionProduceResponse {
    PartitionProduceResponse::default()
        .with_index(index)
        .with_error_code(super::code(&result))
        .with_base_offset(result.map_or(-1, |appended| appended.base_offset))
        .with_log_start_offset(start)
}
