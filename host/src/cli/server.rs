//! Settings of the whole server.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, ValueEnum, ValueHint};
use wasinetd::admin::AdminAddress;

use super::values::{collector, duration, positive, size, stack};

/// Settings of the whole server, whatever its services.
#[derive(Args)]
pub(crate) struct ServerArgs {
    /// Threads that serve connections [default: one for each core but one]
    #[arg(long, value_name = "N", value_parser = positive, allow_hyphen_values = true)]
    pub(super) threads: Option<usize>,

    #[command(flatten)]
    pub(super) shared_limits: SharedLimitArgs,

    #[command(flatten)]
    pub(super) cache: CacheArgs,

    /// Time for open connections to finish after SIGTERM or SIGINT. A second signal ends them at once
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration, allow_hyphen_values = true)]
    pub(super) drain_timeout: Duration,

    /// Serve the admin API over HTTP, for `wasinetd ctl`, Prometheus or a browser: on a Unix socket
    /// that only this user can connect to, or on a loopback address with a token
    #[arg(long, value_name = "unix:PATH|127.0.0.1:PORT")]
    pub(super) admin: Option<AdminAddress>,

    /// File with the token for the admin API on a loopback address. Only this user may have access to
    /// the file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(super) admin_token_file: Option<PathBuf>,

    /// Send a span for each connection to an OpenTelemetry collector, by OTLP over plain HTTP (run a
    /// collector on this machine). Off by default: a span costs some microseconds
    #[arg(long, value_name = "http://HOST:PORT", value_parser = collector)]
    pub(super) otlp: Option<String>,

    /// Format of the log on standard error
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(super) log_format: LogFormat,

    /// Least severe level to log. Each connection logs one line of level info
    #[arg(long, value_enum, default_value_t = LogLevel::Info)]
    pub(super) log_level: LogLevel,
}

/// The server's keys in a config file.
#[derive(Parser)]
#[command(no_binary_name = true)]
pub(crate) struct ServerTable {
    /// Open connections of all services together [default: 10000, or as many as this machine can hold]
    #[arg(long, value_name = "N", value_parser = positive, allow_hyphen_values = true)]
    pub(super) max_connections: Option<usize>,

    #[command(flatten)]
    pub(super) server: ServerArgs,
}

/// The cache of compiled guests.
#[derive(Args)]
pub(crate) struct CacheArgs {
    /// Directory of compiled guests, for a quick start; off compiles at each start. Only this user may
    /// have access to it: the server runs what is in there
    /// [default: $CACHE_DIRECTORY, $XDG_CACHE_HOME/wasinetd or $HOME/.cache/wasinetd, whichever is set]
    #[arg(long, value_name = "DIR|off", value_hint = ValueHint::DirPath)]
    pub(super) cache: Option<PathBuf>,
}

/// Limits that all guests of a server share.
#[derive(Args)]
#[command(next_help_heading = "Limits of all guests together")]
pub(crate) struct SharedLimitArgs {
    /// Memory of all guests together, beyond the first 1 MiB of each
    /// [default: half of the machine's, or of the cgroup's]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(super) max_total_memory: Option<usize>,

    /// Call stack of a guest. The default is wasmtime's own: deep recursion of sane programs fits
    #[arg(long, value_name = "SIZE", default_value = "512KiB", value_parser = stack)]
    pub(super) stack: usize,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people
    Text,
    /// One JSON object per line
    Json,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
}
