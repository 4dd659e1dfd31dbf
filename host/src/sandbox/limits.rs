//! Limits of one sandbox, and of all sandboxes together.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use wasmtime::ResourceLimiter;
use wasmtime::component::ResourceTableError;

use super::transport::SharedTransport;
use crate::limit::Limit;
use crate::sync::lock;

/// Limits of one sandbox. The command line has the same defaults and the reason for each.
#[derive(Clone, Debug, PartialEq)]
pub struct GuestLimits {
    /// The linear memories and tables together, in bytes.
    pub memory: usize,
    /// The CPU time. Waiting does not count.
    pub cpu_time: Duration,
    /// Live handles: resources, streams, futures and tasks.
    pub handles: usize,
    /// Open resources of the host: files, directories, sockets, and streams of them.
    pub open_files: usize,
    /// The data passed to the host in one call, in bytes.
    pub call_size: usize,
    /// The logged part of standard output, and of standard error, in bytes.
    pub output: usize,
}

impl Default for GuestLimits {
    fn default() -> Self {
        Self {
            memory: 64 << 20,
            cpu_time: Duration::from_secs(30),
            handles: 1024,
            open_files: 32,
            call_size: 1 << 20,
            output: 64 << 10,
        }
    }
}

/// Limits of all sandboxes of an engine.
#[derive(Clone, Debug, PartialEq)]
pub struct SharedLimits {
    /// The highest [`GuestLimits::memory`] that any sandbox may have, in bytes.
    pub memory: usize,
    /// The memory of all sandboxes beyond [`FREE_MEMORY`] each, in bytes.
    pub total_memory: usize,
    /// The call stack of each sandbox, in bytes.
    pub stack: usize,
}

impl Default for SharedLimits {
    fn default() -> Self {
        Self {
            memory: GuestLimits::default().memory,
            total_memory: usize::MAX,
            stack: 512 << 10,
        }
    }
}

/// The memory of each sandbox that the shared limit ignores, in bytes.
///
/// Only memory beyond this counts towards [`SharedLimits::total_memory`]. Most guests never grow
/// beyond their initial memory, and touch little of that.
pub const FREE_MEMORY: usize = 1 << 20;

/// The memory that all sandboxes share, beyond [`FREE_MEMORY`] each.
pub(super) struct MemoryBudget {
    bytes: usize,
    left: AtomicUsize,
}

impl MemoryBudget {
    pub(super) fn new(bytes: usize) -> Self {
        Self {
            bytes,
            left: AtomicUsize::new(bytes),
        }
    }

    /// The part in use, in bytes.
    fn used(&self) -> usize {
        self.bytes - self.left.load(Ordering::Relaxed)
    }

    /// Takes `bytes` if they are left.
    fn try_take(&self, bytes: usize) -> bool {
        self.left
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(bytes)
            })
            .is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.left.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Adds a gauge of the used part of `budget` to `registry`.
pub(super) fn register(budget: Arc<MemoryBudget>, registry: &mut Registry) {
    registry.register_collector(Box::new(BudgetCollector(budget)));
}

struct BudgetCollector(Arc<MemoryBudget>);

impl fmt::Debug for BudgetCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BudgetCollector").finish_non_exhaustive()
    }
}

impl Collector for BudgetCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let gauge = ConstGauge::new(self.0.used() as i64);
        let metric = encoder.encode_descriptor(
            "guests_memory",
            "Memory of all guests, beyond the first MiB of each",
            Some(&Unit::Bytes),
            gauge.metric_type(),
        )?;
        gauge.encode(metric)
    }
}

/// Counts and limits the memory of one sandbox.
pub(super) struct MemoryLimiter {
    used: usize,
    max: usize,
    /// The part of `used` that was taken from the budget.
    from_budget: usize,
    budget: Arc<MemoryBudget>,
    transport: SharedTransport,
}

impl MemoryLimiter {
    pub(super) fn new(max: usize, budget: Arc<MemoryBudget>, transport: SharedTransport) -> Self {
        Self {
            used: 0,
            max,
            from_budget: 0,
            budget,
            transport,
        }
    }

    /// Grants the sandbox `bytes` more, unless a limit forbids them.
    fn grow(&mut self, bytes: usize) -> bool {
        match self.try_grow(bytes) {
            Ok(()) => {
                lock(&self.transport).has_memory(self.used);
                true
            }
            Err(limit) => {
                lock(&self.transport).limit_hit(limit);
                false
            }
        }
    }

    fn try_grow(&mut self, bytes: usize) -> Result<(), Limit> {
        let used = self.used.saturating_add(bytes);
        if used > self.max {
            return Err(Limit::MaxMemory);
        }
        let from_budget = used.saturating_sub(FREE_MEMORY);
        if !self.budget.try_take(from_budget - self.from_budget) {
            return Err(Limit::MaxTotalMemory);
        }
        self.used = used;
        self.from_budget = from_budget;
        Ok(())
    }
}

impl Drop for MemoryLimiter {
    fn drop(&mut self) {
        self.budget.give_back(self.from_budget);
    }
}

/// Whether a memory or table stays within its own maximum.
///
/// wasmtime refuses a growth beyond that maximum later, so the growth must not be counted.
fn within_type(desired: usize, maximum: Option<usize>) -> bool {
    maximum.is_none_or(|maximum| desired <= maximum)
}

impl ResourceLimiter for MemoryLimiter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        Ok(within_type(desired, maximum) && self.grow(desired - current))
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        // An element of a table is a pointer.
        let bytes = (desired - current).saturating_mul(size_of::<usize>());
        Ok(within_type(desired, maximum) && self.grow(bytes))
    }
}

/// The error that stops a guest at a limit.
#[derive(Debug)]
pub(super) struct LimitExceeded(pub(super) Limit);

impl fmt::Display for LimitExceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the guest exceeded the limit {}", self.0)
    }
}

impl std::error::Error for LimitExceeded {}

/// The limit that ended a call of a guest with this error. None if the error has another cause.
pub(super) fn limit_of_error(error: &wasmtime::Error) -> Option<Limit> {
    if let Some(LimitExceeded(limit)) = error.downcast_ref() {
        return Some(*limit);
    }
    if let Some(wasmtime::Trap::StackOverflow) = error.downcast_ref() {
        return Some(Limit::Stack);
    }
    // Our own resource table is full. wasmtime's table of a guest's own handles never fills up: the
    // limit on handles comes first.
    if let Some(ResourceTableError::Full) = error.downcast_ref() {
        return Some(Limit::MaxOpenFiles);
    }
    // wasmtime has no public type for these two errors. Integration tests cause both, and fail if a
    // new version of wasmtime words them differently.
    let text = error.root_cause().to_string();
    if text.contains("store handle limit exceeded") {
        return Some(Limit::MaxHandles);
    }
    if text.contains("fuel allocated for hostcalls has been exhausted") {
        return Some(Limit::MaxCallSize);
    }
    None
}
