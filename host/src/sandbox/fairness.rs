//! Fair sharing of a thread between the guests that run on it.
//!
//! Many guests share one thread. A guest computes while tokio polls its task: that is its *turn*.
//! The rules that keep a busy guest from delaying the others:
//!
//! 1. A thread of the engine advances its epoch in *ticks*. A guest that computes notices each tick
//!    and checks whether its turn is over.
//! 2. A turn ends at the second tick after its beginning, so it lasts for one whole tick at least.
//!    Most requests need less.
//! 3. A guest that needs more joins the [`RunQueue`] of its thread. The queue has one [`RunToken`],
//!    and the guest that holds the token computes for one tick. Before that, all other ready tasks
//!    of the thread have their turn. So a request waits for one tick, however many busy guests
//!    there are.
//! 4. The queue prefers guests in a short *CPU burst*: the CPU time since the guest last waited for
//!    something. A request of some milliseconds does not queue behind a hundred endless loops.
//!    Every eighth token goes to a guest in a long burst, so that none starves.
//! 5. Ticks are long while no guest needs more than one turn, so that an idle server seldom wakes.
//!    Ticks are short under *contention*, while some guest does: a hundred busy guests that arrive
//!    together all have a first turn, and that turn is short then.

use std::cell::Cell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::sync::lock;

/// The length of a tick without contention. A shorter tick would wake an idle server more often.
const LONG_TICK: Duration = Duration::from_millis(5);

/// The length of a tick under contention.
///
/// A switch between guests costs a few percent of this. A shorter tick would raise that share; a
/// longer tick would delay requests beside a busy guest.
const SHORT_TICK: Duration = Duration::from_micros(250);

/// How long contention lasts after its last sign, in microseconds.
///
/// Busy guests come in groups, and the first one of a group has a long turn.
const CONTENTION_MICROS: u64 = 1_000_000;

/// The longest short CPU burst, in microseconds. Most requests need less.
const SHORT_BURST_MICROS: u64 = 10_000;

/// One of this many tokens goes to a long CPU burst.
const TOKENS_PER_LONG_BURST: u32 = 8;

/// Consecutive turns of at least [`LONG_TICK`] that show contention.
///
/// One such turn may be chance: a tick falls into a short turn. A guest with several in a row
/// computes for about a tick each time, and many such guests delay the others as one endless loop
/// does.
const CONTENDING_TURNS: u32 = 3;

/// Counts the ticks of an engine's epoch, and their time.
#[derive(Clone, Default)]
pub(super) struct EpochClock(Arc<ClockCounters>);

#[derive(Default)]
struct ClockCounters {
    ticks: AtomicU64,
    /// The length of all ticks together: the time of this clock.
    micros: AtomicU64,
    /// The time of this clock at which contention ends.
    contended_until: AtomicU64,
}

impl EpochClock {
    /// Counts a tick of this length.
    pub(super) fn tick(&self, length: Duration) {
        let micros = u64::try_from(length.as_micros()).unwrap_or(u64::MAX);
        self.0.micros.fetch_add(micros, Ordering::Relaxed);
        self.0.ticks.fetch_add(1, Ordering::Relaxed);
    }

    /// The length that the next tick should have.
    pub(super) fn next_tick(&self) -> Duration {
        if self.micros() < self.0.contended_until.load(Ordering::Relaxed) {
            SHORT_TICK
        } else {
            LONG_TICK
        }
    }

    fn ticks(&self) -> u64 {
        self.0.ticks.load(Ordering::Relaxed)
    }

    fn micros(&self) -> u64 {
        self.0.micros.load(Ordering::Relaxed)
    }

    /// Records a sign of contention: a guest needs more than one turn.
    fn note_contention(&self) {
        let until = self.micros() + CONTENTION_MICROS;
        self.0.contended_until.store(until, Ordering::Relaxed);
    }
}

/// The CPU time of a guest, in microseconds.
///
/// This is the length of all ticks that fell into a turn of the guest. One short turn may see no
/// tick, and the next one may see one: the sum approaches the time that the guest used.
#[derive(Clone, Copy, Default)]
pub(super) struct CpuTime {
    total: u64,
    /// The value of `total` when the guest last waited for something. The current CPU burst began
    /// there.
    burst_began: u64,
    /// The number of consecutive turns of at least [`LONG_TICK`].
    long_turns: u32,
}

impl CpuTime {
    pub(super) fn total(self) -> Duration {
        Duration::from_micros(self.total)
    }
}

