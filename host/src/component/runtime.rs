//! The wasmtime engine, the linker with everything that a stage may import, and the clock that interrupts guests.

use std::iter;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use tokio::sync::Semaphore;
use tracing::debug;
use wasmtime::component::{Component, InstancePre, Linker};
use wasmtime::{Cache, CacheConfig, Config, Engine, EngineWeak};
use wasmtime_wasi_config::WasiConfig;

use super::clock::{Clock, TICK};
use super::guest::Guest;
use super::instance::StageComponent;
use super::plain;
use super::pool;
use super::share::Share;
use super::turns::Turns;
use crate::capability::{self, Stores};
use crate::pipeline::{self, Instances};

/// Bytes of WebAssembly stack.
const WASM_STACK: usize = 512 << 10;
/// Bytes of the host's stack under a guest's calls, the WebAssembly stack included.
const CALL_STACK: usize = 2 << 20;

/// As often in a tick are guests interrupted while one of them has a turn.
const EPOCHS_IN_TURNS: u32 = 5;

/// Bytes of a page of WebAssembly's memory.
const WASM_PAGE: u64 = 64 << 10;

/// A compiled component.
pub struct Compiled {
    mapped: Component,
    /// Where its instances serve one call each, and the pool has room for what they are made of.
    pooled: Option<Component>,
}

/// The engines and linkers for all stages of a host.
pub struct Runtime {
    /// Maps memory for an instance and gives it back.
    mapping: Linked,
    /// Has memory at hand, for so many instances. `None` where address space for it is not to be had.
    pooling: Option<Linked>,
    /// A permit for each of those.
    room: Arc<Semaphore>,
    clock: Clock,
    turns: Arc<Turns>,
}

/// An engine and what its components may import.
struct Linked {
    engine: Engine,
    linker: Linker<Guest>,
}

/// A component that can be instantiated, and how.
pub(super) struct Prepared {
    pub(super) engine: Engine,
    pub(super) pre: InstancePre<Guest>,
}

/// What a stage's instances are made from.
pub(super) struct Source {
    pub(super) mapped: Prepared,
    /// As long as there are permits.
    pub(super) pooled: Option<(Prepared, Arc<Semaphore>)>,
    pub(super) share: Share,
}

impl Runtime {
    /// Compiled components are kept under `cache` and taken from there the next time. The folder must
    /// belong to the host alone: what lies in it is run.
    pub fn new(cache: &Path) -> anyhow::Result<Self> {
        Self::with(Some(open_cache(cache)?))
    }

    /// Without such a folder.
    pub fn uncached() -> anyhow::Result<Self> {
        Self::with(None)
    }

    fn with(cache: Option<Cache>) -> anyhow::Result<Self> {
        let mut config = Config::new();
        config
            .epoch_interruption(true)
            .max_wasm_stack(WASM_STACK)
            .async_stack_size(CALL_STACK)
            .cache(cache);
        let mapping = Linked::new(&config)?;
        let pooling = pooled(&mut config);
        let clock = Clock::default();
        let engines = iter::once(&mapping).chain(&pooling);
        let engines = engines.map(|linked| linked.engine.weak()).collect();
        let turns = Turns::new();
        start_ticker(engines, clock.clone(), turns.clone())?;
        Ok(Self {
            mapping,
            pooling,
            room: Arc::new(Semaphore::new(pool::MAX_INSTANCES as usize)),
            clock,
            turns,
        })
    }

    /// Compiles a component file's bytes. Takes as long as the component is large: call it off the async runtime.
    pub fn compile(&self, bytes: &[u8], instances: Instances) -> anyhow::Result<Compiled> {
        let mapped = Component::new(&self.mapping.engine, bytes).map_err(plain)?;
        let pooling = self.pooling.as_ref();
        let pooling = pooling.filter(|_| instances == Instances::Fresh);
        let pooled = pooling.and_then(|linked| {
            let pooled = Component::new(&linked.engine, bytes);
            // It may have more parts than the pool has for one.
            let pooled = pooled.inspect_err(|error| debug!("not for the pool: {error:#}"));
            pooled.ok()
        });
        Ok(Compiled { mapped, pooled })
    }

