//! `[kafka]` and `[topics]`.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::load::Checks;
use super::{Brokers, Kafka, Topic, listen};
use crate::diagnostics::Problem;
use crate::log::kafka::properties::{self, PropertyFault};
use crate::manifest::{KafkaSection, StageSection, Text, TopicSection};

const EMBEDDED: &str = "embedded";
const CLEANUP_POLICY: &str = "cleanup.policy";
const DEFAULT_EMBEDDED_LISTEN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);
const MAX_TOPIC_NAME: usize = 249;
/// The property that a stage's `instance-id` sets.
const INSTANCE_ID: &str = "group.instance.id";

/// librdkafka properties that belong to the host, each with why.
const RESERVED: &[(&str, &str)] = &[
    (
        "bootstrap.servers",
        "the brokers are named by `brokers` in [kafka]",
    ),
    (
        "metadata.broker.list",
        "the brokers are named by `brokers` in [kafka]",
    ),
    (
        "group.id",
        "each stage has a group of its own, named by its `group`",
    ),
    (
        INSTANCE_ID,
        "one value for all consumers would make them throw each other out",
    ),
    (
        "enable.auto.commit",
        "an offset is committed only after all that its message caused is durable",
    ),
    (
        "auto.commit.interval.ms",
        "an offset is committed only after all that its message caused is durable",
    ),
    (
        "enable.auto.offset.store",
        "an offset is committed only after all that its message caused is durable",
    ),
    (
        "auto.offset.reset",
        "a new group starts at the beginning of its topics, so that nothing is skipped",
    ),
    (
        "acks",
        "an output counts as sent once all in-sync replicas have it",
    ),
    (
        "request.required.acks",
        "an output counts as sent once all in-sync replicas have it",
    ),
    (
        "enable.idempotence",
        "without it, an output that is sent again could be there twice or out of order",
    ),
    (
        "enable.gapless.guarantee",
        "without it, an output could be lost while a later one arrives",
    ),
    (
        "message.timeout.ms",
        "a record that gave up while a later one got through would be lost, or out of order",
    ),
    (
        "delivery.timeout.ms",
        "a record that gave up while a later one got through would be lost, or out of order",
    ),
    (
        "retries",
        "a record that gave up while a later one got through would be lost, or out of order",
    ),
    (
        "message.send.max.retries",
        "a record that gave up while a later one got through would be lost, or out of order",
    ),
    (
        "delivery.report.only.error",
        "an output counts as sent once the log says so",
    ),
    (
        "transactional.id",
        "the host does not use Kafka's transactions",
    ),
    (
        "isolation.level",
        "stages must not see records of a transaction that was aborted",
    ),
    (
        "partitioner",
        "records of one key must go to one partition, whichever client sends them",
    ),
];

pub(super) fn kafka(
    checks: &Checks<'_>,
    section: &KafkaSection,
    stages: &[StageSection],
) -> Option<Kafka> {
    let good: Vec<bool> = section
        .properties
        .iter()
        .map(|(name, value)| property(checks, stages, name, value))
        .collect();
    let good = good.iter().all(|good| *good) && together(checks, section);
    let brokers = brokers(checks, section);
    good.then_some(Kafka {
        brokers: brokers?,
        properties: text_map(&section.properties),
    })
}

/// Whether properties that are good by themselves suit each other and what the host sets.
fn together(checks: &Checks<'_>, section: &KafkaSection) -> bool {
    let settings = &section.properties;
    let Some((first, _)) = settings.first() else {
        return true;
    };
    let Err(conflict) = properties::check_together(&text_map(settings)) else {
        return true;
    };
    // Librdkafka's words may repeat a value, and values may be secrets.
    let why = settings
        .iter()
        .filter(|(_, value)| value.shown() != value.value && !value.value.is_empty())
        .fold(conflict.why, |why, (_, value)| {
            why.replace(&value.value, value.shown())
        });
    let name = settings
        .iter()
        .map(|(name, _)| name)
        .find(|name| conflict.property.as_ref() == Some(&name.value))
        .unwrap_or(first);
    checks.report(
        Problem::at(
            &name.span,
            "these properties don't go together, or not with what the host sets",
        )
        .label(format!("librdkafka says: {why}"))
        .help("the host sets `enable.idempotence` = true and `acks` = all; change or leave out the property"),
    );
    false
}

