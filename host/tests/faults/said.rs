//! What the hosts say of themselves: on `/readyz`, in their metrics, and in their logs.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::judge::{Anomalies, Anomaly};

/// How long a trouble may last before it is said in all three places.
pub(crate) const SAID_WITHIN: Duration = Duration::from_secs(30);
/// How long until every lane has said what is amiss with it: an idle one looks at its row each 15 s.
pub(crate) const ALL_SAID_WITHIN: Duration = Duration::from_secs(60);
/// How soon all hosts say that all is well, once it is.
pub(crate) const OVER_WITHIN: Duration = Duration::from_secs(60);
const ASK: Duration = Duration::from_secs(2);
/// Counts the lanes whose rows were older ones, or gone.
pub(crate) const ROWS_LOST: &str = "stagehost_rows_lost_total";
const ASK_INTERVAL: Duration = Duration::from_millis(200);

/// A host that can be asked.
#[derive(Clone, Debug)]
pub(crate) struct Speaker {
    pub(crate) name: String,
    /// Where its admin listener is.
    pub(crate) admin: String,
    pub(crate) log: PathBuf,
}

/// By what words a trouble is known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Words {
    /// One of these, on `/readyz`.
    pub(crate) readyz: &'static [&'static str],
    /// One of these, in a warning of the log.
    pub(crate) log: &'static [&'static str],
    /// In the name and labels of a metric, of which one is not as it should be.
    pub(crate) metrics: &'static [&'static str],
    /// In the name and labels of a counter, of which one goes up.
    pub(crate) counters: &'static [&'static str],
}

impl Words {
    /// A store does not do what it should, or does not answer.
    pub(crate) const EFFECTS: Self = Self {
        readyz: &["store effects: ", "SQL store `effects`"],
        log: &["SQL store `effects`"],
        metrics: &["store=\"effects\"", "for=\"store\""],
        counters: &[],
    };
    pub(crate) const CACHE: Self = Self {
        readyz: &["store cache: ", "Redis store `cache`"],
        log: &["Redis store `cache`"],
        metrics: &["store=\"cache\"", "for=\"store\""],
        counters: &[],
    };
    pub(crate) const LOG: Self = Self {
        readyz: &["log: ", "waits for the log"],
        log: &["the log at ", "waits for the log"],
        metrics: &["stagehost_log_available", "for=\"log\""],
        counters: &[],
    };
    /// The hosts' user may not do what it has to.
    pub(crate) const RIGHTS: Self = Self {
        readyz: &["Kafka user lacks"],
        log: &["Kafka user lacks"],
        metrics: &["for=\"log\""],
        counters: &[],
    };
    /// The same, where no lane waits for it: the group has taken its lanes away.
    pub(crate) const GROUP: Self = Self {
        metrics: &[],
        ..Self::RIGHTS
    };
    /// The database asks for another password than the hosts have.
    pub(crate) const PASSWORD: Self = Self {
        readyz: &["password authentication failed"],
        log: &["password authentication failed"],
        ..Self::EFFECTS
    };
    /// The database is an older copy, and has not again yet what it lost.
    pub(crate) const OLDER: Self = Self {
        readyz: &["has again what it lost"],
        log: &["is an older copy"],
        metrics: &["for=\"row\""],
        counters: &[ROWS_LOST],
    };
    /// The database has none of the lanes' rows.
    pub(crate) const EMPTIED: Self = Self {
        readyz: &["the database was emptied, or is another one"],
        log: &["the database was emptied, or is another one"],
        metrics: &["for=\"operator\""],
        counters: &[ROWS_LOST],
    };
    /// A topic has other records than those that its lanes know.
    pub(crate) const MADE_ANEW: Self = Self {
        readyz: &["was deleted and made anew"],
        log: &["was deleted and made anew"],
        metrics: &["for=\"operator\""],
        counters: &[],
    };

    pub(crate) fn is_in(words: &[&str], text: &str) -> bool {
        words.iter().any(|word| text.contains(word))
    }
}

