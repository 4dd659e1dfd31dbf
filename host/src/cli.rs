//! The command line.

mod front;

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use wasinetd::admin::Address;
use wasinetd::connection;
use wasinetd::limit::Limit;
use wasinetd::listener::{self, Prefix, Rules};
use wasinetd::network::Network;
use wasinetd::sandbox::{self, Access, Destination, DirGrant};
use wasinetd::service::Probe;
use wasinetd::unix::{Mode, Owner, Permissions};

pub(crate) use front::CertArgs;
use front::FrontArgs;

/// The exit code for a mistake on the command line (BSD `sysexits.h`).
pub(crate) const EX_USAGE: u8 = 64;

/// The internet super-server for WebAssembly components: each TCP connection is handled by a
/// fresh, sandboxed instance of the guest.
#[derive(Parser)]
#[command(name = "wasinetd", version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 after a clean drain, 64 for a mistake on the command line, 65 for a guest that cannot \
be run, 69 for an address or a socket that cannot be listened on, 70 for a fault of wasinetd, 73 for a \
crate that cannot be written, 75 when connections had to be ended before they were done, 78 for a \
setting that cannot be met.";

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Accept connections and hand each to a fresh instance of the guest
    Serve(Box<ServeArgs>),
    /// Say whether a guest would be accepted, what it needs, and how many fit on this machine
    #[command(after_help = GRANTED)]
    Check(CheckArgs),
    /// Compile a guest into the cache, so that `serve` begins at once
    Compile(CompileArgs),
    /// See and steer a server that runs
    Ctl(CtlArgs),
    /// Print a JSON schema of the config file, for editors
    Schema,
    /// Begin a guest: a crate in Rust which builds, tests itself, and can be served as it is
    New(NewArgs),
    /// Make a certificate for trying out TLS, which nobody else vouches for, and its key
    Cert(CertArgs),
    /// Write the manual pages into a directory
    Man {
        /// The directory, which has to be there
        directory: PathBuf,
    },
    /// Print what a shell completes this command with
    #[command(after_help = COMPLETIONS)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

const COMPLETIONS: &str = "\
To have it in bash from now on: wasinetd completions bash > \
~/.local/share/bash-completion/completions/wasinetd. In fish: wasinetd completions fish > \
~/.config/fish/completions/wasinetd.fish. In zsh: wasinetd completions zsh > _wasinetd, in a directory \
of $fpath.";

const GRANTED: &str = "\
A guest has to export wasinetd:tcp/handler@0.1.0. It may import wasinetd:tcp/types@0.1.0, and \
wasi:cli, wasi:clocks, wasi:filesystem, wasi:io and wasi:random in the versions 0.2 and 0.3, and \
wasi:sockets 0.2 where it was granted with --allow-connect. It sees no directory and no environment \
variable that `serve` was not told to grant.";

/// Values of this name are pairs: a config file may have them as a table.
pub(crate) const NAME_VALUE: &str = "NAME[=VALUE]";

#[derive(Args)]
pub(crate) struct ServeArgs {
    /// The guest: a component that exports wasinetd:tcp/handler
    #[arg(value_name = "GUEST.wasm", required_unless_present = "config")]
    pub(crate) guest: Option<PathBuf>,

    /// Serve what this file says, and nothing else: settings by the names of these flags, and a
    /// [[service]] for each guest. SIGHUP reads it again
    #[arg(long, value_name = "FILE", exclusive = true)]
    pub(crate) config: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) service: ServiceArgs,

    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

/// What is set of a service.
#[derive(Args)]
pub(crate) struct ServiceArgs {
    /// Listen on this TCP port, at this Unix socket, or at the sockets that systemd passes under this
    /// name; repeat it for more. Port 0 takes any free port
    /// [default: all sockets that systemd passes, or 127.0.0.1:7878]
    #[arg(long, value_name = "IP:PORT|unix:PATH|fd:NAME")]
    pub(crate) listen: Vec<listener::Address>,

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
    pub(crate) guest_limits: GuestLimits,

