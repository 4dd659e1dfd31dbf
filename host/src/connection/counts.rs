//! What is counted of all connections.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// How connections end.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Ok,
    GuestError,
    Trap,
    ClientGone,
    Limit,
    DrainTimeout,
    NoSandbox,
}

/// The kinds by name, in their order.
const KINDS: [&str; 7] = [
    "ok",
    "guest_error",
    "trap",
    "client_gone",
    "limit",
    "drain_timeout",
    "no_sandbox",
];

/// Counts connections and what they move, for the metrics.
pub struct Counts {
    open: Gauge,
    /// By kind.
    ended: [Counter; KINDS.len()],
    duration: Histogram,
    received: Counter,
    sent: Counter,
}

impl Counts {
    /// Begins to count, as part of `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let by_outcome: Family<[(&str, &str); 1], Counter> = Family::default();
        // From a tenth of a millisecond to a quarter of an hour.
        let duration = Histogram::new(exponential_buckets(0.0001, 4.0, 12));
        let this = Self {
            open: Gauge::default(),
            ended: KINDS.map(|kind| by_outcome.get_or_create_owned(&[("outcome", kind)])),
            duration,
            received: Counter::default(),
            sent: Counter::default(),
        };
        let help = "Connections that are open";
        registry.register("connections_open", help, this.open.clone());
        let help = "Connections that have ended, and how";
        registry.register("connections", help, by_outcome);
        let help = "How long connections were open";
        let duration = this.duration.clone();
        registry.register_with_unit("connection_duration", help, Unit::Seconds, duration);
        let help = "What was received on connections that have ended";
        registry.register_with_unit("received", help, Unit::Bytes, this.received.clone());
        let help = "What was sent on connections that have ended";
        registry.register_with_unit("sent", help, Unit::Bytes, this.sent.clone());
        this
    }

    /// Counts a connection as open until what is returned is dropped.
    pub(super) fn begin(&self) -> Open<'_> {
        self.open.inc();
        Open(&self.open)
    }

    /// Counts how a connection has ended.
    pub(super) fn ended(&self, kind: Kind, duration: Duration, received: u64, sent: u64) {
        self.ended[kind as usize].inc();
        self.duration.observe(duration.as_secs_f64());
        self.received.inc_by(received);
        self.sent.inc_by(sent);
    }
}

/// A connection that is open.
pub(super) struct Open<'a>(&'a Gauge);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}
