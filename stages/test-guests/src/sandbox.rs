//! Looking for a way out, and asserting that there is none.

use std::net::{TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value as Json, json};

/// 2025-01-01T00:00:00Z in milliseconds: a wall clock that shows less was made up.
const A_RECENT_DAY: u128 = 1_735_689_600_000;

/// Allocated at a time, in bytes.
const MOUTHFUL: usize = 1 << 20;

/// Nothing of the host's arguments and environment is to be seen.
pub fn no_environment() -> Json {
    let arguments: Vec<_> = std::env::args_os().collect();
    assert!(arguments.is_empty(), "arguments: {arguments:?}");
    let variables: Vec<_> = std::env::vars_os().collect();
    assert!(variables.is_empty(), "environment: {variables:?}");
    Json::Null
}

/// No path opens, to read or to write.
pub fn no_files() -> Json {
    for path in ["/", ".", "..", "/tmp", "/etc", "/proc"] {
        assert!(std::fs::read_dir(path).is_err(), "{path} can be listed");
    }
    for path in [
        "/etc/passwd",
        "/proc/self/environ",
        "Cargo.toml",
        "/dev/null",
    ] {
        assert!(std::fs::read(path).is_err(), "{path} can be read");
    }
    for path in ["/tmp/stagehost-probe", "stagehost-probe"] {
        assert!(std::fs::write(path, "x").is_err(), "{path} can be written");
    }
    Json::Null
}

/// No socket connects, binds or resolves a name; `port` listens on the host's loopback.
pub fn no_network(port: u16) -> Json {
    assert!(
        TcpStream::connect(("127.0.0.1", port)).is_err(),
        "connected"
    );
    assert!(
        TcpListener::bind("127.0.0.1:0").is_err(),
        "bound a TCP port"
    );
    assert!(UdpSocket::bind("127.0.0.1:0").is_err(), "bound a UDP port");
    let resolved = ("localhost", port).to_socket_addrs();
    assert!(resolved.is_err(), "resolved a name");
    Json::Null
}

/// Both clocks go on; the wall clock in milliseconds.
pub fn clocks() -> Json {
    let start = Instant::now();
    std::thread::sleep(Duration::from_millis(2));
    assert!(
        start.elapsed() >= Duration::from_millis(2),
        "the clock stands"
    );
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.expect("after 1970").as_millis();
    assert!(now > A_RECENT_DAY, "the wall clock shows {now}");
    json!(u64::try_from(now).expect("milliseconds"))
}

/// Random bytes differ from call to call; the last eight.
pub fn random() -> Json {
    let mut drawn = [[0u8; 8]; 2];
    for bytes in &mut drawn {
        getrandom::fill(bytes).expect("random bytes");
    }
    assert_ne!(drawn[0], drawn[1]);
    json!(drawn[1])
}

/// Allocates and touches memory: `mib` MiB of it, or for ever.
pub fn eat_memory(mib: Option<usize>) -> Json {
    let mut eaten: Vec<Vec<u8>> = Vec::new();
    while mib.is_none_or(|mib| eaten.len() < mib) {
        eaten.push(std::hint::black_box(vec![1; MOUTHFUL]));
    }
    json!(eaten.len())
}

/// Computes for ever, in a way that no optimiser removes.
pub fn spin() -> ! {
    let mut n = 0u64;
    loop {
        n = std::hint::black_box(n.wrapping_add(1));
    }
}

/// Computes for so long.
pub fn compute(time: Duration) {
    let since = Instant::now();
    let mut n = 0u64;
    while since.elapsed() < time {
        n = std::hint::black_box(n.wrapping_add(1));
    }
}

/// Calls itself until the stack is full.
pub fn overflow(depth: u64) -> u64 {
    let frame = std::hint::black_box([depth; 64]);
    if frame[0] == u64::MAX {
        return 0;
    }
    overflow(frame[63] + 1) + frame[0]
}
