//! Runs that are written down, for what random ones do not do.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use host::delivery::output;
use host::delivery::progress::LaneId;
use host::delivery::seen::{Admitted, HEADER, OutputId, Seen};
use host::pipeline::OnGap;
use host::record::{Header, Outgoing};

use crate::bugs::Bug;
use crate::hosts::{CLUSTER, FOREIGN};
use crate::run::{Run, simulate};
use crate::schedule::Schedule;
use crate::topology::{Kind, Mix};
use crate::world::database::Database;
use crate::world::lock;
use crate::world::pause;

/// Virtual milliseconds in which a lane has begun, and ended up where it can't go on.
const SETTLED: u64 = 60_000;

/// The lane of the first stage, which is transactional, on its first partition; and its database.
fn first_lane(run: &Run) -> (LaneId, Arc<Database>) {
    let stage = &run.schedule.topology.stages[0];
    let Kind::Transactional(database) = stage.kind else {
        panic!("the first stage is transactional");
    };
    (stage.lane(0), run.servers.databases[database].clone())
}

fn reasons(run: &Run) -> Vec<String> {
    let hosts = run.cluster.hosts();
    let reasons = hosts.iter().flat_map(|host| host.readiness.reasons());
    reasons.collect()
}

/// What somebody else wrote into a row, or what a stage was granted once, goes nowhere and is not lost.
#[test]
fn a_lane_holds_outputs_that_it_is_not_granted() {
    for seed in 1..=20 {
        let sent = simulate(hold(seed, None));
        assert_eq!(sent, 0, "seed {seed}");
    }
    let sent = simulate(hold(1, Some(Bug::GrantsAll)));
    assert!(sent > 0, "a lane that may send anything was not noticed");
}

/// How many records came into the topic that is not granted.
async fn hold(seed: u64, bug: Option<Bug>) -> i64 {
    let run = Run::begin(Schedule::calm(seed), bug).await;
    run.play().await;
    let (lane, database) = first_lane(&run);
    run.heal().await;
    for host in run.cluster.hosts() {
        host.crash();
    }
    let output = Outgoing {
        topic: FOREIGN.into(),
        partition: Some(0),
        timestamp: None,
        key: None,
        value: Some(b"x".to_vec()),
        headers: Vec::new(),
    };
    let pending = output::encode(&[output]).expect("encoded");
    database.tamper(&lane, |row| row.checkpoint.pending = pending.clone());
    let before = run.servers.broker.range(FOREIGN, 0).1;
    run.cluster.tend(true).await;
    pause(SETTLED).await;
    if bug.is_none() {
        let said = reasons(&run);
        let names = |reason: &&String| reason.contains(FOREIGN);
        assert_eq!(
            said.iter().filter(names).count(),
            1,
            "seed {seed}: {said:?}"
        );
        let row = database.lane(&lane).expect("a row");
        assert_eq!(row.checkpoint.pending, pending, "seed {seed}: it is kept");
    }
    let sent = run.servers.broker.range(FOREIGN, 0).1 - before;
    run.servers.world.end();
    sent
}

/// Somebody takes a lane's row over and over: the lane says so, and does not spin.
#[test]
fn a_lane_that_cannot_keep_its_row_says_so() {
    for seed in 1..=20 {
        simulate(steal(seed));
    }
}

async fn steal(seed: u64) {
    let run = Run::begin(Schedule::calm(seed), None).await;
    let (lane, database) = first_lane(&run);
    let thief = database.clone();
    let stolen = lane.clone();
    let thieving = tokio::spawn(async move {
        loop {
            pause(1).await;
            thief.tamper(&stolen, |row| row.epoch += 1_000);
        }
    });
    run.play().await;
    pause(SETTLED * 10).await;
    let epoch = database.lane(&lane).map_or(0, |row| row.epoch % 1_000);
    if reasons(&run).is_empty() {
        // Nothing of this lane was to be committed.
        assert!(epoch <= 2, "seed {seed}: claimed {epoch} times in silence");
    }
    assert!(
        epoch < 150,
        "seed {seed}: claimed {epoch} times in ten minutes"
    );
    thieving.abort();
    // It gets its row back, and does its work.
    run.heal().await;
    pause(SETTLED).await;
    assert_eq!(reasons(&run), Vec::<String>::new(), "seed {seed}");
    run.servers.world.end();
}

