//! How the services come to be what a config file says by now.
//!
//! All that can fail comes first: to take addresses, to make guests, to have somebody accept. What is left
//! takes effect at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};
use wasinetd::Error;
use wasinetd::config::Mistake;
use wasinetd::connection::tls::Tls;
use wasinetd::lifecycle::Controller;
use wasinetd::listener::{self, BoundSockets, ListeningSockets};
use wasinetd::net::ListenAddress;
use wasinetd::sandbox::Grants;
use wasinetd::service::{NamedService, PreparedVersion, Service, SniRoute};

use super::doors::{AcceptPolicy, Endpoint, PreparedEndpoint};
use super::{
    DrainingEndpoint, RunningService, ShardGroup, SharedResources, Supervisor, SupervisorState,
    route, settings,
};
use crate::commands::configured::{LoadedService, ServiceSpec};
use crate::commands::{is_kept, not_swapped};

/// What a reload has changed, by the names of the services.
#[derive(Debug, Default)]
pub(in crate::commands) struct AppliedChanges {
    pub(in crate::commands) added: Vec<String>,
    pub(in crate::commands) changed: Vec<String>,
    pub(in crate::commands) removed: Vec<String>,
    /// Those that are to share their ports with other processes, or no more, once they are bound anew.
    pub(in crate::commands) bound_as_before: Vec<String>,
    /// Where clients are accepted since.
    listening: Vec<(String, ListenAddress)>,
}

/// Why nothing has changed.
pub(in crate::commands) enum ApplyError {
    /// For all of this that the config file says.
    Mistakes(Vec<Mistake>),
    /// For another reason.
    Error(Error),
}

impl From<Error> for ApplyError {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// What is to be done for a service.
struct ServicePlan {
    checked: LoadedService,
    before: Option<CurrentService>,
    addresses: Vec<PlannedEndpoint>,
}

/// A service that is served already.
struct CurrentService {
    service: Arc<Service>,
    route: Arc<SniRoute>,
    accepting: AcceptPolicy,
    controller: Arc<Controller>,
    tls: Option<Arc<Tls>>,
    /// Whether more than its guest and its addresses is to be another.
    is_other: bool,
}

/// An address that a service is to have.
enum PlannedEndpoint {
    /// It has it, and it stays as it is.
    Kept(Arc<ListeningSockets>),
    /// One of the services has it, and listens there with such settings.
    Moved(
        ListenAddress,
        Arc<ListeningSockets>,
        listener::SocketSettings,
    ),
    /// Nobody of us has it.
    Free(ListenAddress, BoundSockets),
}

/// A service whose guest is ready.
pub(in crate::commands) struct ReadyService {
    spec: ServiceSpec,
    service: Arc<Service>,
    tls: Option<Arc<Tls>>,
    grants: Grants,
    /// Nothing for one that is new.
    before: Option<(CurrentService, PreparedVersion)>,
    addresses: Vec<PlannedEndpoint>,
}

/// A service as it is to be.
struct NextService {
    running: RunningService,
    /// What it is to be besides, of one that is served already.
    prepared: Option<PreparedVersion>,
    is_other: bool,
    /// It goes on at TCP ports that were bound for one of the services before.
    has_old_ports: bool,
    kept: Vec<Arc<ListeningSockets>>,
    doors: Vec<PreparedEndpoint>,
}

impl ReadyService {
    /// Compiles the guest of a service that is not served yet.
    ///
    /// # Errors
    ///
    /// [`Error::GuestRefused`] when it cannot be run.
    pub(in crate::commands) fn new(
        shared: &SharedResources,
        checked: LoadedService,
        bound: Vec<(ListenAddress, BoundSockets)>,
    ) -> Result<Self, Error> {
        let settings = settings(&checked.spec, checked.grants.clone(), shared.spans.clone());
        let (engine, open) = (shared.engine.clone(), shared.open.clone());
        let service = Service::new(settings, engine, open, checked.component);
        let service = service.map_err(|reason| Error::GuestRefused {
            path: checked.spec.guest.clone(),
            reason,
        })?;
        let free = |(asked, bound)| PlannedEndpoint::Free(asked, bound);
        Ok(Self {
            spec: checked.spec,
            service: Arc::new(service),
            tls: checked.tls,
            grants: checked.grants,
            before: None,
            addresses: bound.into_iter().map(free).collect(),
        })
    }

