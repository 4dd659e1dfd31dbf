//! Runs `wasinetd` and other programs to their end.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use super::files::{built, root};
use super::machine::MachineUse;

/// The program under test. `make test` builds it.
pub(crate) fn program() -> PathBuf {
    built(root().join("target/quick/wasinetd"))
}

/// The program under test, in the root directory of the workspace.
pub(crate) fn wasinetd() -> Command {
    in_root(Command::new(program()))
}

/// The program at `program`, in the root directory of the workspace.
pub(super) fn program_in_root(program: &Path) -> Command {
    in_root(Command::new(program))
}

/// Lets `command` run in the root directory of the workspace.
pub(super) fn in_root(mut command: Command) -> Command {
    command.current_dir(root());
    // The default cache is in the home directory of the developer.
    command.env("XDG_CACHE_HOME", root().join("target/test-cache"));
    command
}

/// Runs a command to its end, after tests that run alone.
///
/// A test with a running server uses [`output`]: its server holds the machine already.
pub(crate) fn run(command: &mut Command) -> Output {
    let _machine = MachineUse::shared();
    output(command)
}

/// Runs a command to its end and returns its output.
pub(crate) fn output(command: &mut Command) -> Output {
    command
        .stdin(Stdio::null())
        .output()
        .expect("the command starts")
}

/// Whether a program is installed. If not, prints the package that has it.
pub(crate) fn has_program(name: &str, package: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|directory| directory.join(name).is_file());
    if !found {
        eprintln!("skipped: {name} is not installed; apt-get install {package}");
    }
    found
}
