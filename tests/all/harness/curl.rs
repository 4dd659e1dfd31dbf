//! Requests by curl.

use std::path::Path;
use std::process::Command;

use super::server::Server;
use super::tools::output;

/// Runs curl against a server and returns what curl prints.
pub(crate) fn curl(server: &Server, path: &str, arguments: &[&str]) -> String {
    let mut command = command();
    command.args(arguments);
    let output = output(command.arg(format!("http://{}{path}", server.address())));
    assert!(
        output.status.success(),
        "{command:?} failed with {}\n{}\n{server:?}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("pages are text")
}

/// Runs curl against a Unix socket and returns what curl prints.
pub(super) fn curl_unix(socket: &Path, path: &str) -> String {
    let mut command = command();
    command.arg("--unix-socket").arg(socket);
    let output = output(command.arg(format!("http://localhost{path}")));
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("the answer is text")
}

fn command() -> Command {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--max-time", "60"]);
    command
}
