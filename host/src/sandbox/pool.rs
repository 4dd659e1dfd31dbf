//! The pool of slots for all instances of an engine.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use wasmtime::{Enabled, PoolingAllocationConfig};

use super::limits::SharedLimits;
use super::requirements::{MAX_CORE_INSTANCES, MIN_TABLE_SLOT, Requirements, WASM_PAGE_BYTES};

/// The memory of a slot that stays resident between guests, in bytes.
///
/// The pool fills this part with zeros. The rest goes back to the kernel, which costs system calls
/// and page faults on the next use. Several times the memory that a guest of a small protocol
/// touches; small enough that the slots that hostile guests have filled do not add up to much.
const KEEP_RESIDENT_BYTES: usize = 256 << 10;

/// The stack of each instance for the host's own functions, in bytes.
pub const HOST_STACK_BYTES: usize = 3 << 19;

/// The size of an engine's pool.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PoolSize {
    /// Connections at once: each has an instance.
    pub connections: usize,
    /// Stacks at once.
    ///
    /// More than connections: a guest that blocks in a call of the host leaves its stack there, and
    /// may need another one meanwhile.
    pub stacks: usize,
}

impl PoolSize {
    /// The instances at once. One more than connections, so that a new version can be tried without
    /// the slot of a connection.
    fn instances(self) -> usize {
        self.connections.saturating_add(1)
    }
}

/// The configuration of a pool with `slots` for each instance.
pub(super) fn config(
    size: PoolSize,
    slots: &Requirements,
    limits: &SharedLimits,
) -> PoolingAllocationConfig {
    let total = |per_instance: u32| {
        let total = size.instances().saturating_mul(per_instance as usize);
        u32::try_from(total).unwrap_or(u32::MAX)
    };
    // All memories of an instance share the resident part, as do all tables.
    let keep_resident = |slots: u32| KEEP_RESIDENT_BYTES / slots.max(1) as usize;
    let stacks = u32::try_from(size.stacks.saturating_add(2)).unwrap_or(u32::MAX);
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(total(1))
        .total_core_instances(total(MAX_CORE_INSTANCES))
        .max_core_instances_per_component(MAX_CORE_INSTANCES)
        .total_memories(total(slots.memories))
        .max_memories_per_component(slots.memories)
        .max_memories_per_module(slots.memories)
        .total_tables(total(slots.tables))
        .max_tables_per_component(slots.tables)
        .max_tables_per_module(slots.tables)
        .table_elements(MIN_TABLE_SLOT.max(slots.table_elements as usize))
        .total_stacks(stacks)
        .max_memory_size(limits.memory.next_multiple_of(WASM_PAGE_BYTES))
        .linear_memory_keep_resident(keep_resident(slots.memories))
        .table_keep_resident(keep_resident(slots.tables))
        .pagemap_scan(Enabled::Auto);
    pool
}

/// Metrics of the pool.
pub(super) struct PoolCollector {
    pub(super) wasmtime: wasmtime::Engine,
    pub(super) size: PoolSize,
}

impl fmt::Debug for PoolCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PoolCollector").finish_non_exhaustive()
    }
}

impl Collector for PoolCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let Some(pool) = self.wasmtime.pooling_allocator_metrics() else {
            return Ok(());
        };
        let gauges = [
            (
                "pool_instances",
                "Instances of guests in the pool: one for each connection",
                None,
                pool.component_instances() as i64,
            ),
            (
                "pool_instances_limit",
                "Instances of guests that the pool has room for",
                None,
                self.size.connections as i64,
            ),
            (
                "pool_stacks",
                "Stacks of guests in use",
                None,
                pool.stacks() as i64,
            ),
            (
                "pool_warm_memories",
                "Unused memories that still hold the image of their last guest",
                None,
                pool.unused_warm_memories() as i64,
            ),
            (
                "pool_resident",
                "Resident part of unused memories",
                Some(Unit::Bytes),
                pool.unused_memory_bytes_resident() as i64,
            ),
        ];
        for (name, help, unit, value) in gauges {
            let gauge = ConstGauge::new(value);
            let kind = gauge.metric_type();
            gauge.encode(encoder.encode_descriptor(name, help, unit.as_ref(), kind)?)?;
        }
        Ok(())
    }
}