    /// The clients that are to wait in the kernel for each socket.
    pub(in crate::commands) fn backlog(&self) -> u32 {
        self.spec.args.sockets.backlog
    }
}

impl Supervisor {
    /// Becomes what `wanted` says. Connections that are open are not touched. Nothing changes unless all
    /// of it can be. Not to be called twice at once.
    ///
    /// # Errors
    ///
    /// Says what is in the way.
    pub(in crate::commands) async fn apply_config(
        &self,
        wanted: Vec<LoadedService>,
    ) -> Result<AppliedChanges, ApplyError> {
        self.closed(&wanted).await;
        let mut mistakes = Vec::new();
        let mut ready = Vec::new();
        for plan in self.plan(wanted, &mut mistakes)? {
            let line = plan.checked.spec.line("guest");
            match self.make_ready(plan).await {
                Ok(one) => ready.push(one),
                Err(error) => mistakes.push(Mistake {
                    line,
                    text: format!("guest: {error}"),
                }),
            }
        }
        if !mistakes.is_empty() {
            return Err(ApplyError::Mistakes(mistakes));
        }
        let changes = self.commit(ready)?;
        for (service, address) in &changes.listening {
            info!(service, %address, "listening");
        }
        for service in &changes.bound_as_before {
            let fix = "stop and start the server";
            warn!(service, fix, "whether its ports are shared is as it was");
        }
        Ok(changes)
    }

    /// Waits for the last clients of addresses that are wanted again.
    async fn closed(&self, wanted: &[LoadedService]) {
        /// It takes no longer than handshakes do that are under way.
        const PATIENCE: Duration = Duration::from_secs(3);
        /// How soon it is noticed. Arbitrary.
        const OFTEN: Duration = Duration::from_millis(10);
        let are_wanted = |closing: &DrainingEndpoint| {
            let mut wanted = wanted.iter().flat_map(|one| &one.spec.args.listen);
            let is_wanted = wanted.any(|address| address.is_taken_by(&closing.asked));
            is_wanted && closing.controller.is_observed()
        };
        let closed = async {
            while self.state().closing.iter().any(are_wanted) {
                tokio::time::sleep(OFTEN).await;
            }
        };
        // If it takes longer, the address is taken, which is said.
        let _ = tokio::time::timeout(PATIENCE, closed).await;
    }

    /// What is to be done for each of the services that are wanted, with the addresses that they take. Those
    /// that cannot be had are among the mistakes.
    fn plan(
        &self,
        wanted: Vec<LoadedService>,
        mistakes: &mut Vec<Mistake>,
    ) -> Result<Vec<ServicePlan>, Error> {
        let state = self.state();
        let Some(threads) = &state.threads else {
            return Err(Error::Draining);
        };
        let mut ports: Vec<(&RunningService, &Endpoint)> = Vec::new();
        for running in &state.running {
            ports.extend(running.ports.iter().map(|port| (running, port)));
        }
        let mut plans = Vec::new();
        for checked in wanted {
            let spec = &checked.spec;
            let mut running = state.running.iter();
            let running = running.find(|one| one.spec.name == spec.name);
            let before = running.map(|running| CurrentService {
                service: running.service.clone(),
                route: running.route.clone(),
                accepting: running.accepting.clone(),
                controller: running.controller.clone(),
                tls: running.tls.clone(),
                is_other: !running
                    .spec
                    .table
                    .same_but(&spec.table, &["guest", "listen"])
                    || !running.grants.has_directories_of(&checked.grants),
            });
            let of_kind = |threads: &&ShardGroup| threads.dispatch == spec.args.dispatch;
            let shards = threads.iter().filter(of_kind);
            let shards = shards.map(|threads| threads.handles.len()).sum();
            let settings = spec.args.socket_settings();
            let mut addresses = Vec::new();
            for asked in &spec.args.listen {
                let held = take(&mut ports, &spec.name, asked);
                if held.is_empty() {
                    match BoundSockets::new(asked, shards, &settings) {
                        Ok(bound) => addresses.push(PlannedEndpoint::Free(asked.clone(), bound)),
                        Err(error) => mistakes.push(Mistake {
                            line: spec.line("listen"),
                            text: format!("listen: {}", in_our_way(&state, error.into())),
                        }),
                    }
                }
                addresses.extend(held.into_iter().map(|(holder, port)| {
                    let listening = port.listening.clone();
                    let is_same = before.as_ref().is_some_and(|before| !before.is_other);
                    match is_same && holder.spec.name == spec.name {
                        true => PlannedEndpoint::Kept(listening),
                        false => {
                            let settings = holder.spec.args.socket_settings();
                            PlannedEndpoint::Moved(asked.clone(), listening, settings)
                        }
                    }
                }));
            }
            plans.push(ServicePlan {
                checked,
                before,
                addresses,
            });
        }
        Ok(plans)
    }

