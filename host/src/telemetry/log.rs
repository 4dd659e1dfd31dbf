//! Rate limits for log lines: a flood of events must not become a flood of lines.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::sync::lock;

/// Least time between two lines about one kind of event. Arbitrary: an operator can still read along.
const LEAST_INTERVAL: Duration = Duration::from_secs(1);

/// Rate limit of one kind of log line.
///
/// ```
/// use wasinetd::telemetry::log::RateLimit;
///
/// static REFUSED: RateLimit = RateLimit::new();
///
/// assert_eq!(REFUSED.record(), Some(1)); // Write a line about one event.
/// assert_eq!(REFUSED.record(), None); // Too soon. The next line reports two.
/// ```
#[derive(Debug)]
pub struct RateLimit(Mutex<Events>);

#[derive(Debug)]
struct Events {
    last_line: Option<Instant>,
    /// Events since that line.
    unreported: u64,
}

impl RateLimit {
    /// A rate limit that allows the first line at once.
    pub const fn new() -> Self {
        Self(Mutex::new(Events {
            last_line: None,
            unreported: 0,
        }))
    }

    /// Records an event. Returns the number of events to report if a line is due now: this event, and
    /// all others since the last line.
    pub fn record(&self) -> Option<u64> {
        self.record_at(Instant::now())
    }

    fn record_at(&self, now: Instant) -> Option<u64> {
        let mut events = lock(&self.0);
        events.unreported += 1;
        let too_soon = events
            .last_line
            .is_some_and(|last| now.saturating_duration_since(last) < LEAST_INTERVAL);
        if too_soon {
            return None;
        }
        events.last_line = Some(now);
        Some(std::mem::take(&mut events.unreported))
    }
}

impl Default for RateLimit {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_reports_all_events_since_the_last_one() {
        let limit = RateLimit::new();
        let start = Instant::now();
        assert_eq!(limit.record_at(start), Some(1));
        assert_eq!(limit.record_at(start), None);
        assert_eq!(limit.record_at(start), None);
        assert_eq!(limit.record_at(start + LEAST_INTERVAL), Some(3));
    }
}
