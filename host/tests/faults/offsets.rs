//! What is done to the books' offsets from outside: retention removes what was processed, and an operator resets groups.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::bench::Bench;
use crate::judge::{Progress, Reset};
use crate::pipeline::{BOOKED, BOOKS, PASSED, PASSER, Stage, TRANSACTIONAL};
use crate::reader::{self, Lag};
use crate::restore;

/// How long what is to be done may be refused, since Kafka has just been started or a group is not empty yet.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the hosts may take to work off the books.
const WORKED_OFF: Duration = Duration::from_secs(60);
const ASK_INTERVAL: Duration = Duration::from_millis(200);
/// Offsets that a group is set back by, where it is not to the first: markers and what was aborted among them.
const BACK: i64 = 30;
/// What stands beside a group's offset that was committed by a row.
const ROW: &str = " generation=";

/// Waits until both groups of the books have committed all, markers included, and the lanes' rows say so too, but for what are no
/// records behind the last one; what is behind where they do not. Nobody may be writing.
pub(crate) fn until_worked_off(bench: &Bench, lag: &Lag) -> Result<(), String> {
    let deadline = Instant::now() + WORKED_OFF;
    let books = reader::topic(&bench.addresses.brokers, BOOKS);
    let last: BTreeMap<_, _> = books.iter().map(|r| (r.partition, r.offset)).collect();
    let is_of_books = |p: &Progress| [BOOKED.group, PASSER.group].contains(&p.group);
    loop {
        let mut progress = lag.progress().unwrap_or_default();
        progress.retain(is_of_books);
        let rows = restore::offsets(bench);
        // A group's offset may be an operator's.
        let is_behind = |p: &Progress| {
            let row = rows.get(&(p.group.to_owned(), p.partition));
            p.committed != p.end || row.is_some_and(|row| last.get(&p.partition) >= Some(row))
        };
        if !progress.is_empty() && !progress.iter().any(is_behind) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            progress.retain(is_behind);
            return Err(format!("{progress:?}"));
        }
        std::thread::sleep(ASK_INTERVAL);
    }
}

/// Removes all of the books, as retention does; nobody may be writing. Answers how many offsets that were.
pub(crate) fn remove_books(bench: &Bench) -> i64 {
    let bounds = reader::bounds(&bench.addresses.brokers, BOOKS);
    let mut ends = TopicPartitionList::new();
    for (partition, (_, end)) in &bounds {
        let added = ends.add_partition_offset(BOOKS, *partition, Offset::Offset(*end));
        added.expect("an offset");
    }
    let admin = admin(bench);
    patiently("records are removed", || {
        let removed = admin.delete_records(&ends, &AdminOptions::new());
        bench.runtime.block_on(removed)
    });
    bounds.values().map(|(first, end)| end - first).sum()
}

pub(crate) fn admin(bench: &Bench) -> AdminClient<DefaultClientContext> {
    let brokers = &bench.addresses.brokers;
    let admin = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create();
    admin.expect("an admin client")
}

/// Sets the group that is delivered to at least once back, to the first record or by some, while it has no members.
/// Answers what is to come again.
pub(crate) fn reset_passer(bench: &Bench, to_first: bool) -> Reset {
    let brokers = &bench.addresses.brokers;
    let committed = committed(bench, &PASSER);
    let bounds = reader::bounds(brokers, BOOKS);
    let back = |(partition, at): (&i32, &i64)| {
        let (first, _) = bounds[partition];
        let to = if to_first {
            first
        } else {
            first.max(at - BACK)
        };
        (*partition, to)
    };
    let to: BTreeMap<i32, i64> = committed.iter().map(back).collect();
    set(bench, &PASSER, &to);
    let books = reader::topic(brokers, BOOKS);
    let comes_again = |partition: &i32, offset: &i64| {
        (to.get(partition).zip(committed.get(partition)))
            .is_some_and(|(to, at)| (to..at).contains(&offset))
    };
    let again = books
        .iter()
        .filter(|r| comes_again(&r.partition, &r.offset));
    let outputs = reader::bounds(brokers, PASSED).into_iter();
    Reset {
        again: again.map(|record| record.message.id()).collect(),
        outputs_from: outputs
            .map(|(partition, (_, end))| (partition, end))
            .collect(),
    }
}

/// Sets the group of a transactional stage back to the first record, or forth to the end. Answers whether that is another
/// offset than it has.
pub(crate) fn reset_booked(bench: &Bench, to_first: bool) -> bool {
    let bounds = reader::bounds(&bench.addresses.brokers, BOOKS);
    let to = |(partition, (first, end)): (i32, (i64, i64))| {
        (partition, if to_first { first } else { end })
    };
    let to: BTreeMap<i32, i64> = bounds.into_iter().map(to).collect();
    let before = committed(bench, &BOOKED);
    set(bench, &BOOKED, &to);
    before.iter().any(|(partition, at)| to[partition] != *at)
}

fn member(bench: &Bench, stage: &Stage) -> BaseConsumer {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &bench.addresses.brokers);
    config.set("group.id", stage.group);
    config.create().expect("a consumer")
}

fn committed(bench: &Bench, stage: &Stage) -> HashMap<i32, i64> {
    let lag = Lag::new(&bench.addresses.brokers);
    let progress = patiently("offsets are read", || lag.progress());
    let of_stage = progress.into_iter().filter(|p| p.group == stage.group);
    of_stage.map(|p| (p.partition, p.committed)).collect()
}

/// Whether beside each group's offset of a transactional stage stands what its lane's row was.
pub(crate) fn are_told(bench: &Bench) -> bool {
    TRANSACTIONAL.iter().all(|stage| {
        let consumer = member(bench, stage);
        let mut list = TopicPartitionList::new();
        for partition in reader::bounds(&bench.addresses.brokers, stage.input).keys() {
            list.add_partition(stage.input, *partition);
        }
        let committed = consumer.committed_offsets(list, PATIENCE);
        let is_told = |element: &TopicPartitionListElem<'_>| element.metadata().contains(ROW);
        committed.is_ok_and(|list| list.elements().iter().all(is_told))
    })
}

/// As `kafka-consumer-groups --reset-offsets` does: the offsets, and nothing beside them.
pub(crate) fn set(bench: &Bench, stage: &Stage, offsets: &BTreeMap<i32, i64>) {
    let mut list = TopicPartitionList::new();
    for (partition, offset) in offsets {
        let added = list.add_partition_offset(stage.input, *partition, Offset::Offset(*offset));
        added.expect("an offset");
    }
    let consumer = member(bench, stage);
    patiently("a group is reset", || {
        consumer.commit(&list, CommitMode::Sync)
    });
}

pub(crate) fn patiently<T, E: std::fmt::Display>(
    what: &str,
    attempt: impl Fn() -> Result<T, E>,
) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Ok(done) => return done,
            Err(error) => assert!(Instant::now() < deadline, "{what}: {error}"),
        }
        std::thread::sleep(ASK_INTERVAL);
    }
}
