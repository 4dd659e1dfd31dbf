//! What is set of a service.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use clap::{Args, Parser, ValueEnum, ValueHint};
use wasinetd::limit::Limit;
use wasinetd::listener;
use wasinetd::net::{Cidr, ListenAddress, SocketMode, SocketOwner, SocketPermissions};
use wasinetd::sandbox::{self, Access, Destination, DirGrant};
use wasinetd::service::Probe;

use super::NAME_VALUE;
use super::front::HandshakeArgs;
use super::limits::{AdmissionArgs, ConnectionLimitArgs, GuestLimitArgs};
use super::values::{
    OrOff, backlog, directory, duration_or_off, escaped, positive, server_name, service_name,
    size_text, some_duration, variable,
};

/// What is set of a service.
#[derive(Args)]
pub(crate) struct ServiceArgs {
    /// Listen on this TCP port, at this Unix socket, or at the sockets that systemd passes under this
    /// name; repeat it for more. Port 0 takes any free port
    /// [default: all sockets that systemd passes, or 127.0.0.1:7878]
    #[arg(long, value_name = "IP:PORT|unix:PATH|fd:NAME")]
    pub(crate) listen: Vec<ListenAddress>,

    #[command(flatten)]
    pub(crate) sockets: SocketArgs,

    /// How connections share the threads: each stays on one, or any thread goes on with it where
    /// there is time
    #[arg(long, value_enum, default_value_t = Dispatch::Concurrent)]
    pub(crate) dispatch: Dispatch,

    /// Let guests read this directory of the host, under the second name if there is one
    #[arg(long, value_name = "HOST[::GUEST]", value_parser = directory, value_hint = ValueHint::DirPath)]
    pub(crate) dir: Vec<(PathBuf, String)>,

    /// Let guests read and change this directory of the host
    #[arg(long, value_name = "HOST[::GUEST]", value_parser = directory, value_hint = ValueHint::DirPath)]
    pub(crate) dir_rw: Vec<(PathBuf, String)>,

    /// Give guests this environment variable, with wasinetd's own value unless one is given
    #[arg(long, value_name = NAME_VALUE, value_parser = variable)]
    pub(crate) env: Vec<(String, String)>,

    #[command(flatten)]
    pub(crate) network: NetworkArgs,

    /// Connections open at once; further clients wait in the kernel's backlog
    /// [default: 10000, or as many as this machine can hold]
    #[arg(long, value_name = "N", value_parser = positive, allow_hyphen_values = true)]
    pub(crate) max_connections: Option<usize>,

    #[command(flatten)]
    pub(crate) admission: AdmissionArgs,

    #[command(flatten)]
    pub(crate) guest_limits: GuestLimitArgs,

    #[command(flatten)]
    pub(crate) connection_limits: ConnectionLimitArgs,

    #[command(flatten)]
    pub(crate) front: HandshakeArgs,

    #[command(flatten)]
    pub(crate) swap: SwapArgs,
}

/// The keys of a `[[service]]` in a config file.
#[derive(Parser)]
#[command(no_binary_name = true)]
pub(crate) struct ServiceTable {
    /// What the service is called: letters, digits, - and _
    #[arg(long, value_parser = service_name)]
    pub(crate) name: String,

    /// The guest: a component that exports wasinetd:tcp/handler
    #[arg(long, value_name = "GUEST.wasm", value_hint = ValueHint::FilePath)]
    pub(crate) guest: PathBuf,

    /// Serve those clients of another service, instead of listening, that ask for one of the server-name
    /// in TLS. Who may connect, and TLS itself, are as that service has them
    #[arg(long, value_name = "SERVICE", conflicts_with = "listen", requires = "server_name", value_parser = service_name)]
    pub(crate) behind: Option<String>,

    /// The names for the server that are this service's, with behind: chat.example, or *.example for all
    /// that have one label more
    #[arg(long, value_name = "NAME", requires = "behind", value_parser = server_name)]
    pub(crate) server_name: Vec<String>,

