//! Bytes back and forth through the echo server: throughput and latency.

use crate::report::{Section, Table};
use crate::samples::{Samples, quantile};
use crate::server::{Address, Server, contenders};
use crate::{Effort, client};

const GIB: usize = 1 << 30;

/// The length of a ping, in bytes.
const PING: usize = 64;

pub(crate) fn measure(effort: Effort) -> Result<Section, String> {
    let servers = contenders("echo", &[])
        .map(|(name, command)| Server::start(name, &command, Address::Printed))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let failed = |server: &Server| {
        let name = server.name().to_string();
        move |error: std::io::Error| format!("{name}: {error}")
    };
    let mut tables = Vec::new();
    for connections in [1, 16] {
        let mut rates: Vec<Samples> = servers.iter().map(|_| Samples::default()).collect();
        let mut cpu = rates.clone();
        for round in 0..=effort.rounds {
            for ((server, rates), cpu) in servers.iter().zip(&mut rates).zip(&mut cpu) {
                let before = server.cpu_micros();
                let seconds = client::bulk(server.address(), connections, GIB / connections)
                    .map_err(failed(server))?;
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
        tables.push(Table {
            title: format!("1 GiB there and back, {connections} connections at once"),
            columns: vec!["server", "GB/s", "times native", "server CPU, ms"],
            rows: servers.iter().zip(&rates).zip(&cpu).map(row).collect(),
        });
    }
    let mut p50: Vec<Samples> = servers.iter().map(|_| Samples::default()).collect();
    let mut p99 = p50.clone();
    for _ in 0..effort.rounds {
        for ((server, p50), p99) in servers.iter().zip(&mut p50).zip(&mut p99) {
            let mut times = client::ping_pong(server.address(), PING, effort.seconds)
                .map_err(failed(server))?;
            p50.push(quantile(&mut times, 0.5));
            p99.push(quantile(&mut times, 0.99));
        }
    }
    let row = |((server, own50), own99): ((&Server, &Samples), &Samples)| {
        vec![
            server.name().to_string(),
            format!("{:.1}", own50.median()),
            own50.over(&p50[0]).with_spread(2),
            format!("{:.1}", own99.median()),
            own99.over(&p99[0]).with_spread(2),
        ]
    };
    tables.push(Table {
        title: format!("Ping-pong of {PING} bytes, one connection"),
        columns: vec![
            "server",
            "p50, µs",
            "times native",
            "p99, µs",
            "times native",
        ],
        rows: servers.iter().zip(&p50).zip(&p99).map(row).collect(),
    });
    Ok(Section {
        title: "Bytes back and forth",
        notes: vec![
            "Echo, with the same handler natively and as a guest. The client is the bench's own: \
             wrk speaks only HTTP."
                .into(),
        ],
        tables,
        charts: Vec::new(),
    })
}
