//! How a member leaves its group.

use std::mem::ManuallyDrop;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rdkafka::bindings::{RD_KAFKA_DESTROY_F_NO_CONSUMER_CLOSE, rd_kafka_destroy_flags};
use rdkafka::consumer::{BaseConsumer, Consumer};
use tracing::debug;

use super::membership::Context;

/// How long one that has nothing has for telling the group.
const TELLING: Duration = Duration::from_millis(200);

/// And how long it has to end, which it does at once.
const ENDING: Duration = Duration::from_secs(1);

/// Of a member to which clients assign, and which has no partition.
///
/// To close it is not enough: librdkafka tells the group nothing then, which waits for it until its session is over. And where the
/// group answers in the same moment what it gets, librdkafka sends its farewell to a coordinator that it has just let go of, through
/// a null pointer (2.12.1; its issue 5347, mended in 2.14.2). So it is unsubscribed, which tells, unless the group is about to hand
/// partitions round for longer than this waits, and not closed.
pub(super) fn leave_with_nothing(consumer: BaseConsumer<Context>) {
    consumer.unsubscribe();
    let began = Instant::now();
    while let Some(left) = TELLING.checked_sub(began.elapsed()) {
        // What it is given meanwhile is not taken, for it has parted.
        drop(consumer.poll(left));
    }
    // Where it is given something in the very moment of its end, nobody takes that, and it may never end.
    let (end, ended) = mpsc::sync_channel(1);
    let thread = thread::Builder::new().name("leaving".into());
    let started = thread.spawn(move || {
        destroy(consumer);
        let _ = end.send(());
    });
    if started.is_ok() && ended.recv_timeout(ENDING).is_err() {
        debug!("a client of the log does not end");
    }
}

/// Destroys it without closing it. What rdkafka has around it is leaked, a few kilobytes: that closes it when it is dropped.
#[allow(unsafe_code, reason = "rdkafka closes every consumer")]
fn destroy(consumer: BaseConsumer<Context>) {
    let consumer = ManuallyDrop::new(consumer);
    // SAFETY: nobody else has it, and it is never dropped, so this is the only time that it is destroyed. Whatever calls back until
    // its threads have ended finds its context, which is leaked.
    unsafe {
        rd_kafka_destroy_flags(
            consumer.client().native_ptr(),
            RD_KAFKA_DESTROY_F_NO_CONSUMER_CLOSE,
        );
    }
}
