//! `[stages.NAME]`, each by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::load::{Checks, Declared};
use super::{BatchLimits, Instances, Limits, RedisGrant, Retry, SqlAccess, Stage, delivery, kafka};
use crate::diagnostics::{Problem, nearest, suggestion};
use crate::manifest::{
    AccessWord, At, BatchSection, GrantSection, InstancesWord, LimitsSection, RetrySection,
    SqlGrantSection, StageSection, Text,
};

const MAX_GROUP_BYTES: usize = 255;
const DEFAULT_MAX_ATTEMPTS: u32 = 5;
const DEFAULT_RETRY_INITIAL: Duration = Duration::from_millis(100);
const DEFAULT_RETRY_MAX: Duration = Duration::from_secs(30);
const DEFAULT_MEMORY: usize = 64 << 20;
const DEFAULT_DEADLINE: Duration = Duration::from_secs(5);
/// What librdkafka takes at most by default, and a little less than what Kafka does.
const DEFAULT_MAX_OUTPUT: usize = 1_000_000;
const DEFAULT_BATCH_MESSAGES: usize = 500;
const DEFAULT_BATCH_BYTES: usize = 1 << 20;
const DEFAULT_BATCH_TIME: Duration = Duration::from_secs(1);

/// Where a dead letter goes that its stage has no topic for.
pub(super) const DEAD_LETTER_SUFFIX: &str = ".dlq";

/// Redis commands that a grant may name, beyond those that have a function of their own.
const COMMANDS: &[&str] = &[
    "APPEND",
    "DECR",
    "DECRBY",
    "EXISTS",
    "EXPIRE",
    "GETDEL",
    "GETRANGE",
    "GETSET",
    "HDEL",
    "HGET",
    "HGETALL",
    "HSET",
    "INCR",
    "INCRBY",
    "MGET",
    "PERSIST",
    "PEXPIRE",
    "PTTL",
    "SADD",
    "SETNX",
    "SISMEMBER",
    "SMEMBERS",
    "SREM",
    "STRLEN",
    "TTL",
    "TYPE",
];

/// Commands that need no grant, since the interface has functions for them.
const OWN_FUNCTIONS: &[&str] = &["DEL", "GET", "SET"];

pub(super) fn stage(
    checks: &Checks<'_>,
    declared: &Declared,
    section: &StageSection,
) -> Option<Stage> {
    let named = checks.name("stage", &section.name);
    let input = topics(checks, section.input.as_ref());
    let output = topics(checks, section.output.as_ref());
    check_input(checks, section);
    let group = group(checks, section);
    let sql = sql_grants(checks, declared, section);
    let redis: Vec<_> = section
        .redis
        .iter()
        .map(|g| redis_grant(checks, declared, g))
        .collect();
    let retry = retry(checks, &section.retry);
    let dead_letter = dead_letter(checks, section);
    let delivery = delivery::delivery(checks, section);
    let (order, concurrency) = delivery::order(checks, section);
    let instance_id = delivery::instance_id(checks, section);
    Some(Stage {
        name: named.then(|| section.name.value.clone())?,
        component: checks.path(&section.component.as_ref()?.value),
        component_span: section.component.as_ref()?.span.clone(),
        input: input?,
        group: group?,
        output: output?,
        sql: sql?,
        redis: redis.into_iter().collect::<Option<_>>()?,
        config: kafka::text_map(&section.config),
        retry: retry?,
        dead_letter: dead_letter?,
        limits: limits(&section.limits),
        batch: batch(&section.batch),
        instances: match section.instances.as_ref().map(|word| word.value) {
            None | Some(InstancesWord::Warm) => Instances::Warm,
            Some(InstancesWord::Fresh) => Instances::Fresh,
        },
        delivery,
        order,
        concurrency,
        on_exhausted: delivery::on_exhausted(section),
        on_gap: delivery::on_gap(section),
        instance_id: instance_id?,
    })
}

/// Where the stage's dead letters can go: its own topic for them, or one beside each input.
pub(super) fn dead_letter_topics(section: &StageSection) -> BTreeSet<String> {
    match &section.dead_letter {
        Some(topic) => BTreeSet::from([topic.value.clone()]),
        None => texts(section.input.as_ref())
            .iter()
            .map(|topic| format!("{}{DEAD_LETTER_SUFFIX}", topic.value))
            .collect(),
    }
}

