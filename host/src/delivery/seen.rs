//! Which outputs of other lanes a lane has taken in, so that a repeated one is dropped.
//!
//! An output carries its [`OutputId`] in the header [`HEADER`]. Outputs of one lane reach a partition in the
//! order of their ids, so the highest one of each lane is all that needs to be remembered.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::dead_letter;
use super::progress::LaneId;
use crate::record::Record;

/// The header that carries an output's id. Others rely on the name.
pub const HEADER: &str = "stagehost-id";
/// Bytes of an id that is taken for one.
const MAX_ID_BYTES: usize = 1024;
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

/// `group/topic/partition/generation/offset/index`. A group may have slashes in its name; topics have none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputId {
    /// `group/topic/partition`.
    pub lane: String,
    /// Where among them.
    pub place: Place,
}

impl OutputId {
    /// The id of a lane's output.
    pub fn new(lane: &LaneId, place: Place) -> Self {
        let LaneId {
            group,
            topic,
            partition,
        } = lane;
        Self {
            lane: format!("{group}/{topic}/{partition}"),
            place,
        }
    }

    /// The id that a record carries. One that is malformed is none, and so is the one that a dead letter has from the
    /// record that it is made of: it stands before the headers that say why.
    pub fn of(record: &Record) -> Option<Self> {
        let mut last_first = record.headers.iter().rev();
        let header = last_first.find(|h| h.name == HEADER || h.name == dead_letter::CAUSE)?;
        if header.name != HEADER {
            return None;
        }
        let value = header.value.as_deref()?;
        if value.len() > MAX_ID_BYTES {
            return None;
        }
        std::str::from_utf8(value).ok()?.parse().ok()
    }

    /// The id of the dead letter of an output that the log refused. It is produced after later outputs of its lane, so it
    /// is as if it were another's.
    pub fn of_its_letter(&self) -> Self {
        let lane = match self.source() {
            Some((group, topic, partition)) => format!("{group}!refused/{topic}/{partition}"),
            None => self.lane.clone(),
        };
        Self {
            lane,
            place: self.place,
        }
    }

    /// The lane's parts: group, topic and partition.
    pub fn source(&self) -> Option<(&str, &str, i32)> {
        let (rest, partition) = self.lane.rsplit_once('/')?;
        let (group, topic) = rest.rsplit_once('/')?;
        Some((group, topic, partition.parse().ok()?))
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
#[error("not of the form group/topic/partition/generation/offset/index")]
pub struct Malformed;

impl FromStr for OutputId {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        fn number<T: FromStr>(part: Option<&str>) -> Result<T, Malformed> {
            part.and_then(|part| part.parse().ok()).ok_or(Malformed)
        }
        let mut parts = text.rsplitn(4, '/');
        let index = number(parts.next())?;
        let offset = number(parts.next())?;
        let generation = number(parts.next())?;
        let id = Self {
            lane: parts.next().ok_or(Malformed)?.to_owned(),
            place: Place {
                generation,
                offset,
                index,
            },
        };
        id.source().ok_or(Malformed)?;
        Ok(id)
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

impl Seen {
    /// Takes a record in; answers whether it is one that was taken in before.
    pub fn admit(&mut self, record: &Record) -> bool {
        let Some(OutputId { lane, place }) = OutputId::of(record) else {
            return false;
        };
        let mark = Mark {
            place,
            at: record.offset,
        };
        match self.0.get_mut(&lane) {
            Some(known) if place <= known.place => return true,
            Some(known) => *known = mark,
            None => {
                if self.0.len() >= MAX_LANES {
                    self.forget_one();
                }
                self.0.insert(lane, mark);
            }
        }
        false
    }

    /// Whether any of the records could change it.
    pub fn concerns(records: &[Record]) -> bool {
        records
            .iter()
            .any(|record| record.headers.iter().any(|h| h.name == HEADER))
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
        let id = OutputId::new(&lane, place);
        assert_eq!(id.to_string(), "a/group/with/slashes/app.posts/7/2/41/3");
        assert_eq!(id.to_string().parse::<OutputId>().ok(), Some(id.clone()));
        assert_eq!(id.source(), Some(("a/group/with/slashes", "app.posts", 7)));
        for bad in ["", "1/2/3", "g/t/1/2/3", "g/t/x/1/2/3", "g/t/1/2/3/-1"] {
            assert!(bad.parse::<OutputId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_not_above_the_highest_is_a_repetition() {
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
            // No id: not known.
            ("nonsense", false),
            ("nonsense", false),
        ] {
            assert_eq!(seen.admit(&record(id, 0)), repeated, "{id}");
        }
    }

    #[test]
    fn a_dead_letter_has_no_id_but_its_own() {
        let mut letter = record("g/t/0/0/5/0", 0);
        letter.headers.push(Header::new(dead_letter::CAUSE, "trap"));
        assert_eq!(OutputId::of(&letter), None);
        letter.headers.push(Header::new(HEADER, "g/t/1/0/6/0"));
        let id = OutputId::of(&letter).expect("its own");
        assert_eq!(id.lane, "g/t/1");
    }

    #[test]
    fn remembers_so_many_lanes_and_no_more() {
        let mut seen = Seen::default();
        for n in 0..=MAX_LANES {
            let offset = i64::try_from(n).expect("an offset");
            seen.admit(&record(&format!("g/t/{n}/0/0/0"), offset));
        }
        assert_eq!(seen.0.len(), MAX_LANES);
        assert!(
            !seen.admit(&record("g/t/0/0/0/0", 0)),
            "the oldest is forgotten"
        );
    }
}
