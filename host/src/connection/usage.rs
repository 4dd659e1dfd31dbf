//! Resources that one connection has used.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Resources that a connection has used so far. The connection writes, anyone may read.
#[derive(Debug, Default)]
pub struct Usage {
    received: AtomicU64,
    sent: AtomicU64,
    /// In microseconds.
    computed: AtomicU64,
    memory: AtomicU64,
    /// In nanoseconds. Zero: no instance was made.
    instantiation: AtomicU64,
}

impl Usage {
    /// Bytes received from the client.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Bytes sent to the client.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// CPU time of the guest. It is sampled by epoch ticks, so it is right on average only.
    pub fn computed(&self) -> Duration {
        Duration::from_micros(self.computed.load(Ordering::Relaxed))
    }

    /// Memory of the guest in bytes. A WebAssembly memory never shrinks, so this is its peak too.
    pub fn memory(&self) -> u64 {
        self.memory.load(Ordering::Relaxed)
    }

    /// Time to make the instance. None if no instance was made.
    pub fn instantiation(&self) -> Option<Duration> {
        match self.instantiation.load(Ordering::Relaxed) {
            0 => None,
            nanos => Some(Duration::from_nanos(nanos)),
        }
    }

    pub(super) fn add_received(&self, bytes: usize) {
        add(&self.received, bytes as u64);
    }

    pub(super) fn add_sent(&self, bytes: usize) {
        add(&self.sent, bytes as u64);
    }

    pub(super) fn set_computed(&self, time: Duration) {
        self.computed
            .store(time.as_micros() as u64, Ordering::Relaxed);
    }

    pub(super) fn set_memory(&self, bytes: usize) {
        self.memory.store(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn set_instantiation(&self, duration: Duration) {
        let nanos = duration.as_nanos().max(1) as u64;
        self.instantiation.store(nanos, Ordering::Relaxed);
    }
}

/// Adds to a counter. It has one writer, so no atomic addition is needed.
fn add(counter: &AtomicU64, more: u64) {
    let before = counter.load(Ordering::Relaxed);
    // A test makes the host panic here. No connection moves that many bytes.
    #[cfg(test)]
    assert!(before.checked_add(more).is_some(), "the counter overflows");
    counter.store(before.wrapping_add(more), Ordering::Relaxed);
}
