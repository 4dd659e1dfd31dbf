//! Why a connection ends before a guest gets it.

use std::net::SocketAddr;

use tracing::{debug, warn};

use crate::connection::proxy_header::{HEADERS, HeaderOutcome};
use crate::connection::tls::{HANDSHAKES, HandshakeOutcome, Refused};
use crate::limit::Limit;
use crate::net::Peer;
use crate::telemetry::counters::Named;
use crate::telemetry::log::RateLimit;

/// Why a connection ends before a guest gets it.
pub(super) struct HandshakeFailure {
    /// The log line, unless the failure is none of the operator's business.
    line: Option<&'static LogLine>,
    /// The outcome, as metrics call it.
    outcome: &'static str,
    reason: String,
}

impl HandshakeFailure {
    /// Counts a handshake that TLS refused.
    pub(super) fn tls(refused: &Refused) -> Self {
        HANDSHAKES.add(refused.outcome);
        Self {
            line: (!refused.silent).then_some(&BAD_HANDSHAKE),
            outcome: refused.outcome.name(),
            reason: refused.reason.clone(),
        }
    }

    /// Counts a header that did not come.
    pub(super) fn header(outcome: HeaderOutcome, reason: String) -> Self {
        HEADERS.add(outcome);
        Self {
            line: Some(&BAD_HEADER),
            outcome: outcome.name(),
            reason,
        }
    }

    /// Counts a proxy that only checked whether the port is open.
    pub(super) fn health_check() -> Self {
        Self {
            line: None,
            ..Self::header(HeaderOutcome::HealthCheck, "health check of a proxy".into())
        }
    }

    /// Counts a header that did not come in time.
    pub(super) fn header_timeout() -> Self {
        Limit::HandshakeTimeout.count();
        Self::header(HeaderOutcome::Timeout, "the header took too long".into())
    }

    /// Counts a TLS handshake that was not completed in time.
    pub(super) fn tls_timeout() -> Self {
        Limit::HandshakeTimeout.count();
        HANDSHAKES.add(HandshakeOutcome::Timeout);
        Self {
            line: Some(&BAD_HANDSHAKE),
            outcome: HandshakeOutcome::Timeout.name(),
            reason: "the handshake took too long".into(),
        }
    }

    /// Counts a client that may not connect.
    pub(super) fn not_admitted(limit: Limit) -> Self {
        limit.count();
        Self {
            line: Some(&NOT_ADMITTED),
            outcome: limit.name(),
            reason: "the client may not connect".into(),
        }
    }

    /// The server ended before the handshake did.
    pub(super) fn server_ended() -> Self {
        Self {
            line: None,
            outcome: "ended",
            reason: "the server ended before the handshake did".into(),
        }
    }

    /// Logs the failure.
    pub(super) fn log(&self, peer: Peer, via: Option<SocketAddr>) {
        let Self {
            outcome, reason, ..
        } = self;
        let via = via.map(tracing::field::display);
        let Some(line) = self.line else {
            debug!(%peer, via, outcome, reason, "no guest got the connection");
            return;
        };
        if let Some(since) = line.limit.record() {
            let message = line.message;
            warn!(%peer, via, outcome, reason, since, "{message} ({since} since the last report)");
        }
    }
}

/// A log line about one kind of failure.
struct LogLine {
    message: &'static str,
    limit: RateLimit,
}

impl LogLine {
    const fn new(message: &'static str) -> Self {
        Self {
            message,
            limit: RateLimit::new(),
        }
    }
}

static BAD_HEADER: LogLine = LogLine::new("a proxy sent no valid header");
static BAD_HANDSHAKE: LogLine = LogLine::new("TLS handshake failed");
static NOT_ADMITTED: LogLine = LogLine::new("refused a client of a proxy");