    /// Binds a stage's grants to its component.
    pub fn bind(
        &self,
        stage: &pipeline::Stage,
        component: &Compiled,
        stores: &Stores,
    ) -> anyhow::Result<StageComponent> {
        let pooled = match (&self.pooling, &component.pooled) {
            (Some(linked), Some(pooled)) => Some((linked.prepare(pooled)?, self.room.clone())),
            _ => None,
        };
        let source = Source {
            mapped: self.mapping.prepare(&component.mapped)?,
            pooled,
            share: Share::new(self.clock.clone(), self.turns.clone()),
        };
        StageComponent::new(stage, source, stores)
    }
}

impl Compiled {
    /// Bytes that the largest memory of an instance begins with.
    pub fn memory_at_first(&self) -> u64 {
        let required = self.mapped.resources_required();
        let pages = required.and_then(|all| all.max_initial_memory_size);
        pages.unwrap_or(0).saturating_mul(WASM_PAGE)
    }
}

impl Linked {
    fn new(config: &Config) -> anyhow::Result<Self> {
        let engine = Engine::new(config).map_err(plain)?;
        let linker = link(&engine).map_err(plain)?;
        Ok(Self { engine, linker })
    }

    fn prepare(&self, component: &Component) -> anyhow::Result<Prepared> {
        Ok(Prepared {
            engine: self.engine.clone(),
            pre: self.linker.instantiate_pre(component).map_err(plain)?,
        })
    }
}

fn pooled(config: &mut Config) -> Option<Linked> {
    pool::strategies().into_iter().find_map(|strategy| {
        let linked = Linked::new(config.allocation_strategy(strategy));
        let linked = linked.inspect_err(|error| debug!("no such pool: {error:#}"));
        linked.ok()
    })
}

/// Interrupts running guests at every tick, and more often while one has a turn, to look whether others should have theirs
/// (`share.rs`). A thread of its own, since guests that spin may hold every thread of the async runtime until then. It ends with
/// the engines.
fn start_ticker(engines: Vec<EngineWeak>, clock: Clock, turns: Arc<Turns>) -> anyhow::Result<()> {
    let interrupt = |engine: &EngineWeak| engine.upgrade().map(|engine| engine.increment_epoch());
    std::thread::Builder::new()
        .name("epoch".into())
        .spawn(move || {
            loop {
                clock.tick();
                let epochs = if turns.are_taken() {
                    EPOCHS_IN_TURNS
                } else {
                    1
                };
                for _ in 0..epochs {
                    if engines.iter().filter_map(interrupt).count() == 0 {
                        return;
                    }
                    std::thread::sleep(TICK / epochs);
                }
            }
        })
        .context("cannot start the thread that interrupts guests")?;
    Ok(())
}

fn open_cache(folder: &Path) -> anyhow::Result<Cache> {
    std::fs::create_dir_all(folder)
        .and_then(|()| restrict(folder))
        .with_context(|| format!("cannot create the compile cache {}", folder.display()))?;
    let mut config = CacheConfig::new();
    config.with_directory(folder);
    Cache::new(config)
        .map_err(plain)
        .with_context(|| format!("cannot open the compile cache {}", folder.display()))
}

/// Nobody else may write what will be run.
fn restrict(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))
}

fn link(engine: &Engine) -> wasmtime::Result<Linker<Guest>> {
    let mut linker = Linker::new(engine);
    wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
    wasmtime_wasi_config::add_to_linker(&mut linker, |guest: &mut Guest| {
        WasiConfig::from(&*guest.config)
    })?;
    capability::logging::add_to_linker(&mut linker, |guest: &mut Guest| &mut guest.log)?;
    capability::producer::add_to_linker(&mut linker, |guest: &mut Guest| &mut guest.producer)?;
    capability::sql::add_to_linker(&mut linker, |guest: &mut Guest| capability::sql::SqlView {
        ctx: &mut guest.sql,
        table: &mut guest.table,
    })?;
    capability::redis::add_to_linker(&mut linker, |guest: &mut Guest| {
        capability::redis::RedisView {
            ctx: &mut guest.redis,
            table: &mut guest.table,
        }
    })?;
    Ok(linker)
}
