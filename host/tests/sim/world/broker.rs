//! The log: partitions, and for each group who owns them and how far it has got.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use host::log::committed::Committed;
use host::record::{Outgoing, Record};
use tokio::sync::Notify;

use super::evidence::id_of;
use super::trace::Subject;
use super::{World, lock};

/// A stage's partition.
pub(crate) type Seat = (usize, i32);

pub(crate) struct Broker {
    world: World,
    state: Mutex<State>,
    /// Something was appended, or the log is there again.
    pub(crate) changed: Notify,
}

struct State {
    is_up: bool,
    topics: BTreeMap<Arc<str>, Vec<Partition>>,
    /// How often each was made anew.
    made: BTreeMap<Arc<str>, u32>,
    owners: BTreeMap<Seat, u32>,
    committed: BTreeMap<Seat, Committed>,
}

#[derive(Clone, Default)]
pub(crate) struct Partition {
    /// What retention has left.
    pub(crate) first: i64,
    /// From offset 0 on.
    pub(crate) records: Vec<Record>,
    ids: Vec<Arc<str>>,
    /// Behind the records: markers of transactions, and what was aborted.
    markers: i64,
}

impl Partition {
    pub(crate) fn end(&self) -> i64 {
        self.end_of_records() + self.markers
    }

    fn end_of_records(&self) -> i64 {
        self.records.len().try_into().unwrap_or(i64::MAX)
    }
}

