//! The wasmtime engine, the linker with everything that a stage may import, and the clock that interrupts guests.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use tokio::sync::Semaphore;
use tracing::{debug, warn};
use wasmtime::component::{Component, InstancePre, Linker};
use wasmtime::{Cache, CacheConfig, Config, Engine, EngineWeak};
use wasmtime_wasi_config::WasiConfig;

use super::clock::{Clock, TICK};
use super::guest::Guest;
use super::instance::StageComponent;
use super::plain;
use super::pool;
use crate::capability::{self, Stores};
use crate::pipeline::{self, Instances};

/// Bytes of WebAssembly stack.
const WASM_STACK: usize = 512 << 10;
/// Bytes of the host's stack under a guest's calls, the WebAssembly stack included.
const CALL_STACK: usize = 2 << 20;

/// A compiled component.
pub struct Compiled(Component);

/// The engines and linkers for all stages of a host.
pub struct Runtime {
    /// Maps memory for an instance and gives it back: for those that stay.
    lasting: Linked,
    /// Has memory at hand: for those that serve one call. `None` where it is not to be had.
    passing: Option<Linked>,
    /// How many of those there may be.
    room: Arc<Semaphore>,
    clock: Clock,
}

/// An engine and what its components may import.
struct Linked {
    engine: Engine,
    linker: Linker<Guest>,
}

/// What instances of a stage are made of.
pub(super) struct Mould {
    pub(super) engine: Engine,
    pub(super) clock: Clock,
    pub(super) pre: InstancePre<Guest>,
    /// A permit an instance, where there can't be any number of them.
    pub(super) room: Option<Arc<Semaphore>>,
}

impl Runtime {
    /// Compiled components are kept under `cache` and taken from there the next time. The folder must
    /// belong to the host alone: what lies in it is run.
    pub fn new(cache: &Path) -> anyhow::Result<Self> {
        let mut config = Config::new();
        config
            .epoch_interruption(true)
            .max_wasm_stack(WASM_STACK)
            .async_stack_size(CALL_STACK)
            .cache(Some(open_cache(cache)?));
        let lasting = Linked::new(&config)?;
        let passing = pooled(&mut config);
        let clock = Clock::default();
        let weak = [Some(&lasting), passing.as_ref()];
        let weak = weak
            .into_iter()
            .flatten()
            .map(|linked| linked.engine.weak());
        start_ticker(weak.collect(), clock.clone())?;
        Ok(Self {
            lasting,
            passing,
            room: Arc::new(Semaphore::new(pool::MAX_INSTANCES as usize)),
            clock,
        })
    }

    /// Compiles a component file's bytes. Takes as long as the component is large: call it off the async runtime.
    pub fn compile(&self, bytes: &[u8], instances: Instances) -> anyhow::Result<Compiled> {
        let passing = self.passing.as_ref();
        if let Some(passing) = passing.filter(|_| instances == Instances::Fresh) {
            match Component::new(&passing.engine, bytes) {
                Ok(component) => return Ok(Compiled(component)),
                // It may have more parts than the pool has for one.
                Err(error) => debug!("not for the pool: {error:#}"),
            }
        }
        Component::new(&self.lasting.engine, bytes)
            .map(Compiled)
            .map_err(plain)
    }

    /// Binds a stage's grants to its component.
    pub fn bind(
        &self,
        stage: &pipeline::Stage,
        component: &Compiled,
        stores: &Stores,
    ) -> anyhow::Result<StageComponent> {
        let Compiled(component) = component;
        let passing = self.passing.as_ref();
        let passing = passing.filter(|linked| Engine::same(&linked.engine, component.engine()));
        let linked = passing.unwrap_or(&self.lasting);
        let mould = Mould {
            engine: linked.engine.clone(),
            clock: self.clock.clone(),
            pre: linked.linker.instantiate_pre(component).map_err(plain)?,
            room: passing.map(|_| self.room.clone()),
        };
        StageComponent::new(stage, mould, stores)
    }
}

impl Linked {
    fn new(config: &Config) -> anyhow::Result<Self> {
        let engine = Engine::new(config).map_err(plain)?;
        let linker = link(&engine).map_err(plain)?;
        Ok(Self { engine, linker })
    }
}

fn pooled(config: &mut Config) -> Option<Linked> {
    let pooled = pool::strategies().into_iter().find_map(|strategy| {
        let linked = Linked::new(config.allocation_strategy(strategy));
        linked
            .inspect_err(|error| debug!("no such pool: {error:#}"))
            .ok()
    });
    if pooled.is_none() {
        warn!(
            "no address space is to be had for a pool of instances: `instances = \"fresh\"` will be slower"
        );
    }
    pooled
}

/// Interrupts running guests at every tick: they then yield to the other tasks of their thread. A thread of its own, since
/// guests that spin may hold every thread of the async runtime until then. It ends with the engines.
fn start_ticker(engines: Vec<EngineWeak>, clock: Clock) -> anyhow::Result<()> {
    std::thread::Builder::new()
        .name("epoch".into())
        .spawn(move || {
            let tick =
                |engine: &EngineWeak| engine.upgrade().map(|engine| engine.increment_epoch());
            while engines.iter().filter_map(tick).count() > 0 {
                clock.tick();
                std::thread::sleep(TICK);
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