    /// Makes the guest ready.
    async fn make_ready(&self, plan: ServicePlan) -> Result<ReadyService, Error> {
        let LoadedService {
            spec,
            component,
            grants,
            tls,
            ..
        } = plan.checked;
        let refused = not_swapped(&spec.guest);
        let settings = settings(&spec, grants.clone(), self.shared.spans.clone());
        let (service, before) = match plan.before {
            Some(before) => {
                let service = before.service.clone();
                let settings = before.is_other.then_some(settings);
                let prepared = service.prepare(component, settings).await;
                (service, Some((before, prepared.map_err(refused)?)))
            }
            None => {
                let (engine, open) = (self.shared.engine.clone(), self.shared.open.clone());
                let made = Service::make(settings, engine, open, component).await;
                (Arc::new(made.map_err(refused)?), None)
            }
        };
        Ok(ReadyService {
            spec,
            service,
            tls,
            grants,
            before,
            addresses: plan.addresses,
        })
    }

    /// Serves what is ready, and no more what is not among it. To be called within the runtime that looks
    /// after the services.
    ///
    /// # Errors
    ///
    /// Says what is in the way. Nothing has changed then.
    pub(super) fn commit(&self, ready: Vec<ReadyService>) -> Result<AppliedChanges, Error> {
        let mut state = self.state();
        let state = &mut *state;
        let Some(threads) = &state.threads else {
            return Err(Error::Draining);
        };
        let mut moved = Vec::new();
        let all = ready.into_iter().map(|ready| {
            let new = ready.spec.args.socket_settings();
            for planned in &ready.addresses {
                if let PlannedEndpoint::Moved(_, listening, old) = planned {
                    moved.push((listening.clone(), *old, new));
                }
            }
            next(&self.shared, threads, ready)
        });
        let all = all.collect::<Result<Vec<_>, _>>()?;
        set_up(&moved)?;
        Ok(self.apply(state, all))
    }

