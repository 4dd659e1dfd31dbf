//! The number and duration of measurements.

/// The number and duration of measurements.
#[derive(Clone, Copy)]
pub(crate) struct Effort {
    /// Rounds per measurement.
    pub(crate) rounds: u32,
    /// Seconds per round.
    pub(crate) seconds: u32,
}
