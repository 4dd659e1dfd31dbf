//! Resources that all services of a server share.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::config::model::ListenerConfig;
use crate::connection::ConnectionRegistry;
use crate::listener::{Incoming, MergeHandle};
use crate::sandbox::{Engine, SharedLimits};
use crate::server::Dispatch;
use crate::service::SniRoute;
use crate::telemetry::spans::SpanSender;

/// The engine, the registry and the limits that all services share.
pub(super) struct SharedResources {
    pub(super) engine: Engine,
    pub(super) open: Arc<ConnectionRegistry>,
    pub(super) spans: Option<Arc<SpanSender>>,
    pub(super) limits: SharedLimits,
    /// One permit for each open connection of the server.
    pub(super) connection_permits: Arc<Semaphore>,
    pub(super) max_connections: usize,
    pub(super) drain_timeout: Duration,
}

impl SharedResources {
    /// The number of connections that a service may have at once.
    pub(super) fn max_connections_of(&self, listener: &ListenerConfig) -> usize {
        let most = listener.max_connections.unwrap_or(self.max_connections);
        most.min(self.max_connections)
    }
}

/// The threads of one kind of dispatch, and the way to give them connections.
pub(super) struct ShardGroup {
    pub(super) dispatch: Dispatch,
    pub(super) handles: Vec<Handle>,
    /// One for each thread.
    pub(super) merges: Vec<MergeHandle<Incoming<Arc<SniRoute>>>>,
}
