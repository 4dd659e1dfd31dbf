//! The settings of a service.

use std::sync::Arc;
use std::time::Duration;

use super::probe::Probe;
use crate::connection::ConnectionLimits;
use crate::sandbox::{Grants, GuestLimits};
use crate::telemetry::spans::SpanSender;

/// Settings of a service, apart from its guest.
pub struct ServiceSettings {
    /// Name of the service.
    pub name: String,
    /// Limits of each connection.
    pub limits: ConnectionLimits,
    /// Limits of each guest instance.
    pub sandbox: GuestLimits,
    /// Files and networks that guests may use.
    pub grants: Grants,
    /// Request that a new version has to answer before clients reach it.
    pub probe: Option<Probe>,
    /// Longest time that connections may keep a replaced version. `None` is no limit.
    pub max_old_version_age: Option<Duration>,
    /// Receiver of a trace span for each connection.
    pub spans: Option<Arc<SpanSender>>,
}
