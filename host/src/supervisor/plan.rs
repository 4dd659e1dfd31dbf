//! The part of a reload that can fail: addresses, guests, probes. Nothing has changed yet.

use std::sync::Arc;

use super::endpoint::{AcceptPolicy, Endpoint};
use super::error::ReloadError;
use super::resources::SharedResources;
use super::running::{RunningService, SupervisorState, service_settings};
use crate::config::{LoadCause, LoadedService, Mistake, ServiceConfig};
use crate::connection::tls::Tls;
use crate::lifecycle::Controller;
use crate::listener::{BindError, BoundSockets, ListeningSockets, SocketSettings};
use crate::net::ListenAddress;
use crate::sandbox::Grants;
use crate::service::{PreparedVersion, Service, SniRoute};

/// The plan for one service.
pub(super) struct ServicePlan {
    pub(super) loaded: LoadedService,
    current: Option<CurrentService>,
    endpoints: Vec<PlannedEndpoint>,
}

/// The service of this name as it runs now.
pub(super) struct CurrentService {
    pub(super) service: Arc<Service>,
    pub(super) route: Arc<SniRoute>,
    pub(super) policy: AcceptPolicy,
    pub(super) controller: Arc<Controller>,
    pub(super) tls: Option<Arc<Tls>>,
    /// Whether more changes than the guest and the addresses.
    pub(super) has_new_settings: bool,
}

/// The plan for one address.
pub(super) enum PlannedEndpoint {
    /// The service has it and keeps it unchanged.
    Keep(Arc<ListeningSockets>),
    /// A service has it, with these settings, and its sockets get a new accept loop.
    Move(ListenAddress, Arc<ListeningSockets>, SocketSettings),
    /// No service has it.
    Bind(ListenAddress, BoundSockets),
}

/// A service with a guest that is known to work.
pub(super) struct ReadyService {
    pub(super) config: ServiceConfig,
    pub(super) service: Arc<Service>,
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) grants: Grants,
    /// `None` for a new service.
    pub(super) current: Option<(CurrentService, PreparedVersion)>,
    pub(super) endpoints: Vec<PlannedEndpoint>,
}

/// Plans for all of `wanted`. Addresses that cannot be had are added to `mistakes`.
///
/// # Errors
///
/// [`ReloadError::Draining`] if the server drains.
pub(super) fn plan(
    state: &SupervisorState,
    wanted: Vec<LoadedService>,
    mistakes: &mut Vec<Mistake>,
) -> Result<Vec<ServicePlan>, ReloadError> {
    let Some(groups) = &state.groups else {
        return Err(ReloadError::Draining);
    };
    let held = held_endpoints(state);
    let addresses: Vec<HeldAddress> = held
        .iter()
        .map(|(holder, endpoint)| HeldAddress {
            service: &holder.config.name,
            address: &endpoint.asked,
        })
        .collect();
    let asked = wanted.iter().map(|loaded| {
        let config = &loaded.config;
        (config.name.as_str(), config.listener.addresses.as_slice())
    });
    let assigned = assign(&addresses, asked);
    let mut plans = Vec::new();
    for (loaded, assignments) in wanted.into_iter().zip(assigned) {
        let current = current(state, &loaded);
        let config = &loaded.config;
        let of_kind = groups
            .iter()
            .filter(|group| group.dispatch == config.listener.dispatch);
        let shards = of_kind.map(|group| group.handles.len()).sum();
        let mut endpoints = Vec::new();
        for (asked, assignment) in assignments {
            match assignment {
                Assignment::Held(index) => {
                    let (holder, endpoint) = held[index];
                    let listening = endpoint.listening.clone();
                    let unchanged = current.as_ref().is_some_and(|one| !one.has_new_settings);
                    endpoints.push(match unchanged && holder.config.name == config.name {
                        true => PlannedEndpoint::Keep(listening),
                        false => {
                            PlannedEndpoint::Move(asked, listening, holder.config.listener.sockets)
                        }
                    });
                }
                Assignment::New => {
                    match BoundSockets::new(&asked, shards, &config.listener.sockets) {
                        Ok(bound) => endpoints.push(PlannedEndpoint::Bind(asked, bound)),
                        Err(error) => mistakes.push(Mistake {
                            line: config.origin.line_of("listen"),
                            text: format!("listen: {}", blame_own_endpoint(state, error)),
                        }),
                    }
                }
            }
        }
        plans.push(ServicePlan {
            loaded,
            current,
            endpoints,
        });
    }
    Ok(plans)
}

