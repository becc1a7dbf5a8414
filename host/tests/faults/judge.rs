//! What must hold of a run, looked for in plain data. The anomalies are named as Jepsen's checkers
//! name them, where they have a name for it.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::load::Message;
use crate::pipeline::{PASSER, Stage};

/// Examples that are kept of each anomaly.
const EXAMPLES: usize = 5;

/// A record of a topic, in the order of its partition.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    /// Milliseconds since the Unix epoch.
    pub(crate) timestamp: i64,
    pub(crate) message: Message,
    /// The header `stagehost-id`, where it was sent to this place: of records with the same one, the first counts.
    pub(crate) id: Option<String>,
    /// The header `stagehost-cause`, of a dead letter.
    pub(crate) cause: Option<String>,
    /// Its header `__dlq.errors.message`.
    pub(crate) words: Option<String>,
    /// Another program has written it, with headers that it copied from elsewhere.
    pub(crate) is_copied: bool,
}

impl Record {
    /// The generation of the lane that has sent it.
    fn generation(&self) -> Option<&str> {
        self.id.as_deref()?.rsplit('/').nth(2)
    }
}

/// A row of the table `effects`.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) key: String,
    pub(crate) seq: i64,
}

/// What went into a stage, and all that came of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct StageHistory {
    pub(crate) stage: &'static str,
    pub(crate) inputs: Vec<Record>,
    /// In the order in which they were inserted.
    pub(crate) rows: Vec<Row>,
    pub(crate) outputs: Vec<Record>,
    pub(crate) letters: Vec<Record>,
    /// How often messages may have been processed again, since the database was set back to before they were.
    pub(crate) again: HashMap<MessageId, usize>,
}

/// What tells a message: key and number.
pub(crate) type MessageId = (String, i64);

/// How far a group has got on a partition.
#[derive(Clone, Debug)]
pub(crate) struct Progress {
    pub(crate) group: &'static str,
    pub(crate) partition: i32,
    pub(crate) committed: i64,
    pub(crate) end: i64,
}

/// What must not be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Anomaly {
    /// An input that has neither a row nor a dead letter.
    LostWrite,
    /// More rows and dead letters than inputs.
    Duplicate,
    /// Rows, or outputs in a partition, that are out of order within a key.
    Nonmonotonic,
    /// A row without its output.
    OutputMissing,
    /// More outputs than rows.
    OutputDuplicate,
    /// A row, an output or a dead letter that nothing caused.
    Phantom,
    /// A row where a dead letter was due or the other way round, or one with another cause.
    WrongOutcome,
    /// Redis does not hold the newest value.
    StaleCache,
    /// A committed offset that is not the partition's end.
    Uncommitted,
    /// A host that was told to stop and did not exit with 0.
    UncleanStop,
    /// A host that ended though nobody told it to.
    HostDied,
    /// The hosts did not get on, though nothing was broken any more.
    Stalled,
    /// A server was sick, or an operator did something, and no host said so on `/readyz`, in its metrics or in its log.
    Unsaid,
    /// A host says that something is amiss, though nothing is broken any more.
    NotOver,
    /// A host says what is not so: that a group is behind which has worked off all, that a row was lost that is there, that a
    /// record was repeated that was not.
    Missaid,
    /// An operator's reset of offsets that had no effect.
    Unheeded,
    /// An attempt that was counted against a message, or a message that was given up on, while a store was sick.
    Charged,
}

impl Anomaly {
    pub(crate) const ALL: [Self; 17] = [
        Self::LostWrite,
        Self::Duplicate,
        Self::Nonmonotonic,
        Self::OutputMissing,
        Self::OutputDuplicate,
        Self::Phantom,
        Self::WrongOutcome,
        Self::StaleCache,
        Self::Uncommitted,
        Self::UncleanStop,
        Self::HostDied,
        Self::Stalled,
        Self::Unsaid,
        Self::NotOver,
        Self::Missaid,
        Self::Unheeded,
        Self::Charged,
    ];

