//! Puts together the command line of a server.

use std::path::Path;
use std::process::Command;

use super::super::machine::MachineUse;
use super::super::tools::in_root;

/// A server that can be started.
pub(super) struct Launch {
    /// The complete command line.
    pub(super) command: Command,
    /// The number of sockets on which the server will listen.
    pub(super) listeners: usize,
    /// Held as long as the server runs.
    pub(super) machine: MachineUse,
}

/// Settings of a server that is to be started.
pub(super) struct ServerBuilder {
    command: Command,
    /// The number of sockets, unless the `--listen` arguments tell.
    listeners: Option<usize>,
    source_limit: bool,
    alone: bool,
}

impl ServerBuilder {
    pub(super) fn new(command: Command) -> Self {
        Self {
            command,
            listeners: None,
            source_limit: false,
            alone: false,
        }
    }

    /// The server is started in the root directory of the workspace.
    pub(super) fn in_root(command: Command) -> Self {
        Self::new(in_root(command))
    }

    /// The server has this number of sockets, and needs no `--listen` argument.
    pub(super) fn listeners(mut self, listeners: usize) -> Self {
        self.listeners = Some(listeners);
        self
    }

    /// The default limit on connections per source applies.
    ///
    /// Without this the limit is off, because all clients of a test are one source.
    pub(super) fn default_source_limit(mut self) -> Self {
        self.source_limit = true;
        self
    }

    /// No other test has a server while this one runs.
    pub(super) fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Serves `guest` with further arguments, once the machine is free.
    pub(super) fn guest(mut self, mode: &str, guest: &Path, arguments: &[&str]) -> Launch {
        let machine = self.machine();
        self.command.args(["serve", "--dispatch", mode]);
        if !arguments.contains(&"--threads") {
            // Two threads even on a machine with one core.
            self.command.args(["--threads", "2"]);
        }
        if !self.source_limit && !arguments.contains(&"--max-connections-per-source") {
            self.command.args(["--max-connections-per-source", "off"]);
        }
        self.command.args(arguments);
        let listeners = self.listeners.unwrap_or_else(|| {
            let named = arguments.iter().filter(|flag| **flag == "--listen").count();
            if named == 0 {
                self.command.args(["--listen", "127.0.0.1:0"]);
            }
            named.max(1)
        });
        self.command.arg(guest);
        Launch {
            command: self.command,
            listeners,
            machine,
        }
    }

    /// Serves a config file, once the machine is free.
    pub(super) fn config(mut self, config: &Path) -> Launch {
        let machine = self.machine();
        self.command.args(["serve", "--config"]).arg(config);
        Launch {
            command: self.command,
            listeners: self.listeners.unwrap_or(1),
            machine,
        }
    }

    fn machine(&self) -> MachineUse {
        if self.alone {
            MachineUse::exclusive()
        } else {
            MachineUse::shared()
        }
    }
}
