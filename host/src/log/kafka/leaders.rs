//! Whether the leaders of partitions are there, as librdkafka's statistics tell: its fetches wait without a word.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::statistics::{self as figures, Broker};

use super::partition::Partition;
use super::statistics::{Statistics, is_connected};

/// A broker that has answered nothing for so long, and the time that a fetch may wait for records on top, hangs.
const SILENT: Duration = Duration::from_secs(2);
/// An answer that came so long ago was one since the statistics before.
const JUST_NOW_MICROS: i64 = 1_000_000;
/// Of how many brokers it is remembered why connections to them failed.
const MAX_FAILURES: usize = 1_000;
/// Transactions that are open for so long are waited for by name. Programs that commit with their checkpoints take their time.
const LONG_TRANSACTION: Duration = Duration::from_secs(30);
/// A partition that is read and gets nothing but refusals for so long is told of.
const REFUSED: Duration = Duration::from_secs(10);
/// After so long it may be the client that is at fault: librdkafka may hold on to a leader, or to an epoch of its leader, that is
/// no more. Longer than it may take to connect again.
const STUCK: Duration = Duration::from_secs(30);
/// What librdkafka calls a connection that failed, and an error that it hands on.
const FAILED: [&str; 2] = ["FAIL", "ERROR"];

/// What is known of brokers.
pub(super) struct Leaders {
    /// Why connections failed last, by what librdkafka calls their brokers.
    failures: BTreeMap<String, String>,
    /// How long brokers have held back answers, as of the last one of each: no more answers tell of it while they do. By their ids.
    throttled: BTreeMap<i32, Duration>,
    /// Since when brokers have answered nothing though they were asked, as statistics tell the time. By their ids.
    unanswered: BTreeMap<i32, i64>,
    /// What is known of partitions.
    places: BTreeMap<(String, i32), Place>,
    /// When statistics were heard last, as they tell the time.
    now: i64,
    /// How long one may be silent that was asked.
    silent: Duration,
    /// Whether replicas that do not lead may be read.
    may_follow: bool,
}

/// What is known of a partition; times are as statistics tell them.
#[derive(Default)]
struct Place {
    /// Behind which offset records are kept back of a transaction that is open, and since when.
    open: Option<(i64, i64)>,
    /// Since when reads go on to be refused.
    refused: Option<i64>,
    /// Since when it is not read, for that or for its leader.
    unread: Option<i64>,
    /// Whether another client can read it, which this one can't.
    is_readable: bool,
}

impl Leaders {
    /// A fetch may wait for records for so long, and may be of a replica that does not lead.
    pub(super) fn new(fetch_wait: Duration, may_follow: bool) -> Self {
        Self {
            failures: BTreeMap::new(),
            throttled: BTreeMap::new(),
            unanswered: BTreeMap::new(),
            places: BTreeMap::new(),
            now: 0,
            silent: SILENT + fetch_wait,
            may_follow,
        }
    }

    /// What librdkafka logs.
    pub(super) fn hear(&mut self, facility: &str, message: &str) {
        if FAILED.contains(&facility)
            && let Some((broker, why)) = failure(message)
            && (self.failures.len() < MAX_FAILURES || self.failures.contains_key(broker))
        {
            self.failures.insert(broker.to_owned(), why.to_owned());
        }
    }

    /// Only of these partitions is there anything to be known.
    pub(super) fn keep(&mut self, is_assigned: impl Fn(&(String, i32)) -> bool) {
        self.places.retain(|place, _| is_assigned(place));
    }

    /// What brokers have answered since the statistics before these, and what it told of quotas.
    pub(super) fn hear_answers(&mut self, statistics: &Statistics) {
        self.now = statistics.ts;
        for broker in statistics.brokers.iter() {
            self.hear_silence(broker, statistics.ts);
            let window = broker.throttle.as_ref().filter(|window| window.cnt > 0);
            let longest = window.and_then(|window| u64::try_from(window.max).ok());
            let has_answered = (0..JUST_NOW_MICROS).contains(&broker.rxidle);
            match longest.map(Duration::from_millis) {
                Some(longest) => drop(self.throttled.insert(broker.nodeid, longest)),
                // Only what was held back is counted.
                None if has_answered => drop(self.throttled.remove(&broker.nodeid)),
                None => {}
            }
        }
        let is_there = |id: &i32| statistics.brokers.with_id(*id).is_some();
        self.throttled.retain(|id, _| is_there(id));
        self.unanswered.retain(|id, _| is_there(id));
    }

