//! The TLS session of a connection.

use crate::rt::bindings::wasinetd::tcp::types;

/// The TLS session of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TlsInfo {
    /// The server name that the client requested (SNI). Untrusted: it need not be a name of this
    /// host.
    pub server_name: Option<String>,
    /// The negotiated protocol (ALPN), such as `http/1.1`. One of the host's `--tls-alpn`.
    pub alpn: Option<String>,
    /// The TLS version: `TLSv1.2` or `TLSv1.3`.
    pub version: String,
    /// The client's certificate, if the host requested one (`--tls-client-ca`) and the client sent
    /// it.
    pub client_certificate: Option<ClientCertificate>,
}

/// A client certificate that the host has verified.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientCertificate {
    /// The subject in the form of RFC 4514: `CN=alice,O=Example`. Empty if the certificate has
    /// none, or one longer than 4 KiB.
    pub subject: String,
    /// The SHA-256 digest of the certificate (DER), in lower-case hexadecimal digits.
    pub fingerprint: String,
}

impl From<types::TlsInfo> for TlsInfo {
    fn from(tls: types::TlsInfo) -> Self {
        let verified = |certificate: types::ClientCertificate| ClientCertificate {
            subject: certificate.subject,
            fingerprint: certificate.fingerprint,
        };
        Self {
            server_name: tls.server_name,
            alpn: tls.alpn,
            version: tls.version,
            client_certificate: tls.client_certificate.map(verified),
        }
    }
}
