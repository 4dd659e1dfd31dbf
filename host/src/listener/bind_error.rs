//! Errors of binding and listening.

use std::io;

use crate::net::ListenAddress;
use crate::net::unix_socket_file::SocketFileError;

/// Why the server cannot listen on an address.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The system does not allow to listen on the address.
    #[error("cannot listen on {address}: {source}; {fix}")]
    Address {
        /// The address, as the operator wrote it.
        address: ListenAddress,
        /// The error of the system.
        source: io::Error,
        /// Advice for the operator.
        fix: &'static str,
    },

    /// A socket that another process passed is missing or unusable.
    #[error("cannot listen on {address}: {reason}")]
    Passed {
        /// The address, as the operator wrote it.
        address: ListenAddress,
        /// The cause and advice for the operator.
        reason: String,
    },

    /// The system has no resources left to use a listening socket.
    #[error("{stage} failed: {source}")]
    Resources {
        /// The failed step, such as `sharing a listener`.
        stage: &'static str,
        /// The error of the system.
        source: io::Error,
    },
}

impl BindError {
    /// Wraps an error of a TCP socket, with advice for its kind.
    pub(super) fn tcp(address: &ListenAddress) -> impl Fn(io::Error) -> Self {
        |source| Self::Address {
            address: address.clone(),
            fix: fix_for(source.kind()),
            source,
        }
    }

    /// Wraps an error of the file of a Unix socket.
    pub(super) fn socket_file(address: &ListenAddress) -> impl Fn(SocketFileError) -> Self {
        |SocketFileError { source, fix }| Self::Address {
            address: address.clone(),
            source,
            fix,
        }
    }

    pub(super) fn passed(address: &ListenAddress, reason: impl Into<String>) -> Self {
        Self::Passed {
            address: address.clone(),
            reason: reason.into(),
        }
    }
}

fn fix_for(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::AddrInUse => {
            "stop the server that holds the port, or choose another one (port 0 takes any that is free)"
        }
        io::ErrorKind::PermissionDenied => {
            "choose a port above 1023, or grant CAP_NET_BIND_SERVICE"
        }
        io::ErrorKind::AddrNotAvailable => {
            "use an address of this machine, or 0.0.0.0 or [::] for all"
        }
        _ => "choose another address",
    }
}