pub(super) fn texts(list: Option<&At<Vec<Text>>>) -> &[Text] {
    list.map_or(&[], |list| &list.value)
}

fn topics(checks: &Checks<'_>, list: Option<&At<Vec<Text>>>) -> Option<Vec<String>> {
    let list = texts(list);
    checks.no_repeats(list);
    let names: Vec<_> = list
        .iter()
        .map(|topic| kafka::topic_name(checks, topic).then(|| topic.value.clone()))
        .collect();
    names.into_iter().collect()
}

fn check_input(checks: &Checks<'_>, section: &StageSection) {
    if let Some(input) = section
        .input
        .as_ref()
        .filter(|input| input.value.is_empty())
    {
        checks.report(
            Problem::at(
                &input.span,
                format!("the stage `{}` has no input", section.name.value),
            )
            .help("name at least one topic: `input = [\"a-topic\"]`"),
        );
    }
}

fn group(checks: &Checks<'_>, section: &StageSection) -> Option<String> {
    let group = section.group.as_ref()?;
    if group.value.trim().is_empty() {
        checks.report(
            Problem::at(&group.span, "the group's name is empty").help(format!(
                "write a name, such as `service.{}`",
                section.name.value
            )),
        );
        return None;
    }
    if group.value.len() > MAX_GROUP_BYTES || group.value.contains(char::is_control) {
        checks.report(
            Problem::at(
                &group.span,
                "the group's name is too long, or has control characters",
            )
            .help(format!(
                "write at most {MAX_GROUP_BYTES} bytes: the name is a part of each output's id"
            )),
        );
        return None;
    }
    Some(group.value.clone())
}

/// The databases that the stage is granted.
pub(super) fn sql_sections(section: &StageSection) -> &[SqlGrantSection] {
    section.sql.as_ref().map_or(&[], |list| &list.value)
}

fn sql_grants(
    checks: &Checks<'_>,
    declared: &Declared,
    section: &StageSection,
) -> Option<BTreeMap<String, SqlAccess>> {
    let list = sql_sections(section);
    checks.no_repeats(list.iter().map(|grant| &grant.store));
    let grants: Vec<_> = list
        .iter()
        .map(|grant| {
            let access = match grant.access.as_ref().map(|word| word.value) {
                Some(AccessWord::ReadOnly) => SqlAccess::ReadOnly,
                None | Some(AccessWord::Data) => SqlAccess::Data,
                Some(AccessWord::DataDefinition) => SqlAccess::DataDefinition,
            };
            let known = is_store(checks, "sql", &declared.sql, &grant.store);
            known.then(|| (grant.store.value.clone(), access))
        })
        .collect();
    grants.into_iter().collect()
}

/// Reports a store that the pipeline does not declare.
pub(super) fn is_store(
    checks: &Checks<'_>,
    kind: &str,
    declared: &BTreeSet<String>,
    store: &Text,
) -> bool {
    let known = declared.contains(&store.value);
    if !known {
        let help = match nearest(&store.value, declared.iter().map(String::as_str)) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("declare it in a section `[{kind}.{}]`", store.shown()),
        };
        checks.report(
            Problem::at(
                &store.span,
                format!("there is no store `{}` under [{kind}]", store.shown()),
            )
            .help(help),
        );
    }
    known
}

fn redis_grant(
    checks: &Checks<'_>,
    declared: &Declared,
    grant: &GrantSection,
) -> Option<(String, RedisGrant)> {
    let known = is_store(checks, "redis", &declared.redis, &grant.store);
    checks.no_repeats(&grant.commands);
    let commands: Vec<_> = grant
        .commands
        .iter()
        .map(|command| redis_command(checks, command))
        .collect();
    let granted = RedisGrant {
        prefix: grant.prefix.as_ref()?.value.clone(),
        commands: commands.into_iter().collect::<Option<_>>()?,
    };
    known.then(|| (grant.store.value.clone(), granted))
}

