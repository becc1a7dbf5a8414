//! The stages' database goes back to an older copy of itself, as after a restore, or a failover to a replica that was late.

use std::collections::{BTreeMap, HashMap};

use sqlx::{Connection, PgConnection};

use crate::bench::Bench;
use crate::judge::{MessageId, Progress, Record};
use crate::pipeline::{DATABASE, FIRST, ROLE, SECOND, Stage, TRANSACTIONAL};
use crate::proxy::Link;
use crate::reader::{self, Lag};

const COPY: &str = "older";
/// The stages' own, while another one is in its place.
const KEPT: &str = "kept";

/// Where each lane is to go on, by its group and partition.
pub(crate) type Offsets = BTreeMap<(String, i32), i64>;

/// A copy of the database as it was at one moment.
pub(crate) struct Copy {
    offsets: Offsets,
}

/// How often messages of each stage may be processed again, by its name.
pub(crate) type Again = HashMap<&'static str, HashMap<MessageId, usize>>;

impl Copy {
    /// Copies it. PostgreSQL lets nobody in meanwhile, so the hosts are cut off for a moment.
    pub(crate) fn take(bench: &Bench) -> Self {
        alone(bench, Link::Open, || {
            let offsets = offsets(bench);
            let statement = format!("CREATE DATABASE {COPY} TEMPLATE {DATABASE}");
            bench.sql(&bench.addresses.postgres, &statement);
            Self { offsets }
        })
    }

    /// How many records all lanes have gone on since.
    pub(crate) fn behind(&self, bench: &Bench) -> i64 {
        let now = offsets(bench);
        let since = |(lane, now): (_, &i64)| now - self.offsets.get(lane).unwrap_or(&0);
        now.iter().map(since).sum()
    }

    /// Whether a group has committed beyond it: from then on, a host that starts can know that the copy is older. A host that
    /// was killed, or stopped in the middle of a rebalance, has not.
    pub(crate) fn is_known_as_older(&self, lag: &Lag) -> bool {
        let of_chain = [FIRST.group, SECOND.group];
        let is_beyond = |p: &Progress| {
            let copied = self.offsets.get(&(p.group.to_owned(), p.partition));
            of_chain.contains(&p.group) && copied.is_some_and(|copied| p.committed > *copied)
        };
        lag.progress().is_ok_and(|all| all.iter().any(is_beyond))
    }

    /// Puts the copy in the place of the database, which is slow then: what is done again takes so long that it is seen. Answers
    /// which messages had been processed since, and how far the lanes had got.
    pub(crate) fn restore(self, bench: &Bench) -> (Again, Offsets) {
        let now = alone(bench, Link::Slow, || {
            let now = offsets(bench);
            let url = &bench.addresses.postgres;
            bench.sql(url, &format!("DROP DATABASE {DATABASE} WITH (FORCE)"));
            bench.sql(url, &format!("ALTER DATABASE {COPY} RENAME TO {DATABASE}"));
            now
        });
        let of_stage = |stage: &&'static Stage| (stage.name, self.since(bench, stage, &now));
        (TRANSACTIONAL.iter().map(of_stage).collect(), now)
    }

    fn since(&self, bench: &Bench, stage: &Stage, now: &Offsets) -> HashMap<MessageId, usize> {
        let mut again = HashMap::new();
        for Record {
            partition,
            offset,
            message,
            ..
        } in reader::topic(&bench.addresses.brokers, stage.input)
        {
            let lane = (stage.group.to_owned(), partition);
            let at = |offsets: &Offsets| offsets.get(&lane).copied().unwrap_or(0);
            if (at(&self.offsets)..at(now)).contains(&offset) {
                *again.entry(message.id()).or_default() += 1;
            }
        }
        again
    }
}

/// Whether all lanes have got there, but for a marker that may be last: an idle lane writes it into its row later.
pub(crate) fn have_got_to(bench: &Bench, offsets: &Offsets) -> bool {
    let now = self::offsets(bench);
    let has = |(lane, offset): (_, &i64)| now.get(lane).is_some_and(|now| *now >= offset - 1);
    offsets.iter().all(has)
}

/// Puts another database in the place of the stages', as it is after a migration: the same tables, with nothing in them.
pub(crate) fn replace(bench: &Bench) {
    alone(bench, Link::Open, || {
        let url = &bench.addresses.postgres;
        bench.sql(url, &format!("ALTER DATABASE {DATABASE} RENAME TO {KEPT}"));
        bench.sql(url, &format!("CREATE DATABASE {DATABASE} TEMPLATE {KEPT}"));
        let empty = "TRUNCATE stagehost_progress, effects";
        bench.sql(&bench.addresses.effects, empty);
    });
}

/// And brings back the one that was there.
pub(crate) fn bring_back(bench: &Bench) {
    alone(bench, Link::Open, || {
        let url = &bench.addresses.postgres;
        bench.sql(url, &format!("DROP DATABASE {DATABASE} WITH (FORCE)"));
        bench.sql(url, &format!("ALTER DATABASE {KEPT} RENAME TO {DATABASE}"));
    });
}

/// Does something while nobody uses the database; the way to it is as this then.
fn alone<T>(bench: &Bench, then: Link, work: impl FnOnce() -> T) -> T {
    bench.to_postgres.set(Link::Cut);
    let end =
        format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'");
    bench.sql(&bench.addresses.postgres, &end);
    let done = work();
    bench.to_postgres.set(then);
    done
}

/// Where the lanes' rows say to go on.
pub(crate) fn offsets(bench: &Bench) -> Offsets {
    let select =
        "SELECT consumer_group, partition, coalesce(next_offset, 0) FROM stagehost_progress";
    let rows: Result<Vec<(String, i32, i64)>, sqlx::Error> = bench.runtime.block_on(async {
        let mut connection = PgConnection::connect(&bench.addresses.effects).await?;
        let rows = sqlx::query_as(select).fetch_all(&mut connection).await?;
        connection.close().await?;
        Ok(rows)
    });
    let rows = rows.expect("the lanes' rows are read").into_iter();
    rows.map(|(group, partition, offset)| ((group, partition), offset))
        .collect()
}