    #[command(flatten)]
    pub(crate) connection_limits: ConnectionLimits,

    #[command(flatten)]
    pub(crate) front: FrontArgs,

    #[command(flatten)]
    pub(crate) swap: SwapArgs,
}

/// What is set of the server, whatever its services.
#[derive(Args)]
pub(crate) struct ServerArgs {
    /// Threads that connections run on [default: one for each core but one]
    #[arg(long, value_name = "N", value_parser = positive, allow_hyphen_values = true)]
    pub(crate) threads: Option<usize>,

    #[command(flatten)]
    pub(crate) shared_limits: SharedLimits,

    #[command(flatten)]
    pub(crate) cache: CacheArgs,

    /// How long open connections may take to finish after SIGTERM or SIGINT; a second signal ends
    /// them at once
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration, allow_hyphen_values = true)]
    pub(crate) drain_timeout: Duration,

    /// Answer operators over HTTP, such as `wasinetd ctl`, Prometheus or a browser: on a Unix
    /// socket, which only this user can connect to, or on a loopback address, where they show a token
    #[arg(long, value_name = "unix:PATH|127.0.0.1:PORT")]
    pub(crate) admin: Option<Address>,

    /// The file with the token that operators show on a loopback address. Only this user may be able
    /// to read it
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) admin_token_file: Option<PathBuf>,

    /// Send a span for each connection to an OpenTelemetry collector, by OTLP over HTTP (not TLS: put
    /// a collector on this machine). Off: it costs some microseconds for each
    #[arg(long, value_name = "http://HOST:PORT", value_parser = collector)]
    pub(crate) otlp: Option<String>,

    /// How to write the log, which goes to standard error
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,

    /// The least severe messages to log; a line for each connection is of level info
    #[arg(long, value_enum, default_value_t = LogLevel::Info)]
    pub(crate) log_level: LogLevel,
}

/// The keys of a config file that are the server's.
#[derive(Parser)]
#[command(no_binary_name = true)]
pub(crate) struct ServerTable {
    /// Connections of all services open at once [default: 10000, or as many as this machine can hold]
    #[arg(long, value_name = "N", value_parser = positive, allow_hyphen_values = true)]
    pub(crate) max_connections: Option<usize>,

