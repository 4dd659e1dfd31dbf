//! Errors of the admin API.

use std::io;

use super::address::AdminAddress;

/// Reason why the admin API cannot start.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address} for the admin API: {source}; {fix}")]
    Bind {
        /// The address.
        address: AdminAddress,
        /// Error of the operating system.
        source: io::Error,
        /// Advice for the operator.
        fix: &'static str,
    },
}
