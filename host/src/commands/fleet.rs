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
use wasinetd::connection::{Front, Open};
use wasinetd::lifecycle::{Controller, Lifecycle};
use wasinetd::limit::Limit;
use wasinetd::listener::{Address, Bound, Incoming, Joining, Listening};
use wasinetd::sandbox::{Engine, Grants, SharedLimits};
use wasinetd::service::{Route, Service, Services, Settings};
use wasinetd::spans::Spans;

use super::activation::Passed;
use super::configured::Spec;
use super::successor::{Inherited, Served, Socket};
use crate::cli::{Dispatch, ServiceArgs};
use doors::{Accepting, Port};
pub(super) use reload::{Changes, NotChanged, Ready};

/// What the threads of one kind of dispatch are given.
pub(super) struct Threads {
    pub(super) dispatch: Dispatch,
    pub(super) handles: Vec<Handle>,
    pub(super) joining: Vec<Joining<Incoming<Arc<Route>>>>,
}

/// What all services share.
pub(super) struct Shared {
    pub(super) engine: Engine,
    pub(super) open: Arc<Open>,
    pub(super) spans: Option<Arc<Spans>>,
    pub(super) limits: SharedLimits,
    /// The places for connections.
    pub(super) places: Arc<Semaphore>,
    pub(super) max_connections: usize,
    pub(super) drain_timeout: Duration,
}

impl Shared {
    /// The connections that a service may have at once.
    fn most(&self, args: &ServiceArgs) -> usize {
        let most = args.max_connections.unwrap_or(self.max_connections);
        most.min(self.max_connections)
    }
}

/// The services that are served.
pub(super) struct Fleet {
    shared: Shared,
    services: Services,
    state: Mutex<State>,
}

struct State {
    /// None when there are to be no new connections any more.
    threads: Option<Vec<Threads>>,
    running: Vec<Running>,
    /// Of those that are no more in the config file, and still have connections.
    leaving: Vec<Arc<Controller>>,
    closing: Vec<Closing>,
}

/// An address that nobody listens at any more, where the last clients are accepted.
struct Closing {
    asked: Address,
    controller: Arc<Controller>,
}

/// A service that is served.
struct Running {
    spec: Spec,
    service: Arc<Service>,
    /// What its clients are led by.
    route: Arc<Route>,
    tls: Option<Arc<Tls>>,
    grants: Grants,
    accepting: Accepting,
    controller: Arc<Controller>,
    ports: Vec<Port>,
}

/// The addresses that `spec` asks for, ours and not yet listened at.
pub(super) fn bind(
    spec: &Spec,
    shards: usize,
    inherited: &mut Inherited,
    passed: &mut Passed,
) -> Result<Vec<(Address, Bound)>, Error> {
    let settings = spec.args.socket_settings();
    let mut all = Vec::new();
    for address in &spec.args.listen {
        let (sockets, file) = inherited.sockets(&spec.name, address);
        let bound = match address {
            _ if !sockets.is_empty() => Bound::adopt(address, sockets, file, &settings)?,
            Address::Passed(name) => Bound::passed(address, passed.sockets(name)?, &settings)?,
            _ => vec![Bound::new(address, shards, &settings)?],
        };
        all.extend(bound.into_iter().map(|bound| (address.clone(), bound)));
    }
    Ok(all)
}

/// What has changed of a service.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Change {
    /// Its guest's file.
    Guest(String),
    /// A file of TLS.
    Tls(String),
}

/// The files of a service that are to be watched. Those of TLS always are: certificates expire.
pub(super) fn watched(spec: &Spec, tls: Option<&Tls>) -> Vec<(Change, PathBuf)> {
    let guest = || (Change::Guest(spec.name.clone()), spec.guest.clone());
    let mut watched: Vec<_> = spec.args.swap.watch.then(guest).into_iter().collect();
    for file in tls.into_iter().flat_map(Tls::files) {
        watched.push((Change::Tls(spec.name.clone()), file));
    }
    watched
}

/// What a service is made within.
pub(super) fn settings(spec: &Spec, grants: Grants, spans: Option<Arc<Spans>>) -> Settings {
    Settings {
        name: spec.name.clone(),
        limits: spec.args.connection_limits.limits(),
        sandbox: spec.args.guest_limits.limits(),
        grants,
        probe: spec.args.swap.probe(),
        max_old_version_age: spec.args.swap.max_old_version_age(),
        spans,
    }
}

impl Fleet {
    /// Serves `ready` with `threads`. To be called within the runtime that looks after the services.
    pub(super) fn new(
        shared: Shared,
        threads: Vec<Threads>,
        services: Services,
        ready: Vec<Ready>,
    ) -> Result<Self, Error> {
        let fleet = Self {
            shared,
            services,
            state: Mutex::new(State {
                threads: Some(threads),
                running: Vec::new(),
                leaving: Vec::new(),
                closing: Vec::new(),
            }),
        };
        fleet.commit(ready)?;
        Ok(fleet)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where clients can connect to, and the services that they come to there.
    pub(super) fn addresses(&self) -> Vec<(String, Address)> {
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
    pub(super) async fn to_hand_over(&self) -> std::io::Result<Served> {
        let services: Vec<_> = {
            let state = self.state();
            let services = state.running.iter();
            services.map(|one| one.service.clone()).collect()
        };
        let mut turns = Vec::new();
        for service in services {
            turns.push(service.turn().await);
        }
        let state = self.state();
        let mut served = Served {
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
                    served.sockets.push(Socket {
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
    pub(super) fn watched(&self) -> Vec<(Change, PathBuf)> {
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
        let limits = |one: &Running| {
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
    pub(super) fn drain(&self, is_handed_over: impl Fn(&Arc<Listening>) -> bool) {
        let mut state = self.state();
        let state = &mut *state;
        state.threads = None;
        for running in &mut state.running {
            // Its sockets are closed when those who accept there are done.
            for port in std::mem::take(&mut running.ports) {
                match is_handed_over(&port.listening) {
                    // False: it drains already.
                    true => drop(port.controller.hand_over()),
                    false => port.controller.drain(),
                }
                state.closing.push(Closing {
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
) -> Arc<Route> {
    let front = Front {
        lifecycle: Some(controller.lifecycle()),
        ..args.front.front(tls.clone())
    };
    Arc::new(Route::new(front, service.clone()))
}
