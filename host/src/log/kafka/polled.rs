//! A producer, and a thread that serves its callbacks.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rdkafka::config::{ClientConfig, FromClientConfigAndContext};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::producer::{BaseProducer, ProducerContext};

/// How long the thread waits for a callback before it looks whether it is to end. rdkafka spins for the last millisecond of
/// it, and its own `ThreadedProducer` waits a tenth of a second: a hundred idle stages took half of a core.
const POLL: Duration = Duration::from_secs(2);

/// Dropping it does not wait: the thread lets go of the producer, within [`POLL`], and is always the last to do so.
pub(super) struct PolledProducer<C: ProducerContext + 'static> {
    producer: Arc<BaseProducer<C>>,
    // Behind the producer: what is declared first is dropped first.
    _stop: Stop,
}

/// Ends the thread when it is dropped.
struct Stop(Arc<AtomicBool>);

impl<C: ProducerContext + 'static> PolledProducer<C> {
    pub(super) fn new(config: &ClientConfig, context: C) -> KafkaResult<Self> {
        let producer = Arc::new(BaseProducer::from_config_and_context(config, context)?);
        let stop = Arc::new(AtomicBool::new(false));
        let (polled, stopped) = (producer.clone(), stop.clone());
        let poll = move || {
            while !stopped.load(Ordering::Acquire) {
                polled.poll(POLL);
            }
        };
        thread::Builder::new()
            .name("producer".into())
            .spawn(poll)
            .map_err(|error| {
                KafkaError::ClientCreation(format!("cannot start a thread: {error}"))
            })?;
        Ok(Self {
            producer,
            _stop: Stop(stop),
        })
    }
}

impl<C: ProducerContext + 'static> Deref for PolledProducer<C> {
    type Target = BaseProducer<C>;

    fn deref(&self) -> &BaseProducer<C> {
        &self.producer
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}
