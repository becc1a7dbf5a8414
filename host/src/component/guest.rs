//! What the host keeps for one instance: its grants, its sandbox and its limits.

use std::sync::Arc;

use wasmtime::ResourceLimiter;
use wasmtime::component::ResourceTable;
use wasmtime_wasi::{WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};
use wasmtime_wasi_config::WasiConfigVariables;

use crate::capability::logging::{LogCtx, Stream};
use crate::capability::producer::{ProducerCtx, ProducerGrant};
use crate::capability::redis::{RedisCtx, RedisGrants};
use crate::capability::sql::{SqlCtx, SqlGrants};
use crate::capability::{Away, Pending, Unanswered};

/// Elements of all of an instance's tables together.
pub(super) const MAX_TABLE_ELEMENTS: usize = 100_000;
/// Core instances, tables and memories that one component may be made of.
const MAX_PARTS: usize = 100;
/// Resources (connections, streams, pollables) that an instance may hold.
const MAX_RESOURCES: usize = 10_000;
/// Bytes of random data that a guest may ask for at once.
const MAX_RANDOM: u64 = 1 << 20;

/// What one stage is granted: made once a stage, shared by its instances.
pub(super) struct Grants {
    pub(super) stage: Arc<str>,
    pub(super) producer: Arc<ProducerGrant>,
    pub(super) sql: Arc<SqlGrants>,
    pub(super) redis: Arc<RedisGrants>,
    pub(super) config: Arc<WasiConfigVariables>,
    /// Calls that wait for a store.
    pub(super) unanswered: Arc<Unanswered>,
    /// Bytes of linear memory.
    pub(super) memory: usize,
}

/// The data of one instance's wasmtime store.
pub(super) struct Guest {
    pub(super) wasi: WasiCtx,
    pub(super) table: ResourceTable,
    pub(super) config: Arc<WasiConfigVariables>,
    pub(super) producer: ProducerCtx,
    pub(super) sql: SqlCtx,
    pub(super) redis: RedisCtx,
    /// The store that it waits for.
    pub(super) pending: Arc<Pending>,
    pub(super) log: LogCtx,
    pub(super) limiter: Limiter,
}

impl Guest {
    pub(super) fn new(grants: &Grants) -> Self {
        let log = LogCtx::new(grants.stage.clone());
        let mut table = ResourceTable::new();
        table.set_max_capacity(MAX_RESOURCES);
        let pending = grants.unanswered.pending(&log);
        Self {
            wasi: sandbox(&log),
            table,
            config: grants.config.clone(),
            producer: ProducerCtx::new(grants.producer.clone()),
            sql: SqlCtx::new(grants.sql.clone(), pending.clone()),
            redis: RedisCtx::new(grants.redis.clone(), pending.clone()),
            pending,
            log,
            limiter: Limiter {
                max_memory: grants.memory,
                ..Limiter::default()
            },
        }
    }

    /// The first grant that a call since last asked lacked.
    pub(super) fn take_denied(&mut self) -> Option<String> {
        let denied = [
            self.producer.take_denied(),
            self.sql.take_denied(),
            self.redis.take_denied(),
        ];
        denied.into_iter().flatten().next()
    }

    /// Whether a statement ran out of time since last asked.
    pub(super) fn take_slow(&mut self) -> bool {
        self.sql.take_slow()
    }

    /// A store that did not do what it was asked since last asked.
    pub(super) fn take_away(&mut self) -> Option<Box<Away>> {
        let away = [self.sql.take_away(), self.redis.take_away()];
        away.into_iter().flatten().next().map(Box::new)
    }
}

/// Clocks and random work, stdout and stderr go into the log; file system, sockets, arguments and
/// environment are there, as language runtimes import them, and empty.
fn sandbox(log: &LogCtx) -> WasiCtx {
    WasiCtxBuilder::new()
        .stdout(log.stream(Stream::Out))
        .stderr(log.stream(Stream::Err))
        .max_random_size(MAX_RANDOM)
        .allow_tcp(false)
        .allow_udp(false)
        .allow_ip_name_lookup(false)
        .build()
}

impl WasiView for Guest {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView {
            ctx: &mut self.wasi,
            table: &mut self.table,
        }
    }
}

/// Bounds memory over all memories of the instance together, and remembers that it refused.
#[derive(Default)]
pub(super) struct Limiter {
    max_memory: usize,
    memory: usize,
    table_elements: usize,
    /// A growth was refused: a trap that follows is put down to it.
    pub(super) refused_memory: bool,
    /// The same of a table.
    pub(super) refused_table: bool,
}

impl Limiter {
    /// A call begins.
    pub(super) fn forget_refusals(&mut self) {
        self.refused_memory = false;
        self.refused_table = false;
    }
}

impl ResourceLimiter for Limiter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let grown = grow(&mut self.memory, self.max_memory, current, desired, maximum);
        self.refused_memory |= grown == Growth::OverLimit;
        Ok(grown == Growth::Granted)
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let total = &mut self.table_elements;
        let grown = grow(total, MAX_TABLE_ELEMENTS, current, desired, maximum);
        self.refused_table |= grown == Growth::OverLimit;
        Ok(grown == Growth::Granted)
    }

    fn instances(&self) -> usize {
        MAX_PARTS
    }

    fn tables(&self) -> usize {
        MAX_PARTS
    }

    fn memories(&self) -> usize {
        MAX_PARTS
    }
}

#[derive(PartialEq, Eq)]
enum Growth {
    Granted,
    /// Beyond what the memory or table itself declares. wasmtime asks first, and refuses by that afterwards.
    OverDeclared,
    OverLimit,
}

/// Adds a growth to what all memories or tables of the instance have together.
fn grow(
    total: &mut usize,
    limit: usize,
    current: usize,
    desired: usize,
    declared: Option<usize>,
) -> Growth {
    if declared.is_some_and(|most| desired > most) {
        return Growth::OverDeclared;
    }
    let after = total.saturating_add(desired.saturating_sub(current));
    if after > limit {
        return Growth::OverLimit;
    }
    *total = after;
    Growth::Granted
}
