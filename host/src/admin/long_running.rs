//! Requests without a deadline.

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether a request may take longer than the deadline for responses.
#[derive(Default)]
pub(super) struct LongRunning(AtomicBool);

impl LongRunning {
    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Lifts the deadline for good.
    pub(super) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Lifts the deadline while `work` runs.
    pub(super) async fn during<T>(&self, work: impl Future<Output = T>) -> T {
        self.set();
        let output = work.await;
        self.0.store(false, Ordering::Relaxed);
        output
    }
}
