//! What a connection may take of time and bytes.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::time::Sleep;

use crate::limit::Limit;

/// What a connection may take. The defaults are those of the command line, where each has its
/// reason. None is no limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConnectionLimits {
    /// How long no byte may be moved either way.
    pub idle: Option<Duration>,
    /// How long a guest that waits for the client may get nothing at all, from the start.
    pub first_byte: Option<Duration>,
    /// How long the client may take nothing of what is to be sent.
    pub write: Option<Duration>,
    /// How long the connection may be open.
    pub lifetime: Option<Duration>,
    /// What may be received, in bytes.
    pub bytes_in: Option<u64>,
    /// What may be sent, in bytes.
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

/// When things happened on a connection, as far as a limit of time depends on it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Activity {
    began: Instant,
    /// A byte was moved last.
    moved: Instant,
    /// The guest has waited since for the first byte of all.
    awaits_first: Option<Instant>,
    received_any: bool,
    /// The client has taken nothing since, of what is to be sent.
    stuck: Option<Instant>,
}

impl Activity {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            began: now,
            moved: now,
            awaits_first: None,
            received_any: false,
            stuck: None,
        }
    }

    /// Bytes were received, or the end was.
    pub(super) fn received(&mut self, now: Instant) {
        self.moved = now;
        self.received_any = true;
        self.awaits_first = None;
    }

    /// There was nothing to receive.
    pub(super) fn waits_to_receive(&mut self) {
        if !self.received_any && self.awaits_first.is_none() {
            self.awaits_first = Some(Instant::now());
        }
    }

    /// Bytes were sent.
    pub(super) fn sent(&mut self, now: Instant) {
        self.moved = now;
        self.stuck = None;
    }

    /// Nothing could be sent. Whether that is news.
    pub(super) fn waits_to_send(&mut self) -> bool {
        let news = self.stuck.is_none();
        self.stuck.get_or_insert_with(Instant::now);
        news
    }

    /// Something can be sent after all.
    pub(super) fn can_send(&mut self) {
        self.stuck = None;
    }

    /// Something can be received: it is the guest that does not.
    pub(super) fn can_receive(&mut self) {
        self.awaits_first = None;
    }

    /// The client has taken something of what the kernel holds for it.
    pub(super) fn taken(&mut self, now: Instant) {
        self.moved = now;
        self.stuck = self.stuck.map(|_| now);
    }

    /// The limit that is met next, and when, if nothing happens until then.
    fn next(&self, limits: &ConnectionLimits) -> Option<(Instant, Limit)> {
        let after = |since: Option<Instant>, limit: Option<Duration>, name| {
            // A time beyond what the clock can tell never comes.
            Some((since?.checked_add(limit?)?, name))
        };
        [
            after(Some(self.began), limits.lifetime, Limit::MaxLifetime),
            after(Some(self.moved), limits.idle, Limit::IdleTimeout),
            after(
                self.awaits_first,
                limits.first_byte,
                Limit::FirstByteTimeout,
            ),
            after(self.stuck, limits.write, Limit::WriteTimeout),
        ]
        .into_iter()
        .flatten()
        .min_by_key(|(when, _)| *when)
    }
}

/// Wakes a connection when it meets a limit of time.
///
/// It is set when the connection first waits, and set again only when it goes off or has to go off
/// earlier: what a connection does meanwhile costs nothing here.
#[derive(Default)]
pub(super) struct LimitTimer(Option<Pin<Box<Sleep>>>);

impl LimitTimer {
    /// Ready with a limit that was met. To be polled whenever `times` may have changed.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        times: &Activity,
        limits: &ConnectionLimits,
    ) -> Poll<Limit> {
        let Some((when, limit)) = times.next(limits) else {
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
    fn what_comes_first_is_met_first() {
        let now = Instant::now();
        let mut times = Activity::new(now);
        assert_eq!(
            times.next(&limits()),
            Some((now + 10 * SECOND, Limit::IdleTimeout))
        );
        times.awaits_first = Some(now);
        assert_eq!(
            times.next(&limits()),
            Some((now + 3 * SECOND, Limit::FirstByteTimeout))
        );
        times.received(now + SECOND);
        times.waits_to_receive();
        assert_eq!(
            times.next(&limits()),
            Some((now + 11 * SECOND, Limit::IdleTimeout))
        );
        times.stuck = Some(now + 2 * SECOND);
        assert_eq!(
            times.next(&limits()),
            Some((now + 7 * SECOND, Limit::WriteTimeout))
        );
        times.sent(now + 95 * SECOND);
        assert_eq!(
            times.next(&limits()),
            Some((now + 100 * SECOND, Limit::MaxLifetime))
        );
    }

    #[test]
    fn no_limit_is_never_met() {
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
