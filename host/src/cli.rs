//! The command line.

mod ctl;
mod front;
mod limits;
mod service;
mod values;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use wasinetd::admin::AdminAddress;

pub(crate) use ctl::{CtlArgs, CtlCommand};
pub(crate) use front::CertArgs;
pub(crate) use limits::{GuestLimitArgs, SharedLimitArgs};
pub(crate) use service::{Dispatch, NetworkArgs, ServiceArgs, ServiceTable};
use values::{collector, duration, new_crate, positive};

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
be run, 69 for an address or a socket that cannot be listened on and for a server that ctl cannot reach, \
70 for a fault of wasinetd, 73 for a crate that cannot be written, 75 when connections had to be ended \
before they were done, 78 for a mistake in the config file and for a setting that cannot be met.";

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

/// In what values are called that may be the path of a Unix socket.
pub(crate) const UNIX_PATH: &str = "unix:PATH";

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

/// What is set of the server, whatever its services.
#[derive(Args)]
pub(crate) struct ServerArgs {
    /// Threads that connections run on [default: one for each core but one]
    #[arg(long, value_name = "N", value_parser = positive, allow_hyphen_values = true)]
    pub(crate) threads: Option<usize>,

    #[command(flatten)]
    pub(crate) shared_limits: SharedLimitArgs,

    #[command(flatten)]
    pub(crate) cache: CacheArgs,

    /// How long open connections may take to finish after SIGTERM or SIGINT; a second signal ends
    /// them at once
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration, allow_hyphen_values = true)]
    pub(crate) drain_timeout: Duration,

    /// Answer operators over HTTP, such as `wasinetd ctl`, Prometheus or a browser: on a Unix
    /// socket, which only this user can connect to, or on a loopback address, where they show a token
    #[arg(long, value_name = "unix:PATH|127.0.0.1:PORT")]
    pub(crate) admin: Option<AdminAddress>,

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

/// Where compiled guests are kept.
#[derive(Args)]
pub(crate) struct CacheArgs {
    /// Keep compiled guests in this directory, so that the next start is quick; off compiles each
    /// time. Nobody else may enter it: what is there is run
    /// [default: $CACHE_DIRECTORY, $XDG_CACHE_HOME/wasinetd or $HOME/.cache/wasinetd, whichever is set]
    #[arg(long, value_name = "DIR|off", value_hint = ValueHint::DirPath)]
    pub(crate) cache: Option<PathBuf>,
}

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
    pub(crate) guest_limits: GuestLimitArgs,

    #[command(flatten)]
    pub(crate) shared_limits: SharedLimitArgs,
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
    pub(crate) guest_limits: GuestLimitArgs,

    #[command(flatten)]
    pub(crate) shared_limits: SharedLimitArgs,
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
