//! A version of a service.

use std::sync::Arc;

use super::kill_switch::KillSwitch;
use super::limits::ConnectionLimits;
use super::stats::{ServiceStats, VersionStats};
use crate::lifecycle::Lifecycle;
use crate::sandbox::Guest;
use crate::telemetry::spans::SpanSender;

/// A version of a service. Connections that start while it is current stay with it.
pub struct Version {
    /// Name of the service.
    pub service: Arc<str>,
    /// The guest that handles each connection.
    pub guest: Arc<Guest>,
    /// Limits of each connection.
    pub limits: ConnectionLimits,
    /// Reports the replacement of the version, and the end of the server.
    pub lifecycle: Lifecycle,
    /// Counters of this version.
    pub stats: VersionStats,
    /// Counters of the service, which its versions share.
    pub service_stats: Arc<ServiceStats>,
    /// Ends all connections of the service.
    pub kill_switch: Arc<KillSwitch>,
    /// Exporter of a span for each connection, if one is configured.
    pub spans: Option<Arc<SpanSender>>,
}