    /// How it is called in the report.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::LostWrite => "lost-write",
            Self::Duplicate => "duplicate",
            Self::Nonmonotonic => "nonmonotonic",
            Self::OutputMissing => "output-missing",
            Self::OutputDuplicate => "output-duplicate",
            Self::Phantom => "phantom",
            Self::WrongOutcome => "wrong-outcome",
            Self::StaleCache => "stale-cache",
            Self::Uncommitted => "uncommitted",
            Self::UncleanStop => "unclean-stop",
            Self::HostDied => "host-died",
            Self::Stalled => "stalled",
            Self::Unsaid => "unsaid",
            Self::NotOver => "not-over",
            Self::Missaid => "missaid",
            Self::Unheeded => "unheeded",
            Self::Charged => "charged",
        }
    }
}

/// What was found: how often, and the first examples.
#[derive(Debug, Default)]
pub(crate) struct Anomalies(BTreeMap<Anomaly, (usize, Vec<String>)>);

impl Anomalies {
    pub(crate) fn add(&mut self, anomaly: Anomaly, example: impl FnOnce() -> String) {
        let (count, examples) = self.0.entry(anomaly).or_default();
        *count += 1;
        if examples.len() < EXAMPLES {
            examples.push(example());
        }
    }

    pub(crate) fn count(&self, anomaly: Anomaly) -> usize {
        self.0.get(&anomaly).map_or(0, |(count, _)| *count)
    }

    pub(crate) fn examples(&self, anomaly: Anomaly) -> &[String] {
        self.0.get(&anomaly).map_or(&[], |(_, examples)| examples)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Of records with the same `stagehost-id` the first, as a stage downstream has it.
pub(crate) fn without_repeated(records: &[Record]) -> Vec<Record> {
    let mut seen = HashSet::new();
    let is_new = |record: &&Record| record.id.is_none() || seen.insert(record.id.clone());
    records.iter().filter(is_new).cloned().collect()
}

/// What came twice in a topic. It is no anomaly, and shows that there was something to drop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Repeated {
    pub(crate) all: usize,
    /// Those that came when a newer number of their key was there.
    pub(crate) late: usize,
}

pub(crate) fn repeated(records: &[Record]) -> Repeated {
    let mut newest: HashMap<&str, i64> = HashMap::new();
    let (mut seen, mut repeated) = (HashSet::new(), Repeated::default());
    for Record { message, id, .. } in records {
        let newest = newest.entry(&message.key).or_insert(message.seq);
        if id.as_ref().is_some_and(|id| !seen.insert(id)) {
            repeated.all += 1;
            repeated.late += usize::from(message.seq < *newest);
        }
        *newest = message.seq.max(*newest);
    }
    repeated
}

/// What became of one message at a stage.
#[derive(Debug, Default)]
struct Fate<'a> {
    input: Option<&'a Message>,
    inputs: usize,
    rows: usize,
    outputs: usize,
    letters: Vec<&'a str>,
    /// How often it may have been processed again.
    again: usize,
}

/// Looks at what a stage made of its input.
pub(crate) fn judge_stage(history: &StageHistory, found: &mut Anomalies) {
    let stage = history.stage;
    let inputs = without_repeated(&history.inputs);
    let outputs = without_repeated(&history.outputs);
    let letters = without_repeated(&history.letters);
    let mut fates: BTreeMap<MessageId, Fate<'_>> = BTreeMap::new();
    for input in &inputs {
        let fate = fates.entry(input.message.id()).or_default();
        fate.input = Some(&input.message);
        fate.inputs += 1;
    }
    for row in &history.rows {
        fates.entry((row.key.clone(), row.seq)).or_default().rows += 1;
    }
    let outputs: Vec<_> = outputs.iter().filter(|output| !output.is_copied).collect();
    for output in &outputs {
        fates.entry(output.message.id()).or_default().outputs += 1;
    }
    for letter in &letters {
        let cause = letter.cause.as_deref().unwrap_or("none");
        let fate = fates.entry(letter.message.id()).or_default();
        fate.letters.push(cause);
    }
    for (id, times) in &history.again {
        fates.entry(id.clone()).or_default().again = *times;
    }
    for ((key, seq), fate) in &fates {
        for anomaly in judge_fate(stage, fate) {
            found.add(anomaly, || {
                format!(
                    "{stage}: {key} #{seq}: {} inputs, {} rows, {} outputs, dead letters {:?}, deed {:?}",
                    fate.inputs,
                    fate.rows,
                    fate.outputs,
                    fate.letters,
                    fate.input.and_then(|message| message.deed_at(stage))
                )
            });
        }
    }
    let of_key = numbers_of_keys(&inputs);
    judge_rows(stage, &history.rows, &of_key, found);
    // Where numbers come again in the input, they do in the output.
    let is_rising = |key: &String| of_key.get(key).is_none_or(|numbers| numbers.is_sorted());
    let outputs = outputs.iter().filter(|o| is_rising(&o.message.key));
    let outputs = outputs.map(|o| {
        // What is processed again has a generation of its own.
        let place = (o.partition, o.generation());
        (Some(place), &o.message.key, o.message.seq)
    });
    judge_order(&format!("{stage}: output"), outputs, found);
}