    #[command(flatten)]
    pub(crate) server: ServerArgs,
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
        let many = |networks: &[Network], none: &str| match networks {
            [] => none.to_string(),
            some => some
                .iter()
                .map(Network::to_string)
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
    pub(crate) fn socket_settings(&self) -> listener::Settings {
        listener::Settings {
            backlog: self.sockets.backlog,
            reuse_port: self.sockets.reuse_port,
            keepalive: self.connection_limits.keepalive.0,
            permissions: Permissions {
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
    unix_mode: Mode,

    /// The user and the group that Unix sockets are given to, by name or number
    /// [default: those of wasinetd]
    #[arg(long, value_name = "USER|USER:GROUP|:GROUP")]
    unix_owner: Option<Owner>,
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

/// Where compiled guests are kept.
#[derive(Args)]
pub(crate) struct CacheArgs {
    /// Keep compiled guests in this directory, so that the next start is quick; off compiles each
    /// time. Nobody else may enter it: what is there is run
    /// [default: $CACHE_DIRECTORY, $XDG_CACHE_HOME/wasinetd or $HOME/.cache/wasinetd, whichever is set]
    #[arg(long, value_name = "DIR|off", value_hint = ValueHint::DirPath)]
    pub(crate) cache: Option<PathBuf>,
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

/// What all guests of a server share.
#[derive(Args)]
#[command(next_help_heading = "Limits of all guests")]
pub(crate) struct SharedLimits {
    /// Memory of all guests together, beyond the first 1 MiB of each
    /// [default: half of the machine's, or of the cgroup's]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_total_memory: Option<usize>,

    /// Call stack of a guest. wasmtime's own default: deep recursion of sane programs fits
    #[arg(long, value_name = "SIZE", default_value = "512KiB", value_parser = stack)]
    stack: usize,
}

impl SharedLimits {
    /// As the engine wants them; `memory` is what this machine has, and the guests' limits are `guests`.
    pub(crate) fn limits<'a>(
        &self,
        memory: usize,
        guests: impl IntoIterator<Item = &'a GuestLimits>,
    ) -> sandbox::SharedLimits {
        let guests = guests.into_iter();
        sandbox::SharedLimits {
            memory: guests.map(|guest| guest.max_memory).max().unwrap_or(0),
            total_memory: self.max_total_memory.unwrap_or(memory / 2),
            stack: self.stack,
        }
    }
}

/// What one guest may use: it is stopped, or refused more.
#[derive(Args)]
#[command(next_help_heading = "Limits of a guest")]
pub(crate) struct GuestLimits {
    /// Memories and tables together. Many times what a protocol handler needs, and a hundred that
    /// take it all do not fill a machine
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = size)]
    max_memory: usize,

    /// Time computing, not waiting, of one connection. An answer that takes longer is a job
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = some_duration)]
    cpu_time: Duration,

    /// Live handles of resources, streams, futures and calls. A handler has tens; each takes some
    /// hundred bytes of the host
    #[arg(long, value_name = "N", default_value = "1024", value_parser = positive, allow_hyphen_values = true)]
    max_handles: usize,

    /// Files, directories and other things of the host open at once. Each may be one of the host's
    /// open files
    #[arg(long, value_name = "N", default_value = "32", value_parser = positive, allow_hyphen_values = true)]
    max_open_files: usize,

    /// Bytes handed to the host in one call, which it holds meanwhile. Streams are not concerned:
    /// they go through no buffer of the host
    #[arg(long, value_name = "SIZE", default_value = "1MiB", value_parser = size)]
    max_call_size: usize,

    /// What is logged of standard output, and as much of standard error. Enough to explain a fault,
    /// too little to fill a disk
    #[arg(long, value_name = "SIZE", default_value = "64KiB", value_parser = size)]
    max_output: usize,
}

impl GuestLimits {
    /// As the sandbox wants them.
    pub(crate) fn limits(&self) -> sandbox::Limits {
        sandbox::Limits {
            memory: self.max_memory,
            cpu_time: self.cpu_time,
            handles: self.max_handles,
            open_files: self.max_open_files,
            call_size: self.max_call_size,
            output: self.max_output,
        }
    }
}

/// Who may connect. A client that may not is reset.
#[derive(Args)]
#[command(next_help_heading = "Who may connect")]
pub(crate) struct AdmissionArgs {
    /// Only clients of this network may connect; repeat it for more
    #[arg(long, value_name = "CIDR")]
    allow: Vec<Network>,

    /// Clients of this network may not connect, whether allowed or not; repeat it for more
    #[arg(long, value_name = "CIDR")]
    deny: Vec<Network>,

    /// Connections at once from one source, or off. Behind a proxy all clients are one source
    /// [default: half of --max-connections, so that nobody has them all]
    #[arg(long, value_name = "N", value_parser = positive_or_off, allow_hyphen_values = true)]
    max_connections_per_source: Option<OrOff<usize>>,

    /// The leading bits of an IPv4 and of an IPv6 address that make a source
    #[arg(long, value_name = "V4,V6", default_value = "32,64")]
    source_prefix: Prefix,

    /// Connections begun in a second; further clients wait. Off: the server takes what it can
    #[arg(long, value_name = "N", default_value = "off", value_parser = positive_or_off, allow_hyphen_values = true)]
    accept_rate: OrOff<usize>,

    /// Connections begun in a second from one source. Off: what is too much depends on the protocol
    #[arg(long, value_name = "N", default_value = "off", value_parser = positive_or_off, allow_hyphen_values = true)]
    accept_rate_per_source: OrOff<usize>,

