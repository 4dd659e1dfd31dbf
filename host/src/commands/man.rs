//! `man`: the manual, made of the same text as `--help`.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use clap::{Command, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};
use wasinetd::Error;

use crate::cli::Cli;

/// Commands of those who look after a machine (man(7)).
const SECTION: &str = "8";

/// What the server does when it is told by a signal.
const SIGNALS: [(&str, &str); 4] = [
    (
        "SIGTERM, SIGINT",
        "Accepts no more connections, waits for those that are open, and ends. The second one ends them.",
    ),
    (
        "SIGHUP",
        "Reads the guest's file again, and serves new connections with it if it can be run.",
    ),
    (
        "SIGUSR2",
        "Starts the program that is installed now, which takes over the sockets and the guest that is served, and drains once that serves. Whoever looks after the process has to follow it (sd_notify(3), MAINPID).",
    ),
    (
        "SIGKILL",
        "Ends it with all connections, as it does any process.",
    ),
];

/// What it looks for in its environment.
const ENVIRONMENT: [(&str, &str); 4] = [
    (
        "CACHE_DIRECTORY, XDG_CACHE_HOME, HOME",
        "Where compiled guests are kept without --cache, the first of those that are set.",
    ),
    (
        "NOTIFY_SOCKET, WATCHDOG_USEC",
        "The service manager to be told that it serves, reloads, stops and lives (sd_notify(3)).",
    ),
    (
        "WASINETD_ADMIN, WASINETD_ADMIN_TOKEN_FILE",
        "What ctl uses without --admin and --admin-token-file.",
    ),
    (
        "WASINETD_INHERITED",
        "The sockets that a process gets from the one before. Not to be set by anyone else.",
    ),
];

/// Writes a page for the command and one for each of its subcommands.
pub(crate) fn man(directory: &Path) -> Result<ExitCode, Error> {
    let mut command = Cli::command().disable_help_subcommand(true);
    // From here on each knows its whole name.
    command.build();
    write_all(directory, &command)?;
    Ok(ExitCode::SUCCESS)
}

fn write_all(directory: &Path, command: &Command) -> Result<(), Error> {
    let name = command.get_display_name().unwrap_or(command.get_name());
    let path = directory.join(format!("{name}.{SECTION}"));
    page(command, name)
        .and_then(|page| std::fs::write(&path, page))
        .map_err(|source| Error::Man { path, source })?;
    command
        .get_subcommands()
        .try_for_each(|subcommand| write_all(directory, subcommand))
}

fn page(command: &Command, name: &str) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    Man::new(command.clone())
        .section(SECTION)
        .title(name.to_uppercase())
        .render(&mut page)?;
    if name == "wasinetd-serve" {
        section("SIGNALS", &SIGNALS).to_writer(&mut page)?;
    }
    if matches!(name, "wasinetd-serve" | "wasinetd") {
        section("ENVIRONMENT", &ENVIRONMENT).to_writer(&mut page)?;
    }
    Ok(page)
}

fn section(title: &str, entries: &[(&str, &str)]) -> Roff {
    let mut section = Roff::new();
    section.control("SH", [title]);
    for (name, text) in entries {
        section.control("TP", []);
        section.text([bold(*name)]);
        section.text([roman(*text)]);
    }
    section
}
