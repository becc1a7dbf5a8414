//! Locks that statements wait for: looked at while they wait, for what ends them, the server's limits or the call's deadline,
//! tells neither whose they are nor that there are any.

use std::pin::Pin;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use tracing::debug;

use super::super::waits::{HeldLock, LockWait, Sight};
use super::super::{Error, Failure, Value};
use super::client::Client;
use super::value::Parameters;
use super::{Postgres, in_time};
use crate::capability::SILENCE;

/// After how long it is looked whether a statement waits for a lock. Half of the server's limit, where that is shorter.
const FIRST_LOOK: Duration = Duration::from_millis(250);
/// The shortest of that.
const SHORTEST_LOOK: Duration = Duration::from_millis(5);
/// How often it is looked from then on.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What tells a lock from others.
const TAG: &str = "pg_catalog.concat_ws('/', locktype, database, relation, page, tuple, virtualxid, transactionid, \
                   classid, objid, objsubid)";
/// And whose it is: transactions have numbers of their own.
const WHOSE: &str = "mode, virtualtransaction";

/// Has a session answer what others see that it is called: not what it asked for, where that is long or not ASCII.
pub(super) const OWN_NAME: &str = "SELECT application_name FROM pg_catalog.pg_stat_activity WHERE pid = pg_catalog.pg_backend_pid()";
/// What PgBouncer's `application_name_add_host` appends to a name, of each connection.
const ADDED_HOST: &str = " - [^ ]+:[0-9]+$";

/// Which sessions and prepared transactions have the locks that a session waits for, those between that are hosts' passed over:
/// hosts are in each other's way now and then. What a prepared transaction has stands beside no process, and it is asked for
/// what is in the way by the table of PostgreSQL's lock modes.
static WHO_IS_IN_THE_WAY: LazyLock<String> = LazyLock::new(|| {
    format!(
        r"
        WITH RECURSIVE locks AS MATERIALIZED (
            SELECT pid, granted, mode, locktype, relation, transactionid, virtualtransaction, {TAG} AS tag,
                   pg_catalog.array_position(ARRAY['AccessShareLock', 'RowShareLock', 'RowExclusiveLock',
                       'ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock',
                       'AccessExclusiveLock'], mode) AS strength
            FROM pg_catalog.pg_locks
        ), hosts AS (
            SELECT pg_catalog.regexp_replace(name, '{ADDED_HOST}', '') AS name
            FROM (SELECT pg_catalog.unnest($2) UNION {OWN_NAME}) AS n(name)
        ), waiting AS (
            SELECT $1 AS pid
            UNION
            SELECT b.pid FROM waiting AS w
            CROSS JOIN LATERAL pg_catalog.unnest(pg_catalog.pg_blocking_pids(w.pid)) AS b(pid)
            JOIN pg_catalog.pg_stat_activity AS a ON a.pid = b.pid
                AND pg_catalog.regexp_replace(a.application_name, '{ADDED_HOST}', '') IN (SELECT name FROM hosts)
        ), blocked AS (
            SELECT w.pid, l.tag, l.strength, pg_catalog.pg_blocking_pids(w.pid) AS by,
                   CASE WHEN l.locktype = 'relation' THEN l.relation::regclass::text
                        WHEN l.locktype IN ('transactionid', 'tuple') THEN coalesce('a row of ' || (
                            SELECT t.relation::regclass::text FROM locks AS t
                            WHERE t.pid = w.pid AND t.locktype = 'tuple' LIMIT 1), 'a row')
                        ELSE l.locktype END AS what
            FROM waiting AS w JOIN locks AS l ON l.pid = w.pid AND NOT l.granted
        )
        SELECT DISTINCT pg_catalog.concat_ws('/', held.tag, held.mode, held.virtualtransaction),
            CASE WHEN held.pid IS NULL THEN pg_catalog.format(
                'prepared transaction %L%s has %s on %s: COMMIT PREPARED or ROLLBACK PREPARED ends it',
                coalesce(p.gid, held.virtualtransaction),
                ' of ' || p.owner || ' since ' || pg_catalog.to_char(p.prepared, 'YYYY-MM-DD HH24:MI:SSOF'),
                held.mode, blocked.what)
            ELSE pg_catalog.format('process %s (%s) %s %s on %s%s: end its transaction',
                held.pid, pg_catalog.concat_ws(', ', a.usename, nullif(a.application_name, '')),
                CASE WHEN held.granted THEN 'has' ELSE 'waits itself for' END, held.mode, blocked.what,
                CASE WHEN held.granted
                    THEN ', in a transaction since ' || pg_catalog.to_char(a.xact_start, 'YYYY-MM-DD HH24:MI:SSOF')
                    ELSE ', behind process ' || pg_catalog.array_to_string(pg_catalog.pg_blocking_pids(held.pid), ', ')
                END)
            END
        FROM blocked
        JOIN locks AS held ON held.tag = blocked.tag AND held.pid IS DISTINCT FROM blocked.pid
        LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid = held.pid
        LEFT JOIN pg_catalog.pg_prepared_xacts AS p
            ON held.pid IS NULL AND p.transaction IN (
                SELECT x.transactionid FROM locks AS x
                WHERE x.pid IS NULL AND x.virtualtransaction = held.virtualtransaction)
        WHERE coalesce(pg_catalog.regexp_replace(a.application_name, '{ADDED_HOST}', ''), '')
            NOT IN (SELECT name FROM hosts)
        AND (held.pid = ANY (blocked.by) OR held.pid IS NULL AND 0 = ANY (blocked.by)
            AND (ARRAY[128, 192, 240, 248, 236, 252, 254, 255])[blocked.strength] & (1 << held.strength - 1) <> 0)
        "
    )
});

