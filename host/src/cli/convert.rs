//! Conversion of clap's structs to the model.

use std::num::NonZeroU32;
use std::path::PathBuf;

use wasinetd::config::model::{
    AdmissionConfig, Behind, CacheConfig, HandlerConfig, HandshakeConfig, ListenerConfig,
    LogFormat, LogLevel, Origin, PerSource, ResolvedConfig, ServerConfig, ServiceConfig,
    SwapConfig, TlsConfig,
};
use wasinetd::connection::ConnectionLimits;
use wasinetd::connection::tls::{ClientAuth, MinVersion};
use wasinetd::listener::{SocketSettings, WhenFull};
use wasinetd::net::{ListenAddress, SocketPermissions};
use wasinetd::sandbox::{Access, DirGrant, GuestLimits};
use wasinetd::server::Dispatch;
use wasinetd::service::Probe;

use super::arguments::{CheckArgs, CompileArgs, ServeArgs};
use super::handler::{ConnectionLimitArgs, GuestLimitArgs, HandlerArgs, NetworkArgs, SwapArgs};
use super::handshake::{ClientAuthMode, HandshakeArgs};
use super::listener::{AdmissionArgs, ListenerArgs};
use super::server::{CacheArgs, ServerArgs, ServerTable, SharedLimitArgs};
use super::service::ServiceTable;
use super::values::OrOff;
use super::{handshake, listener, server};

/// Name of the service of a server without a config file.
const ONLY_SERVICE: &str = "default";

/// The configuration of a command line with a guest. `default_addresses` are listened on if no address
/// is given.
pub(crate) fn command_line_config(
    args: ServeArgs,
    guest: PathBuf,
    default_addresses: impl FnOnce() -> Vec<ListenAddress>,
) -> ResolvedConfig {
    let mut listener = args.service.listener;
    if listener.listen.is_empty() {
        listener.listen = default_addresses();
    }
    let server = ServerTable {
        max_connections: listener.max_connections,
        server: args.server,
    };
    ResolvedConfig {
        server: server.into(),
        services: vec![ServiceConfig {
            name: ONLY_SERVICE.into(),
            behind: None,
            listener: listener.into(),
            handler: args.service.handler.into_config(guest),
            origin: Origin::default(),
        }],
    }
}

impl ServiceTable {
    /// The service that a table of the config file describes.
    pub(super) fn into_config(self, origin: Origin) -> ServiceConfig {
        let server_names = self.server_name;
        let behind = self.behind.map(|service| Behind {
            service,
            server_names,
        });
        ServiceConfig {
            name: self.name,
            behind,
            listener: self.service.listener.into(),
            handler: self.service.handler.into_config(self.guest),
            origin,
        }
    }
}

impl From<ServerTable> for ServerConfig {
    fn from(table: ServerTable) -> Self {
        let ServerArgs {
            threads,
            shared_limits,
            cache,
            drain_timeout,
            admin,
            admin_token_file,
            otlp,
            log_format,
            log_level,
        } = table.server;
        Self {
            threads,
            max_connections: table.max_connections,
            total_memory: shared_limits.max_total_memory,
            stack: shared_limits.stack,
            cache: cache.into(),
            drain_timeout,
            admin,
            admin_token_file,
            otlp,
            log_format: match log_format {
                server::LogFormat::Text => LogFormat::Text,
                server::LogFormat::Json => LogFormat::Json,
            },
            log_level: match log_level {
                server::LogLevel::Error => LogLevel::Error,
                server::LogLevel::Warn => LogLevel::Warn,
                server::LogLevel::Info => LogLevel::Info,
                server::LogLevel::Debug => LogLevel::Debug,
            },
        }
    }
}

impl From<CacheArgs> for CacheConfig {
    fn from(args: CacheArgs) -> Self {
        match args.cache {
            None => Self::Usual,
            Some(path) if path.as_os_str() == "off" => Self::Off,
            Some(path) => Self::Directory(path),
        }
    }
}

impl From<ListenerArgs> for ListenerConfig {
    fn from(args: ListenerArgs) -> Self {
        let sockets = args.sockets;
        Self {
            addresses: args.listen,
            sockets: SocketSettings {
                backlog: sockets.backlog,
                reuse_port: sockets.reuse_port,
                keepalive: sockets.keepalive.0,
                permissions: SocketPermissions {
                    mode: sockets.unix_mode,
                    owner: sockets.unix_owner.unwrap_or_default(),
                },
            },
            dispatch: match args.dispatch {
                listener::Dispatch::Spawn => Dispatch::Spawn,
                listener::Dispatch::Concurrent => Dispatch::Concurrent,
            },
            max_connections: args.max_connections,
            when_full: match args.admission.when_full {
                listener::WhenFull::Wait => WhenFull::Wait,
                listener::WhenFull::Close => {
                    WhenFull::Close(args.admission.full_banner.clone().into_bytes())
                }
            },
            admission: args.admission.into(),
            handshake: args.handshake.into(),
        }
    }
}

