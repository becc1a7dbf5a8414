//! Which faults come when: all of it follows from a seed.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// The kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// SIGKILL for a host; another one takes its place.
    KillHost,
    /// SIGSTOP for longer than its group waits, then SIGCONT: it goes on as if nothing had happened.
    FreezeHost,
    /// SIGTERM for a host, which must end well; another one takes its place.
    StopHost,
    /// A host more, or one less, for a while.
    ScaleHosts,
    /// Kafka is stopped or killed, and started again.
    RestartKafka,
    /// PostgreSQL is killed with its children, and started again.
    KillPostgres,
    /// Redis loses all that it has, is stopped or killed, and started again.
    FlushRedis,
    /// The network to Kafka is cut or frozen for a while.
    CutKafka,
    /// The same for PostgreSQL.
    CutPostgres,
    /// The same for Redis.
    CutRedis,
    /// PostgreSQL is read-only, or somebody locks the lanes' rows.
    SickPostgres,
    /// PostgreSQL asks for a password that the hosts do not have, or has no connections for them.
    RefusePostgres,
    /// Redis is full, or answers nothing.
    SickRedis,
    /// Redis asks for a password that the hosts do not have, or has no connections for them.
    RefuseRedis,
    /// Kafka is there, and answers nothing: its process is stopped for a while, or the network keeps all.
    SickKafka,
    /// Kafka's authorizer forbids an output, or a group.
    RefuseKafka,
    /// Every answer of the stores, or of Kafka, takes its time.
    SlowServers,
    /// What was processed of a topic of transactions is removed, markers included.
    Retention,
    /// Another program copies headers, and somebody sends dead letters back.
    CopyHeaders,
    /// The stages' database goes back to an older copy.
    RestorePostgres,
    /// An operator resets the offsets of groups.
    ResetOffsets,
    /// The lanes' rows are gone from their database, with what came of the messages still there.
    EmptyPostgres,
    /// Another database is in the place of the stages', with nothing in it.
    ReplacePostgres,
    /// An input is deleted and made anew.
    RemakeTopic,
}

impl Kind {
    pub(crate) const ALL: [Self; 24] = [
        Self::KillHost,
        Self::FreezeHost,
        Self::StopHost,
        Self::ScaleHosts,
        Self::RestartKafka,
        Self::KillPostgres,
        Self::FlushRedis,
        Self::CutKafka,
        Self::CutPostgres,
        Self::CutRedis,
        Self::SickPostgres,
        Self::RefusePostgres,
        Self::SickRedis,
        Self::RefuseRedis,
        Self::SickKafka,
        Self::RefuseKafka,
        Self::SlowServers,
        Self::Retention,
        Self::CopyHeaders,
        Self::RestorePostgres,
        Self::ResetOffsets,
        Self::EmptyPostgres,
        Self::ReplacePostgres,
        Self::RemakeTopic,
    ];

    /// How it is called in the report.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::KillHost => "kill-host",
            Self::FreezeHost => "freeze-host",
            Self::StopHost => "stop-host",
            Self::ScaleHosts => "scale-hosts",
            Self::RestartKafka => "restart-kafka",
            Self::KillPostgres => "kill-postgres",
            Self::FlushRedis => "flush-redis",
            Self::CutKafka => "cut-kafka",
            Self::CutPostgres => "cut-postgres",
            Self::CutRedis => "cut-redis",
            Self::SickPostgres => "sick-postgres",
            Self::RefusePostgres => "refuse-postgres",
            Self::SickRedis => "sick-redis",
            Self::RefuseRedis => "refuse-redis",
            Self::SickKafka => "sick-kafka",
            Self::RefuseKafka => "refuse-kafka",
            Self::SlowServers => "slow-servers",
            Self::Retention => "retention",
            Self::CopyHeaders => "copy-headers",
            Self::RestorePostgres => "restore-postgres",
            Self::ResetOffsets => "reset-offsets",
            Self::EmptyPostgres => "empty-postgres",
            Self::ReplacePostgres => "replace-postgres",
            Self::RemakeTopic => "remake-topic",
        }
    }
}

/// One fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Round {
    pub(crate) kind: Kind,
    /// The rougher of a kind's two ways; they take turns.
    pub(crate) rough: bool,
    /// Chooses a host among those that there are.
    pub(crate) victim: usize,
    /// How long it lasts.
    pub(crate) hold: Duration,
    /// How long it is left alone after it, before all hosts must say that all is well.
    pub(crate) rest: Duration,
}

/// Every kind once a cycle, in an order of its own.
pub(crate) fn schedule(seed: u64, cycles: usize) -> Vec<Round> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut rounds = Vec::with_capacity(cycles * Kind::ALL.len());
    for cycle in 0..cycles {
        let mut kinds = Kind::ALL;
        kinds.shuffle(&mut rng);
        if cycle + 1 == cycles {
            // What a flush took from Redis says nothing about the hosts: most faults of the last
            // cycle come after the last one.
            kinds.sort_by_key(|kind| *kind != Kind::FlushRedis);
        }
        for kind in kinds {
            let milliseconds = match kind {
                Kind::CutKafka | Kind::CutPostgres | Kind::CutRedis => 1_500..4_000,
                Kind::ScaleHosts => 2_000..4_000,
                _ => 100..2_500,
            };
            rounds.push(Round {
                kind,
                rough: (cycle + kind as usize).is_multiple_of(2),
                victim: rng.random_range(0..1_000),
                hold: Duration::from_millis(rng.random_range(milliseconds)),
                rest: Duration::from_millis(rng.random_range(100..800)),
            });
        }
    }
    rounds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_makes_one_schedule_with_each_kind_in_every_cycle() {
        let rounds = schedule(7, 4);
        assert_eq!(rounds, schedule(7, 4));
        assert_ne!(rounds, schedule(8, 4));
        for cycle in rounds.chunks(Kind::ALL.len()) {
            let mut kinds: Vec<_> = cycle.iter().map(|round| round.kind).collect();
            kinds.sort_unstable();
            assert_eq!(kinds, Kind::ALL);
        }
        for kind in Kind::ALL {
            let of_kind = rounds.iter().filter(|round| round.kind == kind);
            assert_eq!(of_kind.filter(|round| round.rough).count(), 2, "{kind:?}");
        }
        assert_eq!(rounds[3 * Kind::ALL.len()].kind, Kind::FlushRedis);
    }
}
