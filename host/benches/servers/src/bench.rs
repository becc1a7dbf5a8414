//! What all rows work with: the servers, a folder, and programs on them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use sqlx::{Connection, PgConnection};

use crate::log::Log;
use crate::native::Settings;
use crate::program::{Program, Usage};

/// How long a program may take to do what it is given.
const LONG: Duration = Duration::from_secs(240);
const BLOG_TABLE: &str = include_str!("../../../../examples/blog/migrations/0001_posts.sql");
/// How often it is looked how far a program is.
const LOOK: Duration = Duration::from_millis(50);

/// The servers and the programs.
pub(crate) struct Bench {
    pub(crate) log: Log,
    pub(crate) database: String,
    pub(crate) redis: String,
    /// The host's binary.
    pub(crate) host: PathBuf,
    /// Folder of the compiled stages.
    pub(crate) stages: PathBuf,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) runtime: tokio::runtime::Runtime,
    serial: AtomicU32,
}

/// A host's pipeline, or the name and settings of a native program.
pub(crate) enum Side {
    Host(String),
    Native(&'static str, Settings),
}

/// How a program did.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// Messages a second.
    pub(crate) rate: f64,
    /// Of the program alone, not of the servers, from its start on.
    pub(crate) cpu_per_message: Duration,
    pub(crate) usage: Usage,
}

fn variable(name: &str) -> anyhow::Result<String> {
    std::env::var(name).with_context(|| format!("{name} is not set: `make bench` sets it"))
}

impl Bench {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            log: Log::new(&variable("KAFKA_BROKERS")?)?,
            database: variable("DATABASE_URL")?,
            redis: variable("REDIS_URL")?,
            host: variable("HOST_BINARY")?.into(),
            stages: variable("STAGES_DIR")?.into(),
            folder: tempfile::tempdir()?,
            runtime: tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build()?,
            serial: Default::default(),
        })
    }

    /// A name that nothing else has.
    pub(crate) fn unique(&self, word: &str) -> String {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed) + 1;
        format!("bench.{word}.{}.{serial}", std::process::id())
    }

    pub(crate) fn stage(&self, name: &str) -> String {
        self.stages
            .join(format!("{name}.wasm"))
            .display()
            .to_string()
    }

    /// What every native program works on, in a group of its own.
    pub(crate) fn settings(&self, input: &str, output: &str) -> Settings {
        Settings {
            brokers: self.log.brokers.clone(),
            redis: self.redis.clone(),
            input: input.into(),
            output: output.into(),
            group: self.unique("group"),
            ..Settings::default()
        }
    }

    /// Starts a program in a folder of its own; compiled components are shared, as a host's are from its second start on.
    pub(crate) fn start(&self, side: &Side) -> anyhow::Result<Program> {
        let name = self.unique("program");
        let folder = self.folder.path().join(&name);
        fs::create_dir(&folder)?;
        let command = match side {
            Side::Host(pipeline) => {
                let file = folder.join("pipeline.toml");
                fs::write(&file, pipeline)?;
                self.share_compiled(&folder)?;
                let mut command = Command::new(&self.host);
                command.arg("run").arg(file).env("RUST_LOG", "warn");
                command
            }
            Side::Native(name, settings) => {
                let mut command = Command::new(std::env::current_exe()?);
                command
                    .arg("native")
                    .arg(name)
                    .arg(serde_json::to_string(settings)?);
                command
            }
        };
        Program::start(command, &folder, "output")
    }

    fn share_compiled(&self, folder: &Path) -> anyhow::Result<()> {
        let (data, shared) = (folder.join("data"), self.folder.path().join("compiled"));
        fs::create_dir_all(&shared)?;
        fs::create_dir_all(&data)?;
        std::os::unix::fs::symlink(shared, data.join("compiled"))?;
        Ok(())
    }

    /// Waits until `done` of a running program.
    pub(crate) fn until(
        &self,
        what: &str,
        program: &mut Program,
        mut done: impl FnMut() -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let since = Instant::now();
        while !done()? {
            program.check()?;
            if since.elapsed() > LONG {
                bail!("waited {LONG:?} for {what}:\n{}", program.output());
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// The address that a program says it listens on.
    pub(crate) fn address(&self, program: &mut Program, word: &str) -> anyhow::Result<String> {
        let mut found = None;
        let output = program.log_path();
        self.until(&format!("{word}'s address"), program, || {
            let text = fs::read_to_string(&output)?;
            let line = text
                .lines()
                .find(|line| line.trim_start().starts_with(word));
            let address = line.and_then(|line| line.split_whitespace().nth(1));
            found = address.map(|address| address.trim_start_matches("http://").to_owned());
            Ok(found.is_some())
        })?;
        found.context("an address")
    }

    /// How fast a program gets `count` records into a topic, from the first to the last; of a slow one, in `most` at most.
    pub(crate) fn pace(
        &self,
        side: &Side,
        output: &str,
        count: u64,
        most: Duration,
    ) -> anyhow::Result<Pace> {
        let before = self.log.ends(output)?;
        let mut program = self.start(side)?;
        let mut begun = None;
        self.until("its outputs", &mut program, || {
            let there = self.log.behind(output, &before)?;
            if there > 0 {
                begun.get_or_insert_with(Instant::now);
            }
            ensure!(there <= count, "{there} outputs of {count} messages");
            Ok(there == count || begun.is_some_and(|begun| begun.elapsed() >= most))
        })?;
        let usage = program.usage()?;
        program.stop()?;
        let appended = self.log.appended(output, &before)?;
        Ok(Pace {
            rate: appended.records as f64 / appended.time.as_secs_f64().max(0.001),
            cpu_per_message: usage.cpu.div_f64(appended.records.max(1) as f64),
            usage,
        })
    }

    /// A database of its own with the blog's table; answers its URL.
    pub(crate) fn database(&self) -> anyhow::Result<String> {
        let name = self.unique("posts").replace('.', "_");
        let (server, _) = self
            .database
            .rsplit_once('/')
            .context("DATABASE_URL names no database")?;
        let url = format!("{server}/{name}");
        self.execute(&self.database, &format!("CREATE DATABASE {name}"))?;
        self.execute(&url, BLOG_TABLE)?;
        Ok(url)
    }

    pub(crate) fn drop_database(&self, url: &str) -> anyhow::Result<()> {
        let (_, name) = url.rsplit_once('/').context("a database's URL")?;
        self.execute(
            &self.database,
            &format!("DROP DATABASE {name} WITH (FORCE)"),
        )
    }

    fn execute(&self, url: &str, statement: &str) -> anyhow::Result<()> {
        self.runtime.block_on(async {
            let mut connection = PgConnection::connect(url).await?;
            let statement = sqlx::AssertSqlSafe(statement.to_owned());
            sqlx::raw_sql(statement).execute(&mut connection).await?;
            Ok(())
        })
    }

    /// How many posts are in a database.
    pub(crate) fn rows(&self, url: &str) -> anyhow::Result<u64> {
        self.runtime.block_on(async {
            let mut connection = PgConnection::connect(url).await?;
            let count = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM posts");
            Ok(u64::try_from(count.fetch_one(&mut connection).await?)?)
        })
    }
}
