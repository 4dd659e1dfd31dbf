//! The services of a server.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::state::Service;

/// The present services of a server. Clones share one list.
#[derive(Clone, Default)]
pub struct Services(Arc<ArcSwap<Vec<Arc<Service>>>>);

impl Services {
    /// All services, in the order of the config file.
    pub fn list(&self) -> Arc<Vec<Arc<Service>>> {
        self.0.load_full()
    }

    /// The service with this name.
    pub fn get(&self, name: &str) -> Option<Arc<Service>> {
        let services = self.list();
        services
            .iter()
            .find(|service| service.name() == name)
            .cloned()
    }

    /// Replaces the whole list.
    pub fn set(&self, services: Vec<Arc<Service>>) {
        self.0.store(Arc::new(services));
    }
}
