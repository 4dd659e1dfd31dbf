//! Settings of the steps before a guest gets a connection: PROXY protocol and TLS.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum, ValueHint};
use wasinetd::net::Cidr;

use super::values::{positive, some_duration};

/// Steps before a guest gets a connection.
#[derive(Args)]
#[command(next_help_heading = "Proxies and TLS")]
pub(crate) struct HandshakeArgs {
    /// Expect a PROXY protocol header (version 1 or 2) from this network of proxies; repeatable. Each of
    /// their connections has to begin with one, and --allow, --deny and all limits per source apply to
    /// the clients behind the proxy. A header from any other client goes to the guest like all bytes
    #[arg(long, value_name = "CIDR")]
    pub(super) proxy_from: Vec<Cidr>,

    /// Speak TLS with this certificate chain (PEM); repeatable. A client gets the certificate for the name
    /// that it asks for, or the first one. Reloaded when the file changes, and at SIGHUP
    #[arg(long, value_name = "FILE", requires = "tls_key", value_hint = ValueHint::FilePath)]
    pub(super) tls_cert: Vec<PathBuf>,

    /// Private key of the certificate (PEM, not encrypted), in the same order as the certificates
    #[arg(long, value_name = "FILE", requires = "tls_cert", value_hint = ValueHint::FilePath)]
    pub(super) tls_key: Vec<PathBuf>,

    /// OCSP response to staple (DER), in the same order as the certificates
    #[arg(long, value_name = "FILE", requires = "tls_cert", value_hint = ValueHint::FilePath)]
    pub(super) tls_ocsp: Vec<PathBuf>,

    /// Protocol to negotiate by ALPN, such as http/1.1; repeatable, the best one first. Clients that offer
    /// only other protocols are refused
    #[arg(long, value_name = "NAME", requires = "tls_cert", value_parser = alpn)]
    pub(super) tls_alpn: Vec<String>,

    /// Oldest version of TLS. 1.2: some clients speak no newer one
    #[arg(long, value_enum, default_value_t = MinVersion::V1_2, requires = "tls_cert")]
    pub(super) tls_min_version: MinVersion,

    /// Ask clients for a certificate of one of the authorities in this file (PEM). Revocation is not
    /// checked
    #[arg(long, value_name = "FILE", requires = "tls_cert", value_hint = ValueHint::FilePath)]
    pub(super) tls_client_ca: Option<PathBuf>,

    /// Treatment of clients without a certificate, with --tls-client-ca
    #[arg(long, value_enum, default_value_t = ClientAuthMode::Required, requires = "tls_client_ca")]
    pub(super) tls_client_auth: ClientAuthMode,

    /// Time for the PROXY header and the TLS handshake together. The default survives several lost
    /// packets
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = some_duration)]
    pub(super) handshake_timeout: Duration,

    /// TLS handshakes at once, of clients that have begun to speak. One source has half of them at most,
    /// unless --max-connections-per-source is off. Further clients wait for as long as a
    /// handshake may take. A handshake takes tens of KiB, and 0.2 ms of a core, or 0.6 ms with an RSA key
    #[arg(long, value_name = "N", default_value = "1000", requires = "tls_cert", value_parser = positive, allow_hyphen_values = true)]
    pub(super) max_handshakes: usize,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum MinVersion {
    #[value(name = "1.2")]
    V1_2,
    #[value(name = "1.3")]
    V1_3,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub(crate) enum ClientAuthMode {
    /// Refused
    Required,
    /// Served: the guest sees whether there is a certificate
    Optional,
}

/// A protocol name of RFC 7301.
fn alpn(value: &str) -> Result<String, String> {
    match value.len() {
        1..=255 => Ok(value.into()),
        _ => Err("not a name of 1 to 255 bytes, such as http/1.1".into()),
    }
}
