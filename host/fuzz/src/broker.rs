//! The embedded broker: bytes as they come out of a socket, from whoever can connect to it.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use embedded_kafka::{Broker, Config};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::memory::within;

/// For what must happen, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(20);
/// A request may wait for what never comes (records, members of its group): it is given up on after so long.
const QUIET: Duration = Duration::from_millis(25);

/// Where there is one, no start waits for a disk.
const IN_MEMORY: &str = "/dev/shm";

/// Memory of a broker that has nothing to do, and that for requests: of the smallest elements, a request's arrays need
/// the most for their size.
const AT_FIRST: usize = 4 << 20;
const TIMES: usize = 256;

/// How a frame of the input is sent.
const FRAMED: u16 = 0;
const RAW: u16 = 1;
const BATCH: u16 = 2;
/// Two bytes say how and how much: their lower bits the length.
const LENGTH_BITS: u32 = 14;

const API_VERSIONS: i16 = 18;
const METADATA: i16 = 3;
const PRODUCE: i16 = 0;
const TOPIC: &[u8] = b"t";
/// Marks the answer after which no other is awaited.
const LAST: i32 = 0x7357_1a57;
/// Key, version, correlation id, and no client id.
const HEADER_LEN: usize = 10;
/// The checksum of a batch of records, and what it is over.
const CHECKSUM: std::ops::Range<usize> = 17..21;

/// Panics of any thread so far: the runtime keeps those of its tasks to itself.
static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Whatever a connection sends, no thread panics, memory stays in proportion, another connection is answered, the broker
/// ends when it is told to, has written nothing outside of its folder, and starts again on what it has written.
pub(crate) fn check(bytes: &[u8]) {
    count_panics();
    let panics = PANICS.load(Ordering::SeqCst);
    let outside = tempfile::tempdir_in(IN_MEMORY)
        .or_else(|_| tempfile::tempdir())
        .expect("a folder");
    let folder = outside.path().join("broker");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    within(AT_FIRST + TIMES * bytes.len(), || {
        runtime.block_on(async {
            let broker = start(&folder).await;
            // Batches are put in their place as they are read: their topic is there before.
            let create = request(METADATA, 0, LAST, &array(&string(TOPIC)));
            ask(broker.address(), &create).await.expect("a topic");
            send(broker.address(), &wire(bytes)).await;
            end(broker).await;
            end(start(&folder).await).await;
        });
    });
    assert_eq!(PANICS.load(Ordering::SeqCst), panics, "a thread panicked");
    let written = outside.path().read_dir().expect("a folder").count();
    assert_eq!(written, 1, "something lies beside the broker's folder");
}

async fn start(folder: &Path) -> Broker {
    let config = Config {
        fsync: false,
        rebalance_delay: Duration::from_millis(1),
        ..Config::new(folder)
    };
    Broker::start(config).await.expect("the broker starts")
}

async fn end(broker: Broker) {
    assert!(
        answers(broker.address()).await,
        "the broker does not answer"
    );
    let ended = timeout(PATIENCE, broker.shutdown()).await;
    ended.expect("the broker ends when it is told to");
}

async fn answers(address: SocketAddr) -> bool {
    let answer = ask(address, &request(API_VERSIONS, 0, LAST, &[])).await;
    // Correlation id and error.
    let good = [&LAST.to_be_bytes()[..], &[0, 0]].concat();
    answer.is_ok_and(|answer| answer.starts_with(&good))
}

async fn ask(address: SocketAddr, request: &[u8]) -> std::io::Result<Vec<u8>> {
    let ask = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(request).await?;
        read_frame(&mut stream).await
    };
    timeout(PATIENCE, ask).await?
}

/// Sends all and reads what is answered, until all is, the broker has closed the connection, or nothing comes any more.
async fn send(address: SocketAddr, bytes: &[u8]) {
    let stream = TcpStream::connect(address).await.expect("a connection");
    let (mut reader, mut writer) = stream.into_split();
    let last = request(API_VERSIONS, 0, LAST, &[]);
    let write = async {
        let _ = writer.write_all(bytes).await;
        let _ = writer.write_all(&last).await;
        // It is open until all is answered: the broker drops what a client that is gone has asked.
        std::future::pending().await
    };
    let read = async {
        while let Ok(Ok(answer)) = timeout(QUIET, read_frame(&mut reader)).await {
            if answer.starts_with(&LAST.to_be_bytes()) {
                return;
            }
        }
    };
    tokio::select! {
        () = write => {}
        () = read => {}
    }
}

async fn read_frame(stream: &mut (impl AsyncReadExt + Unpin)) -> std::io::Result<Vec<u8>> {
    let len = stream.read_i32().await?;
    let mut frame = vec![0; usize::try_from(len).expect("an answer has a length")];
    stream.read_exact(&mut frame).await?;
    Ok(frame)
}

/// The bytes that are sent: frames of the input, most of them with their length in front, which chance would not find.
fn wire(mut input: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    while let Some((start, rest)) = input.split_first_chunk() {
        let start = u16::from_le_bytes(*start);
        let len = usize::from(start & ((1 << LENGTH_BITS) - 1)).min(rest.len());
        let (frame, rest) = rest.split_at(len);
        input = rest;
        match start >> LENGTH_BITS {
            RAW => wire.extend(frame),
            BATCH => wire.extend(produce(frame)),
            FRAMED.. => wire.extend(framed(frame)),
        }
    }
    wire
}

/// Produces the batch, with the length and the checksum that it should have.
fn produce(batch: &[u8]) -> Vec<u8> {
    let mut batch = batch.to_vec();
    if let Some(len) = batch
        .len()
        .checked_sub(12)
        .and_then(|len| i32::try_from(len).ok())
        && batch.len() >= CHECKSUM.end
    {
        batch[8..12].copy_from_slice(&len.to_be_bytes());
        let checksum = crc32c::crc32c(&batch[CHECKSUM.end..]);
        batch[CHECKSUM].copy_from_slice(&checksum.to_be_bytes());
    }
    let records = [&(batch.len() as i32).to_be_bytes(), &batch[..]].concat();
    let partition = [&0i32.to_be_bytes()[..], &records].concat();
    let topic = [string(TOPIC), array(&partition)].concat();
    // No transaction, `acks=all`, and a second.
    let body = [&[0xff, 0xff, 0xff, 0xff, 0, 0, 3, 0xe8][..], &array(&topic)].concat();
    request(PRODUCE, 7, 0, &body)
}

fn request(key: i16, version: i16, correlation: i32, body: &[u8]) -> Vec<u8> {
    let mut request = Vec::with_capacity(HEADER_LEN + body.len());
    request.extend(key.to_be_bytes());
    request.extend(version.to_be_bytes());
    request.extend(correlation.to_be_bytes());
    request.extend([0xff, 0xff]);
    request.extend(body);
    framed(&request)
}

fn framed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as i32).to_be_bytes(), bytes].concat()
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as i16).to_be_bytes(), text].concat()
}

/// An array of one element.
fn array(element: &[u8]) -> Vec<u8> {
    [&1i32.to_be_bytes(), element].concat()
}

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            before(info);
        }));
    });
}