/// A topic that was deleted and made anew has other records at the offsets that its lanes know.
#[test]
fn a_lane_stops_where_its_topic_was_made_anew() {
    for seed in 1..=50 {
        simulate(recreate(seed));
    }
}

async fn recreate(seed: u64) {
    let run = Run::begin(Schedule::calm(seed), None).await;
    run.play().await;
    run.heal().await;
    let topology = run.schedule.topology.clone();
    let Kind::Transactional(database) = topology.stages[0].kind else {
        panic!("the first stage is transactional");
    };
    let input = &topology.stages[0].input;
    let began: Vec<i32> = (0..i32::try_from(topology.partitions(input)).expect("a few"))
        .filter(|partition| {
            let row = run.servers.databases[database].lane(&topology.stages[0].lane(*partition));
            row.is_some_and(|row| row.checkpoint.next_offset.is_some_and(|next| next > 0))
        })
        .collect();
    run.servers.broker.recreate(input);
    for host in run.cluster.hosts() {
        host.crash();
    }
    run.cluster.tend(true).await;
    pause(60_000).await;
    let halted = run.cluster.halted();
    for partition in began {
        assert!(
            halted.contains(&(0, partition)),
            "seed {seed}: {halted:?}, and not {input} {partition}"
        );
    }
    // A lane that has stopped is given up like any other.
    for host in run.cluster.hosts() {
        let seats: Vec<_> = lock(&host.lanes).keys().copied().collect();
        for seat in seats {
            let before = run.servers.world.now();
            host.end_lane(seat, 5_000).await;
            assert!(
                run.servers.world.now() - before < 5_000,
                "seed {seed}: {seat:?}"
            );
        }
        assert_eq!(host.readiness.reasons(), Vec::<String>::new());
    }
    run.servers.world.end();
}

/// Its database goes back to an older copy and forth again: what a lane sends then is not taken for what it has sent before.
#[test]
fn a_database_that_goes_back_loses_no_outputs() {
    let mut dropped = 0;
    for seed in 1..=30 {
        assert_eq!(simulate(go_back(seed, None)), 0, "seed {seed}");
        dropped += simulate(go_back(seed, Some(Bug::GenerationsFall)));
    }
    assert!(dropped > 0, "generations that fall were not noticed");
}

/// How many outputs whoever reads drops as repetitions, though they are none.
async fn go_back(seed: u64, bug: Option<Bug>) -> usize {
    let mut schedule = Schedule::calm(seed);
    schedule.on_gap = OnGap::Continue;
    let run = Run::begin(schedule, bug).await;
    run.play().await;
    run.heal().await;
    let (_, database) = first_lane(&run);
    let copy = database.copy();
    let empty = (Vec::new(), BTreeMap::new());
    for (from, to) in [(10_000, empty), (20_000, copy)] {
        for host in run.cluster.hosts() {
            host.crash();
        }
        database.restore(to);
        run.cluster.tend(true).await;
        for n in 0..12 {
            run.input(from + n, Some(n % 3));
        }
        run.heal().await;
    }
    let dropped = wrongly_dropped(&run);
    run.servers.world.end();
    dropped
}

fn wrongly_dropped(run: &Run) -> usize {
    let mut dropped = 0;
    for (topic, partitions) in &run.schedule.topology.topics {
        for number in 0..i32::try_from(*partitions).unwrap_or(0) {
            let (mut seen, mut known) = (Seen::default(), BTreeSet::new());
            for record in run.servers.broker.partition(topic, number).records {
                let id = OutputId::of(&record, CLUSTER).map(|id| id.to_string());
                let is_known = id.is_some_and(|id| !known.insert(id));
                let is_dropped = seen.admit(&record, CLUSTER) != Admitted::New;
                dropped += usize::from(is_dropped && !is_known);
            }
        }
    }
    dropped
}

/// A database that was emptied is noticed, and who sets the group's offset says where to go on.
#[test]
fn a_lane_stops_where_its_database_was_emptied() {
    for seed in 1..=20 {
        simulate(empty(seed, false));
        simulate(empty(seed, true));
    }
}

