//! Delivery of the last write of a guest.

use std::task::{Context, Poll, Waker};

/// Tracks the write that the guest has begun.
///
/// A guest may return while a write is under way. The instance lives until that write is delivered.
#[derive(Default)]
pub(crate) struct PendingSend {
    /// The polls left until the store has certainly polled the stream.
    polls_left: u8,
    is_pending: bool,
    waker: Option<Waker>,
}

/// The most polls until a store polls a stream passed to `send`.
///
/// A store first takes the stream over and then polls it, with other work in between. A guest may
/// have begun a write before it called `send`.
const POLLS_UNTIL_FIRST_WRITE: u8 = 8;

impl PendingSend {
    /// Records that the guest called `send`.
    pub(super) fn stream_passed(&mut self) {
        self.polls_left = POLLS_UNTIL_FIRST_WRITE;
    }

    /// Records that the store polled a write.
    pub(super) fn write_polled(&mut self, is_pending: bool) {
        self.polls_left = 0;
        self.is_pending = is_pending;
        if !is_pending && let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Ready when no write is under way.
    pub(crate) fn poll_delivered(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.polls_left > 0 {
            self.polls_left -= 1;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if !self.is_pending {
            return Poll::Ready(());
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}
