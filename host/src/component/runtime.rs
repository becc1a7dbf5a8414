//! The wasmtime engine, the linker with everything that a stage may import, and the clock that interrupts guests.

use std::path::Path;

use anyhow::Context;
use wasmtime::component::{Component, Linker};
use wasmtime::{Cache, CacheConfig, Config, Engine, EngineWeak};
use wasmtime_wasi_config::WasiConfig;

use super::clock::{Clock, TICK};
use super::guest::Guest;
use super::instance::StageComponent;
use super::plain;
use crate::capability::{self, Stores};
use crate::pipeline;

/// Bytes of WebAssembly stack.
const WASM_STACK: usize = 512 << 10;
/// Bytes of the host's stack under a guest's calls, the WebAssembly stack included.
const CALL_STACK: usize = 2 << 20;

/// A compiled component.
pub struct Compiled(Component);

/// One engine and linker for all stages of a host.
pub struct Runtime {
    engine: Engine,
    linker: Linker<Guest>,
    clock: Clock,
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
        let engine = Engine::new(&config).map_err(plain)?;
        let linker = link(&engine).map_err(plain)?;
        let clock = Clock::default();
        start_ticker(engine.weak(), clock.clone())?;
        Ok(Self {
            engine,
            linker,
            clock,
        })
    }

    /// Compiles a component file's bytes. Takes as long as the component is large: call it off the async runtime.
    pub fn compile(&self, bytes: &[u8]) -> anyhow::Result<Compiled> {
        Component::new(&self.engine, bytes)
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
        let pre = self.linker.instantiate_pre(&component.0).map_err(plain)?;
        StageComponent::new(stage, (&self.engine, &self.clock), pre, stores)
    }
}

/// Interrupts running guests at every tick: they then yield to the other tasks of their thread. A thread of its own, since
/// guests that spin may hold every thread of the async runtime until then. It ends with the engine.
fn start_ticker(engine: EngineWeak, clock: Clock) -> anyhow::Result<()> {
    std::thread::Builder::new()
        .name("epoch".into())
        .spawn(move || {
            while let Some(engine) = engine.upgrade() {
                engine.increment_epoch();
                clock.tick();
                drop(engine);
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
