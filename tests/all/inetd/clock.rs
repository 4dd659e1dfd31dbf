//! The time of day.

use std::time::SystemTime;

/// Seconds since the Unix epoch.
pub(super) fn seconds() -> u64 {
    let now = SystemTime::UNIX_EPOCH.elapsed();
    now.expect("the clock is set").as_secs()
}
