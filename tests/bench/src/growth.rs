//! Cost by number of connections, number of threads and size of the guest.

use std::path::Path;

use crate::effort::Effort;
use crate::machine;
use crate::report::{Chart, Section, Table};
use crate::samples::Samples;
use crate::server::{Address, PAGES, QUIET_PAGES, Server, contenders, wasinetd};
use crate::wrk::{self, CONNECTIONS, Workload};

/// The data sizes of the padded guests, in KiB. Their file names end with the size.
const PADDING_KIB: [u32; 6] = [0, 64, 256, 1024, 4096, 16384];

pub(crate) fn measure(effort: Effort) -> Result<Section, String> {
    // The shape of the curves matters, so many short measurements suffice.
    let effort = Effort {
        rounds: effort.rounds.min(3),
        seconds: effort.seconds.min(2),
    };
    let (keep_alive, keep_alive_chart) = by_connections(effort, Workload::KeepAlive)?;
    let (new, new_chart) = by_connections(effort, Workload::NewConnections)?;
    let (size, size_chart) = by_guest_size(effort)?;
    Ok(Section {
        title: "How cost grows",
        notes: vec![format!(
            "Server CPU per request, load by wrk; medians of {} rounds of {} s.",
            effort.rounds, effort.seconds
        )],
        tables: vec![keep_alive, new, by_threads(effort)?, size],
        charts: vec![keep_alive_chart, new_chart, size_chart],
    })
}

fn by_connections(effort: Effort, workload: Workload) -> Result<(Table, Chart), String> {
    let (steps, title, name) = match workload {
        Workload::KeepAlive => (
            [1, 10, 100, 1_000, 10_000].as_slice(),
            "Kept-alive requests by concurrent connections",
            "growth-kept",
        ),
        Workload::NewConnections => (
            [1, 10, 100, 1_000].as_slice(),
            "New connections by concurrent connections",
            "growth-new",
        ),
    };
    let servers = contenders("hello", &QUIET_PAGES)
        .map(|(name, command)| Server::start(name, &command, Address::Printed))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let mut lines: Vec<(String, Vec<(f64, f64)>)> = servers
        .iter()
        .map(|server| (server.name().to_string(), Vec::new()))
        .collect();
    let mut rows = Vec::new();
    for connections in steps {
        let mut cpu: Vec<Samples> = servers.iter().map(|_| Samples::default()).collect();
        for server in &servers {
            // Warm up: the host maps pool slots at their first use.
            wrk::run(server.address(), workload, *connections, 1)?;
        }
        for _ in 0..effort.rounds {
            for (server, cpu) in servers.iter().zip(&mut cpu) {
                cpu.push(wrk::measure(server, workload, *connections, effort.seconds)?.1);
            }
        }
        let mut row = vec![connections.to_string()];
        for (server_cpu, (_, line)) in cpu.iter().zip(&mut lines) {
            line.push((f64::from(*connections), server_cpu.median()));
            row.push(format!(
                "{:.1} ({:.2})",
                server_cpu.median(),
                server_cpu.over(&cpu[0]).median()
            ));
        }
        rows.push(row);
    }
    let table = Table {
        title: format!("{title}: server CPU per request, µs (times native)"),
        columns: vec!["connections", "native", "concurrent", "spawn"],
        rows,
    };
    let chart = Chart {
        name,
        title,
        x: "concurrent connections",
        y: "server CPU per request, µs",
        lines,
    };
    Ok((table, chart))
}

/// Measures with one thread up to one per core.
fn by_threads(effort: Effort) -> Result<Table, String> {
    let mut rows = Vec::new();
    for threads in 1..=machine::cores() {
        let count = threads.to_string();
        let arguments = [PAGES.as_slice(), &["--threads", &count]].concat();
        let environment = [("TOKIO_WORKER_THREADS", count.as_str())];
        let servers = contenders("hello", &arguments)
            .map(|(name, command)| {
                Server::start_with(name, &command, Address::Printed, &environment)
            })
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?;
        let mut cpu = vec![[Samples::default(), Samples::default()]; servers.len()];
        for _ in 0..effort.rounds {
            for (server, cpu) in servers.iter().zip(&mut cpu) {
                let workloads = [Workload::NewConnections, Workload::KeepAlive];
                for (workload, cpu) in workloads.into_iter().zip(cpu) {
                    cpu.push(wrk::measure(server, workload, CONNECTIONS, effort.seconds)?.1);
                }
            }
        }
        for (server, cpu) in servers.iter().zip(&cpu) {
            let [new, keep_alive] = cpu.each_ref().map(|cpu| format!("{:.1}", cpu.median()));
            rows.push(vec![
                server.name().to_string(),
                count.clone(),
                new,
                keep_alive,
            ]);
        }
    }
    Ok(Table {
        title: "By threads: server CPU, µs".into(),
        columns: vec![
            "server",
            "threads",
            "per new connection",
            "per kept-alive request",
        ],
        rows,
    })
}

fn by_guest_size(effort: Effort) -> Result<(Table, Chart), String> {
    let mut servers = Vec::new();
    for padding in PADDING_KIB {
        let guest = format!("bench/padded_{padding}");
        let path = format!("target/guests/{guest}.wasm");
        let bytes = std::fs::metadata(Path::new(&path))
            .map_err(|error| format!("{path}: {error}; run `make bench`"))?
            .len();
        let command = wasinetd("concurrent", &guest, &["--log-level", "warn"]);
        let server = Server::start(&guest, &command, Address::Printed)?;
        servers.push((bytes as f64 / 1024.0, server, Samples::default()));
    }
    for _ in 0..effort.rounds {
        for (_, server, cpu) in &mut servers {
            let workload = Workload::NewConnections;
            cpu.push(wrk::measure(server, workload, CONNECTIONS, effort.seconds)?.1);
        }
    }
    let rows = servers
        .iter()
        .map(|(kib, _, cpu)| vec![format!("{kib:.0}"), cpu.with_spread(1)])
        .collect();
    let points = servers
        .iter()
        .map(|(kib, _, cpu)| (*kib, cpu.median()))
        .collect();
    let table = Table {
        title: "New connections by the size of the guest".into(),
        columns: vec!["guest, KiB", "server CPU per connection, µs"],
        rows,
    };
    let chart = Chart {
        name: "growth-size",
        title: "New connections by the size of the guest",
        x: "guest, KiB",
        y: "server CPU per connection, µs",
        lines: vec![("wasinetd, concurrent".into(), points)],
    };
    Ok((table, chart))
}
