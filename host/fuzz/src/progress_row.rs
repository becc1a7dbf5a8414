//! What a lane's row holds: outputs that are pending, and what was seen of lanes upstream.
//!
//! Whoever may write to the database wrote it, perhaps.

use std::sync::Arc;

use arbitrary::Unstructured;
use host::delivery::output;
use host::record::{Header, Outgoing};

use crate::memory::within;

/// Serde sets up to 1 MiB aside for a list before it has seen an element, and headers are a list in a list.
const AT_FIRST: usize = 3 << 20;
/// An output takes 6 bytes at least, and some 600 in memory while its list grows.
const TIMES: usize = 128;

/// Nothing that is read needs memory out of proportion, and what was read is written so that it reads the same. Bytes
/// that follow a row are no part of it: such a row is refused.
pub(crate) fn check(bytes: &[u8]) {
    let most = AT_FIRST + TIMES * bytes.len();
    if let Ok(outputs) = within(most, || output::decode(bytes)) {
        assert_outputs_last(&outputs);
        assert!(output::decode(&with_more(bytes)).is_err() || bytes.is_empty());
    }
    if let Ok(seen) = within(most, || output::decode_seen(bytes)) {
        let written = output::encode_seen(&seen).expect("what was read can be written");
        let read = output::decode_seen(&written).expect("what was written can be read");
        assert_eq!(read, seen);
        assert!(output::decode_seen(&with_more(bytes)).is_err() || bytes.is_empty());
    }
    if let Ok(outputs) = made_of(bytes) {
        assert_outputs_last(&outputs);
    }
}

fn assert_outputs_last(outputs: &[Outgoing]) {
    let written = output::encode(outputs).expect("outputs can be written");
    let read = output::decode(&written).expect("what was written can be read");
    assert_eq!(read, outputs);
}

fn with_more(bytes: &[u8]) -> Vec<u8> {
    [bytes, &[0]].concat()
}

/// Outputs of any content, rather than what happens to read as some.
fn made_of(bytes: &[u8]) -> arbitrary::Result<Vec<Outgoing>> {
    let mut bytes = Unstructured::new(bytes);
    let mut outputs = Vec::new();
    while !bytes.is_empty() {
        outputs.push(outgoing(&mut bytes)?);
    }
    Ok(outputs)
}

fn outgoing(bytes: &mut Unstructured<'_>) -> arbitrary::Result<Outgoing> {
    let topic: &str = bytes.arbitrary()?;
    let headers: Vec<(String, Option<Vec<u8>>)> = bytes.arbitrary()?;
    let headers = headers.into_iter();
    Ok(Outgoing {
        topic: Arc::from(topic),
        partition: bytes.arbitrary()?,
        timestamp: bytes.arbitrary()?,
        key: bytes.arbitrary()?,
        value: bytes.arbitrary()?,
        headers: headers
            .map(|(name, value)| Header { name, value })
            .collect(),
    })
}
