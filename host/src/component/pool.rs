//! Memory at hand for instances that serve one call. To map it for each and give it back takes longer than most calls.

use wasmtime::{Enabled, InstanceAllocationStrategy, PoolingAllocationConfig};

use super::guest::MAX_TABLE_ELEMENTS;

/// Instances that there may be at one time. Memory for those beyond is mapped.
pub(super) const MAX_INSTANCES: u32 = 500;
/// Core instances, memories and tables of one. Memory for a component of more parts is mapped.
const MAX_CORE_INSTANCES: u32 = 16;
const MAX_MEMORIES: u32 = 1;
const MAX_TABLES: u32 = 4;
/// Bytes of a memory and a table that are wiped for the next instance: for a few pages that is faster than to give them back.
const KEPT_MEMORY: usize = 256 << 10;
const KEPT_TABLE: usize = 16 << 10;

/// The pools that there are, the best first: not every system has it.
pub(super) fn strategies() -> [InstanceAllocationStrategy; 2] {
    // Linux tells from 6.7 on which pages were touched. Without that, all that is kept would have to be wiped.
    let mut keeping = pool();
    keeping
        .pagemap_scan(Enabled::Yes)
        .linear_memory_keep_resident(KEPT_MEMORY)
        .table_keep_resident(KEPT_TABLE);
    [keeping, pool()].map(InstanceAllocationStrategy::Pooling)
}

/// Address space for all of them. Memory is what they touch.
fn pool() -> PoolingAllocationConfig {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(MAX_INSTANCES)
        .total_core_instances(MAX_INSTANCES * MAX_CORE_INSTANCES)
        .max_core_instances_per_component(MAX_CORE_INSTANCES)
        .total_memories(MAX_INSTANCES * MAX_MEMORIES)
        .max_memories_per_component(MAX_MEMORIES)
        .total_tables(MAX_INSTANCES * MAX_TABLES)
        .max_tables_per_component(MAX_TABLES)
        .table_elements(MAX_TABLE_ELEMENTS)
        .total_stacks(MAX_INSTANCES);
    pool
}
