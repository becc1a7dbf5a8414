//! From one topic to another: each message is produced as soon as it is read, and its offset is committed once it and all
//! before it are acknowledged.

use std::borrow::Cow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use rdkafka::ClientContext;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::message::Message;
use rdkafka::producer::{BaseRecord, DeliveryResult, ProducerContext, ThreadedProducer};
use rdkafka::types::RDKafkaErrorCode;

use super::reader::{Done, IDLE, Lane, read};
use super::{Settings, producer_config};

/// Messages between two offsets that may be committed.
const SECTION: usize = 1_000;

pub(super) fn identity(value: &[u8]) -> anyhow::Result<Cow<'_, [u8]>> {
    Ok(Cow::Borrowed(value))
}

/// As the stage: the title with another mark.
pub(super) fn json(value: &[u8]) -> anyhow::Result<Cow<'_, [u8]>> {
    let mut post: super::Post<'_> = serde_json::from_slice(value)?;
    post.title.to_mut().push('!');
    Ok(Cow::Owned(serde_json::to_vec(&post)?))
}

type Change = fn(&[u8]) -> anyhow::Result<Cow<'_, [u8]>>;
type Producer = ThreadedProducer<Acknowledgements>;

pub(super) fn run(settings: &Settings, change: Change) -> anyhow::Result<()> {
    let config = producer_config(settings);
    let producer = Producer::from_config_and_context(&config, Acknowledgements)?;
    let (producer, output) = (Arc::new(producer), settings.output.clone());
    read(settings, move |lane| {
        if let Err(error) = forward(&lane, &producer, &output, change) {
            eprintln!("{error:#}");
            std::process::exit(1);
        }
    })
}

fn forward(lane: &Lane, producer: &Producer, output: &str, change: Change) -> anyhow::Result<()> {
    let sections = Arc::new(Sections {
        open: Mutex::default(),
        done: lane.done.clone(),
    });
    let mut section = sections.begin();
    let mut filled = 0;
    let mut last = 0;
    loop {
        let Some(message) = lane.queue.poll(IDLE).transpose()? else {
            if filled > 0 {
                section.end(last + 1);
                section = sections.begin();
                filled = 0;
            }
            continue;
        };
        let value = change(message.payload().unwrap_or_default())?;
        section.open.fetch_add(1, Ordering::Relaxed);
        let mut record = BaseRecord::with_opaque_to(output, section.clone()).payload(&*value);
        record.key = message.key();
        while let Err((error, back)) = producer.send(record) {
            if error.rdkafka_error_code() != Some(RDKafkaErrorCode::QueueFull) {
                return Err(error).context("cannot produce");
            }
            std::thread::sleep(Duration::from_millis(1));
            record = back;
        }
        last = message.offset();
        filled += 1;
        if filled == SECTION {
            section.end(last + 1);
            section = sections.begin();
            filled = 0;
        }
    }
}

/// Consecutive messages of a partition.
struct Section {
    /// Messages that are not acknowledged, and one more until its end is known.
    open: AtomicUsize,
    /// The offset behind it.
    next: std::sync::atomic::AtomicI64,
    all: Arc<Sections>,
}

/// The sections of a partition that are not done, in their order.
struct Sections {
    open: Mutex<std::collections::VecDeque<Arc<Section>>>,
    done: Arc<Done>,
}

impl Sections {
    fn begin(self: &Arc<Self>) -> Arc<Section> {
        let section = Arc::new(Section {
            open: AtomicUsize::new(1),
            next: Default::default(),
            all: self.clone(),
        });
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.push_back(section.clone());
        section
    }

    fn advance(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(first) = open.front()
            && first.open.load(Ordering::Acquire) == 0
        {
            self.done.up_to(first.next.load(Ordering::Relaxed));
            open.pop_front();
        }
    }
}

impl Section {
    fn end(&self, next: i64) {
        self.next.store(next, Ordering::Relaxed);
        self.acknowledge();
    }

    fn acknowledge(&self) {
        if self.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.all.advance();
        }
    }
}

struct Acknowledgements;

impl ClientContext for Acknowledgements {}

impl ProducerContext for Acknowledgements {
    type DeliveryOpaque = Arc<Section>;

    fn delivery(&self, result: &DeliveryResult<'_>, section: Arc<Section>) {
        if let Err((error, _)) = result {
            eprintln!("a record was not taken: {error}");
            std::process::exit(1);
        }
        section.acknowledge();
    }
}
