//! Requests written by hand, for what no client would send.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use crate::cluster::{PATIENCE, eventually};

const PRODUCE: i16 = 0;
const INIT_PRODUCER_ID: i16 = 22;
const API_VERSIONS: i16 = 18;
const COORDINATOR_LOAD_IN_PROGRESS: i16 = 14;
const PRODUCE_VERSION: i16 = 7;
/// `acks=all`, and a timeout in milliseconds.
const ALL: [u8; 6] = [0xff, 0xff, 0, 0, 0x75, 0x30];

/// A connection to a broker.
pub(crate) struct Connection {
    stream: TcpStream,
    correlation: i32,
}

/// A batch to be.
#[derive(Clone, Copy)]
pub(crate) struct Batch {
    pub(crate) producer: i64,
    pub(crate) epoch: i16,
    pub(crate) sequence: i32,
    pub(crate) count: i32,
}

/// Error code and base offset.
pub(crate) type Produced = (i16, i64);

impl Connection {
    pub(crate) fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        Self {
            stream,
            correlation: 0,
        }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Whether the broker closed the connection.
    pub(crate) fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0; 1024]) {
            Ok(0) => true,
            Ok(_) => false,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    /// Sends a request and gives the body of its answer.
    pub(crate) fn call(&mut self, key: i16, version: i16, body: &[u8]) -> Vec<u8> {
        self.correlation += 1;
        let request = request(key, version, self.correlation, body);
        self.send(&request).expect("sent");
        self.answer()
    }

    /// [`Self::call`], in a version whose headers end with tagged fields, of which there are none.
    pub(crate) fn call_flexible(&mut self, key: i16, version: i16, body: &[u8]) -> Vec<u8> {
        let mut answer = self.call(key, version, &[&[0], body].concat());
        assert_eq!(answer.remove(0), 0, "tagged fields");
        answer
    }

    pub(crate) fn answer(&mut self) -> Vec<u8> {
        let mut len = [0; 4];
        self.stream.read_exact(&mut len).expect("an answer");
        let mut answer = vec![0; i32::from_be_bytes(len) as usize];
        self.stream.read_exact(&mut answer).expect("an answer");
        answer.split_off(4)
    }

    /// Whether the broker answers.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.call(API_VERSIONS, 0, &[]).starts_with(&[0, 0])
    }

    /// A new producer id, with epoch 0.
    pub(crate) fn producer_id(&mut self) -> i64 {
        let mut answer = Vec::new();
        // Apache Kafka fetches its first ids in the background.
        eventually("there are producer ids", || {
            answer = self.call(INIT_PRODUCER_ID, 0, &[0xff, 0xff, 0, 0, 0, 0]);
            answer[4..6] != COORDINATOR_LOAD_IN_PROGRESS.to_be_bytes()
        });
        assert_eq!(answer[4..6], [0, 0], "an error");
        i64::from_be_bytes(answer[6..14].try_into().expect("8 bytes"))
    }

    /// Produces a batch to partition 0 of a topic.
    pub(crate) fn produce(&mut self, topic: &str, batch: &[u8]) -> Produced {
        let mut body = vec![0xff, 0xff];
        body.extend(ALL);
        body.extend(1i32.to_be_bytes());
        body.extend(string(topic));
        body.extend(1i32.to_be_bytes());
        body.extend(0i32.to_be_bytes());
        body.extend((batch.len() as i32).to_be_bytes());
        body.extend(batch);
        let answer = self.call(PRODUCE, PRODUCE_VERSION, &body);
        // Topics, name, partitions, index; then error and base offset.
        let at = 4 + 2 + topic.len() + 4 + 4;
        let error = i16::from_be_bytes(answer[at..at + 2].try_into().expect("2 bytes"));
        (
            error,
            i64::from_be_bytes(answer[at + 2..at + 10].try_into().expect("8 bytes")),
        )
    }
}

impl Batch {
    /// The bytes: records with an empty key and the value `v`.
    pub(crate) fn bytes(self) -> Vec<u8> {
        let mut bytes = vec![0; 61];
        for i in 0..self.count {
            // Length, attributes, timestamp delta, offset delta, key, value, headers; lengths and deltas in zigzag.
            let delta = u8::try_from(i * 2).expect("a small batch");
            bytes.extend([14, 0, 0, delta, 0, 2, b'v', 0]);
        }
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .expect("a time");
        let now = (now.as_millis() as i64).to_be_bytes();
        let len = bytes.len() as i32 - 12;
        bytes[8..12].copy_from_slice(&len.to_be_bytes());
        bytes[16] = 2;
        bytes[23..27].copy_from_slice(&(self.count - 1).to_be_bytes());
        bytes[27..35].copy_from_slice(&now);
        bytes[35..43].copy_from_slice(&now);
        bytes[43..51].copy_from_slice(&self.producer.to_be_bytes());
        bytes[51..53].copy_from_slice(&self.epoch.to_be_bytes());
        bytes[53..57].copy_from_slice(&self.sequence.to_be_bytes());
        bytes[57..61].copy_from_slice(&self.count.to_be_bytes());
        seal(&mut bytes);
        bytes
    }
}

/// Gives a batch the checksum of its content.
pub(crate) fn seal(batch: &mut [u8]) {
    let checksum = crc32c::crc32c(&batch[21..]);
    batch[17..21].copy_from_slice(&checksum.to_be_bytes());
}

/// A request with its length in front.
pub(crate) fn request(key: i16, version: i16, correlation: i32, body: &[u8]) -> Vec<u8> {
    let mut request = Vec::new();
    request.extend(key.to_be_bytes());
    request.extend(version.to_be_bytes());
    request.extend(correlation.to_be_bytes());
    request.extend(string("test"));
    request.extend(body);
    framed(&request)
}

pub(crate) fn framed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as i32).to_be_bytes(), bytes].concat()
}

/// A string of a flexible version.
pub(crate) fn compact(text: &str) -> Vec<u8> {
    [&[text.len() as u8 + 1], text.as_bytes()].concat()
}

/// Reads an answer from its start.
pub(crate) struct Answer(pub(crate) Vec<u8>);

impl Answer {
    pub(crate) fn take<const N: usize>(&mut self) -> [u8; N] {
        let taken = self.0.drain(..N).collect::<Vec<_>>();
        taken.try_into().expect("so many bytes")
    }

    pub(crate) fn i16(&mut self) -> i16 {
        i16::from_be_bytes(self.take())
    }

    pub(crate) fn i32(&mut self) -> i32 {
        i32::from_be_bytes(self.take())
    }

    pub(crate) fn i64(&mut self) -> i64 {
        i64::from_be_bytes(self.take())
    }

    /// A string, or nothing for null.
    pub(crate) fn string(&mut self) -> String {
        let len = self.i16().max(0);
        self.text(len as usize)
    }

    /// A string of a flexible version, or nothing for null.
    pub(crate) fn compact(&mut self) -> String {
        let [len] = self.take();
        self.text(usize::from(len.saturating_sub(1)))
    }

    fn text(&mut self, len: usize) -> String {
        String::from_utf8(self.0.drain(..len).collect()).expect("UTF-8")
    }
}

pub(crate) fn string(text: &str) -> Vec<u8> {
    [&(text.len() as i16).to_be_bytes(), text.as_bytes()].concat()
}