fn held_endpoints(state: &SupervisorState) -> Vec<(&RunningService, &Endpoint)> {
    let services = state.services.iter();
    services
        .flat_map(|service| {
            service
                .endpoints
                .iter()
                .map(move |endpoint| (service, endpoint))
        })
        .collect()
}

fn current(state: &SupervisorState, loaded: &LoadedService) -> Option<CurrentService> {
    let config = &loaded.config;
    let mut services = state.services.iter();
    let running = services.find(|running| running.config.name == config.name)?;
    Some(CurrentService {
        service: running.service.clone(),
        route: running.route.clone(),
        policy: running.policy.clone(),
        controller: running.controller.clone(),
        tls: running.tls.clone(),
        has_new_settings: !running.config.has_same_settings(config)
            || !running.grants.has_directories_of(&loaded.grants),
    })
}

/// An address that a running service listens on.
pub(super) struct HeldAddress<'a> {
    pub(super) service: &'a str,
    pub(super) address: &'a ListenAddress,
}

/// Where the sockets for an address come from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Assignment {
    /// From the held address at this index.
    Held(usize),
    /// From nowhere: they have to be bound.
    New,
}

/// Assigns held addresses to the services that ask for them, each to one service at most.
///
/// `asked` has the name and the addresses of each service. One passed name stands for all sockets
/// of that name.
pub(super) fn assign<'a>(
    held: &[HeldAddress<'_>],
    asked: impl Iterator<Item = (&'a str, &'a [ListenAddress])>,
) -> Vec<Vec<(ListenAddress, Assignment)>> {
    let mut free: Vec<usize> = (0..held.len()).collect();
    let mut of_service = |service: &str, address: &ListenAddress| {
        let takes_over = |index: &usize| {
            let held = &held[*index];
            address.takes_over(service, held.address, held.service)
        };
        let taken: Vec<usize> = match address {
            ListenAddress::Passed(_) => free.extract_if(.., |index| takes_over(index)).collect(),
            _ => {
                let found = free.iter().position(takes_over);
                found
                    .map(|position| free.remove(position))
                    .into_iter()
                    .collect()
            }
        };
        taken
    };
    asked
        .map(|(service, addresses)| {
            let mut assigned = Vec::new();
            for address in addresses {
                let taken = of_service(service, address);
                if taken.is_empty() {
                    assigned.push((address.clone(), Assignment::New));
                }
                let taken = taken.into_iter();
                assigned.extend(taken.map(|index| (address.clone(), Assignment::Held(index))));
            }
            assigned
        })
        .collect()
}

/// Says so if an address of this very server is in the way.
fn blame_own_endpoint(state: &SupervisorState, error: BindError) -> BindError {
    let endpoints = state.services.iter().flat_map(|service| &service.endpoints);
    let mut own = endpoints.flat_map(|endpoint| [&endpoint.asked, &endpoint.listening.address]);
    match error {
        BindError::Address {
            address, source, ..
        } if own.any(|own| address.is_taken_by(own)) => BindError::Address {
            address,
            source,
            fix: "another address of this server is in the way; remove it by an earlier reload",
        },
        error => error,
    }
}

impl ReadyService {
    /// Compiles the guest of a service at startup.
    ///
    /// # Errors
    ///
    /// [`LoadCause::GuestRefused`] if it cannot run.
    pub(super) fn at_startup(
        shared: &SharedResources,
        loaded: LoadedService,
        bound: Vec<(ListenAddress, BoundSockets)>,
    ) -> Result<Self, LoadCause> {
        let LoadedService {
            config,
            component,
            grants,
            tls,
            ..
        } = loaded;
        let settings = service_settings(&config, grants.clone(), shared.spans.clone());
        let (engine, open) = (shared.engine.clone(), shared.open.clone());
        let service = Service::new(settings, engine, open, component);
        let service = service.map_err(|reason| LoadCause::GuestRefused {
            path: config.handler.guest.clone(),
            reason,
        })?;
        let bound = bound.into_iter();
        Ok(Self {
            config,
            service: Arc::new(service),
            tls,
            grants,
            current: None,
            endpoints: bound
                .map(|(asked, bound)| PlannedEndpoint::Bind(asked, bound))
                .collect(),
        })
    }

