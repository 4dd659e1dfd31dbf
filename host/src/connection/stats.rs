//! What is counted of connections.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::telemetry::histogram::Histogram;

/// How connections end.
#[derive(Clone, Copy)]
pub(super) enum OutcomeKind {
    Ok,
    GuestError,
    Trap,
    ClientGone,
    Limit,
    Killed,
    DrainTimeout,
    NoSandbox,
}

/// The kinds by name, in their order.
pub const OUTCOMES: [&str; 8] = [
    "ok",
    "guest_error",
    "trap",
    "client_gone",
    "limit",
    "killed",
    "drain_timeout",
    "no_sandbox",
];

/// The connections of one version of a guest: how many are open, and how the others have ended.
#[derive(Debug, Default)]
pub struct VersionStats {
    open: AtomicU64,
    ended: [AtomicU64; OUTCOMES.len()],
}

impl VersionStats {
    /// The connections that are open.
    pub fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    /// The connections that have ended in each of [`KINDS`].
    pub fn ended(&self) -> [u64; OUTCOMES.len()] {
        std::array::from_fn(|kind| self.ended[kind].load(Ordering::Relaxed))
    }

    /// Counts a connection as open until what is returned is dropped.
    pub(super) fn begin(&self) -> OpenGuard<'_> {
        self.open.fetch_add(1, Ordering::Relaxed);
        OpenGuard(&self.open)
    }

    /// Counts how a connection has ended.
    pub(super) fn end(&self, kind: OutcomeKind) {
        self.ended[kind as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// A connection that is open.
pub(super) struct OpenGuard<'a>(&'a AtomicU64);

impl Drop for OpenGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What connections took, whichever version they were served with.
#[derive(Debug)]
pub struct ServiceStats {
    /// How long they were open, in seconds.
    pub duration: Histogram,
    /// How long it took to make their instance, in seconds.
    pub instantiation: Histogram,
    /// How long their guest computed, in seconds.
    pub cpu: Histogram,
    /// The memory that their guest had at most, in bytes.
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
            // From a page of WebAssembly to half of a GiB and more.
            memory: Histogram::new(65_536, 2, 1.0),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        }
    }
}

impl ServiceStats {
    /// What was received on connections that have ended, in bytes.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// What was sent on connections that have ended, in bytes.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Counts what a connection took that has ended.
    pub(super) fn add(&self, open_for: Duration, used: &super::Usage) {
        self.duration.observe(open_for.as_micros() as u64);
        if let Some(took) = used.instantiation() {
            self.instantiation.observe(took.as_nanos() as u64);
        }
        self.cpu.observe(used.computed().as_micros() as u64);
        self.memory.observe(used.memory());
        self.received.fetch_add(used.received(), Ordering::Relaxed);
        self.sent.fetch_add(used.sent(), Ordering::Relaxed);
    }
}
