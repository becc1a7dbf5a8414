//! The threads that write records: what arrives while the disk is being flushed is flushed together, next.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::thread;

use bytes::Bytes;
use kafka_protocol::ResponseError;
use tokio::sync::{mpsc, oneshot};

use super::batch::Header;
use super::partition::{Appended, Partition};
use crate::folder::FolderLock;

/// A partition always has the same writer, so its records keep their order. Several, because flushes of different
/// files can go on at once.
const WRITERS: usize = 4;

/// Batches waiting for a writer; who brings more waits.
const QUEUE: usize = 1024;

/// Batches flushed together at most.
const MAX_GROUP: usize = 1024;

/// A batch to be written.
#[derive(Debug)]
pub(crate) struct Append {
    pub(crate) partition: Arc<Partition>,
    pub(crate) header: Header,
    pub(crate) batch: Bytes,
    /// Answered when the batch is durable, or refused.
    pub(crate) done: oneshot::Sender<Result<Appended, ResponseError>>,
}

/// The writers; their threads end when this is dropped and all that was brought is written.
#[derive(Debug)]
pub(crate) struct Writers {
    queues: Vec<mpsc::Sender<Append>>,
}

impl Writers {
    /// Starts the threads, which hold the folder until they end.
    pub(crate) fn start(
        lock: &Arc<FolderLock>,
    ) -> std::io::Result<(Self, Vec<thread::JoinHandle<()>>)> {
        let mut queues = Vec::with_capacity(WRITERS);
        let mut threads = Vec::with_capacity(WRITERS);
        for i in 0..WRITERS {
            let (queue, appends) = mpsc::channel(QUEUE);
            queues.push(queue);
            let lock = lock.clone();
            threads.push(
                thread::Builder::new()
                    .name(format!("kafka-writer-{i}"))
                    .spawn(move || {
                        write(appends);
                        drop(lock);
                    })?,
            );
        }
        Ok((Self { queues }, threads))
    }

    /// Brings a batch. Batches of a partition are written in the order in which they were brought.
    pub(crate) async fn append(&self, append: Append) -> Result<(), ResponseError> {
        let mut hasher = DefaultHasher::new();
        append.partition.name().hash(&mut hasher);
        let queue = &self.queues[(hasher.finish() % self.queues.len() as u64) as usize];
        queue
            .send(append)
            .await
            .map_err(|_| ResponseError::KafkaStorageError)
    }
}

fn write(mut appends: mpsc::Receiver<Append>) {
    let mut group = Vec::with_capacity(MAX_GROUP);
    while appends.blocking_recv_many(&mut group, MAX_GROUP) > 0 {
        write_group(&mut group);
    }
}

/// Appends all, flushes each partition once, and answers all.
fn write_group(group: &mut Vec<Append>) {
    let mut written: Vec<Written> = Vec::new();
    let mut answers = Vec::with_capacity(group.len());
    for Append {
        partition,
        header,
        batch,
        done,
    } in group.drain(..)
    {
        let answer = partition.append(&batch, &header);
        let known = written
            .iter()
            .position(|other| Arc::ptr_eq(&other.partition, &partition));
        let slot = known.unwrap_or(written.len());
        if known.is_none() {
            written.push(Written {
                partition,
                dirty: false,
                synced: Ok(()),
            });
        }
        // A repeat counts too: the batch that it repeats may be one that is not flushed yet.
        written[slot].dirty |= answer.is_ok();
        answers.push((slot, answer, done));
    }
    for each in written.iter_mut().filter(|each| each.dirty) {
        each.synced = each.partition.sync();
    }
    for (slot, answer, done) in answers {
        // Nobody listens any more when the client went away.
        let _ = done.send(answer.and_then(|appended| written[slot].synced.map(|()| appended)));
    }
}

/// A partition of a group of batches.
struct Written {
    partition: Arc<Partition>,
    dirty: bool,
    synced: Result<(), ResponseError>,
}

#[cfg(test)]
mod tests {
    use super::super::batch::tests::batch;
    use super::super::topic_config::Settings;
    use super::*;

    #[test]
    fn batches_that_wait_share_a_flush_and_each_gets_its_offset() {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            fsync: true,
            ..Settings::for_tests()
        };
        let open = |i| {
            Partition::open(
                format!("t/{i}"),
                folder.path().join(format!("t/{i}")),
                0,
                settings.clone(),
                true,
            )
        };
        let partitions = [Arc::new(open(0).unwrap()), Arc::new(open(1).unwrap())];
        let (mut group, mut answers) = (Vec::new(), Vec::new());
        for i in 0..200 {
            let bytes = batch(3, 100, None);
            let (done, answer) = oneshot::channel();
            let partition = partitions[i % 2].clone();
            group.push(Append {
                partition,
                header: Header::check(&bytes).unwrap(),
                batch: bytes.into(),
                done,
            });
            answers.push(answer);
        }
        write_group(&mut group);
        for (i, mut answer) in answers.into_iter().enumerate() {
            let base_offset = (i / 2 * 3) as i64;
            assert_eq!(answer.try_recv().unwrap(), Ok(Appended { base_offset }));
        }
        assert_eq!(
            partitions.each_ref().map(|partition| partition.syncs()),
            [1, 1]
        );
        assert_eq!(partitions[0].high_watermark(), 300);
    }
}
