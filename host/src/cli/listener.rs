//! Settings of a listener: addresses, sockets and admission.

use std::time::Duration;

use clap::{Args, ValueEnum};
use wasinetd::listener::SourcePrefix;
use wasinetd::net::{Cidr, ListenAddress, SocketMode, SocketOwner};

use super::handshake::HandshakeArgs;
use super::values::{OrOff, backlog, keepalive, positive, positive_or_off};

/// How a service accepts clients. A service behind another one has none of these.
#[derive(Args)]
pub(crate) struct ListenerArgs {
    /// Listen on this TCP port, on this Unix socket, or on the sockets that systemd passes under this
    /// name; repeatable. Port 0 takes any free port
    /// [default: all sockets that systemd passes, or 127.0.0.1:7878]
    #[arg(long, value_name = "IP:PORT|unix:PATH|fd:NAME")]
    pub(super) listen: Vec<ListenAddress>,

    /// How connections share the threads
    #[arg(long, value_enum, default_value_t = Dispatch::Concurrent)]
    pub(super) dispatch: Dispatch,

    /// Open connections at once. Further clients wait in the kernel's backlog
    /// [default: 10000, or as many as this machine can hold]
    #[arg(long, value_name = "N", value_parser = positive, allow_hyphen_values = true)]
    pub(super) max_connections: Option<usize>,

    #[command(flatten)]
    pub(super) sockets: SocketArgs,

    #[command(flatten)]
    pub(super) admission: AdmissionArgs,

    #[command(flatten)]
    pub(super) handshake: HandshakeArgs,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Dispatch {
    /// One task per connection, which any thread may continue
    Spawn,
    /// A share of the connections for each thread, all of a share in one task
    Concurrent,
}

/// Options of listening sockets.
#[derive(Args)]
#[command(next_help_heading = "Sockets")]
pub(crate) struct SocketArgs {
    /// Clients that wait in the kernel, per socket, while the server is full or busy. The kernel lowers
    /// this to net.core.somaxconn, whose default is the same. Sockets from systemd have their own
    /// setting
    #[arg(long, value_name = "N", default_value = "4096", value_parser = backlog, allow_hyphen_values = true)]
    pub(super) backlog: u32,

    /// Share TCP ports with other processes of this user, such as another wasinetd with this flag: the
    /// kernel spreads clients over them. Without it a second server on the same port is refused
    #[arg(long)]
    pub(super) reuse_port: bool,

    /// Idle time before TCP keepalive probes start. A client that vanished is noticed after twice that
    /// time. One minute: a probe is one packet
    #[arg(long, value_name = "DURATION|off", default_value = "60s", value_parser = keepalive)]
    pub(super) keepalive: OrOff<Duration>,

    /// Mode of Unix sockets, whatever the umask: users who may write to a socket may connect
    #[arg(long, value_name = "MODE", default_value = "0660")]
    pub(super) unix_mode: SocketMode,

    /// User and group of Unix sockets, by name or number [default: those of wasinetd]
    #[arg(long, value_name = "USER|USER:GROUP|:GROUP")]
    pub(super) unix_owner: Option<SocketOwner>,
}

/// Which clients may connect. Others are reset.
#[derive(Args)]
#[command(next_help_heading = "Admission of clients")]
pub(crate) struct AdmissionArgs {
    /// Admit only clients from this network; repeatable
    #[arg(long, value_name = "CIDR")]
    pub(super) allow: Vec<Cidr>,

    /// Refuse clients from this network, even if allowed; repeatable
    #[arg(long, value_name = "CIDR")]
    pub(super) deny: Vec<Cidr>,

    /// Open connections of one source, or off. Behind a proxy without PROXY protocol all clients are
    /// one source [default: half of --max-connections, so that no source has them all]
    #[arg(long, value_name = "N|off", value_parser = positive_or_off, allow_hyphen_values = true)]
    pub(super) max_connections_per_source: Option<OrOff<usize>>,

    /// Leading bits of an IPv4 and of an IPv6 address that make a source
    #[arg(long, value_name = "V4,V6", default_value = "32,64")]
    pub(super) source_prefix: SourcePrefix,

    /// New connections per second. Further clients wait. Off: the server takes as many as it can
    #[arg(long, value_name = "N|off", default_value = "off", value_parser = positive_or_off, allow_hyphen_values = true)]
    pub(super) accept_rate: OrOff<usize>,

    /// New connections per second of one source. Off: the right number depends on the protocol
    #[arg(long, value_name = "N|off", default_value = "off", value_parser = positive_or_off, allow_hyphen_values = true)]
    pub(super) accept_rate_per_source: OrOff<usize>,

    /// Treatment of clients while the service is full
    #[arg(long, value_enum, default_value_t = WhenFull::Wait)]
    pub(super) when_full: WhenFull,

    /// Text for clients that --when-full close turns away
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(super) full_banner: String,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum WhenFull {
    /// Clients wait in the kernel's backlog
    Wait,
    /// Clients get --full-banner, unless they speak TLS, and are closed
    Close,
}