thread_local! {
    static RUN_QUEUE: Arc<RunQueue> = Arc::default();

    /// The token of the guest that computes on this thread.
    ///
    /// None in a first turn, which needs no token.
    static HELD_TOKEN: Cell<Option<RunToken>> = const { Cell::new(None) };

    /// The turn of the guest that computes on this thread.
    static TURN: Cell<Turn> = const { Cell::new(Turn::NONE) };

    /// Whether the guest polled last waits for nothing but its next turn.
    static IS_YIELDING: Cell<bool> = const { Cell::new(false) };
}

/// A turn of a guest.
#[derive(Clone, Copy)]
struct Turn {
    /// The time of the clock when the turn began, in microseconds.
    began: u64,
    /// The tick at which the turn is over.
    ends_at_tick: u64,
    /// The CPU time of the guest when the turn began.
    cpu_time_before: CpuTime,
}

impl Turn {
    const NONE: Self = Self {
        began: 0,
        ends_at_tick: 0,
        cpu_time_before: CpuTime {
            total: 0,
            burst_began: 0,
            long_turns: 0,
        },
    };
}

/// Begins a turn of a guest with this CPU time so far. Call it before each poll of a guest.
pub(super) fn begin_turn(clock: &EpochClock, cpu_time: CpuTime) {
    IS_YIELDING.set(false);
    TURN.set(Turn {
        began: clock.micros(),
        ends_at_tick: clock.ticks() + 2,
        cpu_time_before: cpu_time,
    });
}

/// Ends the turn, and returns the CPU time of the guest.
///
/// Hands the token on if the guest holds it.
pub(super) fn end_turn(clock: &EpochClock) -> CpuTime {
    HELD_TOKEN.take();
    let total = cpu_time_micros(clock);
    let before = TURN.get().cpu_time_before;
    let burst_began = if IS_YIELDING.get() {
        before.burst_began
    } else {
        total
    };
    let long_turns = if total - before.total < LONG_TICK.as_micros() as u64 {
        0
    } else {
        before.long_turns.saturating_add(1)
    };
    if long_turns >= CONTENDING_TURNS {
        clock.note_contention();
    }
    CpuTime {
        total,
        burst_began,
        long_turns,
    }
}

/// The CPU time of the guest on this thread, in microseconds.
pub(super) fn cpu_time_micros(clock: &EpochClock) -> u64 {
    let turn = TURN.get();
    turn.cpu_time_before.total + clock.micros().saturating_sub(turn.began)
}

/// Whether the turn on this thread is over.
///
/// The epoch deadline of a store cannot tell: the deadline may pass while the guest waits, before
/// its turn has begun.
pub(super) fn turn_is_over(clock: &EpochClock) -> bool {
    let is_over = clock.ticks() >= TURN.get().ends_at_tick;
    if is_over {
        clock.note_contention();
    }
    is_over
}

/// Ready while the turn on this thread lasts.
///
/// Wakes the task if the turn is over.
///
/// For work of the host that runs no code of the guest, such as moving bytes between two streams:
/// no epoch deadline interrupts that work.
pub(super) fn poll_turn(clock: &EpochClock, cx: &mut Context<'_>) -> Poll<()> {
    if turn_is_over(clock) {
        cx.waker().wake_by_ref();
        return Poll::Pending;
    }
    Poll::Ready(())
}

/// Lets all other ready tasks have a turn.
///
/// The guest then holds the token, and computes for one tick.
pub(super) async fn yield_to_others(clock: EpochClock) {
    let burst_micros =
        cpu_time_micros(&clock).saturating_sub(TURN.get().cpu_time_before.burst_began);
    let mut waiting = pin!(wait_for_token(Burst::of(burst_micros)));
    let token = poll_fn(|cx| {
        let token = waiting.as_mut().poll(cx);
        IS_YIELDING.set(token.is_pending());
        token
    })
    .await;
    HELD_TOKEN.set(Some(token));
    TURN.set(Turn {
        ends_at_tick: clock.ticks() + 1,
        ..TURN.get()
    });
}

async fn wait_for_token(burst: Burst) -> RunToken {
    let token = RUN_QUEUE.with(Arc::clone).enter(burst).await;
    // The first yield lets the tasks run that are ready now. The second one lets the tasks run that
    // become ready meanwhile: a connection is accepted in the first round, and answered in the
    // second.
    tokio::task::yield_now().await;
    tokio::task::yield_now().await;
    token
}

/// The length of a guest's current CPU burst.
#[derive(Clone, Copy)]
enum Burst {
    Short,
    Long,
}

impl Burst {
    fn of(micros: u64) -> Self {
        if micros < SHORT_BURST_MICROS {
            Self::Short
        } else {
            Self::Long
        }
    }
}

