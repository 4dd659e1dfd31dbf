//! The running services.

use std::path::PathBuf;
use std::sync::Arc;

use super::endpoint::{AcceptPolicy, Endpoint};
use super::resources::ShardGroup;
use crate::config::model::ServiceConfig;
use crate::connection::Handshake;
use crate::connection::TrustedProxies;
use crate::connection::tls::Tls;
use crate::lifecycle::Controller;
use crate::net::ListenAddress;
use crate::sandbox::Grants;
use crate::service::{NamedService, Service, ServiceSettings, SniRoute};
use crate::telemetry::spans::SpanSender;

/// All services, with the remains of removed ones.
pub(super) struct SupervisorState {
    /// `None` once the server drains.
    pub(super) groups: Option<Vec<ShardGroup>>,
    pub(super) services: Vec<RunningService>,
    /// Services that are no longer configured and still have connections.
    pub(super) retiring: Vec<Arc<Controller>>,
    pub(super) draining: Vec<DrainingEndpoint>,
}

/// An address that was given up, and whose last clients are being accepted.
pub(super) struct DrainingEndpoint {
    pub(super) asked: ListenAddress,
    pub(super) controller: Arc<Controller>,
}

/// A service with its endpoints.
pub(super) struct RunningService {
    pub(super) config: ServiceConfig,
    pub(super) service: Arc<Service>,
    /// Leads the clients of its endpoints to this service, or to one behind it.
    pub(super) route: Arc<SniRoute>,
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) grants: Grants,
    pub(super) policy: AcceptPolicy,
    pub(super) controller: Arc<Controller>,
    pub(super) endpoints: Vec<Endpoint>,
}

/// A watched file of a service has changed.
#[derive(Clone, Debug, PartialEq)]
pub enum FileChange {
    /// The guest of the service with this name.
    Guest(String),
    /// A file of TLS of the service with this name.
    Tls(String),
}

/// The files of a service to watch. Files of TLS always are: certificates expire.
pub(super) fn watched_files(
    config: &ServiceConfig,
    tls: Option<&Tls>,
) -> Vec<(FileChange, PathBuf)> {
    let mut files = Vec::new();
    if config.handler.swap.watch {
        let change = FileChange::Guest(config.name.clone());
        files.push((change, config.handler.guest.clone()));
    }
    for file in tls.into_iter().flat_map(Tls::files) {
        files.push((FileChange::Tls(config.name.clone()), file));
    }
    files
}

/// Settings of the service that `config` describes.
pub fn service_settings(
    config: &ServiceConfig,
    grants: Grants,
    spans: Option<Arc<SpanSender>>,
) -> ServiceSettings {
    let handler = &config.handler;
    ServiceSettings {
        name: config.name.clone(),
        limits: handler.connection_limits,
        sandbox: handler.guest_limits.clone(),
        grants,
        probe: handler.swap.probe.clone(),
        max_old_version_age: handler.swap.max_old_version_age,
        spans,
    }
}

/// A route that leads all clients to `service`.
pub(super) fn route(
    config: &ServiceConfig,
    tls: &Option<Arc<Tls>>,
    controller: &Controller,
    service: &Arc<Service>,
) -> Arc<SniRoute> {
    let handshake = &config.listener.handshake;
    let from = handshake.proxies.clone();
    let handshake = Handshake {
        proxy: (!from.is_empty()).then_some(TrustedProxies { from }),
        tls: tls.clone(),
        timeout: handshake.timeout,
        lifecycle: Some(controller.lifecycle()),
    };
    Arc::new(SniRoute::new(handshake, service.clone()))
}

/// Leads clients of each service to the services behind it.
pub(super) fn route_by_server_name(services: &[RunningService]) {
    for front in services {
        let behind = services.iter().filter_map(|other| {
            let behind = other.config.behind.as_ref()?;
            (behind.service == front.config.name).then(|| NamedService {
                names: behind.server_names.clone(),
                service: other.service.clone(),
            })
        });
        front.route.set_named(behind.collect());
    }
}