/// What one host has said of a trouble: the line, or nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Evidence {
    pub(crate) trouble: &'static str,
    pub(crate) readyz: Option<String>,
    pub(crate) log: Option<String>,
    pub(crate) metrics: Option<String>,
    pub(crate) counter: Option<String>,
    /// Of what it is no matter whether a metric says it.
    pub(crate) needs_metrics: bool,
    /// Of what is to be counted.
    pub(crate) needs_counter: bool,
}

impl Evidence {
    fn is_whole(&self) -> bool {
        self.missing().is_empty()
    }

    fn missing(&self) -> Vec<&'static str> {
        let all = [
            ("/readyz", self.readyz.is_none()),
            ("the log", self.log.is_none()),
            ("the metrics", self.needs_metrics && self.metrics.is_none()),
            ("the counter", self.needs_counter && self.counter.is_none()),
        ];
        let missing = all.into_iter().filter(|(_, is_missing)| *is_missing);
        missing.map(|(place, _)| place).collect()
    }
}

/// A trouble must be said in every place.
pub(crate) fn judge_said(evidence: &Evidence, found: &mut Anomalies) {
    for place in evidence.missing() {
        let trouble = evidence.trouble;
        found.add(Anomaly::Unsaid, || {
            format!("{trouble}: no host says so in all places, {place} is missing: {evidence:?}")
        });
    }
}

/// Listens to what hosts say from a moment on.
pub(crate) struct Listening {
    /// How long their logs were.
    logs: HashMap<String, usize>,
    counted: Counted,
}

impl Listening {
    pub(crate) fn begin(speakers: &[Speaker]) -> Self {
        let length = |speaker: &Speaker| (speaker.name.clone(), read(speaker).len());
        Self {
            logs: speakers.iter().map(length).collect(),
            counted: Counted::by(speakers),
        }
    }

    /// Asks until a host has said so in every place, or for too long; what the one says that has said most.
    pub(crate) fn until_said(
        &self,
        trouble: &'static str,
        words: &Words,
        speakers: impl Fn() -> Vec<Speaker>,
    ) -> Evidence {
        let deadline = Instant::now() + SAID_WITHIN;
        let mut all: HashMap<String, Evidence> = HashMap::new();
        loop {
            for speaker in speakers() {
                let evidence = all.entry(speaker.name.clone()).or_insert_with(|| Evidence {
                    trouble,
                    needs_metrics: !words.metrics.is_empty(),
                    needs_counter: !words.counters.is_empty(),
                    ..Evidence::default()
                });
                self.add(evidence, words, &speaker);
                if evidence.is_whole() {
                    return evidence.clone();
                }
            }
            if Instant::now() >= deadline {
                let most = all.into_values().min_by_key(|e| e.missing().len());
                return most.unwrap_or(Evidence {
                    trouble,
                    ..Evidence::default()
                });
            }
            std::thread::sleep(ASK_INTERVAL);
        }
    }

    fn add(&self, evidence: &mut Evidence, words: &Words, speaker: &Speaker) {
        if evidence.readyz.is_none() {
            let said = get(&speaker.admin, "/readyz").filter(|(status, _)| *status == 503);
            let said = said.map(|(_, text)| text);
            evidence.readyz = said.filter(|text| Words::is_in(words.readyz, text));
        }
        if evidence.metrics.is_none() || evidence.counter.is_none() {
            let metrics = metrics(speaker);
            let mut troubles = troubles(&metrics).into_iter();
            let line = troubles.find(|line| Words::is_in(words.metrics, line));
            evidence.metrics = evidence.metrics.take().or(line);
            let mut grown = self.counted.grown(speaker, &metrics).into_iter();
            let line = grown.find(|line| Words::is_in(words.counters, line));
            evidence.counter = evidence.counter.take().or(line);
        }
        if evidence.log.is_none() {
            evidence.log = self.line(speaker, words.log, &[" WARN ", " ERROR "]);
        }
    }

    /// Waits for a line in the log of one of the hosts; nothing where none says so in its time.
    pub(crate) fn until_logged(
        &self,
        words: &[&str],
        speakers: impl Fn() -> Vec<Speaker>,
    ) -> Option<String> {
        let deadline = Instant::now() + SAID_WITHIN;
        loop {
            let mut all = speakers().into_iter();
            let line = all.find_map(|speaker| self.line(&speaker, words, &[]));
            if line.is_some() || Instant::now() >= deadline {
                return line;
            }
            std::thread::sleep(ASK_INTERVAL);
        }
    }

