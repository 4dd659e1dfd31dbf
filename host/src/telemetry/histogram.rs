//! Histograms without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

/// A histogram of integers, exported as Prometheus shows it.
///
/// The histogram of the Prometheus library has a lock, for which all shards would compete, and its
/// buckets can be read only as text.
#[derive(Debug)]
pub struct Histogram {
    /// Upper bounds of the buckets. The last bucket has none.
    bounds: [u64; BUCKETS - 1],
    counts: [AtomicU64; BUCKETS],
    sum: AtomicU64,
    /// Observed values per exported unit.
    per_unit: f64,
}

const BUCKETS: usize = 16;

impl Histogram {
    /// A histogram with exponential buckets.
    ///
    /// Their upper bounds are `first`, `first` × `factor`, and so on.
    /// Values are exported divided by `per_unit`: 1e6 exports microseconds as seconds.
    pub(crate) fn new(first: u64, factor: u64, per_unit: f64) -> Self {
        let bounds = std::array::from_fn(|bucket| first * factor.pow(bucket as u32));
        Self {
            bounds,
            counts: Default::default(),
            sum: AtomicU64::new(0),
            per_unit,
        }
    }

    /// Counts `value`.
    pub(crate) fn observe(&self, value: u64) {
        let bucket = self.bounds.partition_point(|bound| value > *bound);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    /// Upper bound and count of each bucket. The last bound is infinite.
    pub fn buckets(&self) -> Vec<(f64, u64)> {
        let bounds = self
            .bounds
            .iter()
            .map(|bound| *bound as f64 / self.per_unit);
        let counts = self.counts.iter();
        bounds
            .chain([f64::INFINITY])
            .zip(counts.map(|count| count.load(Ordering::Relaxed)))
            .collect()
    }
}

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> std::fmt::Result {
        let buckets = self.buckets();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = self.sum.load(Ordering::Relaxed) as f64 / self.per_unit;
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_in_their_buckets() {
        let histogram = Histogram::new(100, 4, 1e6);
        for value in [0, 100, 101, 400, 401, u64::MAX / 2] {
            histogram.observe(value);
        }
        let buckets = histogram.buckets();
        let counts: Vec<_> = buckets.iter().map(|(_, count)| *count).collect();
        assert_eq!(counts[..4], [2, 2, 1, 0]);
        assert_eq!((buckets.len(), counts[15]), (16, 1));
        assert!((buckets[1].0 - 0.0004).abs() < 1e-9);
    }
}
