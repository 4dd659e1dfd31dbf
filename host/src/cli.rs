//! The command line: clap's structs, and their conversion to the model.
//!
//! Nothing outside this module reads a clap struct of `serve`: [`config_file`] and [`convert`] turn
//! them into [`wasinetd::config::model`].

mod arguments;
pub(crate) mod config_file;
mod convert;
mod ctl;
mod handler;
mod handshake;
mod listener;
mod server;
mod service;
mod values;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

pub(crate) use arguments::{CertArgs, CheckArgs, CompileArgs, NewArgs, ServeArgs};
pub(crate) use convert::{GuestSettings, command_line_config};
pub(crate) use ctl::{CtlArgs, CtlCommand};
pub(crate) use server::ServerTable;
pub(crate) use service::ServiceTable;

/// The internet super-server for WebAssembly components: a fresh, sandboxed instance of the guest
/// handles each connection.
#[derive(Parser)]
#[command(name = "wasinetd", version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 after all connections have finished, 64 for a mistake on the command line, 65 for a guest \
that cannot run, 69 for an address or a socket that cannot be used and for a server that ctl cannot \
reach, 70 for a fault of wasinetd, 73 for a crate that cannot be written, 75 if connections were cut off \
at the end, 78 for a mistake in the config file or a setting that the system cannot meet.";

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Accept connections and hand each one to a fresh instance of the guest
    Serve(Box<ServeArgs>),
    /// Check a guest or a config file without serving: what a guest needs, how many instances fit
    #[command(after_help = GRANTED)]
    Check(CheckArgs),
    /// Compile guests into the cache, so that `serve` starts at once
    Compile(CompileArgs),
    /// Inspect and control a running server
    Ctl(CtlArgs),
    /// Print a JSON schema of the config file, for editors
    Schema,
    /// Create a guest: a Rust crate that builds, has tests, and can be served at once
    New(NewArgs),
    /// Create a self-signed certificate and its key, to try out TLS
    Cert(CertArgs),
    /// Write the manual pages into a directory
    Man {
        /// An existing directory
        directory: PathBuf,
    },
    /// Print the completions of this command for a shell
    #[command(after_help = COMPLETIONS)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

const COMPLETIONS: &str = "\
To install them for bash: wasinetd completions bash > \
~/.local/share/bash-completion/completions/wasinetd. For fish: wasinetd completions fish > \
~/.config/fish/completions/wasinetd.fish. For zsh: wasinetd completions zsh > _wasinetd, in a directory \
of $fpath.";

const GRANTED: &str = "\
A guest has to export wasinetd:tcp/handler@0.1.0. It may import wasinetd:tcp/types@0.1.0; wasi:cli, \
wasi:clocks, wasi:filesystem, wasi:io and wasi:random in versions 0.2 and 0.3; and wasi:sockets 0.2 with \
--allow-connect. It sees only the directories and environment variables that `serve` grants.";
