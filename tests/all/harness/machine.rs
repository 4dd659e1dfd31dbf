//! Lets tests share the machine, or have it for themselves.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

/// How long an immediate event may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Held for writing by tests that make heavy load or measure time.
static MACHINE: RwLock<()> = RwLock::new(());

/// A test's hold on the machine.
pub(super) enum MachineUse {
    /// Other tests run at the same time.
    Shared(#[allow(dead_code, reason = "held")] RwLockReadGuard<'static, ()>),
    /// No other test has a server.
    Exclusive(#[allow(dead_code, reason = "held")] RwLockWriteGuard<'static, ()>),
}

impl MachineUse {
    /// Waits until no test uses the machine exclusively.
    pub(super) fn shared() -> Self {
        // A test that failed has left nothing inconsistent behind.
        Self::Shared(MACHINE.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until no other test uses the machine.
    pub(super) fn exclusive() -> Self {
        Self::Exclusive(MACHINE.write().unwrap_or_else(PoisonError::into_inner))
    }
}
