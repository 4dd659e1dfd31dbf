//! Plain structs for all settings of a server. A config file and a command line resolve to the same.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use crate::admin::AdminAddress;
use crate::connection::ConnectionLimits;
use crate::connection::tls::{CertificateFiles, ClientAuth, MinVersion, TlsSettings};
use crate::listener::{AdmissionRules, SocketSettings, SourcePrefix, WhenFull};
use crate::net::{Cidr, ListenAddress};
use crate::sandbox::{Access, Destination, DirGrant, GuestLimits, SharedLimits};
use crate::server::Dispatch;
use crate::service::Probe;

/// A complete configuration: the server and all of its services.
#[derive(Debug)]
pub struct ResolvedConfig {
    /// Settings of the whole process.
    pub server: ServerConfig,
    /// The services, in the order of the config file. A command line has one.
    pub services: Vec<ServiceConfig>,
}

/// Settings of the whole process. Changing them needs a restart.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerConfig {
    /// Threads that serve connections. `None`: one for each core but one.
    pub threads: Option<usize>,
    /// Open connections of all services together. `None`: the default, or what fits.
    pub max_connections: Option<usize>,
    /// Memory of all guests together, in bytes. `None`: half of the machine's.
    pub total_memory: Option<usize>,
    /// Call stack of a guest, in bytes.
    pub stack: usize,
    /// Directory of compiled guests.
    pub cache: CacheConfig,
    /// Time for open connections to finish once the server drains.
    pub drain_timeout: Duration,
    /// Address of the admin API.
    pub admin: Option<AdminAddress>,
    /// File with the token for the admin API on a loopback address.
    pub admin_token_file: Option<PathBuf>,
    /// OTLP collector for a span of each connection, as `http://HOST:PORT`.
    pub otlp: Option<String>,
    /// Format of the log.
    pub log_format: LogFormat,
    /// Least severe level of the log.
    pub log_level: LogLevel,
}

impl ServerConfig {
    /// Limits that all guests share, on a machine with `memory` bytes. `max_memory` is the largest
    /// memory limit of any service's guest, in bytes.
    pub fn shared_limits(&self, memory: usize, max_memory: usize) -> SharedLimits {
        SharedLimits {
            memory: max_memory,
            total_memory: self.total_memory.unwrap_or(memory / 2),
            stack: self.stack,
        }
    }
}

/// Where compiled guests are kept.
#[derive(Clone, Debug, PartialEq)]
pub enum CacheConfig {
    /// In the user's cache directory, if there is one.
    Usual,
    /// Nowhere: guests are compiled at each start.
    Off,
    /// In this directory.
    Directory(PathBuf),
}

/// Format of the log on standard error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Least severe level of log lines that are written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LogLevel {
    /// Errors only.
    Error,
    /// Also warnings.
    Warn,
    /// Also one line per connection.
    Info,
    /// Everything.
    Debug,
}

/// One service: where its clients come from, and the guest that handles them.
#[derive(Clone, Debug)]
pub struct ServiceConfig {
    /// Name of the service, unique in a server.
    pub name: String,
    /// The service whose TLS clients this one serves, for a service without a listener of its own.
    pub behind: Option<Behind>,
    /// Listening and admission. Without addresses for a service behind another one.
    pub listener: ListenerConfig,
    /// The guest, its grants and its limits.
    pub handler: HandlerConfig,
    /// Position of the settings in the config file.
    pub origin: Origin,
}

impl ServiceConfig {
    /// Whether both have the same settings, apart from the guest's path and the addresses.
    ///
    /// A reload treats those two by themselves: another guest is a swap, and an address that stays
    /// keeps its sockets.
    pub fn has_same_settings(&self, other: &Self) -> bool {
        let settings = |service: &Self| {
            let mut listener = service.listener.clone();
            listener.addresses.clear();
            let mut handler = service.handler.clone();
            handler.guest = PathBuf::new();
            (service.behind.clone(), listener, handler)
        };
        settings(self) == settings(other)
    }
}