async fn empty(seed: u64, while_they_run: bool) {
    let mut schedule = Schedule::calm(seed);
    schedule.on_gap = OnGap::Stop;
    let run = Run::begin(schedule, None).await;
    run.play().await;
    run.heal().await;
    let (lane, database) = first_lane(&run);
    let next = database
        .lane(&lane)
        .and_then(|row| row.checkpoint.next_offset);
    // What commits offsets has said the last of it.
    pause(SETTLED).await;
    let restart = async || {
        for host in run.cluster.hosts() {
            host.crash();
        }
        run.cluster.tend(true).await;
        pause(SETTLED).await;
    };
    database.restore((Vec::new(), BTreeMap::new()));
    match while_they_run {
        // Nothing is there to be committed: lanes look by themselves.
        true => pause(SETTLED).await,
        false => restart().await,
    }
    let Some(next) = next else {
        run.servers.world.end();
        return;
    };
    let halted = run.cluster.halted();
    assert!(
        halted.contains(&(0, lane.partition)),
        "seed {seed}: {halted:?}"
    );
    let said = reasons(&run);
    let told = |reason: &&String| reason.contains("emptied") && reason.contains("--reset-offsets");
    assert!(
        said.iter().any(|reason| told(&reason)),
        "seed {seed}: {said:?}"
    );
    run.servers.broker.reset((0, lane.partition), next);
    restart().await;
    let halted = run.cluster.halted();
    assert!(
        !halted.contains(&(0, lane.partition)),
        "seed {seed}: {halted:?}"
    );
    run.servers.world.end();
}

/// Somebody sets the group's offset: nothing is done twice, and nothing is left out.
#[test]
fn the_row_counts_whatever_the_groups_offset_is_set_to() {
    for seed in 1..=20 {
        simulate(set(seed));
    }
}

async fn set(seed: u64) {
    let run = Run::begin(Schedule::calm(seed), None).await;
    run.play().await;
    run.heal().await;
    let (lane, database) = first_lane(&run);
    let rows = || {
        let rows = database.rows().into_iter().filter(|row| row.stage == 0);
        rows.map(|row| row.id).collect::<Vec<_>>()
    };
    let before = rows();
    let next = database
        .lane(&lane)
        .and_then(|row| row.checkpoint.next_offset);
    if next.is_some() {
        run.servers.broker.reset((0, lane.partition), 0);
    }
    for host in run.cluster.hosts() {
        host.crash();
    }
    run.cluster.tend(true).await;
    pause(SETTLED).await;
    assert_eq!(rows(), before, "seed {seed}");
    run.servers.world.end();
}

/// Records that were copied from another cluster, with what its hosts wrote beside them, blind no lane.
#[test]
fn ids_of_another_cluster_do_not_count() {
    for seed in 1..=30 {
        simulate(mirror(seed, None));
    }
    let anomalies: usize = (1..=30)
        .map(|seed| simulate(mirror(seed, Some(Bug::TrustsIds))))
        .sum();
    assert!(anomalies > 0, "ids that count anywhere were not noticed");
}

/// How many outputs of the first stage the second has not done.
async fn mirror(seed: u64, bug: Option<Bug>) -> usize {
    let run = Run::begin(Schedule::calm(seed), bug).await;
    let topology = run.schedule.topology.clone();
    let (first, middle) = (&topology.stages[0], &topology.stages[1].input);
    for number in 0..i32::try_from(topology.partitions(middle)).unwrap_or(0) {
        for from in 0..i32::try_from(topology.partitions(&first.input)).unwrap_or(0) {
            let LaneId { group, topic, .. } = first.lane(from);
            let id = format!("@there/{middle}/{number}/{group}/{topic}/{from}/9999999999/0/0");
            let record = Outgoing {
                topic: middle.clone(),
                partition: Some(number),
                timestamp: None,
                key: None,
                value: Some(format!("mirrored-{from}").into_bytes()),
                headers: vec![Header::new(HEADER, id)],
            };
            run.servers.broker.append(0, &record);
        }
    }
    run.play().await;
    run.heal().await;
    let letters: BTreeSet<_> = values(&run, &topology.stages[1].letters);
    let effects = run.servers.world.evidence().effects();
    let undone = values(&run, middle).into_iter().filter(|value| {
        let id: Arc<str> = value.as_str().into();
        !letters.contains(value) && !effects.contains(&(1, id))
    });
    let undone: Vec<_> = undone.collect();
    if bug.is_none() && run.cluster.halted().is_empty() {
        assert_eq!(undone, Vec::<String>::new(), "seed {seed}");
    }
    run.servers.world.end();
    undone.len()
}