    /// One that is asked again and again is silent all the same.
    fn hear_silence(&mut self, broker: &Broker, now: i64) {
        if broker.waitresp_cnt == 0 {
            self.unanswered.remove(&broker.nodeid);
            return;
        }
        // It was not asked before its last question but one that is still open; and not silent before its last answer.
        let asked = now.saturating_sub(broker.txidle.max(0));
        let since = self.unanswered.entry(broker.nodeid).or_insert(asked);
        if broker.rxidle >= 0 {
            *since = (*since).max(now.saturating_sub(broker.rxidle));
        }
    }

    /// Why a partition that waits for records gets none of its leader, and for how long it has been so at least.
    pub(super) fn trouble(
        &mut self,
        statistics: &Statistics,
        partition: &Partition,
    ) -> Option<(Duration, String)> {
        let id = (partition.topic().to_string(), partition.number());
        if !partition.is_drained() {
            if let Some(place) = self.places.get_mut(&id) {
                place.is_read();
            }
            return None;
        }
        let figures = statistics.topics.get(&id.0)?.partitions.get(&id.1)?;
        let of_leader = self.trouble_of_leader(statistics, figures);
        let place = self.places.entry(id).or_default();
        let open = place.open_transaction(figures, self.now);
        let is_asked = of_leader.is_none() && partition.expected().is_some();
        let refused = place.refused(figures, self.now, is_asked, self.may_follow);
        let Some((lasts, mut why)) = of_leader.or(refused) else {
            place.is_read();
            return open;
        };
        if place.is_readable {
            why += "; another client can read it, and this one may hold on to what was before: restart this host";
        }
        place.unread.get_or_insert(self.now);
        Some((lasts, why))
    }

    /// The partitions that have not been read for long, and of which it is not known that another client can.
    pub(super) fn stuck(&self) -> Vec<(String, i32)> {
        let is_long = |since: i64| lasts(self.now, since) >= STUCK;
        let is_stuck = |place: &Place| !place.is_readable && place.unread.is_some_and(is_long);
        let stuck = self.places.iter().filter(|(_, place)| is_stuck(place));
        stuck.map(|(id, _)| id.clone()).collect()
    }

    /// Another client can read a partition, if it still is not read by this one.
    pub(super) fn others_can(&mut self, id: &(String, i32)) {
        if let Some(place) = self.places.get_mut(id) {
            place.is_readable = place.unread.is_some();
        }
    }

    fn trouble_of_leader(
        &self,
        statistics: &Statistics,
        figures: &figures::Partition,
    ) -> Option<(Duration, String)> {
        // One that is read has one, or had one that still answers.
        if figures.leader < 0 && figures.broker < 0 {
            let why = "it has no leader: none of its replicas is there".to_owned();
            return Some((Duration::ZERO, why));
        }
        let with_id = |id| statistics.brokers.with_id(id);
        // With `client.rack`, a follower may be read.
        let fetched_from = figures.broker;
        if fetched_from >= 0 && fetched_from != figures.leader {
            return self.trouble_of("its nearest replica", with_id(fetched_from)?, statistics.ts);
        }
        self.trouble_of("its leader", with_id(figures.leader)?, statistics.ts)
    }

    fn trouble_of(&self, role: &str, broker: &Broker, now: i64) -> Option<(Duration, String)> {
        let Broker {
            nodeid, nodename, ..
        } = broker;
        if is_connected(broker) {
            let since = *self.unanswered.get(nodeid)?;
            let silent = lasts(now, since);
            if silent < self.silent {
                return None;
            }
            let who = format!("{role}, broker {nodeid} at {nodename},");
            let why = match self.throttled.get(nodeid) {
                Some(held) if silent < self.silent + *held => format!(
                    "{who} holds answers back, the last one for {} ms: a quota of the host's user or client id is used up \
                     (consumer_byte_rate or request_percentage)",
                    held.as_millis()
                ),
                _ => format!("{who} does not answer"),
            };
            return Some((silent, why));
        }
        let why = self.failures.get(&broker.name);
        let why = why.map_or_else(String::new, |why| format!(": {why}"));
        let why = format!("{role}, broker {nodeid} at {nodename}, can't be reached{why}");
        Some((Duration::ZERO, why))
    }
}

impl Place {
    fn is_read(&mut self) {
        (self.unread, self.is_readable) = (None, false);
    }

