//! Servers that are there, and sick: they answer, and do not do what they are asked for. And the words that hosts say it with.

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::bench::Bench;
use crate::pipeline::{OUT, PASSER, ROLE};
use crate::proxy::Link;
use crate::said::Words;
use crate::schedule::Kind;
use crate::servers::acl;

/// Clients that Redis has places for, the suite's own and one of the hosts'. What is not there yet gets none.
const FEW_CLIENTS: &str = "CONFIG SET maxclients 1";
const MANY_CLIENTS: &str = "CONFIG SET maxclients 1000";
/// The hosts' connections end: those that are logged in would stay so.
const END_CLIENTS: &str = "CLIENT KILL TYPE normal SKIPME yes";
/// What a store asks for while its password is changed.
const PASSWORD: &str = "changed";

/// A server that is made sick, until this is told to heal it.
pub(crate) struct Sickness {
    kind: Kind,
    rough: bool,
    redis: Option<redis::Connection>,
    postgres: Option<PgConnection>,
}

impl Sickness {
    /// Makes the server sick. What is to be healed by the same connection keeps it.
    pub(crate) fn begin(kind: Kind, rough: bool, bench: &mut Bench) -> Self {
        let mut sickness = Self {
            kind,
            rough,
            redis: None,
            postgres: None,
        };
        match (kind, rough) {
            (Kind::SickRedis, true) => sickness.redis(bench, &["CONFIG SET maxmemory 1"]),
            // Its own pause ends with its time only: who is to end it would be paused too.
            (Kind::SickRedis, false) => bench.redis.signal(libc::SIGSTOP),
            (Kind::RefuseRedis, true) => {
                let requires = format!("CONFIG SET requirepass {PASSWORD}");
                sickness.redis(bench, &[&requires, END_CLIENTS]);
            }
            (Kind::RefuseRedis, false) => sickness.redis(bench, &[FEW_CLIENTS, END_CLIENTS]),
            (Kind::SickPostgres, true) => sickness.postgres(
                bench,
                &[
                    "ALTER SYSTEM SET default_transaction_read_only = on",
                    "SELECT pg_reload_conf()",
                ],
            ),
            (Kind::SickPostgres, false) => sickness.postgres(
                bench,
                &[
                    "BEGIN",
                    "LOCK TABLE stagehost_progress IN ACCESS EXCLUSIVE MODE",
                ],
            ),
            (Kind::RefusePostgres, is_password) => {
                let what = if is_password {
                    format!("PASSWORD '{PASSWORD}'")
                } else {
                    "CONNECTION LIMIT 0".to_owned()
                };
                let refuses = format!("ALTER ROLE {ROLE} {what}");
                let ends = format!(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'"
                );
                sickness.postgres(bench, &[&refuses, &ends]);
            }
            (Kind::SickKafka, true) => bench.kafka.signal(libc::SIGSTOP),
            (Kind::SickKafka, false) => bench.to_kafka.set(Link::Frozen),
            (Kind::RefuseKafka, _) => acl(&bench.addresses.brokers, &sickness.denied("--add")),
            _ => panic!("{kind:?} is no sickness"),
        }
        sickness
    }

    /// What the hosts are to say of it.
    pub(crate) fn words(&self) -> Words {
        match (self.kind, self.rough) {
            (Kind::SickRedis | Kind::RefuseRedis, _) => Words::CACHE,
            (Kind::SickKafka, _) => Words::LOG,
            (Kind::RefuseKafka, true) => Words::RIGHTS,
            (Kind::RefuseKafka, false) => Words::GROUP,
            (Kind::RefusePostgres, true) => Words::PASSWORD,
            _ => Words::EFFECTS,
        }
    }

    /// How it is called in the report.
    pub(crate) fn deed(&self) -> &'static str {
        match (self.kind, self.rough) {
            (Kind::SickRedis, true) => "redis full",
            (Kind::SickRedis, false) => "redis paused",
            (Kind::RefuseRedis, true) => "redis's password changed",
            (Kind::RefuseRedis, false) => "redis's places taken",
            (Kind::SickPostgres, true) => "postgres read-only",
            (Kind::SickPostgres, false) => "progress locked in postgres",
            (Kind::RefusePostgres, true) => "postgres's password changed",
            (Kind::RefusePostgres, false) => "postgres's places taken",
            (Kind::SickKafka, true) => "kafka paused",
            (Kind::SickKafka, false) => "kafka silent",
            (_, true) => "an output forbidden",
            (_, false) => "a group forbidden",
        }
    }

    /// An output of a transactional stage, or the group of one that is delivered to at least once.
    fn denied(&self, change: &'static str) -> Vec<&'static str> {
        let what = match self.rough {
            true => ["--topic", OUT, "--operation", "Write"],
            false => ["--group", PASSER.group, "--operation", "Read"],
        };
        [&[change][..], &what].concat()
    }

    pub(crate) fn heal(mut self, bench: &mut Bench) {
        match (self.kind, self.rough) {
            (Kind::SickRedis, true) => self.redis(bench, &["CONFIG SET maxmemory 0"]),
            (Kind::SickRedis, false) => bench.redis.signal(libc::SIGCONT),
            (Kind::RefuseRedis, true) => self.redis(bench, &["CONFIG SET requirepass NONE"]),
            (Kind::RefuseRedis, false) => self.redis(bench, &[MANY_CLIENTS]),
            (Kind::SickPostgres, true) => self.postgres(
                bench,
                &[
                    "SET default_transaction_read_only = off",
                    "ALTER SYSTEM RESET default_transaction_read_only",
                    "SELECT pg_reload_conf()",
                ],
            ),
            (Kind::SickPostgres, false) => self.postgres(bench, &["ROLLBACK"]),
            (Kind::RefusePostgres, _) => {
                let allows = format!("ALTER ROLE {ROLE} PASSWORD '{ROLE}' CONNECTION LIMIT -1");
                self.postgres(bench, &[&allows]);
            }
            (Kind::SickKafka, true) => bench.kafka.signal(libc::SIGCONT),
            (Kind::SickKafka, false) => bench.to_kafka.set(Link::Open),
            _ => {
                let mut allowed = self.denied("--remove");
                allowed.push("--force");
                acl(&bench.addresses.brokers, &allowed);
            }
        }
    }

    fn redis(&mut self, bench: &Bench, commands: &[&str]) {
        let client = redis::Client::open(&*bench.addresses.redis).expect("a URL");
        let connect = || client.get_connection().expect("Redis");
        let connection = self.redis.get_or_insert_with(connect);
        for command in commands {
            let mut words = command.split(' ');
            let mut done = redis::cmd(words.next().expect("a command"));
            for word in words {
                done.arg(if word == "NONE" { "" } else { word });
            }
            let answer: redis::RedisResult<redis::Value> = done.query(connection);
            answer.unwrap_or_else(|error| panic!("{command}: {error}"));
        }
    }

    fn postgres(&mut self, bench: &Bench, statements: &[&str]) {
        let (url, kept) = (&bench.addresses.effects, &mut self.postgres);
        let done = bench.runtime.block_on(async {
            let connection = match kept {
                Some(connection) => connection,
                None => kept.insert(PgConnection::connect(url).await?),
            };
            for statement in statements {
                let statement = sqlx::raw_sql(AssertSqlSafe(statement.to_string()));
                statement.execute(&mut *connection).await?;
            }
            Ok::<_, sqlx::Error>(())
        });
        done.unwrap_or_else(|error| panic!("{statements:?}: {error}"));
    }
}
