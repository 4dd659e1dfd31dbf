//! The services that are served, and how they come to be what the config file says by now.

mod doors;
mod reload;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tracing::warn;
use wasinetd::Error;
use wasinetd::connection::tls::Tls;
use wasinetd::connection::{ConnectionRegistry, Handshake};
use wasinetd::lifecycle::{Controller, Lifecycle};
use wasinetd::limit::Limit;
use wasinetd::listener::{BoundSockets, Incoming, ListeningSockets, MergeHandle};
use wasinetd::net::ListenAddress;
use wasinetd::sandbox::{Engine, Grants, SharedLimits};
use wasinetd::service::{Service, ServiceSettings, Services, SniRoute};
use wasinetd::telemetry::spans::SpanSender;

use super::activation::PassedSockets;
use super::configured::ServiceSpec;
use super::successor::{HandedOver, HandedOverSocket, InheritedFds};
use crate::cli::{Dispatch, ServiceArgs};
use doors::{AcceptPolicy, Endpoint};
pub(super) use reload::{AppliedChanges, ApplyError, ReadyService};

/// What the threads of one kind of dispatch are given.
pub(super) struct ShardGroup {
    pub(super) dispatch: Dispatch,
    pub(super) handles: Vec<Handle>,
    pub(super) joining: Vec<MergeHandle<Incoming<Arc<SniRoute>>>>,
}

/// What all services share.
pub(super) struct SharedResources {
    pub(super) engine: Engine,
    pub(super) open: Arc<ConnectionRegistry>,
    pub(super) spans: Option<Arc<SpanSender>>,
    pub(super) limits: SharedLimits,
    /// The places for connections.
    pub(super) places: Arc<Semaphore>,
    pub(super) max_connections: usize,
    pub(super) drain_timeout: Duration,
}

impl SharedResources {
    /// The connections that a service may have at once.
    fn most(&self, args: &ServiceArgs) -> usize {
        let most = args.max_connections.unwrap_or(self.max_connections);
        most.min(self.max_connections)
    }
}

/// The services that are served.
pub(super) struct Supervisor {
    shared: SharedResources,
    services: Services,
    state: Mutex<SupervisorState>,
}

struct SupervisorState {
    /// None when there are to be no new connections any more.
    threads: Option<Vec<ShardGroup>>,
    running: Vec<RunningService>,
    /// Of those that are no more in the config file, and still have connections.
    leaving: Vec<Arc<Controller>>,
    closing: Vec<DrainingEndpoint>,
}

/// An address that nobody listens at any more, where the last clients are accepted.
struct DrainingEndpoint {
    asked: ListenAddress,
    controller: Arc<Controller>,
}

/// A service that is served.
struct RunningService {
    spec: ServiceSpec,
    service: Arc<Service>,
    /// What its clients are led by.
    route: Arc<SniRoute>,
    tls: Option<Arc<Tls>>,
    grants: Grants,
    accepting: AcceptPolicy,
    controller: Arc<Controller>,
    ports: Vec<Endpoint>,
}

/// The addresses that `spec` asks for, ours and not yet listened at.
pub(super) fn bind(
    spec: &ServiceSpec,
    shards: usize,
    inherited: &mut InheritedFds,
    passed: &mut PassedSockets,
) -> Result<Vec<(ListenAddress, BoundSockets)>, Error> {
    let settings = spec.args.socket_settings();
    let mut all = Vec::new();
    for address in &spec.args.listen {
        let (sockets, file) = inherited.sockets(&spec.name, address);
        let bound = match address {
            _ if !sockets.is_empty() => BoundSockets::adopt(address, sockets, file, &settings)?,
            ListenAddress::Passed(name) => {
                BoundSockets::passed(address, passed.sockets(name)?, &settings)?
            }
            _ => vec![BoundSockets::new(address, shards, &settings)?],
        };
        all.extend(bound.into_iter().map(|bound| (address.clone(), bound)));
    }
    Ok(all)
}

/// What has changed of a service.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum FileChange {
    /// Its guest's file.
    Guest(String),
    /// A file of TLS.
    Tls(String),
}

/// The files of a service that are to be watched. Those of TLS always are: certificates expire.
pub(super) fn watched(spec: &ServiceSpec, tls: Option<&Tls>) -> Vec<(FileChange, PathBuf)> {
    let guest = || (FileChange::Guest(spec.name.clone()), spec.guest.clone());
    let mut watched: Vec<_> = spec.args.swap.watch.then(guest).into_iter().collect();
    for file in tls.into_iter().flat_map(Tls::files) {
        watched.push((FileChange::Tls(spec.name.clone()), file));
    }
    watched
}

/// What a service is made within.
pub(super) fn settings(
    spec: &ServiceSpec,
    grants: Grants,
    spans: Option<Arc<SpanSender>>,
) -> ServiceSettings {
    ServiceSettings {
        name: spec.name.clone(),
        limits: spec.args.connection_limits.limits(),
        sandbox: spec.args.guest_limits.limits(),
        grants,
        probe: spec.args.swap.probe(),
        max_old_version_age: spec.args.swap.max_old_version_age(),
        spans,
    }
}