    /// What becomes of clients while all places are taken
    #[arg(long, value_enum, default_value_t = WhenFull::Wait)]
    when_full: WhenFull,

    /// What clients are sent before they are closed, with --when-full close
    #[arg(long, value_name = "TEXT", default_value = "")]
    full_banner: String,
}

impl AdmissionArgs {
    /// As the listener wants them, for so many connections at once.
    pub(crate) fn rules(&self, max_connections: usize) -> Rules {
        let per_source = match self.max_connections_per_source {
            Some(OrOff(most)) => most,
            None => Some(max_connections.div_ceil(2)),
        };
        let rate = |OrOff(rate): OrOff<usize>| {
            rate.map(|rate| u32::try_from(rate).unwrap_or(u32::MAX))
                .and_then(NonZeroU32::new)
        };
        Rules {
            proxies: Vec::new(),
            allow: self.allow.clone(),
            deny: self.deny.clone(),
            prefix: self.source_prefix,
            connections_per_source: per_source,
            rate: rate(self.accept_rate),
            rate_per_source: rate(self.accept_rate_per_source),
        }
    }

    pub(crate) fn when_full(&self) -> listener::WhenFull {
        match self.when_full {
            WhenFull::Wait => listener::WhenFull::Wait,
            WhenFull::Close => listener::WhenFull::Close(self.full_banner.clone().into_bytes()),
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum WhenFull {
    /// They wait in the kernel's backlog
    Wait,
    /// They are sent --full-banner, and closed
    Close,
}

/// What one connection may take: it is reset. `off` is no limit.
#[derive(Args)]
#[command(next_help_heading = "Limits of a connection")]
pub(crate) struct ConnectionLimits {
    /// Time without a byte either way. Longer than a person thinks about an answer
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration_or_off)]
    idle_timeout: OrOff<Duration>,

    /// Time that a guest waits for the first byte. A client that connects to speak does so at once;
    /// ten seconds are several lost packets
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration_or_off)]
    first_byte_timeout: OrOff<Duration>,

    /// Time that a client takes nothing of what is to be sent
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration_or_off)]
    write_timeout: OrOff<Duration>,

    /// Time without a sign of the client's system, after which that is asked whether it is there;
    /// one that is gone without a word is noticed in twice that. A minute: it costs a packet
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = keepalive)]
    keepalive: OrOff<Duration>,

    /// Time open. A day: no exchange of a client that lives takes longer, and what was forgotten
    /// ends some time
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = duration_or_off)]
    max_lifetime: OrOff<Duration>,

    /// Bytes received. Off: what is too much depends on the protocol
    #[arg(long, value_name = "SIZE", default_value = "off", value_parser = size_or_off)]
    max_bytes_in: OrOff<usize>,

    /// Bytes sent. Off: what is too much depends on the protocol
    #[arg(long, value_name = "SIZE", default_value = "off", value_parser = size_or_off)]
    max_bytes_out: OrOff<usize>,
}

impl ConnectionLimits {
    /// As the connection wants them.
    pub(crate) fn limits(&self) -> connection::Limits {
        connection::Limits {
            idle: self.idle_timeout.0,
            first_byte: self.first_byte_timeout.0,
            write: self.write_timeout.0,
            lifetime: self.max_lifetime.0,
            bytes_in: self.max_bytes_in.0.map(|bytes| bytes as u64),
            bytes_out: self.max_bytes_out.0.map(|bytes| bytes as u64),
        }
    }
}

/// The value of a limit, if it is not off.
#[derive(Clone, Copy)]
struct OrOff<T>(Option<T>);

#[derive(Args)]
pub(crate) struct CheckArgs {
    /// The guest: a component that exports wasinetd:tcp/handler
    #[arg(value_name = "GUEST.wasm", required_unless_present = "config")]
    pub(crate) guest: Option<PathBuf>,