    /// The first line since with one of these words, of one of these levels.
    fn line(&self, speaker: &Speaker, words: &[&str], levels: &[&str]) -> Option<String> {
        let log = self.log(speaker);
        let mut lines = log.lines();
        let found = lines.find(|line| {
            let level = levels.is_empty() || Words::is_in(levels, line);
            level && Words::is_in(words, line)
        });
        found.map(str::to_owned)
    }

    /// What a host has logged since.
    pub(crate) fn log(&self, speaker: &Speaker) -> String {
        let mut log = read(speaker);
        let since = self.logs.get(&speaker.name).copied().unwrap_or(0);
        log.split_off(since.min(log.len()))
    }
}

/// What hosts have counted up to a moment: of each, by series. One that begins later begins at 0.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counted(HashMap<(String, String), f64>);

impl Counted {
    pub(crate) fn by(speakers: &[Speaker]) -> Self {
        let of = |speaker| Self::in_metrics(speaker, &metrics(speaker)).0;
        Self(speakers.iter().flat_map(of).collect())
    }

    /// What one of them has counted, by its metrics.
    pub(crate) fn in_metrics(speaker: &Speaker, metrics: &str) -> Self {
        let place = |series: &str| (speaker.name.clone(), series.to_owned());
        let all = counters(metrics).into_iter();
        Self(all.map(|(series, value)| (place(series), value)).collect())
    }

    /// What a host had counted.
    pub(crate) fn of(&self, speaker: &Speaker, series: &str) -> f64 {
        let place = (speaker.name.clone(), series.to_owned());
        self.0.get(&place).copied().unwrap_or(0.0)
    }

    /// The series in which a host has counted on since, a line each.
    pub(crate) fn grown(&self, speaker: &Speaker, metrics: &str) -> Vec<String> {
        let before = |series: &str| self.of(speaker, series);
        let grown = counters(metrics).into_iter();
        let grown = grown.filter(|(series, value)| *value > before(series));
        grown
            .map(|(series, value)| format!("{series} {value}, and was {}", before(series)))
            .collect()
    }
}

fn counters(metrics: &str) -> Vec<(&str, f64)> {
    let series = metrics.lines().filter(|line| !line.starts_with('#'));
    let values = series.filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let is_counter = series.split('{').next()?.ends_with("_total");
        Some((series, value.parse().ok()?)).filter(|_| is_counter)
    });
    values.collect()
}

/// What a host answers of its metrics; nothing of one that does not answer.
pub(crate) fn metrics(speaker: &Speaker) -> String {
    let metrics = get(&speaker.admin, "/metrics").map(|(_, text)| text);
    metrics.unwrap_or_default()
}

fn read(speaker: &Speaker) -> String {
    let log = std::fs::read(&speaker.log).unwrap_or_default();
    // Each byte that is none of UTF-8 stays one place, so that lengths can be compared.
    log.iter()
        .map(|b| if b.is_ascii() { *b as char } else { '?' })
        .collect()
}

/// The metrics that are not as they should be where all is well, a line each.
pub(crate) fn troubles(metrics: &str) -> Vec<String> {
    let is_trouble = |line: &&str| {
        let Some((name, value)) = line.rsplit_once(' ') else {
            return false;
        };
        let healthy = match name.split('{').next().unwrap_or_default() {
            "stagehost_log_available" => "1",
            "stagehost_circuit_open"
            | "stagehost_lanes_waiting"
            | "stagehost_lanes_stopped"
            | "stagehost_gap_records_total" => "0",
            _ => return false,
        };
        value != healthy
    };
    metrics
        .lines()
        .filter(is_trouble)
        .map(str::to_owned)
        .collect()
}

/// Asks every host until it says that all is well; one that does not in its time is an anomaly.
pub(crate) fn until_well(speakers: &[Speaker], after: &str, found: &mut Anomalies) {
    let deadline = Instant::now() + OVER_WITHIN;
    for speaker in speakers {
        while let Some(amiss) = amiss(speaker) {
            if Instant::now() >= deadline {
                let name = &speaker.name;
                found.add(Anomaly::NotOver, || {
                    format!("after {after}, {name}: {amiss}")
                });
                break;
            }
            std::thread::sleep(ASK_INTERVAL);
        }
    }
}

