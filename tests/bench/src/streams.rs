//! Echo: throughput and latency.

use crate::client;
use crate::effort::Effort;
use crate::report::{Section, Table};
use crate::samples::{Samples, quantile};
use crate::server::{Address, Server, contenders};

const GIB: usize = 1 << 30;

/// The length of a ping, in bytes.
const PING: usize = 64;

pub(crate) fn measure(effort: Effort) -> Result<Section, String> {
    let servers = contenders("echo", &[])
        .map(|(name, command)| Server::start(name, &command, Address::Printed))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Section {
        title: "Echo",
        notes: vec![
            "The same echo handler runs natively and as a guest. The client is part of the \
             benchmark, because wrk supports only HTTP."
                .into(),
        ],
        tables: vec![
            throughput(&servers, 1, effort)?,
            throughput(&servers, 16, effort)?,
            latency(&servers, effort)?,
        ],
        charts: Vec::new(),
    })
}

fn throughput(servers: &[Server], connections: usize, effort: Effort) -> Result<Table, String> {
    let mut rates: Vec<Samples> = servers.iter().map(|_| Samples::default()).collect();
    let mut cpu = rates.clone();
    for round in 0..=effort.rounds {
        for ((server, rates), cpu) in servers.iter().zip(&mut rates).zip(&mut cpu) {
            let before = server.cpu_micros();
            let seconds = client::bulk(server.address(), connections, GIB / connections)
                .map_err(|error| format!("{}: {error}", server.name()))?;
            // The first round warms up.
            if round > 0 {
                rates.push(GIB as f64 / seconds / 1e9);
                cpu.push((server.cpu_micros() - before) / 1e3);
            }
        }
    }
    let row = |((server, rate), cpu): ((&Server, &Samples), &Samples)| {
        vec![
            server.name().to_string(),
            format!("{:.2}", rate.median()),
            rate.over(&rates[0]).with_spread(2),
            format!("{:.0}", cpu.median()),
        ]
    };
    Ok(Table {
        title: format!("1 GiB in each direction, concurrent connections: {connections}"),
        columns: vec!["server", "GB/s", "times native", "server CPU, ms"],
        rows: servers.iter().zip(&rates).zip(&cpu).map(row).collect(),
    })
}

fn latency(servers: &[Server], effort: Effort) -> Result<Table, String> {
    let mut p50: Vec<Samples> = servers.iter().map(|_| Samples::default()).collect();
    let mut p99 = p50.clone();
    for _ in 0..effort.rounds {
        for ((server, p50), p99) in servers.iter().zip(&mut p50).zip(&mut p99) {
            let mut times = client::ping_pong(server.address(), PING, effort.seconds)
                .map_err(|error| format!("{}: {error}", server.name()))?;
            p50.push(quantile(&mut times, 0.5));
            p99.push(quantile(&mut times, 0.99));
        }
    }
    let row = |((server, server_p50), server_p99): ((&Server, &Samples), &Samples)| {
        vec![
            server.name().to_string(),
            format!("{:.1}", server_p50.median()),
            server_p50.over(&p50[0]).with_spread(2),
            format!("{:.1}", server_p99.median()),
            server_p99.over(&p99[0]).with_spread(2),
        ]
    };
    Ok(Table {
        title: format!("Ping-pong of {PING} bytes on one connection"),
        columns: vec![
            "server",
            "p50, µs",
            "times native",
            "p99, µs",
            "times native",
        ],
        rows: servers.iter().zip(&p50).zip(&p99).map(row).collect(),
    })
}
