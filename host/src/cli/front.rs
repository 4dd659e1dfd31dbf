//! What is done with a connection before a guest has it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum, ValueHint};
use wasinetd::Error;
use wasinetd::connection::tls::{self, CertificateFiles, ClientAuth, Tls};
use wasinetd::connection::{Handshake, TrustedProxies};
use wasinetd::net::Cidr;

use super::values::{positive, some_duration};

/// What is done with a connection before a guest has it. What a guest may take counts from there.
#[derive(Args)]
#[command(next_help_heading = "Proxies and TLS")]
pub(crate) struct HandshakeArgs {
    /// Proxies of this network say in a PROXY protocol header, version 1 or 2, whom they speak for;
    /// repeat it for more. Each of their connections has to begin with one, and it is their clients to
    /// whom --allow, --deny and all limits of a source apply. From everyone else no header is taken: it
    /// goes to the guest like any other bytes
    #[arg(long, value_name = "CIDR")]
    pub(crate) proxy_from: Vec<Cidr>,

    /// Speak TLS with clients, and show them this certificate, with those that lead from it to one that
    /// they know; repeat it for more, of which each client gets one for the name it asks for, or the
    /// first. PEM. Read again when it changes, and at SIGHUP
    #[arg(long, value_name = "FILE", requires = "tls_key", value_hint = ValueHint::FilePath)]
    tls_cert: Vec<PathBuf>,

    /// The private key of the certificate, of each in the same order. PEM, not encrypted
    #[arg(long, value_name = "FILE", requires = "tls_cert", value_hint = ValueHint::FilePath)]
    tls_key: Vec<PathBuf>,

    /// An OCSP answer to send along with the certificate, of each in the same order. DER
    #[arg(long, value_name = "FILE", requires = "tls_cert", value_hint = ValueHint::FilePath)]
    tls_ocsp: Vec<PathBuf>,

    /// A protocol to agree on with clients that offer some (ALPN), such as http/1.1; repeat it for more,
    /// the best first. A client that offers others only is refused
    #[arg(long, value_name = "NAME", requires = "tls_cert", value_parser = alpn)]
    tls_alpn: Vec<String>,

    /// The oldest version of TLS to speak. 1.2: some that are left speak no newer one
    #[arg(long, value_enum, default_value_t = MinVersion::V1_2, requires = "tls_cert")]
    tls_min_version: MinVersion,

    /// Ask clients for a certificate that leads to one in this file. PEM. Whether it was revoked is not
    /// asked
    #[arg(long, value_name = "FILE", requires = "tls_cert", value_hint = ValueHint::FilePath)]
    tls_client_ca: Option<PathBuf>,

    /// Whether clients without a certificate are refused, with --tls-client-ca
    #[arg(long, value_enum, default_value_t = ClientAuthMode::Required, requires = "tls_client_ca")]
    tls_client_auth: ClientAuthMode,

    /// Time from the beginning of a connection until a guest can have it: for the header of a proxy and
    /// the TLS handshake together. Several lost packets
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = some_duration)]
    pub(crate) handshake_timeout: Duration,

    /// TLS handshakes at once, of clients that have begun to speak, half of them of one source at most, unless
    /// --max-connections-per-source is off; further ones wait for as long as theirs may take. Each takes some tens of KiB, and some 0.2 ms of a core, or 0.6 ms with an RSA key
    #[arg(long, value_name = "N", default_value = "1000", requires = "tls_cert", value_parser = positive, allow_hyphen_values = true)]
    pub(crate) max_handshakes: usize,
}

#[derive(Clone, Copy, ValueEnum)]
enum MinVersion {
    #[value(name = "1.2")]
    V1_2,
    #[value(name = "1.3")]
    V1_3,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum ClientAuthMode {
    /// They are
    Required,
    /// They are not: a guest sees whether there is one
    Optional,
}

impl HandshakeArgs {
    /// As the connection wants it.
    pub(crate) fn front(&self, tls: Option<Arc<Tls>>) -> Handshake {
        let from = self.proxy_from.clone();
        Handshake {
            proxy: (!from.is_empty()).then_some(TrustedProxies { from }),
            tls,
            timeout: self.handshake_timeout,
            ..Handshake::default()
        }
    }

    /// Whether TLS is spoken.
    pub(crate) fn speaks_tls(&self) -> bool {
        !self.tls_cert.is_empty()
    }

    /// How TLS is to be spoken, if it is.
    ///
    /// # Errors
    ///
    /// [`Error::TlsPairs`] when certificates and keys are not as many.
    pub(crate) fn tls(&self) -> Result<Option<tls::TlsSettings>, Error> {
        let (certificates, keys) = (self.tls_cert.len(), self.tls_key.len());
        if certificates != keys || self.tls_ocsp.len() > certificates {
            return Err(Error::TlsPairs {
                certificates,
                keys,
                ocsp: self.tls_ocsp.len(),
            });
        }
        if certificates == 0 {
            return Ok(None);
        }
        let pairs = self.tls_cert.iter().zip(&self.tls_key).enumerate();
        let clients = self.tls_client_ca.as_ref();
        Ok(Some(tls::TlsSettings {
            pairs: pairs
                .map(|(place, (certificate, key))| CertificateFiles {
                    certificate: certificate.clone(),
                    key: key.clone(),
                    ocsp: self.tls_ocsp.get(place).cloned(),
                })
                .collect(),
            alpn: self.tls_alpn.clone(),
            min_version: match self.tls_min_version {
                MinVersion::V1_2 => tls::MinVersion::Tls12,
                MinVersion::V1_3 => tls::MinVersion::Tls13,
            },
            client_auth: clients.map(|authorities| ClientAuth {
                authorities: authorities.clone(),
                required: self.tls_client_auth == ClientAuthMode::Required,
            }),
            max_handshakes: self.max_handshakes,
        }))
    }
}

/// A name as RFC 7301 has it.
fn alpn(value: &str) -> Result<String, String> {
    match value.len() {
        1..=255 => Ok(value.into()),
        _ => Err("not a name of 1 to 255 bytes, such as http/1.1".into()),
    }
}

#[derive(Args)]
pub(crate) struct CertArgs {
    /// The directory, which has to be there. It gets cert.pem and key.pem
    pub(crate) directory: PathBuf,

    /// A name or an address that clients connect to; repeat it for more
    #[arg(long, value_name = "NAME", default_values = ["localhost", "127.0.0.1", "::1"])]
    pub(crate) name: Vec<String>,
}
