//! Bugs that are planted in what a run has left: if the judge misses one, it would have missed that of a host, or the run had
//! nothing that could have shown it.

use crate::charged::{Charged, judge_charged};
use crate::history::Histories;
use crate::judge::{Anomalies, Anomaly, MessageId, Record, Row, StageHistory};
use crate::pipeline::{CACHER, FIRST, Stage};
use crate::quiet::{Quiet, judge_quiet};
use crate::said::{Evidence, judge_said};

/// Spoils a history; answers whether it has what is to be spoiled.
type Spoil = fn(&mut Histories) -> bool;

/// Silences a host in one place, of what it is to say there.
type Silence = (fn(&Evidence) -> bool, fn(&mut Evidence));

/// What is planted, and what the judge must call it.
const PLANTS: [(&str, Anomaly, Spoil); 14] = [
    (
        "a message with copied headers, dropped as a repetition",
        Anomaly::LostWrite,
        |h| remove_row(&mut h.first, |id| id.0.starts_with("copied-")),
    ),
    (
        "a dead letter that was sent back, dropped as a repetition",
        Anomaly::LostWrite,
        |h| {
            let sent_back = h
                .first
                .inputs
                .iter()
                .find(|i| i.is_copied && i.cause.is_some());
            let id = sent_back.map(|record| record.message.id());
            id.is_some_and(|id| remove_record(&mut h.first.letters, &id))
        },
    ),
    (
        "a row of a message that was aborted",
        Anomaly::Phantom,
        |h| {
            let aborted = h.written.aborted.first();
            let row = aborted.map(|m| Row {
                key: m.key.clone(),
                seq: m.seq,
            });
            h.booked.rows.extend(row.clone());
            row.is_some()
        },
    ),
    (
        "an aborted message that was passed on",
        Anomaly::Phantom,
        |h| {
            let aborted = h.written.aborted.first().cloned();
            let record = h.passed.first().cloned();
            let planted = record
                .zip(aborted)
                .map(|(record, message)| Record { message, ..record });
            h.passed.extend(planted.clone());
            planted.is_some()
        },
    ),
    (
        "a committed message, removed before it was processed",
        Anomaly::LostWrite,
        |h| remove_row(&mut h.booked, |_| true),
    ),
    (
        "a committed message that was not passed on",
        Anomaly::LostWrite,
        |h| {
            let id = h.passed.first().map(|output| output.message.id());
            h.passed.retain(|output| Some(output.message.id()) != id);
            id.is_some()
        },
    ),
    (
        "a message of a database that went back, not processed again",
        Anomaly::LostWrite,
        |h| {
            let again = h.first.again.clone();
            remove_row(&mut h.first, |id| again.contains_key(id))
        },
    ),
    (
        "an output of a database that went back, which never came",
        Anomaly::OutputMissing,
        |h| {
            let has_row = |id: &MessageId| h.first.rows.iter().any(|row| id_of(row) == *id);
            let id = h.first.again.keys().find(|id| has_row(id)).cloned();
            let outputs = &mut h.first.outputs;
            outputs.retain(|output| Some(output.message.id()) != id);
            id.is_some()
        },
    ),
    (
        "an output that came again though no database went back",
        Anomaly::OutputDuplicate,
        |h| {
            let is_once =
                |o: &&Record| !o.is_copied && !h.first.again.contains_key(&o.message.id());
            let again = h.first.outputs.iter().find(is_once).cloned();
            let again = again.map(|output| Record { id: None, ..output });
            h.first.outputs.extend(again.clone());
            again.is_some()
        },
    ),
    (
        "a message that was done again after the mend of an emptied database",
        Anomaly::Duplicate,
        |h| {
            let has_row = |row: &&Row| h.second.rows.iter().any(|r| id_of(r) == id_of(row));
            let again = h.emptied.iter().find(has_row).cloned();
            h.second.rows.extend(again.clone());
            again.is_some()
        },
    ),
    (
        "a record of a topic made anew, below the offset of the one before",
        Anomaly::LostWrite,
        |h| {
            let anew = h.anew.clone();
            remove_row(&mut h.booked, |id| anew.contains(id))
        },
    ),
    (
        "a message that was given up on while its database was sick",
        Anomaly::WrongOutcome,
        |h| {
            let Some(letter) = given_up(h, &FIRST, &h.first.inputs) else {
                return false;
            };
            let id = letter.message.id();
            h.first.letters.push(letter);
            remove_row(&mut h.first, |of| *of == id)
        },
    ),
    (
        "a message that was given up on while Redis was sick",
        Anomaly::WrongOutcome,
        |h| {
            let letter = given_up(h, &CACHER, &h.second.inputs);
            h.cacher_letters.extend(letter.clone());
            letter.is_some()
        },
    ),
    (
        "an operator's reset without effect",
        Anomaly::Unheeded,
        |h| {
            let Some(reset) = h.resets.iter().find(|reset| !reset.again.is_empty()) else {
                return false;
            };
            let reset = reset.clone();
            h.passed.retain(|output| {
                let from = reset.outputs_from.get(&output.partition);
                let is_before = from.is_some_and(|from| output.offset < *from);
                is_before || !reset.again.contains(&output.message.id())
            });
            true
        },
    ),
];

