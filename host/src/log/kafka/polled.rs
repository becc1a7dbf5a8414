//! A producer, and a thread that serves its callbacks.

use std::ffi::c_void;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::Duration;

use rdkafka::bindings::{
    rd_kafka_queue_cb_event_enable, rd_kafka_queue_destroy, rd_kafka_queue_get_main,
    rd_kafka_queue_length, rd_kafka_queue_t, rd_kafka_t,
};
use rdkafka::config::{ClientConfig, FromClientConfigAndContext};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::producer::{BaseProducer, Producer as _, ProducerContext};

/// How long the thread sleeps if nobody wakes it.
const SLEEP: Duration = Duration::from_secs(10);

/// How many of the threads live.
static LIVE: Mutex<usize> = Mutex::new(0);
static GONE: Condvar = Condvar::new();

/// As rdkafka's `ThreadedProducer`, whose thread spins for a millisecond of every hundred: that of a hundred stages with
/// nothing to do takes half of a core. This one's sleeps until it is woken.
///
/// Dropping it does not wait: the thread is always the last to let go of the producer, and closes it.
pub(super) struct PolledProducer<C: ProducerContext + 'static> {
    producer: Arc<BaseProducer<C>>,
    // Behind the producer: what is declared first is dropped first.
    _end: End,
}

impl<C: ProducerContext + 'static> PolledProducer<C> {
    pub(super) fn new(config: &ClientConfig, context: C) -> KafkaResult<Self> {
        let producer = Arc::new(BaseProducer::from_config_and_context(config, context)?);
        let stop = Arc::new(AtomicBool::new(false));
        let (polled, stopped, alive) = (producer.clone(), stop.clone(), Alive::new());
        let thread = thread::Builder::new()
            .name("producer".into())
            .spawn(move || {
                serve(&polled, &stopped);
                drop(polled);
                drop(alive);
            });
        let refuse = |error| KafkaError::ClientCreation(format!("cannot start a thread: {error}"));
        let thread = thread.map_err(refuse)?.thread().clone();
        let _end = End { stop, thread };
        Ok(Self { producer, _end })
    }
}

impl<C: ProducerContext + 'static> Deref for PolledProducer<C> {
    type Target = BaseProducer<C>;

    fn deref(&self) -> &BaseProducer<C> {
        &self.producer
    }
}

/// Waits until all producers that were dropped are closed, for `time` at most: a process that exits takes from their
/// threads what they stand on.
pub(crate) fn until_closed(time: Duration) {
    let live = LIVE.lock().unwrap_or_else(PoisonError::into_inner);
    // Nothing is lost if it takes longer.
    let _ = GONE.wait_timeout_while(live, time, |live| *live > 0);
}

fn serve<C: ProducerContext + 'static>(producer: &BaseProducer<C>, stopped: &AtomicBool) {
    let queue = MainQueue::of(producer);
    while !stopped.load(Ordering::Acquire) {
        if queue.is_empty() {
            // Whoever wakes it before this is not missed: it then returns at once.
            thread::park_timeout(SLEEP);
        } else {
            // One event, which may be of many records.
            producer.poll(Duration::ZERO);
        }
    }
}

/// Ends the thread when it is dropped.
struct End {
    stop: Arc<AtomicBool>,
    thread: Thread,
}

impl Drop for End {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

/// Counts a thread.
struct Alive;

impl Alive {
    fn new() -> Self {
        *LIVE.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Self
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        *LIVE.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        GONE.notify_all();
    }
}

/// Where librdkafka puts a producer's events. It wakes the thread that made it when there is something in it.
struct MainQueue {
    queue: *mut rd_kafka_queue_t,
    /// What librdkafka was given a pointer to.
    _thread: Box<Thread>,
}

#[allow(unsafe_code, reason = "rdkafka has this for consumers only")]
impl MainQueue {
    fn of<C: ProducerContext + 'static>(producer: &BaseProducer<C>) -> Self {
        let thread = Box::new(thread::current());
        let woken: *const Thread = &*thread;
        // SAFETY: the client lives as long as `producer`, which the caller holds for longer than this queue. The thread stays
        // where it is in its box until `drop` has taken the callback away.
        let queue = unsafe {
            let queue = rd_kafka_queue_get_main(producer.client().native_ptr());
            rd_kafka_queue_cb_event_enable(queue, Some(wake), woken.cast_mut().cast());
            queue
        };
        Self {
            queue,
            _thread: thread,
        }
    }

    fn is_empty(&self) -> bool {
        // SAFETY: the queue is ours until it is dropped.
        unsafe { rd_kafka_queue_length(self.queue) == 0 }
    }
}

#[allow(unsafe_code, reason = "rdkafka has this for consumers only")]
impl Drop for MainQueue {
    fn drop(&mut self) {
        // SAFETY: librdkafka calls back with the queue's lock held, which it takes here too, so the callback is not called
        // any more when this is through.
        unsafe {
            rd_kafka_queue_cb_event_enable(self.queue, None, std::ptr::null_mut());
            rd_kafka_queue_destroy(self.queue);
        }
    }
}

/// Called by librdkafka on its own threads, with a pointer to the thread to be woken.
#[allow(unsafe_code, reason = "rdkafka has this for consumers only")]
unsafe extern "C" fn wake(_: *mut rd_kafka_t, thread: *mut c_void) {
    // SAFETY: it is what `MainQueue::of` gave, and still there.
    unsafe { (*thread.cast::<Thread>()).unpark() }
}