/// The numbers of each key, in the order of the input.
fn numbers_of_keys(inputs: &[Record]) -> HashMap<&String, Vec<i64>> {
    let mut numbers: HashMap<&String, Vec<i64>> = HashMap::new();
    for Record { message, .. } in inputs {
        numbers.entry(&message.key).or_default().push(message.seq);
    }
    numbers
}

/// Rows of a key come in the order of its inputs.
fn judge_rows(
    stage: &str,
    rows: &[Row],
    of_key: &HashMap<&String, Vec<i64>>,
    found: &mut Anomalies,
) {
    let is_rising = |key: &String| of_key.get(key).is_none_or(|numbers| numbers.is_sorted());
    let (rising, others): (Vec<_>, Vec<_>) = rows.iter().partition(|row| is_rising(&row.key));
    let rising = rising.iter().map(|row| (None, &row.key, row.seq));
    judge_order(&format!("{stage}: row"), rising, found);
    let mut written: BTreeMap<&String, Vec<i64>> = BTreeMap::new();
    for row in others {
        written.entry(&row.key).or_default().push(row.seq);
    }
    for (key, seqs) in written {
        let with_rows = |seq: &i64| seqs.contains(seq);
        let mut expected = of_key[key].clone();
        expected.retain(with_rows);
        if seqs != expected {
            found.add(Anomaly::Nonmonotonic, || {
                format!("{stage}: row: {key}: {seqs:?}, and the inputs {expected:?}")
            });
        }
    }
}

fn judge_fate(stage: &str, fate: &Fate<'_>) -> Vec<Anomaly> {
    let ends = fate.rows + fate.letters.len();
    let mut found = Vec::new();
    let Some(input) = fate.input else {
        return vec![Anomaly::Phantom];
    };
    // What is processed again leaves one row, for the first went with the database; and letters and outputs beside the first.
    let again = |first: usize| if first > 0 { fate.again } else { 0 };
    let may_end = fate.inputs + if fate.rows > 0 { 0 } else { fate.again };
    if ends < fate.inputs {
        found.push(Anomaly::LostWrite);
    }
    if ends > may_end {
        found.push(Anomaly::Duplicate);
    }
    if fate.outputs < fate.rows {
        found.push(Anomaly::OutputMissing);
    }
    if fate.outputs > fate.rows + again(fate.rows) {
        let nothing = fate.rows == 0;
        found.push(if nothing {
            Anomaly::Phantom
        } else {
            Anomaly::OutputDuplicate
        });
    }
    let cause = input.deed_at(stage).and_then(|deed| deed.cause());
    let wrong_letter = fate.letters.iter().any(|letter| Some(*letter) != cause);
    if wrong_letter || (cause.is_some() && fate.rows > 0) {
        found.push(Anomaly::WrongOutcome);
    }
    found
}

/// Within a key and partition, numbers must not fall; what is there twice is another anomaly.
fn judge_order<'a>(
    what: &str,
    records: impl Iterator<Item = (Option<(i32, Option<&'a str>)>, &'a String, i64)>,
    found: &mut Anomalies,
) {
    type Place<'a> = Option<(i32, Option<&'a str>)>;
    let mut newest: HashMap<(Place<'a>, &String), i64> = HashMap::new();
    for (partition, key, seq) in records {
        let newest = newest.entry((partition, key)).or_insert(seq);
        if seq < *newest {
            let after = *newest;
            found.add(Anomaly::Nonmonotonic, || {
                let place = partition
                    .map(|(p, _)| format!(" of partition {p}"))
                    .unwrap_or_default();
                format!("{what}{place}: {key} #{seq} after #{after}")
            });
        }
        *newest = seq.max(*newest);
    }
}

