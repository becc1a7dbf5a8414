//! Whether the host's user may read what a stage reads. librdkafka says once that it may not, and never that it may again.

use std::time::{Duration, Instant};

use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::{Offset, TopicPartitionList};

use super::super::LogError;
use super::{ClientSettings, Kind, QuietContext, log_error};

/// How long one question may take.
const ASK: Duration = Duration::from_secs(5);
/// How long one poll of the client takes.
const POLL: Duration = Duration::from_millis(100);

/// Reads the end of each topic, and the group's offset there, as a member would; an error names which. Blocks for some seconds
/// at most.
pub(crate) fn may_read(
    settings: &ClientSettings,
    group: &str,
    topics: &[String],
) -> Result<(), LogError> {
    let fixed = [
        ("group.id", group),
        ("enable.auto.commit", "false"),
        ("enable.partition.eof", "true"),
    ];
    let config = settings.client_config(Kind::Consumer, &[], &fixed);
    let consumer = BaseConsumer::from_config_and_context(&config, QuietContext);
    let consumer = consumer.map_err(|error| log_error(&error))?;
    for topic in topics {
        let asked = committed(&consumer, topic).and_then(|()| read_end(&consumer, topic));
        asked.map_err(|error| match log_error(&error) {
            LogError::Unavailable(why) => {
                LogError::Unavailable(format!("group {group}, topic {topic}: {why}"))
            }
            other => other,
        })?;
    }
    Ok(())
}

fn committed(consumer: &BaseConsumer<QuietContext>, topic: &str) -> KafkaResult<()> {
    let mut list = TopicPartitionList::new();
    list.add_partition(topic, 0);
    let committed = consumer.committed_offsets(list, ASK)?;
    committed.elements().iter().try_for_each(|e| e.error())
}

/// A fetch that is allowed comes to a partition's end, or brings a record: of any, for the leader of one may be away.
fn read_end(consumer: &BaseConsumer<QuietContext>, topic: &str) -> KafkaResult<()> {
    let metadata = consumer.fetch_metadata(Some(topic), ASK)?;
    let error = metadata.topics().iter().find_map(|topic| topic.error());
    if let Some(error) = error {
        return Err(KafkaError::MetadataFetch(error.into()));
    }
    let partitions = metadata
        .topics()
        .iter()
        .flat_map(|topic| topic.partitions());
    let mut end = TopicPartitionList::new();
    for partition in partitions {
        end.add_partition_offset(topic, partition.id(), Offset::End)?;
    }
    consumer.assign(&end)?;
    let began = Instant::now();
    loop {
        match consumer.poll(POLL) {
            Some(Ok(_) | Err(KafkaError::PartitionEOF(_))) => return Ok(()),
            Some(Err(error)) => return Err(error),
            None if began.elapsed() > ASK => {
                let timed_out = RDKafkaErrorCode::OperationTimedOut;
                return Err(KafkaError::MessageConsumption(timed_out));
            }
            None => {}
        }
    }
}
