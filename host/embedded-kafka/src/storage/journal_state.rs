//! What the journal says: topics, committed offsets, and the identifiers handed out.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::topic_config::Overrides;

/// Bytes of all offsets that groups have committed, about: who commits for ever new groups is refused at last.
const MAX_OFFSETS_BYTES: usize = 64 << 20;
/// What an offset takes besides its names and its text.
const OFFSET_BYTES: usize = 100;

/// One line of the journal.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "entry", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Entry {
    /// The folder is that of this cluster.
    Cluster { id: String },
    /// A topic was created.
    Topic {
        name: String,
        id: String,
        partitions: i32,
        config: Overrides,
    },
    /// A topic has another configuration.
    Config { topic: String, config: Overrides },
    /// A topic has more partitions.
    Partitions { topic: String, count: i32 },
    /// A topic is no more, nor are the offsets committed for it.
    TopicDeleted { topic: String },
    /// Records before this offset were deleted on request.
    Start {
        topic: String,
        partition: i32,
        offset: i64,
    },
    /// A group committed an offset.
    Offset {
        group: String,
        topic: String,
        partition: i32,
        offset: i64,
        metadata: Option<String>,
    },
    /// The offset that a group committed for a partition was deleted.
    OffsetDeleted {
        group: String,
        topic: String,
        partition: i32,
    },
    /// The offsets of a group were deleted.
    GroupDeleted { group: String },
    /// Producer ids below this may have been handed out.
    ProducerIds { next: i64 },
}

/// What all entries so far amount to.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct State {
    /// Empty in a folder that is new.
    pub(crate) cluster: String,
    pub(crate) topics: BTreeMap<String, TopicState>,
    /// By group, then by topic and partition.
    pub(crate) offsets: HashMap<String, BTreeMap<(String, i32), Committed>>,
    /// What they take.
    offsets_bytes: usize,
    pub(crate) next_producer_id: i64,
}

/// A topic as the journal knows it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TopicState {
    pub(crate) id: String,
    pub(crate) partitions: i32,
    pub(crate) config: Overrides,
    /// First offsets of partitions that records were deleted from on request.
    pub(crate) starts: BTreeMap<i32, i64>,
}

/// A committed offset.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Committed {
    pub(crate) offset: i64,
    pub(crate) metadata: Option<String>,
}

impl State {
    /// Adds an entry.
    pub(crate) fn apply(&mut self, entry: Entry) {
        match entry {
            Entry::Cluster { id } => self.cluster = id,
            Entry::Topic {
                name,
                id,
                partitions,
                config,
            } => {
                self.topics.insert(
                    name,
                    TopicState {
                        id,
                        partitions,
                        config,
                        starts: BTreeMap::new(),
                    },
                );
            }
            Entry::Config { topic, config } => {
                if let Some(topic) = self.topics.get_mut(&topic) {
                    topic.config = config;
                }
            }
            Entry::Partitions { topic, count } => {
                if let Some(topic) = self.topics.get_mut(&topic) {
                    topic.partitions = count;
                }
            }
            Entry::TopicDeleted { topic } => self.delete_topic(&topic),
            Entry::Start {
                topic,
                partition,
                offset,
            } => {
                if let Some(topic) = self.topics.get_mut(&topic) {
                    topic.starts.insert(partition, offset);
                }
            }
            // A commit may come after the deletion of its topic; it must not wait there for one of the same name.
            Entry::Offset {
                group,
                topic,
                partition,
                offset,
                metadata,
            } if self.topics.contains_key(&topic) => {
                let committed = Committed { offset, metadata };
                self.offsets_bytes += weight(&group, &topic, committed.metadata.as_deref());
                let before = (self.offsets.entry(group.clone()).or_default())
                    .insert((topic.clone(), partition), committed);
                if let Some(before) = before {
                    self.offsets_bytes -= weight(&group, &topic, before.metadata.as_deref());
                }
            }
            Entry::Offset { .. } => {}
            Entry::OffsetDeleted {
                group,
                topic,
                partition,
            } => {
                self.delete_offset(&group, topic, partition);
            }
            Entry::GroupDeleted { group } => {
                let deleted = self.offsets.remove(&group).unwrap_or_default();
                let weights = (deleted.iter()).map(|((topic, _), committed)| {
                    weight(&group, topic, committed.metadata.as_deref())
                });
                self.offsets_bytes -= weights.sum::<usize>();
            }
            Entry::ProducerIds { next } => self.next_producer_id = next,
        }
    }

