//! How `[stages.NAME]` has its messages delivered: what holds, in which order, and what if it fails.

use super::load::Checks;
use super::stages::{sql_sections, whole};
use super::{Delivery, OnExhausted, OnGap, Order};
use crate::diagnostics::{Problem, Span};
use crate::manifest::{
    AccessWord, DeliveryWord, OnExhaustedWord, OnGapWord, OrderWord, SqlGrantSection, StageSection,
};

const DEFAULT_CONCURRENCY: usize = 16;
const MAX_INSTANCE_ID: usize = 249;

/// Transactional where it can be, unless the stage says otherwise. A database that a stage only reads may be a replica, which
/// keeps nobody's progress.
pub(super) fn delivery(checks: &Checks<'_>, section: &StageSection) -> Delivery {
    let Some(word) = &section.delivery else {
        return match default_ledger(section) {
            Some(_) => Delivery::Transactional,
            None => Delivery::AtLeastOnce,
        };
    };
    let stores = sql_sections(section).len();
    if word.value == DeliveryWord::AtLeastOnce {
        return Delivery::AtLeastOnce;
    }
    if stores != 1 {
        let label = match stores {
            0 => "this stage has none".to_owned(),
            n => format!("this stage has {n}"),
        };
        checks.report(
            Problem::at(
                &word.span,
                "transactional delivery needs exactly one SQL store",
            )
            .label(label)
            .help("leave `delivery` out, or write \"at-least-once\""),
        );
    }
    Delivery::Transactional
}

/// The database that keeps the stage's progress where nothing is said of its delivery.
pub(super) fn default_ledger(section: &StageSection) -> Option<&SqlGrantSection> {
    match sql_sections(section) {
        [grant] => match grant.access.as_ref().map(|word| word.value) {
            Some(AccessWord::ReadOnly) => None,
            _ => Some(grant),
        },
        _ => None,
    }
}

/// What is kept in order, and how many messages of a partition are worked on at one time.
pub(super) fn order(checks: &Checks<'_>, section: &StageSection) -> (Order, usize) {
    let order = match section.order.as_ref().map(|word| word.value) {
        None | Some(OrderWord::Partition) => Order::Partition,
        Some(OrderWord::Key) => Order::Key,
        Some(OrderWord::None) => Order::None,
    };
    let concurrency = whole(section.concurrency.as_ref()).unwrap_or(match order {
        Order::Partition => 1,
        Order::Key | Order::None => DEFAULT_CONCURRENCY,
    });
    check_side_by_side(checks, section, order, concurrency);
    (order, concurrency)
}

/// Reports messages that would run side by side where they can't.
fn check_side_by_side(
    checks: &Checks<'_>,
    section: &StageSection,
    order: Order,
    concurrency: usize,
) {
    let concurrent = section.concurrency.as_ref().filter(|_| concurrency > 1);
    let transactional = transactional_place(section);
    let problem = match (&section.order, concurrent, transactional) {
        (Some(word), _, Some((place, why))) if order != Order::Partition => Problem::at(
            &word.span,
            "transactional delivery keeps the partition's order",
        )
        .label("one transaction a batch runs one message after the other")
        .also(place, why)
        .help("write `delivery = \"at-least-once\"`, or leave `order` and `concurrency` out"),
        (_, Some(number), Some((place, why))) => Problem::at(
            &number.span,
            "transactional delivery works on one message of a partition at a time",
        )
        .label("one transaction a batch runs one message after the other")
        .also(place, why)
        .help("write `delivery = \"at-least-once\"` and `order = \"key\"`, or leave `concurrency` out"),
        (word, Some(number), None) if order == Order::Partition => {
            let problem = Problem::at(
                &number.span,
                "in the partition's order there is one message at a time",
            )
            .help("write `order = \"key\"` to keep the order of each key only, or leave `concurrency` out");
            match word {
                Some(word) => problem.also(&word.span, "the order is asked for here"),
                None => problem.label("the order is the partition's unless `order` says otherwise"),
            }
        }
        _ => return,
    };
    checks.report(problem);
}

/// What makes the stage transactional: its place, and in words.
fn transactional_place(section: &StageSection) -> Option<(&Span, &'static str)> {
    match (&section.delivery, &section.sql) {
        (Some(word), _) if word.value == DeliveryWord::Transactional => {
            Some((&word.span, "transactional is asked for here"))
        }
        (None, Some(sql)) if default_ledger(section).is_some() => Some((
            &sql.span,
            "with one SQL store, a stage is transactional unless `delivery` says otherwise",
        )),
        _ => None,
    }
}

pub(super) fn on_exhausted(section: &StageSection) -> OnExhausted {
    match section.on_exhausted.as_ref().map(|word| word.value) {
        None | Some(OnExhaustedWord::DeadLetter) => OnExhausted::DeadLetter,
        Some(OnExhaustedWord::Stop) => OnExhausted::Stop,
    }
}

pub(super) fn on_gap(section: &StageSection) -> OnGap {
    match section.on_gap.as_ref().map(|word| word.value) {
        None | Some(OnGapWord::Stop) => OnGap::Stop,
        Some(OnGapWord::Continue) => OnGap::Continue,
    }
}

/// The name of the stage's member in its group, if it has one.
pub(super) fn instance_id(checks: &Checks<'_>, section: &StageSection) -> Option<Option<String>> {
    let Some(id) = &section.instance_id else {
        return Some(None);
    };
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if (1..=MAX_INSTANCE_ID).contains(&id.value.len()) && id.value.chars().all(fine) {
        return Some(Some(id.value.clone()));
    }
    checks.report(
        Problem::at(
            &id.span,
            format!("`{}` can't be the `instance-id` of a member", id.shown()),
        )
        .help(format!(
            "take letters, digits, `.`, `_` and `-`, at most {MAX_INSTANCE_ID} of them, such as \"${{HOSTNAME}}\""
        )),
    );
    None
}