fn property(checks: &Checks<'_>, stages: &[StageSection], name: &Text, value: &Text) -> bool {
    let word = &name.value;
    let problem = if let Some((_, why)) = RESERVED.iter().find(|(reserved, _)| reserved == word) {
        let problem = Problem::at(
            &name.span,
            format!("`{word}` can't be set: it would break what the host promises"),
        )
        .label(*why);
        match word.as_str() {
            INSTANCE_ID => instance_id_instead(problem, stages),
            _ => problem.help("leave it out"),
        }
    } else {
        match properties::check(word, &value.value) {
            Ok(()) => return true,
            Err(PropertyFault::Unknown) => {
                Problem::at(&name.span, format!("librdkafka has no property `{word}`"))
                    .help("librdkafka's CONFIGURATION.md lists them all")
            }
            Err(PropertyFault::Value) => {
                Problem::at(&value.span, format!("`{word}` can't have this value"))
                    .help("librdkafka's CONFIGURATION.md has the values that it takes")
            }
        }
    };
    checks.report(problem);
    false
}

/// Says where members get their names.
fn instance_id_instead(mut problem: Problem, stages: &[StageSection]) -> Problem {
    let mut ids = stages
        .iter()
        .filter_map(|stage| stage.instance_id.as_ref())
        .peekable();
    if ids.peek().is_none() {
        return problem.help("leave it out, and give each stage an `instance-id` of its own");
    }
    for id in ids {
        problem = problem.also(&id.span, "this stage's member has its own");
    }
    problem.help("leave it out: `instance-id` is enough")
}

pub(super) fn topics(
    checks: &Checks<'_>,
    sections: &[TopicSection],
    kafka: Option<&KafkaSection>,
) -> Option<BTreeMap<String, Topic>> {
    let mut good = true;
    if is_embedded(kafka) {
        let configs = sections.iter().flat_map(|section| &section.config);
        for (key, value) in configs {
            good &= embedded_config(checks, key, value);
        }
    }
    let mut metric_names: BTreeMap<String, &Text> = BTreeMap::new();
    for section in sections {
        good &= topic_name(checks, &section.name);
        // Kafka refuses to create topics whose names differ in `.` and `_` alone: their metrics would collide.
        if let Some(first) =
            metric_names.insert(section.name.value.replace('.', "_"), &section.name)
        {
            checks.report(
                Problem::at(
                    &section.name.span,
                    format!(
                        "Kafka takes `{}` for the same name as `{}`",
                        section.name.value, first.value
                    ),
                )
                .also(&first.span, "`.` and `_` count as one here")
                .help("rename one of the topics"),
            );
            good = false;
        }
    }
    let topic = |section: &TopicSection| {
        let topic = Topic {
            partitions: section
                .partitions
                .as_ref()
                .and_then(|n| i32::try_from(n.value).ok()),
            replication: section
                .replication
                .as_ref()
                .and_then(|n| i32::try_from(n.value).ok()),
            config: text_map(&section.config),
        };
        (section.name.value.clone(), topic)
    };
    good.then(|| sections.iter().map(topic).collect())
}

/// Whether the log is a broker inside the process.
pub(super) fn is_embedded(kafka: Option<&KafkaSection>) -> bool {
    let brokers = kafka.and_then(|kafka| kafka.brokers.as_ref());
    brokers.is_some_and(|text| text.value == EMBEDDED)
}

