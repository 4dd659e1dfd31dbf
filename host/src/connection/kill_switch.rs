//! A switch that ends all connections of a service.

use std::sync::atomic::{AtomicBool, Ordering};

/// Ends the connections of a service, open and future ones.
#[derive(Debug, Default)]
pub struct KillSwitch(AtomicBool);

impl KillSwitch {
    /// Turns the switch on. It stays on.
    pub(super) fn activate(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_active(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}