    /// Nothing here fails.
    fn apply(&self, state: &mut SupervisorState, all: Vec<NextService>) -> AppliedChanges {
        let mut changes = AppliedChanges::default();
        let mut before: HashMap<String, RunningService> = std::mem::take(&mut state.running)
            .into_iter()
            .map(|running| (running.spec.name.clone(), running))
            .collect();
        let mut ports: Vec<Endpoint> = Vec::new();
        let mut doors = Vec::new();
        for one in all {
            let NextService {
                mut running,
                prepared,
                is_other,
                has_old_ports,
                kept,
                doors: opening,
            } = one;
            let name = running.spec.name.clone();
            let swapped = prepared.is_some_and(|prepared| {
                // It fails when the server drains, and this is nobody's any more.
                let swapped = running.service.install(prepared);
                swapped.is_ok_and(|swapped| swapped.digest != swapped.before)
            });
            match before.remove(&name) {
                None => {
                    let (service, lifecycle) =
                        (running.service.clone(), running.controller.lifecycle());
                    tokio::spawn(async move { service.watch_old_versions(&lifecycle).await });
                    changes.added.push(name.clone());
                }
                Some(old) => {
                    let is_kept = |port: &Endpoint| {
                        let mut kept = kept.iter();
                        kept.any(|listening| Arc::ptr_eq(listening, &port.listening))
                    };
                    let (stay, go): (Vec<_>, Vec<_>) = old.ports.into_iter().partition(is_kept);
                    running.ports = stay;
                    if is_other {
                        running.accepting.resize(&self.shared, &running.spec.args);
                    }
                    let is_shared = |spec: &ServiceSpec| spec.args.socket_settings().reuse_port;
                    if has_old_ports && is_shared(&old.spec) != is_shared(&running.spec) {
                        changes.bound_as_before.push(name.clone());
                    }
                    if swapped || is_other || !go.is_empty() || !opening.is_empty() {
                        changes.changed.push(name.clone());
                    }
                    ports.extend(go);
                }
            }
            for door in &opening {
                changes
                    .listening
                    .push((name.clone(), door.address().clone()));
            }
            doors.push(opening);
            state.running.push(running);
        }
        let gone = before.into_values().map(|mut old| {
            let accepting = old.ports.iter().map(|port| port.controller.clone());
            let controllers: Vec<_> = accepting.chain([old.controller.clone()]).collect();
            ports.append(&mut old.ports);
            (old, controllers)
        });
        let gone: Vec<_> = gone.collect();
        lead_by_name(&state.running);
        let services = state.running.iter().map(|one| one.service.clone());
        self.services.set(services.collect());
        state.closing.retain(|one| one.controller.is_observed());
        for port in ports {
            if doors
                .iter()
                .flatten()
                .any(|door| door.is_of(&port.listening))
            {
                // Whoever waits there is accepted by the next.
                port.controller.hand_over_in_process();
            } else {
                port.controller.drain();
                state.closing.push(DrainingEndpoint {
                    asked: port.asked,
                    controller: port.controller,
                });
            }
        }
        for (running, doors) in state.running.iter_mut().zip(doors) {
            running
                .ports
                .extend(doors.into_iter().map(PreparedEndpoint::open));
        }
        let is_there = |controller: &Arc<Controller>| Arc::strong_count(controller) > 1;
        state.leaving.retain(is_there);
        for (old, controllers) in gone {
            old.controller.drain();
            state.leaving.push(old.controller);
            let patience = self.shared.drain_timeout;
            tokio::spawn(retire(old.service, controllers, patience));
            changes.removed.push(old.spec.name);
        }
        changes
    }
}

/// The ports of those that are left for whoever asks for an address: one, or all whose sockets were passed
/// by that name.
fn take<'a>(
    ports: &mut Vec<(&'a RunningService, &'a Endpoint)>,
    service: &str,
    asked: &ListenAddress,
) -> Vec<(&'a RunningService, &'a Endpoint)> {
    let is_it = |(holder, port): &(&RunningService, &Endpoint)| {
        is_kept((&holder.spec.name, &port.asked), (service, asked))
    };
    match asked {
        ListenAddress::Passed(_) => ports.extract_if(.., |one| is_it(one)).collect(),
        _ => {
            let found = ports.iter().position(is_it);
            found.map(|n| ports.remove(n)).into_iter().collect()
        }
    }
}

