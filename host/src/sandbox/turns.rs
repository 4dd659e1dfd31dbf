//! How guests that compute without end make way for the others.
//!
//! Whoever has something to do gets a turn, and computes in it until the clock has ticked twice: for
//! one tick at least. A guest that then wants more waits for a lane, of which each thread has one,
//! and goes on for a tick at a time: so between the ticks of any such guests everyone else on that
//! thread has a turn, and waits for one tick, however many of them there are.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

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

    /// The turn of the guest that computes on this thread.
    static TURN: Cell<Turn> = const { Cell::new(Turn { began: 0, ends: 0, used: 0 }) };
}

/// A turn, in ticks of the clock.
#[derive(Clone, Copy)]
struct Turn {
    began: u64,
    /// When the guest is to make way.
    ends: u64,
    /// What the guest had used when it began.
    used: u64,
}

/// Begins a turn of a guest that has computed for `used` ticks before. To be called before a guest
/// is polled.
pub(super) fn begin(clock: &Clock, used: u64) {
    let began = clock.now();
    TURN.set(Turn {
        began,
        ends: began + 2,
        used,
    });
}

/// Ends a turn, and leaves the lane if the guest came by it. Returns for how many ticks the guest
/// has computed now.
pub(super) fn end(clock: &Clock) -> u64 {
    HELD.take();
    used(clock)
}

/// For how many ticks the guest that computes on this thread has done so.
///
/// What is counted is the ticks that fall into its turns. A short turn may see none, and another one
/// as short may see one: together they come to the time that was used.
pub(super) fn used(clock: &Clock) -> u64 {
    let turn = TURN.get();
    turn.used + clock.now().saturating_sub(turn.began)
}

/// Whether the turn has been long enough. A store that has waited for long finds its deadline
/// passed when its turn has only begun.
pub(super) fn is_over(clock: &Clock) -> bool {
    clock.now() >= TURN.get().ends
}

/// Ready while the turn lasts. For what the host does for a guest without a word from it, such as
/// moving bytes from one stream to another: no tick is seen there.
pub(super) fn poll_lasts(clock: &Clock, cx: &mut Context<'_>) -> Poll<()> {
    if is_over(clock) {
        cx.waker().wake_by_ref();
        return Poll::Pending;
    }
    Poll::Ready(())
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
    TURN.set(Turn {
        ends: clock.now() + 1,
        ..TURN.get()
    });
}
