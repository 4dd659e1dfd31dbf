//! Arguments of the subcommands.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::handler::{GuestLimitArgs, NetworkArgs};
use super::server::{CacheArgs, ServerArgs, SharedLimitArgs};
use super::service::ServiceArgs;
use super::values::{new_crate, positive};

#[derive(Args)]
pub(crate) struct ServeArgs {
    /// The guest: a component that exports wasinetd:tcp/handler
    #[arg(value_name = "GUEST.wasm", required_unless_present = "config")]
    pub(crate) guest: Option<PathBuf>,

    /// Serve what this file configures: these flags as keys, and a [[service]] for each guest. SIGHUP
    /// reloads it
    #[arg(long, value_name = "FILE", exclusive = true)]
    pub(crate) config: Option<PathBuf>,

    #[command(flatten)]
    pub(super) service: ServiceArgs,

    #[command(flatten)]
    pub(super) server: ServerArgs,
}

#[derive(Args)]
pub(crate) struct CheckArgs {
    /// The guest: a component that exports wasinetd:tcp/handler
    #[arg(value_name = "GUEST.wasm", required_unless_present = "config")]
    pub(crate) guest: Option<PathBuf>,

    /// Check this config file and all guests in it
    #[arg(long, value_name = "FILE", exclusive = true)]
    pub(crate) config: Option<PathBuf>,

    /// Number of connections to plan for, as given to serve [default: 10000]
    #[arg(long, value_name = "N", value_parser = positive, allow_hyphen_values = true)]
    pub(crate) max_connections: Option<usize>,

    #[command(flatten)]
    pub(super) network: NetworkArgs,

    #[command(flatten)]
    pub(super) guest_limits: GuestLimitArgs,

    #[command(flatten)]
    pub(super) shared_limits: SharedLimitArgs,
}

#[derive(Args)]
pub(crate) struct CompileArgs {
    /// The guests: components that export wasinetd:tcp/handler
    #[arg(value_name = "GUEST.wasm", required = true)]
    pub(crate) guests: Vec<PathBuf>,

    #[command(flatten)]
    pub(super) cache: CacheArgs,

    #[command(flatten)]
    pub(super) network: NetworkArgs,

    #[command(flatten)]
    pub(super) guest_limits: GuestLimitArgs,

    #[command(flatten)]
    pub(super) shared_limits: SharedLimitArgs,
}

#[derive(Args)]
pub(crate) struct NewArgs {
    /// Directory to create. Its name becomes the name of the crate
    #[arg(value_name = "NAME", value_parser = new_crate)]
    pub(crate) directory: PathBuf,

    /// Depend on the SDK in this checkout of wasinetd, by its absolute path, instead of a copy of the
    /// SDK in NAME/sdk
    #[arg(long, value_name = "PATH")]
    pub(crate) sdk: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct CertArgs {
    /// An existing directory, for cert.pem and key.pem
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) directory: PathBuf,

    /// A name or an address of the server; repeatable
    #[arg(long, value_name = "NAME", default_values = ["localhost", "127.0.0.1", "::1"])]
    pub(crate) name: Vec<String>,
}
