//! Limits of a connection: times and bytes.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::time::Sleep;

use crate::limit::Limit;

/// Limits of a connection. None means no limit.
///
/// The defaults are those of the command line, where each has its reason.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConnectionLimits {
    /// Time without a byte in either direction.
    pub idle: Option<Duration>,
    /// Time that the guest waits for the first byte of the client.
    pub first_byte: Option<Duration>,
    /// Time that the client takes none of the data sent to it.
    pub write: Option<Duration>,
    /// Time that the connection is open.
    pub lifetime: Option<Duration>,
    /// Bytes received.
    pub bytes_in: Option<u64>,
    /// Bytes sent.
    pub bytes_out: Option<u64>,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            idle: Some(Duration::from_secs(60)),
            first_byte: Some(Duration::from_secs(10)),
            write: Some(Duration::from_secs(30)),
            lifetime: Some(Duration::from_secs(24 * 60 * 60)),
            bytes_in: None,
            bytes_out: None,
        }
    }
}

/// Times of the events on a connection that its limits depend on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Activity {
    began: Instant,
    last_byte: Instant,
    /// Since when the guest waits for the first byte.
    awaits_first_byte: Option<Instant>,
    received_any: bool,
    /// Since when the client takes nothing of the data sent to it.
    send_blocked: Option<Instant>,
}

impl Activity {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            began: now,
            last_byte: now,
            awaits_first_byte: None,
            received_any: false,
            send_blocked: None,
        }
    }

    /// The guest received bytes, or the end of the stream.
    pub(super) fn received(&mut self, now: Instant) {
        self.last_byte = now;
        self.received_any = true;
        self.awaits_first_byte = None;
    }

    /// The guest waits to receive.
    pub(super) fn receive_pending(&mut self) {
        if !self.received_any && self.awaits_first_byte.is_none() {
            self.awaits_first_byte = Some(Instant::now());
        }
    }

    /// The kernel took bytes to send.
    pub(super) fn sent(&mut self, now: Instant) {
        self.last_byte = now;
        self.send_blocked = None;
    }

    /// The kernel takes no bytes to send. True if it took some until now.
    pub(super) fn send_pending(&mut self) -> bool {
        let is_new = self.send_blocked.is_none();
        self.send_blocked.get_or_insert_with(Instant::now);
        is_new
    }

    /// The kernel would take bytes to send.
    pub(super) fn can_send(&mut self) {
        self.send_blocked = None;
    }

    /// The client has sent bytes that the guest does not read.
    pub(super) fn can_receive(&mut self) {
        self.awaits_first_byte = None;
    }

    /// The client acknowledged bytes that the kernel held for it.
    pub(super) fn acknowledged(&mut self, now: Instant) {
        self.last_byte = now;
        self.send_blocked = self.send_blocked.map(|_| now);
    }

    /// The limit that expires first without further activity, and when.
    fn next(&self, limits: &ConnectionLimits) -> Option<(Instant, Limit)> {
        let after = |since: Option<Instant>, limit: Option<Duration>, name| {
            // A time that the clock cannot represent never comes.
            Some((since?.checked_add(limit?)?, name))
        };
        [
            after(Some(self.began), limits.lifetime, Limit::MaxLifetime),
            after(Some(self.last_byte), limits.idle, Limit::IdleTimeout),
            after(
                self.awaits_first_byte,
                limits.first_byte,
                Limit::FirstByteTimeout,
            ),
            after(self.send_blocked, limits.write, Limit::WriteTimeout),
        ]
        .into_iter()
        .flatten()
        .min_by_key(|(when, _)| *when)
    }
}

/// Wakes a connection when it exceeds a limit of time.
///
/// The timer is set when the connection first waits, and again only when it fires or has to fire
/// earlier. Other activity of the connection costs nothing here.
#[derive(Default)]
pub(super) struct LimitTimer(Option<Pin<Box<Sleep>>>);

impl LimitTimer {
    /// Ready with an exceeded limit. Poll it whenever `activity` may have changed.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        activity: &Activity,
        limits: &ConnectionLimits,
    ) -> Poll<Limit> {
        let Some((when, limit)) = activity.next(limits) else {
            return Poll::Pending;
        };
        let when = tokio::time::Instant::from_std(when);
        let sleep = self
            .0
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(when)));
        if when < sleep.deadline() {
            sleep.as_mut().reset(when);
        }
        loop {
            ready!(sleep.as_mut().poll(cx));
            if when <= sleep.deadline() {
                return Poll::Ready(limit);
            }
            sleep.as_mut().reset(when);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn limits() -> ConnectionLimits {
        ConnectionLimits {
            idle: Some(10 * SECOND),
            first_byte: Some(3 * SECOND),
            write: Some(5 * SECOND),
            lifetime: Some(100 * SECOND),
            ..ConnectionLimits::default()
        }
    }

    #[test]
    fn the_earliest_limit_comes_first() {
        let now = Instant::now();
        let mut activity = Activity::new(now);
        assert_eq!(
            activity.next(&limits()),
            Some((now + 10 * SECOND, Limit::IdleTimeout))
        );
        activity.awaits_first_byte = Some(now);
        assert_eq!(
            activity.next(&limits()),
            Some((now + 3 * SECOND, Limit::FirstByteTimeout))
        );
        activity.received(now + SECOND);
        activity.receive_pending();
        assert_eq!(
            activity.next(&limits()),
            Some((now + 11 * SECOND, Limit::IdleTimeout))
        );
        activity.send_blocked = Some(now + 2 * SECOND);
        assert_eq!(
            activity.next(&limits()),
            Some((now + 7 * SECOND, Limit::WriteTimeout))
        );
        activity.sent(now + 95 * SECOND);
        assert_eq!(
            activity.next(&limits()),
            Some((now + 100 * SECOND, Limit::MaxLifetime))
        );
    }

    #[test]
    fn an_absent_limit_is_never_exceeded() {
        let now = Instant::now();
        let none = ConnectionLimits {
            idle: None,
            first_byte: None,
            write: None,
            lifetime: None,
            ..ConnectionLimits::default()
        };
        assert_eq!(Activity::new(now).next(&none), None);
        let endless = ConnectionLimits {
            lifetime: Some(Duration::MAX),
            ..none
        };
        assert_eq!(Activity::new(now).next(&endless), None);
    }
}
