//! The services that are served, and how they come to be what the config file says by now.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tracing::{info, warn};
use wasinetd::Error;
use wasinetd::connection::tls::Tls;
use wasinetd::connection::{Front, Open};
use wasinetd::lifecycle::{Controller, Lifecycle};
use wasinetd::limit::Limit;
use wasinetd::listener::{Address, Admission, Bound, Incoming, Joining, Listening, Places, Rules};
use wasinetd::sandbox::{Engine, Grants, SharedLimits};
use wasinetd::service::{Named, Prepared, Route, Service, Services, Settings};
use wasinetd::spans::Spans;

use super::activation::Passed;
use super::configured::{Checked, Spec, takes_any_port};
use super::successor::{Inherited, Served};
use crate::cli::{Dispatch, ServiceArgs};

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
    pub(super) places: Places,
    pub(super) max_connections: usize,
    pub(super) drain_timeout: Duration,
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
    /// Of those who accept the last ones at addresses that nobody listens at any more. To drop one would
    /// be its end.
    closing: Vec<Controller>,
}

/// A service that is served.
struct Running {
    spec: Spec,
    service: Arc<Service>,
    /// What its clients are led by.
    route: Arc<Route>,
    tls: Option<Arc<Tls>>,
    controller: Arc<Controller>,
    ports: Vec<Port>,
}

/// An address that a service listens at.
struct Port {
    /// As it was asked for.
    asked: Address,
    listening: Listening,
    /// Of whoever accepts there for the service.
    controller: Controller,
}

/// A service that is ready to be served.
pub(super) struct Ready {
    spec: Spec,
    service: Arc<Service>,
    tls: Option<Arc<Tls>>,
    listening: Vec<(Address, Listening)>,
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
        let sockets = inherited.sockets(address);
        let bound = match address {
            _ if !sockets.is_empty() => Bound::adopt(address, sockets, &settings)?,
            Address::Passed(name) => Bound::passed(address, passed.sockets(name)?, &settings)?,
            _ => vec![Bound::new(address, shards, &settings)?],
        };
        all.extend(bound.into_iter().map(|bound| (address.clone(), bound)));
    }
    Ok(all)
}

/// What has changed of a service.
#[derive(Clone, Debug)]
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

impl Ready {
    /// Compiles the guest, and has clients wait at its addresses from then on.
    pub(super) fn new(
        shared: &Shared,
        checked: Checked,
        bound: Vec<(Address, Bound)>,
    ) -> Result<Self, Error> {
        let settings = settings(&checked.spec, checked.grants, shared.spans.clone());
        let (engine, open) = (shared.engine.clone(), shared.open.clone());
        let service = Service::new(settings, engine, open, checked.component);
        let service = service.map_err(|reason| Error::GuestRefused {
            path: checked.spec.guest.clone(),
            reason,
        })?;
        let listening = bound
            .into_iter()
            .map(|(asked, bound)| Ok((asked, bound.listen()?)))
            .collect::<Result<_, Error>>()?;
        Ok(Self {
            service: Arc::new(service),
            tls: checked.tls,
            listening,
            spec: checked.spec,
        })
    }

    /// Where clients can connect to.
    pub(super) fn addresses(&self) -> impl Iterator<Item = &Address> {
        self.listening
            .iter()
            .map(|(_, listening)| &listening.address)
    }

    /// The clients that are to wait in the kernel for each socket.
    pub(super) fn backlog(&self) -> u32 {
        self.spec.args.sockets.backlog
    }

    pub(super) fn name(&self) -> &str {
        &self.spec.name
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
        let mut state = fleet.state();
        for one in ready {
            let running = fleet.begin(&state, one)?;
            state.running.push(running);
        }
        lead_by_name(&state.running);
        fleet.publish(&state);
        drop(state);
        Ok(fleet)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, state: &State) {
        let services = state.running.iter().map(|one| one.service.clone());
        self.services.set(services.collect());
    }