/// Places where a host may keep silent about a trouble, for each that there was.
const SILENT: [(&str, Silence); 4] = [
    (
        "/readyz says 200 though there is a trouble",
        (|_| true, |e| e.readyz = None),
    ),
    (
        "the log has no word of a trouble",
        (|_| true, |e| e.log = None),
    ),
    (
        "no metric is of a trouble",
        (|e| e.needs_metrics, |e| e.metrics = None),
    ),
    (
        "a row that was lost is not counted",
        (|e| e.needs_counter, |e| e.counter = None),
    ),
];

/// What a host may say though it is not so.
type Lie = fn(&mut Quiet);
const LIES: [(&str, Lie); 2] = [
    ("a group that is behind for ever", |q| {
        q.behind.push("planted".to_owned())
    }),
    ("a repetition where there is none", |q| {
        q.counted.push("planted".to_owned())
    }),
];

/// What a host may count though its message is not to blame.
const ATTEMPT: &str = "an attempt that is counted while a store is sick";

pub(crate) const COUNT: usize = PLANTS.len() + SILENT.len() + LIES.len() + 1;

/// What the judge did not find.
pub(crate) fn missed(
    histories: &Histories,
    evidence: &[Evidence],
    quiet: &[Quiet],
    charged: &[Charged],
) -> Vec<&'static str> {
    let mut before = Anomalies::default();
    histories.judge(&mut before);
    let mut missed = Vec::new();
    for (name, anomaly, spoil) in PLANTS {
        let mut spoiled = histories.clone();
        let mut found = Anomalies::default();
        let is_planted = spoil(&mut spoiled);
        spoiled.judge(&mut found);
        if !is_planted || found.count(anomaly) <= before.count(anomaly) {
            missed.push(name);
        }
    }
    for (name, (is_to_be_said, silence)) in SILENT {
        let is_found = |evidence: &Evidence| {
            let mut silent = evidence.clone();
            silence(&mut silent);
            let mut found = Anomalies::default();
            judge_said(&silent, &mut found);
            found.count(Anomaly::Unsaid) > 0
        };
        let mut to_be_said = evidence.iter().filter(|e| is_to_be_said(e)).peekable();
        if to_be_said.peek().is_none() || !to_be_said.all(is_found) {
            missed.push(name);
        }
    }
    for (name, lie) in LIES {
        let is_found = |quiet: &Quiet| {
            let mut told = quiet.clone();
            lie(&mut told);
            let mut found = Anomalies::default();
            judge_quiet(&told, &mut found);
            found.count(Anomaly::Missaid) > 0
        };
        if quiet.is_empty() || !quiet.iter().all(is_found) {
            missed.push(name);
        }
    }
    let is_found = |charged: &Charged| {
        let mut more = charged.clone();
        more.count_one();
        let mut found = Anomalies::default();
        judge_charged(&more, &mut found);
        found.count(Anomaly::Charged) > 0
    };
    let has_waited = |charged: &Charged| !charged.waited.is_empty();
    if !charged.iter().any(has_waited) || !charged.iter().all(is_found) {
        missed.push(ATTEMPT);
    }
    missed
}

/// A message at which a lane waited for a store that was sick, as the dead letter that it is where its attempts are counted.
fn given_up(h: &Histories, stage: &Stage, inputs: &[Record]) -> Option<Record> {
    let has_waited = |record: &&Record| {
        let place = (stage.name, record.message.id());
        h.waited.contains(&place) && record.message.deed_at(stage.name).is_none()
    };
    let record = inputs.iter().find(has_waited)?;
    Some(Record {
        id: None,
        cause: Some("retries-exhausted".to_owned()),
        ..record.clone()
    })
}

fn id_of(row: &Row) -> MessageId {
    (row.key.clone(), row.seq)
}

/// Takes a message's row away, and what came of it.
fn remove_row(history: &mut StageHistory, of: impl Fn(&MessageId) -> bool) -> bool {
    let Some(at) = history.rows.iter().position(|row| of(&id_of(row))) else {
        return false;
    };
    let id = id_of(&history.rows.remove(at));
    let outputs = &mut history.outputs;
    outputs.retain(|output| output.message.id() != id);
    true
}

/// Takes the last record of a message away, with all that repeat it.
fn remove_record(records: &mut Vec<Record>, of: &MessageId) -> bool {
    let last = records.iter().rfind(|record| record.message.id() == *of);
    let Some(id) = last.map(|record| record.id.clone()) else {
        return false;
    };
    records.retain(|record| record.id != id);
    true
}
