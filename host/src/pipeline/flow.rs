//! What stages are to each other: groups that they share, and the way that records take between them.

use std::collections::{BTreeMap, BTreeSet};
use std::iter::successors;

use super::delivery::default_ledger;
use super::kafka::{is_embedded, is_topic_name};
use super::load::Checks;
use super::stages::{DEAD_LETTER_SUFFIX, dead_letter_topics, sql_sections, texts};
use crate::diagnostics::{Problem, Span, nearest};
use crate::manifest::{DeliveryWord, Manifest, StageSection, Text};

pub(super) fn check(checks: &Checks<'_>, manifest: &Manifest) {
    check_groups(checks, &manifest.stages);
    check_instance_ids(checks, &manifest.stages);
    check_cycles(checks, &manifest.stages);
    check_topics(checks, manifest);
    check_dead_letter_names(checks, manifest);
}

/// Kafka refuses to create topics whose names differ in `.` and `_` alone, those of dead letters too. Declared ones are held
/// against each other elsewhere.
fn check_dead_letter_names(checks: &Checks<'_>, manifest: &Manifest) {
    let metric_name = |topic: &str| topic.replace('.', "_");
    let declared = manifest.topics.iter().map(|topic| &topic.name);
    // By what Kafka makes of a name: the name, and how messages may show it.
    let mut first: BTreeMap<String, (String, String)> = declared
        .map(|t| {
            (
                metric_name(&t.value),
                (t.value.clone(), t.shown().to_owned()),
            )
        })
        .collect();
    for stage in &manifest.stages {
        for (topic, shown, span) in letters_of(stage) {
            let other = first.entry(metric_name(&topic));
            let (other, other_shown) = other.or_insert_with(|| (topic.clone(), shown.clone()));
            if *other == topic {
                continue;
            }
            let message = format!("Kafka takes `{shown}` for the same name as `{other_shown}`");
            checks.report(
                Problem::at(span, message)
                    .label(format!(
                        "the dead letters of `{}` go there; `.` and `_` count as one in a name",
                        stage.name.value
                    ))
                    .help("name another topic for them: `dead-letter = \"…\"`"),
            );
        }
    }
}

/// The topics of a stage's dead letters: each with how messages may show it, and its place.
fn letters_of(stage: &StageSection) -> Vec<(String, String, &Span)> {
    let beside = |topic: &str| format!("{topic}{DEAD_LETTER_SUFFIX}");
    match &stage.dead_letter {
        Some(own) => vec![(own.value.clone(), own.shown().to_owned(), &own.span)],
        None => texts(stage.input.as_ref())
            .iter()
            .map(|topic| (beside(&topic.value), beside(topic.shown()), &topic.span))
            .collect(),
    }
}

/// Warns of topics that a run would not find, unless somebody else has made them. On a cluster others may have, so there an
/// input is left out that a stage here writes, and an output whose name is like no other.
fn check_topics(checks: &Checks<'_>, manifest: &Manifest) {
    let is_cluster = !is_embedded(manifest.kafka.as_ref());
    let declared = manifest.topics.iter().map(|topic| &topic.name.value);
    let letters = manifest.stages.iter().flat_map(dead_letter_topics);
    let created: BTreeSet<String> = declared.cloned().chain(letters).collect();
    let is_open = |topic: &Text| is_topic_name(&topic.value) && !created.contains(&topic.value);
    for stage in &manifest.stages {
        for topic in texts(stage.input.as_ref()).iter().filter(|t| is_open(t)) {
            let mut outputs = manifest
                .stages
                .iter()
                .flat_map(|s| texts(s.output.as_ref()));
            if !is_cluster || !outputs.any(|output| output.value == topic.value) {
                let near = nearest(&topic.value, others(manifest, topic));
                checks.report(not_created(stage, topic, "reads", near));
            }
        }
        for topic in texts(stage.output.as_ref()).iter().filter(|t| is_open(t)) {
            let mut inputs = manifest.stages.iter().flat_map(inputs);
            let near = nearest(&topic.value, others(manifest, topic));
            let is_slip = near.is_some() && !inputs.any(|input| input == topic.value);
            if !is_cluster || is_slip {
                checks.report(not_created(stage, topic, "writes to", near));
            }
        }
    }
}

