//! The limits that keep guests and clients from harming others, by name.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Registry;

/// A limit that a guest or a client can meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// A guest's memories and tables together.
    MaxMemory,
    /// The memory of all guests together.
    MaxTotalMemory,
    /// The time that a guest computes.
    CpuTime,
    /// A guest's call stack.
    Stack,
    /// A guest's handles, streams, futures and tasks.
    MaxHandles,
    /// What a guest has open of the host: files, directories.
    MaxOpenFiles,
    /// What a guest hands to the host in one call.
    MaxCallSize,
    /// What is logged of what a guest prints.
    MaxOutput,
    /// Where a guest may connect to.
    AllowConnect,
    /// How long it takes until a guest can have a connection.
    HandshakeTimeout,
    /// TLS handshakes at once.
    MaxHandshakes,
    /// How long no byte is moved either way.
    IdleTimeout,
    /// How long a guest waits for the first byte.
    FirstByteTimeout,
    /// How long a client takes nothing of what is to be sent.
    WriteTimeout,
    /// How long a client's system may give no sign.
    Keepalive,
    /// How long a connection is open.
    MaxLifetime,
    /// How long a connection is open after its guest was replaced.
    MaxOldVersionAge,
    /// What is received on a connection.
    MaxBytesIn,
    /// What is sent on a connection.
    MaxBytesOut,
    /// Connections at once, where those beyond are closed.
    MaxConnections,
    /// Connections at once from one source.
    MaxConnectionsPerSource,
    /// Connections begun in a second.
    AcceptRate,
    /// Connections begun in a second from one source.
    AcceptRatePerSource,
    /// The sources that may connect.
    Allow,
    /// The sources that may not.
    Deny,
}

/// How often each was met since the process began, by its place in [`Limit::ALL`].
static MET: [AtomicU64; Limit::ALL.len()] = [const { AtomicU64::new(0) }; Limit::ALL.len()];

impl Limit {
    /// All there are.
    pub const ALL: [Self; 25] = [
        Self::MaxMemory,
        Self::MaxTotalMemory,
        Self::CpuTime,
        Self::Stack,
        Self::MaxHandles,
        Self::MaxOpenFiles,
        Self::MaxCallSize,
        Self::MaxOutput,
        Self::AllowConnect,
        Self::HandshakeTimeout,
        Self::MaxHandshakes,
        Self::IdleTimeout,
        Self::FirstByteTimeout,
        Self::WriteTimeout,
        Self::Keepalive,
        Self::MaxLifetime,
        Self::MaxOldVersionAge,
        Self::MaxBytesIn,
        Self::MaxBytesOut,
        Self::MaxConnections,
        Self::MaxConnectionsPerSource,
        Self::AcceptRate,
        Self::AcceptRatePerSource,
        Self::Allow,
        Self::Deny,
    ];

    /// Its name in the log and in the metrics: that of the flag that sets it, without the dashes.
    pub fn name(self) -> &'static str {
        match self {
            Self::MaxMemory => "max-memory",
            Self::MaxTotalMemory => "max-total-memory",
            Self::CpuTime => "cpu-time",
            Self::Stack => "stack",
            Self::MaxHandles => "max-handles",
            Self::MaxOpenFiles => "max-open-files",
            Self::MaxCallSize => "max-call-size",
            Self::MaxOutput => "max-output",
            Self::AllowConnect => "allow-connect",
            Self::HandshakeTimeout => "handshake-timeout",
            Self::MaxHandshakes => "max-handshakes",
            Self::IdleTimeout => "idle-timeout",
            Self::FirstByteTimeout => "first-byte-timeout",
            Self::WriteTimeout => "write-timeout",
            Self::Keepalive => "keepalive",
            Self::MaxLifetime => "max-lifetime",
            Self::MaxOldVersionAge => "max-old-version-age",
            Self::MaxBytesIn => "max-bytes-in",
            Self::MaxBytesOut => "max-bytes-out",
            Self::MaxConnections => "max-connections",
            Self::MaxConnectionsPerSource => "max-connections-per-source",
            Self::AcceptRate => "accept-rate",
            Self::AcceptRatePerSource => "accept-rate-per-source",
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }

    /// Counts that it was met.
    pub(crate) fn count(self) {
        MET[self as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How often it was met since the process began: by a connection once, if at all.
    pub fn hits(self) -> u64 {
        MET[self as usize].load(Ordering::Relaxed)
    }
}

/// Adds to `registry` how often each limit was met.
pub fn register(registry: &mut Registry) {
    registry.register_collector(Box::new(LimitCollector));
}

#[derive(Debug)]
struct LimitCollector;

impl Collector for LimitCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let mut family = encoder.encode_descriptor(
            "limits_met",
            "How often each limit was met: by a connection once, if at all",
            None,
            MetricType::Counter,
        )?;
        for limit in Limit::ALL {
            let labels = [("limit", limit.name())];
            ConstCounter::new(limit.hits()).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The limits that one connection has met, each once.
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

    /// Their names with commas between them, or None if there are none.
    pub(crate) fn names(&self) -> Option<String> {
        let names: Vec<_> = self.0.iter().map(|limit| limit.name()).collect();
        (!names.is_empty()).then(|| names.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_a_place_of_its_own() {
        for (place, limit) in Limit::ALL.into_iter().enumerate() {
            assert_eq!(limit as usize, place, "{limit}");
        }
    }

    #[test]
    fn a_connection_meets_a_limit_once() {
        let before = Limit::MaxBytesIn.hits();
        let mut met = LimitsHit::default();
        assert_eq!(met.names(), None);
        met.add(Limit::MaxBytesIn);
        met.add(Limit::Stack);
        met.add(Limit::MaxBytesIn);
        assert_eq!(met.names().as_deref(), Some("max-bytes-in,stack"));
        assert_eq!(Limit::MaxBytesIn.hits(), before + 1);
    }
}
