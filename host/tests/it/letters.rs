//! Dead letters that their topic refuses: a bad message never stops its partition.

use serde_json::json;

use crate::bench::Bench;
use crate::support::{Seen, kafka_configs};

/// A stage whose dead letters go to a topic with this configuration, on delivery of this kind.
fn bench(delivery: &str, dead_letters: &str) -> Bench {
    let letters = crate::support::unique("dead");
    let settings = format!(
        "dead-letter = \"{letters}\"\ndelivery = \"{delivery}\"\n[topics.\"{letters}\"]\npartitions = 1\nconfig = {{ {dead_letters} }}"
    );
    Bench::start("test-probe", 1, &settings)
}

fn letters(bench: &Bench) -> Vec<Seen> {
    let line = bench
        .pipeline
        .lines()
        .find(|line| line.contains("dead-letter"));
    let topic = line.and_then(|line| line.split('"').nth(1));
    bench.log.read(topic.expect("a topic for dead letters"))
}

fn cuts(letter: &Seen) -> String {
    let cuts = letter
        .headers
        .iter()
        .filter(|(name, _)| name == "stagehost-cut");
    let cuts: Vec<_> = cuts.filter_map(|(_, value)| value.clone()).collect();
    cuts.join("; ")
}

const DELIVERIES: [&str; 2] = ["transactional", "at-least-once"];

