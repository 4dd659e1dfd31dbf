//! What the admin endpoint answers, as JSON.

use serde::{Deserialize, Serialize};

/// `GET /v1/status`: how the server is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The release of wasinetd that serves.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Since when it serves (RFC 3339).
    pub since: String,
    /// The same, in seconds until now.
    pub uptime: f64,
    /// `serving` or `draining`.
    pub phase: String,
    /// Connections that are open.
    pub open: u64,
    /// Connections that may be open at once.
    pub max_connections: u64,
    /// Failures to accept a connection.
    pub accept_errors: u64,
    /// The services.
    pub services: Vec<Service>,
    /// How often each limit was met, those that were.
    pub limits_met: Vec<LimitMet>,
}

/// A service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Connections that are open.
    pub open: u64,
    /// Connections that have ended.
    pub ended: u64,
    /// Bytes received on them.
    pub received: u64,
    /// Bytes sent on them.
    pub sent: u64,
    /// How long they were open.
    pub durations: Vec<Bucket>,
    /// The versions of its guest that there are, the latest first.
    pub versions: Vec<Version>,
}

impl Service {
    /// The bucket that so large a share of the connections falls into or below, of those that have
    /// ended since it was as `before`. None if there are none.
    pub fn duration(&self, before: Option<&Self>, share: f64) -> Option<Bucket> {
        let before = before.map_or(&[][..], |before| &before.durations);
        let before = before.iter().map(|bucket| bucket.count);
        let ended = self
            .durations
            .iter()
            .zip(before.chain(std::iter::repeat(0)));
        let ended: Vec<Bucket> = ended
            .map(|(bucket, before)| Bucket {
                count: bucket.count.saturating_sub(before),
                ..*bucket
            })
            .collect();
        let all: u64 = ended.iter().map(|bucket| bucket.count).sum();
        let mut left = ((all as f64 * share).ceil() as u64).max(1);
        ended.into_iter().find(|bucket| {
            let here = bucket.count >= left;
            left = left.saturating_sub(bucket.count);
            here
        })
    }
}

/// How many connections were open for so long.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Bucket {
    /// At most so long, in seconds, and longer than the bucket before has. The last one has no bound.
    pub seconds: Option<f64>,
    /// So many.
    pub count: u64,
}

/// A version of a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Version {
    /// SHA-256 of its component.
    pub digest: String,
    /// `current`, `previous` or `old`.
    pub state: String,
    /// Since when it is or was served (RFC 3339).
    pub since: String,
    /// Connections that are open.
    pub open: u64,
    /// Connections that have ended, by outcome, those that there were.
    pub ended: Vec<Outcome>,
}

/// How many connections ended in a way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// The way, as in the metrics.
    pub outcome: String,
    /// So many.
    pub count: u64,
}

/// How often a limit was met.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LimitMet {
    /// Its name: that of its flag.
    pub limit: String,
    /// So often.
    pub met: u64,
}

/// `GET /v1/connections`: those that are open.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Connection {
    /// Its number, as in the log.
    pub id: u64,
    /// The client's address.
    pub peer: String,
    /// The service.
    pub service: String,
    /// The first digits of the version's digest.
    pub version: String,
    /// For how long it has been open, in seconds.
    pub age: f64,
    /// Bytes received.
    pub received: u64,
    /// Bytes sent.
    pub sent: u64,
    /// How long its guest has computed, in seconds.
    pub cpu: f64,
    /// The memory that its guest has, in bytes.
    pub memory: u64,
}

/// `GET /v1/limits`: a limit, what it is set to, and how often it was met.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Limit {
    /// Its name: that of its flag.
    pub limit: String,
    /// As its flag would have it.
    pub value: String,
    /// How often it was met since the server began.
    pub met: u64,
}

/// `POST /v1/services/NAME/swap` and `/rollback`: what came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Swapped {
    /// SHA-256 of the version that is served now.
    pub digest: String,
    /// SHA-256 of the version that was served before. The same: nothing has changed.
    pub before: String,
    /// How long it took, in seconds.
    pub took: f64,
}

/// Every answer that is not a success.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// Why, for people.
    pub error: String,
    /// What a program exits with that has failed for this reason (BSD `sysexits.h`), where the status of
    /// the answer alone does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_falls_into_a_bucket_of_what_is_new() {
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
        let at = |before, share| now.duration(before, share).map(|bucket| bucket.seconds);
        assert_eq!(at(Some(&before), 0.5), Some(Some(0.001)));
        assert_eq!(at(Some(&before), 0.95), Some(Some(0.1)));
        assert_eq!(at(Some(&before), 1.0), Some(None));
        assert_eq!(at(None, 0.95), Some(Some(0.001)));
        assert_eq!(at(Some(&now), 0.5), None);
    }
}