    #[command(flatten)]
    pub(crate) service: ServiceArgs,
}

impl ServiceArgs {
    /// What each limit is set to, as its flag would have it.
    pub(crate) fn limits(
        &self,
        shared: &sandbox::SharedLimits,
        max_connections: usize,
    ) -> Vec<(Limit, String)> {
        let guest = self.guest_limits.limits();
        let connection = &self.connection_limits;
        let rules = self.admission.rules(max_connections);
        let time = |time| humantime::format_duration(time).to_string();
        let off = || "off".to_string();
        let time_or_off = |or_off: OrOff<Duration>| or_off.0.map_or_else(off, time);
        let size_or_off = |or_off: OrOff<usize>| or_off.0.map_or_else(off, size_text);
        let rate_or_off = |rate: OrOff<usize>| rate.0.map_or_else(off, |rate| rate.to_string());
        let many = |networks: &[Cidr], none: &str| match networks {
            [] => none.to_string(),
            some => some
                .iter()
                .map(Cidr::to_string)
                .collect::<Vec<_>>()
                .join(","),
        };
        let connect = self.network.allow_connect.len();
        Limit::ALL
            .into_iter()
            .map(|limit| {
                let value = match limit {
                    Limit::MaxMemory => size_text(guest.memory),
                    Limit::MaxTotalMemory => size_text(shared.total_memory),
                    Limit::CpuTime => time(guest.cpu_time),
                    Limit::Stack => size_text(shared.stack),
                    Limit::MaxHandles => guest.handles.to_string(),
                    Limit::MaxOpenFiles => guest.open_files.to_string(),
                    Limit::MaxCallSize => size_text(guest.call_size),
                    Limit::MaxOutput => size_text(guest.output),
                    Limit::AllowConnect => format!("{connect} destinations"),
                    Limit::HandshakeTimeout => time(self.front.handshake_timeout),
                    Limit::MaxHandshakes => self.front.max_handshakes.to_string(),
                    Limit::IdleTimeout => time_or_off(connection.idle_timeout),
                    Limit::FirstByteTimeout => time_or_off(connection.first_byte_timeout),
                    Limit::WriteTimeout => time_or_off(connection.write_timeout),
                    Limit::Keepalive => time_or_off(connection.keepalive),
                    Limit::MaxLifetime => time_or_off(connection.max_lifetime),
                    Limit::MaxOldVersionAge => time_or_off(self.swap.max_old_version_age),
                    Limit::MaxBytesIn => size_or_off(connection.max_bytes_in),
                    Limit::MaxBytesOut => size_or_off(connection.max_bytes_out),
                    Limit::MaxConnections => max_connections.to_string(),
                    Limit::MaxConnectionsPerSource => rules
                        .connections_per_source
                        .map_or_else(off, |most| most.to_string()),
                    Limit::AcceptRate => rate_or_off(self.admission.accept_rate),
                    Limit::AcceptRatePerSource => {
                        rate_or_off(self.admission.accept_rate_per_source)
                    }
                    Limit::Allow => many(&rules.allow, "everyone"),
                    Limit::Deny => many(&rules.deny, "nobody"),
                };
                (limit, value)
            })
            .collect()
    }

    /// How to listen.
    pub(crate) fn socket_settings(&self) -> listener::SocketSettings {
        listener::SocketSettings {
            backlog: self.sockets.backlog,
            reuse_port: self.sockets.reuse_port,
            keepalive: self.connection_limits.keepalive.0,
            permissions: SocketPermissions {
                mode: self.sockets.unix_mode,
                owner: self.sockets.unix_owner.unwrap_or_default(),
            },
        }
    }

    /// The directories to grant, of both kinds.
    pub(crate) fn directories(&self) -> Vec<DirGrant> {
        let grant = |access| {
            move |(host, guest): &(PathBuf, String)| DirGrant {
                host: host.clone(),
                guest: guest.clone(),
                access,
            }
        };
        let read_only = self.dir.iter().map(grant(Access::ReadOnly));
        read_only
            .chain(self.dir_rw.iter().map(grant(Access::ReadWrite)))
            .collect()
    }
}