impl From<AdmissionArgs> for AdmissionConfig {
    fn from(args: AdmissionArgs) -> Self {
        let rate = |OrOff(rate): OrOff<usize>| {
            rate.map(|rate| u32::try_from(rate).unwrap_or(u32::MAX))
                .and_then(NonZeroU32::new)
        };
        Self {
            allow: args.allow,
            deny: args.deny,
            connections_per_source: match args.max_connections_per_source {
                None => PerSource::HalfOfAll,
                Some(OrOff(Some(most))) => PerSource::AtMost(most),
                Some(OrOff(None)) => PerSource::Unlimited,
            },
            prefix: args.source_prefix,
            rate: rate(args.accept_rate),
            rate_per_source: rate(args.accept_rate_per_source),
        }
    }
}

impl From<HandshakeArgs> for HandshakeConfig {
    fn from(args: HandshakeArgs) -> Self {
        let required = matches!(args.tls_client_auth, ClientAuthMode::Required);
        let clients = args.tls_client_ca.map(|authorities| ClientAuth {
            authorities,
            required,
        });
        let has_files = !(args.tls_cert.is_empty() && args.tls_key.is_empty());
        Self {
            proxies: args.proxy_from,
            tls: has_files.then_some(TlsConfig {
                certificates: args.tls_cert,
                keys: args.tls_key,
                ocsp: args.tls_ocsp,
                alpn: args.tls_alpn,
                min_version: match args.tls_min_version {
                    handshake::MinVersion::V1_2 => MinVersion::Tls12,
                    handshake::MinVersion::V1_3 => MinVersion::Tls13,
                },
                clients,
            }),
            timeout: args.handshake_timeout,
            max_handshakes: args.max_handshakes,
        }
    }
}

impl HandlerArgs {
    /// The handler with the guest at this path.
    fn into_config(self, guest: PathBuf) -> HandlerConfig {
        let grant = |access| {
            move |(host, guest)| DirGrant {
                host,
                guest,
                access,
            }
        };
        let read_only = self.dir.into_iter().map(grant(Access::ReadOnly));
        let read_write = self.dir_rw.into_iter().map(grant(Access::ReadWrite));
        HandlerConfig {
            guest,
            directories: read_only.chain(read_write).collect(),
            env: self.env,
            allow_connect: self.network.allow_connect,
            guest_limits: self.guest_limits.into(),
            connection_limits: self.connection_limits.into(),
            swap: self.swap.into(),
        }
    }
}

impl From<GuestLimitArgs> for GuestLimits {
    fn from(args: GuestLimitArgs) -> Self {
        Self {
            memory: args.max_memory,
            cpu_time: args.cpu_time,
            handles: args.max_handles,
            open_files: args.max_open_files,
            call_size: args.max_call_size,
            output: args.max_output,
        }
    }
}

impl From<ConnectionLimitArgs> for ConnectionLimits {
    fn from(args: ConnectionLimitArgs) -> Self {
        Self {
            idle: args.idle_timeout.0,
            first_byte: args.first_byte_timeout.0,
            write: args.write_timeout.0,
            lifetime: args.max_lifetime.0,
            bytes_in: args.max_bytes_in.0.map(|bytes| bytes as u64),
            bytes_out: args.max_bytes_out.0.map(|bytes| bytes as u64),
        }
    }
}

impl From<SwapArgs> for SwapConfig {
    fn from(args: SwapArgs) -> Self {
        let probe = args.probe_expect.map(|expect| Probe {
            send: args.probe_send.unwrap_or_default().to_vec(),
            expect: expect.to_vec(),
            timeout: args.probe_timeout,
        });
        Self {
            watch: args.watch,
            max_old_version_age: args.max_old_version_age.0,
            probe,
        }
    }
}

/// Settings of `check` and `compile`: limits and destinations, as `serve` would have them.
pub(crate) struct GuestSettings {
    /// Memory of all guests together, in bytes.
    pub(crate) total_memory: Option<usize>,
    /// Call stack of a guest, in bytes.
    pub(crate) stack: usize,
    /// The handler, without the path of a guest.
    pub(crate) handler: HandlerConfig,
}

impl CheckArgs {
    /// The settings of the guest to check.
    pub(crate) fn settings(self) -> GuestSettings {
        guest_settings(self.network, self.guest_limits, self.shared_limits)
    }
}

impl CompileArgs {
    /// The guests to compile, their settings, and the cache to compile into.
    pub(crate) fn settings(self) -> (Vec<PathBuf>, GuestSettings, CacheConfig) {
        let settings = guest_settings(self.network, self.guest_limits, self.shared_limits);
        (self.guests, settings, self.cache.into())
    }
}

fn guest_settings(
    network: NetworkArgs,
    guest_limits: GuestLimitArgs,
    shared_limits: SharedLimitArgs,
) -> GuestSettings {
    GuestSettings {
        total_memory: shared_limits.max_total_memory,
        stack: shared_limits.stack,
        handler: HandlerConfig {
            guest: PathBuf::new(),
            directories: Vec::new(),
            env: Vec::new(),
            allow_connect: network.allow_connect,
            guest_limits: guest_limits.into(),
            connection_limits: ConnectionLimits::default(),
            swap: SwapConfig {
                watch: false,
                max_old_version_age: None,
                probe: None,
            },
        },
    }
}
