//! Generates HTTP load with wrk and parses its report.

use std::net::SocketAddr;
use std::process::Command;

use crate::server::Server;

/// The usual number of concurrent connections.
pub(crate) const CONNECTIONS: u32 = 32;

/// How requests use connections.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Workload {
    /// Each request opens a connection.
    NewConnections,
    /// Requests reuse connections.
    KeepAlive,
}

/// The figures that wrk reports.
pub(crate) struct Measurement {
    pub(crate) requests: f64,
    pub(crate) seconds: f64,
    /// Median latency, in microseconds.
    pub(crate) p50: f64,
    /// 99th percentile of the latency, in microseconds.
    pub(crate) p99: f64,
}

/// Requests the start page of the server at `address` for some seconds.
///
/// # Errors
///
/// Fails if wrk does not run, or if a request fails.
pub(crate) fn run(
    address: SocketAddr,
    workload: Workload,
    connections: u32,
    seconds: u32,
) -> Result<Measurement, String> {
    let mut command = Command::new("wrk");
    command.args(["--threads", "1", "--latency", "--timeout", "10s"]);
    command.arg("--connections").arg(connections.to_string());
    command.arg("--duration").arg(format!("{seconds}s"));
    if workload == Workload::NewConnections {
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
    parse(&text).ok_or_else(|| format!("unexpected output of {command:?}:\n{text}"))
}

/// Like [`run`], but also returns the server's CPU time per request, in microseconds.
///
/// # Errors
///
/// Fails if [`run`] fails.
pub(crate) fn measure(
    server: &Server,
    workload: Workload,
    connections: u32,
    seconds: u32,
) -> Result<(Measurement, f64), String> {
    let before = server.cpu_micros();
    let measurement = run(server.address(), workload, connections, seconds)?;
    let cpu = (server.cpu_micros() - before) / measurement.requests;
    Ok((measurement, cpu))
}

fn parse(text: &str) -> Option<Measurement> {
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
    Some(Measurement {
        requests,
        seconds: microseconds(seconds)? / 1e6,
        p50: percentile("50%")?,
        p99: percentile("99%")?,
    })
}

/// Parses a time in wrk's format.
fn microseconds(text: &str) -> Option<f64> {
    for (unit, factor) in [("us", 1.0), ("ms", 1e3), ("s", 1e6), ("m", 6e7)] {
        if let Some(number) = text.strip_suffix(unit) {
            return Some(number.parse::<f64>().ok()? * factor);
        }
    }
    None
}