impl Supervisor {
    /// Serves `ready` with `threads`. To be called within the runtime that looks after the services.
    pub(super) fn new(
        shared: SharedResources,
        threads: Vec<ShardGroup>,
        services: Services,
        ready: Vec<ReadyService>,
    ) -> Result<Self, Error> {
        let fleet = Self {
            shared,
            services,
            state: Mutex::new(SupervisorState {
                threads: Some(threads),
                running: Vec::new(),
                leaving: Vec::new(),
                closing: Vec::new(),
            }),
        };
        fleet.commit(ready)?;
        Ok(fleet)
    }

    fn state(&self) -> MutexGuard<'_, SupervisorState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where clients can connect to, and the services that they come to there.
    pub(super) fn addresses(&self) -> Vec<(String, ListenAddress)> {
        let state = self.state();
        let running = state.running.iter();
        let addresses = running.flat_map(|running| {
            let ports = running.ports.iter();
            ports.map(|port| (running.spec.name.clone(), port.listening.address.clone()))
        });
        addresses.collect()
    }

    /// Has the sockets that another process has handed over listen as its services want it. To be called
    /// when this one goes on with them.
    pub(super) fn take_over(&self) {
        let state = self.state();
        for port in state.running.iter().flat_map(|running| &running.ports) {
            if let Err(error) = port.listening.take_over() {
                // It listens, if not as it should.
                warn!(%error, "a socket is as it was before the restart");
            }
        }
    }

    /// The sockets that are listened at, and the components that are served. None is swapped until it is
    /// dropped.
    pub(super) async fn to_hand_over(&self) -> std::io::Result<HandedOver> {
        let services: Vec<_> = {
            let state = self.state();
            let services = state.running.iter();
            services.map(|one| one.service.clone()).collect()
        };
        let mut turns = Vec::new();
        for service in services {
            turns.push(service.lock_swaps().await);
        }
        let state = self.state();
        let mut served = HandedOver {
            _turns: turns,
            sockets: Vec::new(),
            guests: Vec::new(),
        };
        for running in &state.running {
            let (name, guest) = (&running.spec.name, &running.spec.guest);
            let component = running.service.component();
            served.guests.push((name.clone(), guest.clone(), component));
            for port in &running.ports {
                for socket in port.listening.try_clone_sockets()? {
                    served.sockets.push(HandedOverSocket {
                        service: name.clone(),
                        asked: port.asked.clone(),
                        listening: port.listening.clone(),
                        socket,
                    });
                }
            }
        }
        Ok(served)
    }

    /// What the services are called.
    pub(super) fn names(&self) -> Vec<String> {
        let state = self.state();
        let running = state.running.iter();
        running.map(|one| one.spec.name.clone()).collect()
    }

    /// The service of this name, and the file that its guest came from.
    pub(super) fn guest_of(&self, name: &str) -> Option<(Arc<Service>, PathBuf)> {
        let state = self.state();
        let running = state.running.iter().find(|one| one.spec.name == name)?;
        Some((running.service.clone(), running.spec.guest.clone()))
    }

    /// The files that are to be watched.
    pub(super) fn watched(&self) -> Vec<(FileChange, PathBuf)> {
        let state = self.state();
        let services = state.running.iter();
        services
            .flat_map(|one| watched(&one.spec, one.tls.as_deref()))
            .collect()
    }

    /// How TLS is spoken by the service of this name, or by all of them.
    pub(super) fn tls_of(&self, name: Option<&str>) -> Vec<Arc<Tls>> {
        let state = self.state();
        let running = state.running.iter();
        let of_name = running.filter(|one| name.is_none_or(|name| one.spec.name == name));
        of_name.filter_map(|one| one.tls.clone()).collect()
    }

    /// What each limit is set to, for each service.
    pub(super) fn limits(&self) -> Vec<(String, Vec<(Limit, String)>)> {
        let state = self.state();
        let limits = |one: &RunningService| {
            let args = &one.spec.args;
            (
                one.spec.name.clone(),
                args.limits(&self.shared.limits, self.shared.most(args)),
            )
        };
        state.running.iter().map(limits).collect()
    }

    /// Has all services drain and end when the server does.
    pub(super) async fn follow(&self, server: &Lifecycle) {
        server.draining().await;
        self.drain(|_| false);
        server.ended().await;
        let state = self.state();
        let closing = state.closing.iter();
        closing.for_each(|closing| closing.controller.end());
        let running = state.running.iter().map(|running| &running.controller);
        for controller in running.chain(&state.leaving) {
            controller.end();
        }
    }

    /// Has all services drain. Another process goes on at those addresses.
    pub(super) fn drain(&self, is_handed_over: impl Fn(&Arc<ListeningSockets>) -> bool) {
        let mut state = self.state();
        let state = &mut *state;
        state.threads = None;
        for running in &mut state.running {
            // Its sockets are closed when those who accept there are done.
            for port in std::mem::take(&mut running.ports) {
                match is_handed_over(&port.listening) {
                    // False: it drains already.
                    true => drop(port.controller.hand_over_to_process()),
                    false => port.controller.drain(),
                }
                state.closing.push(DrainingEndpoint {
                    asked: port.asked,
                    controller: port.controller,
                });
            }
            running.controller.drain();
            running.service.drain();
        }
    }
}

/// What leads clients to a service, before others may have some of them.
fn route(
    args: &ServiceArgs,
    tls: &Option<Arc<Tls>>,
    controller: &Controller,
    service: &Arc<Service>,
) -> Arc<SniRoute> {
    let front = Handshake {
        lifecycle: Some(controller.lifecycle()),
        ..args.front.front(tls.clone())
    };
    Arc::new(SniRoute::new(front, service.clone()))
}
