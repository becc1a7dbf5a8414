//! Every target with what is in its corpus, and with some that are made of it.

mod large;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use fuzz::Target;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// The made inputs are the same in each run.
const SEED: u64 = 11;

#[test]
fn any_request_leaves_the_embedded_broker_as_it_should_be() {
    check("broker", 1);
}

#[test]
fn a_body_is_taken_as_a_plain_reader_takes_it_or_refused_in_few_words() {
    check("http-body", 100);
}

#[test]
fn a_pipeline_file_means_the_same_again_or_has_problems_with_a_place() {
    check("pipeline-file", 5);
}

#[test]
fn a_key_is_of_its_own_template_and_values() {
    check("read-template", 100);
}

#[test]
fn what_a_row_holds_is_read_as_it_was_written_or_not_at_all() {
    check("progress-row", 100);
}

#[test]
fn an_id_is_read_as_it_was_written_or_not_at_all() {
    check("record-id", 100);
}

#[test]
fn every_target_has_a_corpus_and_every_corpus_a_target() {
    let names: BTreeSet<_> = Target::ALL
        .iter()
        .map(|target| target.name.into())
        .collect();
    let folders = fs::read_dir(corpus()).expect("the corpus");
    let folders: BTreeSet<_> = folders
        .map(|entry| entry.expect("a folder").file_name())
        .collect();
    assert_eq!(folders, names);
}

/// `made`: how many inputs are made of each of the corpus.
fn check(name: &str, made: usize) {
    let target = Target::named(name).expect("a target");
    let mut random = StdRng::seed_from_u64(SEED);
    let inputs = inputs(name);
    assert!(!inputs.is_empty(), "no corpus");
    for (path, input) in &inputs {
        // Shown if it fails, and then it is the last one.
        println!("{}", path.display());
        (target.check)(input);
        for _ in 0..made {
            let other = &inputs[random.random_range(0..inputs.len())].1;
            let input = altered(input, other, &mut random);
            println!("an input like it: {}", input.escape_ascii());
            (target.check)(&input);
        }
    }
}

fn inputs(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let files = fs::read_dir(corpus().join(name)).expect("a corpus");
    let mut paths: Vec<PathBuf> = files.map(|entry| entry.expect("a file").path()).collect();
    paths.sort();
    let read = |path: PathBuf| {
        let input = fs::read(&path).expect("an input");
        (path, input)
    };
    paths.into_iter().map(read).collect()
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

/// The input with one change: cut short, a byte altered, added or taken out, or gone on with as the other ends.
fn altered(input: &[u8], other: &[u8], random: &mut StdRng) -> Vec<u8> {
    let at = random.random_range(0..=input.len());
    let (before, after) = input.split_at(at);
    let rest = after.get(1..).unwrap_or_default();
    match random.random_range(0..5) {
        0 => before.to_vec(),
        1 => [before, rest].concat(),
        2 => [before, &[random.random()], rest].concat(),
        3 => [before, &[random.random()], after].concat(),
        _ => {
            let from = random.random_range(0..=other.len());
            [before, &other[from..]].concat()
        }
    }
}
