//! What the journal says: topics, committed offsets, and the identifiers handed out.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::topic_config::Overrides;

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
                self.offsets
                    .entry(group)
                    .or_default()
                    .insert((topic, partition), Committed { offset, metadata });
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
                self.offsets.remove(&group);
            }
            Entry::ProducerIds { next } => self.next_producer_id = next,
        }
    }

    fn delete_topic(&mut self, topic: &str) {
        self.topics.remove(topic);
        self.offsets.retain(|_, offsets| {
            offsets.retain(|(of, _), _| of != topic);
            !offsets.is_empty()
        });
    }

    fn delete_offset(&mut self, group: &str, topic: String, partition: i32) {
        if let Some(offsets) = self.offsets.get_mut(group) {
            offsets.remove(&(topic, partition));
            if offsets.is_empty() {
                self.offsets.remove(group);
            }
        }
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
