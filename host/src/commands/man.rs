//! `man`: manual pages, generated from the text of `--help`.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use clap::{Command, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::cli::Cli;
use crate::exit::{Failure, code};

/// Section for system administration commands (man(7)).
const SECTION: &str = "8";

/// Signals and their effects.
const SIGNALS: [(&str, &str); 4] = [
    (
        "SIGTERM, SIGINT",
        "Accepts no more connections, waits for the open ones to finish, and exits. A second signal ends open connections at once.",
    ),
    (
        "SIGHUP",
        "Reloads the config file or, without one, the guest's file. New connections use the new version if it can run. Certificates are reloaded too.",
    ),
    (
        "SIGUSR2",
        "Upgrades: starts the installed program, which takes over the sockets and the guests, and drains once the new process serves. A service manager has to follow the new process (sd_notify(3), MAINPID).",
    ),
    ("SIGKILL", "Ends the process and all connections."),
];

/// Environment variables and their effects.
const ENVIRONMENT: [(&str, &str); 4] = [
    (
        "CACHE_DIRECTORY, XDG_CACHE_HOME, HOME",
        "Without --cache, the first of these that is set determines the directory of compiled guests.",
    ),
    (
        "NOTIFY_SOCKET, WATCHDOG_USEC",
        "The service manager that is notified of readiness, reloads and stops, and its watchdog (sd_notify(3)).",
    ),
    (
        "WASINETD_ADMIN, WASINETD_ADMIN_TOKEN_FILE",
        "Values for ctl without --admin and --admin-token-file.",
    ),
    (
        "WASINETD_INHERITED",
        "Internal: the sockets that an upgrade hands to the new process.",
    ),
];

/// Writes a page for the command, and one for each subcommand.
pub(crate) fn man(directory: &Path) -> Result<ExitCode, Failure> {
    let mut command = Cli::command().disable_help_subcommand(true);
    // Gives each subcommand its full name.
    command.build();
    write_all(directory, &command)?;
    Ok(ExitCode::SUCCESS)
}

fn write_all(directory: &Path, command: &Command) -> Result<(), Failure> {
    let name = command.get_display_name().unwrap_or(command.get_name());
    let path = directory.join(format!("{name}.{SECTION}"));
    page(command, name)
        .and_then(|page| std::fs::write(&path, page))
        .map_err(|error| {
            let message = format!("cannot write {path:?}: {error}; name an existing directory");
            Failure::new(code::CONFIG, message)
        })?;
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
