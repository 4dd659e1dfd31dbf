//! `completions`: what a shell completes the command line with.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;
use wasinetd::Error;

use crate::cli::Cli;

/// Writes the script for a shell to standard output.
pub(crate) fn completions(shell: Shell) -> Result<ExitCode, Error> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "wasinetd", &mut script);
    // Whoever closes the pipe has read enough.
    let _ = io::stdout().lock().write_all(&script);
    Ok(ExitCode::SUCCESS)
}
