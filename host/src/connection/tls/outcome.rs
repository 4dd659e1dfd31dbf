//! How TLS handshakes end.

use crate::named_enum;
use crate::telemetry::counters::Counters;

named_enum! {
    /// How a TLS handshake ended.
    pub(in crate::connection) enum HandshakeOutcome {
        Ok => "ok",
        Timeout => "timeout",
        ClientGone => "client_gone",
        /// The client began with text, such as an HTTP request.
        PlainText => "plain_text",
        Bad => "bad",
        /// Client and server have no version, cipher or protocol in common.
        Incompatible => "incompatible",
        /// The client sent an alert. Most often it does not accept the certificate.
        RefusedByClient => "refused_by_client",
        NoClientCertificate => "no_client_certificate",
        BadClientCertificate => "bad_client_certificate",
    }
}

/// TLS handshakes of this process by outcome.
pub(in crate::connection) static HANDSHAKES: Counters<
    HandshakeOutcome,
    { HandshakeOutcome::COUNT },
> = Counters::new();