/// The pipeline's other topics, as far as messages may show them: not those whose names came from variables.
fn others<'a>(manifest: &'a Manifest, topic: &'a Text) -> impl Iterator<Item = &'a str> {
    let used = manifest.stages.iter().flat_map(|stage| {
        let (input, output) = (texts(stage.input.as_ref()), texts(stage.output.as_ref()));
        input.iter().chain(output)
    });
    let declared = manifest.topics.iter().map(|topic| &topic.name);
    let plain = declared
        .chain(used)
        .filter(|name| name.shown() == name.value);
    let names = plain.map(|name| name.value.as_str());
    names.filter(|name| *name != topic.value)
}

fn not_created(stage: &StageSection, topic: &Text, uses: &str, near: Option<&str>) -> Problem {
    let (name, topic_shown) = (&stage.name.value, topic.shown());
    let declare = format!("[topics.\"{topic_shown}\"]");
    let help = match near {
        Some(near) => format!("did you mean `{near}`? Else declare it: `{declare}`"),
        None => format!("declare it to have it created: `{declare}`"),
    };
    let message = format!("`{name}` {uses} the topic `{topic_shown}`, which nothing here creates");
    Problem::at(&topic.span, message)
        .label("unless the log has it already, `run` will refuse to start")
        .help(help)
        .warning()
}

fn inputs(stage: &StageSection) -> BTreeSet<&str> {
    texts(stage.input.as_ref())
        .iter()
        .map(|t| t.value.as_str())
        .collect()
}

fn check_groups(checks: &Checks<'_>, stages: &[StageSection]) {
    let mut first: BTreeMap<&str, &StageSection> = BTreeMap::new();
    for stage in stages {
        let Some(group) = &stage.group else { continue };
        let other = *first.entry(&group.value).or_insert(stage);
        if inputs(other) == inputs(stage) {
            check_progress(checks, other, stage, group);
            continue;
        }
        let mut problem = Problem::at(
            &group.span,
            format!(
                "`{}` and `{}` have one group and different inputs",
                other.name.value, stage.name.value
            ),
        )
        .label("the members of a group share the partitions of the same topics")
        .help(format!(
            "give each a group of its own, such as `service.{}`",
            stage.name.value
        ));
        if let Some(text) = &other.group {
            problem = problem.also(&text.span, format!("the group of `{}`", other.name.value));
        }
        checks.report(problem);
    }
}

/// A partition that moves from one member to another goes on where that one had got to, if both keep it in one place.
fn check_progress(checks: &Checks<'_>, other: &StageSection, stage: &StageSection, group: &Text) {
    if ledger(other) == ledger(stage) {
        return;
    }
    let place = |stage: &StageSection| match ledger(stage) {
        Some(store) => format!("`{}` in the store `{store}`", stage.name.value),
        None => format!("`{}` in the log alone", stage.name.value),
    };
    let problem = Problem::at(
        &group.span,
        format!(
            "`{}` and `{}` have one group and keep its progress in different places",
            other.name.value, stage.name.value
        ),
    );
    checks.report(
        problem
            .label(format!("{}, {}", place(other), place(stage)))
            .help("give them the same `delivery` and the same `sql` store, or a group each"),
    );
}

/// The SQL store that a transactional stage keeps its progress in.
fn ledger(stage: &StageSection) -> Option<&str> {
    let grant = match &stage.delivery {
        None => default_ledger(stage),
        Some(word) if word.value == DeliveryWord::Transactional => match sql_sections(stage) {
            [grant] => Some(grant),
            _ => None,
        },
        Some(_) => None,
    };
    grant.map(|grant| grant.store.value.as_str())
}

/// Kafka throws a member out of its group as soon as another one joins under its name.
fn check_instance_ids(checks: &Checks<'_>, stages: &[StageSection]) {
    let mut first: BTreeMap<(&str, &str), &StageSection> = BTreeMap::new();
    for stage in stages {
        let (Some(group), Some(id)) = (&stage.group, &stage.instance_id) else {
            continue;
        };
        let other = *first.entry((&group.value, &id.value)).or_insert(stage);
        if std::ptr::eq(other, stage) {
            continue;
        }
        let names = (&other.name.value, &stage.name.value);
        let mut problem = Problem::at(
            &id.span,
            format!(
                "`{}` and `{}` have one group and one `instance-id`",
                names.0, names.1
            ),
        )
        .label("they would throw each other out of the group")
        .help(format!(
            "make them differ, such as `instance-id = \"{}-${{HOSTNAME}}\"`",
            names.1
        ));
        if let Some(text) = &other.instance_id {
            problem = problem.also(&text.span, format!("the one of `{}`", names.0));
        }
        checks.report(problem);
    }
}

