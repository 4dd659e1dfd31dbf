//! `completions`: scripts that complete the command line in a shell.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;
use crate::exit::Failure;

/// Writes the script for a shell to standard output.
pub(crate) fn completions(shell: Shell) -> Result<ExitCode, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "wasinetd", &mut script);
    // The reader may have closed the pipe.
    let _ = io::stdout().lock().write_all(&script);
    Ok(ExitCode::SUCCESS)
}
