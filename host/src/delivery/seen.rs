//! Which outputs of other lanes a lane has taken in, so that a repeated one is dropped.
//!
//! An output carries its [`OutputId`] in the header [`HEADER`]: which lane of which cluster made it, and where that sent it.
//! Outputs of one lane reach a partition in the order of their ids, so the highest one of each lane is all that needs to be
//! remembered. Other programs copy headers, so an id counts only in the place that it names.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::dead_letter;
use super::progress::LaneId;
use crate::record::{Header, Outgoing, Record};

/// The header that carries an output's id. Others rely on the name.
pub const HEADER: &str = "stagehost-id";
/// The header in which a dead letter carries the id of what it is a letter of: sent back where it came from, it is new.
pub const ORIGINAL: &str = "stagehost-original-id";
/// What an id begins with that says where it was sent; those of earlier versions begin with their group.
const SENT: char = '@';
/// The cluster of a log that does not say which it is.
pub const UNKNOWN_CLUSTER: &str = "-";
/// Beside the lanes, a row's memory has the id of the topic that it is of, behind this. Earlier versions take it for a lane
/// that was never silent, and keep it. Kafka forgets a group's offsets with their topic, so that they can't tell.
const TOPIC: &str = "!topic/";
/// Bytes of an id that is taken for one.
const MAX_ID_BYTES: usize = 2048;
/// Lanes upstream that are remembered; beyond it, the one that was silent for longest is forgotten.
const MAX_LANES: usize = 10_000;

/// An output's place among the outputs of its lane.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Place {
    /// The lane's generation.
    pub generation: i64,
    /// The offset of the message that the output came of; of a call with many, the last one's.
    pub offset: i64,
    /// The output's number among those of the same offset, from 0.
    pub index: u32,
}

/// `@cluster/topic/partition/group/topic/partition/generation/offset/index`: where it was sent, which lane it is of, and
/// where among that lane's outputs. A group may have slashes in its name; topics and clusters have none.
///
/// Earlier versions write it without the first three, and read what is before the generation as a lane's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputId {
    /// All before the generation: what its place is compared within.
    pub lane: String,
    /// Where among them.
    pub place: Place,
}

/// Makes the ids of one lane's outputs.
#[derive(Clone, Debug)]
pub struct Ids {
    cluster: Arc<str>,
    /// `/group/topic/partition/`.
    lane: String,
}

impl Ids {
    /// Those of a lane that reads and writes in this cluster.
    pub fn new(cluster: Arc<str>, lane: &LaneId) -> Self {
        let LaneId {
            group,
            topic,
            partition,
        } = lane;
        Self {
            cluster,
            lane: format!("/{group}/{topic}/{partition}/"),
        }
    }

    /// The id of an output that is sent to this partition.
    pub fn id(&self, topic: &str, partition: i32, place: Place) -> String {
        /// Four numbers, mostly short ones.
        const NUMBERS: usize = 48;
        let Self { cluster, lane } = self;
        let Place {
            generation,
            offset,
            index,
        } = place;
        let mut id = String::with_capacity(cluster.len() + topic.len() + lane.len() + NUMBERS);
        id.push(SENT);
        id.push_str(cluster);
        id.push('/');
        id.push_str(topic);
        // Writing into a string does not fail.
        let _ = write!(id, "/{partition}{lane}{generation}/{offset}/{index}");
        id
    }
}

/// Has an output that has an id be one of this generation.
pub fn raise(output: &mut Outgoing, generation: i64) {
    let last = output.headers.iter_mut().rfind(|h| h.name == HEADER);
    if let Some(header) = last
        && let Some(mut id) = id_of(header)
    {
        id.place.generation = generation;
        header.value = Some(id.to_string().into_bytes());
    }
}

/// The generation of an output that has an id.
pub fn generation(output: &Outgoing) -> Option<i64> {
    let last = output.headers.iter().rfind(|h| h.name == HEADER)?;
    Some(id_of(last)?.place.generation)
}

fn id_of(header: &Header) -> Option<OutputId> {
    let text = std::str::from_utf8(header.value.as_deref()?).ok()?;
    text.parse().ok()
}

/// An id as it stands in a record.
struct Parsed<'a> {
    /// As [`OutputId::lane`].
    lane: &'a str,
    /// Cluster, topic and partition that it was sent to, if it says so.
    sent: Option<(&'a str, &'a str, i32)>,
    /// Group, topic and partition of the lane that it is of.
    source: (&'a str, &'a str, i32),
    place: Place,
}

impl<'a> Parsed<'a> {
    fn read(text: &'a str) -> Option<Self> {
        let (rest, index) = last(text)?;
        let (rest, offset) = last(rest)?;
        let (lane, generation) = last(rest)?;
        let sent = sent(lane);
        let source = source(sent.map_or(lane, |(_, rest)| rest))?;
        Some(Self {
            lane,
            sent: sent.map(|(sent, _)| sent),
            source,
            place: Place {
                generation: generation.parse().ok()?,
                offset: offset.parse().ok()?,
                index: index.parse().ok()?,
            },
        })
    }

