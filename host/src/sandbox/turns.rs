//! How guests that compute without end make way for the others.
//!
//! Whoever has something to do gets a turn, and computes in it until the clock has ticked twice: for
//! one tick at least. A guest that then wants more waits for a lane, of which each thread has one,
//! and goes on for a tick at a time: so between the ticks of any such guests everyone else on that
//! thread has a turn, and waits for one tick, however many of them there are.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Counts the ticks of an engine's epoch.
#[derive(Clone, Default)]
pub(super) struct Clock(Arc<AtomicU64>);

impl Clock {
    pub(super) fn tick(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

thread_local! {
    static LANE: Arc<Semaphore> = Arc::new(Semaphore::new(1));

    /// What the guest that computes on this thread may, if it came by the lane.
    static HELD: Cell<Option<OwnedSemaphorePermit>> = const { Cell::new(None) };

    /// When the guest that computes on this thread is to make way.
    static ENDS: Cell<u64> = const { Cell::new(0) };
}

/// Begins a turn. To be called before a guest is polled.
pub(super) fn begin(clock: &Clock) {
    ENDS.set(clock.now() + 2);
}

/// Ends a turn, and leaves the lane if the guest came by it.
pub(super) fn end() {
    HELD.take();
}

/// Whether the turn has been long enough. A store that has waited for long finds its deadline
/// passed when its turn has only begun.
pub(super) fn is_over(clock: &Clock) -> bool {
    clock.now() >= ENDS.get()
}

/// Waits for the lane, and for everyone else to have had a turn.
pub(super) async fn make_way(clock: Clock) {
    // The lane is never closed.
    let held = LANE.with(Arc::clone).acquire_owned().await.ok();
    // The first turn is theirs who are known to be ready, the second theirs who come to be known of
    // only in the first: a connection is accepted in the one, and answered in the other.
    tokio::task::yield_now().await;
    tokio::task::yield_now().await;
    HELD.set(held);
    ENDS.set(clock.now() + 1);
}
