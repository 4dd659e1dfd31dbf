//! What clients, connections and guests may take.

use std::num::NonZeroU32;
use std::time::Duration;

use clap::{Args, ValueEnum};
use wasinetd::connection;
use wasinetd::listener::{self, AdmissionRules, SourcePrefix};
use wasinetd::net::Cidr;
use wasinetd::sandbox;

use super::values::{
    OrOff, duration_or_off, keepalive, positive, positive_or_off, size, size_or_off, some_duration,
    stack,
};

/// What all guests of a server share.
#[derive(Args)]
#[command(next_help_heading = "Limits of all guests")]
pub(crate) struct SharedLimitArgs {
    /// Memory of all guests together, beyond the first 1 MiB of each
    /// [default: half of the machine's, or of the cgroup's]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_total_memory: Option<usize>,

    /// Call stack of a guest. wasmtime's own default: deep recursion of sane programs fits
    #[arg(long, value_name = "SIZE", default_value = "512KiB", value_parser = stack)]
    stack: usize,
}

impl SharedLimitArgs {
    /// As the engine wants them; `memory` is what this machine has, and the guests' limits are `guests`.
    pub(crate) fn limits<'a>(
        &self,
        memory: usize,
        guests: impl IntoIterator<Item = &'a GuestLimitArgs>,
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
pub(crate) struct GuestLimitArgs {
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

impl GuestLimitArgs {
    /// As the sandbox wants them.
    pub(crate) fn limits(&self) -> sandbox::GuestLimits {
        sandbox::GuestLimits {
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
    allow: Vec<Cidr>,

    /// Clients of this network may not connect, whether allowed or not; repeat it for more
    #[arg(long, value_name = "CIDR")]
    deny: Vec<Cidr>,

    /// Connections at once from one source, or off. Behind a proxy all clients are one source
    /// [default: half of --max-connections, so that nobody has them all]
    #[arg(long, value_name = "N", value_parser = positive_or_off, allow_hyphen_values = true)]
    max_connections_per_source: Option<OrOff<usize>>,

    /// The leading bits of an IPv4 and of an IPv6 address that make a source
    #[arg(long, value_name = "V4,V6", default_value = "32,64")]
    source_prefix: SourcePrefix,

    /// Connections begun in a second; further clients wait. Off: the server takes what it can
    #[arg(long, value_name = "N", default_value = "off", value_parser = positive_or_off, allow_hyphen_values = true)]
    pub(super) accept_rate: OrOff<usize>,

    /// Connections begun in a second from one source. Off: what is too much depends on the protocol
    #[arg(long, value_name = "N", default_value = "off", value_parser = positive_or_off, allow_hyphen_values = true)]
    pub(super) accept_rate_per_source: OrOff<usize>,

    /// What becomes of clients while all places are taken
    #[arg(long, value_enum, default_value_t = WhenFull::Wait)]
    when_full: WhenFull,

    /// What clients are sent before they are closed, with --when-full close
    #[arg(long, value_name = "TEXT", default_value = "")]
    full_banner: String,
}

impl AdmissionArgs {
    /// As the listener wants them, for so many connections at once.
    pub(crate) fn rules(&self, max_connections: usize) -> AdmissionRules {
        let per_source = match self.max_connections_per_source {
            Some(OrOff(most)) => most,
            None => Some(max_connections.div_ceil(2)),
        };
        let rate = |OrOff(rate): OrOff<usize>| {
            rate.map(|rate| u32::try_from(rate).unwrap_or(u32::MAX))
                .and_then(NonZeroU32::new)
        };
        AdmissionRules {
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
    /// They are sent --full-banner, unless they speak TLS, and closed
    Close,
}

/// What one connection may take: it is reset. `off` is no limit.
#[derive(Args)]
#[command(next_help_heading = "Limits of a connection")]
pub(crate) struct ConnectionLimitArgs {
    /// Time without a byte either way. Longer than a person thinks about an answer
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration_or_off)]
    pub(super) idle_timeout: OrOff<Duration>,

    /// Time that a guest waits for the first byte. A client that connects to speak does so at once;
    /// ten seconds are several lost packets
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration_or_off)]
    pub(super) first_byte_timeout: OrOff<Duration>,

    /// Time that a client takes nothing of what is to be sent
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration_or_off)]
    pub(super) write_timeout: OrOff<Duration>,

    /// Time without a sign of the client's system, after which that is asked whether it is there;
    /// one that is gone without a word is noticed in twice that. A minute: it costs a packet
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = keepalive)]
    pub(super) keepalive: OrOff<Duration>,

    /// Time open. A day: no exchange of a client that lives takes longer, and what was forgotten
    /// ends some time
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = duration_or_off)]
    pub(super) max_lifetime: OrOff<Duration>,

    /// Bytes received. Off: what is too much depends on the protocol
    #[arg(long, value_name = "SIZE", default_value = "off", value_parser = size_or_off)]
    pub(super) max_bytes_in: OrOff<usize>,

    /// Bytes sent. Off: what is too much depends on the protocol
    #[arg(long, value_name = "SIZE", default_value = "off", value_parser = size_or_off)]
    pub(super) max_bytes_out: OrOff<usize>,
}

impl ConnectionLimitArgs {
    /// As the connection wants them.
    pub(crate) fn limits(&self) -> connection::ConnectionLimits {
        connection::ConnectionLimits {
            idle: self.idle_timeout.0,
            first_byte: self.first_byte_timeout.0,
            write: self.write_timeout.0,
            lifetime: self.max_lifetime.0,
            bytes_in: self.max_bytes_in.0.map(|bytes| bytes as u64),
            bytes_out: self.max_bytes_out.0.map(|bytes| bytes as u64),
        }
    }
}