fn values(run: &Run, topic: &Arc<str>) -> BTreeSet<String> {
    let partitions = run.schedule.topology.partitions(topic);
    let numbers = 0..i32::try_from(partitions).unwrap_or(0);
    let records = numbers.flat_map(|number| run.servers.broker.partition(topic, number).records);
    let value = |record: host::record::Record| {
        String::from_utf8_lossy(record.value.as_deref().unwrap_or_default()).into_owned()
    };
    records.map(value).collect()
}

/// A topic of transactions that is processed, and then emptied by retention, its markers with it.
#[test]
fn markers_that_are_removed_are_no_gap() {
    let mut halted = 0;
    for seed in 1..=20 {
        assert_eq!(simulate(markers(seed, None)), 0, "seed {seed}");
        halted += simulate(markers(seed, Some(Bug::StaysAtMarkers)));
    }
    assert!(halted > 0, "markers that are not passed were not noticed");
}

/// How many lanes have stopped.
async fn markers(seed: u64, bug: Option<Bug>) -> usize {
    let mut schedule = Schedule::calm(seed);
    schedule.on_gap = OnGap::Stop;
    let run = Run::begin(schedule, bug).await;
    run.play().await;
    run.heal().await;
    let topology = run.schedule.topology.clone();
    let (input, broker) = (&topology.stages[0].input, &run.servers.broker);
    let before = run.cluster.halted().len();
    let partitions = 0..i32::try_from(topology.partitions(input)).unwrap_or(0);
    for number in partitions.clone() {
        broker.mark(input, number, 3);
    }
    pause(SETTLED).await;
    for number in partitions {
        let (_, end) = broker.range(input, number);
        broker.remove(input, number, end);
    }
    for host in run.cluster.hosts() {
        host.crash();
    }
    run.cluster.tend(true).await;
    pause(SETTLED).await;
    let halted = run.cluster.halted().len();
    run.servers.world.end();
    halted.saturating_sub(before)
}

/// A stage that is delivered to at least once for a while, and in transactions before and after: its row knows nothing of what
/// was done meanwhile, and the group's offset does.
#[test]
fn a_lane_that_changes_its_delivery_goes_on_behind_what_was_done() {
    let mut again = 0;
    for seed in 1..=30 {
        assert_eq!(simulate(deliver_else(seed, None)), 0, "seed {seed}");
        again += simulate(deliver_else(seed, Some(Bug::ForgetsDelivered)));
    }
    assert!(again > 0, "what was done again was not noticed");
}

/// How many messages have their effects not once.
async fn deliver_else(seed: u64, bug: Option<Bug>) -> usize {
    let run = Run::begin(without_faults(seed), bug).await;
    let (lane, database) = first_lane(&run);
    run.play().await;
    run.heal().await;
    let mut without_rows = BTreeSet::new();
    for (from, is_at_least_once) in [(1_000, true), (2_000, false), (3_000, true), (4_000, false)] {
        match is_at_least_once {
            true => lock(&run.servers.at_least_once).insert(0),
            false => lock(&run.servers.at_least_once).remove(&0),
        };
        restart(&run).await;
        for n in from..from + 12 {
            run.input(n, Some(n % 3));
            without_rows.extend(is_at_least_once.then(|| n.to_string()));
        }
        run.heal().await;
        pause(SETTLED).await;
    }
    let effects = run.servers.world.evidence().effects();
    let outputs = counted(&run, &run.schedule.topology.stages[1].input);
    let is_wrong = |id: &&String| {
        let rows = count_of_rows(&database, id);
        let expected = usize::from(!without_rows.contains(*id));
        let name: Arc<str> = id.as_str().into();
        let outputs_of = run.schedule.topology.outputs(0, id);
        let are_once = outputs_of
            .iter()
            .all(|output| outputs.get(output) == Some(&1));
        rows != expected || !effects.contains(&(0, name)) || !are_once
    };
    let wrong = values(&run, &lane.topic).iter().filter(is_wrong).count();
    if bug.is_none() {
        let evidence = run.servers.world.evidence();
        assert_eq!(evidence.anomalies, Vec::new(), "seed {seed}");
    }
    run.servers.world.end();
    wrong
}

