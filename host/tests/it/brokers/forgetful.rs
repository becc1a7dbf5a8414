//! A broker of Kafka that starts can say for a moment that its cluster has none: whoever believes it has nobody left to ask.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use kafka_protocol::error::ResponseError;
use kafka_protocol::messages::metadata_response::MetadataResponseTopic;
use kafka_protocol::messages::{ApiKey, MetadataRequest, MetadataResponse};

use super::cluster::Broker;
use super::pipeline;
use super::proxy::{Proxy, Request};
use crate::support::{Host, Log, component, http, unique, until};

/// Each client may be cut off each time, or not.
const TIMES: usize = 4;
const MOMENT: Duration = Duration::from_secs(1);
/// Clients ask every five seconds, and again and again once they are told.
const TOLD: usize = 4 * STAGES;
const STAGES: usize = 4;

/// What a broker forgets, as its clients see it.
#[derive(Default)]
struct Memory {
    forgets: AtomicBool,
    told: AtomicUsize,
}

impl Memory {
    /// Has a proxy answer what is asked for metadata while it is to forget.
    fn start(self: &Arc<Self>) -> (Proxy, Broker) {
        let memory = self.clone();
        Proxy::start(move |request| {
            let is_forgotten = memory.forgets.load(Ordering::Relaxed);
            (is_forgotten && request.is(ApiKey::Metadata)).then(|| {
                memory.told.fetch_add(1, Ordering::Relaxed);
                without_brokers(request)
            })
        })
    }

    /// Says that there are no brokers until many were told so, and for a moment longer.
    async fn forget(&self) {
        let told = self.told.load(Ordering::Relaxed) + TOLD;
        self.forgets.store(true, Ordering::Relaxed);
        until("clients to ask", || {
            (self.told.load(Ordering::Relaxed) >= told).then_some(())
        });
        tokio::time::sleep(MOMENT).await;
        self.forgets.store(false, Ordering::Relaxed);
    }
}

/// The answer of a broker that knows of no brokers yet: the topics that are asked for have no leaders.
fn without_brokers(request: &Request<'_>) -> Vec<u8> {
    request.answer(|asked: MetadataRequest| {
        let topics = asked.topics.unwrap_or_default().into_iter().map(|topic| {
            MetadataResponseTopic::default()
                .with_name(topic.name)
                .with_error_code(ResponseError::LeaderNotAvailable.code())
        });
        MetadataResponse::default()
            .with_topics(topics.collect())
            .with_controller_id((-1).into())
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_said_that_it_has_no_brokers_is_found_again_by_everybody() {
    let memory = Arc::<Memory>::default();
    let (proxy, _broker) = tokio::task::block_in_place(|| memory.start());
    let brokers = proxy.address();
    let (input, component) = (unique("in"), component("test-identity"));
    let outputs: Vec<_> = (0..STAGES).map(|n| format!("{input}.{n}")).collect();
    let stages = outputs.iter().enumerate().map(|(n, output)| {
        let store = if n % 2 == 0 { "sql = [\"db\"]" } else { "" };
        format!(
            r#"
            [topics."{output}"]
            [stages.s{n}]
            component = "{component}"
            input = ["{input}"]
            group = "{output}"
            output = ["{output}"]
            config = {{ output = "{output}" }}
            {store}
            "#
        )
    });
    let stages: String = stages.collect();
    let route = format!(
        r#"
        [[http.routes]]
        path = "/in"
        method = "POST"
        produce = {{ topic = "{input}", fields = ["n"] }}
        "#
    );
    let host = Host::start(&pipeline(&brokers, &input, &(stages + &route)));
    let log = Log::new(&brokers);
    let form = "content-type: application/x-www-form-urlencoded";
    let post = format!("POST /in HTTP/1.1\r\n{form}");
    for times in 1..=TIMES {
        memory.forget().await;
        host.wait_for("a post", || {
            let (status, ..) = http(&host.address("HTTP"), &post, "n=1");
            (status == 202).then_some(())
        });
        for output in &outputs {
            let passed = log.read_at_least(output, times);
            assert!(passed.len() >= times, "{output}");
        }
        host.ready();
    }
}
