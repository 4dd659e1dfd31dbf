//! The part of a reload that takes effect. After its first steps nothing can fail.

use std::collections::HashMap;
use std::sync::Arc;

use super::endpoint::{AcceptPolicy, Endpoint, PreparedEndpoint};
use super::error::ReloadError;
use super::plan::{CurrentService, PlannedEndpoint, ReadyService};
use super::resources::{ShardGroup, SharedResources};
use super::retire::retire;
use super::running::{
    DrainingEndpoint, RunningService, SupervisorState, route, route_by_server_name,
};
use crate::config::ListenerConfig;
use crate::lifecycle::Controller;
use crate::listener::{BindError, ListeningSockets, SocketSettings};
use crate::net::ListenAddress;
use crate::service::{PreparedVersion, Services};

/// The changes of a reload, by the names of services.
#[derive(Debug, Default)]
pub struct AppliedChanges {
    /// New services.
    pub added: Vec<String>,
    /// Services with another guest, other addresses or other settings.
    pub changed: Vec<String>,
    /// Services that were removed.
    pub removed: Vec<String>,
    /// Services whose change of `reuse-port` waits until the server is stopped and started.
    pub reuse_port_pending: Vec<String>,
    /// New addresses, each with its service.
    pub listening: Vec<(String, ListenAddress)>,
}

/// A service as it will run, with endpoints that are not open yet.
struct NextService {
    running: RunningService,
    /// The version to install in a service that runs already.
    prepared: Option<PreparedVersion>,
    has_new_settings: bool,
    /// Some of its TCP ports were bound for an earlier configuration.
    has_old_ports: bool,
    kept: Vec<Arc<ListeningSockets>>,
    opening: Vec<PreparedEndpoint>,
}

/// Serves the ready services, and retires all others.
///
/// Call it within the runtime of the control thread.
///
/// # Errors
///
/// Nothing has changed then.
pub(super) fn commit(
    shared: &SharedResources,
    state: &mut SupervisorState,
    services: &Services,
    ready: Vec<ReadyService>,
) -> Result<AppliedChanges, ReloadError> {
    let Some(groups) = &state.groups else {
        return Err(ReloadError::Draining);
    };
    let mut moved = Vec::new();
    for service in &ready {
        let new = service.config.listener.sockets;
        for endpoint in &service.endpoints {
            if let PlannedEndpoint::Move(_, listening, old) = endpoint {
                moved.push((listening.clone(), *old, new));
            }
        }
    }
    let next = ready.into_iter();
    let next = next
        .map(|ready| NextService::new(shared, groups, ready))
        .collect::<Result<Vec<_>, _>>()?;
    change_socket_settings(&moved)?;
    Ok(apply(shared, state, services, next))
}

impl NextService {
    fn new(
        shared: &SharedResources,
        groups: &[ShardGroup],
        ready: ReadyService,
    ) -> Result<Self, BindError> {
        let ReadyService {
            config,
            service,
            tls,
            grants,
            current,
            endpoints,
        } = ready;
        let (current, prepared) = current.unzip();
        let controller = current.as_ref().map(|current| current.controller.clone());
        let controller = controller.unwrap_or_default();
        let has_new_settings = current.as_ref().is_some_and(|one| one.has_new_settings);
        let (route, tls, policy) = match current {
            Some(current) if !has_new_settings => (current.route, current.tls, current.policy),
            current => {
                let policy = new_policy(shared, &config.listener, current.as_ref());
                (route(&config, &tls, &controller, &service), tls, policy)
            }
        };
        let has_old_ports = endpoints.iter().any(|endpoint| match endpoint {
            PlannedEndpoint::Keep(listening) | PlannedEndpoint::Move(_, listening, _) => {
                matches!(listening.address, ListenAddress::Ip(_))
            }
            PlannedEndpoint::Bind(..) => false,
        });
        let mut kept = Vec::new();
        let mut opening = Vec::new();
        for endpoint in endpoints {
            let (asked, listening) = match endpoint {
                PlannedEndpoint::Keep(listening) => {
                    kept.push(listening);
                    continue;
                }
                PlannedEndpoint::Move(asked, listening, _) => (asked, listening),
                PlannedEndpoint::Bind(asked, bound) => (asked, Arc::new(bound.listen()?)),
            };
            opening.push(PreparedEndpoint::new(
                groups, &policy, &route, asked, listening,
            )?);
        }
        Ok(Self {
            running: RunningService {
                config,
                service,
                route,
                tls,
                grants,
                policy,
                controller,
                endpoints: Vec::new(),
            },
            prepared,
            has_new_settings,
            has_old_ports,
            kept,
            opening,
        })
    }
}

fn new_policy(
    shared: &SharedResources,
    listener: &ListenerConfig,
    current: Option<&CurrentService>,
) -> AcceptPolicy {
    match current {
        Some(current) => current.policy.with_settings(shared, listener),
        None => AcceptPolicy::new(shared, listener),
    }
}

