//! The engine that all sandboxes share: its pool of instance slots, its linker and its clock.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use tracing::warn;
use wasmtime::component::{Component, HasData, Linker, ResourceTable};
use wasmtime::{
    Config, Enabled, InstanceAllocationStrategy, PoolingAllocationConfig, WasmBacktraceDetails,
};
use wasmtime_wasi::{p2, p3};

use super::cache::{self, Cache};
use super::digest::Digest;
use super::fairness::EpochClock;
use super::limits::{self, MemoryBudget, SharedLimits};
use super::requirements::{MAX_CORE_INSTANCES, Requirements};
use super::{StoreState, host_network, host_tcp};
use crate::Error;

/// How much of what a guest has written to stays in memory and is written over with zeros when its
/// slot is used again, in bytes. What is beyond goes back to the kernel, which costs system calls
/// and page faults on the next use. Several times what a guest of a small protocol writes to; too
/// little for the slots that hostile guests have filled to add up to much.
const KEEP_RESIDENT_BYTES: usize = 256 << 10;

/// The stack that the host's own functions have beyond a guest's, in bytes.
pub const HOST_STACK_BYTES: usize = 3 << 19;

/// The elements that a table can have, unless it begins with more. wasmtime's own default.
pub(super) const TABLE_ELEMENTS: usize = 20_000;

/// A page of WebAssembly.
const WASM_PAGE_BYTES: usize = 64 << 10;

/// The room in the pool of an engine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PoolSize {
    /// Instances at once.
    pub connections: usize,
    /// Stacks at once: more than connections, for a guest that blocks in a call of the host leaves
    /// its stack there, and may need another one meanwhile.
    pub stacks: usize,
}

/// Makes sandboxes of guests. Clones share one.
#[derive(Clone)]
pub struct Engine(Arc<Inner>);

struct Inner {
    wasmtime: wasmtime::Engine,
    linker: Linker<StoreState>,
    clock: EpochClock,
    limits: SharedLimits,
    budget: Arc<MemoryBudget>,
    cache: Option<Cache>,
    /// What its code is known by in the cache.
    key: String,
    room: Requirements,
    /// How many there may be at once.
    instances: usize,
    /// Stops when the last clone is dropped.
    _ticker: Ticker,
}

impl Engine {
    /// Makes an engine with `room` for guests with such `needs`, all within `limits`. What it
    /// compiles is kept in `cache`.
    ///
    /// # Errors
    ///
    /// [`Error::Pool`] when the system does not let us have the address space.
    pub fn new(
        room: PoolSize,
        needs: &Requirements,
        limits: SharedLimits,
        cache: Option<Cache>,
    ) -> Result<Self, Error> {
        let needs = needs.with_room_for_others();
        let wasmtime = wasmtime::Engine::new(&config(room, &needs, &limits))
            .map_err(|error| Error::pool(room.connections, error))?;
        let linker =
            linker(&wasmtime).map_err(|error| Error::internal("linking the host", error))?;
        let clock = EpochClock::default();
        let ticker = Ticker::start(wasmtime.clone(), clock.clone());
        Ok(Self(Arc::new(Inner {
            key: cache::key(&wasmtime),
            cache,
            room: needs,
            instances: room.connections,
            wasmtime,
            linker,
            clock,
            budget: Arc::new(MemoryBudget::new(limits.total_memory)),
            limits,
            _ticker: ticker,
        })))
    }

    /// Adds to `registry` what the sandboxes take together.
    pub fn register(&self, registry: &mut Registry) {
        limits::register(self.budget().clone(), registry);
        registry.register_collector(Box::new(PoolCollector(self.clone())));
    }

    pub(super) fn wasmtime(&self) -> &wasmtime::Engine {
        &self.0.wasmtime
    }

    pub(super) fn clock(&self) -> &EpochClock {
        &self.0.clock
    }

    pub(super) fn limits(&self) -> &SharedLimits {
        &self.0.limits
    }

    /// What was kept of a component's compiled code.
    pub(super) fn cached(&self, component: &Digest) -> Option<Vec<u8>> {
        self.0.cache.as_ref()?.get(component, &self.0.key)
    }

    /// Keeps the compiled code of a component, where it is to be kept.
    pub(super) fn keep(&self, component: &Digest, compiled: &Component) {
        if let Some(cache) = &self.0.cache {
            match compiled.serialize() {
                Ok(code) => cache.put(component, &self.0.key, &code),
                Err(error) => warn!(%error, "a compiled guest cannot be written down"),
            }
        }
    }

    /// What there is for each instance.
    pub(super) fn pool_requirements(&self) -> &Requirements {
        &self.0.room
    }

    /// The memory that the sandboxes share.
    pub(super) fn budget(&self) -> &Arc<MemoryBudget> {
        &self.0.budget
    }

    pub(super) fn linker(&self) -> &Linker<StoreState> {
        &self.0.linker
    }
}

/// What is in use of the pool, for the metrics.
struct PoolCollector(Engine);

impl fmt::Debug for PoolCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pool").finish_non_exhaustive()
    }
}

impl Collector for PoolCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let Some(pool) = self.0.wasmtime().pooling_allocator_metrics() else {
            return Ok(());
        };
        let gauges = [
            (
                "pool_instances",
                "Instances of guests in the pool, of which there is one for each connection",
                None,
                pool.component_instances() as i64,
            ),
            (
                "pool_instances_limit",
                "Instances of guests that the pool has room for",
                None,
                self.0.0.instances as i64,
            ),
            (
                "pool_stacks",
                "Stacks of guests in use",
                None,
                pool.stacks() as i64,
            ),
            (
                "pool_warm_memories",
                "Memories that nobody uses and that still have what the last guest had for an image",
                None,
                pool.unused_warm_memories() as i64,
            ),
            (
                "pool_resident",
                "What stays resident of memories that nobody uses",
                Some(Unit::Bytes),
                pool.unused_memory_bytes_resident() as i64,
            ),
        ];
        for (name, help, unit, figure) in gauges {
            let gauge = ConstGauge::new(figure);
            let kind = gauge.metric_type();
            gauge.encode(encoder.encode_descriptor(name, help, unit.as_ref(), kind)?)?;
        }
        Ok(())
    }
}