    /// The id that counts of a record that was read in this cluster. One that is malformed is none, nor is one that was
    /// sent elsewhere and brought here by another program.
    fn of(record: &'a Record, cluster: &str) -> Option<Self> {
        let header = last_id(record)?;
        if header.len() > MAX_ID_BYTES {
            return None;
        }
        let id = Self::read(std::str::from_utf8(header).ok()?)?;
        let counts = match id.sent {
            Some(sent) => sent == (cluster, &*record.topic, record.partition),
            // Of an earlier version. A letter's own is in its topic; back where its record came from, it is new.
            None => dead_letter::sent_back_from(record) != Some(&*record.topic),
        };
        counts.then_some(id)
    }
}

/// The value of a record's id. None is the one that a dead letter of an earlier version has from the record that it is made
/// of: it stands before the headers that say why.
fn last_id(record: &Record) -> Option<&[u8]> {
    let mut last_first = record.headers.iter().rev();
    let header = last_first.find(|h| h.name == HEADER || h.name == dead_letter::CAUSE)?;
    if header.name != HEADER {
        return None;
    }
    header.value.as_deref()
}

/// `@cluster/topic/partition`, and what follows it.
fn sent(lane: &str) -> Option<((&str, &str, i32), &str)> {
    let (cluster, rest) = first(lane.strip_prefix(SENT)?)?;
    let (topic, rest) = first(rest)?;
    let (partition, rest) = first(rest)?;
    Some(((cluster, topic, partition.parse().ok()?), rest))
}

/// `group/topic/partition`.
fn source(lane: &str) -> Option<(&str, &str, i32)> {
    let (rest, partition) = last(lane)?;
    let (group, topic) = last(rest)?;
    Some((group, topic, partition.parse().ok()?))
}

/// What is before the first slash, and what is behind it. Parts are short, so that to look at each byte is faster than the
/// standard library's search; it is done for every record.
fn first(text: &str) -> Option<(&str, &str)> {
    let at = text.bytes().position(|byte| byte == b'/')?;
    Some((&text[..at], &text[at + 1..]))
}

/// The same of the last one.
fn last(text: &str) -> Option<(&str, &str)> {
    let at = text.bytes().rposition(|byte| byte == b'/')?;
    Some((&text[..at], &text[at + 1..]))
}

impl OutputId {
    /// The id that counts of a record that was read in this cluster.
    pub fn of(record: &Record, cluster: &str) -> Option<Self> {
        Parsed::of(record, cluster).map(Self::from)
    }

    /// The id of the dead letter of an output that the log refused, which goes to this partition. It is produced after later
    /// outputs of its lane, so it is as if it were another's.
    pub fn of_its_letter(&self, topic: &str, partition: i32) -> Self {
        let sent = sent(&self.lane);
        let lane = match source(sent.map_or(&self.lane, |(_, rest)| rest)) {
            Some((group, from, number)) => format!("{group}!refused/{from}/{number}"),
            None => self.lane.clone(),
        };
        let lane = match sent {
            Some(((cluster, ..), _)) => format!("{SENT}{cluster}/{topic}/{partition}/{lane}"),
            None => lane,
        };
        Self {
            lane,
            place: self.place,
        }
    }

    /// The lane's parts: group, topic and partition.
    pub fn source(&self) -> Option<(&str, &str, i32)> {
        source(sent(&self.lane).map_or(&self.lane, |(_, rest)| rest))
    }
}

impl From<Parsed<'_>> for OutputId {
    fn from(parsed: Parsed<'_>) -> Self {
        Self {
            lane: parsed.lane.to_owned(),
            place: parsed.place,
        }
    }
}

impl fmt::Display for OutputId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place {
            generation,
            offset,
            index,
        } = self.place;
        write!(f, "{}/{generation}/{offset}/{index}", self.lane)
    }
}

/// The text is no id.
#[derive(Debug, thiserror::Error)]
#[error("not of the form @cluster/topic/partition/group/topic/partition/generation/offset/index")]
pub struct Malformed;

impl FromStr for OutputId {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        Parsed::read(text).map(Self::from).ok_or(Malformed)
    }
}

/// The newest output of each lane upstream that was taken in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen(BTreeMap<String, Mark>);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    place: Place,
    /// The offset of the record that brought it, in the partition of the lane that remembers.
    at: i64,
}

/// What a record is to a lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admitted {
    /// It was not there before.
    New,
    /// It was taken in before.
    Repeated,
    /// It is of an older generation of its lane than what was taken in before: a late copy, or its lane's database went back.
    Fallen(Fall),
}