/// A service that serves some of the TLS clients of another service.
#[derive(Clone, Debug, PartialEq)]
pub struct Behind {
    /// The service that listens and speaks TLS.
    pub service: String,
    /// Server names (SNI) whose clients come here, such as `chat.example` or `*.example`.
    pub server_names: Vec<String>,
}

/// Where the settings of a service stand in the config file. Empty for a command line.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Origin {
    /// Line of the table, from 1.
    pub line: usize,
    /// The keys that are set.
    pub keys: Vec<OriginKey>,
}

/// A key that a config file sets.
#[derive(Clone, Debug, PartialEq)]
pub struct OriginKey {
    /// The key.
    pub name: String,
    /// Its line, from 1.
    pub line: usize,
    /// Whether it is a setting of the listener, which a service behind another one cannot have.
    pub of_listener: bool,
}

impl Origin {
    /// Line of `key`, or of the table if the key is not set.
    pub fn line_of(&self, key: &str) -> usize {
        let found = self.keys.iter().find(|set| set.name == key);
        found.map_or(self.line, |set| set.line)
    }
}

/// How a service accepts clients.
#[derive(Clone, Debug, PartialEq)]
pub struct ListenerConfig {
    /// Addresses to listen on.
    pub addresses: Vec<ListenAddress>,
    /// Options of the listening sockets.
    pub sockets: SocketSettings,
    /// How connections share the threads.
    pub dispatch: Dispatch,
    /// Open connections at once. `None`: as many as the server may have.
    pub max_connections: Option<usize>,
    /// Rules for clients.
    pub admission: AdmissionConfig,
    /// Treatment of clients while the service is full.
    pub when_full: WhenFull,
    /// PROXY protocol and TLS.
    pub handshake: HandshakeConfig,
}

impl ListenerConfig {
    /// Treatment of clients while the service is full. TLS clients get no text: they could not
    /// read it.
    pub fn when_full(&self) -> WhenFull {
        match &self.when_full {
            WhenFull::Close(_) if self.handshake.tls.is_some() => WhenFull::Close(Vec::new()),
            other => other.clone(),
        }
    }

    /// Admission rules of a service with at most `max_connections` open connections.
    pub fn admission_rules(&self, max_connections: usize) -> AdmissionRules {
        let admission = &self.admission;
        AdmissionRules {
            proxies: self.handshake.proxies.clone(),
            allow: admission.allow.clone(),
            deny: admission.deny.clone(),
            prefix: admission.prefix,
            connections_per_source: match admission.connections_per_source {
                PerSource::HalfOfAll => Some(max_connections.div_ceil(2)),
                PerSource::AtMost(most) => Some(most),
                PerSource::Unlimited => None,
            },
            rate: admission.rate,
            rate_per_source: admission.rate_per_source,
        }
    }
}

/// Which clients may connect, how many and how fast.
#[derive(Clone, Debug, PartialEq)]
pub struct AdmissionConfig {
    /// Networks that may connect. Empty: all.
    pub allow: Vec<Cidr>,
    /// Networks that may not connect.
    pub deny: Vec<Cidr>,
    /// Open connections of one source.
    pub connections_per_source: PerSource,
    /// Bits of an address that make a source.
    pub prefix: SourcePrefix,
    /// New connections per second.
    pub rate: Option<NonZeroU32>,
    /// New connections per second of one source.
    pub rate_per_source: Option<NonZeroU32>,
}

/// Open connections that one source may have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PerSource {
    /// Half of all connections of the service, so that no source has them all.
    HalfOfAll,
    /// This many.
    AtMost(usize),
    /// Any number.
    Unlimited,
}