    /// Serves one more.
    fn begin(&self, state: &State, ready: Ready) -> Result<Running, Error> {
        let controller = Arc::new(Controller::default());
        let (tended, lifecycle) = (ready.service.clone(), controller.lifecycle());
        tokio::spawn(async move { tended.tend(&lifecycle).await });
        let accepting = Accepting::new(&self.shared, &ready.spec.args);
        let route = route(&ready.spec.args, &ready.tls, &controller, &ready.service);
        let ports = ready
            .listening
            .into_iter()
            .map(|(asked, listening)| self.accept(state, &accepting, &route, asked, listening))
            .collect::<Result<_, _>>()?;
        Ok(Running {
            spec: ready.spec,
            service: ready.service,
            route,
            tls: ready.tls,
            controller,
            ports,
        })
    }

    /// Accepts at an address for a service.
    fn accept(
        &self,
        state: &State,
        accepting: &Accepting,
        route: &Arc<Route>,
        asked: Address,
        listening: Listening,
    ) -> Result<Port, Error> {
        let controller = Controller::default();
        let threads = state.threads.iter().flatten();
        for threads in threads.filter(|threads| threads.dispatch == accepting.dispatch) {
            let by_shard = listening.by_shard(threads.handles.len())?;
            let shards = threads.handles.iter().zip(&threads.joining);
            for ((handle, joining), listeners) in shards.zip(by_shard) {
                let _context = handle.enter();
                joining.add(Incoming::new(
                    listeners,
                    route.clone(),
                    accepting.places.clone(),
                    accepting.when_full.clone(),
                    accepting.admission.clone(),
                    &controller.lifecycle(),
                )?);
            }
        }
        Ok(Port {
            asked,
            listening,
            controller,
        })
    }

