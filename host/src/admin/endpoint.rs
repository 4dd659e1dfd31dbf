//! The paths of the admin API that need authorization.

/// Methods of endpoints that only read.
pub(super) const READ: &str = "GET, HEAD";

/// Paths, for the answer to an unknown one.
pub(super) const ALL: &str = "GET /, /healthz, /readyz, /metrics, /v1/status, /v1/connections, \
    /v1/limits or /v1/logs; DELETE /v1/connections/ID; POST /v1/drain, /v1/reload, /v1/restart, \
    /v1/services/NAME/swap or /v1/services/NAME/rollback";

/// An endpoint, with the variable segments of its path.
#[derive(Clone, Copy)]
pub(super) enum Endpoint<'a> {
    Metrics,
    Status,
    Connections,
    Limits,
    Logs,
    /// A connection, by its number.
    Connection(&'a str),
    Drain,
    Reload,
    Restart,
    /// Swap of the guest of a service.
    Swap(&'a str),
    /// Rollback of the guest of a service.
    Rollback(&'a str),
}

impl<'a> Endpoint<'a> {
    /// The endpoint at a path, by the segments of the path.
    pub(super) fn find(segments: &[&'a str]) -> Option<Self> {
        Some(match *segments {
            ["metrics"] => Self::Metrics,
            ["v1", "status"] => Self::Status,
            ["v1", "connections"] => Self::Connections,
            ["v1", "connections", id] => Self::Connection(id),
            ["v1", "limits"] => Self::Limits,
            ["v1", "logs"] => Self::Logs,
            ["v1", "drain"] => Self::Drain,
            ["v1", "reload"] => Self::Reload,
            ["v1", "restart"] => Self::Restart,
            ["v1", "services", name, "swap"] => Self::Swap(name),
            ["v1", "services", name, "rollback"] => Self::Rollback(name),
            _ => return None,
        })
    }

    /// Methods that the endpoint allows, as in the header `Allow`.
    pub(super) fn methods(self) -> &'static str {
        match self {
            Self::Metrics | Self::Status | Self::Connections | Self::Limits => READ,
            Self::Logs => "GET",
            Self::Connection(_) => "DELETE",
            Self::Drain | Self::Reload | Self::Restart | Self::Swap(_) | Self::Rollback(_) => {
                "POST"
            }
        }
    }
}
