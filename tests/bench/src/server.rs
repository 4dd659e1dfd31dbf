//! A server process under measurement.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// It is killed when this is dropped.
pub(crate) struct Server {
    name: &'static str,
    child: Child,
    address: String,
}

impl Server {
    /// Runs a command that prints `listening on ADDRESS`.
    ///
    /// # Errors
    ///
    /// Says why there is no such server.
    pub(crate) fn start(name: &'static str, command: &[&str]) -> Result<Self, String> {
        let mut child = Command::new(command[0])
            .args(&command[1..])
            .stdout(Stdio::piped())
            // The log is written, and its cost counts.
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("cannot run {}: {error}; run `make bench`", command[0]))?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            // A line that cannot be read is as bad as an empty one.
            let _ = BufReader::new(stdout).read_line(&mut line);
        }
        let address = line
            .trim_end()
            .strip_prefix("listening on ")
            .map(String::from);
        let server = Self {
            name,
            child,
            address: address.clone().unwrap_or_default(),
        };
        match address {
            Some(_) => Ok(server),
            None => Err(format!(
                "{name} does not listen: run {command:?} to see why"
            )),
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Processor time that the process has used so far, in user and kernel mode (proc(5), `stat`).
    ///
    /// # Errors
    ///
    /// Fails when the server has ended.
    pub(crate) fn cpu_seconds(&self) -> Result<f64, String> {
        let path = format!("/proc/{}/stat", self.child.id());
        let stat = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
        // The second field, a name in parentheses, may contain spaces.
        let fields = stat
            .rsplit_once(')')
            .map(|(_, fields)| fields)
            .unwrap_or_default();
        let ticks: u64 = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .flat_map(str::parse::<u64>)
            .sum();
        Ok(ticks as f64 / TICKS_PER_SECOND)
    }
}

/// `USER_HZ`, which is part of Linux's interface to user space on all common architectures.
const TICKS_PER_SECOND: f64 = 100.0;

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