    /// The sockets that are listened at, and the components that are served.
    pub(super) fn to_hand_over(&self) -> std::io::Result<Served> {
        let state = self.state();
        let ports = state.running.iter().flat_map(|running| &running.ports);
        let sockets = ports
            .map(|port| port.listening.try_clone_sockets())
            .collect::<Result<Vec<_>, _>>()?;
        let guests = state.running.iter();
        let guests = guests.map(|one| (one.spec.name.clone(), one.service.component()));
        Ok(Served {
            sockets: sockets.into_iter().flatten().collect(),
            guests: guests.collect(),
        })
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
            let most = args.max_connections.unwrap_or(self.shared.max_connections);
            (
                one.spec.name.clone(),
                args.limits(&self.shared.limits, most),
            )
        };
        state.running.iter().map(limits).collect()
    }

    /// Has all services drain and end when the server does.
    pub(super) async fn follow(&self, server: &Lifecycle) {
        server.draining().await;
        {
            let mut state = self.state();
            let state = &mut *state;
            state.threads = None;
            for running in &mut state.running {
                // Its sockets are closed when those who accept there are done.
                for Port { controller, .. } in std::mem::take(&mut running.ports) {
                    match server.is_handed_over() {
                        // False: it drains already.
                        true => drop(controller.hand_over()),
                        false => controller.drain(),
                    }
                    state.closing.push(controller);
                }
                running.controller.drain();
            }
        }
        server.ended().await;
        let state = self.state();
        state.closing.iter().for_each(Controller::end);
        let running = state.running.iter().map(|running| &running.controller);
        for controller in running.chain(&state.leaving) {
            controller.end();
        }
    }

    /// Becomes what `wanted` says. Connections that are open are not touched. Nothing changes unless all
    /// of it can be.
    ///
    /// # Errors
    ///
    /// Says what is in the way.
    pub(super) async fn turn_into(&self, wanted: Vec<Checked>) -> Result<Changes, Error> {
        let plans = self.plan(wanted)?;
        let mut prepared = Vec::new();
        for plan in plans {
            prepared.push(self.prepare(plan).await?);
        }
        self.commit(prepared)
    }

    /// What is to be done for each of the services that are wanted, with addresses that are free.
    fn plan(&self, wanted: Vec<Checked>) -> Result<Vec<Plan>, Error> {
        let state = self.state();
        let Some(threads) = &state.threads else {
            return Err(draining());
        };
        let is_held = |name: &str, address: &Address| {
            let mut holders = state.running.iter();
            holders.any(|running| {
                // A port that any was asked for is nobody else's.
                (!takes_any_port(address) || running.spec.name == name)
                    && running.ports.iter().any(|port| port.asked == *address)
            })
        };
        wanted
            .into_iter()
            .map(|checked| {
                let running = state.running.iter();
                let running = running
                    .clone()
                    .find(|one| one.spec.name == checked.spec.name);
                let shards = threads
                    .iter()
                    .filter(|threads| threads.dispatch == checked.spec.args.dispatch)
                    .map(|threads| threads.handles.len())
                    .sum();
                let settings = checked.spec.args.socket_settings();
                let new = checked.spec.args.listen.iter();
                let bound = new
                    .filter(|address| !is_held(&checked.spec.name, address))
                    .map(|address| Ok((address.clone(), Bound::new(address, shards, &settings)?)))
                    .collect::<Result<_, Error>>()?;
                Ok(Plan {
                    service: running.map(|running| running.service.clone()),
                    is_other: running.is_none_or(|running| {
                        let keys = ["guest", "listen"];
                        !running.spec.table.same_but(&checked.spec.table, &keys)
                    }),
                    checked,
                    bound,
                })
            })
            .collect()
    }

    async fn prepare(&self, plan: Plan) -> Result<ToCommit, Error> {
        let Checked {
            spec,
            component,
            grants,
            tls,
            ..
        } = plan.checked;
        let refused = |reason: String| Error::GuestRefused {
            path: spec.guest.clone(),
            reason,
        };
        let settings = settings(&spec, grants, self.shared.spans.clone());
        let (service, prepared) = match plan.service {
            Some(service) => {
                let settings = plan.is_other.then_some(settings);
                let prepared = service.prepare(component, settings).await;
                (
                    service,
                    Some(prepared.map_err(|error| refused(error.to_string()))?),
                )
            }
            None => {
                let (engine, open) = (self.shared.engine.clone(), self.shared.open.clone());
                let made = Service::make(settings, engine, open, component).await;
                (
                    Arc::new(made.map_err(|error| refused(error.to_string()))?),
                    None,
                )
            }
        };
        let listening = plan
            .bound
            .into_iter()
            .map(|(asked, bound)| Ok((asked, bound.listen()?)))
            .collect::<Result<_, Error>>()?;
        Ok(ToCommit {
            spec,
            service,
            tls,
            prepared,
            is_other: plan.is_other,
            listening,
        })
    }

    /// From here on nothing fails that is not a fault of ours.
    fn commit(&self, wanted: Vec<ToCommit>) -> Result<Changes, Error> {
        let mut state = self.state();
        if state.threads.is_none() {
            return Err(draining());
        }
        let mut changes = Changes::default();
        let mut before: HashMap<String, Running> = std::mem::take(&mut state.running)
            .into_iter()
            .map(|running| (running.spec.name.clone(), running))
            .collect();
        // Ports that their services do not have any more may be another's from now on.
        let mut free: Vec<(String, Port)> = Vec::new();
        for (name, running) in &mut before {
            let wanted = wanted.iter().find(|one| one.spec.name == *name);
            let keeps = |port: &Port| {
                wanted
                    .is_some_and(|one| !one.is_other && one.spec.args.listen.contains(&port.asked))
            };
            let (kept, given): (Vec<_>, Vec<_>) = std::mem::take(&mut running.ports)
                .into_iter()
                .partition(keeps);
            running.ports = kept;
            free.extend(given.into_iter().map(|port| (name.clone(), port)));
        }
        let mut all = Vec::new();
        for one in wanted {
            let ToCommit {
                spec,
                service,
                tls,
                prepared,
                is_other,
                mut listening,
            } = one;
            for asked in &spec.args.listen {
                let is_this = |(name, port): &(String, Port)| {
                    port.asked == *asked && (!takes_any_port(asked) || *name == spec.name)
                };
                while let Some(n) = free.iter().position(is_this) {
                    let (_, port) = free.swap_remove(n);
                    // Whoever waits there is accepted by the next.
                    port.controller.pass_on();
                    listening.push((asked.clone(), port.listening));
                }
            }
            let ports_changed = !listening.is_empty();
            match before.remove(&spec.name) {
                None => {
                    changes.added.push(spec.name.clone());
                    announce(&spec, &listening);
                    let ready = Ready {
                        spec,
                        service,
                        tls,
                        listening,
                    };
                    all.push(self.begin(&state, ready)?);
                }
                Some(mut running) => {
                    let swapped = prepared.is_some_and(|prepared| {
                        service
                            .install(prepared)
                            .is_ok_and(|swapped| swapped.digest != swapped.before)
                    });
                    let fewer = running.ports.len() < running.spec.args.listen.len();
                    if swapped || is_other || ports_changed || fewer {
                        changes.changed.push(spec.name.clone());
                    }
                    let accepting = Accepting::new(&self.shared, &spec.args);
                    if is_other {
                        running.route = route(&spec.args, &tls, &running.controller, &service);
                        running.tls = tls;
                    }
                    announce(&spec, &listening);
                    for (asked, listening) in listening {
                        let port =
                            self.accept(&state, &accepting, &running.route, asked, listening)?;
                        running.ports.push(port);
                    }
                    running.spec = spec;
                    all.push(running);
                }
            }
        }
        state.closing.retain(Controller::is_followed);
        for (_, Port { controller, .. }) in free {
            controller.drain();
            state.closing.push(controller);
        }
        for (name, running) in before {
            changes.removed.push(name);
            running.controller.drain();
            state
                .leaving
                .retain(|controller| Arc::strong_count(controller) > 1);
            state.leaving.push(running.controller.clone());
            let (service, patience) = (running.service, self.shared.drain_timeout);
            tokio::spawn(leave(service, running.controller, patience));
        }
        lead_by_name(&all);
        state.running = all;
        self.publish(&state);
        Ok(changes)
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

/// Has the clients of services led to those behind them.
fn lead_by_name(services: &[Running]) {
    for one in services {
        let behind = services.iter().filter_map(|other| {
            let (before, names) = other.spec.behind.as_ref()?;
            (*before == one.spec.name).then(|| Named {
                names: names.clone(),
                service: other.service.clone(),
            })
        });
        one.route.set_named(behind.collect());
    }
}

/// Says where clients can connect to from now on.
fn announce(spec: &Spec, listening: &[(Address, Listening)]) {
    for (_, listening) in listening {
        info!(service = spec.name, address = %listening.address, "listening");
    }
}

/// Ends what is left of a service that is gone when its time is up.
async fn leave(service: Arc<Service>, controller: Arc<Controller>, patience: Duration) {
    /// How soon it is noticed that nobody is left. Arbitrary.
    const OFTEN: Duration = Duration::from_millis(200);
    let name = service.name().to_string();
    let gone = async {
        while service.open() > 0 {
            tokio::time::sleep(OFTEN).await;
        }
    };
    match tokio::time::timeout(patience, gone).await {
        Ok(()) => info!(service = name, "a service that was removed has ended"),
        Err(_) => warn!(
            service = name,
            "the drain timeout of a service that was removed is over: ending its connections"
        ),
    }
    controller.end();
}

/// What is to be done for a service.
struct Plan {
    checked: Checked,
    /// If it is served already.
    service: Option<Arc<Service>>,
    /// Whether more than its guest and its addresses is another.
    is_other: bool,
    /// Addresses that nobody of us has.
    bound: Vec<(Address, Bound)>,
}

/// A service as it is to be, ready.
struct ToCommit {
    spec: Spec,
    service: Arc<Service>,
    tls: Option<Arc<Tls>>,
    prepared: Option<Prepared>,
    is_other: bool,
    listening: Vec<(Address, Listening)>,
}

/// What a reload has changed, by the names of the services.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub(super) added: Vec<String>,
    pub(super) changed: Vec<String>,
    pub(super) removed: Vec<String>,
}

/// How clients of a service are accepted.
struct Accepting {
    dispatch: Dispatch,
    places: Places,
    when_full: wasinetd::listener::WhenFull,
    admission: Admission,
}

impl Accepting {
    fn new(shared: &Shared, args: &ServiceArgs) -> Self {
        let most = args.max_connections.unwrap_or(shared.max_connections);
        let places = match most < shared.max_connections {
            true => shared.places.of_service(most),
            false => shared.places.clone(),
        };
        Self {
            dispatch: args.dispatch,
            places,
            when_full: args.admission.when_full(),
            admission: Admission::new(Rules {
                proxies: args.front.proxy_from.clone(),
                ..args.admission.rules(most)
            }),
        }
    }
}

fn draining() -> Error {
    Error::Internal {
        stage: "changing what is served",
        reason: "the server is draining; change its successor".into(),
    }
}
