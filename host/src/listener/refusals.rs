//! Log lines about clients that are refused or delayed.

use std::time::Duration;

use tracing::warn;

use crate::limit::Limit;
use crate::net::Peer;
use crate::telemetry::log::RateLimit;

/// Counts refused and delayed clients, and logs them once a second.
#[derive(Default)]
pub(super) struct Refusals {
    refused: RateLimit,
    delayed: RateLimit,
}

impl Refusals {
    /// Records that `limit` refused a client.
    pub(super) fn refused(&self, limit: Limit, peer: Peer) {
        limit.count();
        if let Some(refused) = self.refused.record() {
            warn!(%limit, %peer, refused, "refused a client ({refused} since the last report)");
        }
    }

    /// Records that clients wait for the accept rate.
    pub(super) fn delayed(&self, wait: Duration) {
        Limit::AcceptRate.count();
        if self.delayed.record().is_some() {
            warn!(limit = %Limit::AcceptRate, ?wait, "clients connect too fast and have to wait");
        }
    }
}
