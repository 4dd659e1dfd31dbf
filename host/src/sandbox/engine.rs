//! The engine that all sandboxes share.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use prometheus_client::registry::Registry;
use tracing::warn;
use wasmtime::component::{Component, Linker};
use wasmtime::{Config, InstanceAllocationStrategy, WasmBacktraceDetails};

use super::cache::{self, Cache};
use super::digest::Digest;
use super::fairness::EpochClock;
use super::limits::{self, MemoryBudget, SharedLimits};
use super::linker::linker;
use super::pool::{self, HOST_STACK_BYTES, PoolCollector, PoolSize};
use super::requirements::Requirements;
use super::store::{StoreFactory, StoreState};

/// Makes sandboxes of guests. Clones share one engine.
#[derive(Clone)]
pub struct Engine(Arc<Inner>);

struct Inner {
    stores: StoreFactory,
    linker: Linker<StoreState>,
    limits: SharedLimits,
    cache: Option<Cache>,
    /// Identifies the code of this engine in the cache.
    cache_key: String,
    size: PoolSize,
    /// The slots of the pool for each instance.
    slots: Requirements,
    /// Stops when the last clone is dropped.
    _ticker: Ticker,
}

/// Why an engine cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The system does not provide the address space of the pool.
    #[error("cannot reserve address space for {connections} sandboxes: {reason}")]
    Pool {
        /// The number of connections that the pool is for.
        connections: usize,
        /// The error of the system.
        reason: String,
    },
    /// The host's interfaces cannot be linked: a bug of the host.
    #[error("cannot link the host's interfaces: {0}")]
    Link(String),
}

impl Engine {
    /// Makes an engine for guests of these `requirements`.
    ///
    /// All guests stay within `limits`. `cache` keeps their compiled code.
    ///
    /// # Errors
    ///
    /// [`EngineError::Pool`] if the system does not provide the address space.
    pub fn new(
        size: PoolSize,
        requirements: &Requirements,
        limits: SharedLimits,
        cache: Option<Cache>,
    ) -> Result<Self, EngineError> {
        let slots = requirements.with_spare_slots();
        let wasmtime = wasmtime::Engine::new(&config(size, &slots, &limits)).map_err(|error| {
            EngineError::Pool {
                connections: size.connections,
                reason: format!("{error:#}"),
            }
        })?;
        let linker = linker(&wasmtime).map_err(|error| EngineError::Link(format!("{error:#}")))?;
        let clock = EpochClock::default();
        Ok(Self(Arc::new(Inner {
            linker,
            cache,
            cache_key: cache::key(&wasmtime),
            size,
            slots,
            _ticker: Ticker::start(wasmtime.clone(), clock.clone()),
            stores: StoreFactory {
                wasmtime,
                clock,
                budget: Arc::new(MemoryBudget::new(limits.total_memory)),
            },
            limits,
        })))
    }

    /// Adds metrics of all sandboxes together to `registry`.
    pub fn register(&self, registry: &mut Registry) {
        limits::register(self.0.stores.budget.clone(), registry);
        registry.register_collector(Box::new(PoolCollector {
            wasmtime: self.wasmtime().clone(),
            size: self.0.size,
        }));
    }

    pub(super) fn wasmtime(&self) -> &wasmtime::Engine {
        &self.0.stores.wasmtime
    }

    pub(super) fn clock(&self) -> &EpochClock {
        &self.0.stores.clock
    }

    pub(super) fn stores(&self) -> &StoreFactory {
        &self.0.stores
    }

    pub(super) fn linker(&self) -> &Linker<StoreState> {
        &self.0.linker
    }

    pub(super) fn limits(&self) -> &SharedLimits {
        &self.0.limits
    }

    /// The slots of the pool for each instance.
    pub(super) fn slots(&self) -> &Requirements {
        &self.0.slots
    }

    /// The compiled code of a component from the cache. None if the cache has no usable code.
    pub(super) fn cached(&self, digest: &Digest) -> Option<Component> {
        let code = self.0.cache.as_ref()?.get(digest, &self.0.cache_key)?;
        // SAFETY: an engine of the same configuration has written this code: the key is a hash of
        // that configuration. The cache has checked that the code is unchanged, and that only this
        // user can write to the directory.
        match unsafe { Component::deserialize(self.wasmtime(), code) } {
            Ok(component) => Some(component),
            Err(error) => {
                warn!(%error, "the cached code of a guest does not fit; it is compiled again");
                None
            }
        }
    }

    /// Puts the compiled code of a component into the cache.
    ///
    /// Does nothing without a cache.
    pub(super) fn cache(&self, digest: &Digest, component: &Component) {
        if let Some(cache) = &self.0.cache {
            match component.serialize() {
                Ok(code) => cache.put(digest, &self.0.cache_key, &code),
                Err(error) => warn!(%error, "cannot serialize the compiled code of a guest"),
            }
        }
    }
}

fn config(size: PoolSize, slots: &Requirements, limits: &SharedLimits) -> Config {
    let mut config = Config::new();
    config
        .wasm_component_model_async(true)
        // No guest gets a garbage-collected heap, which exceptions need as well, or shared memory,
        // on which it could block a thread of the host.
        .gc_support(false)
        .wasm_exceptions(false)
        .wasm_threads(false)
        .epoch_interruption(true)
        .max_wasm_stack(limits.stack)
        .async_stack_size(limits.stack + HOST_STACK_BYTES)
        .wasm_backtrace_details(WasmBacktraceDetails::Enable)
        .allocation_strategy(InstanceAllocationStrategy::Pooling(pool::config(
            size, slots, limits,
        )));
    config
}

/// The thread that advances the epoch of an engine.
///
/// The thread ends when this is dropped.
struct Ticker {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    fn start(engine: wasmtime::Engine, clock: EpochClock) -> Self {
        let (stop, stopped) = mpsc::channel();
        let thread = thread::spawn(move || {
            let mut last = Instant::now();
            while stopped.recv_timeout(clock.next_tick()) == Err(RecvTimeoutError::Timeout) {
                let now = Instant::now();
                // The clock first: a guest that notices the new epoch reads the clock.
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
            // The thread has no reason to panic, and nothing depends on it any more.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An engine as the server has it, for one connection.
    fn engine() -> wasmtime::Engine {
        let size = PoolSize {
            connections: 1,
            stacks: 2,
        };
        let slots = Requirements::default().with_spare_slots();
        wasmtime::Engine::new(&config(size, &slots, &SharedLimits::default())).unwrap()
    }

    #[test]
    fn threads_exceptions_and_garbage_collection_are_refused() {
        let engine = engine();
        for (code, reason) in [
            ("(memory 1 1 shared)", "threads"),
            (
                "(memory 1) (func (drop (memory.atomic.notify (i32.const 0) (i32.const 0))))",
                "threads",
            ),
            ("(tag)", "exceptions"),
            ("(table 1 externref)", "gc"),
            ("(type (struct))", "gc"),
        ] {
            let component = format!("(component (core module {code}))");
            let error = Component::new(&engine, wat::parse_str(component).unwrap())
                .err()
                .unwrap_or_else(|| panic!("{code} is accepted"));
            assert!(format!("{error:#}").contains(reason), "{code}: {error:#}");
        }
    }
}
