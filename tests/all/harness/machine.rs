//! Lets tests share the machine, or have it for themselves.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::{Duration, Instant};

/// How long an immediate event may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `condition` holds. `what` says what does not happen, if it does not.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A loopback address that no other test uses.
///
/// A port that is free on it stays free: the kernel gives ports of other addresses to other tests.
fn own_loopback() -> Ipv4Addr {
    let octet = || fastrand::u8(1..=254);
    Ipv4Addr::new(127, octet(), octet(), octet())
}

/// An address with a free port, for a server that is started later.
pub(crate) fn free_address() -> SocketAddr {
    let listener = TcpListener::bind((own_loopback(), 0)).expect("a port is free");
    listener.local_addr().expect("the socket has an address")
}

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
