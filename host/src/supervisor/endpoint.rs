//! The addresses of a service: bound, prepared, and then open for clients.

use std::sync::Arc;

use super::error::StartupError;
use super::resources::{ShardGroup, SharedResources};
use crate::config::model::{ListenerConfig, ServiceConfig};
use crate::lifecycle::Controller;
use crate::listener::{
    Admission, BindError, BoundSockets, ConnectionLimit, Incoming, ListeningSockets, MergeHandle,
    WhenFull,
};
use crate::net::ListenAddress;
use crate::server::Dispatch;
use crate::service::SniRoute;
use crate::systemd::activation::PassedSockets;
use crate::upgrade::InheritedFds;

/// An address that a service listens on.
pub(super) struct Endpoint {
    /// The address as the configuration has it.
    pub(super) asked: ListenAddress,
    pub(super) listening: Arc<ListeningSockets>,
    /// Lifecycle of the accept loops of this address.
    pub(super) controller: Arc<Controller>,
}

/// An endpoint with accept loops that have not started yet.
pub(super) struct PreparedEndpoint {
    endpoint: Endpoint,
    shards: Vec<PreparedShard>,
}

struct PreparedShard {
    merge: MergeHandle<Incoming<Arc<SniRoute>>>,
    incoming: Incoming<Arc<SniRoute>>,
}

/// How a service accepts its clients.
#[derive(Clone)]
pub(super) struct AcceptPolicy {
    dispatch: Dispatch,
    limit: ConnectionLimit,
    when_full: WhenFull,
    admission: Admission,
}

impl AcceptPolicy {
    /// The policy of a service without clients.
    pub(super) fn new(shared: &SharedResources, listener: &ListenerConfig) -> Self {
        let most = shared.max_connections_of(listener);
        Self {
            dispatch: listener.dispatch,
            limit: ConnectionLimit::new(shared.connection_permits.clone(), most),
            when_full: listener.when_full(),
            admission: Admission::new(listener.admission_rules(most)),
        }
    }

    /// A new policy for a service with clients, which count on. [`Self::resize`] then changes their
    /// number.
    pub(super) fn with_settings(
        &self,
        shared: &SharedResources,
        listener: &ListenerConfig,
    ) -> Self {
        let most = shared.max_connections_of(listener);
        Self {
            dispatch: listener.dispatch,
            limit: self.limit.clone(),
            when_full: listener.when_full(),
            admission: self.admission.with(listener.admission_rules(most)),
        }
    }

    /// Changes the number of connections to the configured one.
    pub(super) fn resize(&self, shared: &SharedResources, listener: &ListenerConfig) {
        self.limit.resize(shared.max_connections_of(listener));
    }
}

impl PreparedEndpoint {
    /// Prepares an accept loop on each thread of the policy's kind. None accepts yet.
    ///
    /// # Errors
    ///
    /// Fails if the process has no more files.
    pub(super) fn new(
        groups: &[ShardGroup],
        policy: &AcceptPolicy,
        route: &Arc<SniRoute>,
        asked: ListenAddress,
        listening: Arc<ListeningSockets>,
    ) -> Result<Self, BindError> {
        let controller = Arc::new(Controller::default());
        let mut shards = Vec::new();
        for group in groups
            .iter()
            .filter(|group| group.dispatch == policy.dispatch)
        {
            let by_shard = listening.by_shard(group.handles.len())?;
            let threads = group.handles.iter().zip(&group.merges);
            for ((handle, merge), listeners) in threads.zip(by_shard) {
                let _context = handle.enter();
                shards.push(PreparedShard {
                    merge: merge.clone(),
                    incoming: Incoming::new(
                        listeners,
                        route.clone(),
                        policy.limit.clone(),
                        policy.when_full.clone(),
                        policy.admission.clone(),
                        &controller.lifecycle(),
                    )?,
                });
            }
        }
        let endpoint = Endpoint {
            asked,
            listening,
            controller,
        };
        Ok(Self { endpoint, shards })
    }

    /// The address of the sockets.
    pub(super) fn address(&self) -> &ListenAddress {
        &self.endpoint.listening.address
    }

    /// Whether the endpoint uses these sockets.
    pub(super) fn uses(&self, listening: &Arc<ListeningSockets>) -> bool {
        Arc::ptr_eq(&self.endpoint.listening, listening)
    }

    /// Starts to accept clients.
    pub(super) fn open(self) -> Endpoint {
        for PreparedShard { merge, incoming } in self.shards {
            merge.add(incoming);
        }
        self.endpoint
    }
}

/// Binds all addresses of a service at startup. Sockets from a parent process or the
/// service manager come first.
pub(super) fn bind_all(
    service: &ServiceConfig,
    shards: usize,
    inherited: &mut InheritedFds,
    passed: &mut PassedSockets,
) -> Result<Vec<(ListenAddress, BoundSockets)>, StartupError> {
    let settings = &service.listener.sockets;
    let mut all = Vec::new();
    for address in &service.listener.addresses {
        let (sockets, file) = inherited.take_sockets(&service.name, address);
        let bound = match address {
            _ if !sockets.is_empty() => BoundSockets::adopt(address, sockets, file, settings)?,
            ListenAddress::Passed(name) => {
                BoundSockets::passed(address, passed.take_sockets(name)?, settings)?
            }
            _ => vec![BoundSockets::new(address, shards, settings)?],
        };
        all.extend(bound.into_iter().map(|bound| (address.clone(), bound)));
    }
    Ok(all)
}