/// The guests of one thread that need more than one turn. One of them computes at a time.
#[derive(Default)]
struct RunQueue(Mutex<QueueState>);

#[derive(Default)]
struct QueueState {
    /// Whether a guest holds the token.
    token_is_held: bool,
    short_bursts: VecDeque<oneshot::Sender<RunToken>>,
    long_bursts: VecDeque<oneshot::Sender<RunToken>>,
    /// The number of tokens handed on so far.
    handed_on: u32,
}

/// The right to compute for one tick. Its drop hands the right on to the next guest of the queue.
///
/// None hands nothing on.
struct RunToken(Option<Arc<RunQueue>>);

impl RunQueue {
    async fn enter(self: Arc<Self>, burst: Burst) -> RunToken {
        let waiter = {
            let mut state = lock(&self.0);
            if std::mem::replace(&mut state.token_is_held, true) {
                let (sender, waiter) = oneshot::channel();
                match burst {
                    Burst::Short => state.short_bursts.push_back(sender),
                    Burst::Long => state.long_bursts.push_back(sender),
                }
                Some(waiter)
            } else {
                None
            }
        };
        match waiter {
            // The queue drops no sender while it exists, and this function holds the queue.
            Some(waiter) => waiter.await.unwrap_or(RunToken(None)),
            None => RunToken(Some(self)),
        }
    }

    /// The next guest to hold the token. None leaves the token free.
    fn next(&self) -> Option<oneshot::Sender<RunToken>> {
        let mut state = lock(&self.0);
        let QueueState {
            token_is_held,
            short_bursts,
            long_bursts,
            handed_on,
        } = &mut *state;
        *handed_on = handed_on.wrapping_add(1);
        let (first, second) = if (*handed_on).is_multiple_of(TOKENS_PER_LONG_BURST) {
            (long_bursts, short_bursts)
        } else {
            (short_bursts, long_bursts)
        };
        let next = first.pop_front().or_else(|| second.pop_front());
        *token_is_held = next.is_some();
        next
    }
}

impl Drop for RunToken {
    fn drop(&mut self) {
        let Some(queue) = self.0.take() else {
            return;
        };
        while let Some(next) = queue.next() {
            match next.send(Self(Some(queue.clone()))) {
                Ok(()) => return,
                // That guest is gone. Its token must not hand the right on as well.
                Err(mut unused) => unused.0 = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    /// The token, if the guest holds it now.
    fn token(waiting: &mut (impl Future<Output = RunToken> + Unpin)) -> Option<RunToken> {
        waiting.now_or_never()
    }

    #[test]
    fn one_guest_computes_at_a_time_and_short_bursts_go_first() {
        let queue: Arc<RunQueue> = Arc::default();
        let enter = |burst| Box::pin(queue.clone().enter(burst));
        let first = token(&mut enter(Burst::Long)).expect("the queue is empty");
        let mut long = enter(Burst::Long);
        let (mut cancelled, mut short) = (enter(Burst::Short), enter(Burst::Short));
        assert!(token(&mut long).is_none());
        assert!(token(&mut cancelled).is_none());
        assert!(token(&mut short).is_none());
        drop(cancelled);
        drop(first);
        assert!(token(&mut long).is_none());
        let second = token(&mut short).expect("short bursts go first");
        assert!(token(&mut long).is_none());
        drop(second);
        drop(token(&mut long).expect("no other guest waits"));
        assert!(token(&mut enter(Burst::Short)).is_some());
    }

    #[test]
    fn a_guest_that_ends_while_it_waits_leaves_the_token_free() {
        let queue: Arc<RunQueue> = Arc::default();
        let first = token(&mut Box::pin(queue.clone().enter(Burst::Short)));
        let mut second = Box::pin(queue.clone().enter(Burst::Short));
        assert!(token(&mut second).is_none());
        drop(first);
        drop(second);
        assert!(token(&mut Box::pin(queue.enter(Burst::Short))).is_some());
    }

    #[test]
    fn a_long_burst_does_not_starve() {
        let queue: Arc<RunQueue> = Arc::default();
        let mut held = token(&mut Box::pin(queue.clone().enter(Burst::Short)));
        let mut long = Box::pin(queue.clone().enter(Burst::Long));
        assert!(token(&mut long).is_none());
        for _ in 0..TOKENS_PER_LONG_BURST {
            let mut short = Box::pin(queue.clone().enter(Burst::Short));
            assert!(token(&mut short).is_none());
            drop(held);
            if token(&mut long).is_some() {
                return;
            }
            held = token(&mut short);
        }
        panic!("the long burst never gets the token");
    }
}
