//! How guests that compute without end make way for the others.
//!
//! Whoever has something to do gets a turn, and computes in it until the clock has ticked twice: for
//! one tick at least. A guest that then wants more waits for a lane, of which each thread has one,
//! and goes on for a tick at a time: so between the ticks of any such guests everyone else on that
//! thread has a turn, and waits for one tick, however many of them there are. Who has computed little
//! so far is let go first there: a request that takes some milliseconds is not to wait for a hundred
//! that never end.
//!
//! Ticks are long as long as nobody wants more than a turn, which is mostly, and short while someone
//! does: a hundred such guests that come together have a hundred turns before anyone else's.

use std::cell::Cell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::oneshot;

use super::lock;

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
pub(super) struct EpochClock(Arc<ClockCounters>);

#[derive(Default)]
struct ClockCounters {
    ticks: AtomicU64,
    /// The time of all ticks, in microseconds.
    time: AtomicU64,
    /// Until when ticks are short, by that time.
    crowded: AtomicU64,
}

impl EpochClock {
    /// Counts a tick so long after the last one.
    pub(super) fn tick(&self, after: Duration) {
        let after = u64::try_from(after.as_micros()).unwrap_or(u64::MAX);
        self.0.time.fetch_add(after, Ordering::Relaxed);
        self.0.ticks.fetch_add(1, Ordering::Relaxed);
    }

    /// How long after the last tick the next one is due.
    pub(super) fn due(&self) -> Duration {
        if self.time() < self.0.crowded.load(Ordering::Relaxed) {
            CROWDED
        } else {
            CALM
        }
    }

    fn now(&self) -> u64 {
        self.0.ticks.load(Ordering::Relaxed)
    }

    /// The time of all ticks, in microseconds.
    fn time(&self) -> u64 {
        self.0.time.load(Ordering::Relaxed)
    }

    /// Someone wants more than a turn.
    fn crowd(&self) {
        let until = self.time() + STAYS_CROWDED;
        self.0.crowded.store(until, Ordering::Relaxed);
    }
}

thread_local! {
    static LANE: Arc<RunQueue> = Arc::default();

    /// What the guest that computes on this thread may, if it came by the lane.
    static HELD: Cell<Option<RunToken>> = const { Cell::new(None) };

    /// The turn of the guest that computes on this thread.
    static TURN: Cell<Turn> = const { Cell::new(Turn::NONE) };

    /// Whether the guest that was polled last on this thread waits to go on, and for nothing else.
    static MAKES_WAY: Cell<bool> = const { Cell::new(false) };
}

/// A turn of a guest.
#[derive(Clone, Copy)]
struct Turn {
    /// By the clock's time, in microseconds.
    began: u64,
    /// The tick at which the guest is to make way.
    ends: u64,
    /// What the guest had computed when it began.
    before: CpuTime,
}

impl Turn {
    const NONE: Self = Self {
        began: 0,
        ends: 0,
        before: CpuTime {
            time: 0,
            waited: 0,
            long_turns: 0,
        },
    };
}

/// For how long a guest has computed, in microseconds.
///
/// What is counted is the ticks that fall into its turns. A short turn may see none, and another one
/// as short may see one: together they come to the time that was used.
#[derive(Clone, Copy, Default)]
pub(super) struct CpuTime {
    time: u64,
    /// The same, when it last waited for something.
    waited: u64,
    /// Its turns in a row until now into which a long tick fell.
    long_turns: u32,
}

impl CpuTime {
    pub(super) fn time(self) -> Duration {
        Duration::from_micros(self.time)
    }
}

/// So many turns in a row that meet a long tick are no chance: the guest computes for about as long
/// each time, and many of its kind would hold others up as one that never ends does.
const LONG_TURNS: u32 = 3;

/// Begins a turn of a guest that has computed for so long before. To be called before a guest is
/// polled.
pub(super) fn begin(clock: &EpochClock, before: CpuTime) {
    MAKES_WAY.set(false);
    TURN.set(Turn {
        began: clock.time(),
        ends: clock.now() + 2,
        before,
    });
}

/// Ends a turn, and leaves the lane if the guest came by it. Returns for how long the guest has
/// computed now.
pub(super) fn end(clock: &EpochClock) -> CpuTime {
    HELD.take();
    let time = used(clock);
    let before = TURN.get().before;
    let waited = match MAKES_WAY.get() {
        true => before.waited,
        false => time,
    };
    let long_turns = match time - before.time < CALM.as_micros() as u64 {
        true => 0,
        false => before.long_turns.saturating_add(1),
    };
    if long_turns >= LONG_TURNS {
        clock.crowd();
    }
    CpuTime {
        time,
        waited,
        long_turns,
    }
}

/// For how long the guest that computes on this thread has done so, in microseconds.
pub(super) fn used(clock: &EpochClock) -> u64 {
    let turn = TURN.get();
    turn.before.time + clock.time().saturating_sub(turn.began)
}

/// Whether the turn has been long enough. A store that has waited for long finds its deadline
/// passed when its turn has only begun.
pub(super) fn is_over(clock: &EpochClock) -> bool {
    let over = clock.now() >= TURN.get().ends;
    if over {
        clock.crowd();
    }
    over
}

/// Ready while the turn lasts. For what the host does for a guest without a word from it, such as
/// moving bytes from one stream to another: no tick is seen there.
pub(super) fn poll_lasts(clock: &EpochClock, cx: &mut Context<'_>) -> Poll<()> {
    if is_over(clock) {
        cx.waker().wake_by_ref();
        return Poll::Pending;
    }
    Poll::Ready(())
}

