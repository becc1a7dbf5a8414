//! The brokers of the pipeline, for a client that has forgotten all that it knew.

use std::ffi::CString;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use rdkafka::bindings::{rd_kafka_brokers_add, rd_kafka_t};
use rdkafka::client::{Client, ClientContext};
use tracing::info;

use super::ClientSettings;
use super::statistics::{Brokers, OfBrokers, read};

/// How often librdkafka tells of its brokers and topics, in milliseconds: of each client that lives long and whose callbacks are
/// served.
pub(super) const STATISTICS: (&str, &str) = ("statistics.interval.ms", "2000");

/// What a client begins with.
///
/// A broker of Kafka that starts can answer for a moment that its cluster has no brokers. librdkafka drops all that it knows for
/// that, and may forget in the same breath that it was about to begin again with those of its configuration (its issue 5301, in
/// every version from 2.12 to the newest): such a client is cut off for good. Its statistics show it, and it can be told them
/// again.
pub(super) struct Bootstrap {
    servers: CString,
    /// Null until it is made. Its context owns this, so whoever is called back finds it there.
    client: AtomicPtr<rd_kafka_t>,
}

impl Bootstrap {
    pub(super) fn new(settings: &ClientSettings) -> Self {
        Self {
            // Without any where there is a zero in it: librdkafka has refused those.
            servers: CString::new(settings.brokers.as_str()).unwrap_or_default(),
            client: AtomicPtr::new(ptr::null_mut()),
        }
    }

    /// Once the client of this context is made.
    pub(super) fn is_of<C: ClientContext>(&self, client: &Client<C>) {
        self.client.store(client.native_ptr(), Ordering::Release);
    }

    /// What the client's statistics are, as librdkafka writes them. Called by the client only.
    pub(super) fn hear(&self, statistics: &[u8]) {
        if let Some(OfBrokers { brokers }) = read(statistics) {
            self.remind(&brokers);
        }
    }

    /// Tells the client the brokers again where it has forgotten all. Called by the client only.
    #[allow(unsafe_code, reason = "rdkafka has no function for it")]
    pub(super) fn remind(&self, brokers: &Brokers) {
        let client = self.client.load(Ordering::Acquire);
        if client.is_null() || !brokers.are_forgotten() {
            return;
        }
        info!(
            "a client of the log knows of no broker any more, as after a start of Kafka: asking those of the pipeline again"
        );
        // SAFETY: the client calls back only while it lives, and holds no lock of its own meanwhile; it copies the text.
        unsafe { rd_kafka_brokers_add(client, self.servers.as_ptr()) };
    }
}
