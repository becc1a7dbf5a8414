//! All that a run needs: servers, the network to them, and hosts.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::hosts::Hosts;
use crate::judge::Progress;
use crate::pipeline::{self, DATABASE, INPUT_PARTITIONS, Ways};
use crate::proxy::Proxy;
use crate::reader::Lag;
use crate::servers::{self, Listeners, Ports, Server};

/// Hosts at most times.
const HOSTS: usize = 3;
/// How long the hosts may take to make the topics.
const TOPICS_PATIENCE: Duration = Duration::from_secs(90);
const ASK_INTERVAL: Duration = Duration::from_millis(200);

/// Servers, hosts and the network between them. What is dropped first stands first.
pub(crate) struct Bench {
    pub(crate) hosts: Hosts,
    pub(crate) to_kafka: Proxy,
    pub(crate) to_postgres: Proxy,
    pub(crate) to_redis: Proxy,
    pub(crate) kafka: Server,
    pub(crate) postgres: Server,
    pub(crate) redis: Server,
    pub(crate) addresses: Addresses,
    pub(crate) runtime: Runtime,
    _folder: TempDir,
}

/// Where the suite itself finds the servers, whatever the network is like for the hosts.
pub(crate) struct Addresses {
    pub(crate) brokers: String,
    /// A database beside the stages'.
    pub(crate) postgres: String,
    /// The stages' database.
    pub(crate) effects: String,
    pub(crate) redis: String,
}

impl Bench {
    /// Starts servers and hosts, and waits until there are topics.
    pub(crate) fn start(logs: &Path) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        // PostgreSQL may run as another user, and its folder lies in this one.
        let open = Permissions::from_mode(0o711);
        std::fs::set_permissions(folder.path(), open).expect("permissions");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let mut ports = Ports::default();
        let ways = Ways {
            kafka: ports.free(),
            postgres: ports.free(),
            redis: ports.free(),
        };
        let listeners = Listeners {
            behind: ports.free(),
            proxy: ways.kafka,
            direct: ports.free(),
        };
        let (postgres_port, redis_port) = (ports.free(), ports.free());
        let mut kafka = servers::kafka(folder.path(), logs, &mut ports, &listeners);
        let mut postgres = servers::postgres(folder.path(), logs, postgres_port);
        let mut redis = servers::redis(folder.path(), logs, redis_port);
        for server in [&mut kafka, &mut postgres, &mut redis] {
            server.start();
        }
        let proxy = |port, to| Proxy::start(runtime.handle(), port, to);
        let pipeline = pipeline::text(&ways, &stages());
        let mut bench = Self {
            hosts: Hosts::new(folder.path(), logs, pipeline),
            to_kafka: proxy(ways.kafka, listeners.behind),
            to_postgres: proxy(ways.postgres, postgres_port),
            to_redis: proxy(ways.redis, redis_port),
            kafka,
            postgres,
            redis,
            addresses: Addresses {
                brokers: format!("127.0.0.1:{}", listeners.direct),
                postgres: format!("postgres://postgres@127.0.0.1:{postgres_port}/postgres"),
                effects: format!("postgres://postgres@127.0.0.1:{postgres_port}/{DATABASE}"),
                redis: format!("redis://127.0.0.1:{redis_port}"),
            },
            runtime,
            _folder: folder,
        };
        bench.make_tables();
        (0..HOSTS).for_each(|_| bench.hosts.add());
        bench.wait_for_topics();
        bench
    }

    fn make_tables(&self) {
        let Addresses {
            postgres, effects, ..
        } = &self.addresses;
        self.sql(postgres, &format!("CREATE DATABASE {DATABASE}"));
        self.sql(effects, pipeline::TABLES);
    }

    /// Runs statements of the suite's own.
    pub(crate) fn sql(&self, url: &str, statements: &str) {
        let done = self.runtime.block_on(async {
            let mut connection = PgConnection::connect(url).await?;
            let statements = sqlx::raw_sql(AssertSqlSafe(statements.to_owned()));
            statements.execute(&mut connection).await?;
            connection.close().await
        });
        done.unwrap_or_else(|error| panic!("{statements}: {error}"));
    }

    fn wait_for_topics(&self) {
        let lag = Lag::new(&self.addresses.brokers);
        let deadline = Instant::now() + TOPICS_PATIENCE;
        let there = || {
            lag.progress()
                .is_ok_and(|p: Vec<Progress>| p.len() == INPUT_PARTITIONS)
        };
        while !there() {
            assert!(
                Instant::now() < deadline,
                "the hosts did not make their topics"
            );
            std::thread::sleep(ASK_INTERVAL);
        }
    }
}

/// Where `make stages` leaves the components.
fn stages() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/stages");
    let folder = std::env::var_os("STAGES_DIR").map_or_else(default, PathBuf::from);
    let folder = folder.canonicalize().unwrap_or(folder);
    let writer = folder.join("test-writer.wasm");
    assert!(
        writer.exists(),
        "{} is missing: run `make stages`",
        writer.display()
    );
    folder
}