/// How long a guest may compute without waiting for anything, and be let go before others, in
/// microseconds: more than most requests take.
const LITTLE: u64 = 10_000;

/// Waits for the lane, and for everyone else to have had a turn.
pub(super) async fn yield_to_others(clock: EpochClock) {
    let computed_little = used(&clock).saturating_sub(TURN.get().before.waited) < LITTLE;
    let mut waiting = pin!(wait(computed_little));
    let pass = poll_fn(|cx| {
        let pass = waiting.as_mut().poll(cx);
        MAKES_WAY.set(pass.is_pending());
        pass
    })
    .await;
    HELD.set(Some(pass));
    TURN.set(Turn {
        ends: clock.now() + 1,
        ..TURN.get()
    });
}

async fn wait(computed_little: bool) -> RunToken {
    let pass = LANE.with(Arc::clone).enter(computed_little).await;
    // The first turn is theirs who are known to be ready, the second theirs who come to be known of
    // only in the first: a connection is accepted in the one, and answered in the other.
    tokio::task::yield_now().await;
    tokio::task::yield_now().await;
    pass
}

/// Of so many who are let go, one is of those who have computed much, if there is any.
const ONE_IN: u32 = 8;

/// Lets one go at a time.
#[derive(Default)]
struct RunQueue(Mutex<QueueState>);

#[derive(Default)]
struct QueueState {
    taken: bool,
    /// Those who have computed little, and those who have computed much.
    little: VecDeque<oneshot::Sender<RunToken>>,
    much: VecDeque<oneshot::Sender<RunToken>>,
    let_go: u32,
}

/// Held by the one who goes. The next one goes when it is dropped.
struct RunToken(Option<Arc<RunQueue>>);

impl RunQueue {
    async fn enter(self: Arc<Self>, computed_little: bool) -> RunToken {
        let turn = {
            let mut waiting = lock(&self.0);
            if std::mem::replace(&mut waiting.taken, true) {
                let (pass, turn) = oneshot::channel();
                match computed_little {
                    true => waiting.little.push_back(pass),
                    false => waiting.much.push_back(pass),
                }
                Some(turn)
            } else {
                None
            }
        };
        match turn {
            // Nobody forgets who waits as long as the lane is there, and it is held here.
            Some(turn) => turn.await.unwrap_or(RunToken(None)),
            None => RunToken(Some(self)),
        }
    }

    /// Who goes next. None leaves the lane free.
    fn next(&self) -> Option<oneshot::Sender<RunToken>> {
        let mut waiting = lock(&self.0);
        let QueueState {
            taken,
            little,
            much,
            let_go,
        } = &mut *waiting;
        *let_go = let_go.wrapping_add(1);
        let (first, second) = match *let_go % ONE_IN {
            0 => (much, little),
            _ => (little, much),
        };
        let next = first.pop_front().or_else(|| second.pop_front());
        *taken = next.is_some();
        next
    }
}

impl Drop for RunToken {
    fn drop(&mut self) {
        let Some(lane) = self.0.take() else {
            return;
        };
        while let Some(next) = lane.next() {
            match next.send(Self(Some(lane.clone()))) {
                Ok(()) => return,
                // It is gone: what it was given is not to let the next one go as well.
                Err(mut unused) => unused.0 = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    /// Whether it goes now.
    fn goes(waiting: &mut (impl Future<Output = RunToken> + Unpin)) -> Option<RunToken> {
        waiting.now_or_never()
    }

    #[test]
    fn one_goes_at_a_time_and_who_computed_little_goes_first() {
        let lane: Arc<RunQueue> = Arc::default();
        let enter = |little| Box::pin(lane.clone().enter(little));
        let first = goes(&mut enter(false)).expect("nobody is there");
        let (mut much, mut gone, mut little) = (enter(false), enter(true), enter(true));
        assert!(goes(&mut much).is_none());
        assert!(goes(&mut gone).is_none());
        assert!(goes(&mut little).is_none());
        drop(gone);
        drop(first);
        assert!(goes(&mut much).is_none());
        let second = goes(&mut little).expect("it is its turn");
        assert!(goes(&mut much).is_none());
        drop(second);
        drop(goes(&mut much).expect("nobody else is left"));
        assert!(goes(&mut enter(true)).is_some());
    }

    #[test]
    fn who_is_let_go_and_does_not_come_leaves_the_lane_free() {
        let lane: Arc<RunQueue> = Arc::default();
        let first = goes(&mut Box::pin(lane.clone().enter(true)));
        let mut second = Box::pin(lane.clone().enter(true));
        assert!(goes(&mut second).is_none());
        drop(first);
        drop(second);
        assert!(goes(&mut Box::pin(lane.enter(true))).is_some());
    }

    #[test]
    fn who_computed_much_goes_some_time() {
        let lane: Arc<RunQueue> = Arc::default();
        let mut going = goes(&mut Box::pin(lane.clone().enter(true)));
        let mut much = Box::pin(lane.clone().enter(false));
        assert!(goes(&mut much).is_none());
        for _ in 0..ONE_IN {
            let mut little = Box::pin(lane.clone().enter(true));
            assert!(goes(&mut little).is_none());
            drop(going);
            if goes(&mut much).is_some() {
                return;
            }
            going = goes(&mut little);
        }
        panic!("it never goes");
    }
}