/// A service as it is to be, with clients that can connect to its addresses, and wait there.
fn next(
    shared: &SharedResources,
    threads: &[ShardGroup],
    ready: ReadyService,
) -> Result<NextService, Error> {
    let ReadyService {
        spec,
        service,
        tls,
        grants,
        before,
        addresses,
    } = ready;
    let (before, prepared) = before.unzip();
    let controller = before.as_ref().map(|before| before.controller.clone());
    let controller = controller.unwrap_or_default();
    let is_other = before.as_ref().is_some_and(|before| before.is_other);
    let (route, tls, accepting) = match before {
        Some(before) if !is_other => (before.route, before.tls, before.accepting),
        before => {
            let accepting = match before {
                Some(before) => before.accepting.with(shared, &spec.args),
                None => AcceptPolicy::new(shared, &spec.args),
            };
            (
                route(&spec.args, &tls, &controller, &service),
                tls,
                accepting,
            )
        }
    };
    let has_old_ports = addresses.iter().any(|planned| match planned {
        PlannedEndpoint::Kept(listening) | PlannedEndpoint::Moved(_, listening, _) => {
            matches!(listening.address, ListenAddress::Ip(_))
        }
        PlannedEndpoint::Free(..) => false,
    });
    let mut kept = Vec::new();
    let mut doors = Vec::new();
    for planned in addresses {
        let (asked, listening) = match planned {
            PlannedEndpoint::Kept(listening) => {
                kept.push(listening);
                continue;
            }
            PlannedEndpoint::Moved(asked, listening, _) => (asked, listening),
            PlannedEndpoint::Free(asked, bound) => (asked, Arc::new(bound.listen()?)),
        };
        doors.push(PreparedEndpoint::new(
            threads, &accepting, &route, asked, listening,
        )?);
    }
    Ok(NextService {
        running: RunningService {
            spec,
            service,
            route,
            tls,
            grants,
            accepting,
            controller,
            ports: Vec::new(),
        },
        prepared,
        is_other,
        has_old_ports,
        kept,
        doors,
    })
}

/// Has sockets that listen with the first settings do so with the second: all, or none.
fn set_up(
    moved: &[(
        Arc<ListeningSockets>,
        listener::SocketSettings,
        listener::SocketSettings,
    )],
) -> Result<(), Error> {
    for (n, (listening, _, new)) in moved.iter().enumerate() {
        if let Err(error) = listening.set_up(new) {
            for (listening, old, _) in &moved[..=n] {
                // It could be before.
                let _ = listening.set_up(old);
            }
            return Err(error.into());
        }
    }
    Ok(())
}

/// Has the clients of services led to those behind them.
fn lead_by_name(services: &[RunningService]) {
    for one in services {
        let behind = services.iter().filter_map(|other| {
            let (before, names) = other.spec.behind.as_ref()?;
            (*before == one.spec.name).then(|| NamedService {
                names: names.clone(),
                service: other.service.clone(),
            })
        });
        one.route.set_named(behind.collect());
    }
}

/// Ends what is left of a service that is gone when its time is up.
async fn retire(service: Arc<Service>, controllers: Vec<Arc<Controller>>, patience: Duration) {
    /// How soon it is noticed that nobody is left. Arbitrary.
    const OFTEN: Duration = Duration::from_millis(200);
    /// Those who have it and lead nobody to it: this one, and who tends it.
    const OURS: usize = 2;
    let name = service.name().to_string();
    let gone = async {
        // Clients may wait to be accepted, or be in a handshake, and be led here yet.
        while Arc::strong_count(&service) > OURS || service.open() > 0 {
            tokio::time::sleep(OFTEN).await;
        }
    };
    match tokio::time::timeout(patience, gone).await {
        Ok(()) => info!(service = name, "a service that was removed has ended"),
        Err(_) => warn!(
            service = name,
            "the drain timeout of a service that was removed is over: ending what is left of it"
        ),
    }
    controllers.iter().for_each(|controller| controller.end());
}

/// Says so if it is we who hold what cannot be had.
fn in_our_way(state: &SupervisorState, error: Error) -> Error {
    let ports = state.running.iter().flat_map(|running| &running.ports);
    let mut ours = ports.flat_map(|port| [&port.asked, &port.listening.address]);
    match error {
        Error::Listen {
            address, source, ..
        } if ours.any(|ours| address.is_taken_by(ours)) => Error::Listen {
            address,
            source,
            fix: "another address of this server is in its way; give that up in a reload before",
        },
        error => error,
    }
}
