//! Load by wrk, and what it says of it.

use std::net::SocketAddr;
use std::process::Command;

use crate::server::Server;

/// Connections that are open at once, unless their number is what is looked at.
pub(crate) const CONNECTIONS: u32 = 32;

/// What is asked of a server.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Work {
    /// A connection for each request.
    New,
    /// Request after request on connections that are kept.
    Kept,
}

/// What wrk has measured.
pub(crate) struct Load {
    pub(crate) requests: f64,
    pub(crate) seconds: f64,
    /// Latencies, in microseconds.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

/// Asks for the start page of the server at `address` for some seconds.
///
/// # Errors
///
/// Says why wrk did not run, or that not all requests were answered well.
pub(crate) fn run(
    address: SocketAddr,
    work: Work,
    connections: u32,
    seconds: u32,
) -> Result<Load, String> {
    let mut command = Command::new("wrk");
    command.args(["--threads", "1", "--latency", "--timeout", "10s"]);
    command.arg("--connections").arg(connections.to_string());
    command.arg("--duration").arg(format!("{seconds}s"));
    if work == Work::New {
        command.args(["--header", "Connection: close"]);
    }
    command.arg(format!("http://{address}/"));
    let output = command
        .output()
        .map_err(|error| format!("cannot run wrk: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || text.contains("errors") || text.contains("Non-2xx") {
        return Err(format!(
            "{command:?} failed:\n{text}{}",
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    parse(&text).ok_or_else(|| format!("{command:?} said something unexpected:\n{text}"))
}

/// As [`run`], with the processor time of the server for each request, in microseconds.
///
/// # Errors
///
/// As [`run`].
pub(crate) fn measure(
    server: &Server,
    work: Work,
    connections: u32,
    seconds: u32,
) -> Result<(Load, f64), String> {
    let before = server.cpu_micros();
    let load = run(server.address(), work, connections, seconds)?;
    let cpu = (server.cpu_micros() - before) / load.requests;
    Ok((load, cpu))
}

fn parse(text: &str) -> Option<Load> {
    let percentile = |name| {
        text.lines()
            .find_map(|line| microseconds(line.trim().strip_prefix(name)?.trim()))
    };
    let (requests, rest) = text
        .lines()
        .find_map(|line| line.trim().split_once(" requests in "))?;
    let (seconds, _) = rest.split_once(',')?;
    let requests: f64 = requests.parse().ok()?;
    (requests > 0.0).then_some(())?;
    Some(Load {
        requests,
        seconds: microseconds(seconds)? / 1e6,
        p50: percentile("50%")?,
        p99: percentile("99%")?,
    })
}

/// A time as wrk writes it.
fn microseconds(text: &str) -> Option<f64> {
    for (unit, factor) in [("us", 1.0), ("ms", 1e3), ("s", 1e6), ("m", 6e7)] {
        if let Some(number) = text.strip_suffix(unit) {
            return Some(number.parse::<f64>().ok()? * factor);
        }
    }
    None
}