/// An output of an older generation than one before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fall {
    /// Group, topic and partition of the lane that it is of, as they stand in its id.
    pub lane: String,
    /// Its generation.
    pub generation: i64,
    /// The highest one that was there before.
    pub highest: i64,
}

impl Seen {
    /// Takes a record in that was read in this cluster; answers whether it is one that was taken in before.
    pub fn admit(&mut self, record: &Record, cluster: &str) -> Admitted {
        let Some(id) = Parsed::of(record, cluster) else {
            return Admitted::New;
        };
        let place = id.place;
        let mark = Mark {
            place,
            at: record.offset,
        };
        match self.0.get_mut(id.lane) {
            Some(known) if place.generation < known.place.generation => {
                let (group, topic, partition) = id.source;
                return Admitted::Fallen(Fall {
                    lane: format!("{group}/{topic}/{partition}"),
                    generation: place.generation,
                    highest: known.place.generation,
                });
            }
            Some(known) if place <= known.place => return Admitted::Repeated,
            Some(known) => *known = mark,
            None => {
                if self.0.len() >= MAX_LANES {
                    self.forget_one();
                }
                self.0.insert(id.lane.to_owned(), mark);
            }
        }
        Admitted::New
    }

    /// Whether any of the records could change it.
    pub fn concerns(records: &[Record]) -> bool {
        records
            .iter()
            .any(|record| record.headers.iter().any(|h| h.name == HEADER))
    }

    /// The id of the topic that all of it was read from, if it is known. Versions up to November 2026 took an id with a slash for a
    /// lane, and wrote another beside it: of two nobody knows which it is.
    pub fn topic(&self) -> Option<&str> {
        let mut topics = self.topics().filter_map(|name| name.strip_prefix(TOPIC));
        let topic = topics.next()?;
        topics.next().is_none().then_some(topic)
    }

    /// Remembers the id of the topic that all of it was read from.
    pub fn set_topic(&mut self, id: &str) {
        let before: Vec<_> = self.topics().cloned().collect();
        for name in before {
            self.0.remove(&name);
        }
        let mark = Mark {
            place: Place::default(),
            at: i64::MAX,
        };
        self.0.insert(format!("{TOPIC}{id}"), mark);
    }

    /// What ids of topics stand for. The name of a lane ends with its partition, whatever it begins with; an id, 16 bytes in
    /// base64, may have slashes but never ends with a digit.
    fn topics(&self) -> impl Iterator<Item = &String> {
        let from = self.0.range(TOPIC.to_owned()..).map(|(name, _)| name);
        from.take_while(|name| name.starts_with(TOPIC))
            .filter(|name| !name.ends_with(|last: char| last.is_ascii_digit()))
    }

