//! The supervisor: the running services, and what others ask about them.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tracing::{info, warn};

use super::apply::{self, AppliedChanges};
use super::error::ReloadError;
use super::plan::{self, ReadyService};
use super::resources::{ShardGroup, SharedResources};
use super::running::{
    DrainingEndpoint, FileChange, RunningService, SupervisorState, watched_files,
};
use crate::config::limit_values::limit_values;
use crate::config::{LoadedService, Mistake};
use crate::connection::tls::Tls;
use crate::lifecycle::Lifecycle;
use crate::limit::Limit;
use crate::listener::ListeningSockets;
use crate::net::ListenAddress;
use crate::service::{Service, Services, SwapLock};
use crate::sync::lock;
use crate::upgrade::{HandedOver, HandedOverSocket};

/// Time for the last clients of an address that a reload wants back. Handshakes take no longer.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(3);

/// Interval of looks at such an address. Arbitrary.
const RELEASE_INTERVAL: Duration = Duration::from_millis(10);

/// Runs the services of a server.
pub struct Supervisor {
    shared: SharedResources,
    services: Services,
    state: Mutex<SupervisorState>,
}

/// A configuration was not applied. Nothing has changed.
pub(super) enum ApplyError {
    /// Mistakes in the config file.
    Mistakes(Vec<Mistake>),
    /// Another reason.
    Other(ReloadError),
}

impl From<ReloadError> for ApplyError {
    fn from(error: ReloadError) -> Self {
        Self::Other(error)
    }
}

impl Supervisor {
    /// Serves `ready` on the threads of `groups`.
    ///
    /// Call it within the runtime of the control thread.
    pub(super) fn new(
        shared: SharedResources,
        groups: Vec<ShardGroup>,
        services: Services,
        ready: Vec<ReadyService>,
    ) -> Result<Self, ReloadError> {
        let mut state = SupervisorState {
            groups: Some(groups),
            services: Vec::new(),
            retiring: Vec::new(),
            draining: Vec::new(),
        };
        apply::commit(&shared, &mut state, &services, ready)?;
        Ok(Self {
            shared,
            services,
            state: Mutex::new(state),
        })
    }

    /// Makes the running services equal to `wanted`. Open connections go on. One call at a time.
    ///
    /// # Errors
    ///
    /// Nothing has changed then.
    pub(super) async fn apply_config(
        &self,
        wanted: Vec<LoadedService>,
    ) -> Result<AppliedChanges, ApplyError> {
        self.wait_for_released_addresses(&wanted).await;
        let mut mistakes = Vec::new();
        let mut ready = Vec::new();
        let plans = plan::plan(&lock(&self.state), wanted, &mut mistakes)?;
        for plan in plans {
            let line = plan.loaded.config.origin.line_of("guest");
            match ReadyService::at_reload(&self.shared, plan).await {
                Ok(service) => ready.push(service),
                Err(error) => mistakes.push(Mistake {
                    line,
                    text: format!("guest: {error}"),
                }),
            }
        }
        if !mistakes.is_empty() {
            return Err(ApplyError::Mistakes(mistakes));
        }
        let changes = {
            let mut state = lock(&self.state);
            apply::commit(&self.shared, &mut state, &self.services, ready)?
        };
        for (service, address) in &changes.listening {
            info!(service, %address, "listening");
        }
        for service in &changes.reuse_port_pending {
            let fix = "stop and start the server";
            warn!(service, fix, "a change of reuse-port has no effect yet");
        }
        Ok(changes)
    }

    /// Waits for the last clients of released addresses that are wanted again.
    async fn wait_for_released_addresses(&self, wanted: &[LoadedService]) {
        let is_wanted = |endpoint: &DrainingEndpoint| {
            let addresses = wanted.iter().flat_map(|one| &one.config.listener.addresses);
            let mut addresses = addresses;
            let is_wanted = addresses.any(|address| address.is_taken_by(&endpoint.asked));
            is_wanted && endpoint.controller.is_observed()
        };
        let released = async {
            while lock(&self.state).draining.iter().any(is_wanted) {
                tokio::time::sleep(RELEASE_INTERVAL).await;
            }
        };
        // After the timeout the address counts as taken, and the error says so.
        let _ = tokio::time::timeout(RELEASE_TIMEOUT, released).await;
    }

    /// All addresses that clients can connect to, each with the name of its service.
    pub fn addresses(&self) -> Vec<(String, ListenAddress)> {
        self.of_services(|running| {
            let endpoints = running.endpoints.iter();
            endpoints
                .map(|endpoint| {
                    let address = endpoint.listening.address.clone();
                    (running.config.name.clone(), address)
                })
                .collect()
        })
    }

