//! Helpers for the tests of sockets.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::harness::{Client, Server, guest, page, request, run, wasinetd};

/// A temporary directory for a Unix socket.
pub(super) struct SocketDirectory(pub(super) tempfile::TempDir);

impl SocketDirectory {
    pub(super) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// The path of the socket.
    pub(super) fn path(&self) -> PathBuf {
        self.0.path().join("a.sock")
    }

    /// The value of `--listen`.
    pub(super) fn flag(&self) -> String {
        format!("unix:{}", self.path().display())
    }

    /// Starts a server that listens on the socket.
    pub(super) fn serve(&self, mode: &str, guest: &Path, arguments: &[&str]) -> Server {
        let flag = self.flag();
        let listen = ["--listen", &flag];
        Server::start(mode, guest, &[&listen, arguments].concat())
    }
}

/// Runs a program with this input and returns its output, or None if it is not installed.
pub(super) fn run_with_input(program: &str, arguments: &[&str], input: &str) -> Option<String> {
    let spawned = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = match spawned {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            println!("skipped: {program} is not installed");
            return None;
        }
        child => child.unwrap(),
    };
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
    Some(String::from_utf8(output.stdout).unwrap())
}

/// Runs a command that must fail with this code and a message that has all `parts`.
pub(super) fn assert_refused(command: &mut Command, code: i32, parts: &[&str]) {
    let output = run(command);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{command:?}\n{message}");
    for part in parts {
        assert!(message.contains(part), "no {part:?} in {message}");
    }
}

/// A command that serves `echo`.
pub(super) fn serve_echo(arguments: &[&str]) -> Command {
    let mut command = wasinetd();
    command.arg("serve").args(arguments).arg(guest("echo"));
    command
}

/// Requests a page, or returns None when no server listens any more.
pub(super) fn get_page(path: &Path) -> Option<()> {
    let mut client = match Client::connect_unix(path) {
        Ok(client) => client,
        Err(error) => {
            let gone = [ErrorKind::ConnectionRefused, ErrorKind::NotFound];
            assert!(gone.contains(&error.kind()), "{error}");
            return None;
        }
    };
    client.send(request("/"));
    assert_eq!(client.response().body, page("hello.html"));
    Some(())
}