    fn forget_one(&mut self) {
        let oldest = self.0.iter().min_by_key(|(_, mark)| mark.at);
        if let Some(lane) = oldest.map(|(lane, _)| lane.clone()) {
            self.0.remove(&lane);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::record::Header;

    const HERE: &str = "nUcoD3k0SHyTn1WYwXqZCg";

    fn record(id: &str, offset: i64) -> Record {
        Record {
            topic: Arc::from("t"),
            partition: 0,
            offset,
            timestamp: None,
            key: None,
            value: None,
            headers: vec![Header::new(HEADER, id)],
        }
    }

    fn is_new(seen: &mut Seen, record: &Record) -> bool {
        seen.admit(record, HERE) == Admitted::New
    }

    #[test]
    fn ids_read_as_they_are_written() {
        let lane = LaneId {
            group: Arc::from("a/group/with/slashes"),
            topic: Arc::from("app.posts"),
            partition: 7,
        };
        let place = Place {
            generation: 2,
            offset: 41,
            index: 3,
        };
        let id = Ids::new(Arc::from(HERE), &lane).id("t", 0, place);
        assert_eq!(
            id,
            format!("@{HERE}/t/0/a/group/with/slashes/app.posts/7/2/41/3")
        );
        let read = OutputId::of(&record(&id, 0), HERE).expect("it was sent here");
        assert_eq!(read.to_string(), id);
        let source = Some(("a/group/with/slashes", "app.posts", 7));
        assert_eq!(read.source(), source);
        assert_eq!(read.place, place);

        let earlier = "a/group/with/slashes/app.posts/7/2/41/3";
        let read: OutputId = earlier.parse().expect("of an earlier version");
        assert_eq!(read.to_string(), earlier);
        assert_eq!(read.source(), source);
        for bad in [
            "",
            "1/2/3",
            "g/t/1/2/3",
            "g/t/x/1/2/3",
            "g/t/1/2/3/-1",
            "@c/t/0/x/1/2/3",
        ] {
            assert!(bad.parse::<OutputId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_not_above_the_highest_is_a_repetition() {
        for sent in ["", "@nUcoD3k0SHyTn1WYwXqZCg/t/0/"] {
            let mut seen = Seen::default();
            for (id, repeated) in [
                ("g/t/0/0/5/0", false),
                ("g/t/0/0/5/1", false),
                ("g/t/0/0/5/0", true),
                ("g/t/0/0/5/1", true),
                ("g/t/1/0/5/0", false),
                ("g/t/0/0/10/0", false),
                ("g/t/0/0/9/9", true),
                // A replay begins a new generation.
                ("g/t/0/1/0/0", false),
                ("g/t/0/0/11/0", true),
            ] {
                let record = record(&format!("{sent}{id}"), 0);
                assert_eq!(is_new(&mut seen, &record), !repeated, "{sent}{id}");
            }
            for _ in 0..2 {
                assert!(is_new(&mut seen, &record("nonsense", 0)), "it is no id");
            }
        }
    }

    #[test]
    fn a_generation_that_falls_is_said() {
        let mut seen = Seen::default();
        let of = |generation| record(&format!("@{HERE}/t/0/g/in/3/{generation}/9/0"), 0);
        assert_eq!(seen.admit(&of(7), HERE), Admitted::New);
        let fall = Fall {
            lane: "g/in/3".into(),
            generation: 6,
            highest: 7,
        };
        assert_eq!(seen.admit(&of(6), HERE), Admitted::Fallen(fall));
    }

    /// Copied by another program, whatever it says of its lane's outputs, it is a record of its own.
    #[test]
    fn an_id_counts_only_where_it_was_sent() {
        let mut seen = Seen::default();
        let here = record(&format!("@{HERE}/t/0/g/in/0/1/5/0"), 0);
        assert!(is_new(&mut seen, &here));
        for elsewhere in [
            format!("@{HERE}/other/0/g/in/0/1/5/0"),
            format!("@{HERE}/t/1/g/in/0/1/5/0"),
            "@another/t/0/g/in/0/1/5/0".into(),
            "@another/t/0/g/in/0/9/9/0".into(),
        ] {
            let copied = record(&elsewhere, 1);
            assert_eq!(OutputId::of(&copied, HERE), None, "{elsewhere}");
            for _ in 0..2 {
                assert!(is_new(&mut seen, &copied), "{elsewhere}");
            }
        }
        assert!(!is_new(&mut seen, &here), "it is remembered all the same");
    }

    #[test]
    fn a_dead_letter_has_no_id_but_its_own() {
        let mut letter = record("g/t/0/0/5/0", 0);
        let why = [("__dlq.errors.topic", "in"), (dead_letter::CAUSE, "trap")];
        let why = why.map(|(name, value)| Header::new(name, value));
        letter.headers.extend(why);
        assert_eq!(OutputId::of(&letter, HERE), None);
        letter.headers.push(Header::new(HEADER, "g/t/1/0/6/0"));
        let id = OutputId::of(&letter, HERE).expect("its own");
        assert_eq!(id.lane, "g/t/1");
        letter.topic = Arc::from("in");
        assert_eq!(OutputId::of(&letter, HERE), None, "it was sent back");
    }

    /// As librdkafka writes them.
    const IDS: [&str; 3] = [
        "TWDVuPDvRV2bWgSZ8+rn5Q",
        "XKAv8eVsRkWXognH7/6K8w",
        "62drJNYKT/iUeGS32T/0/w",
    ];

    #[test]
    fn remembers_its_topic_beside_its_lanes() {
        let mut seen = Seen::default();
        assert_eq!(seen.topic(), None);
        for lane in ["!/t/0", "!topic/t/0", "@x/t/0", "g/t/0"] {
            is_new(&mut seen, &record(&format!("{lane}/1/2/3"), 0));
            assert_eq!(seen.topic(), None, "{lane}");
        }
        for id in IDS {
            seen.set_topic(id);
            assert_eq!(seen.topic(), Some(id));
        }
        // As an earlier version left it.
        let mark = seen.0[&format!("{TOPIC}{}", IDS[2])].clone();
        seen.0.insert(format!("{TOPIC}{}", IDS[0]), mark);
        assert_eq!(seen.topic(), None);
        seen.set_topic(IDS[1]);
        assert_eq!(seen.topic(), Some(IDS[1]));
    }

    #[test]
    fn remembers_so_many_lanes_and_no_more() {
        let mut seen = Seen::default();
        for n in 0..=MAX_LANES {
            let offset = i64::try_from(n).expect("an offset");
            is_new(&mut seen, &record(&format!("g/t/{n}/0/0/0"), offset));
        }
        assert_eq!(seen.0.len(), MAX_LANES);
        assert!(
            is_new(&mut seen, &record("g/t/0/0/0/0", 0)),
            "the oldest is forgotten"
        );
    }
}
