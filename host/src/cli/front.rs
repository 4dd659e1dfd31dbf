//! What is done with a connection before a guest has it.

use std::time::Duration;

use clap::Args;
use wasinetd::connection::{Front, Proxy};
use wasinetd::network::Network;

use super::some_duration;

/// What is done with a connection before a guest has it. What a guest may take counts from there.
#[derive(Args)]
#[command(next_help_heading = "Proxies")]
pub(crate) struct FrontArgs {
    /// Proxies of this network say in a PROXY protocol header, version 1 or 2, whom they speak for;
    /// repeat it for more. Each of their connections has to begin with one, and it is their clients to
    /// whom --allow, --deny and all limits of a source apply. From everyone else no header is taken: it
    /// goes to the guest like any other bytes
    #[arg(long, value_name = "CIDR")]
    pub(crate) proxy_from: Vec<Network>,

    /// Time from the beginning of a connection until a guest can have it: for the header of a proxy.
    /// Several lost packets
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = some_duration)]
    pub(crate) handshake_timeout: Duration,
}

impl FrontArgs {
    /// As the connection wants it.
    pub(crate) fn front(&self) -> Front {
        let from = self.proxy_from.clone();
        Front {
            proxy: (!from.is_empty()).then_some(Proxy { from }),
            timeout: self.handshake_timeout,
            ..Front::default()
        }
    }
}
