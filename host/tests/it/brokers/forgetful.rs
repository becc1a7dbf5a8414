//! A broker of Kafka that starts can say for a moment that its cluster has none: whoever believes it has nobody left to ask.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use kafka_protocol::error::ResponseError;
use kafka_protocol::messages::metadata_response::MetadataResponseTopic;
use kafka_protocol::messages::{
    ApiKey, MetadataRequest, MetadataResponse, RequestHeader, ResponseHeader,
};
use kafka_protocol::protocol::{Decodable, Encodable};

use super::cluster::Broker;
use super::pipeline;
use crate::support::{Host, Log, component, http, unique, until};

/// Each client may be cut off each time, or not.
const TIMES: usize = 4;
const MOMENT: Duration = Duration::from_secs(1);
/// Clients ask every five seconds, and again and again once they are told.
const TOLD: usize = 4 * STAGES;
const STAGES: usize = 4;

/// Passes requests on to a broker, and answers those for metadata in its place while it is to forget.
struct Proxy {
    port: u16,
    forgets: Arc<AtomicBool>,
    told: Arc<AtomicUsize>,
}

impl Proxy {
    /// Also the broker behind it.
    fn start() -> (Self, Broker) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let broker = Broker::alone(Some(port));
        let behind = broker.port();
        let (forgets, told) = (Arc::default(), Arc::default());
        let proxy = Self {
            port,
            forgets: Arc::clone(&forgets),
            told: Arc::clone(&told),
        };
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(("127.0.0.1", behind)) else {
                    return;
                };
                let asking = Asking {
                    answers: Arc::new(Mutex::new(client.try_clone().expect("a socket"))),
                    forgets: Arc::clone(&forgets),
                    told: Arc::clone(&told),
                };
                let answers = Arc::clone(&asking.answers);
                let answered = server.try_clone().expect("a socket");
                thread::spawn(move || asking.pass_on(client, server));
                thread::spawn(move || pass_back(answered, &answers));
            }
        });
        (proxy, broker)
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

/// One connection of a client.
struct Asking {
    answers: Arc<Mutex<TcpStream>>,
    forgets: Arc<AtomicBool>,
    told: Arc<AtomicUsize>,
}

impl Asking {
    fn pass_on(&self, mut client: TcpStream, mut server: TcpStream) {
        while let Some(request) = read_frame(&mut client) {
            let is_metadata = request[..2] == (ApiKey::Metadata as i16).to_be_bytes();
            if is_metadata && self.forgets.load(Ordering::Relaxed) {
                self.told.fetch_add(1, Ordering::Relaxed);
                let mut answers = self.answers.lock().expect("no panic");
                if write_frame(&mut answers, &without_brokers(&request)).is_err() {
                    break;
                }
            } else if write_frame(&mut server, &request).is_err() {
                break;
            }
        }
        let _ = server.shutdown(std::net::Shutdown::Both);
    }
}

fn pass_back(mut server: TcpStream, answers: &Mutex<TcpStream>) {
    while let Some(answer) = read_frame(&mut server) {
        if write_frame(&mut answers.lock().expect("no panic"), &answer).is_err() {
            break;
        }
    }
    let _ = (answers.lock().expect("no panic")).shutdown(std::net::Shutdown::Both);
}

fn read_frame(from: &mut TcpStream) -> Option<Vec<u8>> {
    let mut length = [0; 4];
    from.read_exact(&mut length).ok()?;
    let mut frame = vec![0; usize::try_from(u32::from_be_bytes(length)).ok()?];
    from.read_exact(&mut frame).ok()?;
    Some(frame)
}

fn write_frame(into: &mut TcpStream, frame: &[u8]) -> std::io::Result<()> {
    let length = u32::try_from(frame.len()).expect("a frame's length");
    into.write_all(&[&length.to_be_bytes(), frame].concat())
}

/// The answer of a broker that knows of no brokers yet: the topics that are asked for have no leaders.
fn without_brokers(request: &[u8]) -> Vec<u8> {
    let version = i16::from_be_bytes([request[2], request[3]]);
    let key = ApiKey::Metadata;
    let mut rest = request;
    let header = RequestHeader::decode(&mut rest, key.request_header_version(version));
    let asked = MetadataRequest::decode(&mut rest, version).expect("a request");
    let topics = asked.topics.unwrap_or_default().into_iter().map(|topic| {
        MetadataResponseTopic::default()
            .with_name(topic.name)
            .with_error_code(ResponseError::LeaderNotAvailable.code())
    });
    let correlation = header.expect("its header").correlation_id;
    let mut answer = Vec::new();
    ResponseHeader::default()
        .with_correlation_id(correlation)
        .encode(&mut answer, key.response_header_version(version))
        .expect("a header");
    MetadataResponse::default()
        .with_topics(topics.collect())
        .with_controller_id((-1).into())
        .encode(&mut answer, version)
        .expect("an answer");
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_said_that_it_has_no_brokers_is_found_again_by_everybody() {
    let (proxy, _broker) = tokio::task::block_in_place(Proxy::start);
    let brokers = format!("127.0.0.1:{}", proxy.port);
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
        proxy.forget().await;
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