    /// Each answer to a fetch tells where the log ends; a refusal does not. And who does not lead refuses all.
    fn refused(
        &mut self,
        figures: &figures::Partition,
        now: i64,
        is_asked: bool,
        may_follow: bool,
    ) -> Option<(Duration, String)> {
        let (read, leader) = (figures.broker, figures.leader);
        let is_astray = !may_follow && read >= 0 && leader >= 0 && read != leader;
        if !is_asked || (figures.hi_offset >= 0 && !is_astray) {
            self.refused = None;
            return None;
        }
        let lasts = lasts(now, *self.refused.get_or_insert(now));
        if lasts < REFUSED {
            return None;
        }
        let why = match is_astray {
            true => format!(
                "broker {read} is asked for it, which does not lead it: broker {leader} does"
            ),
            false => format!(
                "broker {read} refuses each read of it, as one does that is not its leader any more, or whose log went back to an \
                 older copy"
            ),
        };
        Some((lasts, why))
    }

    /// A transaction of another program that is neither committed nor aborted keeps back all records behind its first one.
    fn open_transaction(
        &mut self,
        figures: &figures::Partition,
        now: i64,
    ) -> Option<(Duration, String)> {
        let (stable, end) = (figures.ls_offset, figures.hi_offset);
        if stable < 0 || stable >= end || figures.next_offset < stable {
            self.open = None;
            return None;
        }
        let known = self.open.filter(|(at, _)| *at == stable);
        let (_, since) = *self.open.insert(known.unwrap_or((stable, now)));
        let lasts = lasts(now, since);
        if lasts < LONG_TRANSACTION {
            return None;
        }
        let why = format!(
            "a transaction of another program is open at offset {stable}, and keeps back all from there up to {end}: end that \
             program's transaction, or wait until its transaction.timeout.ms is over (`kafka-transactions.sh find-hanging` names \
             one that is nobody's)"
        );
        Some((lasts, why))
    }
}

/// Between two times of librdkafka's clock.
fn lasts(now: i64, since: i64) -> Duration {
    Duration::from_micros(u64::try_from(now.saturating_sub(since)).unwrap_or_default())
}

/// `[thrd:HOST:PORT/ID]: HOST:PORT/ID: why (after 0ms in state CONNECT, …)`, without figures that change.
fn failure(message: &str) -> Option<(&str, &str)> {
    let (_, said) = message.split_once("]: ")?;
    let (broker, why) = said.split_once(": ")?;
    let is_broker = broker
        .rsplit_once('/')
        .is_some_and(|(_, id)| id.parse::<i32>().is_ok());
    let why = why.split_once(" (after ").map_or(why, |(why, _)| why);
    is_broker.then_some((broker, why))
}

#[cfg(test)]
mod tests {
    use rdkafka::statistics::Window;

    use super::*;

    fn broker(state: &str, waiting: i64, silent_micros: i64) -> Broker {
        Broker {
            name: "10.0.0.2:9092/2".into(),
            nodeid: 2,
            nodename: "10.0.0.2:9092".into(),
            source: "learned".into(),
            state: state.into(),
            waitresp_cnt: waiting,
            rxidle: silent_micros,
            txidle: silent_micros,
            ..Broker::default()
        }
    }

    #[test]
    fn a_broker_that_hangs_or_refuses_is_told_from_one_that_is_not_asked() {
        let mut leaders = Leaders::new(Duration::from_millis(50), true);
        let refused = "[thrd:10.0.0.2:9092/2]: 10.0.0.2:9092/2: Connect to ipv4#10.0.0.2:9092 failed: Connection refused \
                       (after 0ms in state CONNECT, 5 identical error(s) suppressed)";
        leaders.hear("FAIL", refused);
        let mut said = |now, broker| said(&mut leaders, now, broker);
        assert_eq!(said(60_000_000, broker("UP", 0, 60_000_000)), "");
        assert_eq!(said(62_000_000, broker("UP", 1, 40_000)), "");
        let hangs = "its leader, broker 2 at 10.0.0.2:9092, does not answer";
        assert_eq!(said(65_000_000, broker("UP", 1, 3_000_000)), hangs);
        let away = "its leader, broker 2 at 10.0.0.2:9092, can't be reached: Connect to ipv4#10.0.0.2:9092 failed: \
                    Connection refused";
        assert_eq!(said(66_000_000, broker("CONNECT", 0, -1)), away);
    }

    /// What is said of a broker once these statistics of it were heard, at this time.
    fn said(leaders: &mut Leaders, now: i64, broker: Broker) -> String {
        let statistics = Statistics {
            ts: now,
            brokers: [broker.clone()].into_iter().collect(),
            ..Statistics::default()
        };
        leaders.hear_answers(&statistics);
        let said = leaders.trouble_of("its leader", &broker, now);
        said.map_or_else(String::new, |(_, why)| why)
    }

