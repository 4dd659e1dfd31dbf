//! Figures and log lines about the server: counters, histograms, spans, rate-limited lines.

pub mod counters;
pub mod histogram;
pub mod log;
pub mod spans;
