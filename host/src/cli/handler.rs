//! Settings of a handler: grants and limits of guests, limits of connections, swaps.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use clap::{Args, ValueHint};
use wasinetd::sandbox::Destination;

use super::values::{
    NAME_VALUE, OrOff, directory, duration_or_off, escaped, positive, size, size_or_off,
    some_duration, variable,
};

/// Grants of guests, and limits of guests and connections.
#[derive(Args)]
pub(crate) struct HandlerArgs {
    /// Let guests read this directory, under the name GUEST if given; repeatable
    #[arg(long, value_name = "HOST[::GUEST]", value_parser = directory, value_hint = ValueHint::DirPath)]
    pub(super) dir: Vec<(PathBuf, String)>,

    /// Let guests read and change this directory, under the name GUEST if given; repeatable
    #[arg(long, value_name = "HOST[::GUEST]", value_parser = directory, value_hint = ValueHint::DirPath)]
    pub(super) dir_rw: Vec<(PathBuf, String)>,

    /// Give guests this environment variable, with wasinetd's own value unless one is given; repeatable
    #[arg(long, value_name = NAME_VALUE, value_parser = variable)]
    pub(super) env: Vec<(String, String)>,

    #[command(flatten)]
    pub(super) network: NetworkArgs,

    #[command(flatten)]
    pub(super) guest_limits: GuestLimitArgs,

    #[command(flatten)]
    pub(super) connection_limits: ConnectionLimitArgs,

    #[command(flatten)]
    pub(super) swap: SwapArgs,
}

/// Destinations of guests. Without one, guests have no network.
#[derive(Args)]
pub(crate) struct NetworkArgs {
    /// Let guests connect to this TCP port of an address, of a network (10.0.0.0/8:5432,
    /// [fd00::/8]:5432) or of a name; repeatable. A name may resolve to public addresses only, or to
    /// addresses in CIDR if given: a name server must not open your private network to guests. If your
    /// own network has public addresses, give its CIDR
    #[arg(long, value_name = "HOST:PORT[/CIDR]")]
    pub(super) allow_connect: Vec<Destination>,
}

/// Limits of one guest: it is stopped, or denied more.
#[derive(Args)]
#[command(next_help_heading = "Limits of a guest")]
pub(crate) struct GuestLimitArgs {
    /// Memories and tables together. Many times the need of a protocol handler, while a hundred guests
    /// that take it all do not fill a machine
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = size)]
    pub(super) max_memory: usize,

    /// CPU time of one connection, without waiting. An answer that takes longer is a batch job
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = some_duration)]
    pub(super) cpu_time: Duration,

    /// Live handles of resources, streams, futures and calls. A handler has tens; each takes some
    /// hundred bytes of the host
    #[arg(long, value_name = "N", default_value = "1024", value_parser = positive, allow_hyphen_values = true)]
    pub(super) max_handles: usize,

    /// Files, directories and other host objects open at once. Each may be one of the host's open files
    #[arg(long, value_name = "N", default_value = "32", value_parser = positive, allow_hyphen_values = true)]
    pub(super) max_open_files: usize,

    /// Bytes that one call passes to the host, which holds them meanwhile. Streams do not count: the
    /// host buffers nothing for them
    #[arg(long, value_name = "SIZE", default_value = "1MiB", value_parser = size)]
    pub(super) max_call_size: usize,

    /// Log output from a guest's standard output, and as much from its standard error. Enough to explain a
    /// fault, too little to fill a disk
    #[arg(long, value_name = "SIZE", default_value = "64KiB", value_parser = size)]
    pub(super) max_output: usize,
}

/// Limits of one connection: it is reset. `off` is no limit.
#[derive(Args)]
#[command(next_help_heading = "Limits of a connection")]
pub(crate) struct ConnectionLimitArgs {
    /// Time without a byte in either direction. Longer than a person thinks about an answer
    #[arg(long, value_name = "DURATION|off", default_value = "60s", value_parser = duration_or_off)]
    pub(super) idle_timeout: OrOff<Duration>,

    /// Time that a guest waits for the first byte. A client with a request sends it at once; ten seconds
    /// survive several lost packets
    #[arg(long, value_name = "DURATION|off", default_value = "10s", value_parser = duration_or_off)]
    pub(super) first_byte_timeout: OrOff<Duration>,

    /// Time that a client takes no byte of pending output
    #[arg(long, value_name = "DURATION|off", default_value = "30s", value_parser = duration_or_off)]
    pub(super) write_timeout: OrOff<Duration>,

    /// Time that a connection may be open. One day: no exchange of a live client takes longer, and a
    /// forgotten connection ends some time
    #[arg(long, value_name = "DURATION|off", default_value = "24h", value_parser = duration_or_off)]
    pub(super) max_lifetime: OrOff<Duration>,

    /// Bytes received. Off: the right number depends on the protocol
    #[arg(long, value_name = "SIZE|off", default_value = "off", value_parser = size_or_off)]
    pub(super) max_bytes_in: OrOff<usize>,

    /// Bytes sent. Off: the right number depends on the protocol
    #[arg(long, value_name = "SIZE|off", default_value = "off", value_parser = size_or_off)]
    pub(super) max_bytes_out: OrOff<usize>,
}

/// How a newer version of the guest takes over, after SIGHUP, `ctl swap`, or a change of the file with
/// --watch. A version that cannot run changes nothing.
#[derive(Args)]
#[command(next_help_heading = "New versions of the guest")]
pub(crate) struct SwapArgs {
    /// Swap to the guest's file whenever it changes, by a rename or in place
    #[arg(long)]
    pub(super) watch: bool,

    /// Time for open connections to go on with a replaced version; then they are reset. One hour: longer
    /// than any exchange of a protocol that ends on request
    #[arg(long, value_name = "DURATION|off", default_value = "1h", value_parser = duration_or_off)]
    pub(super) max_old_version_age: OrOff<Duration>,

    /// Send this to a new version before it serves. \\r, \\n, \\t, \\0, \\xHH and \\\\ are escapes as in
    /// C: 'GET / HTTP/1.1\\r\\nHost: probe\\r\\n\\r\\n'
    #[arg(long, value_name = "TEXT", value_parser = escaped, requires = "probe_expect")]
    pub(super) probe_send: Option<Bytes>,

    /// Required beginning of its answer, such as 'HTTP/1.1 200'
    #[arg(long, value_name = "TEXT", value_parser = escaped)]
    pub(super) probe_expect: Option<Bytes>,

    /// Time for the answer to the probe
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = some_duration)]
    pub(super) probe_timeout: Duration,
}