/// Whether the embedded broker takes the value. Keys and policies that it does not know are left out when it runs.
fn embedded_config(checks: &Checks<'_>, key: &Text, value: &Text) -> bool {
    let name = key.value.as_str();
    let is_known = embedded_kafka::TOPIC_CONFIGS.contains(&name) && name != CLEANUP_POLICY;
    if !is_known || embedded_kafka::check_topic_config(name, &value.value).is_ok() {
        return true;
    }
    checks.report(
        Problem::at(
            &value.span,
            format!(
                "the embedded broker can't have `{name}` = `{}`",
                value.shown()
            ),
        )
        .help("write a number within what Kafka takes; -1 is no limit for retention"),
    );
    false
}

/// Whether Kafka takes the name.
pub(super) fn topic_name(checks: &Checks<'_>, name: &Text) -> bool {
    let good = is_topic_name(&name.value);
    if !good {
        checks.report(
            Problem::at(
                &name.span,
                format!("Kafka refuses the topic name `{}`", name.shown()),
            )
            .help(format!(
                "take letters, digits, `.`, `_` and `-`, at most {MAX_TOPIC_NAME} of them"
            )),
        );
    }
    good
}

pub(super) fn is_topic_name(name: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (1..=MAX_TOPIC_NAME).contains(&name.len())
        && name != "."
        && name != ".."
        && name.chars().all(fine)
}

pub(super) fn text_map(settings: &[(Text, Text)]) -> BTreeMap<String, String> {
    settings
        .iter()
        .map(|(name, value)| (name.value.clone(), value.value.clone()))
        .collect()
}

fn brokers(checks: &Checks<'_>, section: &KafkaSection) -> Option<Brokers> {
    let text = section.brokers.as_ref()?;
    if text.value == EMBEDDED {
        let Some(given) = &section.listen else {
            return Some(Brokers::Embedded {
                listen: DEFAULT_EMBEDDED_LISTEN,
            });
        };
        let listen = listen::address(checks, given)?;
        if !listen.ip().is_loopback() {
            checks.report(
                Problem::at(
                    &given.span,
                    "the embedded broker listens on loopback addresses only",
                )
                .help("write `127.0.0.1:PORT`; where other machines must reach the log, use Kafka"),
            );
            return None;
        }
        return Some(Brokers::Embedded { listen });
    }
    if let Some(listen) = &section.listen {
        checks.report(
            Problem::at(
                &listen.span,
                "`listen` is for the embedded broker, and `brokers` names others",
            )
            .also(&text.span, "these brokers listen where they like")
            .help("leave `listen` out, or write `brokers = \"embedded\"`"),
        );
    }
    if text.value.split(',').all(|broker| is_broker(broker.trim())) {
        return Some(Brokers::Remote(text.value.clone()));
    }
    checks.report(
        Problem::at(&text.span, format!("`{}` does not name Kafka brokers", text.shown()))
            .label("not `host:port`, nor a list of them")
            .help(
                "write `host:port`, with commas between several, or `embedded`; TLS and SASL are set in [kafka.properties] by \"security.protocol\"",
            ),
    );
    None
}

fn is_broker(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.starts_with('[') => (host, port),
        Some(_) => return false,
        None => (text, "9092"),
    };
    let fine = |c: char| c.is_ascii_alphanumeric() || ".-_[]:".contains(c);
    !host.is_empty() && host.chars().all(fine) && port.parse::<u16>().is_ok_and(|port| port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_brokers_from_other_text() {
        for good in [
            "localhost:9092",
            "kafka",
            "10.0.0.1:1",
            "[::1]:9092",
            "a-b.c_d:65535",
        ] {
            assert!(is_broker(good), "{good}");
        }
        for bad in [
            "",
            ":9092",
            "host:",
            "host:0",
            "host:65536",
            "kafka://host:9092",
            "a b:1",
            "::1:9092",
            "embeded!",
        ] {
            assert!(!is_broker(bad), "{bad}");
        }
    }

    #[test]
    fn tells_topic_names_from_other_text() {
        for good in ["a", "app.newPosts", "A-b_c.9", &"x".repeat(249)] {
            assert!(is_topic_name(good), "{good}");
        }
        for bad in ["", ".", "..", "a b", "a/b", "ä", &"x".repeat(250)] {
            assert!(!is_topic_name(bad), "{bad}");
        }
    }
}