    /// Say whether `serve` would take this config file, with the guests that it names
    #[arg(long, value_name = "FILE", exclusive = true)]
    pub(crate) config: Option<PathBuf>,

    /// The connections to plan for, as given to serve [default: 10000]
    #[arg(long, value_name = "N", value_parser = positive, allow_hyphen_values = true)]
    pub(crate) max_connections: Option<usize>,

    #[command(flatten)]
    pub(crate) network: NetworkArgs,

    #[command(flatten)]
    pub(crate) guest_limits: GuestLimits,

    #[command(flatten)]
    pub(crate) shared_limits: SharedLimits,
}

#[derive(Args)]
pub(crate) struct CompileArgs {
    /// The guests: components that export wasinetd:tcp/handler
    #[arg(value_name = "GUEST.wasm", required = true)]
    pub(crate) guests: Vec<PathBuf>,

    #[command(flatten)]
    pub(crate) cache: CacheArgs,

    #[command(flatten)]
    pub(crate) network: NetworkArgs,

    #[command(flatten)]
    pub(crate) guest_limits: GuestLimits,

    #[command(flatten)]
    pub(crate) shared_limits: SharedLimits,
}

#[derive(Args)]
pub(crate) struct NewArgs {
    /// The directory to make, whose name is that of the crate
    #[arg(value_name = "NAME", value_parser = new_crate)]
    pub(crate) directory: PathBuf,

    /// Depend on the SDK in this checkout of wasinetd, by its absolute path, instead of a copy of the
    /// SDK in NAME/sdk
    #[arg(long, value_name = "PATH")]
    pub(crate) sdk: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct CtlArgs {
    /// Where the server was told to answer operators
    #[arg(
        long,
        global = true,
        value_name = "unix:PATH|127.0.0.1:PORT",
        env = "WASINETD_ADMIN"
    )]
    pub(crate) admin: Option<Address>,

    /// The file with the token to show, for a loopback address
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "WASINETD_ADMIN_TOKEN_FILE"
    )]
    pub(crate) admin_token_file: Option<PathBuf>,

    /// Print what the server says as JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: CtlCommand,
}