/// Gives moved sockets the settings of their new service: all of them, or none.
fn change_socket_settings(
    moved: &[(Arc<ListeningSockets>, SocketSettings, SocketSettings)],
) -> Result<(), BindError> {
    for (index, (listening, _, new)) in moved.iter().enumerate() {
        if let Err(error) = listening.set_up(new) {
            for (listening, old, _) in &moved[..=index] {
                // The old settings worked before.
                let _ = listening.set_up(old);
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Makes the exchange. Nothing here fails.
fn apply(
    shared: &SharedResources,
    state: &mut SupervisorState,
    services: &Services,
    next: Vec<NextService>,
) -> AppliedChanges {
    let mut changes = AppliedChanges::default();
    let before = std::mem::take(&mut state.services).into_iter();
    let mut before: HashMap<String, RunningService> = before
        .map(|running| (running.config.name.clone(), running))
        .collect();
    let mut released = Vec::new();
    let mut opening = Vec::new();
    for mut next in next {
        opening.push(std::mem::take(&mut next.opening));
        let old = before.remove(&next.running.config.name);
        let endpoints = opening.last().map_or(&[][..], |endpoints| endpoints);
        let running = exchange(shared, old, next, endpoints, &mut released, &mut changes);
        state.services.push(running);
    }
    let removed: Vec<_> = before
        .into_values()
        .map(|mut service| {
            let endpoints = std::mem::take(&mut service.endpoints);
            let of_endpoints = endpoints.iter().map(|endpoint| endpoint.controller.clone());
            let controllers = of_endpoints.chain([service.controller.clone()]).collect();
            released.extend(endpoints);
            (service, controllers)
        })
        .collect();
    route_by_server_name(&state.services);
    let running = state.services.iter().map(|running| running.service.clone());
    services.set(running.collect());
    release(state, released, &opening);
    for (running, endpoints) in state.services.iter_mut().zip(opening) {
        let opened = endpoints.into_iter().map(PreparedEndpoint::open);
        running.endpoints.extend(opened);
    }
    retire_removed(shared, state, removed, &mut changes);
    changes
}

/// Exchanges one service, and notes what has changed. Its old endpoints that it does not keep go to
/// `released`.
fn exchange(
    shared: &SharedResources,
    old: Option<RunningService>,
    next: NextService,
    opening: &[PreparedEndpoint],
    released: &mut Vec<Endpoint>,
    changes: &mut AppliedChanges,
) -> RunningService {
    let NextService {
        mut running,
        prepared,
        has_new_settings,
        has_old_ports,
        kept,
        ..
    } = next;
    let name = running.config.name.clone();
    let swapped = prepared.is_some_and(|prepared| {
        // It fails if the server drains, and then this service never gets another client.
        let report = running.service.install(prepared);
        report.is_ok_and(|report| report.digest != report.before)
    });
    let addresses = opening.iter().map(|endpoint| endpoint.address().clone());
    changes
        .listening
        .extend(addresses.map(|address| (name.clone(), address)));
    let Some(old) = old else {
        let (service, lifecycle) = (running.service.clone(), running.controller.lifecycle());
        tokio::spawn(async move { service.watch_old_versions(&lifecycle).await });
        changes.added.push(name);
        return running;
    };
    let is_kept = |endpoint: &Endpoint| {
        let mut kept = kept.iter();
        kept.any(|listening| Arc::ptr_eq(listening, &endpoint.listening))
    };
    let (stay, go): (Vec<_>, Vec<_>) = old.endpoints.into_iter().partition(is_kept);
    running.endpoints = stay;
    if has_new_settings {
        running.policy.resize(shared, &running.config.listener);
    }
    let (was, is) = (
        &old.config.listener.sockets,
        &running.config.listener.sockets,
    );
    if has_old_ports && was.reuse_port != is.reuse_port {
        changes.reuse_port_pending.push(name.clone());
    }
    if swapped || has_new_settings || !go.is_empty() || !opening.is_empty() {
        changes.changed.push(name);
    }
    released.extend(go);
    running
}

/// Stops the accept loops of released endpoints: at once if a new loop takes their sockets over,
/// otherwise after their last clients.
fn release(
    state: &mut SupervisorState,
    released: Vec<Endpoint>,
    opening: &[Vec<PreparedEndpoint>],
) {
    state
        .draining
        .retain(|endpoint| endpoint.controller.is_observed());
    for endpoint in released {
        let mut opening = opening.iter().flatten();
        if opening.any(|next| next.uses(&endpoint.listening)) {
            endpoint.controller.hand_over_in_process();
        } else {
            endpoint.controller.drain();
            state.draining.push(DrainingEndpoint {
                asked: endpoint.asked,
                controller: endpoint.controller,
            });
        }
    }
}

fn retire_removed(
    shared: &SharedResources,
    state: &mut SupervisorState,
    removed: Vec<(RunningService, Vec<Arc<Controller>>)>,
    changes: &mut AppliedChanges,
) {
    let is_in_use = |controller: &Arc<Controller>| Arc::strong_count(controller) > 1;
    state.retiring.retain(is_in_use);
    for (old, controllers) in removed {
        old.controller.drain();
        state.retiring.push(old.controller);
        tokio::spawn(retire(old.service, controllers, shared.drain_timeout));
        changes.removed.push(old.config.name);
    }
}
