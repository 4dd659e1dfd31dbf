//! What one sandbox may use, and all of them together.

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

use super::{SharedTransport, lock};
use crate::limit::Limit;

/// What a sandbox may use. The defaults are those of the command line, where each has its reason.
#[derive(Clone, Debug, PartialEq)]
pub struct GuestLimits {
    /// Its linear memories and tables together, in bytes.
    pub memory: usize,
    /// For how long it may compute. Waiting does not count.
    pub cpu_time: Duration,
    /// Its handles of resources, streams, futures and tasks that are live at once.
    pub handles: usize,
    /// What it has open of the host at once: files, directories, streams of them.
    pub open_files: usize,
    /// What it may hand to the host in one call, in bytes.
    pub call_size: usize,
    /// What is logged of its standard output, and of its standard error, in bytes.
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

/// What all sandboxes of an engine may use, whatever each may.
#[derive(Clone, Debug, PartialEq)]
pub struct SharedLimits {
    /// The most that any of them may have of memory ([`Limits::memory`]), in bytes.
    pub memory: usize,
    /// What they may take together beyond [`FREE_MEMORY`] each, in bytes.
    pub total_memory: usize,
    /// The call stack of each, in bytes.
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

/// What a sandbox may take of memory, in bytes, without its being counted among that of all.
///
/// Most guests never ask for more than they start with, and touch little of that.
pub const FREE_MEMORY: usize = 1 << 20;

/// The memory that all sandboxes may take beyond what is free to each.
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

    /// What is taken of it, in bytes.
    fn taken(&self) -> usize {
        self.bytes - self.left.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: usize) -> bool {
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

/// Adds to `registry` what is taken of `budget`.
pub(super) fn register(budget: Arc<MemoryBudget>, registry: &mut Registry) {
    registry.register_collector(Box::new(BudgetCollector(budget)));
}

struct BudgetCollector(Arc<MemoryBudget>);

impl fmt::Debug for BudgetCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Taken").finish_non_exhaustive()
    }
}

impl Collector for BudgetCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let gauge = ConstGauge::new(self.0.taken() as i64);
        let metric = encoder.encode_descriptor(
            "guests_memory",
            "Memory of all guests, beyond the first MiB of each",
            Some(&Unit::Bytes),
            gauge.metric_type(),
        )?;
        gauge.encode(metric)
    }
}

/// Counts the memory of one sandbox.
pub(super) struct MemoryLimiter {
    used: usize,
    most: usize,
    /// What was taken from the budget of all.
    taken: usize,
    budget: Arc<MemoryBudget>,
    transport: SharedTransport,
}

impl MemoryLimiter {
    pub(super) fn new(most: usize, budget: Arc<MemoryBudget>, transport: SharedTransport) -> Self {
        Self {
            used: 0,
            most,
            taken: 0,
            budget,
            transport,
        }
    }

    /// Whether the sandbox may have so many bytes more.
    fn grow(&mut self, bytes: usize) -> bool {
        match self.refusal(bytes) {
            None => {
                lock(&self.transport).has_memory(self.used);
                true
            }
            Some(limit) => {
                lock(&self.transport).limit_hit(limit);
                false
            }
        }
    }

    fn refusal(&mut self, bytes: usize) -> Option<Limit> {
        let used = self.used.saturating_add(bytes);
        if used > self.most {
            return Some(Limit::MaxMemory);
        }
        let counted = used.saturating_sub(FREE_MEMORY);
        if !self.budget.take(counted - self.taken) {
            return Some(Limit::MaxTotalMemory);
        }
        self.used = used;
        self.taken = counted;
        None
    }
}

impl Drop for MemoryLimiter {
    fn drop(&mut self) {
        self.budget.give_back(self.taken);
    }
}

/// Whether a memory or table may have this size by its own declaration. It is refused if not, and
/// nothing is to be counted.
fn may_be(desired: usize, maximum: Option<usize>) -> bool {
    maximum.is_none_or(|maximum| desired <= maximum)
}

impl ResourceLimiter for MemoryLimiter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        Ok(may_be(desired, maximum) && self.grow(desired - current))
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        // An element is a pointer.
        let bytes = (desired - current).saturating_mul(size_of::<usize>());
        Ok(may_be(desired, maximum) && self.grow(bytes))
    }
}

/// Why a guest was stopped, when it was for a limit.
#[derive(Debug)]
pub(super) struct LimitExceeded(pub(super) Limit);

impl fmt::Display for LimitExceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the limit {} was met", self.0)
    }
}

impl std::error::Error for LimitExceeded {}

/// The limit that a call of a guest ended for.
pub(super) fn of_error(error: &wasmtime::Error) -> Option<Limit> {
    if let Some(LimitExceeded(limit)) = error.downcast_ref() {
        return Some(*limit);
    }
    if let Some(wasmtime::Trap::StackOverflow) = error.downcast_ref() {
        return Some(Limit::Stack);
    }
    // The host's things: what wasmtime keeps of a guest's own is bounded by its handles first.
    if let Some(ResourceTableError::Full) = error.downcast_ref() {
        return Some(Limit::MaxOpenFiles);
    }
    // These have no type that is public. Tests meet both.
    let text = error.root_cause().to_string();
    if text.contains("store handle limit exceeded") {
        return Some(Limit::MaxHandles);
    }
    if text.contains("fuel allocated for hostcalls has been exhausted") {
        return Some(Limit::MaxCallSize);
    }
    None
}