/// The command in upper case.
fn redis_command(checks: &Checks<'_>, text: &Text) -> Option<String> {
    let command = text.value.to_ascii_uppercase();
    if COMMANDS.contains(&command.as_str()) {
        return Some(command);
    }
    let help = if OWN_FUNCTIONS.contains(&command.as_str()) {
        "it needs no grant: the interface `redis` has a function for it".to_owned()
    } else {
        suggestion(&command, COMMANDS.iter().copied(), |all| {
            format!("a grant may name {all}")
        })
    };
    checks.report(
        Problem::at(
            &text.span,
            format!("the Redis command `{}` can't be granted", text.shown()),
        )
        .help(help),
    );
    None
}

fn retry(checks: &Checks<'_>, section: &RetrySection) -> Option<Retry> {
    let retry = Retry {
        max_attempts: whole(section.max_attempts.as_ref()).unwrap_or(DEFAULT_MAX_ATTEMPTS),
        initial: section
            .initial
            .as_ref()
            .map_or(DEFAULT_RETRY_INITIAL, |d| d.value),
        max: section.max.as_ref().map_or(DEFAULT_RETRY_MAX, |d| d.value),
    };
    if retry.initial <= retry.max {
        return Some(retry);
    }
    let wait = humantime::format_duration;
    let message = format!(
        "the first wait of a retry ({}) is longer than the longest ({})",
        wait(retry.initial),
        wait(retry.max)
    );
    let places = [section.initial.as_ref(), section.max.as_ref()];
    if let Some(place) = places.into_iter().flatten().next() {
        checks.report(
            Problem::at(&place.span, message)
                .help("make `initial` at most `max`, which is 30s where it is left out"),
        );
    }
    None
}

/// The stage's own topic for dead letters, or `None` for one beside each input.
fn dead_letter(checks: &Checks<'_>, section: &StageSection) -> Option<Option<String>> {
    let input = texts(section.input.as_ref());
    if let Some(own) = &section.dead_letter {
        let good = kafka::topic_name(checks, own);
        if let Some(same) = input.iter().find(|topic| topic.value == own.value) {
            checks.report(
                Problem::at(
                    &own.span,
                    format!(
                        "the dead letters of `{}` would go into its own input",
                        section.name.value
                    ),
                )
                .also(&same.span, "the input")
                .help(format!(
                    "name another topic, such as `{}{DEAD_LETTER_SUFFIX}`",
                    own.shown()
                )),
            );
            return None;
        }
        return good.then(|| Some(own.value.clone()));
    }
    let mut good = true;
    for topic in input
        .iter()
        .filter(|topic| kafka::is_topic_name(&topic.value))
    {
        let beside = format!("{}{DEAD_LETTER_SUFFIX}", topic.value);
        if let Some(same) = input.iter().find(|other| other.value == beside) {
            checks.report(
                Problem::at(
                    &same.span,
                    format!(
                        "the dead letters of `{}` would go into its own input",
                        section.name.value
                    ),
                )
                .also(&topic.span, "what fails here would go there")
                .help("name a topic for them: `dead-letter = \"…\"`"),
            );
            good = false;
        } else if !kafka::is_topic_name(&beside) {
            checks.report(
                Problem::at(
                    &topic.span,
                    format!("the name is too long to add `{DEAD_LETTER_SUFFIX}` for dead letters"),
                )
                .help("name a topic for them: `dead-letter = \"…\"`"),
            );
            good = false;
        }
    }
    good.then_some(None)
}

fn limits(section: &LimitsSection) -> Limits {
    Limits {
        memory: whole(section.memory.as_ref()).unwrap_or(DEFAULT_MEMORY),
        deadline: section
            .deadline
            .as_ref()
            .map_or(DEFAULT_DEADLINE, |d| d.value),
        max_output: whole(section.max_output.as_ref()).unwrap_or(DEFAULT_MAX_OUTPUT),
    }
}

fn batch(section: &BatchSection) -> BatchLimits {
    BatchLimits {
        max_messages: whole(section.max_messages.as_ref()).unwrap_or(DEFAULT_BATCH_MESSAGES),
        max_bytes: whole(section.max_bytes.as_ref()).unwrap_or(DEFAULT_BATCH_BYTES),
        max_time: section
            .max_time
            .as_ref()
            .map_or(DEFAULT_BATCH_TIME, |d| d.value),
    }
}

/// The number in the type that the pipeline keeps it in; the manifest's ranges make it fit.
pub(super) fn whole<T: Copy, U: TryFrom<T>>(value: Option<&At<T>>) -> Option<U> {
    value.and_then(|number| U::try_from(number.value).ok())
}
