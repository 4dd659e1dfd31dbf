//! The JSON of the admin API.

use serde::{Deserialize, Serialize};

/// `GET /v1/status`: the state of the server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Release of wasinetd.
    pub version: String,
    /// Number of the server's process.
    pub pid: u32,
    /// Start of the server (RFC 3339).
    pub since: String,
    /// Time since the start, in seconds.
    pub uptime: f64,
    /// `serving` or `draining`.
    pub phase: String,
    /// Open connections.
    pub open: u64,
    /// Largest number of open connections.
    pub max_connections: u64,
    /// Failed attempts to accept a connection.
    pub accept_errors: u64,
    /// The services.
    pub services: Vec<Service>,
    /// Limits that were hit at least once.
    pub limits_met: Vec<LimitHits>,
}

/// A service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Service {
    /// Name of the service.
    pub name: String,
    /// Open connections.
    pub open: u64,
    /// Ended connections.
    pub ended: u64,
    /// Bytes received on ended connections.
    pub received: u64,
    /// Bytes sent on ended connections.
    pub sent: u64,
    /// Histogram of the time that ended connections were open.
    pub durations: Vec<Bucket>,
    /// Versions of the guest, the latest first.
    pub versions: Vec<Version>,
}

impl Service {
    /// The bucket with a quantile of the durations of ended connections.
    ///
    /// With `before`, an earlier state, only connections that ended later count. `None` if there are
    /// none.
    pub fn duration_quantile(&self, before: Option<&Self>, quantile: f64) -> Option<Bucket> {
        let before = before.map_or(&[][..], |before| &before.durations);
        let counts_before = before.iter().map(|bucket| bucket.count);
        let counts_before = counts_before.chain(std::iter::repeat(0));
        let new: Vec<Bucket> = self
            .durations
            .iter()
            .zip(counts_before)
            .map(|(bucket, before)| Bucket {
                count: bucket.count.saturating_sub(before),
                ..*bucket
            })
            .collect();
        let total: u64 = new.iter().map(|bucket| bucket.count).sum();
        let mut rank = ((total as f64 * quantile).ceil() as u64).max(1);
        new.into_iter().find(|bucket| {
            let is_reached = bucket.count >= rank;
            rank = rank.saturating_sub(bucket.count);
            is_reached
        })
    }
}

/// A bucket of a histogram of durations.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Bucket {
    /// Upper bound, inclusive, in seconds. The lower bound is that of the bucket before. The last
    /// bucket has no upper bound.
    pub seconds: Option<f64>,
    /// Connections in this bucket.
    pub count: u64,
}

/// A version of a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Version {
    /// SHA-256 of the component.
    pub digest: String,
    /// `current`, `previous` or `old`.
    pub state: String,
    /// Time when it became the current version (RFC 3339).
    pub since: String,
    /// Open connections.
    pub open: u64,
    /// Ended connections by outcome, without outcomes that have not occurred.
    pub ended: Vec<Outcome>,
}

/// Number of connections with one outcome.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Name of the outcome, as in the metrics.
    pub outcome: String,
    /// Connections with this outcome.
    pub count: u64,
}

/// Number of times that a limit was hit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LimitHits {
    /// Name of the limit, which is that of its flag.
    pub limit: String,
    /// Hits since the server started.
    pub met: u64,
}

/// `GET /v1/connections`: an open connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Connection {
    /// Number of the connection, as in the log.
    pub id: u64,
    /// Address of the client.
    pub peer: String,
    /// Name of the service.
    pub service: String,
    /// First digits of the version's digest.
    pub version: String,
    /// Time since the connection started, in seconds.
    pub age: f64,
    /// Bytes received.
    pub received: u64,
    /// Bytes sent.
    pub sent: u64,
    /// CPU time of the guest, in seconds.
    pub cpu: f64,
    /// Memory of the guest, in bytes.
    pub memory: u64,
}

/// `GET /v1/limits`: a limit with its value.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Limit {
    /// Name of the limit, which is that of its flag.
    pub limit: String,
    /// Value, in the syntax of the flag.
    pub value: String,
    /// Hits since the server started.
    pub met: u64,
}

/// `POST /v1/services/NAME/swap` and `/rollback`: the versions before and after.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Swapped {
    /// SHA-256 of the current version.
    pub digest: String,
    /// SHA-256 of the replaced version. If it equals `digest`, nothing has changed.
    pub before: String,
    /// Duration of the swap, in seconds.
    pub took: f64,
}

/// The body of every response that is not a success.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// Reason, for people.
    pub error: String,
    /// Exit code for a program that fails for this reason (BSD `sysexits.h`). Present only if the
    /// status of the response does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_count_only_new_connections() {
        let service = |counts: [u64; 3]| Service {
            name: String::new(),
            open: 0,
            ended: 0,
            received: 0,
            sent: 0,
            durations: [Some(0.001), Some(0.1), None]
                .into_iter()
                .zip(counts)
                .map(|(seconds, count)| Bucket { seconds, count })
                .collect(),
            versions: Vec::new(),
        };
        let (before, now) = (service([100, 0, 0]), service([190, 9, 1]));
        let at = |before, quantile| {
            let bucket = now.duration_quantile(before, quantile);
            bucket.map(|bucket| bucket.seconds)
        };
        assert_eq!(at(Some(&before), 0.5), Some(Some(0.001)));
        assert_eq!(at(Some(&before), 0.95), Some(Some(0.1)));
        assert_eq!(at(Some(&before), 1.0), Some(None));
        assert_eq!(at(None, 0.95), Some(Some(0.001)));
        assert_eq!(at(Some(&now), 0.5), None);
    }
}
