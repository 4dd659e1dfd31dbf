//! The results of a swap.

use std::time::Duration;

use crate::named_enum;
use crate::sandbox::Digest;

named_enum! {
    /// How an attempt to swap a guest ended.
    pub(super) enum SwapOutcome {
        /// New connections use the new version.
        Swapped => "swapped",
        /// The version was the current one already.
        Unchanged => "unchanged",
        /// The new version was refused, and the current one stays.
        Refused => "refused",
        /// New connections use the previous version.
        RolledBack => "rolled_back",
    }
}

/// The versions before and after a successful swap.
#[derive(Debug)]
pub struct SwapReport {
    /// Version that new connections use now.
    pub digest: Digest,
    /// Version that new connections used before. If it equals `digest`, nothing has changed.
    pub before: Digest,
    /// Time for preparing the version and exchanging the two.
    pub took: Duration,
}

/// Reason why the current version stays.
#[derive(Debug, thiserror::Error)]
pub enum SwapError {
    /// The new version cannot run, or failed its probe.
    #[error("the new version is refused, and nothing has changed: {0}")]
    Refused(String),
    /// The service has had one version only.
    #[error("there is no previous version to roll back to; swap to another version first")]
    NoPrevious,
    /// The server accepts no more connections.
    #[error(
        "the server is draining, and nothing has changed; swap the guest of its successor instead"
    )]
    Draining,
    /// The host failed, not the guest.
    #[error("the new version could not be prepared, and nothing has changed: {0}")]
    Internal(String),
}
