//! Limits that keep guests and clients from harming others.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Registry;

use crate::telemetry::counters::{Counters, Named};

crate::named_enum! {
    /// A limit that a guest or a client can hit.
    ///
    /// The name of a limit is that of its flag, without the dashes.
    pub enum Limit {
        /// Memories and tables of one guest together, in bytes.
        MaxMemory => "max-memory",
        /// Memory of all guests together, in bytes.
        MaxTotalMemory => "max-total-memory",
        /// CPU time of a guest.
        CpuTime => "cpu-time",
        /// Call stack of a guest, in bytes.
        Stack => "stack",
        /// Handles, streams, futures and tasks of a guest.
        MaxHandles => "max-handles",
        /// Files and directories of the host that a guest has open.
        MaxOpenFiles => "max-open-files",
        /// Bytes that a guest passes to the host in one call.
        MaxCallSize => "max-call-size",
        /// Guest output that is logged.
        MaxOutput => "max-output",
        /// Destinations that a guest may connect to.
        AllowConnect => "allow-connect",
        /// Time until a connection is ready for a guest.
        HandshakeTimeout => "handshake-timeout",
        /// Concurrent TLS handshakes.
        MaxHandshakes => "max-handshakes",
        /// Time without a byte in either direction.
        IdleTimeout => "idle-timeout",
        /// Time that a guest waits for the first byte.
        FirstByteTimeout => "first-byte-timeout",
        /// Time that a client takes none of the bytes to send.
        WriteTimeout => "write-timeout",
        /// Idle time after which the kernel probes the client (TCP keepalive).
        Keepalive => "keepalive",
        /// Duration of a connection.
        MaxLifetime => "max-lifetime",
        /// Duration of a connection after its guest was replaced.
        MaxOldVersionAge => "max-old-version-age",
        /// Bytes received on a connection.
        MaxBytesIn => "max-bytes-in",
        /// Bytes sent on a connection.
        MaxBytesOut => "max-bytes-out",
        /// Concurrent connections, if the server closes those beyond.
        MaxConnections => "max-connections",
        /// Concurrent connections from one source.
        MaxConnectionsPerSource => "max-connections-per-source",
        /// New connections per second.
        AcceptRate => "accept-rate",
        /// New connections per second from one source.
        AcceptRatePerSource => "accept-rate-per-source",
        /// Sources that may connect.
        Allow => "allow",
        /// Sources that may not connect.
        Deny => "deny",
    }
}

/// Hits of each limit since the process began.
static HITS: Counters<Limit, { Limit::COUNT }> = Counters::new();

impl Limit {
    /// All limits, in the order of their declaration.
    pub const ALL: [Self; Self::COUNT] = match <Self as Named>::ALL.first_chunk() {
        Some(all) => *all,
        None => unreachable!(),
    };

    /// The name in the log and in the metrics.
    pub fn name(self) -> &'static str {
        Named::name(self)
    }

    /// Counts a hit.
    pub(crate) fn count(self) {
        HITS.add(self);
    }

    /// Hits since the process began, at most one per connection.
    pub fn hits(self) -> u64 {
        HITS.get(self)
    }
}

/// Registers the hits of each limit.
pub fn register(registry: &mut Registry) {
    registry.register_collector(Box::new(LimitCollector));
}

#[derive(Debug)]
struct LimitCollector;

impl Collector for LimitCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let help = "Hits of each limit, at most one per connection";
        HITS.encode(&mut encoder, "limits_met", help, "limit")
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Limits that one connection has hit, each once.
#[derive(Debug, Default)]
pub(crate) struct LimitsHit(Vec<Limit>);

impl LimitsHit {
    /// Adds `limit`, and counts it the first time.
    pub(crate) fn add(&mut self, limit: Limit) {
        if !self.0.contains(&limit) {
            limit.count();
            self.0.push(limit);
        }
    }

    /// The names of the limits, separated by commas. None if no limit was hit.
    pub(crate) fn names(&self) -> Option<String> {
        let names: Vec<_> = self.0.iter().map(|limit| limit.name()).collect();
        (!names.is_empty()).then(|| names.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_has_its_index_in_all() {
        for (index, limit) in Limit::ALL.into_iter().enumerate() {
            assert_eq!(limit as usize, index, "{limit}");
        }
    }

    #[test]
    fn a_connection_counts_a_limit_once() {
        let before = Limit::MaxBytesIn.hits();
        let mut hit = LimitsHit::default();
        assert_eq!(hit.names(), None);
        hit.add(Limit::MaxBytesIn);
        hit.add(Limit::Stack);
        hit.add(Limit::MaxBytesIn);
        assert_eq!(hit.names().as_deref(), Some("max-bytes-in,stack"));
        assert_eq!(Limit::MaxBytesIn.hits(), before + 1);
    }
}