impl Broker {
    pub(crate) fn new(world: World) -> Arc<Self> {
        let topics = world
            .topology()
            .topics
            .iter()
            .map(|(name, partitions)| (name.clone(), vec![Partition::default(); *partitions]))
            .collect();
        Arc::new(Self {
            world,
            state: Mutex::new(State {
                is_up: true,
                topics,
                made: BTreeMap::new(),
                owners: BTreeMap::new(),
                committed: BTreeMap::new(),
            }),
            changed: Notify::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(crate) fn set_up(&self, is_up: bool) {
        self.state().is_up = is_up;
        self.world
            .note(0, "log", Subject::None, [i64::from(is_up), 0]);
        self.changed.notify_waiters();
    }

    pub(crate) fn is_up(&self) -> bool {
        self.state().is_up
    }

    pub(crate) async fn until_up(&self) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.is_up() {
                return;
            }
            changed.await;
        }
    }

    pub(crate) fn partitions(&self, topic: &str) -> usize {
        self.world.topology().partitions(topic)
    }

    pub(crate) fn refuses(&self, topic: &str, value: &str) -> bool {
        self.world.topology().refuses(topic, value)
    }

    /// Appends a record to the partition that it names.
    pub(crate) fn append(&self, who: u32, record: &Outgoing) {
        let number = record.partition.unwrap_or(0);
        let mut state = self.state();
        let partition = partition_mut(&mut state, &record.topic, number);
        let offset = partition.end();
        let id = id_of(record.value.as_deref());
        let at = i64::try_from(self.world.now()).unwrap_or(0);
        partition.ids.push(id.clone());
        partition.records.push(Record {
            topic: record.topic.clone(),
            partition: number,
            offset,
            timestamp: record.timestamp.or(Some(at)),
            key: record.key.clone(),
            value: record.value.clone(),
            headers: record.headers.clone(),
        });
        drop(state);
        self.world
            .evidence()
            .appended(self.world.topology(), record);
        let subject = Subject::Place(record.topic.clone(), number);
        self.world
            .note(who, "appended", Subject::Name(id), [offset, 0]);
        self.world.note(who, "  to", subject, [offset, 0]);
        self.changed.notify_waiters();
    }

    pub(crate) fn partition(&self, topic: &str, number: i32) -> Partition {
        partition_mut(&mut self.state(), topic, number).clone()
    }

    /// First offset and end.
    pub(crate) fn range(&self, topic: &str, number: i32) -> (i64, i64) {
        let mut state = self.state();
        let partition = partition_mut(&mut state, topic, number);
        (partition.first, partition.end())
    }

    /// Behind the last record; what follows it up to the end comes to nobody.
    pub(crate) fn end_of_records(&self, topic: &str, number: i32) -> i64 {
        partition_mut(&mut self.state(), topic, number).end_of_records()
    }

    /// Transactions end, with their markers, and no record comes after them.
    pub(crate) fn mark(&self, topic: &str, number: i32, markers: i64) {
        partition_mut(&mut self.state(), topic, number).markers += markers;
        self.changed.notify_waiters();
    }

    /// So many records from an offset on, at most.
    pub(crate) fn read(&self, topic: &str, number: i32, from: i64, count: usize) -> Vec<Record> {
        let mut state = self.state();
        let partition = partition_mut(&mut state, topic, number);
        let from = usize::try_from(from).unwrap_or(usize::MAX);
        let records = partition.records.iter().skip(from).take(count);
        records.cloned().collect()
    }

    /// Removes what is below an offset.
    pub(crate) fn remove(&self, topic: &Arc<str>, number: i32, below: i64) {
        let mut state = self.state();
        let partition = partition_mut(&mut state, topic, number);
        let first = partition.first;
        partition.first = below.clamp(first, partition.end());
        let gone = first..partition.first;
        let ids: Vec<_> = gone
            .filter_map(|offset| partition.ids.get(usize::try_from(offset).ok()?).cloned())
            .collect();
        drop(state);
        let mut evidence = self.world.evidence();
        evidence
            .removed
            .extend(ids.into_iter().map(|id| (topic.clone(), id)));
    }

    /// Another one of the same name has another. With slashes, as the log's may be, and an end as theirs.
    pub(crate) fn topic_id(&self, topic: &str) -> String {
        let made = self.state().made.get(topic).copied().unwrap_or(0);
        format!("{made}/{topic}/w")
    }

    /// The topic is deleted and made anew, and with it the groups' offsets go.
    pub(crate) fn recreate(&self, topic: &str) {
        let mut state = self.state();
        *state.made.entry(topic.into()).or_default() += 1;
        let stages = &self.world.topology().stages;
        state
            .committed
            .retain(|(stage, _), _| *stages[*stage].input != *topic);
        if let Some(partitions) = state.topics.get_mut(topic) {
            partitions.fill(Partition::default());
        }
        drop(state);
        self.changed.notify_waiters();
    }

    pub(crate) fn owner(&self, seat: Seat) -> Option<u32> {
        self.state().owners.get(&seat).copied()
    }

    pub(crate) fn set_owner(&self, seat: Seat, process: Option<u32>) {
        let mut state = self.state();
        match process {
            Some(process) => state.owners.insert(seat, process),
            None => state.owners.remove(&seat),
        };
    }

    pub(crate) fn committed(&self, seat: Seat) -> Option<i64> {
        Some(self.state().committed.get(&seat)?.offset)
    }

    /// The group's offset, and what is written beside it.
    pub(crate) fn group_commit(&self, seat: Seat) -> Option<Committed> {
        self.state().committed.get(&seat).cloned()
    }

    /// An operator sets a group's offset: the words beside it are gone.
    pub(crate) fn reset(&self, seat: Seat, offset: i64) {
        let committed = Committed { offset, mark: None };
        self.state().committed.insert(seat, committed);
    }

    /// Commits an offset of a group, if the partition is the process's; answers whether it was.
    pub(crate) fn commit(&self, who: u32, seat: Seat, commit: Committed) -> bool {
        let (offset, generation) = (commit.offset, generation_of(&commit));
        if self.owner(seat) != Some(who) {
            return false;
        }
        let topic = self.world.topology().stages[seat.0].input.clone();
        self.check_durable(seat, offset, "committed");
        let before = self.state().committed.insert(seat, commit);
        // What somebody has set says nothing of what was done, and a row that went back has a higher generation.
        let before = before.filter(|before| before.mark.is_some());
        let before = before.filter(|before| generation_of(before) >= generation);
        let before = before.map(|before| before.offset);
        if let Some(before) = before.filter(|before| offset < *before) {
            let what = format!("{topic} {}: {offset} committed after {before}", seat.1);
            self.world.evidence().anomaly("nonmonotone-commit", what);
        }
        let subject = Subject::Place(topic, seat.1);
        self.world
            .note(who, "offset committed", subject, [offset, 0]);
        true
    }

    /// An offset is about to be given to the log, or was.
    pub(crate) fn check_durable(&self, seat: Seat, offset: i64, told: &'static str) {
        let topology = self.world.topology();
        let mut state = self.state();
        let partition = partition_mut(&mut state, &topology.stages[seat.0].input, seat.1);
        let mut evidence = self.world.evidence();
        evidence.check_durable(topology, seat, offset, &partition.ids, told);
    }
}

fn generation_of(commit: &Committed) -> Option<i64> {
    commit.row().map(|row| row.generation)
}

fn partition_mut<'a>(state: &'a mut State, topic: &str, number: i32) -> &'a mut Partition {
    let partitions = state.topics.get_mut(topic);
    let partition = partitions.and_then(|p| p.get_mut(usize::try_from(number).ok()?));
    partition.unwrap_or_else(|| panic!("there is no {topic} {number}"))
}