    /// Names of all services.
    pub(super) fn names(&self) -> Vec<String> {
        self.of_services(|running| vec![running.config.name.clone()])
    }

    /// All files to watch.
    pub(super) fn watched_files(&self) -> Vec<(FileChange, PathBuf)> {
        self.of_services(|running| watched_files(&running.config, running.tls.as_deref()))
    }

    /// TLS of the service with this name, or of all services.
    pub(super) fn tls_of(&self, name: Option<&str>) -> Vec<Arc<Tls>> {
        self.of_services(|running| {
            let is_meant = name.is_none_or(|name| running.config.name == name);
            running
                .tls
                .clone()
                .filter(|_| is_meant)
                .into_iter()
                .collect()
        })
    }

    /// The value of each limit of each service.
    pub fn limits(&self) -> Vec<(String, Vec<(Limit, String)>)> {
        self.of_services(|running| {
            let config = &running.config;
            let most = self.shared.max_connections_of(&config.listener);
            let values = limit_values(config, &self.shared.limits, most);
            vec![(config.name.clone(), values)]
        })
    }

    fn of_services<T>(&self, items: impl Fn(&RunningService) -> Vec<T>) -> Vec<T> {
        lock(&self.state).services.iter().flat_map(items).collect()
    }

    /// The service with this name, and the file of its guest.
    pub(super) fn guest_of(&self, name: &str) -> Option<(Arc<Service>, PathBuf)> {
        let state = lock(&self.state);
        let mut services = state.services.iter();
        let running = services.find(|running| running.config.name == name)?;
        Some((
            running.service.clone(),
            running.config.handler.guest.clone(),
        ))
    }

    /// Applies the configured settings to inherited sockets, once this process has taken over.
    pub(super) fn set_up_inherited_sockets(&self) {
        let state = lock(&self.state);
        for endpoint in state.services.iter().flat_map(|running| &running.endpoints) {
            if let Err(error) = endpoint.listening.take_over() {
                // The socket works all the same.
                warn!(%error, "a socket keeps its settings from before the restart");
            }
        }
    }

    /// All sockets and guests, for an upgrade. No guest is swapped until the result is dropped.
    pub(super) async fn hand_over(&self) -> io::Result<HandedOver<SwapLock>> {
        let mut locks = Vec::new();
        for service in self.of_services(|running| vec![running.service.clone()]) {
            locks.push(service.lock_swaps().await);
        }
        let state = lock(&self.state);
        let mut served = HandedOver {
            sockets: Vec::new(),
            guests: Vec::new(),
            locks,
        };
        for running in &state.services {
            let (name, guest) = (&running.config.name, &running.config.handler.guest);
            let component = running.service.component();
            served.guests.push((name.clone(), guest.clone(), component));
            for endpoint in &running.endpoints {
                for socket in endpoint.listening.try_clone_sockets()? {
                    served.sockets.push(HandedOverSocket {
                        service: name.clone(),
                        asked: endpoint.asked.clone(),
                        listening: endpoint.listening.clone(),
                        socket,
                    });
                }
            }
        }
        Ok(served)
    }

    /// Drains and ends all services together with the server.
    pub(super) async fn follow(&self, server: &Lifecycle) {
        server.draining().await;
        self.drain(|_| false);
        server.ended().await;
        let state = lock(&self.state);
        let draining = state.draining.iter();
        draining.for_each(|endpoint| endpoint.controller.end());
        let running = state.services.iter().map(|running| &running.controller);
        for controller in running.chain(&state.retiring) {
            controller.end();
        }
    }

    /// Drains all services. Sockets for which `is_handed_over` is true stay open in another process.
    pub(super) fn drain(&self, is_handed_over: impl Fn(&Arc<ListeningSockets>) -> bool) {
        let mut state = lock(&self.state);
        let state = &mut *state;
        state.groups = None;
        for running in &mut state.services {
            // An endpoint's sockets close once its accept loops have ended.
            for endpoint in std::mem::take(&mut running.endpoints) {
                match is_handed_over(&endpoint.listening) {
                    // False: it drains already.
                    true => drop(endpoint.controller.hand_over_to_process()),
                    false => endpoint.controller.drain(),
                }
                state.draining.push(DrainingEndpoint {
                    asked: endpoint.asked,
                    controller: endpoint.controller,
                });
            }
            running.controller.drain();
            running.service.drain();
        }
    }
}