#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_is_too_large_is_cut_and_says_so() {
    for delivery in DELIVERIES {
        let bench = bench(delivery, "\"max.message.bytes\" = \"2000\"");
        let long = "x".repeat(300_000);
        let bad = json!({ "do": "reject", "value": long });
        let good = json!({ "do": "emit", "topic": bench.output, "value": 1 });
        bench.send(&[bad.clone(), good]).await;
        bench.log.wait_committed(&bench.group, &bench.input);
        let outputs = bench.log.read(&bench.output);
        assert_eq!(outputs.len(), 1, "{delivery}: the partition goes on");
        let letters = letters(&bench);
        assert_eq!(letters.len(), 1, "{delivery}");
        let value = letters[0].value.clone().unwrap_or_default();
        assert!(bad.to_string().starts_with(&value) && !value.is_empty());
        assert_eq!(letters[0].key.as_deref(), Some("k"));
        assert_eq!(letters[0].header("__dlq.errors.offset"), Some("0"));
        let size = bad.to_string().len();
        let cut = cuts(&letters[0]);
        assert!(
            cut.starts_with(&format!("value: {size} bytes, sha256 ")),
            "{cut}"
        );
        let counted = bench.metric("stagehost_dead_letters_cut_total{stage=\"probe\"}");
        assert!(counted.is_some_and(|count| count != "0"), "{delivery}");
        let said = bench.host.log();
        assert!(
            said.contains("which is changed, its value is cut"),
            "{said}"
        );
        assert!(
            said.contains(&format!("{}/0/0", bench.input)),
            "the place: {said}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_whose_headers_fill_its_letter_goes_on_without_them() {
    let bench = bench("at-least-once", "\"max.message.bytes\" = \"3000\"");
    let (name, header) = ("large", "h".repeat(100_000));
    let bad = json!({ "do": "reject" }).to_string();
    (bench.log)
        .produce_with_header(&bench.input, "k", &bad, (name, &header))
        .await;
    bench.log.wait_committed(&bench.group, &bench.input);
    let letters = letters(&bench);
    assert_eq!(letters[0].value.as_deref(), Some(bad.as_str()));
    let cut = cuts(&letters[0]);
    assert!(
        cut.contains("headers: 1 of ") && cut.contains("left out"),
        "{cut}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_letter_whose_time_is_refused_has_it_in_a_header() {
    let year_2001 = 1_000_000_000_000;
    let year_2100 = 4_102_444_800_000;
    for (delivery, bound, time) in [
        (DELIVERIES[0], "before", year_2001),
        (DELIVERIES[1], "before", year_2001),
        (DELIVERIES[0], "after", year_2100),
        (DELIVERIES[1], "after", year_2100),
    ] {
        let bound = format!("message.timestamp.{bound}.max.ms");
        let bench = bench(delivery, &format!("\"{bound}\" = \"86400000\""));
        // The input takes what the letters' topic does not: Kafka's own bound is an hour ahead.
        let any = format!("{bound}={}", i64::MAX);
        let of_input = ["--entity-type", "topics", "--entity-name", &bench.input];
        kafka_configs(&[&["--alter", "--add-config", &any], &of_input[..]].concat());
        let bad = json!({ "do": "reject" }).to_string();
        (bench.log).produce_at(&bench.input, &bad, time).await;
        bench.log.wait_committed(&bench.group, &bench.input);
        let letters = letters(&bench);
        let header = letters[0].header("stagehost-timestamp");
        assert_eq!(header, Some(time.to_string().as_str()), "{delivery}");
        assert_eq!(letters[0].value.as_deref(), Some(bad.as_str()));
        let now = letters[0].timestamp;
        assert!(now.is_some_and(|now| now > year_2001 && now < year_2100));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_letter_without_a_key_gets_one_where_its_topic_is_compacted() {
    let bench = bench("transactional", "\"cleanup.policy\" = \"compact\"");
    let bad = json!({ "do": "reject" }).to_string();
    bench.log.produce(&bench.input, &[(None, &bad)]).await;
    bench.log.wait_committed(&bench.group, &bench.input);
    let letters = letters(&bench);
    let place = format!("{}/0/0", bench.input);
    assert_eq!(letters[0].key.as_deref(), Some(place.as_str()));
    assert!(cuts(&letters[0]).starts_with("key: none"));
}

/// Where many records make one batch that the log refuses, each of them may be taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_larger_than_a_segment_is_sent_record_by_record() {
    const RECORDS: usize = 40;
    let small =
        "config = { \"segment.bytes\" = \"1048576\", \"max.message.bytes\" = \"10485760\" }";
    for delivery in DELIVERIES {
        let settings = format!("delivery = \"{delivery}\"");
        let mut bench = Bench::with("test-probe", 1, &settings, "sqlite:db.sqlite", small);
        let large =
            "[kafka]\nproperties.\"batch.size\" = \"8000000\"\nproperties.\"linger.ms\" = \"200\"";
        bench.pipeline = bench.pipeline.replace("[kafka]", large);
        bench.restart();
        let value = |n: usize| format!("{n:03}{}", "x".repeat(100_000));
        let emit = |n| json!({ "do": "emit", "topic": bench.output, "value": value(n) });
        let (outputs, dead) = bench
            .deliver(&(0..RECORDS).map(emit).collect::<Vec<_>>())
            .await;
        let numbers = outputs
            .iter()
            .filter_map(|seen| seen.value.as_deref()?.get(1..4));
        let expected: Vec<_> = (0..RECORDS).map(|n| format!("{n:03}")).collect();
        assert_eq!(numbers.collect::<Vec<_>>(), expected, "{delivery}");
        assert_eq!(dead, [], "{delivery}");
    }
}

/// A letter's partition stands in the row of a transactional lane.
#[tokio::test(flavor = "multi_thread")]
async fn a_letter_whose_topic_was_made_anew_with_fewer_partitions_is_placed_anew() {
    const BEFORE: usize = 4;
    for delivery in DELIVERIES {
        let letters = crate::support::unique("dead");
        let settings = format!(
            "dead-letter = \"{letters}\"\ndelivery = \"{delivery}\"\n[topics.\"{letters}\"]\npartitions = 8"
        );
        let bench = Bench::start("test-probe", 1, &settings);
        let bad = json!({ "do": "reject" }).to_string();
        let send = async || {
            let keys: Vec<_> = (0..BEFORE).map(|n| format!("key-{n}")).collect();
            let records: Vec<_> = keys
                .iter()
                .map(|k| (Some(k.as_str()), bad.as_str()))
                .collect();
            bench.log.produce(&bench.input, &records).await;
            bench.log.wait_committed(&bench.group, &bench.input);
        };
        send().await;
        crate::offsets::make_anew(&letters).await;
        send().await;
        let seen = bench.log.read(&letters);
        assert!(seen.len() >= BEFORE, "{delivery}: {} letters", seen.len());
        assert!(
            seen.iter().all(|letter| letter.partition == 0),
            "{delivery}"
        );
    }
}
