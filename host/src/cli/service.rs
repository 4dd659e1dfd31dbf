//! Settings of one service: its listener and its handler.

use std::path::PathBuf;

use clap::{Args, Parser, ValueHint};

use super::handler::HandlerArgs;
use super::listener::ListenerArgs;
use super::values::{server_name, service_name};

/// Settings of one service.
#[derive(Args)]
pub(crate) struct ServiceArgs {
    #[command(flatten)]
    pub(super) listener: ListenerArgs,

    #[command(flatten)]
    pub(super) handler: HandlerArgs,
}

/// The keys of a `[[service]]` in a config file.
#[derive(Parser)]
#[command(no_binary_name = true)]
pub(crate) struct ServiceTable {
    /// Name of the service: letters, digits, - and _
    #[arg(long, value_parser = service_name)]
    pub(super) name: String,

    /// The guest: a component that exports wasinetd:tcp/handler
    #[arg(long, value_name = "GUEST.wasm", value_hint = ValueHint::FilePath)]
    pub(super) guest: PathBuf,

    /// Instead of listening, serve the TLS clients of another service that ask for one of the
    /// server-names. That service decides on admission and TLS
    #[arg(long, value_name = "SERVICE", conflicts_with = "listen", requires = "server_name", value_parser = service_name)]
    pub(super) behind: Option<String>,

    /// Server names (SNI) of this service, with behind: chat.example, or *.example for all names with
    /// one more label
    #[arg(long, value_name = "NAME", requires = "behind", value_parser = server_name)]
    pub(super) server_name: Vec<String>,

    #[command(flatten)]
    pub(super) service: ServiceArgs,
}
