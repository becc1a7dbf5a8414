//! A proxy in front of a broker, which answers some requests in its place.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use kafka_protocol::messages::{ApiKey, RequestHeader, ResponseHeader};
use kafka_protocol::protocol::{Decodable, Encodable};

use super::cluster::Broker;

pub(super) struct Proxy {
    port: u16,
}

impl Proxy {
    /// Also the broker behind it, whose clients are told to come to the proxy. What is not answered here is passed on.
    pub(super) fn start(
        answer: impl Fn(&Request<'_>) -> Option<Vec<u8>> + Send + Sync + 'static,
    ) -> (Self, Broker) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let broker = Broker::alone(Some(port));
        let (behind, answer) = (broker.port(), Arc::new(answer));
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(("127.0.0.1", behind)) else {
                    return;
                };
                let answers = Arc::new(Mutex::new(client.try_clone().expect("a socket")));
                let (back, answered) = (answers.clone(), server.try_clone().expect("a socket"));
                let answer = answer.clone();
                thread::spawn(move || pass_on(client, server, &answers, &*answer));
                thread::spawn(move || pass_back(answered, &back));
            }
        });
        (Self { port }, broker)
    }

    pub(super) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

/// A client's, as it comes.
pub(super) struct Request<'a> {
    /// None of those that are known here.
    key: Option<ApiKey>,
    version: i16,
    frame: &'a [u8],
}

impl<'a> Request<'a> {
    fn new(frame: &'a [u8]) -> Self {
        let number = |at: usize| i16::from_be_bytes([frame[at], frame[at + 1]]);
        Self {
            key: ApiKey::try_from(number(0)).ok(),
            version: number(2),
            frame,
        }
    }

    pub(super) fn is(&self, key: ApiKey) -> bool {
        self.key == Some(key)
    }

    fn read<T: Decodable>(&self) -> (RequestHeader, T) {
        let (key, mut rest) = (self.key.expect("a known request"), self.frame);
        let header = RequestHeader::decode(&mut rest, key.request_header_version(self.version));
        let body = T::decode(&mut rest, self.version);
        (header.expect("its header"), body.expect("its body"))
    }

    /// The answer to it that `make` makes of its body.
    pub(super) fn answer<T: Decodable, A: Encodable>(&self, make: impl FnOnce(T) -> A) -> Vec<u8> {
        let key = self.key.expect("a known request");
        let (header, body) = self.read();
        let mut answer = Vec::new();
        ResponseHeader::default()
            .with_correlation_id(header.correlation_id)
            .encode(&mut answer, key.response_header_version(self.version))
            .expect("a header");
        let made = make(body).encode(&mut answer, self.version);
        made.expect("an answer");
        answer
    }
}

fn pass_on(
    mut client: TcpStream,
    mut server: TcpStream,
    answers: &Mutex<TcpStream>,
    answer: &impl Fn(&Request<'_>) -> Option<Vec<u8>>,
) {
    while let Some(request) = read_frame(&mut client) {
        let passed = match answer(&Request::new(&request)) {
            Some(answer) => write_frame(&mut answers.lock().expect("no panic"), &answer),
            None => write_frame(&mut server, &request),
        };
        if passed.is_err() {
            break;
        }
    }
    let _ = server.shutdown(Shutdown::Both);
}

fn pass_back(mut server: TcpStream, answers: &Mutex<TcpStream>) {
    while let Some(answer) = read_frame(&mut server) {
        if write_frame(&mut answers.lock().expect("no panic"), &answer).is_err() {
            break;
        }
    }
    let _ = (answers.lock().expect("no panic")).shutdown(Shutdown::Both);
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
