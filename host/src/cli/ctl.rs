//! Arguments of `ctl`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use wasinetd::admin::AdminAddress;

use super::values::{positive, some_duration};

#[derive(Args)]
pub(crate) struct CtlArgs {
    /// Address of the admin API, as given to serve
    #[arg(
        long,
        global = true,
        value_name = "unix:PATH|127.0.0.1:PORT",
        env = "WASINETD_ADMIN"
    )]
    pub(crate) admin: Option<AdminAddress>,

    /// File with the token, for a loopback address
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "WASINETD_ADMIN_TOKEN_FILE"
    )]
    pub(crate) admin_token_file: Option<PathBuf>,

    /// Print JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: CtlCommand,
}

#[derive(Subcommand)]
pub(crate) enum CtlCommand {
    /// List the services and the versions of their guests, with age and open connections
    Status,
    /// List the open connections
    Connections,
    /// Reset a connection
    Kill {
        /// Number of the connection, as in the log and the list of connections
        id: u64,
    },
    /// Stop accepting, let open connections finish, then exit
    Drain,
    /// Reload the config file, or the guest's file, as SIGHUP does
    Reload,
    /// Upgrade: a new process of the installed program takes over without dropping a connection
    ///
    /// The new process gets the same arguments, sockets and guests. The old one exits once its open
    /// connections have finished. A process supervisor has to follow the new process, as systemd does
    /// by sd_notify.
    Restart,
    /// Serve new connections with another guest. Open connections finish with theirs
    Swap {
        /// The service. Without a config file its name is `default`
        service: String,
        /// The guest
        #[arg(value_name = "GUEST.wasm")]
        guest: PathBuf,
    },
    /// Serve new connections with the previous version
    Rollback {
        /// The service
        service: String,
    },
    /// List the limits, their values, and how often each was hit
    Limits,
    /// Print the last lines of the log
    Logs {
        /// Only lines about this connection
        id: Option<u64>,
        /// Print new lines as they come
        #[arg(long, short)]
        follow: bool,
    },
    /// Watch rates, latency, versions and connections
    Top {
        /// Time between two views
        #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = some_duration)]
        interval: Duration,
        /// Exit after this many views
        #[arg(long, value_name = "N", value_parser = positive)]
        count: Option<usize>,
    },
}