fn config(room: PoolSize, needs: &Requirements, limits: &SharedLimits) -> Config {
    // One more, for a version that is tried before it is served: it is not to wait for a place of a
    // connection, nor to take one.
    let instances = room.connections.saturating_add(1);
    let slots =
        |each: u32| u32::try_from(instances.saturating_mul(each as usize)).unwrap_or(u32::MAX);
    // Of all memories of a sandbox together, and of all its tables.
    let each = |number: u32| number.max(1) as usize;
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(slots(1))
        .total_core_instances(slots(MAX_CORE_INSTANCES))
        .max_core_instances_per_component(MAX_CORE_INSTANCES)
        .total_memories(slots(needs.memories))
        .max_memories_per_component(needs.memories)
        .max_memories_per_module(needs.memories)
        .total_tables(slots(needs.tables))
        .max_tables_per_component(needs.tables)
        .max_tables_per_module(needs.tables)
        .table_elements(TABLE_ELEMENTS.max(needs.table_elements as usize))
        .total_stacks(u32::try_from(room.stacks.saturating_add(2)).unwrap_or(u32::MAX))
        .max_memory_size(limits.memory.next_multiple_of(WASM_PAGE_BYTES))
        .linear_memory_keep_resident(KEEP_RESIDENT_BYTES / each(needs.memories))
        .table_keep_resident(KEEP_RESIDENT_BYTES / each(needs.tables))
        .pagemap_scan(Enabled::Auto);
    let mut config = Config::new();
    config
        .wasm_component_model_async(true)
        .epoch_interruption(true)
        .max_wasm_stack(limits.stack)
        .async_stack_size(limits.stack + HOST_STACK_BYTES)
        .wasm_backtrace_details(WasmBacktraceDetails::Enable)
        .allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    config
}

/// Links what the world `wasinetd:tcp/connection-handler` lists, and `wasi:sockets` for guests that
/// may connect somewhere. A guest that imports anything more is refused when it is loaded.
fn linker(engine: &wasmtime::Engine) -> wasmtime::Result<Linker<StoreState>> {
    let mut linker = Linker::new(engine);
    host_tcp::add_to_linker(&mut linker)?;
    link_p2(&mut linker)?;
    host_network::add_to_linker(&mut linker)?;
    p3::cli::add_to_linker(&mut linker)?;
    p3::clocks::add_to_linker(&mut linker)?;
    p3::filesystem::add_to_linker(&mut linker)?;
    p3::random::add_to_linker(&mut linker)?;
    Ok(linker)
}

fn link_p2(linker: &mut Linker<StoreState>) -> wasmtime::Result<()> {
    use p2::bindings::{cli, clocks, filesystem, io, random};
    use wasmtime_wasi::cli::{WasiCli, WasiCliView};
    use wasmtime_wasi::clocks::{WasiClocks, WasiClocksView};
    use wasmtime_wasi::filesystem::{WasiFilesystem, WasiFilesystemView};
    use wasmtime_wasi::random::{WasiRandom, WasiRandomView};

    io::error::add_to_linker::<StoreState, Table>(linker, |state| &mut state.table)?;
    io::poll::add_to_linker::<StoreState, Table>(linker, |state| &mut state.table)?;
    io::streams::add_to_linker::<StoreState, Table>(linker, |state| &mut state.table)?;
    cli::environment::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::exit::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::stdin::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::stdout::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::stderr::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::terminal_input::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::terminal_output::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::terminal_stdin::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::terminal_stdout::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::terminal_stderr::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    clocks::monotonic_clock::add_to_linker::<StoreState, WasiClocks>(linker, StoreState::clocks)?;
    clocks::wall_clock::add_to_linker::<StoreState, WasiClocks>(linker, StoreState::clocks)?;
    filesystem::types::add_to_linker::<StoreState, WasiFilesystem>(linker, StoreState::filesystem)?;
    filesystem::preopens::add_to_linker::<StoreState, WasiFilesystem>(
        linker,
        StoreState::filesystem,
    )?;
    random::random::add_to_linker::<StoreState, WasiRandom>(linker, StoreState::random)?;
    random::insecure::add_to_linker::<StoreState, WasiRandom>(linker, StoreState::random)?;
    random::insecure_seed::add_to_linker::<StoreState, WasiRandom>(linker, StoreState::random)?;
    Ok(())
}

/// How `wasi:io` gets at what it works on.
struct Table;

impl HasData for Table {
    type Data<'a> = &'a mut ResourceTable;
}

/// Advances the epoch of an engine, on a thread that ends when this is dropped.
struct Ticker {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    fn start(engine: wasmtime::Engine, clock: EpochClock) -> Self {
        let (stop, stopped) = mpsc::channel();
        let thread = thread::spawn(move || {
            let mut last = Instant::now();
            while stopped.recv_timeout(clock.due()) == Err(RecvTimeoutError::Timeout) {
                let now = Instant::now();
                // First: a guest that sees the epoch looks at the clock.
                clock.tick(now - last);
                last = now;
                engine.increment_epoch();
            }
        });
        Self {
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It has nothing to panic over, and nothing depends on it any more.
            let _ = thread.join();
        }
    }
}