/// Of a lane that has no row yet, the group is told where it has begun. That is no word of what is below: an operator set it,
/// and now brings back the database that was lost, which is an older copy.
#[test]
fn where_a_lane_has_begun_says_nothing_of_what_is_below() {
    let mut lost = 0;
    for seed in 1..=30 {
        assert_eq!(simulate(bring_back(seed, None)), 0, "seed {seed}");
        lost += simulate(bring_back(seed, Some(Bug::TrustsBeginnings)));
    }
    assert!(lost > 0, "what was left out was not noticed");
}

/// How many messages have no row, of lanes that have one.
async fn bring_back(seed: u64, bug: Option<Bug>) -> usize {
    let run = Run::begin(without_faults(seed), bug).await;
    let (lane, database) = first_lane(&run);
    run.play().await;
    run.heal().await;
    let copy = database.copy();
    (1_000..1_012).for_each(|n| run.input(n, Some(n % 3)));
    run.heal().await;
    pause(SETTLED).await;
    database.restore((Vec::new(), BTreeMap::new()));
    restart(&run).await;
    pause(SETTLED).await;
    let stages = &run.schedule.topology.stages;
    let broker = &run.servers.broker;
    for (number, stage) in stages.iter().enumerate() {
        for partition in 0..i32::try_from(broker.partitions(&stage.input)).unwrap_or(0) {
            let seat = (number, partition);
            if let Some(offset) = broker.committed(seat) {
                broker.reset(seat, offset);
            }
        }
    }
    restart(&run).await;
    pause(SETTLED).await;
    let begun = |partition: i32| {
        let row = copy.1.get(&stages[0].lane(partition));
        row.is_some_and(|row| row.checkpoint.next_offset.is_some())
    };
    let mut to_be_there = Vec::new();
    for partition in 0..i32::try_from(broker.partitions(&lane.topic)).unwrap_or(0) {
        let records = broker.partition(&lane.topic, partition).records;
        to_be_there.extend(records.into_iter().filter(|_| begun(partition)));
    }
    database.restore(copy.clone());
    restart(&run).await;
    run.heal().await;
    pause(SETTLED).await;
    let id = |record: &host::record::Record| {
        String::from_utf8_lossy(record.value.as_deref().unwrap_or_default()).into_owned()
    };
    let is_lost = |record: &&host::record::Record| count_of_rows(&database, &id(record)) == 0;
    let lost = to_be_there.iter().filter(is_lost).count();
    run.servers.world.end();
    lost
}

/// A calm schedule, whose first stage does well with each message.
fn without_faults(seed: u64) -> Schedule {
    let mut schedule = Schedule::calm(seed);
    schedule.on_gap = OnGap::Stop;
    schedule.topology.stages[0].mix = Mix::default();
    schedule
}

/// All hosts anew, as their operator wants them now.
async fn restart(run: &Run) {
    for host in run.cluster.hosts() {
        host.crash();
    }
    run.cluster.tend(true).await;
}

/// The first stage's rows of a message.
fn count_of_rows(database: &Database, id: &str) -> usize {
    let rows = database.rows().into_iter();
    rows.filter(|row| row.stage == 0 && *row.id == *id).count()
}

/// How often each value is in a topic.
fn counted(run: &Run, topic: &Arc<str>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for number in 0..i32::try_from(run.schedule.topology.partitions(topic)).unwrap_or(0) {
        for record in run.servers.broker.partition(topic, number).records {
            let value = record.value.as_deref().unwrap_or_default();
            *counts
                .entry(String::from_utf8_lossy(value).into_owned())
                .or_default() += 1;
        }
    }
    counts
}