#[derive(Subcommand)]
pub(crate) enum CtlCommand {
    /// The services, and the versions of their guests: since when, with how many connections
    Status,
    /// The connections that are open
    Connections,
    /// Reset a connection
    Kill {
        /// Its number, as in the log and the list of connections
        id: u64,
    },
    /// Accept no more connections, let those that are open finish, and end
    Drain,
    /// Read the config file again, or the guest's file, and serve what has changed, as SIGHUP does
    Reload,
    /// Let a new process of the program that is installed now take over, and end when the connections
    /// that are open have
    ///
    /// It has the same arguments and sockets, and the guest that is served. Whoever looks after the process
    /// has to follow it, as systemd does by sd_notify.
    Restart,
    /// Serve new connections with another guest. Those that are open finish with theirs
    Swap {
        /// The service; a server without a config file has one, `default`
        service: String,
        /// The guest
        #[arg(value_name = "GUEST.wasm")]
        guest: PathBuf,
    },
    /// Serve new connections with the version before
    Rollback {
        /// The service
        service: String,
    },
    /// The limits: what they are set to, and how often they were met
    Limits,
    /// The last lines of the log
    Logs {
        /// Those of this connection only
        id: Option<u64>,
        /// Go on with those that follow
        #[arg(long, short)]
        follow: bool,
    },
    /// Watch rates, latency, versions and connections
    Top {
        /// Time from one view to the next
        #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = some_duration)]
        interval: Duration,
        /// Show so many views and end
        #[arg(long, value_name = "N", value_parser = positive)]
        count: Option<usize>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum Dispatch {
    /// A task for each connection, which any thread may go on with
    Spawn,
    /// A share of the connections for each thread, all of a share in one task
    Concurrent,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people
    Text,
    /// A JSON object on each line
    Json,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
}

/// As many as the kernel has a number for.
fn backlog(value: &str) -> Result<u32, String> {
    match value.parse() {
        Ok(n @ 1..=0x7fff_ffff) => Ok(n),
        _ => Err("not a whole number from 1 to 2147483647".into()),
    }
}

/// Text with C's escapes, as bytes.
fn escaped(value: &str) -> Result<Bytes, String> {
    let mut bytes = Vec::new();
    let mut rest = value.as_bytes().iter();
    while let Some(&byte) = rest.next() {
        if byte != b'\\' {
            bytes.push(byte);
            continue;
        }
        bytes.push(match rest.next() {
            Some(b'r') => b'\r',
            Some(b'n') => b'\n',
            Some(b't') => b'\t',
            Some(b'0') => 0,
            Some(b'\\') => b'\\',
            Some(b'x') => hex(rest.next(), rest.next())
                .ok_or("\\x needs two hexadecimal digits, such as \\x0a")?,
            _ => return Err("after \\ comes r, n, t, 0, xHH or another \\".into()),
        });
    }
    Ok(bytes.into())
}

fn hex(high: Option<&u8>, low: Option<&u8>) -> Option<u8> {
    let digit = |digit: &u8| (*digit as char).to_digit(16);
    Some((digit(high?)? * 16 + digit(low?)?) as u8)
}

fn collector(value: &str) -> Result<String, String> {
    let authority = value
        .strip_prefix("http://")
        .map(|rest| rest.trim_end_matches('/'));
    let host_and_port = authority.and_then(|authority| authority.rsplit_once(':'));
    match host_and_port {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(value.into()),
        _ => Err("not http://, a host and a port, such as http://127.0.0.1:4318".into()),
    }
}

/// A size as its flag takes it, and not rounded.
fn size_text(bytes: usize) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units
        .iter()
        .find(|(unit, _)| bytes > 0 && bytes.is_multiple_of(*unit))
    {
        Some((unit, name)) => format!("{}{name}", bytes / unit),
        None => format!("{bytes}B"),
    }
}

fn directory(value: &str) -> Result<(PathBuf, String), String> {
    let (host, guest) = value.split_once("::").unwrap_or((value, value));
    if host.is_empty() || guest.is_empty() {
        return Err("a name is empty; write HOST or HOST::GUEST, such as static::/static".into());
    }
    Ok((host.into(), guest.into()))
}

/// Names that rustc or cargo takes for something else: keywords (The Rust Reference), crates of Rust's
/// own, and what the new crate depends on.
#[rustfmt::skip]
const NO_CRATES: &[&str] = &[
    "Self", "abstract", "alloc", "as", "async", "await", "become", "box", "break", "build", "const",
    "continue", "core", "crate", "deps", "do", "dyn", "else", "enum", "examples", "extern", "false",
    "final", "fn", "for", "futures", "gen", "if", "impl", "in", "incremental", "let", "loop",
    "macro", "match", "mod", "move", "mut", "override", "priv", "proc_macro", "pub", "ref",
    "return", "self", "static", "std", "struct", "super", "test", "trait", "true", "try", "type",
    "typeof", "unsafe", "unsized", "use", "virtual", "wasinetd_guest", "where", "while",
    "wit_bindgen", "yield",
];

/// A path whose last part can be the name of a crate.
fn new_crate(value: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(value);
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or("it does not end in a name; write NAME or DIR/NAME, such as greeter")?;
    let begins = name.starts_with(|c: char| c.is_ascii_alphabetic());
    let goes_on = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if !begins || !name.chars().all(goes_on) {
        return Err(format!(
            "{name:?} is no name of a crate: begin with a letter, go on with letters, digits, - and _, such as greeter"
        ));
    }
    if NO_CRATES.contains(&name.replace('-', "_").as_str()) {
        return Err(format!(
            "{name:?} means something else to Rust; choose another name, such as my-{name}"
        ));
    }
    Ok(path)
}

fn variable(value: &str) -> Result<(String, String), String> {
    let (name, value) = match value.split_once('=') {
        Some((name, value)) => (name, value.to_string()),
        None => {
            let inherited = std::env::var(value)
                .map_err(|error| format!("{error}; write {value}=VALUE or set it for wasinetd"))?;
            (value, inherited)
        }
    };
    if name.is_empty() {
        return Err("the name is empty; write NAME or NAME=VALUE".into());
    }
    Ok((name.into(), value))
}

/// The most letters of a service's name. Arbitrary: it is in each line of the log and each metric.
const NAME_LETTERS: usize = 64;

fn service_name(value: &str) -> Result<String, String> {
    let is_fine = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_');
    if (1..=NAME_LETTERS).contains(&value.len()) && value.chars().all(is_fine) {
        Ok(value.into())
    } else {
        Err(format!(
            "not a name of 1 to {NAME_LETTERS} letters, digits, - and _, such as smtp-in"
        ))
    }
}

fn server_name(value: &str) -> Result<String, String> {
    let rest = value.strip_prefix("*.").unwrap_or(value);
    let is_fine = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let is_label = |label: &str| !label.is_empty() && label.bytes().all(is_fine);
    if rest.split('.').all(is_label) {
        Ok(value.into())
    } else {
        Err("not a name such as chat.example, or *.example".into())
    }
}

fn positive(value: &str) -> Result<usize, String> {
    match value.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("not a whole number above zero".into()),
    }
}