/// What a host says that is amiss.
fn amiss(speaker: &Speaker) -> Option<String> {
    let Some((status, said)) = get(&speaker.admin, "/readyz") else {
        return Some("no answer".to_owned());
    };
    if status != 200 {
        return Some(format!("/readyz answers {status}: {said}"));
    }
    let (_, metrics) = get(&speaker.admin, "/metrics")?;
    let troubles = troubles(&metrics);
    (!troubles.is_empty()).then(|| format!("/metrics has {troubles:?}"))
}

/// Status and body of an answer; nothing of a host that does not answer.
fn get(admin: &str, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(admin).ok()?;
    stream.set_read_timeout(Some(ASK)).ok()?;
    let head = format!("GET {path} HTTP/1.1\r\nhost: {admin}\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let status = answer.split(' ').nth(1)?.parse().ok()?;
    let (_, text) = answer.split_once("\r\n\r\n")?;
    Some((status, text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WELL: &str = "# TYPE stagehost_circuit_open gauge
stagehost_circuit_open{store=\"cache\"} 0
stagehost_log_available 1
stagehost_lanes_waiting{stage=\"first\",for=\"store\"} 0
stagehost_gap_records_total{stage=\"first\"} 0
stagehost_messages_total{stage=\"first\",outcome=\"done\"} 7
";

    #[test]
    fn metrics_that_are_not_as_they_should_be_are_told() {
        assert_eq!(troubles(WELL), Vec::<String>::new());
        for (well, amiss) in [
            ("store=\"cache\"} 0", "store=\"cache\"} 1"),
            ("available 1", "available 0"),
            ("for=\"store\"} 0", "for=\"store\"} 3"),
            (
                "gap_records_total{stage=\"first\"} 0",
                "gap_records_total{stage=\"first\"} 9",
            ),
        ] {
            let found = troubles(&WELL.replace(well, amiss));
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].ends_with(amiss), "{found:?}");
        }
    }

    #[test]
    fn counters_that_go_up_are_told() {
        let speaker = Speaker {
            name: "host-1".to_owned(),
            admin: String::new(),
            log: PathBuf::new(),
        };
        let place = (
            "host-1".to_owned(),
            "stagehost_rows_lost_total{stage=\"first\"}".to_owned(),
        );
        let counted = Counted(HashMap::from([(place, 2.0)]));
        let metrics =
            |value| format!("{WELL}stagehost_rows_lost_total{{stage=\"first\"}} {value}\n");
        let lost = |metrics: &str| {
            let mut grown = counted.grown(&speaker, metrics);
            grown.retain(|line| line.contains(ROWS_LOST));
            grown.len()
        };
        assert_eq!(lost(&metrics(2)), 0);
        assert_eq!(lost(&metrics(3)), 1);
        // Of a host that was not there.
        let counted = Counted::default();
        assert_eq!(
            counted.grown(&speaker, &metrics(0)).len(),
            1,
            "what is done"
        );
    }

    /// Planted: a host that leaves out a place, all of them in turn.
    #[test]
    fn a_trouble_that_is_not_said_in_every_place_is_an_anomaly() {
        let said = || Some("said".to_owned());
        let whole = Evidence {
            trouble: "redis full",
            readyz: said(),
            log: said(),
            metrics: said(),
            counter: said(),
            needs_metrics: true,
            needs_counter: true,
        };
        let silent: [fn(&mut Evidence); 5] = [
            |_| {},
            |e| e.readyz = None,
            |e| e.log = None,
            |e| e.metrics = None,
            |e| e.counter = None,
        ];
        for (n, silent) in silent.into_iter().enumerate() {
            let mut evidence = whole.clone();
            silent(&mut evidence);
            let mut found = Anomalies::default();
            judge_said(&evidence, &mut found);
            assert_eq!(found.count(Anomaly::Unsaid), usize::from(n > 0));
        }
    }
}
