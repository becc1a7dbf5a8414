//! What happened, in order: the last of it to be read, all of it to be compared.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    None,
    Name(Arc<str>),
    Place(Arc<str>, i32),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Event {
    at: u64,
    who: u32,
    what: &'static str,
    subject: Subject,
    numbers: [i64; 2],
}

pub(crate) struct Trace {
    last: VecDeque<Event>,
    /// Events that are kept, at most.
    bound: usize,
    count: u64,
    digest: Digest,
}

impl Trace {
    pub(crate) fn new(bound: usize) -> Self {
        Self {
            last: VecDeque::new(),
            bound,
            count: 0,
            digest: Digest::default(),
        }
    }

    pub(crate) fn note(
        &mut self,
        at: u64,
        who: u32,
        what: &'static str,
        subject: Subject,
        numbers: [i64; 2],
    ) {
        self.digest.add(&at.to_le_bytes());
        self.digest.add(&who.to_le_bytes());
        self.digest.add(what.as_bytes());
        match &subject {
            Subject::None => {}
            Subject::Name(name) => self.digest.add(name.as_bytes()),
            Subject::Place(topic, partition) => {
                self.digest.add(topic.as_bytes());
                self.digest.add(&partition.to_le_bytes());
            }
        }
        self.digest.add(&numbers[0].to_le_bytes());
        self.digest.add(&numbers[1].to_le_bytes());
        self.count += 1;
        if self.last.len() >= self.bound {
            self.last.pop_front();
        }
        self.last.push_back(Event {
            at,
            who,
            what,
            subject,
            numbers,
        });
    }

    /// How many events there were, and a number that differs where they do.
    pub(crate) fn fingerprint(&self) -> (u64, u64) {
        (self.count, self.digest.0)
    }

    pub(crate) fn tail(&self) -> Vec<String> {
        self.last.iter().map(Event::to_string).collect()
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            at,
            who,
            what,
            subject,
            numbers: [a, b],
        } = self;
        write!(f, "{at:>7} ms  ")?;
        match who {
            0 => write!(f, "world  ")?,
            who => write!(f, "host {who:<2}")?,
        }
        write!(f, "  {what:<22}")?;
        match subject {
            Subject::None => {}
            Subject::Name(name) => write!(f, " {name}")?,
            Subject::Place(topic, partition) => write!(f, " {topic} {partition}")?,
        }
        write!(f, "  {a} {b}")
    }
}

/// FNV-1a, because it needs no state but a number.
struct Digest(u64);

impl Default for Digest {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Digest {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

/// A number that depends on all parts, for choices that are to be the same whenever they are made.
pub(crate) fn digest(seed: u64, parts: &[&str]) -> u64 {
    let mut digest = Digest::default();
    digest.add(&seed.to_le_bytes());
    for part in parts {
        digest.add(part.as_bytes());
        digest.add(b"/");
    }
    // FNV's low bits are poor.
    let mut mixed = digest.0;
    mixed ^= mixed >> 33;
    mixed = mixed.wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 33)
}
