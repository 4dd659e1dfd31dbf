//! Settings of TLS.

use std::path::PathBuf;

/// Settings of TLS on a listener.
#[derive(Clone, Debug, PartialEq)]
pub struct TlsSettings {
    /// Certificates with their keys, at least one. The first is the default: a client gets it if no
    /// certificate has the name that the client asks for.
    pub pairs: Vec<CertificateFiles>,
    /// Protocols to negotiate (ALPN, RFC 7301) in order of preference. Empty: none.
    pub alpn: Vec<String>,
    /// The oldest version of TLS.
    pub min_version: MinVersion,
    /// Authentication of clients by certificate, if any.
    pub client_auth: Option<ClientAuth>,
    /// Number of concurrent handshakes.
    pub max_handshakes: usize,
}

/// Files of a certificate and its key.
#[derive(Clone, Debug, PartialEq)]
pub struct CertificateFiles {
    /// The certificate and its chain: PEM.
    pub certificate: PathBuf,
    /// The private key: PEM, not encrypted.
    pub key: PathBuf,
    /// An OCSP response for the certificate: DER.
    pub ocsp: Option<PathBuf>,
}

/// The oldest version of TLS to accept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MinVersion {
    /// TLS 1.2 (RFC 5246). Older versions are deprecated (RFC 8996).
    Tls12,
    /// TLS 1.3 (RFC 8446).
    Tls13,
}

/// Authentication of clients by certificate.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientAuth {
    /// Certificates of the authorities that issue client certificates: PEM.
    pub authorities: PathBuf,
    /// Whether clients without a certificate are refused.
    pub required: bool,
}