/// A size in bytes that is not zero.
fn size(value: &str) -> Result<usize, String> {
    match value
        .parse::<ByteSize>()
        .map(|size| usize::try_from(size.0))
    {
        Ok(Ok(bytes)) if bytes > 0 => Ok(bytes),
        _ => {
            Err("not a size above zero; write a number and a unit, such as 512KiB or 64MiB".into())
        }
    }
}

/// Less, and a guest does not get as far as its first function; more, and thousands of them do not
/// fit into what a processor can address.
const STACK_BYTES: std::ops::RangeInclusive<usize> = (16 << 10)..=(64 << 20);

fn stack(value: &str) -> Result<usize, String> {
    let bytes = size(value)?;
    if STACK_BYTES.contains(&bytes) {
        Ok(bytes)
    } else {
        Err("not between 16KiB and 64MiB".into())
    }
}

fn or_off<T>(value: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<OrOff<T>, String> {
    if value == "off" {
        return Ok(OrOff(None));
    }
    parse(value)
        .map(|value| OrOff(Some(value)))
        .map_err(|error| format!("{error}, or off"))
}

fn positive_or_off(value: &str) -> Result<OrOff<usize>, String> {
    or_off(value, positive)
}

fn size_or_off(value: &str) -> Result<OrOff<usize>, String> {
    or_off(value, size)
}

fn duration_or_off(value: &str) -> Result<OrOff<Duration>, String> {
    or_off(value, some_duration)
}

/// What the kernel takes (tcp(7), `TCP_KEEPIDLE`), in seconds.
const KEEPALIVE_SECONDS: std::ops::RangeInclusive<u64> = 1..=32767;

fn keepalive(value: &str) -> Result<OrOff<Duration>, String> {
    or_off(value, |value| {
        let time = duration(value)?;
        if time.subsec_nanos() == 0 && KEEPALIVE_SECONDS.contains(&time.as_secs()) {
            Ok(time)
        } else {
            Err("not whole seconds from 1s to 32767s".into())
        }
    })
}

/// A duration that is not zero, which would be met at once.
fn some_duration(value: &str) -> Result<Duration, String> {
    match duration(value)? {
        Duration::ZERO => Err("not a duration above zero".into()),
        duration => Ok(duration),
    }
}

fn duration(value: &str) -> Result<Duration, String> {
    humantime::parse_duration(value)
        .map_err(|error| format!("{error}; write a number and a unit, such as 500ms, 2s or 5m"))
}
