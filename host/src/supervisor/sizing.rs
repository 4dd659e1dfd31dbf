//! Needs of all guests together, and the engine that meets them.

use crate::capacity::{self, Plan};
use crate::config::LoadedService;
use crate::config::model::HandlerConfig;
use crate::sandbox::{Cache, Engine, EngineError, Requirements, SharedLimits};

/// Limits, requirements and the capacity plan for a set of guests.
pub struct Sizing {
    /// Limits that all guests share.
    pub limits: SharedLimits,
    /// Pool slots for one instance of any of the guests.
    pub requirements: Requirements,
    /// How many instances fit on this machine.
    pub plan: Plan,
}

impl Sizing {
    /// For all services of a server. `limits` makes the shared limits from the memory of the machine and
    /// the largest memory limit of a guest, both in bytes.
    pub fn of_services(
        services: &[LoadedService],
        limits: impl FnOnce(usize, usize) -> SharedLimits,
    ) -> Self {
        let none = Requirements::default();
        let requirements = services
            .iter()
            .fold(none, |all, service| all.or(&service.requirements));
        let handlers = services.iter().map(|service| &service.config.handler);
        let memory = handlers.clone().map(|handler| handler.guest_limits.memory);
        let open_files = handlers.map(HandlerConfig::open_files);
        let limits = limits(capacity::memory(), memory.max().unwrap_or(0));
        Self::new(limits, requirements, open_files.max().unwrap_or(0))
    }

    /// For one guest, which may open files.
    pub fn of_guest(
        handler: &HandlerConfig,
        requirements: Requirements,
        limits: impl FnOnce(usize, usize) -> SharedLimits,
    ) -> Self {
        let guest = &handler.guest_limits;
        let limits = limits(capacity::memory(), guest.memory);
        Self::new(limits, requirements, guest.open_files)
    }

    fn new(limits: SharedLimits, requirements: Requirements, open_files: usize) -> Self {
        Self {
            plan: Plan::new(&requirements, limits.stack, open_files),
            limits,
            requirements,
        }
    }

    /// An engine with room for `connections` instances.
    ///
    /// # Errors
    ///
    /// Fails if the address space for them cannot be reserved.
    pub fn engine(&self, connections: usize, cache: Option<Cache>) -> Result<Engine, EngineError> {
        let size = self.plan.pool_size(connections);
        Engine::new(size, &self.requirements, self.limits.clone(), cache)
    }
}
