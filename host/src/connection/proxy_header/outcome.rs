//! How the headers of proxies are received.

use crate::named_enum;
use crate::telemetry::counters::Counters;

named_enum! {
    /// Result of reading the header of a proxy.
    pub(in crate::connection) enum HeaderOutcome {
        /// The address of a client.
        Client => "client",
        /// No client: the proxy speaks for itself.
        NoClient => "no_client",
        /// The proxy only checked whether the port is open.
        HealthCheck => "health_check",
        Bad => "bad",
        Timeout => "timeout",
        Gone => "gone",
    }
}

/// Headers received by this process by outcome.
pub(in crate::connection) static HEADERS: Counters<HeaderOutcome, { HeaderOutcome::COUNT }> =
    Counters::new();
