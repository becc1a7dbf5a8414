//! Servers that are there, and sick: they answer, and do not do what they are asked for. And what the hosts say of it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::runtime::Handle;

use crate::bench::Addresses;
use crate::pipeline::ROLE;
use crate::schedule::Kind;

/// How long a sickness may last before it is said.
pub(crate) const SAID_WITHIN: Duration = Duration::from_secs(25);
const ASK: Duration = Duration::from_secs(2);
const ASK_INTERVAL: Duration = Duration::from_millis(200);
/// What Redis asks for while its password is changed.
const PASSWORD: &str = "changed";

/// A server that is made sick, until this is told to heal it.
pub(crate) struct Sickness<'a> {
    kind: Kind,
    rough: bool,
    runtime: &'a Handle,
    addresses: &'a Addresses,
    redis: Option<redis::Connection>,
    postgres: Option<PgConnection>,
}

impl<'a> Sickness<'a> {
    /// Makes the server sick. What is to be healed by the same connection keeps it.
    pub(crate) fn begin(
        kind: Kind,
        rough: bool,
        runtime: &'a Handle,
        addresses: &'a Addresses,
    ) -> Self {
        let mut sickness = Self {
            kind,
            rough,
            runtime,
            addresses,
            redis: None,
            postgres: None,
        };
        match kind {
            Kind::SickRedis if rough => sickness.redis(&["CONFIG SET maxmemory 1"]),
            Kind::SickRedis => sickness.redis(&["CLIENT PAUSE 60000 ALL"]),
            Kind::RefuseRedis => {
                let requires = format!("CONFIG SET requirepass {PASSWORD}");
                // Those that are logged in would stay so.
                sickness.redis(&[&requires, "CLIENT KILL TYPE normal SKIPME yes"]);
            }
            Kind::SickPostgres if rough => sickness.postgres(&[
                "ALTER SYSTEM SET default_transaction_read_only = on",
                "SELECT pg_reload_conf()",
            ]),
            Kind::SickPostgres => sickness.postgres(&[
                "BEGIN",
                "LOCK TABLE stagehost_progress IN ACCESS EXCLUSIVE MODE",
            ]),
            Kind::RefusePostgres => {
                let refuses = format!("ALTER ROLE {ROLE} NOLOGIN");
                let ends = format!(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'"
                );
                sickness.postgres(&[&refuses, &ends]);
            }
            _ => panic!("{kind:?} is no sickness"),
        }
        sickness
    }

    /// What the hosts are to say of it.
    pub(crate) fn words(&self) -> &'static str {
        match self.kind {
            Kind::SickRedis | Kind::RefuseRedis => "cache",
            _ => "effects",
        }
    }

    /// How it is called in the report.
    pub(crate) fn deed(&self) -> &'static str {
        match (self.kind, self.rough) {
            (Kind::SickRedis, true) => "redis full",
            (Kind::SickRedis, false) => "redis paused",
            (Kind::RefuseRedis, _) => "redis's password changed",
            (Kind::SickPostgres, true) => "postgres read-only",
            (Kind::SickPostgres, false) => "progress locked in postgres",
            _ => "postgres refused logins",
        }
    }

    pub(crate) fn heal(mut self) {
        match self.kind {
            Kind::SickRedis if self.rough => self.redis(&["CONFIG SET maxmemory 0"]),
            Kind::SickRedis => self.redis(&["CLIENT UNPAUSE"]),
            Kind::RefuseRedis => self.redis(&["CONFIG SET requirepass NONE"]),
            Kind::SickPostgres if self.rough => self.postgres(&[
                "SET default_transaction_read_only = off",
                "ALTER SYSTEM RESET default_transaction_read_only",
                "SELECT pg_reload_conf()",
            ]),
            Kind::SickPostgres => self.postgres(&["ROLLBACK"]),
            Kind::RefusePostgres => {
                let allows = format!("ALTER ROLE {ROLE} LOGIN");
                self.postgres(&[&allows]);
            }
            _ => {}
        }
    }

    fn redis(&mut self, commands: &[&str]) {
        let client = redis::Client::open(&*self.addresses.redis).expect("a URL");
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

    fn postgres(&mut self, statements: &[&str]) {
        let (url, kept) = (&self.addresses.postgres, &mut self.postgres);
        let done = self.runtime.block_on(async {
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

/// Asks hosts for their readiness until one says this, or for too long; answers what they said last.
pub(crate) fn until_said(
    admins: impl Fn() -> Vec<String>,
    words: &str,
    within: Duration,
) -> Result<(), String> {
    let deadline = Instant::now() + within;
    loop {
        let said: Vec<_> = admins()
            .iter()
            .filter_map(|admin| readiness(admin))
            .collect();
        if said
            .iter()
            .any(|(status, text)| *status == 503 && text.contains(words))
        {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(format!("{said:?}"));
        }
        std::thread::sleep(ASK_INTERVAL);
    }
}

/// Status and text of `/readyz`; nothing of a host that does not answer.
pub(crate) fn readiness(admin: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(admin).ok()?;
    stream.set_read_timeout(Some(ASK)).ok()?;
    write!(
        stream,
        "GET /readyz HTTP/1.1\r\nhost: {admin}\r\nconnection: close\r\n\r\n"
    )
    .ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let status = answer.split(' ').nth(1)?.parse().ok()?;
    let (_, text) = answer.split_once("\r\n\r\n")?;
    Some((status, text.to_owned()))
}