    fn delete_topic(&mut self, topic: &str) {
        self.topics.remove(topic);
        let bytes = &mut self.offsets_bytes;
        self.offsets.retain(|group, offsets| {
            offsets.retain(|(of, _), committed| {
                let stays = of != topic;
                if !stays {
                    *bytes -= weight(group, of, committed.metadata.as_deref());
                }
                stays
            });
            !offsets.is_empty()
        });
    }

    fn delete_offset(&mut self, group: &str, topic: String, partition: i32) {
        if let Some(offsets) = self.offsets.get_mut(group) {
            let place = (topic, partition);
            if let Some(committed) = offsets.remove(&place) {
                self.offsets_bytes -= weight(group, &place.0, committed.metadata.as_deref());
            }
            if offsets.is_empty() {
                self.offsets.remove(group);
            }
        }
    }

    /// Whether there is room for an offset with this text, or it takes no more than the one before it.
    pub(crate) fn has_room(
        &self,
        group: &str,
        place: &(String, i32),
        metadata: Option<&str>,
    ) -> bool {
        let of = |metadata: Option<&str>| weight(group, &place.0, metadata);
        let before = (self.offsets.get(group)).and_then(|offsets| offsets.get(place));
        let before = before.map_or(0, |before| of(before.metadata.as_deref()));
        of(metadata) <= before || self.offsets_bytes - before + of(metadata) <= MAX_OFFSETS_BYTES
    }

    /// The fewest entries that amount to the same.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        let mut entries = vec![
            Entry::Cluster {
                id: self.cluster.clone(),
            },
            Entry::ProducerIds {
                next: self.next_producer_id,
            },
        ];
        for (name, topic) in &self.topics {
            let TopicState {
                id,
                partitions,
                config,
                starts,
            } = topic.clone();
            entries.push(Entry::Topic {
                name: name.clone(),
                id,
                partitions,
                config,
            });
            let start = |(partition, offset)| Entry::Start {
                topic: name.clone(),
                partition,
                offset,
            };
            entries.extend(starts.into_iter().map(start));
        }
        for (group, offsets) in &self.offsets {
            entries.extend(
                offsets
                    .iter()
                    .map(|((topic, partition), committed)| Entry::Offset {
                        group: group.clone(),
                        topic: topic.clone(),
                        partition: *partition,
                        offset: committed.offset,
                        metadata: committed.metadata.clone(),
                    }),
            );
        }
        entries
    }
}

fn weight(group: &str, topic: &str, metadata: Option<&str>) -> usize {
    OFFSET_BYTES + group.len() + topic.len() + metadata.map_or(0, str::len)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offset(group: &str, metadata: usize) -> Entry {
        Entry::Offset {
            group: group.to_owned(),
            topic: "t".to_owned(),
            partition: 0,
            offset: 1,
            metadata: Some("m".repeat(metadata)),
        }
    }

    #[test]
    fn offsets_have_a_bound_and_what_is_deleted_makes_room() {
        let mut state = State::default();
        let topic = || Entry::Topic {
            name: "t".to_owned(),
            id: "i".to_owned(),
            partitions: 1,
            config: Overrides::new(),
        };
        state.apply(topic());
        let (place, text) = (("t".to_owned(), 0), "m".repeat(4096));
        let mut groups = (0..).map(|n| format!("group-{n}"));
        let full = groups.find(|group| {
            let is_full = !state.has_room(group, &place, Some(&text));
            if !is_full {
                state.apply(offset(group, text.len()));
            }
            is_full
        });
        let full = full.expect("there is an end");
        assert!(state.offsets_bytes <= MAX_OFFSETS_BYTES);
        assert!(state.has_room("group-0", &place, Some(&text)), "it goes on");
        state.apply(offset("group-0", text.len()));
        let deletions = [
            Entry::GroupDeleted {
                group: "group-0".to_owned(),
            },
            Entry::OffsetDeleted {
                group: "group-1".to_owned(),
                topic: "t".to_owned(),
                partition: 0,
            },
        ];
        for deletion in deletions {
            state.apply(deletion);
        }
        assert!(state.has_room(&full, &place, Some(&text)));
        let topic_deleted = Entry::TopicDeleted {
            topic: "t".to_owned(),
        };
        state.apply(topic_deleted);
        assert_eq!((state.offsets_bytes, state.offsets.len()), (0, 0));
    }
}