    #[test]
    fn a_broker_that_is_asked_again_and_again_and_does_not_answer_hangs() {
        let mut leaders = Leaders::new(Duration::from_millis(50), true);
        let asked_just_now = |silent| Broker {
            txidle: 1_000,
            ..broker("UP", 1, silent)
        };
        // It was idle, and has been asked now.
        assert_eq!(
            said(&mut leaders, 60_000_000, asked_just_now(50_000_000)),
            ""
        );
        assert_eq!(
            said(&mut leaders, 62_000_000, asked_just_now(52_000_000)),
            ""
        );
        let hangs = said(&mut leaders, 64_000_000, asked_just_now(54_000_000));
        assert!(hangs.contains("does not answer"), "{hangs}");
        // It answers, slowly.
        for now in [66_000_000, 68_000_000, 70_000_000] {
            assert_eq!(said(&mut leaders, now, asked_just_now(1_500_000)), "");
        }
    }

    #[test]
    fn a_broker_whose_quota_is_used_up_is_told_from_one_that_hangs() {
        let mut leaders = Leaders::new(Duration::from_millis(50), true);
        let throttled = |max, cnt, silent| Broker {
            throttle: Some(Window {
                max,
                cnt,
                ..Window::default()
            }),
            ..broker("UP", 1, silent)
        };
        for (now, max, cnt, silent, expected) in [
            (3_000_000, 0, 0, 3_000_000, "does not answer"),
            (
                10_000_000,
                5_000,
                2,
                3_000_000,
                "holds answers back, the last one for 5000 ms",
            ),
            // Nothing came since.
            (13_000_000, 0, 0, 6_000_000, "holds answers back"),
            (15_000_000, 0, 0, 8_000_000, "does not answer"),
            (16_000_000, 0, 0, 100_000, ""),
            (19_000_000, 0, 0, 3_100_000, "does not answer"),
        ] {
            let said = said(&mut leaders, now, throttled(max, cnt, silent));
            let fits = said.contains(expected) && said.is_empty() == expected.is_empty();
            assert!(fits, "{now}: {said}");
        }
        said(&mut leaders, 20_000_000, throttled(5_000, 1, 0));
        leaders.hear_answers(&Statistics::default());
        assert!(leaders.throttled.is_empty() && leaders.unanswered.is_empty());
    }

    #[test]
    fn a_transaction_that_stays_open_is_told_from_many_short_ones() {
        let mut place = Place::default();
        let mut said = |seconds: i64, ls_offset, hi_offset, next_offset| {
            let figures = figures::Partition {
                ls_offset,
                hi_offset,
                next_offset,
                ..figures::Partition::default()
            };
            let said = place.open_transaction(&figures, seconds * 1_000_000);
            said.map_or_else(String::new, |(_, why)| why)
        };
        for (seconds, stable) in [(0, 5), (20, 7), (40, 9)] {
            assert_eq!(said(seconds, stable, 12, stable), "");
        }
        assert!(
            said(70, 9, 15, 9).contains("open at offset 9, and keeps back all from there up to 15")
        );
        // It has ended; and another one, before which there is enough to read.
        assert_eq!(said(72, 16, 16, 16), "");
        assert_eq!(said(74, 20, 30, 16), "");
        assert_eq!(said(110, 20, 30, 16), "");
    }

    #[test]
    fn reads_that_are_refused_on_and_on_are_told_from_those_that_begin() {
        let mut place = Place::default();
        let mut said = |seconds: i64, broker, hi_offset| {
            let figures = figures::Partition {
                broker,
                leader: 1,
                hi_offset,
                ..figures::Partition::default()
            };
            let said = place.refused(&figures, seconds * 1_000_000, true, false);
            said.map_or_else(String::new, |(_, why)| why)
        };
        assert_eq!(said(0, 1, -1001), "");
        assert_eq!(said(2, 1, 7), "");
        assert_eq!(said(4, 1, -1), "");
        let refused = said(14, 1, -1);
        assert!(refused.contains("broker 1 refuses each read"), "{refused}");
        assert_eq!(said(36, 1, 7), "");
        assert_eq!(said(38, 2, 7), "");
        let astray = said(50, 2, 7);
        assert!(
            astray.contains("broker 2 is asked for it, which does not lead it: broker 1 does"),
            "{astray}"
        );
    }

    #[test]
    fn only_what_is_said_of_a_broker_is_remembered() {
        for message in [
            "[thrd:main]: 1/1 brokers are down",
            "[thrd:app]: GroupCoordinator: refused",
            "nothing",
        ] {
            assert_eq!(failure(message), None, "{message}");
        }
    }
}
