//! The interface between the admin API and the server.

use std::sync::Arc;
use std::time::SystemTime;

use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, oneshot};

use super::log_stream::LogStream;
use crate::connection::ConnectionRegistry;
use crate::lifecycle::Lifecycle;
use crate::limit::Limit;
use crate::service::Services;

/// The parts of a server that the admin API shows and controls.
pub struct AdminState {
    /// All metrics.
    pub registry: Registry,
    /// The services.
    pub services: Services,
    /// Open connections of all services, removed ones included.
    pub open: Arc<ConnectionRegistry>,
    /// Lifecycle of the server.
    pub lifecycle: Lifecycle,
    /// Largest number of open connections.
    pub max_connections: usize,
    /// Values of the limits.
    pub limits: ConfiguredLimits,
    /// The log.
    pub logs: LogStream,
    /// Channel for orders to drain.
    pub drain: mpsc::Sender<()>,
    /// Channel for orders to upgrade. Each brings a channel for the result.
    pub restarts: mpsc::Sender<oneshot::Sender<RestartResult>>,
    /// Channel for orders to reload. Each brings a channel for the result.
    pub reloads: mpsc::Sender<oneshot::Sender<ReloadResult>>,
    /// Time when the server started.
    pub since: SystemTime,
}

/// Returns the value of each limit, for each service by name.
pub type ConfiguredLimits = Box<dyn Fn() -> Vec<(String, Vec<(Limit, String)>)> + Send + Sync>;

/// ID of the process that has taken over, or the reason for failure.
pub type RestartResult = Result<u32, String>;

/// Summary of the changes by a reload, or the reason for failure.
pub type ReloadResult = Result<String, ReloadFailure>;

/// A reload that changed nothing, as the admin API reports it.
#[derive(Clone, Debug, PartialEq)]
pub struct ReloadFailure {
    /// Kind of failure, for the status of the response.
    pub kind: ReloadFailureKind,
    /// Reason and fix, for the operator.
    pub text: String,
    /// Exit code for `ctl`. The admin API passes it on as it is.
    pub exit_code: u8,
}

/// Kind of a failed reload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReloadFailureKind {
    /// The new configuration, or a file that it names, cannot be used.
    Refused,
    /// The server is draining.
    Draining,
    /// The server failed, not the configuration.
    Internal,
}
