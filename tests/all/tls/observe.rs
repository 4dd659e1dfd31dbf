//! Observation of a server by openssl and by its metrics.

use std::process::Command;

use crate::harness::{AdminSocket, Server, output};

/// Runs `openssl s_client` and returns its standard output and standard error.
pub(super) fn openssl(server: &Server, arguments: &[&str]) -> (String, String) {
    let mut command = Command::new("openssl");
    command
        .args(["s_client", "-connect", &server.address().to_string()])
        .args(arguments);
    let output = output(&mut command);
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// The number of handshakes with this outcome, from the metrics.
pub(super) fn handshakes(admin: &AdminSocket, outcome: &str) -> u64 {
    metric(
        admin,
        &format!("wasinetd_handshakes_total{{outcome=\"{outcome}\"}} "),
    )
}

/// The value of the first metric whose line begins with `name`.
pub(super) fn metric(admin: &AdminSocket, name: &str) -> u64 {
    let metrics = admin.metrics();
    let line = metrics.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name} in {metrics}"))
        .parse()
        .unwrap()
}

/// The directory that the guest `hello` serves.
pub(super) const PAGES: [&str; 2] = ["--dir", "static::/static"];
