//! Counters of the connections of a version and of a service.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::outcome::OutcomeKind;
use super::usage::Usage;
use crate::telemetry::counters::Counters;
use crate::telemetry::histogram::Histogram;

/// Connections of one version: how many are open, and how the others ended.
#[derive(Debug, Default)]
pub struct VersionStats {
    open: AtomicU64,
    ended: Counters<OutcomeKind, { OutcomeKind::COUNT }>,
}

impl VersionStats {
    /// Number of open connections.
    pub fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    /// Number of ended connections by outcome, in the order of [`OutcomeKind`].
    pub fn ended(&self) -> [u64; OutcomeKind::COUNT] {
        self.ended.all()
    }

    /// Counts a connection as open until the guard is dropped.
    pub(super) fn begin(&self) -> OpenGuard<'_> {
        self.open.fetch_add(1, Ordering::Relaxed);
        OpenGuard(&self.open)
    }

    /// Counts a connection as ended.
    pub(super) fn end(&self, kind: OutcomeKind) {
        self.ended.add(kind);
    }
}

/// Counts one connection as open.
pub(super) struct OpenGuard<'a>(&'a AtomicU64);

impl Drop for OpenGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Resources that the ended connections of a service used.
#[derive(Debug)]
pub struct ServiceStats {
    /// Time for which connections were open, in seconds.
    pub duration: Histogram,
    /// Time to make the instance of a connection, in seconds.
    pub instantiation: Histogram,
    /// CPU time of the guest of a connection, in seconds.
    pub cpu: Histogram,
    /// Peak memory of the guest of a connection, in bytes.
    pub memory: Histogram,
    received: AtomicU64,
    sent: AtomicU64,
}

impl Default for ServiceStats {
    fn default() -> Self {
        Self {
            // From a tenth of a millisecond to some hours.
            duration: Histogram::new(100, 4, 1e6),
            // From a microsecond to 16 ms.
            instantiation: Histogram::new(1_000, 2, 1e9),
            // From a millisecond to 16 s.
            cpu: Histogram::new(1_000, 2, 1e6),
            // From one page of WebAssembly to 1 GiB.
            memory: Histogram::new(65_536, 2, 1.0),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        }
    }
}

impl ServiceStats {
    /// Bytes received on ended connections.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Bytes sent on ended connections.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Adds a connection that has ended.
    pub(super) fn add(&self, duration: Duration, usage: &Usage) {
        self.duration.observe(duration.as_micros() as u64);
        if let Some(instantiation) = usage.instantiation() {
            self.instantiation.observe(instantiation.as_nanos() as u64);
        }
        self.cpu.observe(usage.computed().as_micros() as u64);
        self.memory.observe(usage.memory());
        self.received.fetch_add(usage.received(), Ordering::Relaxed);
        self.sent.fetch_add(usage.sent(), Ordering::Relaxed);
    }
}
