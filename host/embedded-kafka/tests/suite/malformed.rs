//! Bytes that are no request: they end their connection, and nothing else.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::cluster::Cluster;
use crate::raw::{Connection, framed, request, string};

/// The requests that the broker takes, and those that it does not.
const KEYS: std::ops::Range<i16> = -1..75;
/// The requests that the broker takes.
const TAKEN: [i16; 26] = [
    0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 19, 20, 21, 22, 32, 33, 35, 37, 42, 44, 47,
    68,
];
const API_VERSIONS: i16 = 18;

#[test]
fn a_length_that_cannot_be_closes_the_connection() {
    let cluster = Cluster::embedded();
    for length in [i32::MAX, -1, i32::MIN, 100 * 1024 * 1024 + 1] {
        let mut connection = Connection::open(cluster.address());
        connection.send(&length.to_be_bytes()).unwrap();
        assert!(connection.is_closed(), "{length}");
    }
    for len in 0..8 {
        let mut connection = Connection::open(cluster.address());
        connection.send(&framed(&vec![0; len])).unwrap();
        assert!(connection.is_closed(), "a request of {len} bytes");
    }
    assert!(Connection::open(cluster.address()).is_alive());
}

/// An array says that it has two thousand million elements, in each request and version that has one at that place.
#[test]
fn an_array_that_cannot_be_takes_no_memory() {
    let cluster = Cluster::embedded();
    let memory = peak_memory();
    let huge = i32::MAX.to_be_bytes();
    for key in KEYS {
        for version in 0..9 {
            for zeros in 0..36 {
                let body = [&vec![0; zeros], &huge[..], &[0; 64]].concat();
                let mut connection = Connection::open(cluster.address());
                // Not every request has an answer, so one that has follows. The broker may close before it is sent.
                let _ = connection.send(&request(key, version, 1, &body));
                let _ = connection.send(&request(API_VERSIONS, 0, 2, &[]));
                let closed = connection.is_closed();
                assert!(TAKEN.contains(&key) || closed, "request {key}");
                if closed && !TAKEN.contains(&key) {
                    break;
                }
            }
        }
    }
    assert!(Connection::open(cluster.address()).is_alive());
    // One such array of the smallest elements would be larger.
    let grown = peak_memory() - memory;
    assert!(grown < 4 << 20, "{grown} KiB");
}

#[test]
fn a_newer_client_is_told_which_versions_there_are() {
    let cluster = Cluster::embedded();
    let answer = Connection::open(cluster.address()).call(API_VERSIONS, 99, &[1, 2, 3]);
    assert_eq!(answer[..2], [0, 35], "UNSUPPORTED_VERSION");
    assert_eq!(answer[2..6], (TAKEN.len() as i32).to_be_bytes());
}

#[test]
fn any_bytes_leave_the_broker_alive() {
    let cluster = Cluster::embedded();
    let address = cluster.address();
    let mut runner = TestRunner::new(Config {
        cases: 3000,
        failure_persistence: None,
        ..Config::default()
    });
    let small = prop_oneof![Just(0u8), Just(1), Just(2), Just(255), any::<u8>()];
    let bodies = prop::collection::vec(small, 0..200);
    let requests = (KEYS, 0i16..13, bodies);
    let result = runner.run(&requests, |(key, version, body)| {
        let mut connection = Connection::open(address);
        // The broker may close it before all is sent.
        let _ = connection.send(&request(key, version, 7, &body));
        prop_assert!(Connection::open(address).is_alive());
        Ok(())
    });
    result.unwrap();
}