/// Steps of a connection before a guest gets it.
#[derive(Clone, Debug, PartialEq)]
pub struct HandshakeConfig {
    /// Proxies that begin their connections with a PROXY protocol header.
    pub proxies: Vec<Cidr>,
    /// TLS with clients.
    pub tls: Option<TlsConfig>,
    /// Time for the header and the TLS handshake together.
    pub timeout: Duration,
    /// TLS handshakes at once.
    pub max_handshakes: usize,
}

/// TLS as it is configured. The three lists of files belong together by position.
#[derive(Clone, Debug, PartialEq)]
pub struct TlsConfig {
    /// Certificate chains (PEM).
    pub certificates: Vec<PathBuf>,
    /// Private keys (PEM), one for each certificate.
    pub keys: Vec<PathBuf>,
    /// OCSP responses (DER), for as many of the certificates.
    pub ocsp: Vec<PathBuf>,
    /// Protocols to negotiate (ALPN, RFC 7301), in order of preference.
    pub alpn: Vec<String>,
    /// Oldest version of TLS.
    pub min_version: MinVersion,
    /// Certificates that clients have to show.
    pub clients: Option<ClientAuth>,
}

/// Certificates, keys and OCSP responses do not match in number.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error(
    "there are {certificates} certificates, {keys} keys and {ocsp} OCSP responses; give each certificate a key, in the same order, and no more responses than certificates"
)]
pub struct UnpairedCertificates {
    /// Number of certificates.
    pub certificates: usize,
    /// Number of keys.
    pub keys: usize,
    /// Number of OCSP responses.
    pub ocsp: usize,
}

impl TlsConfig {
    /// Settings with each certificate beside its key.
    ///
    /// # Errors
    ///
    /// Fails if the numbers of certificates, keys and OCSP responses do not match.
    pub fn settings(&self, max_handshakes: usize) -> Result<TlsSettings, UnpairedCertificates> {
        let (certificates, keys) = (self.certificates.len(), self.keys.len());
        if certificates != keys || self.ocsp.len() > certificates {
            return Err(UnpairedCertificates {
                certificates,
                keys,
                ocsp: self.ocsp.len(),
            });
        }
        let pairs = self.certificates.iter().zip(&self.keys).enumerate();
        Ok(TlsSettings {
            pairs: pairs
                .map(|(position, (certificate, key))| CertificateFiles {
                    certificate: certificate.clone(),
                    key: key.clone(),
                    ocsp: self.ocsp.get(position).cloned(),
                })
                .collect(),
            alpn: self.alpn.clone(),
            min_version: self.min_version,
            client_auth: self.clients.clone(),
            max_handshakes,
        })
    }
}

/// The guest of a service, with everything it is granted and held to.
#[derive(Clone, Debug, PartialEq)]
pub struct HandlerConfig {
    /// File of the component.
    pub guest: PathBuf,
    /// Directories that guests may use.
    pub directories: Vec<DirGrant>,
    /// Environment variables of guests.
    pub env: Vec<(String, String)>,
    /// Destinations that guests may connect to.
    pub allow_connect: Vec<Destination>,
    /// Limits of each guest.
    pub guest_limits: GuestLimits,
    /// Limits of each connection.
    pub connection_limits: ConnectionLimits,
    /// Replacement of the guest by a newer version.
    pub swap: SwapConfig,
}

impl HandlerConfig {
    /// Files that one guest can have open: none, if nothing is granted that could be opened.
    pub fn open_files(&self) -> usize {
        match self.directories.is_empty() && self.allow_connect.is_empty() {
            true => 0,
            false => self.guest_limits.open_files,
        }
    }
}

/// How a newer version of a guest takes over.
#[derive(Clone, Debug, PartialEq)]
pub struct SwapConfig {
    /// Swap whenever the guest's file has changed.
    pub watch: bool,
    /// Time for open connections to go on with a replaced version. `None`: no limit.
    pub max_old_version_age: Option<Duration>,
    /// Question that a version must answer before it serves.
    pub probe: Option<Probe>,
}