/// Which of these locks are still there.
static WHICH_ARE_HELD: LazyLock<String> = LazyLock::new(|| {
    format!(
        "SELECT key FROM (SELECT pg_catalog.concat_ws('/', {TAG}, {WHOSE}) AS key FROM pg_catalog.pg_locks) AS l \
         WHERE key = ANY ($1)"
    )
});

/// How long the server lets a session's statements and transactions take; zero where they may take any time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Limits {
    /// `statement_timeout`.
    pub(super) statement: Duration,
    /// `lock_timeout`.
    pub(super) lock: Duration,
    /// `idle_in_transaction_session_timeout`.
    pub(super) idle: Duration,
}

impl Limits {
    /// Has a session answer its own, a number of milliseconds each, and the process that serves it: a pooler in between has
    /// said another one at the login.
    pub(super) const ASK: &str = "SELECT pg_catalog.concat_ws(',', \
        (1000 * extract(epoch FROM current_setting('statement_timeout')::interval))::bigint, \
        (1000 * extract(epoch FROM current_setting('lock_timeout')::interval))::bigint, \
        (1000 * extract(epoch FROM current_setting('idle_in_transaction_session_timeout')::interval))::bigint, \
        pg_catalog.pg_backend_pid())";

    /// From the answer to [`Limits::ASK`], with the process.
    pub(super) fn read(answer: &str) -> (Self, Option<i32>) {
        let mut numbers = answer.split(',');
        let mut next = || {
            let milliseconds = numbers.next().and_then(|limit| limit.parse().ok());
            Duration::from_millis(milliseconds.unwrap_or_default())
        };
        let limits = Self {
            statement: next(),
            lock: next(),
            idle: next(),
        };
        (limits, numbers.next().and_then(|pid| pid.parse().ok()))
    }

    fn first_look(self) -> Duration {
        let limits = [self.statement, self.lock].into_iter();
        let shortest = limits.filter(|limit| !limit.is_zero()).min();
        let half = shortest.map_or(FIRST_LOOK, |limit| limit / 2);
        half.clamp(SHORTEST_LOOK, FIRST_LOOK)
    }
}

/// A session whose statement is watched.
#[derive(Clone, Copy)]
pub(super) struct Watched {
    process: i32,
    limits: Limits,
}

impl Watched {
    pub(super) fn of(client: &Client) -> Self {
        Self {
            process: client.process,
            limits: client.limits,
        }
    }
}

/// How a statement ended that was watched.
pub(super) struct Ended {
    /// What it waited for when it was looked at last.
    pub(super) wait: std::sync::Arc<LockWait>,
    pub(super) took: Duration,
    /// For how long the server had answered nothing to anybody then, as far as it was asked.
    pub(super) silence: Duration,
    pub(super) limits: Limits,
}

