//! What operators can order.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use wasinetd::admin::AdminAddress;

use super::values::{positive, some_duration};

#[derive(Args)]
pub(crate) struct CtlArgs {
    /// Where the server was told to answer operators
    #[arg(
        long,
        global = true,
        value_name = "unix:PATH|127.0.0.1:PORT",
        env = "WASINETD_ADMIN"
    )]
    pub(crate) admin: Option<AdminAddress>,

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