/// The sockets that are listened at.
#[derive(Args)]
#[command(next_help_heading = "Sockets")]
pub(crate) struct SocketArgs {
    /// Clients that wait in the kernel for each socket while the server is full or busy; further ones
    /// are put off. The kernel lowers it to net.core.somaxconn, whose own default is this. Of sockets that
    /// systemd passes, that is its own setting
    #[arg(long, value_name = "N", default_value = "4096", value_parser = backlog, allow_hyphen_values = true)]
    pub(crate) backlog: u32,

    /// Let other processes of this user listen at the same TCP ports, such as another wasinetd that does
    /// so too: the kernel spreads clients over them. Without it, one that is started by mistake is refused
    #[arg(long)]
    reuse_port: bool,

    /// The mode of Unix sockets, whatever the umask is: who may write to one may connect
    #[arg(long, value_name = "MODE", default_value = "0660")]
    unix_mode: SocketMode,

    /// The user and the group that Unix sockets are given to, by name or number
    /// [default: those of wasinetd]
    #[arg(long, value_name = "USER|USER:GROUP|:GROUP")]
    unix_owner: Option<SocketOwner>,
}

/// How a new version of the guest takes the place of the one that is served, after SIGHUP, `ctl swap`,
/// or a change of the file with --watch. A version that cannot be run changes nothing.
#[derive(Args)]
#[command(next_help_heading = "New versions of the guest")]
pub(crate) struct SwapArgs {
    /// Swap to the guest's file whenever it has changed, by a rename or in place
    #[arg(long)]
    pub(crate) watch: bool,

    /// How long connections may go on with a version after it was replaced; then they are reset. An
    /// hour: longer than any exchange of a protocol that ends when it is asked to
    #[arg(long, value_name = "DURATION|off", default_value = "1h", value_parser = duration_or_off)]
    max_old_version_age: OrOff<Duration>,

    /// Ask a version this before it is served. \\r, \\n, \\t, \\0, \\xHH and \\\\ stand for what they do
    /// in C: 'GET / HTTP/1.1\\r\\nHost: probe\\r\\n\\r\\n'
    #[arg(long, value_name = "TEXT", value_parser = escaped, requires = "probe_expect")]
    probe_send: Option<Bytes>,

    /// What its answer has to begin with, such as 'HTTP/1.1 200'
    #[arg(long, value_name = "TEXT", value_parser = escaped)]
    probe_expect: Option<Bytes>,

    /// How long it may take to answer the probe
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = some_duration)]
    probe_timeout: Duration,
}

impl SwapArgs {
    pub(crate) fn max_old_version_age(&self) -> Option<Duration> {
        self.max_old_version_age.0
    }

    pub(crate) fn probe(&self) -> Option<Probe> {
        let expect = self.probe_expect.as_ref()?;
        Some(Probe {
            send: self.probe_send.as_deref().unwrap_or_default().into(),
            expect: expect.to_vec(),
            timeout: self.probe_timeout,
        })
    }
}

/// Where guests may connect to. Without it they have no network.
#[derive(Args)]
pub(crate) struct NetworkArgs {
    /// Let guests connect to this TCP port of an address, a network (10.0.0.0/8:5432,
    /// [fd00::/8]:5432) or a name; repeat it for more. A name may lead to public addresses only,
    /// lest whoever answers for it let guests into a network of yours, or into CIDR where that is
    /// given. A network of yours with public addresses is not told from others: give its CIDR
    #[arg(long, value_name = "HOST:PORT[/CIDR]")]
    pub(crate) allow_connect: Vec<Destination>,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum Dispatch {
    /// A task for each connection, which any thread may go on with
    Spawn,
    /// A share of the connections for each thread, all of a share in one task
    Concurrent,
}