impl Postgres {
    /// Awaits a statement's answer, and looks now and then whether it waits for a lock of somebody else's. Dropped, it leaves
    /// in `sight` what it has seen.
    pub(super) async fn watched<T>(
        &self,
        Watched { process, limits }: Watched,
        sight: &Sight,
        mut statement: Pin<&mut impl Future<Output = T>>,
    ) -> (T, Ended) {
        let (since, wait) = (Instant::now(), sight.begin(process));
        let mut pause = limits.first_look();
        let answer = loop {
            if let Ok(answer) = tokio::time::timeout(pause, &mut statement).await {
                break answer;
            }
            // What is seldom done is in a box: a call's future is moved with all that it may come to.
            let look = Box::pin(self.locks_before(process, || sight.asked()));
            let looked = Instant::now();
            tokio::select! {
                biased;
                answer = &mut statement => break answer,
                // A look that is given up changes nothing.
                held = look => {
                    // Who refuses answers.
                    if held.is_ok() || looked.elapsed() < SILENCE {
                        sight.heard();
                    }
                    match held {
                        Ok(held) => wait.set_held(held),
                        Err(error) => debug!("locks can't be looked at: {error:?}"),
                    }
                }
            }
            pause = LOOK_INTERVAL;
        };
        let silence = sight.take(since).silence;
        let ended = Ended {
            wait,
            took: since.elapsed(),
            silence,
            limits,
        };
        (answer, ended)
    }

    /// The locks that a session waits for, and who has them, unless that is a host. `asked` is told when the server is.
    async fn locks_before(
        &self,
        process: i32,
        asked: impl FnOnce(),
    ) -> Result<Vec<HeldLock>, Error> {
        let names = self.stage_name.iter().map(|name| (**name).to_owned());
        let names = Value::TextArray(names.collect());
        let mut parameters = Parameters::default();
        parameters.int4(process);
        parameters.add(&names)?;
        let rows = self.look(&WHO_IS_IN_THE_WAY, &parameters, asked).await?;
        let lock = |row: Vec<Value>| match <[Value; 2]>::try_from(row) {
            Ok([Value::Text(key), Value::Text(words)]) => Some(HeldLock { key, words }),
            _ => None,
        };
        Ok(rows.into_iter().filter_map(lock).collect())
    }

    /// Sees whether the locks are still there that a statement has waited for.
    pub(in super::super) async fn probe_locks(&self, wait: &LockWait) -> Result<(), Error> {
        let held = match wait.held() {
            // It was given up before anybody looked, and the server goes on with it for a moment.
            held if held.is_empty() => self.locks_before(wait.process, || ()).await?,
            held => self.still_held(held).await?,
        };
        wait.set_held(held);
        match wait.words() {
            Some(words) => Err(Error::Unavailable(words)),
            None => Ok(()),
        }
    }

    async fn still_held(&self, mut held: Vec<HeldLock>) -> Result<Vec<HeldLock>, Error> {
        let keys = held.iter().map(|held| held.key.clone()).collect();
        let parameters = Parameters::of(&[Value::TextArray(keys)])?;
        let there = self.look(&WHICH_ARE_HELD, &parameters, || ()).await?;
        held.retain(|held| {
            let is_it =
                |row: &Vec<Value>| matches!(&row[..], [Value::Text(key)] if *key == held.key);
            there.iter().any(is_it)
        });
        Ok(held)
    }

    /// Asks on a connection made for it, since those of the pool may all wait for the same; it is closed at once, for the role
    /// may have as many as the pool has.
    async fn look(
        &self,
        text: &str,
        parameters: &Parameters,
        asked: impl FnOnce(),
    ) -> Result<Vec<Vec<Value>>, Error> {
        let place = self.looks.place().await?;
        asked();
        let mut lease = self.looks.take_at(place).await?;
        let rows = in_time(lease.ask(text, parameters)).await;
        lease.is_spent = true;
        rows.map_err(Failure::into_error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_is_looked_at_before_the_server_ends_it() {
        let milliseconds = Duration::from_millis;
        for (answer, expected) in [
            ("30000,0,15000", FIRST_LOOK),
            ("0,0,0", FIRST_LOOK),
            ("30000,100,0", milliseconds(50)),
            ("300,1000,0", milliseconds(150)),
            ("0,1,0", SHORTEST_LOOK),
            ("", FIRST_LOOK),
        ] {
            assert_eq!(Limits::read(answer).0.first_look(), expected, "{answer}");
        }
        let (limits, process) = Limits::read("1,2,3,4");
        assert_eq!((limits.idle, process), (milliseconds(3), Some(4)));
    }
}
