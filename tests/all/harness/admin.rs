//! A server's admin socket, and the process that answers there.

use std::path::PathBuf;
use std::process::Output;

use rustix::process::{Pid, Signal, kill_process};

use super::curl::curl_unix;
use super::machine::wait_until;
use super::tools::{output, wasinetd};

/// A path for an admin socket, in a temporary directory.
pub(crate) struct AdminSocket {
    directory: tempfile::TempDir,
    /// The value of `--admin`.
    pub(crate) flag: String,
}

impl AdminSocket {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().expect("disk is free");
        let path = directory.path().join("admin.sock");
        Self {
            directory,
            flag: format!("unix:{}", path.display()),
        }
    }

    /// The path of the socket.
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("admin.sock")
    }

    /// A path in the directory of the socket.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs `wasinetd ctl`.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> Output {
        output(
            wasinetd()
                .args(["ctl", "--admin", &self.flag])
                .args(arguments),
        )
    }

    /// Runs `wasinetd ctl`, which must succeed, and returns its standard output.
    pub(crate) fn ctl_text(&self, arguments: &[&str]) -> String {
        let output = self.ctl(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("the output is text")
    }

    /// Runs `wasinetd ctl --json`, which must succeed, and returns its answer.
    pub(crate) fn ctl_json(&self, arguments: &[&str]) -> serde_json::Value {
        let text = self.ctl_text(&[&["--json"], arguments].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"))
    }

    /// The number of versions of the first service.
    pub(crate) fn version_count(&self) -> usize {
        let status = self.ctl_json(&["status"]);
        let versions = status["services"][0]["versions"].as_array();
        versions.expect("the status lists versions").len()
    }

    /// Waits until no connection is open.
    pub(crate) fn wait_for_no_connections(&self) {
        wait_until("connections stay open", || {
            self.ctl_json(&["status"])["open"] == 0
        });
    }

    /// All metrics, as text.
    pub(crate) fn metrics(&self) -> String {
        curl_unix(&self.path(), "/metrics")
    }
}

/// A server process that another server started. Dropping this kills the process.
pub(crate) struct Successor(pub(crate) Pid);

impl Successor {
    /// The process that answers at `admin` now.
    pub(crate) fn of(admin: &AdminSocket) -> Self {
        let pid = admin.ctl_json(&["status"])["pid"].as_i64().unwrap();
        Self(Pid::from_raw(pid as i32).unwrap())
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
    }
}