/// Reports rings of stages in which no stage says `allow-cycle = true`, each stage in one ring at most.
fn check_cycles(checks: &Checks<'_>, stages: &[StageSection]) {
    let strict: Vec<Node<'_>> = stages
        .iter()
        .filter(|s| !s.allow_cycle)
        .map(Node::of)
        .collect();
    let next = next_of_each(&strict);
    let mut reported: BTreeSet<usize> = BTreeSet::new();
    for start in 0..strict.len() {
        if reported.contains(&start) {
            continue;
        }
        let Some(ring) = ring_from(&next, start) else {
            continue;
        };
        if ring.iter().any(|stage| reported.contains(stage)) {
            continue;
        }
        reported.extend(ring.iter().copied());
        report_ring(checks, &strict, &ring);
    }
}

struct Node<'a> {
    stage: &'a StageSection,
    inputs: BTreeSet<&'a str>,
    /// Outputs and dead letters.
    outputs: BTreeSet<String>,
}

impl<'a> Node<'a> {
    fn of(stage: &'a StageSection) -> Self {
        let mut outputs = dead_letter_topics(stage);
        outputs.extend(texts(stage.output.as_ref()).iter().map(|t| t.value.clone()));
        // That dead letters go into the stage's own input has a message of its own.
        let inputs = inputs(stage);
        for topic in dead_letter_topics(stage) {
            let emitted = texts(stage.output.as_ref())
                .iter()
                .any(|t| t.value == topic);
            if inputs.contains(topic.as_str()) && !emitted {
                outputs.remove(&topic);
            }
        }
        Self {
            stage,
            inputs,
            outputs,
        }
    }

    /// A topic by which records get from here to there.
    fn topic_to(&self, next: &Node<'_>) -> Option<&str> {
        self.outputs
            .iter()
            .map(String::as_str)
            .find(|topic| next.inputs.contains(topic))
    }
}

/// For each stage, those that read what it writes.
fn next_of_each(nodes: &[Node<'_>]) -> Vec<Vec<usize>> {
    let mut readers: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, node) in nodes.iter().enumerate() {
        for topic in &node.inputs {
            readers.entry(topic).or_default().push(index);
        }
    }
    let next = |node: &Node<'_>| {
        let topics = node.outputs.iter().map(String::as_str);
        let next: BTreeSet<usize> = topics
            .filter_map(|topic| readers.get(topic))
            .flatten()
            .copied()
            .collect();
        next.into_iter().collect()
    };
    nodes.iter().map(next).collect()
}

/// The shortest way from a stage back to itself: the stages, the start first.
fn ring_from(next: &[Vec<usize>], start: usize) -> Option<Vec<usize>> {
    let mut came_from: Vec<Option<usize>> = vec![None; next.len()];
    let mut frontier = vec![start];
    while !frontier.is_empty() {
        let mut next_frontier = Vec::new();
        for from in frontier {
            for &to in &next[from] {
                if came_from[to].is_none() {
                    came_from[to] = Some(from);
                    next_frontier.push(to);
                }
            }
        }
        if came_from[start].is_some() {
            return Some(walk_back(&came_from, start));
        }
        frontier = next_frontier;
    }
    None
}

fn walk_back(came_from: &[Option<usize>], start: usize) -> Vec<usize> {
    let mut ring: Vec<usize> = successors(came_from[start], |&at| came_from[at])
        .take_while(|at| *at != start)
        .collect();
    ring.push(start);
    ring.reverse();
    ring
}

fn report_ring(checks: &Checks<'_>, nodes: &[Node<'_>], ring: &[usize]) {
    let mut way = String::new();
    for (i, &at) in ring.iter().enumerate() {
        let next = &nodes[ring[(i + 1) % ring.len()]];
        let topic = nodes[at].topic_to(next).unwrap_or_default();
        way.push_str(&format!("{} → {topic} → ", nodes[at].stage.name.value));
    }
    way.push_str(&nodes[ring[0]].stage.name.value);
    let stage = nodes[ring[0]].stage;
    let span = stage
        .output
        .as_ref()
        .map_or(&stage.span, |output| &output.span);
    checks.report(
        Problem::at(span, "records go round in a circle")
            .label(way)
            .help(format!(
                "change an input or an output; if it is meant, write `allow-cycle = true` under [stages.{}]",
                stage.name.value
            )),
    );
}
