//! The store of one sandbox: the host's state, and the limits.

use std::sync::Arc;

use wasmtime::component::ResourceTable;
use wasmtime::{Store, UpdateDeadline};

use super::fairness::{self, EpochClock};
use super::grants::Grants;
use super::host_tcp::pending_send::PendingSend;
use super::host_wasi::contexts::WasiContexts;
use super::limits::{GuestLimits, LimitExceeded, MemoryBudget, MemoryLimiter};
use super::output::OutputLimit;
use super::transport::SharedTransport;
use crate::limit::Limit;
use crate::sync::lock;

/// The host's state of one instance.
pub(super) struct StoreState {
    pub(super) wasi: WasiContexts,
    /// The resources of the host that the guest has handles of.
    pub(super) table: ResourceTable,
    memory: MemoryLimiter,
    pub(super) clock: EpochClock,
    pub(super) transport: SharedTransport,
    pub(super) sending: PendingSend,
}

/// Makes the stores of an engine.
pub(super) struct StoreFactory {
    pub(super) wasmtime: wasmtime::Engine,
    pub(super) clock: EpochClock,
    /// The memory that all sandboxes share.
    pub(super) budget: Arc<MemoryBudget>,
}

/// The most entries that wasmtime keeps for each handle of the guest.
///
/// The resource itself, and the tasks that wait for it. The limit on handles is hit first.
const ENTRIES_PER_HANDLE: usize = 4;

impl StoreFactory {
    /// Makes a store for the guest of one connection.
    pub(super) fn store(
        &self,
        grants: &Grants,
        limits: &GuestLimits,
        transport: SharedTransport,
    ) -> Store<StoreState> {
        let id = lock(&transport).id();
        let mut table = ResourceTable::new();
        table.set_max_capacity(limits.open_files);
        let memory = MemoryLimiter::new(limits.memory, self.budget.clone(), transport.clone());
        let output = OutputLimit::new(limits.output, self.clock.clone(), transport.clone());
        let mut store = Store::new(
            &self.wasmtime,
            StoreState {
                wasi: WasiContexts::new(grants, id, output),
                table,
                memory,
                clock: self.clock.clone(),
                transport,
                sending: PendingSend::default(),
            },
        );
        store.limiter(|state| &mut state.memory);
        store.set_hostcall_fuel(limits.call_size);
        store.set_max_component_handles(limits.handles);
        if let Some(table) = store.concurrent_resource_table() {
            table.set_max_capacity(limits.handles.saturating_mul(ENTRIES_PER_HANDLE));
        }
        self.limit_cpu_time(&mut store, limits);
        store
    }

    /// Limits each turn of the guest, and its CPU time.
    ///
    /// The guest yields at the end of a turn, and traps when its CPU time is used up.
    fn limit_cpu_time(&self, store: &mut Store<StoreState>, limits: &GuestLimits) {
        let max_micros = limits.cpu_time.as_micros();
        let clock = self.clock.clone();
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(move |_| {
            if u128::from(fairness::cpu_time_micros(&clock)) > max_micros {
                return Err(LimitExceeded(Limit::CpuTime).into());
            }
            Ok(if fairness::turn_is_over(&clock) {
                UpdateDeadline::YieldCustom(1, Box::pin(fairness::yield_to_others(clock.clone())))
            } else {
                UpdateDeadline::Continue(1)
            })
        });
    }
}