    /// Compiles and probes the guest of a service at a reload.
    ///
    /// # Errors
    ///
    /// Fails if the guest is refused.
    pub(super) async fn at_reload(
        shared: &SharedResources,
        plan: ServicePlan,
    ) -> Result<Self, ReloadError> {
        let LoadedService {
            config,
            component,
            grants,
            tls,
            ..
        } = plan.loaded;
        let refused = ReloadError::from_swap(config.handler.guest.clone());
        let settings = service_settings(&config, grants.clone(), shared.spans.clone());
        let (service, current) = match plan.current {
            Some(current) => {
                let service = current.service.clone();
                let settings = current.has_new_settings.then_some(settings);
                let prepared = service.prepare(component, settings).await;
                (service, Some((current, prepared.map_err(refused)?)))
            }
            None => {
                let (engine, open) = (shared.engine.clone(), shared.open.clone());
                let made = Service::make(settings, engine, open, component).await;
                (Arc::new(made.map_err(refused)?), None)
            }
        };
        Ok(Self {
            config,
            service,
            tls,
            grants,
            current,
            endpoints: plan.endpoints,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Assignments for each service, from held and asked addresses as `SERVICE ADDRESS` pairs.
    fn assignments(held: &[(&str, &str)], asked: &[(&str, &[&str])]) -> Vec<Vec<Assignment>> {
        let parse = |text: &&str| text.parse::<ListenAddress>().unwrap();
        let held: Vec<_> = held
            .iter()
            .map(|(service, at)| (*service, parse(at)))
            .collect();
        let held: Vec<_> = held
            .iter()
            .map(|(service, address)| HeldAddress { service, address })
            .collect();
        let asked: Vec<(&str, Vec<_>)> = asked
            .iter()
            .map(|(service, addresses)| (*service, addresses.iter().map(parse).collect()))
            .collect();
        let asked = asked
            .iter()
            .map(|(service, addresses)| (*service, &addresses[..]));
        let assigned = assign(&held, asked).into_iter();
        assigned
            .map(|service| {
                service
                    .into_iter()
                    .map(|(_, assignment)| assignment)
                    .collect()
            })
            .collect()
    }

    use Assignment::{Held, New};

    #[test]
    fn an_address_that_stays_keeps_its_sockets() {
        let held = [("a", "127.0.0.1:1"), ("a", "127.0.0.1:2")];
        let asked: &[&str] = &["127.0.0.1:2", "127.0.0.1:3"];
        assert_eq!(assignments(&held, &[("a", asked)]), [[Held(1), New]]);
    }

    #[test]
    fn an_address_moves_to_another_service() {
        let held = [("a", "127.0.0.1:1"), ("b", "unix:/run/b.sock")];
        let asked: &[(&str, &[&str])] = &[("a", &["unix:/run/b.sock"]), ("c", &["127.0.0.1:1"])];
        assert_eq!(assignments(&held, asked), [[Held(1)], [Held(0)]]);
    }

    #[test]
    fn an_assigned_port_stays_with_its_service() {
        let held = [("a", "127.0.0.1:0")];
        let asked: &[(&str, &[&str])] = &[("b", &["127.0.0.1:0"]), ("a", &["127.0.0.1:0"])];
        assert_eq!(assignments(&held, asked), [[New], [Held(0)]]);
        let twice: &[&str] = &["127.0.0.1:0", "127.0.0.1:0"];
        assert_eq!(assignments(&held, &[("a", twice)]), [[Held(0), New]]);
    }

    #[test]
    fn a_passed_name_stands_for_all_of_its_sockets() {
        let held = [("a", "fd:web"), ("a", "fd:admin"), ("a", "fd:web")];
        let asked: &[(&str, &[&str])] = &[("b", &["fd:web"]), ("c", &["fd:web"])];
        assert_eq!(
            assignments(&held, asked),
            [vec![Held(0), Held(2)], vec![New]]
        );
    }
}
