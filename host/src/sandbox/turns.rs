//! How guests that compute without end make way for the others.
//!
//! Whoever has something to do gets a turn, and computes in it until the clock has ticked twice: for
//! one tick at least. A guest that then wants more waits for a lane, of which each thread has one,
//! and goes on for a tick at a time: so between the ticks of any such guests everyone else on that
//! thread has a turn, and waits for one tick, however many of them there are.
//!
//! Ticks are long as long as nobody wants more than a turn, which is mostly, and short while someone
//! does: a hundred such guests that come together have a hundred turns before anyone else's.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How long a tick is while nobody wants more than a turn. Shorter, and an idle server would wake
/// up more often.
const CALM: Duration = Duration::from_millis(5);

/// How long it is while someone does. Shorter, and going from one to the next would cost more than
/// the some percent that it does; longer, and a request beside a busy guest would wait longer.
const CROWDED: Duration = Duration::from_micros(250);

/// For how long ticks stay short after someone wanted more than a turn, in microseconds. Guests of
/// that kind come in numbers, and the first of them has a long turn.
const STAYS_CROWDED: u64 = 1_000_000;

/// Counts the ticks of an engine's epoch, and the time between them.
#[derive(Clone, Default)]
pub(super) struct Clock(Arc<Counted>);

#[derive(Default)]
struct Counted {
    ticks: AtomicU64,
    /// The time of all ticks, in microseconds.
    time: AtomicU64,
    /// Until when ticks are short, by that time.
    crowded: AtomicU64,
}

impl Clock {
    /// Counts a tick so long after the last one. Returns how long after it the next is due.
    pub(super) fn tick(&self, after: Duration) -> Duration {
        let after = u64::try_from(after.as_micros()).unwrap_or(u64::MAX);
        let time = self.0.time.fetch_add(after, Ordering::Relaxed) + after;
        self.0.ticks.fetch_add(1, Ordering::Relaxed);
        if time < self.0.crowded.load(Ordering::Relaxed) {
            CROWDED
        } else {
            CALM
        }
    }

    /// How long after the start the first tick is due.
    pub(super) fn first_tick() -> Duration {
        CALM
    }

    fn now(&self) -> u64 {
        self.0.ticks.load(Ordering::Relaxed)
    }

    /// The time of all ticks, in microseconds.
    fn time(&self) -> u64 {
        self.0.time.load(Ordering::Relaxed)
    }

    /// Someone wants more than a turn.
    fn is_crowded(&self) {
        let until = self.time() + STAYS_CROWDED;
        self.0.crowded.store(until, Ordering::Relaxed);
    }
}

thread_local! {
    static LANE: Arc<Semaphore> = Arc::new(Semaphore::new(1));

    /// What the guest that computes on this thread may, if it came by the lane.
    static HELD: Cell<Option<OwnedSemaphorePermit>> = const { Cell::new(None) };

    /// The turn of the guest that computes on this thread.
    static TURN: Cell<Turn> = const { Cell::new(Turn { began: 0, ends: 0, used: 0 }) };
}

/// A turn of a guest.
#[derive(Clone, Copy)]
struct Turn {
    /// By the clock's time, in microseconds.
    began: u64,
    /// The tick at which the guest is to make way.
    ends: u64,
    /// For how long the guest had computed when it began, in microseconds.
    used: u64,
}

/// Begins a turn of a guest that has computed for `used` microseconds before. To be called before a
/// guest is polled.
pub(super) fn begin(clock: &Clock, used: u64) {
    TURN.set(Turn {
        began: clock.time(),
        ends: clock.now() + 2,
        used,
    });
}

/// Ends a turn, and leaves the lane if the guest came by it. Returns for how long the guest has
/// computed now, in microseconds.
pub(super) fn end(clock: &Clock) -> u64 {
    HELD.take();
    used(clock)
}

/// For how long the guest that computes on this thread has done so, in microseconds.
///
/// What is counted is the ticks that fall into its turns. A short turn may see none, and another one
/// as short may see one: together they come to the time that was used.
pub(super) fn used(clock: &Clock) -> u64 {
    let turn = TURN.get();
    turn.used + clock.time().saturating_sub(turn.began)
}

/// Whether the turn has been long enough. A store that has waited for long finds its deadline
/// passed when its turn has only begun.
pub(super) fn is_over(clock: &Clock) -> bool {
    let over = clock.now() >= TURN.get().ends;
    if over {
        clock.is_crowded();
    }
    over
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
