//! What is known of TLS on a connection.

use crate::rt::bindings::wasinetd::tcp::types;

/// What is known of TLS on a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TlsInfo {
    /// The name that the client asked for (SNI). It says what the client wants, and need not be a name
    /// of this host.
    pub server_name: Option<String>,
    /// The protocol that was agreed on (ALPN), such as `http/1.1`: one of the host's `--tls-alpn`.
    pub alpn: Option<String>,
    /// The version of TLS: `TLSv1.2` or `TLSv1.3`.
    pub version: String,
    /// The certificate of the client, if it has shown one: the host asks for one with `--tls-client-ca`.
    pub client_certificate: Option<ClientCertificate>,
}

/// A certificate that a client has shown, which the host has checked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientCertificate {
    /// Whom it is for, as RFC 4514 writes it: `CN=alice,O=Example`. Empty where it is for nobody by
    /// name, or by one of more than 4 KiB.
    pub subject: String,
    /// The SHA-256 of the certificate, in lower-case hexadecimal digits.
    pub fingerprint: String,
}

impl From<types::TlsInfo> for TlsInfo {
    fn from(tls: types::TlsInfo) -> Self {
        let certificate = |shown: types::ClientCertificate| ClientCertificate {
            subject: shown.subject,
            fingerprint: shown.fingerprint,
        };
        Self {
            server_name: tls.server_name,
            alpn: tls.alpn,
            version: tls.version,
            client_certificate: tls.client_certificate.map(certificate),
        }
    }
}