/// Redis must hold the newest number of each key that got a newest one after `flushed_at`: what
/// came before, the flush may have taken. Answers how many keys could be judged.
pub(crate) fn judge_cache(
    inputs: &[Record],
    cache: &HashMap<String, i64>,
    flushed_at: i64,
    found: &mut Anomalies,
) -> usize {
    let mut newest: BTreeMap<&str, (i64, i64)> = BTreeMap::new();
    let mut last: HashMap<&str, i64> = HashMap::new();
    for record in inputs {
        let (Message { key, seq, .. }, at) = (&record.message, record.timestamp);
        last.insert(key, *seq);
        // A number that is there again was there at the earlier time.
        let entry = newest.entry(key).or_insert((*seq, at));
        if *seq > entry.0 {
            *entry = (*seq, at);
        }
    }
    let mut judged = 0;
    for (key, (seq, _)) in newest.into_iter().filter(|(_, (_, at))| *at > flushed_at) {
        judged += 1;
        let (cached, last) = (cache.get(key), last.get(key));
        // A key's version is its record's offset. An output that comes again stands at a higher one, and a stage that is
        // delivered to at least once, as the cacher is, takes it for newer.
        if cached != Some(&seq) && (cached.is_none() || cached != last) {
            found.add(Anomaly::StaleCache, || {
                format!("{key}: Redis has {cached:?}, the newest is #{seq}, the last {last:?}")
            });
        }
    }
    judged
}

/// A dead letter must be of a message that wants one, by its cause.
pub(crate) fn judge_letter(stage: &Stage, letter: &Record, found: &mut Anomalies) {
    let wanted = letter
        .message
        .deed_at(stage.name)
        .and_then(|deed| deed.cause());
    if wanted.is_none() || letter.cause.as_deref() != wanted {
        found.add(Anomaly::WrongOutcome, || {
            let Message { key, seq, .. } = &letter.message;
            let (name, cause) = (stage.name, &letter.cause);
            let words = letter.words.as_deref().unwrap_or_default();
            format!("{name}: {key} #{seq}: dead letter {cause:?}, wanted {wanted:?}: {words}")
        });
    }
}

/// An operator's reset of a group's offsets: what is to be read again, and where its outputs begin, by partition.
#[derive(Clone, Debug)]
pub(crate) struct Reset {
    pub(crate) again: Vec<MessageId>,
    pub(crate) outputs_from: HashMap<i32, i64>,
}

/// What a stage that is delivered to at least once has passed on: all, of what was committed alone, and what was reset again.
pub(crate) fn judge_passed(
    inputs: &[Message],
    outputs: &[Record],
    resets: &[Reset],
    found: &mut Anomalies,
) {
    let inputs: HashSet<MessageId> = inputs.iter().map(Message::id).collect();
    let passed: HashSet<MessageId> = outputs.iter().map(|o| o.message.id()).collect();
    let stage = PASSER.name;
    for (key, seq) in inputs.difference(&passed) {
        found.add(Anomaly::LostWrite, || format!("{stage}: {key} #{seq}"));
    }
    for (key, seq) in passed.difference(&inputs) {
        found.add(Anomaly::Phantom, || format!("{stage}: {key} #{seq}"));
    }
    for reset in resets {
        let since = |output: &&Record| {
            let from = reset.outputs_from.get(&output.partition);
            from.is_none_or(|from| output.offset >= *from)
        };
        let since: HashSet<_> = (outputs.iter().filter(since))
            .map(|o| o.message.id())
            .collect();
        for (key, seq) in reset.again.iter().filter(|id| !since.contains(*id)) {
            found.add(Anomaly::Unheeded, || {
                format!("{stage}: {key} #{seq} did not come again after a reset")
            });
        }
    }
}

/// All that was read must be committed.
pub(crate) fn judge_progress(progress: &[Progress], found: &mut Anomalies) {
    for Progress {
        group,
        partition,
        committed,
        end,
    } in progress
    {
        if committed != end {
            found.add(Anomaly::Uncommitted, || {
                format!("{group} on partition {partition}: {committed} of {end}")
            });
        }
    }
}