/// In KiB. The broker is in this process.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Each mention would wait for records in the partition's list.
#[test]
fn a_partition_that_a_fetch_names_again_is_refused() {
    const FETCH: i16 = 1;
    const INVALID_REQUEST: i16 = 42;
    const TIMES: i32 = 1000;
    let cluster = Cluster::embedded();
    let topic = cluster.topic(1);
    // Replica, milliseconds to wait, fewest and most bytes, isolation level; one topic.
    let mut body = [-1i32, 60_000, 1, 1 << 20].map(i32::to_be_bytes).concat();
    body.push(0);
    body.extend(1i32.to_be_bytes());
    body.extend(string(&topic));
    body.extend(TIMES.to_be_bytes());
    for _ in 0..TIMES {
        // Partition, offset, most bytes.
        body.extend([0i32, 0, 0, 1 << 20].map(i32::to_be_bytes).concat());
    }
    let answer = Connection::open(cluster.address()).call(FETCH, 4, &body);
    // Throttle, topics, name, partitions; then each partition.
    let partitions = &answer[4 + 4 + 2 + topic.len() + 4..];
    let errors: Vec<i16> = partitions
        .chunks(4 + 2 + 8 + 8 + 4 + 4)
        .map(|partition| i16::from_be_bytes([partition[4], partition[5]]))
        .collect();
    assert_eq!(errors.len(), TIMES as usize);
    assert_eq!(errors[0], 0);
    assert!(errors[1..].iter().all(|error| *error == INVALID_REQUEST));
}

/// What is told of each of these things is longer than its name.
#[test]
fn what_a_request_names_again_is_told_once() {
    const TIMES: usize = 100_000;
    const METADATA: i16 = 3;
    const OFFSET_COMMIT: i16 = 8;
    const OFFSET_FETCH: i16 = 9;
    const DESCRIBE_GROUPS: i16 = 15;
    const DESCRIBE_CONFIGS: i16 = 32;
    let cluster = Cluster::embedded();
    let topic = string(&cluster.topic(100));
    let one = 1i32.to_be_bytes();
    let again =
        |element: &[u8]| [&(TIMES as i32).to_be_bytes()[..], &element.repeat(TIMES)].concat();
    let mut connection = Connection::open(cluster.address());

    let metadata = string(&"m".repeat(4096));
    let offset = [&0i32.to_be_bytes()[..], &7i64.to_be_bytes(), &metadata].concat();
    let start = [
        string("g"),
        (-1i32).to_be_bytes().to_vec(),
        string(""),
        vec![0xff; 8],
    ]
    .concat();
    let commit = [&start[..], &one, &topic, &one, &offset].concat();
    connection.call(OFFSET_COMMIT, 2, &commit);

    let group = string("g");
    let partition = again(&0i32.to_be_bytes());
    let resource = [&[2][..], &topic, &[0xff; 4]].concat();
    for (key, version, body) in [
        (METADATA, 1, again(&topic)),
        (
            OFFSET_FETCH,
            2,
            [&group[..], &one, &topic, &partition].concat(),
        ),
        (DESCRIBE_GROUPS, 0, again(&group)),
        (DESCRIBE_CONFIGS, 1, [again(&resource), vec![0]].concat()),
    ] {
        let answer = connection.call(key, version, &body);
        assert!(answer.len() > 20, "{key}: {answer:?}");
        assert!(answer.len() < 20_000, "{key}: {} bytes", answer.len());
    }
}

/// The more there are, the longer it takes to find one that all members have; and nobody has so many.
#[test]
fn a_member_that_offers_ever_more_protocols_is_refused() {
    const JOIN_GROUP: i16 = 11;
    const INVALID_REQUEST: [u8; 2] = [0, 42];
    let cluster = Cluster::embedded();
    let count = 100_000;
    let mut body = string("g");
    body.extend(10_000i32.to_be_bytes());
    body.extend(string(""));
    body.extend(string("consumer"));
    body.extend(i32::to_be_bytes(count));
    for i in 0..count {
        body.extend(string(&i.to_string()));
        body.extend([0; 4]);
    }
    let answer = Connection::open(cluster.address()).call(JOIN_GROUP, 0, &body);
    assert_eq!(answer[..2], INVALID_REQUEST);
}