/// The config key that grants a directory with this access.
pub(crate) fn directory_key(access: Access) -> &'static str {
    match access {
        Access::ReadOnly => "dir",
        Access::ReadWrite => "dir-rw",
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A server with plain defaults.
    pub(crate) fn server() -> ServerConfig {
        ServerConfig {
            threads: None,
            max_connections: None,
            total_memory: None,
            stack: 512 << 10,
            cache: CacheConfig::Off,
            drain_timeout: Duration::from_secs(30),
            admin: None,
            admin_token_file: None,
            otlp: None,
            log_format: LogFormat::Text,
            log_level: LogLevel::Info,
        }
    }

    /// A service with plain defaults and the guest `echo.wasm`.
    pub(crate) fn echo(name: &str, addresses: &[&str]) -> ServiceConfig {
        let addresses = addresses.iter().map(|address| address.parse().unwrap());
        ServiceConfig {
            name: name.into(),
            behind: None,
            listener: ListenerConfig {
                addresses: addresses.collect(),
                sockets: SocketSettings::default(),
                dispatch: Dispatch::Concurrent,
                max_connections: None,
                admission: AdmissionConfig {
                    allow: Vec::new(),
                    deny: Vec::new(),
                    connections_per_source: PerSource::HalfOfAll,
                    prefix: "32,64".parse().unwrap(),
                    rate: None,
                    rate_per_source: None,
                },
                when_full: WhenFull::Wait,
                handshake: HandshakeConfig {
                    proxies: Vec::new(),
                    tls: None,
                    timeout: Duration::from_secs(10),
                    max_handshakes: 1000,
                },
            },
            handler: HandlerConfig {
                guest: "echo.wasm".into(),
                directories: Vec::new(),
                env: Vec::new(),
                allow_connect: Vec::new(),
                guest_limits: GuestLimits::default(),
                connection_limits: ConnectionLimits::default(),
                swap: SwapConfig {
                    watch: false,
                    max_old_version_age: None,
                    probe: None,
                },
            },
            origin: Origin::default(),
        }
    }

    /// TLS with a certificate and a key that do not exist.
    pub(crate) fn tls() -> TlsConfig {
        TlsConfig {
            certificates: vec!["/nowhere/cert.pem".into()],
            keys: vec!["/nowhere/key.pem".into()],
            ocsp: Vec::new(),
            alpn: Vec::new(),
            min_version: MinVersion::Tls12,
            clients: None,
        }
    }

    #[test]
    fn a_guest_and_addresses_are_no_other_settings() {
        let one = echo("a", &["127.0.0.1:1"]);
        let mut other = echo("a", &["127.0.0.1:2"]);
        other.handler.guest = "other.wasm".into();
        other.origin.line = 7;
        assert!(one.has_same_settings(&other));
        other.handler.swap.watch = true;
        assert!(!one.has_same_settings(&other));
        other.handler.swap.watch = false;
        other.listener.admission.deny = vec!["10.0.0.0/8".parse().unwrap()];
        assert!(!one.has_same_settings(&other));
    }

    #[test]
    fn tls_clients_of_a_full_service_get_no_text() {
        let mut listener = echo("a", &[]).listener;
        listener.when_full = WhenFull::Close(b"full".to_vec());
        assert_eq!(listener.when_full(), WhenFull::Close(b"full".to_vec()));
        listener.handshake.tls = Some(tls());
        assert_eq!(listener.when_full(), WhenFull::Close(Vec::new()));
    }

    #[test]
    fn each_certificate_needs_a_key() {
        let mut config = tls();
        assert_eq!(config.settings(1).unwrap().pairs.len(), 1);
        config.keys.push("/nowhere/other.pem".into());
        let counts = config.settings(1).unwrap_err();
        assert_eq!((counts.certificates, counts.keys, counts.ocsp), (1, 2, 0));
    }
}
